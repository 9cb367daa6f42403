"""Dependencies between channels: torch-pruning's graph of a network, made into plain records."""

from wgates_plugin.dependencies.dependency_trace import DependencyTrace

__all__ = ["DependencyTrace"]

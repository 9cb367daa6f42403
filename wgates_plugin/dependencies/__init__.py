"""Dependencies between channels: torch-pruning's graph of a network, made into plain records."""

from wgates_plugin.dependencies.trace import DependencyTrace

__all__ = ["DependencyTrace"]

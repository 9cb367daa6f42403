"""Latency-targeted channel pruning: milliseconds in, a smaller exported network out."""

from wgates_plugin.channels import ChannelGroup, ChannelSpace
from wgates_plugin.plan import PruningPlan
from wgates_plugin.tracing import trace

__all__ = ["ChannelGroup", "ChannelSpace", "PruningPlan", "trace"]

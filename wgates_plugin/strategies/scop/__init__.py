"""SCOP: Scientific Control for Reliable Neural Network Pruning (Tang et al., NeurIPS 2020).

A filter matters as far as the network prefers its real feature to one made from a knockoff input.
"""

from wgates_plugin.strategies.scop.strategy import ScopSettings, ScopStrategy

__all__ = ["ScopSettings", "ScopStrategy"]

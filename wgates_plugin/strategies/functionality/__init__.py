"""Functionality-oriented filter pruning: filters that repeat what another one does go first.

Qin, Yu, Liu, Chen, "Functionality-Oriented Convolutional Filter Pruning", arXiv 1811.02639
(BMVC 2019). What a filter does is the input pattern that excites it most; filters of like patterns
form a cluster, and of each cluster those go that contribute least to the loss.
"""

from wgates_plugin.strategies.functionality.settings import FunctionalitySettings
from wgates_plugin.strategies.functionality.strategy import FunctionalityStrategy

__all__ = ["FunctionalitySettings", "FunctionalityStrategy"]

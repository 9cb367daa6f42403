"""MetaPruning: widths by evolution, judged by a network that generates their weights.

Liu et al., "MetaPruning: Meta Learning for Automatic Neural Network Channel Pruning", ICCV 2019.
"""

from wgates_plugin.strategies.metapruning.evolution import Evolution
from wgates_plugin.strategies.metapruning.genes import Genes
from wgates_plugin.strategies.metapruning.pruning_net import PruningNet
from wgates_plugin.strategies.metapruning.settings import MetaPruningSettings
from wgates_plugin.strategies.metapruning.strategy import MetaPruningStrategy

__all__ = ["Evolution", "Genes", "MetaPruningSettings", "MetaPruningStrategy", "PruningNet"]

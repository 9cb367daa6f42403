"""Micro-structured weight unification (Lin, Jiang, Wang 2021): blocks of weights share one magnitude.

A weight transform: shapes stay, so it saves bytes and no time. Pruning small blocks is the case of
magnitude zero. `unify` trains a network into the structure, `save_unified` and `load_unified` store its
weights in few bytes, bit for bit, and `dead_channels` finds what the zeros have emptied.
"""

from wgates_plugin.transforms.unification.blocks import BlockGrid, layer_grids
from wgates_plugin.transforms.unification.dead_channels import cut_dead, dead_channels
from wgates_plugin.transforms.unification.file import load_unified, save_unified
from wgates_plugin.transforms.unification.procedure import Unified, unify
from wgates_plugin.transforms.unification.projection import Structure, project
from wgates_plugin.transforms.unification.settings import UnificationSettings

__all__ = [
    "BlockGrid",
    "Structure",
    "UnificationSettings",
    "Unified",
    "cut_dead",
    "dead_channels",
    "layer_grids",
    "load_unified",
    "project",
    "save_unified",
    "unify",
]

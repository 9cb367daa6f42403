"""Sampling on several identical machines or devices at once, through Ray.

One actor per worker measures; this process alone plans and writes the file. What a dying worker was
measuring is given to another, so that a death costs one sample's time and no sample.
"""

from wgates_plugin.efficiency.farm.bench_recipe import BenchRecipe
from wgates_plugin.efficiency.farm.collecting import collect_on_farm
from wgates_plugin.efficiency.farm.settings import Farm

__all__ = ["BenchRecipe", "Farm", "collect_on_farm"]

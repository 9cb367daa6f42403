"""Recipes: a whole job in one YAML or JSON file, checked before anything is loaded."""

from wgates_plugin.recipe.blocks import Recipe
from wgates_plugin.recipe.job import load_recipe, prepare, run_recipe

__all__ = ["Recipe", "load_recipe", "prepare", "run_recipe"]

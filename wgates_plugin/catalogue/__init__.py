"""Data sets and networks by name, for recipes, the command line and the benchmarks."""

from wgates_plugin.catalogue.base import Data
from wgates_plugin.catalogue.data import DATA, load_data
from wgates_plugin.catalogue.models import MODELS, load_model
from wgates_plugin.catalogue.tensor_loader import TensorLoader
from wgates_plugin.catalogue.torchvision_import import import_torchvision

__all__ = [
    "DATA",
    "MODELS",
    "Data",
    "TensorLoader",
    "import_torchvision",
    "load_data",
    "load_model",
]

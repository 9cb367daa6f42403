"""Import torchvision where its compiled extension cannot load.

A CPU-only torch together with the package registry's ordinary torchvision wheel, which is built
for CUDA, fails at `import torchvision` with "operator torchvision::nms does not exist": the wheel's
compiled file cannot load, and torchvision then describes operators that nobody has defined.
Models, transforms and data sets need none of them. Declaring the two operators (their signatures
only) lets the import go through; calling them still fails, as it should.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch

from wgates_plugin.errors import MissingExtraError

SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}

# A declaration lives only as long as its library object.
_libraries: list[torch.library.Library] = []


def _extension_loads(package: Path) -> bool:
    files = [*package.glob("_C*.so"), *package.glob("_C*.pyd"), *package.glob("_C*.dylib")]
    for file in files:
        try:
            torch.ops.load_library(str(file))
        except (ImportError, OSError):
            continue
        return True
    return False


def _has_schema(qualified: str) -> bool:
    return any(schema.name == qualified for schema in torch._C._jit_get_all_schemas())


def import_torchvision() -> ModuleType:
    """torchvision, imported even if its compiled extension does not fit this torch.

    Raises:
        MissingExtraError: torchvision is not installed.
    """
    if "torchvision" in sys.modules:
        return sys.modules["torchvision"]
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise MissingExtraError("torchvision", "vision", "this model or data set")
    if not _extension_loads(Path(spec.origin).parent) and not _libraries:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name, schema in SCHEMAS.items():
            if not _has_schema(f"torchvision::{name}"):
                library.define(name + schema)
        _libraries.append(library)
    return importlib.import_module("torchvision")

"""Whether the NNI that is installed is the one this door was made for."""

from __future__ import annotations

import importlib.util

from wgates_plugin.catalogue.torchvision_import import import_torchvision
from wgates_plugin.errors import LibraryVersionError
from wgates_plugin.latency.base import require

VERSION = "3.0"


def require_nni() -> None:
    """Refuse to go on without NNI 3.0.

    Raises:
        MissingExtraError: nni is not installed.
        LibraryVersionError: another version is.
    """
    nni = require("nni", extra="nni", purpose="the NNI door")
    found = str(getattr(nni, "__version__", "unknown"))
    if found != VERSION:
        raise LibraryVersionError(
            f"nni {found} is installed, the NNI door works with nni=={VERSION}, whose pruners, "
            "config lists and evaluators differ from all earlier ones; install it with: "
            'pip install "wgates-plugin[nni]"'
        )
    if all(importlib.util.find_spec(name) for name in ("pytorch_lightning", "torchvision")):
        # `nni.compression` imports Lightning where it finds it, Lightning's metrics import torchvision,
        # and a torchvision that does not fit this torch would take the whole door along.
        import_torchvision()

"""Images of your own in folders, for experiments: the path stands in `data.root`.

A recipe's `folder:PATH` does the same, but is refused where PATH is not there, and with it the
experiment; here that is said when the data are loaded.
"""

from __future__ import annotations

from pathlib import Path

from wgates_plugin.catalogue import Data, load_data


def data(
    root: Path,
    batch_size: int = 64,
    image_size: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Data:
    """ROOT/train/CLASS/* and ROOT/val/CLASS/*, see `catalogue.image_folder`.

    Raises:
        ConfigError: a folder is missing, or both parts differ in classes.
    """
    return load_data(
        f"folder:{root}", batch_size=batch_size, image_size=image_size, limit=limit, seed=seed
    )

"""Names that fit into a picture."""

from __future__ import annotations


def shorten(name: str, most: int = 40) -> str:
    """A long name with its middle left out; both ends tell groups apart.

    >>> shorten("features.denseblock4.denselayer16.conv2", 20)
    'features.d…r16.conv2'
    """
    if len(name) <= most:
        return name
    head = most // 2
    return name[:head] + "…" + name[len(name) - (most - head - 1) :]

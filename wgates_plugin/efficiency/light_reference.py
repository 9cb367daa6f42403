"""A light reference for samples: the network at about half widths, in the untouched network's clock."""

from __future__ import annotations

from collections.abc import Sequence

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.bench import Bench, quietest
from wgates_plugin.efficiency.samples.file import SampleFile
from wgates_plugin.efficiency.samples.record import rounded
from wgates_plugin.latency.base import Family, Session
from wgates_plugin.latency.timing import measure


def light_bench(
    family: Family,
    space: ChannelSpace,
    dense: Session,
    dense_ms: float,
    *,
    grid: int,
    seconds: float,
) -> Bench:
    """A bench whose reference is the network at about half widths, calibrated against `dense`.

    Half of the time of a sample goes into its reference; this one takes a fraction of the
    untouched network's. An interleaved measurement, again while it is disturbed, puts it into the
    untouched network's clock:

        reference_ms = median_i(light_i / dense_i) * dense_ms

    Args:
        dense: the untouched network, ready to run.
        dense_ms: its latency, the clock that all samples are given in.
        seconds: timed inference of the calibration, both networks together.
    """
    widths = space.half_widths(grid)
    reference = family.session(widths)
    try:
        found = quietest(
            lambda: measure(reference, reference=dense, reference_ms=dense_ms, seconds=seconds)
        )
    except BaseException:
        reference.close()
        raise
    about = {
        "network": "resized",
        "widths": list(widths),
        "dense_ms": dense_ms,
        "ratio_to_dense": found.ratio,
        "ratio_spread": found.ratio_spread,
        "drift": found.drift,
        "inference_seconds": rounded(found.inference_seconds + found.discarded_seconds),
        "reference_minima_ms": [rounded(ms) for ms in found.samples_ms],
        "dense_minima_ms": [rounded(ms) for ms in found.reference_samples_ms],
    }
    return Bench(family, reference, found.latency_ms, about)


def kept_light_bench(
    file: SampleFile, family: Family, widths: Sequence[int], dense_ms: float
) -> Bench | None:
    """The bench at `widths` (G,) that samples of the file were timed at, not by a farm, in this clock.

    Its calibration goes on, so that their clock does; None where there is none.
    """
    for sample in reversed(file.usable):
        source = file.sources[sample.source]
        known = (
            source.worker,
            source.reference.get("widths"),
            source.reference.get("dense_ms"),
        )
        if known == ("main", list(widths), dense_ms):
            return Bench(family, family.session(widths), source.reference_ms, source.reference)
    return None

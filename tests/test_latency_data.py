"""What LPNet learns from: which layer profiles say something about the network."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from networks import example, tiny

from wgates_plugin import ChannelSpace, trace
from wgates_plugin.efficiency.lpnet.data import LatencyData, weighted_names
from wgates_plugin.errors import MeasurementError

COUNT = 10


@pytest.fixture(scope="module")
def space() -> ChannelSpace:
    return trace(tiny("plain"), example())


def data(space: ChannelSpace, profiles: list[Any]) -> LatencyData:
    """Networks of 1, 1.1, 1.2, ... ms."""
    widths = [(1 + index % 4, 1 + index) for index in range(COUNT)]
    return LatencyData.of(space, widths, [1 + 0.1 * i for i in range(COUNT)], profiles)


def whole(space: ChannelSpace, share: float = 1.0) -> list[dict[str, float]]:
    """Profiles that divide `share` of each latency among all layers."""
    names = weighted_names(space)
    return [{n: share * (1 + 0.1 * i) / len(names) for n in names} for i in range(COUNT)]


@pytest.mark.parametrize("share", [0.6, 1.0, 3.0])
def test_profiles_are_taken_as_they_are(space: ChannelSpace, share: float) -> None:
    """Profiling may slow a runtime down, and all layers alike."""
    profiles: list[Any] = whole(space, share)
    profiles[3], profiles[4] = None, {}
    found = data(space, profiles)
    assert found.profiled.tolist() == [index not in (3, 4) for index in range(COUNT)]
    assert found.layers_ms[0].sum() == pytest.approx(share)


def test_a_profile_of_another_network_is_refused(space: ChannelSpace) -> None:
    profiles = whole(space)
    profiles[2] = {"features.0": 1.2}
    with pytest.raises(MeasurementError, match=r"profile 2 names `features.0` and no layer"):
        data(space, profiles)


def test_partial_profiles_are_counted_and_left_out(
    space: ChannelSpace, caplog: pytest.LogCaptureFixture
) -> None:
    profiles: list[Any] = whole(space)
    first = weighted_names(space)[0]
    profiles[1] = {first: 0.2, "a kernel of no layer": 0.9}
    profiles[5] = dict.fromkeys(weighted_names(space), 0.0)
    profiles[6] = None
    with caplog.at_level(logging.WARNING, logger="wgates_plugin"):
        found = data(space, profiles)
    assert found.profiled.tolist() == [index not in (1, 5, 6) for index in range(COUNT)]
    assert torch.isnan(found.layers_ms[1]).all()
    assert "2 of 9 layer profiles account for less than 50 %" in caplog.text


def test_a_profile_or_two_are_none(space: ChannelSpace) -> None:
    profiles: list[Any] = [None] * COUNT
    profiles[3] = whole(space)[3]
    assert not data(space, profiles).profiled.any()
    profiles[:5] = whole(space)[:5]
    assert int(data(space, profiles).profiled.sum()) == 5


def test_a_layer_of_no_time_of_its_own_is_no_gap(space: ChannelSpace) -> None:
    first, *rest = weighted_names(space)
    profiles = [{n: (1 + 0.1 * i) / len(rest) for n in rest} for i in range(COUNT)]
    found = data(space, profiles)
    assert found.profiled.all()
    assert (found.layers_ms[:, weighted_names(space).index(first)] == 0).all()

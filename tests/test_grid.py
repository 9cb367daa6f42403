"""The channel grid."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wgates_plugin.errors import (
    ConfigError,
)
from wgates_plugin.latency import (
    EagerRuntime,
    probe_grid,
)
from wgates_plugin.latency.base import BaseSession
from wgates_plugin.latency.grid import choose_grid, probe_widths


def staircase(grid: int, candidates: tuple[int, ...]) -> dict[int, float]:
    return {width: float(-(-width // grid) * grid) for width in probe_widths(candidates)}


CANDIDATES = (1, 2, 4, 8, 16, 32)


@pytest.mark.parametrize("grid", CANDIDATES)
def test_a_clean_staircase_gives_its_step(grid: int) -> None:
    times = staircase(grid, CANDIDATES)
    assert choose_grid(times, CANDIDATES, tolerance=0.001) == grid
    # Widths off the grid that cost even more than the next step do not change the answer.
    penal = {width: ms * (1.0 if width % grid == 0 else 1.4) for width, ms in times.items()}
    assert choose_grid(penal, CANDIDATES, tolerance=0.001) >= grid


@pytest.mark.parametrize(
    ("candidates", "grid"), [((8,), 8), ((8, 16), 8), ((4, 8), 8), ((16, 32), 1)]
)
def test_candidates_need_not_hold_the_smallest_ones(candidates: tuple[int, ...], grid: int) -> None:
    times = staircase(8, candidates)
    assert choose_grid(times, candidates) == grid


def test_one_disturbed_timing_does_not_change_the_grid() -> None:
    times = staircase(16, CANDIDATES)
    times[66] *= 0.9
    assert choose_grid(times, CANDIDATES) == 16


def test_a_slope_has_no_grid_and_no_evidence_proves_nothing() -> None:
    slope = {width: float(width) for width in probe_widths(CANDIDATES)}
    assert choose_grid(slope, CANDIDATES, tolerance=0.001) == 1
    assert choose_grid({64: 1.0, 96: 1.0}, CANDIDATES) == 1


def test_candidates_are_checked() -> None:
    with pytest.raises(ConfigError, match="candidates"):
        probe_grid(EagerRuntime(), candidates=())
    with pytest.raises(ConfigError, match="candidates"):
        probe_grid(EagerRuntime(), candidates=(0, 8))


class Stairs(EagerRuntime):
    """A runtime that takes as many milliseconds as there are channels, in whole steps of 4."""

    def load(self, network: nn.Module, example_inputs: Any) -> Any:
        width = network.full[0].out_channels

        class Fixed(BaseSession):
            def run(self) -> None: ...
            def outputs(self) -> list[Tensor]:
                return []

            def close(self) -> None: ...
            def elapsed_ms(self) -> float:
                return 0.25 * (-(-width // 4) * 4)

        return Fixed({})


def test_the_probe_reports_what_it_saw() -> None:
    state = torch.get_rng_state()
    probe = probe_grid(Stairs(), seconds=0, candidates=(4, 1, 2, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert probe.grid == 4
    assert probe.candidates == (1, 2, 4, 8)
    assert [width for width, _ in probe.evidence] == probe_widths((1, 2, 4, 8))
    assert dict(probe.evidence)[17] == pytest.approx(5.0)
    assert json.loads(json.dumps(probe.to_json()))["grid"] == 4

"""Sample files, what is sampled next, and which measurements are believed."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_bench import (
    IDENTITY,
    REFERENCE_MS,
    SteadyFamily,
    SteadySession,
    measured,
    staircase_ms,
    steady_bench,
)
from networks import conv, example, tiny
from torch import Tensor, nn

from wgates_plugin import ChannelSpace, trace
from wgates_plugin.efficiency import bench as bench_module
from wgates_plugin.efficiency.bench import PROFILES, Bench, Trust
from wgates_plugin.efficiency.common_drift import common_drift
from wgates_plugin.efficiency.light_reference import light_bench
from wgates_plugin.efficiency.lpnet.data import grid_of
from wgates_plugin.efficiency.samples import writer as sample_writer
from wgates_plugin.efficiency.samples.file import SampleFile
from wgates_plugin.efficiency.sampling import (
    Active,
    SamplingCost,
    collect,
    draw_widths,
    mixed_grids,
)
from wgates_plugin.errors import FileFormatError, MeasurementError
from wgates_plugin.files import append_line
from wgates_plugin.latency.environment import describe_environment
from wgates_plugin.latency_study import LatencyStudy
from wgates_plugin.targets import LatencyTarget


@pytest.fixture(scope="module")
def space() -> ChannelSpace:
    return trace(tiny("plain"), example())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "samples.jsonl"


def open_file(path: Path, space: ChannelSpace, **options: Any) -> SampleFile:
    return SampleFile.open(path, space, IDENTITY, **options)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# The file


def test_samples_survive_their_file(space: ChannelSpace, path: Path) -> None:
    file = open_file(path, space)
    file.add([4, 8], measured(1.5), layers_ms={"0.0": 1.23456789})
    file.add([8, 12], measured(2.0))
    again = open_file(path, space)
    assert again.widths == [(4, 8), (8, 12)]
    assert again.latencies_ms == [1.5, 2.0]
    assert again.layers_ms == [{"0.0": 1.2346}, None]
    assert (again.samples, again.sources) == (file.samples, file.sources)
    assert len(SampleFile.load(path)) == 2
    kinds = [line.get("type", line.get("kind")) for line in lines_of(path)]
    assert kinds == ["latency-samples", "source", "sample", "sample"]


def test_raw_times_give_ratio_and_latency_again(space: ChannelSpace, path: Path) -> None:
    file = open_file(path, space)
    bench = Bench(SteadyFamily(space), SteadySession(1.7, 1.8, 1.9), REFERENCE_MS)
    found = bench.take((4, 8), 0.0, trust=Trust(repeats=0), profile=False).found
    sample = file.add((4, 8), found, file.source(REFERENCE_MS))
    derived = sample.recomputed(file.sources[sample.source])
    assert derived["ratio"] == pytest.approx(found.ratio, rel=1e-4)
    assert derived["latency_ms"] == pytest.approx(found.latency_ms, rel=1e-4)
    assert derived["drift"] == pytest.approx(found.drift, rel=1e-4)


def test_what_could_not_be_read_back_is_not_written(space: ChannelSpace, path: Path) -> None:
    file = open_file(path, space)
    forged = dataclasses.replace(measured(1.5), ratio=0.7, latency_ms=1.4)
    with pytest.raises(MeasurementError, match=r"`ratio` is 0.7 where its times give 0.75"):
        file.add([4, 8], forged)
    alone = dataclasses.replace(measured(1.5), reference_samples_ms=(), drift=1.0)
    with pytest.raises(MeasurementError, match="without a reference cannot be kept"):
        file.add([4, 8], alone)
    assert not open_file(path, space)


def test_the_same_widths_again_are_marked(space: ChannelSpace, path: Path) -> None:
    file = open_file(path, space)
    for latency_ms in (1.5, 1.6):
        file.add([4, 8], measured(latency_ms))
    assert [sample.repeat for sample in open_file(path, space)] == [False, True]
    assert (len(file), file.distinct) == (2, 1)


@pytest.mark.parametrize("cut", [1, 2, 40, 150])
def test_a_torn_last_line_is_cut_off(space: ChannelSpace, path: Path, cut: int) -> None:
    file = open_file(path, space)
    file.add([4, 8], measured(1.5))
    file.add([8, 12], measured(2.0))
    path.write_bytes(path.read_bytes()[:-cut])
    before = path.read_bytes()
    complete = 2 if cut == 1 else 1  # losing the line's end alone loses nothing
    assert len(SampleFile.load(path)) == complete
    assert path.read_bytes() == before
    torn = open_file(path, space)
    assert len(torn) == complete
    torn.add([6, 6], measured(1.7))
    assert open_file(path, space).widths == [*[(4, 8), (8, 12)][:complete], (6, 6)]
    assert len(lines_of(path)) == 3 + complete


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_line_that_cannot_be_written_is_taken_back(
    space: ChannelSpace, path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    file = open_file(path, space)
    file.add([4, 8], measured(1.5))
    before = path.read_bytes()

    def torn(where: Path, value: Any) -> None:
        with where.open("ab") as out:
            out.write(b'{"type": "sam')
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(sample_writer, "append_line", torn)
        with pytest.raises((FileFormatError, KeyboardInterrupt)) as caught:
            file.add([8, 12], measured(2.0))
    if isinstance(error, OSError):
        for piece in (f"samples `{path}`: cannot be written", "No space left", "start again"):
            assert piece in str(caught.value)
    assert path.read_bytes() == before
    assert file.widths == [(4, 8)]
    file.add([8, 12], measured(2.0))
    assert open_file(path, space).widths == [(4, 8), (8, 12)]


def test_a_torn_line_in_the_middle_is_refused(space: ChannelSpace, path: Path) -> None:
    file = open_file(path, space)
    file.add([4, 8], measured(1.5))
    path.write_bytes(path.read_bytes()[:-9] + b"\n")
    with pytest.raises(FileFormatError, match="line 3: not a sample"):
        open_file(path, space)


def _without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda line: {key: value for key, value in line.items() if key != name}


def _with(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda line: {**line, **changes}


def _source_with(**changes: Any) -> dict[str, Any]:
    whole = {"id": 9, "environment": {}, "reference_ms": 1.0, "reference": {}, "worker": "main"}
    return {"type": "source", **whole, **changes}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda line: [1, 2], "expected an object"),
        (_with(type="plan"), "expected source"),
        (_with(type="rejected"), "why"),
        (_with(more=1), "`more` is unknown"),
        (_without("candidate_ms"), "candidate_ms"),
        (_with(widths=["a", "b"]), "positive integers"),
        (_with(widths=[4]), "1 widths for 2 groups"),
        (_with(source=7), "source 7"),
        (_with(latency_ms=1.7), "`latency_ms` is 1.7 where its times give 1.5"),
        (_with(ratio=float("nan")), "`ratio` is nan"),
        (_with(candidate_ms=[1.5, 0.0]), "round's time"),
        (_with(candidate_ms=[1.5]), "one time per round"),
        (_with(layers_ms={"0.0": -1.0}), "layers_ms"),
        (_with(disturbed=-1), "disturbed"),
        (_with(layers_ms=[1, 2]), "`layers_ms` must be an object"),
        (_with(layers_ms={"0.0": 10**400}), "OverflowError"),
        (_with(ratio_spread=10**400), "OverflowError"),
        (_with(latency_ms=10**400), "OverflowError"),
        (_with(candidate_ms=[10**400, 10**400]), "OverflowError"),
        (_with(candidate_ms=[1e-320, 1e-320], reference_ms=[10**308, 10**308]), "sample"),
        (_with(widths=[10**6, 8]), "width 1000000 is not possible"),
        (_with(widths=[4, [8]]), "positive integers"),
        (_with(source=[0]), "source"),
        (_with(source=False), "source False"),
        (_with(repeat="no"), "`repeat` must be true or false"),
        (_with(type="rejected", why=3), "`why` a text"),
        (lambda line: _source_with(environment=[1]), "must be objects"),
        (lambda line: _source_with(environment={"libraries": ["a"]}), "`libraries` of the"),
        (lambda line: _source_with(id=True), "`id` must be an integer"),
        (lambda line: _source_with(reference_ms=10**400), "OverflowError"),
    ],
)
def test_a_line_that_is_no_sample_is_refused(
    space: ChannelSpace, path: Path, change: Callable[[Any], Any], words: str
) -> None:
    open_file(path, space).add([4, 8], measured(1.5))
    with path.open("a") as file:
        file.write(json.dumps(change(lines_of(path)[-1])) + "\n")
    with pytest.raises(FileFormatError, match=f"line 4: not a sample .*{words}"):
        open_file(path, space)


@pytest.mark.parametrize("line", ["[" * 100_000, '{"a":' * 100_000, "9" * 9999])
def test_a_line_of_any_depth_is_refused(space: ChannelSpace, path: Path, line: str) -> None:
    open_file(path, space).add([4, 8], measured(1.5))
    whole = path.read_bytes()
    path.write_bytes(whole + line.encode() + b"\n")
    with pytest.raises(FileFormatError, match="line 4: not a sample"):
        open_file(path, space)
    path.write_bytes(whole + line.encode())  # without its end it is a torn one
    assert len(open_file(path, space)) == 1
    assert path.read_bytes() == whole
    path.write_bytes(line.encode() + b"\n" + whole)
    with pytest.raises(FileFormatError, match="line 1: no readable header"):
        open_file(path, space)


@pytest.mark.parametrize("content", [b"", b"\n", b"{", b"[]\n", b'{"kind": "x"}\n', b"\xff\xfe\n"])
def test_a_file_without_a_header_is_refused(
    space: ChannelSpace, path: Path, content: bytes
) -> None:
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match="line 1: no readable header"):
        open_file(path, space)


def test_the_first_version_is_refused(space: ChannelSpace, path: Path) -> None:
    append_line(path, {"kind": "latency-samples", "version": 1, "fingerprint": space.fingerprint})
    with pytest.raises(FileFormatError, match=r"version 1, this package reads 2; .* sample again"):
        open_file(path, space)


def test_foreign_samples_are_refused(space: ChannelSpace, path: Path) -> None:
    SampleFile.open(path, space, {"threads": 1}).add([4, 8], measured(1.5))
    with pytest.raises(
        FileFormatError, match=r"threads: 1 is 2 here.*use another file per runtime"
    ):
        SampleFile.open(path, space, {"threads": 2})
    with pytest.raises(FileFormatError, match="measured on another network"):
        SampleFile.open(path, trace(tiny("residual"), example()), {"threads": 1})
    assert len(SampleFile.open(path, space, {"threads": 1})) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"cpu": "another"},
        {"cpu_capability": "another"},
        {"cores": 99},
        {"os": "another"},
        {"python": "2.7"},
        {"libraries": {"torch": "0.1"}},
    ],
)
def test_samples_of_another_environment_are_kept_apart(
    space: ChannelSpace, path: Path, caplog: pytest.LogCaptureFixture, other: dict[str, Any]
) -> None:
    there = {**describe_environment(), **other}
    elsewhere = open_file(path, space, environment=there)
    elsewhere.add([4, 8], dataclasses.replace(measured(1.5), environment=there))
    assert elsewhere.widths == [(4, 8)]
    with caplog.at_level(logging.INFO, logger="wgates_plugin"):
        here = open_file(path, space)
    assert "1 of 1 were taken in another environment" in caplog.text
    assert next(iter(other)) in caplog.text
    assert (len(here), here.widths, here.latencies_ms, here.layers_ms) == (0, [], [], [])
    here.add([8, 12], measured(2.0))
    assert here.widths == [(8, 12)]
    assert here.set_aside() == {0: 1}
    assert len(lines_of(path)) == 5
    assert open_file(path, space, allow=[0]).widths == [(4, 8), (8, 12)]
    assert not open_file(path, space, allow=[0]).set_aside()
    with pytest.raises(FileFormatError, match="source 9 is allowed but not in the file"):
        open_file(path, space, allow=[9])


def test_what_merely_is_installed_does_not_part_samples(space: ChannelSpace, path: Path) -> None:
    here = describe_environment()
    there = {**here, "libraries": {**here["libraries"], "torchvision": "0.1", "new": "1.0"}}
    file = open_file(path, space, environment=there)
    file.add([4, 8], dataclasses.replace(measured(1.5), environment=there))
    assert len(open_file(path, space)) == 1


# What is sampled


def test_drawn_widths_are_allowed_and_span_the_range(space: ChannelSpace) -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_widths(space, 4, rng) for _ in range(300)]
    for row in drawn:
        assert all(w in a for w, a in zip(row, space.allowed_widths(4), strict=True))
    assert {row[0] for row in drawn} == set(space.allowed_widths(4)[0])
    assert {space.least_widths(4), space.full_widths} <= set(drawn)


OPTIONS = {"grid": 1, "seed": 3, "seconds_per_sample": 0.0}


def test_sampling_goes_on_where_it_was_interrupted(space: ChannelSpace, tmp_path: Path) -> None:
    whole, parts = open_file(tmp_path / "a", space), open_file(tmp_path / "b", space)
    bench = steady_bench(space)
    seen: list[int] = []
    collect(whole, space, bench, count=8, on_sample=lambda n, m: seen.append(n), **OPTIONS)
    assert seen == list(range(1, 9))
    assert len(set(whole.widths)) == 8
    assert all(session.closed for session in bench.family.sessions)
    for row, latency in zip(whole.widths, whole.latencies_ms, strict=True):
        assert latency == pytest.approx(staircase_ms(space, row))
    collect(parts, space, bench, count=3, **OPTIONS)
    parts = open_file(tmp_path / "b", space)
    collect(parts, space, bench, count=8, **OPTIONS)
    assert parts.widths == whole.widths
    assert len(parts.sources) == 1
    cost = collect(parts, space, bench, count=8, **OPTIONS)
    assert cost.inference_seconds == 0.0


def test_sampling_more_than_there_is_stops(tmp_path: Path) -> None:
    few = trace(tiny("plain"), example(), floors={"0.0": 8, "1.0": 10})
    file = open_file(tmp_path / "samples", few)
    with pytest.raises(MeasurementError, match="only 3 different widths on a grid of 1"):
        collect(file, few, steady_bench(few), count=4, **OPTIONS)
    assert len(file) == 0  # seen before anything was measured


@pytest.mark.parametrize("sampled_before", [False, True])
def test_a_clock_that_stands_still_is_noticed(
    space: ChannelSpace, path: Path, sampled_before: bool
) -> None:
    file = open_file(path, space)
    bench = Bench(SteadyFamily(space, lambda *_: 1.5), SteadySession(2.0), REFERENCE_MS)
    if sampled_before:
        collect(file, space, bench, count=7, **OPTIONS)
    with pytest.raises(MeasurementError, match=r"8 different widths .* all took exactly 1.5 ms"):
        collect(file, space, bench, count=20, **OPTIONS)
    assert len(open_file(path, space)) == 8


def test_layer_times_go_into_the_file(space: ChannelSpace, path: Path) -> None:
    bench = steady_bench(space)
    bench.family.layer_times_ms = lambda widths: {"0.0": 0.1 * widths[0]}  # type: ignore[attr-defined]
    file = open_file(path, space)
    collect(file, space, bench, count=2, **OPTIONS)
    collect(file, space, bench, count=3, profile=False, **OPTIONS)
    expected = [{"0.0": pytest.approx(0.1 * w[0])} for w in file.widths[:2]]
    assert open_file(path, space).layers_ms == [*expected, None]


@pytest.mark.parametrize("fails", [True, False])
def test_profiles_that_fail_or_are_empty_in_a_row_are_asked_for_no_more(
    space: ChannelSpace, path: Path, caplog: pytest.LogCaptureFixture, fails: bool
) -> None:
    asked: list[Sequence[int]] = []

    def broken(widths: Sequence[int]) -> dict[str, float]:
        asked.append(widths)
        if len(asked) == 2:
            return {"0.0": 0.1}
        if fails:
            raise RuntimeError("no profiler")
        return {}

    bench = steady_bench(space)
    bench.family.layer_times_ms = broken  # type: ignore[attr-defined]
    file = open_file(path, space)
    collect(file, space, bench, count=7, **OPTIONS)
    assert file.layers_ms == [None, {"0.0": 0.1}, *[None] * 5]
    assert len(asked) == 2 + PROFILES
    assert caplog.text.count("no profiler") == (1 + PROFILES) * fails
    assert "samples go on without them" in caplog.text


class NearestKnown:
    """The less sure, the farther from everything measured; counts how often it learns."""

    def __init__(self) -> None:
        self.fits: list[int] = []

    def fit(self, file: SampleFile) -> None:
        self.known = torch.tensor(file.widths, dtype=torch.float64)
        self.fits.append(len(file))

    def spread(self, widths: Tensor) -> Tensor:
        return torch.cdist(widths, self.known).min(dim=1).values


def test_active_sampling_measures_where_it_is_least_sure(path: Path) -> None:
    space = trace(tiny("residual"), example())
    predictor = NearestKnown()
    corner = tuple(group.channels for group in space.groups)
    corner = (1, *corner[1:])  # random widths share an overall size and never come here
    active = Active(
        predictor.fit,
        predictor.spread,
        covering=4,
        towards=lambda: [corner],
        refit_every=3,
        apart=0.1,
    )
    file = open_file(path, space)
    collect(file, space, steady_bench(space), count=10, active=active, **OPTIONS)
    assert predictor.fits == [4, 7]
    assert corner in file.widths[4:7]
    assert len(set(file.widths)) == 10
    plain = open_file(path.with_name("plain"), space)
    collect(plain, space, steady_bench(space), count=10, **OPTIONS)
    assert file.widths[:4] == plain.widths[:4]
    full = torch.tensor(space.full_widths, dtype=torch.float64)
    batch = torch.tensor(file.widths[4:7], dtype=torch.float64) / full
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert float((batch[first] - batch[second]).abs().mean()) >= 0.1


def test_a_predictor_of_the_wrong_shape_is_refused(space: ChannelSpace, path: Path) -> None:
    active = Active(lambda file: None, lambda widths: widths, covering=2)
    with pytest.raises(MeasurementError, match="return one per row"):
        collect(
            open_file(path, space), space, steady_bench(space), count=4, active=active, **OPTIONS
        )


# What is believed


def test_a_spread_ratio_is_measured_again(space: ChannelSpace, path: Path) -> None:
    """The first attempt's times are scattered, the second's are steady."""
    family = SteadyFamily(space)
    # A warm-up of 5, then 8 rounds of 15 inferences of 1 ms, as the warm-up has it.
    scattered = [1.0, 1.0, 1.0, 1.0, 1.0, *[x for i in range(8) for x in [1.0 + 0.2 * i] * 15]]
    session = SteadySession(*scattered, *[1.5] * 1000)
    family.session = lambda widths: session  # type: ignore[method-assign]
    bench = Bench(family, SteadySession(REFERENCE_MS), REFERENCE_MS)
    file = open_file(path, space)
    collect(file, space, bench, count=1, **OPTIONS)
    assert file.latencies_ms == [1.5]
    (rejected,) = open_file(path, space).rejected
    assert "the ratio spreads by" in str(rejected.why)
    assert rejected.widths == file.widths[0]
    assert session.closed


def test_the_least_spread_is_kept_when_none_is_good(space: ChannelSpace, path: Path) -> None:
    reference = SteadySession(2.0, 2.0, 2.0)
    found = iter([measured(1.5), measured(1.6), measured(1.7)])
    spreads = iter([0.3, 0.1, 0.2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            bench_module,
            "measure",
            lambda *_, **__: dataclasses.replace(next(found), ratio_spread=next(spreads)),
        )
        taken = Bench(SteadyFamily(space), reference, 2.0).take((4, 8), 0.0, profile=False)
    assert taken.found.latency_ms == pytest.approx(1.6)
    assert [m.latency_ms for m, _ in taken.rejected] == pytest.approx([1.5, 1.7])


def test_doubts() -> None:
    steady = measured(1.5)
    trust = Trust()
    assert trust.doubt(steady, []) is None
    assert "spreads" in str(trust.doubt(dataclasses.replace(steady, ratio_spread=0.06), []))
    assert trust.doubt(dataclasses.replace(steady, ratio_spread=0.03), []) is None
    assert "disturbed" in str(trust.doubt(dataclasses.replace(steady, disturbed=1000), []))
    assert trust.doubt(dataclasses.replace(steady, disturbed=1), []) is None
    assert "drift 1.000 among neighbours at 1.200" in str(trust.doubt(steady, [1.2] * 5))
    assert trust.doubt(steady, [1.05] * 5) is None
    assert trust.doubt(steady, [1.2, 1.2]) is None  # too few to say what is usual
    assert trust.doubt(steady, [1.2] * 9 + [1.0] * 3) is None  # the machine's new state
    for drifts in ([], [1.2] * 9):
        assert Trust(neighbours=0).doubt(steady, drifts) is None


# The light reference


def test_a_light_reference_keeps_the_clock_of_the_untouched_network(
    space: ChannelSpace, path: Path
) -> None:
    """The machine runs 1.5 times slower while sampling than at the baseline."""
    family = SteadyFamily(space, lambda s, w: 1.5 * staircase_ms(s, w))
    dense_ms = staircase_ms(space, space.full_widths)
    dense = SteadySession(1.5 * dense_ms)
    bench = light_bench(family, space, dense, dense_ms, grid=1, seconds=0.0)
    assert space.half_widths() == tuple(group.channels // 2 for group in space.groups)
    assert bench.reference_ms == pytest.approx(staircase_ms(space, space.half_widths()))
    file = open_file(path, space)
    collect(file, space, bench, count=8, **OPTIONS)
    for widths, latency_ms in zip(file.widths, file.latencies_ms, strict=True):
        assert latency_ms == pytest.approx(staircase_ms(space, widths))
    (source,) = open_file(path, space).sources.values()
    assert source.reference["dense_ms"] == dense_ms
    assert source.reference["drift"] == pytest.approx(1.5)
    light, heavy = (source.reference[f"{n}_minima_ms"] for n in ("reference", "dense"))
    assert np.median(np.divide(light, heavy)) * dense_ms == pytest.approx(
        source.reference_ms, rel=1e-4
    )


def test_a_study_samples_lightly_and_judges_against_the_untouched(tmp_path: Path) -> None:
    network = tiny("plain").eval()
    space = trace(network, example())
    target = LatencyTarget(fraction=0.5, runtime="eager")

    def study() -> LatencyStudy:
        found = LatencyStudy(network, space, example(), target)
        found.open_samples(tmp_path / "samples")
        return found

    first = study()
    first.baseline(0.01)
    assert first.reference_ms is not None
    first.open_files(tmp_path / "samples", tmp_path / "visited")
    options: dict[str, Any] = {"grid": 1, "seed": 0, "seconds_per_sample": 0.0}
    first.sample(count=3, **options)
    found = first.at((4, 8), 0.0)
    assert found.reference_ms == first.reference_ms
    assert first.samples is not None
    assert first.visited is not None
    (light,), (dense,) = first.samples.sources.values(), first.visited.sources.values()
    assert light.reference["network"] == "resized"
    assert dense.reference == {"network": "untouched"}
    assert dense.reference_ms == light.reference["dense_ms"] == first.reference_ms
    second = study()
    assert second.reference_ms == first.reference_ms
    second.sample(count=5, **options)
    assert second.samples is not None
    assert second.samples.distinct == 5
    assert list(second.samples.sources.values()) == [light]


def test_a_job_goes_on_with_its_measurements_in_another_environment(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As after an update of the kernel: what its LPNet learned from counts, what it left out does not."""
    network = tiny("plain")
    space = trace(network, example())

    def study(known: Sequence[int]) -> LatencyStudy:
        target = LatencyTarget(fraction=1.0, runtime="eager")
        found = LatencyStudy(network, space, example(), target)
        found._family, found._reference = SteadyFamily(space), SteadySession(REFERENCE_MS)
        found.reference_ms = REFERENCE_MS
        found.open_files(tmp_path / "samples", tmp_path / "visited", known=known)
        return found

    first = study([])
    first.sample(count=8, profile=False, **OPTIONS)
    first.at((4, 8), 0.0)
    for file in (first.samples, first.visited):
        assert file is not None
        file.close()
        text = file.path.read_text()
        kernel = first.samples.environment["os"]
        assert kernel in text
        file.path.write_text(text.replace(kernel, "a kernel before the update"))
    for known, samples in (((), 0), ((0,), 8)):
        caplog.clear()
        again = study(known)
        assert (len(again.samples), len(again.visited)) == (samples, 1)
        assert "in another environment (" in caplog.text
        again.samples.close()
        again.visited.close()
    assert first.refit(again.fit(seed=0)) is not None


def test_common_drift_is_of_all_or_none() -> None:
    assert common_drift([0.96, 0.97, 0.95]) == 0.96
    assert common_drift([0.9, 1.02, 0.95]) == 1.0
    assert common_drift([]) == 1.0


def test_samples_of_a_disturbed_sitting_are_tied_to_the_present_one(tmp_path: Path) -> None:
    """Beside other work the untouched network was slowed down by a quarter, its samples were not."""
    network = tiny("plain")
    space = trace(network, example())

    def study(dense_ms: float) -> LatencyStudy:
        found = LatencyStudy(
            network, space, example(), LatencyTarget(fraction=1.0, runtime="eager")
        )
        found._family, found._reference = SteadyFamily(space), SteadySession(dense_ms)
        found.reference_ms = dense_ms
        found.open_samples(tmp_path / "samples")
        return found

    first = study(1.25 * REFERENCE_MS)
    first.sample(count=8, profile=False, **OPTIONS)
    assert first.tie(0.0) == {}  # of this very sitting
    assert first.samples is not None
    first.samples.close()
    second = study(REFERENCE_MS)
    true_ms = [staircase_ms(space, row) for row in second._seen()[0]]
    assert second._seen()[1] == pytest.approx([0.8 * ms for ms in true_ms], rel=1e-3)
    assert second.samples is not None
    second.samples.ties = second.tie(0.0)
    assert second.samples.ties == pytest.approx({0: 1.25}, rel=1e-3)
    assert second._seen()[1] == pytest.approx(true_ms, rel=1e-3)


@pytest.mark.parametrize("retime", [False, True])
def test_a_baseline_of_another_speed_is_timed_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, retime: bool
) -> None:
    """The untouched network takes 2.0 ms, but took 2.2 ms when it was timed alone."""
    network = tiny("plain")
    space = trace(network, example())
    study = LatencyStudy(network, space, example(), LatencyTarget(fraction=1.0, runtime="eager"))
    study._family, study._reference = SteadyFamily(space), SteadySession(REFERENCE_MS)
    study.reference_ms = 1.1 * REFERENCE_MS
    file = study.open_samples(tmp_path / "samples")
    study.sample(count=12, retime=retime, profile=False, **OPTIONS)
    assert len(file) == 12
    assert ("timed again" in caplog.text) == retime
    scale = 1.0 if retime else 1.1
    assert study.reference_ms == pytest.approx(scale * REFERENCE_MS)
    for row, latency in zip(file.widths, file.latencies_ms, strict=True):
        assert latency == pytest.approx(scale * staircase_ms(space, row), rel=1e-4)
    assert len({source.dense_ms for source in file.sources.values()}) == (2 if retime else 1)
    assert study._seen()[1] == pytest.approx(file.latencies_ms)


def test_the_grid_of_widths(space: ChannelSpace) -> None:
    full = space.full_widths
    assert grid_of(space, [full]) is None
    assert grid_of(space, [(4, full[1]), (8, full[1])]) == 4
    assert mixed_grids(space, [(4, full[1])] * 3, 4) == []
    (words,) = mixed_grids(space, [(4, 8)] * 3, 1)
    assert "the 3 kept samples are on multiples of 4 channels, new ones on multiples of 1" in words


def test_a_cap_off_the_grid_does_not_hide_it() -> None:
    network = nn.Sequential(conv(3, 64), nn.ReLU(), conv(64, 64), nn.ReLU(), conv(64, 4))
    space = trace(network, example(), caps={"0": 10})
    assert space.allowed_widths(16)[0] == [10]
    rows = [draw_widths(space, 16, np.random.default_rng(seed)) for seed in range(30)]
    assert grid_of(space, rows) == 16
    assert mixed_grids(space, rows, 16) == []
    (words,) = mixed_grids(space, rows, 8)
    assert (
        "the 30 kept samples are on multiples of 16 channels, new ones on multiples of 8" in words
    )
    within = trace(network, example(), floors={"0": 32, "2": 64}, caps={"0": 48})
    assert grid_of(within, [(32, 64), (48, 64)]) == 16  # a cap that is not all there is counts


def test_samples_that_repeat_count_once(tmp_path: Path) -> None:
    network = tiny("plain")
    space = trace(network, example())
    study = LatencyStudy(network, space, example(), LatencyTarget(fraction=1.0, runtime="eager"))
    study._family, study._reference = SteadyFamily(space), SteadySession(REFERENCE_MS)
    study.reference_ms = REFERENCE_MS
    file = study.open_samples(tmp_path / "samples")
    for _ in range(8):
        file.add([4, 8], measured(1.5))
    study.sample(count=8, profile=False, **OPTIONS)
    assert (file.distinct, len(file)) == (8, 15)


def test_a_share_in_inference_is_of_all_workers() -> None:
    assert SamplingCost(10.0, 8.0).share_in_inference == pytest.approx(0.8)
    assert SamplingCost(10.0, 16.0, workers=2).share_in_inference == pytest.approx(0.8)
    assert SamplingCost(0.0, 0.0, workers=2).share_in_inference == 0.0


def test_the_newest_clock_goes_on_though_nothing_was_measured_by_it(
    space: ChannelSpace, tmp_path: Path
) -> None:
    path = tmp_path / "samples.jsonl"
    file = SampleFile.open(path, space, IDENTITY)
    assert file.last_clock() is None
    file.add(space.least_widths(1), measured(1.5))
    assert file.last_clock() == REFERENCE_MS
    file.source(2.5)
    again = SampleFile.open(path, space, IDENTITY)
    assert again.last_clock() == 2.5

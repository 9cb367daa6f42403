"""Timing, with sessions and a clock that do what they are told."""

from __future__ import annotations

import gc
from typing import Any

import pytest
from latency_helpers import Clock, Scripted, quiet, scripted

from wgates_plugin.errors import (
    MeasurementError,
)
from wgates_plugin.latency import (
    Measurement,
    measure,
)
from wgates_plugin.latency.timing import _block_length


def test_ratio_is_the_median_of_pairs_times_the_calibrated_reference() -> None:
    # One warm-up inference of 20 ms each makes blocks of one inference for both.
    session, reference, clock, log = scripted([20, 30, 66, 50, 20], [20, 20, 33, 25, 40])
    found = quiet(
        session,
        clock,
        reference=reference,
        reference_ms=10.0,
        min_rounds=4,
        identity={"runtime": "scripted"},
        environment={},
    )
    assert found.samples_ms == (30, 66, 50, 20)
    assert found.reference_samples_ms == (20, 33, 25, 40)
    assert found.ratio == pytest.approx((1.5 + 2.0) / 2)  # of 1.5, 2.0, 2.0, 0.5
    assert found.latency_ms == pytest.approx(17.5)
    assert found.ratio_spread == pytest.approx((2.0 - 1.25) / 2)
    assert found.drift == pytest.approx((25 + 33) / 2 / 10)
    assert found.median_ms == 40
    assert found.minimum_ms == 20
    assert found.inference_seconds == pytest.approx(0.284)
    assert found.seconds == pytest.approx(0.324)
    assert (found.rounds, found.warmup) == (4, 1)
    assert "".join(log) == "cr" + "cr" + "rc" + "cr" + "rc"
    assert gc.isenabled()


def test_without_a_calibration_the_reference_calibrates_itself() -> None:
    session, reference, clock, _ = scripted([30], [20, 20, 22, 60])
    found = quiet(session, clock, reference=reference, min_rounds=3)
    assert found.reference_ms == 22
    assert found.drift == 1
    assert found.ratio == pytest.approx(30 / 22)
    assert found.latency_ms == pytest.approx(30)


def test_without_a_reference_the_median_of_minima_counts() -> None:
    # 5 ms: blocks of three; each block's least is kept.
    session, _, clock, log = scripted([5, 9, 4, 7, 8, 6, 9, 30, 5, 40], [1])
    found = quiet(session, clock, min_rounds=3)
    assert found.samples_ms == (4, 6, 5)
    assert found.latency_ms == found.reference_ms == found.median_ms == 5
    assert found.ratio == found.drift == 1
    assert found.reference_samples_ms == ()
    assert len(log) == 1 + 3 * 3


def test_a_shared_slowdown_cancels() -> None:
    drift = [1.0, 1.3, 2.0, 1.1, 3.0]
    session, reference, clock, _ = scripted(
        [30, *(30 * d for d in drift)], [40, *(40 * d for d in drift)]
    )
    found = quiet(session, clock, reference=reference, reference_ms=8, min_rounds=5)
    assert found.latency_ms == pytest.approx(6)
    assert found.drift == pytest.approx(40 * 1.3 / 8)
    assert found.ratio_spread == pytest.approx(0, abs=1e-9)


def test_rounds_fill_the_seconds_asked_for() -> None:
    session, reference, clock, _ = scripted([10], [20])
    found = quiet(session, clock, reference=reference, seconds=1.0, min_rounds=2)
    assert found.rounds == 17  # blocks of 2 x 10 ms and 2 x 20 ms
    assert found.inference_seconds == pytest.approx(1.02)


@pytest.mark.parametrize("swapped", [False, True])
def test_both_take_their_least_of_as_many_inferences(swapped: bool) -> None:
    # One quiet inference in three: the least of two would miss the slow one's.
    fast, slow = [5.0, 6, 6, 5, 6, 6, 5], [10.0, 12, 12, 10, 12, 12, 10]
    session, reference, clock, log = scripted(*((slow, fast) if swapped else (fast, slow)))
    found = quiet(session, clock, reference=reference, min_rounds=2)
    assert "".join(log) == "cr" + "cccrrr" + "rrrccc"
    assert found.ratio == pytest.approx(2.0 if swapped else 0.5)


@pytest.mark.parametrize(
    ("estimates_ms", "count"),
    [
        ([400.0], 1),
        ([15.0], 1),
        ([7.5], 2),
        ([1.0], 15),
        ([1e-6], 2000),
        ([400.0, 400.0], 1),
        ([1.0, 1.0], 15),
        ([1.0, 4.0], 15),
        ([1.0, 10.0], 6),  # 15 would keep the slower one busy for 150 ms
        ([10.0, 1.0], 6),
        ([1.0, 500.0], 3),
        ([14.0, 500.0], 2),
    ],
)
def test_blocks_are_of_one_length_and_bounded(estimates_ms: list[float], count: int) -> None:
    assert _block_length(estimates_ms) == count


def test_slow_networks_warm_up_less() -> None:
    session, _, clock, _ = scripted([700], [1])
    found = quiet(session, clock, min_rounds=2, warmup=5)
    assert found.warmup == 2


@pytest.mark.parametrize(("ms", "runs"), [(99.0, 2), (40.0, 3), (30.0, 4), (25.0, 4), (20.0, 5)])
def test_the_warm_up_ends_after_a_tenth_of_a_second(ms: float, runs: int) -> None:
    session, _, clock, _ = scripted([ms], [1])
    assert quiet(session, clock, min_rounds=1, warmup=5).warmup == runs


def test_a_first_inference_that_compiles_neither_ends_the_warm_up_nor_counts() -> None:
    session, reference, clock, _ = scripted([300, 5], [1000, 5])
    found = quiet(session, clock, reference=reference, min_rounds=2, warmup=5)
    assert found.warmup == 5
    assert found.inferences == 2 * 2 * 3  # blocks of 15 ms
    assert found.latency_ms == 5


def test_every_timed_inference_is_counted() -> None:
    session, reference, clock, log = scripted([5], [10])
    found = quiet(session, clock, reference=reference, min_rounds=4)
    assert found.inferences == len(log) - 2  # without the warm-up
    assert found.inference_seconds == pytest.approx(found.inferences * 0.0075)


def test_the_sessions_own_clock_is_preferred() -> None:
    class Events(Scripted):
        def elapsed_ms(self) -> float:
            self.run()
            return 3.0

    clock = Clock()
    found = quiet(Events(clock, [20.0], [], "c"), clock, min_rounds=2)
    assert found.latency_ms == 3.0


def test_what_the_warm_up_left_behind_is_forgotten() -> None:
    class Storing(Scripted):
        def forget(self) -> None:
            self.log.append(f"{self.name} forgets,")

    clock, log = Clock(), list[str]()
    session, reference = Storing(clock, [20.0], log, "c"), Storing(clock, [20.0], log, "r")
    quiet(session, clock, reference=reference, min_rounds=2)
    assert "".join(log) == "cr" + "c forgets,r forgets," + "cr" + "rc"


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_times_are_refused(wrong: float) -> None:
    class Broken(Scripted):
        def elapsed_ms(self) -> float:
            return wrong

    with pytest.raises(MeasurementError, match="took"):
        measure(Broken(Clock(), [1], [], "c"))
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference_ms": 3.0}, "without a `reference`"),
        ({"seconds": float("nan")}, "seconds"),
        ({"min_rounds": 0}, "min_rounds"),
        ({"warmup": 0}, "warmup"),
    ],
)
def test_senseless_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    session, *_ = scripted([1], [1])
    with pytest.raises(MeasurementError, match=message):
        measure(session, **options)


def test_garbage_collection_stays_off_where_it_was_off() -> None:
    session, _, clock, _ = scripted([20], [1])
    gc.disable()
    try:
        quiet(session, clock, min_rounds=1)
        assert not gc.isenabled()
    finally:
        gc.enable()


class Interrupted(Scripted):
    """Loses the processor during the inferences whose times are negative, for that long."""

    def __init__(self, clock: Clock, times_ms: list[float], identity: dict[str, Any]) -> None:
        super().__init__(clock, times_ms, [], "c")
        self.identity = identity
        self.switches = 0
        self.worked_ns = 0

    def run(self) -> None:
        took_ms = next(self.times)
        self.switches += took_ms < 0
        self.clock.ns += round(abs(took_ms) * 1e6)
        self.worked_ns += round((abs(took_ms) if took_ms > 0 else 18) * 1e6)

    def measured(self, **options: Any) -> Measurement:
        return measure(
            self,
            seconds=0,
            warmup=1,
            clock_ns=self.clock,
            processor_ns=lambda: self.worked_ns,
            switches=lambda: self.switches,
            **options,
        )


def test_an_interrupted_inference_on_one_thread_counts_with_its_processor_time() -> None:
    session = Interrupted(Clock(), [20, -50, 21, -16], {"threads": 1, "device": "cpu"})
    found = session.measured(min_rounds=3)
    assert found.samples_ms == (18, 21, 16)
    assert found.disturbed == 2


@pytest.mark.parametrize("identity", [{"threads": 2, "device": "cpu"}, {"device": "cuda"}, {}])
def test_any_other_interrupted_inference_is_taken_again(identity: dict[str, Any]) -> None:
    session = Interrupted(Clock(), [20, -50, 21, -16, -17, 22, 23], identity)
    found = session.measured(min_rounds=3)
    assert found.samples_ms == (21, 22, 23)
    assert found.disturbed == 3


def test_where_every_inference_is_interrupted_the_least_counts() -> None:
    session = Interrupted(Clock(), [-20, -50, -40, -30, -60], {})
    found = session.measured(min_rounds=1)
    assert found.samples_ms == (30,)
    assert found.disturbed == 4

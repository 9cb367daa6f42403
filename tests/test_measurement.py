"""Measurements as files."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from latency_helpers import quiet, scripted

from wgates_plugin.efficiency.bench import quietest
from wgates_plugin.errors import FileFormatError
from wgates_plugin.latency import Measurement


def a_measurement() -> Measurement:
    session, reference, clock, _ = scripted([30], [20, 20, 22, 60])
    return quiet(session, clock, reference=reference, min_rounds=3)


def test_measurement_survives_json() -> None:
    found = a_measurement()
    again = Measurement.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False)))
    assert again == found
    assert isinstance(again.samples_ms, tuple)


def test_the_first_quiet_measurement_counts_or_the_quietest() -> None:
    def of(*spreads: float) -> tuple[float, int, float]:
        left = [
            dataclasses.replace(
                a_measurement(),
                ratio_spread=spread * a_measurement().ratio,
                seconds=1e-3,
                inference_seconds=2.0**index,
            )
            for index, spread in enumerate(spreads)
        ]
        found = quietest(lambda: left.pop(0))
        return round(found.relative_spread, 6), len(left), found.discarded_seconds

    assert of(0.01, 0.001) == (0.01, 1, 0.0)
    assert of(0.03, 0.014, 0.001) == (0.014, 1, 1.0)
    assert of(0.05, 0.02, 0.04, 0.03, 0.001) == (0.02, 1, 1.0 + 4.0 + 8.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("latency_ms", -1.0),
        ("latency_ms", 31.0),
        ("latency_ms", "30"),
        ("latency_ms", True),
        ("latency_ms", None),
        ("ratio", 0),
        ("ratio", float("nan")),
        ("ratio_spread", -0.1),
        ("ratio_spread", float("inf")),
        ("samples_ms", []),
        ("samples_ms", [30, 30]),
        ("samples_ms", [30, 30, -30]),
        ("samples_ms", [30, 30, "30"]),
        ("samples_ms", 30),
        ("reference_samples_ms", [20]),
        ("reference_samples_ms", [20, float("nan"), 60]),
        ("drift", 0.0),
        ("drift", 1.5),
        ("drift", "1"),
        ("median_ms", 29.0),
        ("minimum_ms", 31.0),
        ("rounds", 2),
        ("rounds", 3.0),
        ("warmup", -1),
        ("inferences", 5),
        ("discarded_seconds", -1.0),
        ("inferences", 6.0),
        ("inferences", None),
        ("seconds", 0.0),
        ("identity", []),
        ("environment", "here"),
        ("version", 1),
        ("kind", "plan"),
        ("surprise", 1),
    ],
)
def test_corrupt_measurements_are_refused(field: str, value: Any) -> None:
    record = {**a_measurement().to_json(), field: value}
    with pytest.raises(FileFormatError, match="measurement"):
        Measurement.from_json(record)


def test_a_record_need_not_tell_everything() -> None:
    record = a_measurement().to_json()
    assert record.pop("inferences") == 6
    assert record.pop("discarded_seconds") == 0.0
    found = Measurement.from_json(record)
    assert found.inferences is None
    assert found.to_json() == {**record, "discarded_seconds": 0.0}


NEEDED = [f.name for f in dataclasses.fields(Measurement) if f.default is dataclasses.MISSING]


@pytest.mark.parametrize("field", NEEDED)
def test_every_field_is_needed(field: str) -> None:
    record = a_measurement().to_json()
    del record[field]
    with pytest.raises(FileFormatError, match=f"`{field}` is missing"):
        Measurement.from_json(record)


@pytest.mark.parametrize("value", [None, 3, [], {}, "measurement"])
def test_what_is_no_measurement_is_refused(value: Any) -> None:
    with pytest.raises(FileFormatError, match="no measurement"):
        Measurement.from_json(value)

"""The benchmark of LPNet's accuracy on a made-up runtime; nothing is timed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fake_bench import IDENTITY, measured
from networks import Head, conv_bn, example
from torch import nn

from benchmarks import latency_samples, lpnet_accuracy
from benchmarks.latency_samples import compress, read_samples, stored
from benchmarks.tools.latency_rivals import ABLATIONS, RIVALS
from benchmarks.tools.records import read_record
from wgates_plugin import ChannelSpace, trace
from wgates_plugin.efficiency.lpnet import weighted_names
from wgates_plugin.efficiency.lpnet.kernel import LayerView
from wgates_plugin.efficiency.samples.file import SampleFile
from wgates_plugin.efficiency.sampling import draw_widths


@pytest.fixture(scope="module")
def space() -> ChannelSpace:
    network = nn.Sequential(conv_bn(3, 32), conv_bn(32, 48, stride=2), conv_bn(48, 40), Head(40))
    return trace(network, example())


def layers_ms(space: ChannelSpace, widths: tuple[int, ...]) -> dict[str, float]:
    """Each layer costs its work."""
    work = LayerView(space).work(torch.tensor([widths], dtype=torch.float64))[0]
    return dict(zip(weighted_names(space), (5.0 * work).tolist(), strict=True))


def store(folder: Path, space: ChannelSpace, kind: str, count: int, *, runtime: str) -> None:
    plain = folder / "samples.jsonl"
    file = SampleFile.open(plain, space, IDENTITY)
    rng = np.random.default_rng([len(kind), len(runtime)])
    drawn: list[tuple[int, ...]] = []
    while len(drawn) < count:
        widths = draw_widths(space, 4 if kind == "grid" else 1, rng)
        if widths not in drawn:
            drawn.append(widths)
    for widths in [*drawn, drawn[0]]:
        layers = layers_ms(space, widths)
        total = sum(layers.values()) * (1.05 if widths in file.widths else 1.0)
        file.add(widths, measured(total), layers_ms=layers)
    path = stored(folder, "mobilenet_v2", runtime, kind)
    path.parent.mkdir(exist_ok=True)
    compress(plain, path)
    plain.unlink()


def test_stored_samples_are_read_wherever_they_came_from(
    space: ChannelSpace, tmp_path: Path
) -> None:
    store(tmp_path, space, "grid", 12, runtime="eager")
    file = read_samples(stored(tmp_path, "mobilenet_v2", "eager", "grid"))
    file.environment = {**file.environment, "cpu": "another"}
    assert len(file) == 13
    data = lpnet_accuracy.data_of(space, file)
    assert len(data) == 12
    assert data.profiled.all()
    floor = lpnet_accuracy.noise_floor(file)
    assert (floor["pairs"], floor["mean_error"]) == (1, pytest.approx(0.05 / 2**0.5, rel=1e-3))


def test_predictors_are_judged_on_what_they_did_not_see(
    space: ChannelSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lpnet_accuracy, "SIZES", (30, 40))
    store(tmp_path, space, "any", 60, runtime="eager")
    data = lpnet_accuracy.data_of(
        space, read_samples(stored(tmp_path, "mobilenet_v2", "eager", "any"))
    )
    found, raw = lpnet_accuracy.held_out(space, data, 30, 0)
    assert set(found) == {"ours", *RIVALS, *ABLATIONS}
    assert found["ours"]["mape"] < 0.02
    assert all(found["ours"]["mape"] < found[rival]["mape"] for rival in RIVALS)
    assert 0.7 < found["ours"]["coverage_90"] <= 1.0
    # A table that had the network in it would be exact.
    assert found["lookup-table"]["mape"] > 0.01
    errors = [row["predicted_ms"] / row["measured_ms"] - 1.0 for row in raw]
    assert len(errors) == 60
    assert float(torch.tensor(errors).abs().mean()) == pytest.approx(found["ours"]["mape"])


def test_a_line_through_macs_is_exact_where_macs_are_all(space: ChannelSpace) -> None:
    from wgates_plugin.efficiency.counts import MacsModel
    from wgates_plugin.efficiency.lpnet.data import LatencyData

    rng = np.random.default_rng(0)
    widths = torch.tensor([draw_widths(space, 1, rng) for _ in range(20)], dtype=torch.float64)
    latency = 0.5 + MacsModel(space)(widths) / 1e6
    data = LatencyData(widths, latency, torch.full((20, 4), torch.nan))
    line = RIVALS["macs-line"](space, data, 0)
    torch.testing.assert_close(line(widths), latency)


def test_the_whole_way_leaves_a_record(
    space: ChannelSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lpnet_accuracy, "subject", lambda *_, **__: (nn.Identity(), space))
    monkeypatch.setattr(lpnet_accuracy, "SIZES", (20,))
    monkeypatch.setattr(lpnet_accuracy, "TRANSFER_SAMPLES", 10)
    for runtime in ("onnxruntime", "eager"):
        for kind in latency_samples.SETS:
            store(tmp_path, space, kind, 30, runtime=runtime)
        lpnet_accuracy.main(
            ["--networks", "mobilenet_v2", "--runtimes", runtime, "--samples", str(tmp_path),
             "--results", str(tmp_path)]
        )  # fmt: skip
    record = read_record(tmp_path, "lpnet_accuracy")
    assert record is not None
    assert set(record["numbers"]) == {"mobilenet_v2/onnxruntime", "mobilenet_v2/eager"}
    found = record["numbers"]["mobilenet_v2/eager"]
    assert set(found["sets"]) == {"grid", "any", "visited"}
    assert found["transfer"]["any"]["adapted"]["mape"] < 0.05
    assert "transfer" not in record["numbers"]["mobilenet_v2/onnxruntime"]

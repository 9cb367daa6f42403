"""ExecuTorch: its thread pool, its inputs by position, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from latency_helpers import TwoInputs, assert_close, expected
from networks import example, tiny
from torch import Tensor, nn

from wgates_plugin.errors import ExportError, RuntimeUnavailableError
from wgates_plugin.latency import ExecuTorchRuntime, RuntimeSettings, base

pytest.importorskip("executorch.exir")


def pool() -> int:
    from executorch.extension.pybindings import portable_lib

    return int(portable_lib._threadpool_get_thread_count())


def test_the_pool_is_as_wide_as_asked_and_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "usable_cores", lambda: 2)
    network = nn.ReLU()
    one, two = ExecuTorchRuntime(), ExecuTorchRuntime(RuntimeSettings(threads=2))
    with one.load(network, example()) as session:
        assert pool() == 1
        with pytest.raises(RuntimeUnavailableError, match="2 threads asked for while 1 sessions"):
            two.load(network, example())
        assert pool() == 1
        session.run()
    with two.load(network, example()) as session:
        assert pool() == 2
        session.run()
    with one.load(network, example()):
        assert pool() == 1


def test_keywords_may_come_in_any_order(tmp_path: Path) -> None:
    inputs = {"narrow": example(seed=1), "wide": example(seed=2)}
    network = TwoInputs()
    path = ExecuTorchRuntime().save(network, inputs, tmp_path / "model.pte")
    turned = dict(reversed(inputs.items()))
    with ExecuTorchRuntime().load_file(path, turned) as session:
        assert_close(session.outputs(), expected(network, **inputs))


def test_other_inputs_are_refused(tmp_path: Path) -> None:
    path = ExecuTorchRuntime().save(nn.ReLU(), example(), tmp_path / "model.pte")
    with pytest.raises(ExportError, match=r"`input_0` is \[1, 3, 8, 8\], made for \[2, 3, 8, 8\]"):
        ExecuTorchRuntime().load_file(path, example(batch=1))
    with pytest.raises(ExportError, match="2 inputs given, made for 1"):
        ExecuTorchRuntime().load_file(path, (example(), example()))


def test_a_program_that_computes_something_else_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wgates_plugin.latency import executorch

    right = executorch._lowered
    other = tiny("plain", seed=1)
    monkeypatch.setattr(
        executorch,
        "_lowered",
        lambda _, inputs: right(executorch._Positional(other, inputs), inputs),
    )
    with pytest.raises(ExportError, match="executorch: output 0 is off"):
        ExecuTorchRuntime().save(tiny("plain"), example(), tmp_path / "model.pte")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_lowered_is_refused() -> None:
    class Depends(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(ExportError, match="executorch: the network cannot be lowered"):
        ExecuTorchRuntime().load(Depends(), example())


def test_a_closed_session_gives_its_place_back() -> None:
    from wgates_plugin.latency import executorch

    before = len(executorch._OPEN)
    session = ExecuTorchRuntime().load(nn.ReLU(), torch.ones(1, 3))
    assert len(executorch._OPEN) == before + 1
    session.close()
    session.close()
    assert len(executorch._OPEN) == before

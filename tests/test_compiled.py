"""torch.compile: what is compiled, when, and under which thread count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
from latency_helpers import assert_close, expected
from networks import example, tiny
from torch import Tensor, nn
from torch._inductor.codecache import PyCodeCache

from wgates_plugin.errors import ExportError, RuntimeUnavailableError
from wgates_plugin.latency import CompiledRuntime, RuntimeSettings, base


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The thread count of every compilation, in order."""
    from torch._inductor import compile_fx, config

    seen: list[int] = []
    right = compile_fx.compile_fx

    def counting(*args: Any, **kwargs: Any) -> Any:
        seen.append(config.cpp.threads)
        return right(*args, **kwargs)

    monkeypatch.setattr(compile_fx, "compile_fx", counting)
    return seen


def test_compiled_while_loading_and_never_again(compilations: list[int]) -> None:
    session = CompiledRuntime().load(tiny("plain"), example())
    assert compilations == [1]
    assert session.compile_seconds > 0
    for _ in range(3):
        session.run()
    session.outputs()
    with session.active():
        session.run()
    assert compilations == [1]


def test_the_thread_count_is_the_sessions_own(
    compilations: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "usable_cores", lambda: 2)
    session = CompiledRuntime(RuntimeSettings(threads=2)).load(tiny("plain"), example())
    session.run()
    assert compilations == [2]
    assert torch.get_num_threads() == 1
    with session.active():
        session.run()
    assert compilations == [2]


@torch._dynamo.config.patch(recompile_limit=2)
def test_many_widths_meet_no_recompile_limit(compilations: list[int]) -> None:
    """One class of network, many shapes: dynamo gives up on a function at some count of them."""
    count = 4
    sessions = []
    for width in range(1, count + 1):
        network = nn.Sequential(nn.Linear(3, width), nn.ReLU())
        session = CompiledRuntime().load(network, torch.ones(1, 3))
        assert_close(session.outputs(), expected(network, torch.ones(1, 3)))
        sessions.append(session)
    assert len(compilations) == count
    for session in sessions:
        session.run()
    assert len(compilations) == count


def test_a_closed_session_keeps_no_weights() -> None:
    before = len(PyCodeCache.modules)
    with CompiledRuntime().load(nn.Sequential(nn.Linear(3, 11), nn.Tanh()), torch.ones(1, 3)):
        pass
    made = PyCodeCache.modules[before:]
    assert made
    assert not [one for module in made for one in vars(module).values() if torch.is_tensor(one)]


def test_weights_are_constants_unless_asked_otherwise() -> None:
    frozen, plain = CompiledRuntime(), CompiledRuntime(freezing=False)
    assert frozen.identity(example())["options"] == {"channels_last": False, "freezing": True}
    assert plain.identity(example())["options"] == {"channels_last": False, "freezing": False}
    network = tiny("plain")
    for runtime in (frozen, plain):
        with runtime.load(network, example()) as session:
            assert_close(session.outputs(), expected(network, example()))


def test_a_missing_compiler_has_a_next_step() -> None:
    from torch._inductor import config
    from torch._inductor.utils import fresh_cache

    with (
        fresh_cache(),
        config.patch({"cpp.cxx": ("/no/such/compiler",)}),
        pytest.raises(RuntimeUnavailableError, match=r"no working compiler.*install g\+\+"),
    ):
        CompiledRuntime().load(nn.Sequential(nn.Linear(3, 7), nn.Sigmoid()), torch.ones(2, 3))


def test_what_cannot_be_exported_is_refused() -> None:
    class Depends(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(ExportError, match=r"torch\.export cannot export"):
        CompiledRuntime().load(Depends(), example())

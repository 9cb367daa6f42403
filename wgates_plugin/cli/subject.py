"""The network that a command is about, and the runtime it is run by."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wgates_plugin.errors import ConfigError, WGatesError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from wgates_plugin.latency.base import BaseRuntime, BaseSession


@dataclass(frozen=True)
class Subject:
    """A network by name, or an exported file, with the shape of one input.

    Raises:
        ConfigError: the shape is none, or the network cannot take it.
    """

    model: str
    input_shape: str
    classes: int
    weights: Path | None

    @property
    def is_file(self) -> bool:
        return Path(self.model).is_file()

    @cached_property
    def example(self) -> Tensor:
        """One random input, the same every time."""
        import torch

        generator = torch.Generator().manual_seed(0)
        return torch.randn(parsed_shape(self.input_shape), generator=generator)

    @cached_property
    def network(self) -> nn.Module:
        """Loaded, and seen to run on the example."""
        from wgates_plugin.catalogue import load_model

        network = load_model(
            self.model,
            classes=self.classes,
            in_channels=int(self.example.shape[1]),
            weights=self.weights,
        )
        self._check_that_it_runs(network)
        return network

    def session(self, runtime: BaseRuntime) -> BaseSession:
        """Ready to be timed by `runtime`."""
        if not self.is_file:
            return runtime.load(self.network, self.example)
        try:
            session = runtime.load_file(self.model, self.example)
            session.run()
        except WGatesError:
            raise
        except Exception as error:
            raise self._wrong_shape(f"`{self.model}`", error) from error
        return session

    def _check_that_it_runs(self, network: nn.Module) -> None:
        import torch

        from wgates_plugin.calling import left_as_found

        entered: list[str] = []
        handles = [
            module.register_forward_pre_hook(lambda *_, name=name: entered.append(name))
            for name, module in network.named_modules()
            if name and not list(module.children())
        ]
        try:
            with left_as_found(network), torch.no_grad():
                network.eval()(self.example)
        except Exception as error:
            where = f"layer `{entered[-1]}` of {self.model}" if entered else self.model
            raise self._wrong_shape(where, error) from error
        finally:
            for handle in handles:
                handle.remove()

    def _wrong_shape(self, where: str, error: Exception) -> ConfigError:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        shape = ",".join(map(str, self.example.shape))
        return ConfigError(
            "--input-shape",
            [
                f"got {shape}, which {where} cannot take ({reason}); give the shape of one input "
                "as the network was made for, batch first, such as 1,3,224,224"
            ],
        )


def parsed_shape(text: str) -> tuple[int, ...]:
    """ "1,3,224,224" as numbers.

    Raises:
        ConfigError: it is something else.
    """
    try:
        sides = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        sides = ()
    if len(sides) < 2 or min(sides) < 1:
        raise ConfigError("--input-shape", [f"got {text!r}, needs a form like 1,3,224,224"])
    return sides


def parsed_options(items: list[str] | None) -> dict[str, Any]:
    """ "key=value" as a mapping; a value that is no JSON is text.

    Raises:
        ConfigError: an item has another form; all of them are named.
    """
    found: dict[str, Any] = {}
    problems = []
    for item in items or []:
        key, equals, text = item.partition("=")
        if not equals or not key.strip():
            problems.append(f"got {item!r}, needs the form key=value: channels_last=true")
            continue
        try:
            found[key.strip()] = json.loads(text)
        except ValueError:
            found[key.strip()] = text
    if problems:
        raise ConfigError("--runtime-option", problems)
    return found


def options_for(runtime: str, options: dict[str, Any], runtimes: list[str]) -> dict[str, Any]:
    """Those meant for `runtime`: "compile.freezing" is for that one alone, "freezing" for all."""
    own = {}
    for key, value in options.items():
        head, dot, rest = key.partition(".")
        if not dot or head not in runtimes:
            own[key] = value
        elif head == runtime:
            own[rest] = value
    return own

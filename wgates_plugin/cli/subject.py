"""The network that a command is about, or an exported file of one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from wgates_plugin.errors import ConfigError, FileFormatError, WGatesError, first_line

if TYPE_CHECKING:
    from torch import nn

    from wgates_plugin.calling import ExampleInputs
    from wgates_plugin.latency.artefacts import Inputs
    from wgates_plugin.latency.base import BaseRuntime, BaseSession

DEFAULT_SHAPE = "1,3,224,224"
DEFAULT_CLASSES = 1000


@dataclass(frozen=True)
class Subject:
    """A network by name, or an exported file, with the shape of one input.

    `input_shape` None means the shape that an exported file carries, or `DEFAULT_SHAPE`.

    Raises:
        ConfigError: the shape is none, or the network cannot take it.
    """

    model: str
    input_shape: str | None
    classes: int | None
    weights: Path | None

    @cached_property
    def is_file(self) -> bool:
        """Whether the subject is an exported file.

        Raises:
            FileFormatError: a file was meant and there is none.
            ConfigError: a folder, or a file of weights.
        """
        from wgates_plugin.latency.artefacts import check_no_weights, looks_like_path

        path = Path(self.model)
        if path.is_dir() and looks_like_path(self.model):
            raise ConfigError(
                f"`{self.model}`", ["is a folder; give the exported file in it, such as model.onnx"]
            )
        if not path.is_file():
            if looks_like_path(self.model):
                raise FileFormatError(f"`{self.model}`: no such file; check the path")
            return False
        check_no_weights(path)
        for option, given in (("--weights", self.weights), ("--classes", self.classes)):
            if given is not None:
                own = option.removeprefix("--")
                raise ConfigError(option, [f"`{self.model}` has {own} of its own; leave it out"])
        return True

    @cached_property
    def inputs(self) -> Inputs:
        """Input name -> shape and type; a single input of no name is `input_0`."""
        from wgates_plugin.latency.artefacts import InputSide, input_sides

        given = parsed_shape(self.input_shape or DEFAULT_SHAPE)
        if not self.is_file:
            return {"input_0": InputSide(given)}
        found = input_sides(Path(self.model))
        if self.input_shape is None:
            if not found or any(side < 1 for one in found.values() for side in one.shape):
                raise ConfigError(
                    "--input-shape",
                    [f"`{self.model}` does not say the whole shape of its inputs; give it"],
                )
            return found
        if len(found) > 1:
            raise ConfigError(
                "--input-shape",
                [
                    f"`{self.model}` has {len(found)} inputs ({', '.join(found)}), and it gives one "
                    "shape; export the file with the shapes to measure"
                ],
            )
        return {name: one._replace(shape=given) for name, one in found.items()} or {
            "input_0": InputSide(given)
        }

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Input name -> shape."""
        return {name: one.shape for name, one in self.inputs.items()}

    @cached_property
    def example(self) -> ExampleInputs:
        """One random input, the same every time, and zeros where the network takes whole numbers; by
        name where a file has names of its own."""
        import torch

        generator = torch.Generator().manual_seed(0)
        values = {
            name: torch.randn(one.shape, generator=generator)
            if one.dtype.is_floating_point
            else torch.zeros(one.shape, dtype=one.dtype)
            for name, one in self.inputs.items()
        }
        if list(values) == [f"input_{index}" for index in range(len(values))]:
            return next(iter(values.values())) if len(values) == 1 else tuple(values.values())
        return values

    @property
    def shape_words(self) -> str:
        """ "1,3,224,224"; several inputs with their names."""
        if self.input_shape is not None:
            return self.input_shape
        each = {name: ",".join(map(str, shape)) for name, shape in self.shapes.items()}
        if len(each) == 1:
            return next(iter(each.values()))
        return " ".join(f"{name}={shape}" for name, shape in each.items())

    @cached_property
    def network(self) -> nn.Module:
        """Loaded, and seen to run on the example.

        Raises:
            ConfigError: the subject is a file.
        """
        from wgates_plugin.catalogue import load_model

        if self.is_file:
            raise ConfigError(
                f"model `{self.model}`",
                ["an exported file has fixed widths; give the network's name and --weights"],
            )
        network = load_model(
            self.model,
            classes=self.classes or DEFAULT_CLASSES,
            in_channels=int(self.shapes["input_0"][1]),
            weights=self.weights,
        )
        self._check_that_it_runs(network)
        return network

    def session(self, runtime: BaseRuntime) -> BaseSession:
        """Ready to be timed by `runtime`."""
        if not self.is_file:
            return runtime.load(self.network, self.example)
        from wgates_plugin.latency.artefacts import check_artefact

        check_artefact(Path(self.model), runtime)
        session = None
        try:
            session = runtime.load_file(self.model, self.example)
            session.run()
        except BaseException as error:
            if session is not None:
                session.close()
            if isinstance(error, WGatesError) or not isinstance(error, Exception):
                raise
            raise self._wrong_file(runtime, error) from error
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

    def _wrong_file(self, runtime: BaseRuntime, error: Exception) -> ConfigError:
        where = f"`{self.model}`"
        if self.input_shape is not None:
            return self._wrong_shape(where, error)
        choices = {"--precision": runtime.precisions, "--device": runtime.device_kinds}
        options = [option for option, known in choices.items() if len(known) > 1]
        give = f"give the {' and '.join(options)} that it was exported for, or " if options else ""
        return ConfigError(
            where,
            [
                f"does not run on inputs of its own shape, {self.shape_words} "
                f"({first_line(error)}); {give}export it again for the runtime `{runtime.name}`"
            ],
        )

    def _wrong_shape(self, where: str, error: Exception) -> ConfigError:
        return ConfigError(
            "--input-shape",
            [
                f"got {self.shape_words.replace('x', ',')}, which {where} cannot take "
                f"({first_line(error)}); give the shape of one input as the network was made for, "
                f"batch first, such as {DEFAULT_SHAPE}"
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
        raise ConfigError("--input-shape", [f"got {text!r}, needs a form like {DEFAULT_SHAPE}"])
    return sides

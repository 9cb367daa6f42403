"""CUDA graphs: one inference of the eager network recorded once, then replayed without Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from wgates_plugin.errors import ExportError, first_line
from wgates_plugin.latency.base import Family, ResizeFamily, RuntimeSettings, flatten_outputs
from wgates_plugin.latency.eager import CudaEagerSession, EagerRuntime

if TYPE_CHECKING:
    from wgates_plugin.calling import ExampleInputs
    from wgates_plugin.channels import ChannelSpace

_WARM_UPS = 3


class CudaGraphsRuntime(EagerRuntime):
    """Replays the kernels of one eager inference on a CUDA device; saves what `eager` saves.

    Small networks spend more time in launching kernels than in running them; a replay launches all
    of them at once. At float32 they are recorded with TF32 off.

    Args:
        settings: device "cuda[:index]" ("cuda" by default); precision and `channels_last` as for
            `eager`.

    Raises:
        RuntimeUnavailableError: torch finds no CUDA device.
    """

    name: ClassVar[str] = "cuda-graphs"
    device_kinds: ClassVar[tuple[str, ...]] = ("cuda",)

    def __init__(
        self, settings: RuntimeSettings | None = None, *, channels_last: bool = False
    ) -> None:
        super().__init__(settings or RuntimeSettings(device="cuda"), channels_last=channels_last)

    def family(
        self, network: nn.Module, space: ChannelSpace, example_inputs: ExampleInputs
    ) -> Family:
        return ResizeFamily(self, network, space, example_inputs)

    def _session(
        self, network: Callable[..., Any], example_inputs: ExampleInputs
    ) -> CudaGraphSession:
        return CudaGraphSession(
            network,
            self._moved(example_inputs),
            settings=self.settings,
            identity=self.identity(example_inputs),
        )


class CudaGraphSession(CudaEagerSession):
    """A recorded inference. Its inputs and outputs keep the addresses they were recorded with.

    Raises:
        ExportError: an operation cannot be recorded (it waits for the device or allocates).
    """

    def __init__(
        self,
        network: Callable[..., Any],
        inputs: ExampleInputs,
        *,
        settings: RuntimeSettings,
        identity: Mapping[str, Any],
    ) -> None:
        super().__init__(network, inputs, settings=settings, identity=identity)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._recorded: Any = None
        with self.active():  # a replay does what was recorded, whatever the settings are then
            # Libraries choose algorithms and allocate workspaces in the first calls, on a stream
            # beside the default one because recording takes place on such a stream.
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                for _ in range(_WARM_UPS):
                    super()._call()
            torch.cuda.current_stream().wait_stream(beside)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    self._recorded = super()._call()
            except Exception as error:
                raise ExportError(
                    "cuda-graphs: one inference cannot be recorded "
                    f"({type(error).__name__}: {first_line(error)}); remove "
                    "operations that wait for the device (`.item()`, masks as indices), or choose "
                    "the runtime `eager`"
                ) from error
            self._graph = graph

    def _call(self) -> Any:
        if self._graph is None:
            raise RuntimeError("this session is closed; load the network again")
        self._graph.replay()
        return self._recorded

    def outputs(self) -> list[Tensor]:
        with self._device():
            found = self._call()
            torch.cuda.synchronize()
            return flatten_outputs(found)

    def close(self) -> None:
        super().close()
        self._graph, self._recorded = None, None

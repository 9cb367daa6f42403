"""ONNX export with a numeric check: a file that computes something else is never handed out."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from wgates_plugin.errors import ExportError, RuntimeUnavailableError, first_line
from wgates_plugin.latency.base import (
    flatten_outputs,
    frozen_copy,
    named_tensors,
    require,
    split_inputs,
)

if TYPE_CHECKING:
    from wgates_plugin.calling import ExampleInputs

_TOLERANCE = 1e-4

RunOnnx = Callable[[bytes], list[Tensor]]


def export_checked(network: nn.Module, example_inputs: ExampleInputs, run: RunOnnx) -> bytes:
    """The network in eval mode as ONNX bytes that were seen to compute what it computes.

    torch's TorchScript exporter goes first (ten times faster); where it fails or computes
    something else, the dynamo exporter has its turn.

    Args:
        run: executes a model on the example inputs and returns its flattened outputs.

    Raises:
        ExportError: no exporter gives a model that agrees; the message has each one's reason.
        RuntimeUnavailableError: `run` has no device to run on.
    """
    frozen = frozen_copy(network).to("cpu", torch.float32)
    reasons = []
    last: Exception | None = None
    for exporter in (export_torchscript, export_dynamo):
        try:
            model = exporter(frozen, example_inputs)
            found = run(model)
        except RuntimeUnavailableError:
            raise
        except Exception as error:
            reasons.append(describe_failure(exporter, error))
            last = error
            continue
        try:
            check_agreement(found, frozen, example_inputs)
            return model
        except ExportError as error:
            where = _where(exporter, frozen, example_inputs, run)
            reasons.append(describe_failure(exporter, error) + where)
            last = error
    raise ExportError(
        "onnx: no exporter gives a model that computes what the network computes ("
        + "; ".join(reasons)
        + "); remove the operation named, or choose the runtime `eager`"
    ) from last


def _where(
    exporter: Callable[..., bytes],
    network: nn.Module,
    example_inputs: ExampleInputs,
    run: RunOnnx,
) -> str:
    """Where a disagreeing export first departs from the network; nothing where that fails too."""
    from wgates_plugin.latency.export_diagnosis import first_departure

    inputs, _ = _ordered_inputs(network, example_inputs)
    try:
        model = exporter(network, example_inputs, template=True)
        return f", {first_departure(model, network, inputs, run)}"
    except Exception:  # the disagreement is what matters, and it is told
        return ""


def describe_failure(exporter: Callable[..., bytes], error: Exception) -> str:
    """One line: which exporter failed and the first line of why."""
    return f"{exporter.__name__}: {type(error).__name__}: {first_line(error)}"


def export_torchscript(
    network: nn.Module, example_inputs: ExampleInputs, *, template: bool = False
) -> bytes:
    """Export by tracing. `template` keeps every parameter under its state-dict name, unfolded."""
    inputs, names = _ordered_inputs(network, example_inputs)
    args, kwargs = split_inputs(inputs)
    options: dict[str, Any] = {"kwargs": kwargs, "input_names": names, "dynamo": False}
    if template:
        options |= {
            # PRESERVE on an eval network keeps BatchNorm as a node; the default folds it away.
            "training": torch.onnx.TrainingMode.PRESERVE,
            "do_constant_folding": False,
            "keep_initializers_as_inputs": False,
        }
    buffer = io.BytesIO()
    with _silence():
        # The annotation knows paths only; the TorchScript exporter writes to buffers too.
        torch.onnx.export(network, args, cast(Any, buffer), **options)
    return buffer.getvalue()


def export_dynamo(
    network: nn.Module, example_inputs: ExampleInputs, *, template: bool = False
) -> bytes:
    """Export through `torch.export`. `template`: as for `export_torchscript`."""
    require("onnxscript", extra="onnx", purpose="exporting this network to ONNX")
    inputs, names = _ordered_inputs(network, example_inputs)
    args, kwargs = split_inputs(inputs)
    with _silence():
        program = torch.onnx.export(
            network,
            args,
            kwargs=kwargs,
            input_names=names,
            dynamo=True,
            verbose=False,
            optimize=not template,
        )
    if program is None:
        raise ExportError("onnx: the dynamo exporter returned nothing")
    return bytes(program.model_proto.SerializeToString())


def _ordered_inputs(
    network: nn.Module, example_inputs: ExampleInputs
) -> tuple[ExampleInputs, list[str]]:
    """CPU float32 inputs in the order of `forward`, because exporters number inputs that way."""
    tensors = cpu_tensors(example_inputs)
    if isinstance(example_inputs, dict):
        known = [name for name in inspect.signature(network.forward).parameters if name in tensors]
        ordered = {name: tensors[name] for name in [*known, *tensors]}
        return dict(ordered), list(ordered)
    return tuple(tensors.values()), list(tensors)


def cpu_tensors(example_inputs: ExampleInputs) -> dict[str, Tensor]:
    """Example inputs by name, detached, on the CPU, floating point ones as float32."""
    return {
        name: tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else None)
        for name, tensor in named_tensors(example_inputs).items()
    }


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the exporters' deprecation notes and progress prints from the user's screen."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    # On failure the TorchScript exporter prints the whole graph from C++, past `sys.stdout`, and it
    # switches that log on itself, so only the function that prints can be kept quiet.
    log = getattr(torch._C, "_jit_onnx_log", None)
    torch._C._jit_onnx_log = lambda *_: None
    try:
        with (
            warnings.catch_warnings(),
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            contextlib.redirect_stdout(nowhere),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        if log is None:
            del torch._C._jit_onnx_log
        else:
            torch._C._jit_onnx_log = log


def check_agreement(
    found: Sequence[Tensor],
    network: nn.Module,
    example_inputs: ExampleInputs,
    *,
    subject: str = "onnx",
) -> None:
    """Compare a model's outputs with the network's own, each output at its own scale.

    For output k with float32 eager values e and found values f the law is
    `max|f - e| <= 1e-4 * max|e|`. Where cancellation makes outputs small beside what they are
    computed from, float32 itself cannot keep that; then four times eager's own distance from a
    float64 run is allowed.

    Args:
        subject: whose outputs these are, for messages.

    Raises:
        ExportError: naming the output and how far off it is.
    """
    expected = _eager_outputs(network, example_inputs, torch.float32)
    if len(found) != len(expected):
        raise ExportError(
            f"{subject}: the model has {len(found)} outputs where the network has {len(expected)}"
        )
    exact: list[Tensor] | None = None
    for index, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        if mine.shape != theirs.shape:
            raise ExportError(
                f"{subject}: output {index} has shape {tuple(mine.shape)} where the network gives "
                f"{tuple(theirs.shape)}"
            )
        if not theirs.numel():
            continue
        if not torch.isfinite(theirs).all():
            raise ExportError(
                f"{subject}: output {index} of the network itself is not finite on the example inputs; "
                "give inputs it can handle"
            )
        scale = float(theirs.abs().max())
        distance = float((mine.double() - theirs.double()).abs().max())
        if distance <= _TOLERANCE * scale:  # False for not-a-number
            continue
        exact = exact or _eager_outputs(network, example_inputs, torch.float64)
        rounding = float((theirs.double() - exact[index].double()).abs().max())
        if not distance <= 4 * rounding:
            relative = distance / scale if scale else float("inf")
            raise ExportError(
                f"{subject}: output {index} is off by {relative:.1e} of its largest value {scale:.3g}, "
                f"allowed are {_TOLERANCE:.0e}"
            )


def _eager_outputs(
    network: nn.Module, example_inputs: ExampleInputs, dtype: torch.dtype
) -> list[Tensor]:
    inputs, _ = _ordered_inputs(network, example_inputs)
    args, kwargs = split_inputs(inputs)
    if dtype is torch.float64:
        network = frozen_copy(network).to(dtype)
        args = tuple(x.to(dtype) if x.is_floating_point() else x for x in args)
        kwargs = {k: x.to(dtype) if x.is_floating_point() else x for k, x in kwargs.items()}
    with torch.no_grad():
        return flatten_outputs(network(*args, **kwargs))

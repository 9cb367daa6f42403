"""One ONNX export for a whole family: the dense graph, its initializers sliced to each widths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from wgates_plugin.errors import ExportError
from wgates_plugin.latency.base import require
from wgates_plugin.latency.layer_times import graph_owners
from wgates_plugin.latency.onnx_export import export_torchscript

if TYPE_CHECKING:
    from wgates_plugin.calling import ExampleInputs
    from wgates_plugin.surgery import ResizeMap

_BESIDE_BYTES = 4096

Sliced = tuple[bytes, dict[str, np.ndarray]]
"""A graph, and the arrays that it only declares."""


class OnnxTemplate:
    """A dense ONNX graph whose initializers carry state-dict names and can be sliced.

    BatchNorm stays a node of its own here; ONNX Runtime folds it when it makes the session, so the
    optimised graph is that of an ordinary export.
    """

    def __init__(
        self,
        network: nn.Module,
        example_inputs: ExampleInputs,
        *,
        exporter: Callable[..., bytes] = export_torchscript,
    ) -> None:
        self._onnx = require("onnx", extra="onnx", purpose="latency samples on ONNX Runtime")
        model = self._onnx.load_from_string(exporter(network, example_inputs, template=True))
        state = {name: value.detach().numpy() for name, value in network.state_dict().items()}
        self._arrays = _named_initializers(model.graph, state, self._onnx)
        # Recorded shapes of intermediate values are those of the dense network.
        del model.graph.value_info[:]
        self._model = model
        self._groups = _group_attributes(model.graph)
        self.owners = graph_owners(model.graph)

    def at(self, change: ResizeMap) -> Sliced:
        """The model with `change` applied: its graph, and the large arrays that go beside it.

        Large initializers are only declared in the graph: copying them into a protobuf and out
        again costs more than making the session does.

        Raises:
            ExportError: a tensor or attribute to change is not in the graph.
        """
        missing = [name for name in change.tensors if name not in self._arrays]
        missing += [
            f"{module}.groups"
            for module, values in change.attributes.items()
            if "groups" in values and module not in self._groups
        ]
        if missing:
            raise ExportError(
                "onnx template: not in the exported graph: "
                + ", ".join(missing[:5])
                + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            )
        for module, attributes in self._groups.items():
            for attribute, dense in attributes:
                attribute.i = change.attributes.get(module, {}).get("groups", dense)
        initializers = self._model.graph.initializer
        beside: dict[str, np.ndarray] = {}
        del initializers[:]
        for name, dense in self._arrays.items():
            array = np.ascontiguousarray(_sliced(dense, change.tensors.get(name, {})))
            tensor = initializers.add()
            tensor.name = name
            tensor.data_type = self._onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            tensor.dims.extend(array.shape)
            if array.nbytes < _BESIDE_BYTES:
                tensor.raw_data = array.tobytes()
                continue
            tensor.data_location = self._onnx.TensorProto.EXTERNAL
            entry = tensor.external_data.add()
            entry.key, entry.value = "location", "given-to-the-session"
            beside[name] = array
        return bytes(self._model.SerializeToString()), beside


def _sliced(array: np.ndarray, slices: Mapping[int, np.ndarray]) -> np.ndarray:
    for dim, indices in slices.items():
        array = np.take(array, indices, axis=dim)
    return array


def _named_initializers(graph: Any, state: Mapping[str, np.ndarray], onnx: Any) -> dict[str, Any]:
    """Initializer arrays by name, with the exporter's sharing of equal tensors undone.

    The exporter stores tensors of equal content once (fresh BatchNorms all look alike) and gives
    the others an `Identity` node. Equal content does not mean equal widths, so each gets its own.
    """
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    kept = []
    for node in graph.node:
        if node.op_type == "Identity" and node.input[0] in arrays and node.output[0] in state:
            arrays[node.output[0]] = state[node.output[0]]
        else:
            kept.append(node)
    if len(kept) < len(graph.node):
        del graph.node[:]
        graph.node.extend(kept)
    used = {name for node in graph.node for name in node.input}
    used |= {output.name for output in graph.output}
    return {name: array for name, array in arrays.items() if name in used}


def _group_attributes(graph: Any) -> dict[str, list[tuple[Any, int]]]:
    """Module name -> its convolution nodes' `group` attributes with their dense values."""
    found: dict[str, list[tuple[Any, int]]] = {}
    for node in graph.node:
        if node.op_type not in ("Conv", "ConvTranspose"):
            continue
        module, dot, parameter = node.input[1].rpartition(".")
        if not dot or parameter != "weight":
            continue
        for attribute in node.attribute:
            if attribute.name == "group":
                found.setdefault(module, []).append((attribute, int(attribute.i)))
    return found

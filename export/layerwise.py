"""Runs a graph that is larger than the memory: cut at its layers, one of them loaded at a time, straight from its file.

`LayerwiseGraph` stands where the runtime expects a `Graph`, so that a gate asks through the very host code that users
run. It remembers what went from layer to layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from segzero_rt.graph import Array, Backend, Stop, resolve_backend
from segzero_rt.graph_spec import GraphSpec
from segzero_rt.operators.library import resolve_operators

from .graph_builder import GraphBuilder
from .nvfp4 import decoded


@dataclass(kw_only=True, slots=True)
class _Part:
    """Consecutive nodes of the graph."""

    label: str
    """Of the layer; "" for what comes before the first."""
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


class LayerwiseGraph:
    """A graph file run layer by layer on the CPU.

    Args:
        path: the graph; its weights may lie beside it.
        builder: what wrote it: its spec, and the tensors at which it is cut.
        operators: as for `Graph.load`.
    """

    def __init__(self, path: Path, builder: GraphBuilder, *, operators: bool = True) -> None:
        self.spec: GraphSpec = builder.spec
        self.backend: Backend = resolve_backend("cpu")
        self.hidden: dict[str, NDArray[np.float32]] = {}
        """The residual that each layer took in at the latest run, by the layer's name."""
        self._path = path
        self._library = resolve_operators().path if operators else None
        self._cuts = {tensor: label for label, tensor in builder.hidden.items()}
        self._model = onnx.load(str(path), load_external_data=False)
        self._weights = {tensor.name: tensor for tensor in self._model.graph.initializer}
        self._parts = _cut(self._model.graph, self._cuts, set(self._weights), self.spec)

    def run(self, inputs: Mapping[str, Array], *, stop: Stop | None = None) -> dict[str, Array]:
        """As `Graph.run`; `stop` is not looked at."""
        values: dict[str, Array] = dict(inputs)
        self.hidden = {label: inputs[tensor] for tensor, label in self._cuts.items() if tensor in inputs}
        for part in self._parts:
            values.update(self._run_part(part, values))
            for tensor in part.outputs:
                if tensor in self._cuts:
                    self.hidden[self._cuts[tensor]] = values[tensor]
        return {name: values[name] for name in self.spec.output_names}

    def empty(self, shape: tuple[int, ...], dtype: str = "float32") -> Array:
        """As `Graph.empty`."""
        return np.zeros(shape, dtype=dtype)

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> BoundLayers:
        """As `Graph.bind`."""
        return BoundLayers(self, inputs, outputs)

    def _run_part(self, part: _Part, values: Mapping[str, Array]) -> dict[str, Array]:
        """Loads one part from a model file that lies beside the weights for as long as that takes."""
        import onnxruntime

        used = {name for node in part.nodes for name in node.input}
        graph = helper.make_graph(
            part.nodes,
            part.label or "start",
            [_value(name, values[name]) for name in part.inputs],
            [onnx.ValueInfoProto(name=name) for name in part.outputs],
            [self._weights[name] for name in self._weights if name in used],
        )
        opsets, functions = list(self._model.opset_import), list(self._model.functions)
        model = helper.make_model(graph, opset_imports=opsets, functions=functions)
        model.ir_version = self._model.ir_version
        model = decoded(model, self._path.parent)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.enable_cpu_mem_arena = False  # it would keep what a part has taken until the next has taken its own
        if self._library is not None and functions:
            options.register_custom_ops_library(str(self._library))
        if any(weight.data_type == TensorProto.FLOAT8E4M3FN for weight in graph.initializer):  # see `Graph.load`
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        if not part.nodes[-1].output[0].startswith(("layers.", "blocks.")):
            # The output layer as it lies: folding its Cast and packing it would take its size three times over.
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.add_session_config_entry("session.disable_prepacking", "1")
        temporary = self._path.with_suffix(".part.onnx")
        try:
            temporary.write_bytes(model.SerializeToString())
            session = onnxruntime.InferenceSession(str(temporary), options, providers=["CPUExecutionProvider"])
        finally:
            temporary.unlink(missing_ok=True)
        outputs = session.run(list(part.outputs), {name: values[name] for name in part.inputs})
        return dict(zip(part.outputs, outputs, strict=True))


class BoundLayers:
    """A layerwise graph with its buffers, as `BoundGraph`."""

    def __init__(self, graph: LayerwiseGraph, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        self._graph = graph
        self._inputs = dict(inputs)
        self._outputs = dict(outputs)

    def rebind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """As `BoundGraph.rebind`."""
        self._inputs.update(inputs)
        self._outputs.update(outputs)

    def run(self) -> None:
        for name, values in self._graph.run(self._inputs).items():
            np.copyto(self._outputs[name], values)


def _cut(graph: onnx.GraphProto, cuts: Mapping[str, str], weights: set[str], spec: GraphSpec) -> list[_Part]:
    """The nodes in their order, a new part beginning at each tensor of `cuts`."""
    parts = [_Part(label="")]
    for node in graph.node:
        reached = next((cuts[name] for name in node.output if name in cuts), None)
        if reached is not None:
            parts.append(_Part(label=reached))
        parts[-1].nodes.append(node)
    parts = [part for part in parts if part.nodes]
    wanted = {*spec.output_names, *cuts}
    for place, part in enumerate(parts):
        made = {name for node in part.nodes for name in node.output if name}
        needed = {name for node in part.nodes for name in node.input if name}
        later = {name for after in parts[place + 1 :] for node in after.nodes for name in node.input}
        part.inputs = tuple(sorted(needed - made - weights))
        part.outputs = tuple(sorted(made & (later | wanted)))
    return parts


def _value(name: str, values: Array) -> onnx.ValueInfoProto:
    shape: list[Any] = [None] * values.ndim
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(values.dtype), shape)

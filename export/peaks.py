"""The largest magnitudes of tensors inside a graph, measured as ONNX Runtime computes it.

All of them in one run, and picture by picture, each tensor reduced as soon as it is there. ONNX Runtime orders nodes by
the ends that they lead to, the last one first: with the reductions of early tensors last in the file nothing is held
longer than it is needed. The other way round all tensors were held to the end: SAM 2.1's small encoder took 5.6 GB for
a picture of 1024 x 1024 instead of 1.4, and the large one more than 24 GB for two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from .lazy_weight import Floats


def largest_magnitudes(
    model: onnx.ModelProto, tensors: Mapping[str, int], inputs: Mapping[str, NDArray[Any]]
) -> dict[str, Floats]:
    """Over all of a batch.

    Args:
        model: a graph of float32 below 2 GB, weights inside.
        tensors: names, each with how many channels its last axis has, to tell them apart; 0 for one figure of all.
        inputs: the first axis of each is that of the batch.

    Returns:
        float32 [channels], or [] for one figure, by name.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    contents = _probed(model, tensors).SerializeToString()
    session = onnxruntime.InferenceSession(contents, options, providers=["CPUExecutionProvider"])
    del contents
    names = [_figure(tensor) for tensor in tensors]
    found: dict[str, Floats] = {}
    for place in range(min(map(len, inputs.values()))):
        values = session.run(names, {name: array[place : place + 1] for name, array in inputs.items()})
        for tensor, value in zip(tensors, values, strict=True):
            found[tensor] = np.maximum(found[tensor], value) if tensor in found else np.asarray(value)
    return found


def _probed(model: onnx.ModelProto, tensors: Mapping[str, int]) -> onnx.ModelProto:
    """The graph with these figures as its only outputs."""
    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    graph = probed.graph
    del graph.output[:]
    places = {name: place for place, node in enumerate(graph.node) for name in node.output}
    for tensor, channels in sorted(tensors.items(), key=lambda item: -places.get(item[0], -1)):
        magnitudes, figure = f"{tensor}:magnitudes", _figure(tensor)
        graph.node.append(helper.make_node("Abs", [tensor], [magnitudes]))
        rows, axes = magnitudes, {}
        if channels:
            shape = numpy_helper.from_array(np.array([-1, channels], np.int64), f"{tensor}:rows_shape")
            graph.initializer.append(shape)
            rows, axes = f"{tensor}:rows", {"axes": [0]}
            graph.node.append(helper.make_node("Reshape", [magnitudes, shape.name], [rows]))
        graph.node.append(helper.make_node("ReduceMax", [rows], [figure], keepdims=0, **axes))
        sides = [channels] if channels else []
        graph.output.append(helper.make_tensor_value_info(figure, TensorProto.FLOAT, sides))
    return probed


def _figure(tensor: str) -> str:
    return f"{tensor}:peaks"

"""Weights of an ONNX model kept as fp16 in the file and computed with as fp32.

Halves a bundle without touching its arithmetic: ONNX Runtime folds each Cast once, when it loads the graph. Only the
rounding of the weights themselves is left of fp16, and values beyond its range are refused rather than clipped.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from segzero_rt.errors import ExportError

LARGEST_FP16 = 65_504.0
SMALLEST_WEIGHT_ELEMENTS = 1_024
"""Tensors up to this size stay fp32: biases, norms and tables are cheap, and their rounding is not."""


def store_weights_fp16(
    model: onnx.ModelProto, *, smallest_elements: int = SMALLEST_WEIGHT_ELEMENTS, keep: frozenset[str] = frozenset()
) -> onnx.ModelProto:
    """Turns large fp32 initialisers of the graph into fp16 with a Cast to fp32 behind each. Changes `model` in place.

    Args:
        model: weights inside the protobuf, not in external files.
        smallest_elements: initialisers with at most so many elements stay as they are.
        keep: names of initialisers that stay fp32 whatever their size (tables of positions, say).

    Returns:
        The same model, for chaining.

    Raises:
        ExportError: a weight is not finite or beyond fp16's range.
    """
    kept: list[TensorProto] = []
    casts: list[onnx.NodeProto] = []
    outputs = {output.name for output in model.graph.output}
    for tensor in model.graph.initializer:
        elements = int(np.prod(tensor.dims)) if tensor.dims else 1
        is_large = tensor.data_type == TensorProto.FLOAT and elements > smallest_elements
        if not is_large or tensor.name in keep or tensor.name in outputs:
            kept.append(tensor)
            continue
        values = numpy_helper.to_array(tensor)
        largest = float(np.abs(values).max())
        if not largest <= LARGEST_FP16:  # also true for NaN
            raise ExportError(
                f"expected {tensor.name} within fp16's range of {LARGEST_FP16:.0f}, its largest weight is {largest}; "
                "name it in `keep`"
            )
        stored = f"{tensor.name}.fp16"
        kept.append(numpy_helper.from_array(values.astype(np.float16), stored))
        casts.append(
            helper.make_node("Cast", [stored], [tensor.name], name=f"{tensor.name}.to_fp32", to=TensorProto.FLOAT)
        )
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    nodes = [*casts, *model.graph.node]  # nodes stand in topological order: the casts feed all others
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    converted = {cast.output[0] for cast in casts}
    inputs = [value for value in model.graph.input if value.name not in converted]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    return model

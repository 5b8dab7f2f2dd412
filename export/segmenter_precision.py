"""An image encoder that computes in 16 bits: which parts do, which stay in float32, and what they may reach.

Hiera degrades in FP16 when all of it is: rounded residuals add up over its blocks, and norms and softmax lose what they
subtract. So the rule is about kinds of node, not about names:

* products (MatMul, Gemm, attention; Conv in float16) read and write 16 bits, and their weights are stored so;
* nodes that only move numbers (Reshape, Transpose, Gather, ...) keep the precision that they get;
* all else stays in float32: residual sums, norms, softmax, GELU, positions, and the graph's inputs and outputs.

The result says so by Cast nodes, for builders that take a file at its word (strongly typed TensorRT networks).

A CPU has no such products: ONNX Runtime would compute them in float32 and round less than a GPU does, so running the
file there proves little. `rounding_twin` is the same graph with every rounding in it, in float32 between them: what it
gives is what a device with 16-bit tensors and float32 accumulation gives, infinities included.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from segzero_rt.errors import ExportError

from .peaks import largest_magnitudes

LARGEST_FLOAT16 = float(np.finfo(np.float16).max)

_ELEMENTS = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "MultiHeadAttention"})
_NOT_IN_BFLOAT16 = frozenset({"Conv"})
"""ONNX lets a convolution be bfloat16 from opset 22 on, which TensorRT 10.3 does not read."""
_MOVES = frozenset({"Reshape", "Transpose", "Gather", "Slice", "Squeeze", "Unsqueeze", "Pad", "ReduceMax"})
"""Their first input is the data; the others are indices and lengths."""


def in_16_bits(model: onnx.ModelProto, dtype: str, *, float32_products: Collection[str] = ()) -> onnx.ModelProto:
    """A float32 graph with its products in `dtype`, "float16" or "bfloat16".

    Args:
        float32_products: names of products, as `product_name` gives them, that stay as they are.

    Raises:
        ExportError: no such product, or a weight that float16 cannot hold.
    """
    return _Lowering(model, dtype, float32_products, twin=False).run()


def rounding_twin(model: onnx.ModelProto, dtype: str, *, float32_products: Collection[str] = ()) -> onnx.ModelProto:
    """`in_16_bits` in float32, with each number rounded where that would round it; for a CPU without optimisation."""
    return _Lowering(model, dtype, float32_products, twin=True).run()


def product_name(node: onnx.NodeProto, initializers: Collection[str]) -> str:
    """What a product is called: its weight's name, else its output's."""
    weight = next((name for name in node.input if name in initializers), None)
    return weight.removesuffix(".weight") if weight else node.output[0]


def largest_activations(model: onnx.ModelProto, inputs: dict[str, NDArray[Any]]) -> dict[str, float]:
    """The largest magnitude that each product reads or writes in float32, by `product_name`."""
    initializers = {tensor.name for tensor in model.graph.initializer}
    names: dict[str, set[str]] = {}  # several nodes may share a weight
    for node in model.graph.node:
        if node.op_type in _PRODUCTS:
            seen = {*node.input, *node.output} - initializers - {""}
            names.setdefault(product_name(node, initializers), set()).update(seen)
    peaks = largest_magnitudes(model, {tensor: 0 for tensors in names.values() for tensor in tensors}, inputs)
    return {product: max(float(peaks[tensor]) for tensor in tensors) for product, tensors in names.items()}


def check_range(peaks: dict[str, float], float32_products: Collection[str] = ()) -> None:
    """Refuses activations that float16 cannot hold.

    Raises:
        ExportError: names the product that reaches furthest, and how to keep it in float32.
    """
    beyond = {
        name: peak for name, peak in peaks.items() if not peak <= LARGEST_FLOAT16 and name not in float32_products
    }
    if beyond:
        worst = max(beyond, key=lambda name: beyond[name])
        raise ExportError(
            f"expected activations within float16's range of {LARGEST_FLOAT16:.0f}, {worst} of the image encoder "
            f"reaches {beyond[worst]:.3g} ({len(beyond)} beyond in all); keep it with --segmenter-float32 {worst}, or "
            "compute in bfloat16"
        )


class _Lowering:
    """One pass over the nodes in their order; a tensor exists in float32, in 16 bits or in both, as is asked for."""

    def __init__(self, model: onnx.ModelProto, dtype: str, kept: Collection[str], *, twin: bool) -> None:
        if dtype not in _ELEMENTS:
            raise ExportError(f"expected products in {' or '.join(_ELEMENTS)}, got {dtype!r}")
        self._model = model
        self._dtype = dtype
        self._kept = frozenset(kept)
        self._twin = twin
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self._nodes: list[onnx.NodeProto] = []
        self._made: list[onnx.TensorProto] = []
        self._in_16: dict[str, str] = {}
        """Tensor -> its 16-bit version's name."""
        self._only_16: set[str] = set()
        """Tensors that have no float32 version yet."""

    def run(self) -> onnx.ModelProto:
        names = {product_name(node, self._weights) for node in self._model.graph.node if node.op_type in _PRODUCTS}
        if unknown := sorted(self._kept - names):
            raise ExportError(
                f"expected a product of the image encoder, got {unknown[0]!r}; such as {sorted(names)[0]}"
            )
        for node in self._model.graph.node:
            if self._is_lowered(node):
                self._low(node, list(node.input))
            elif node.op_type in _MOVES and node.input[0] in self._only_16:
                self._low(node, [node.input[0]])
            else:
                self._nodes.append(_renamed(node, [self._wide(name) for name in node.input], list(node.output)))
        outputs = [self._wide(output.name) for output in self._model.graph.output]
        assert outputs == [output.name for output in self._model.graph.output], "float32 versions keep their names"
        lowered = onnx.ModelProto()
        lowered.CopyFrom(self._model)
        del lowered.graph.node[:], lowered.graph.initializer[:]
        lowered.graph.node.extend(self._nodes)
        used = {name for node in self._nodes for name in node.input}
        lowered.graph.initializer.extend(
            tensor for tensor in (*self._model.graph.initializer, *self._made) if tensor.name in used
        )
        return lowered

    def _is_lowered(self, node: onnx.NodeProto) -> bool:
        if node.op_type not in _PRODUCTS or (self._dtype == "bfloat16" and node.op_type in _NOT_IN_BFLOAT16):
            return False
        return product_name(node, self._weights) not in self._kept

    def _low(self, node: onnx.NodeProto, data: list[str]) -> None:
        """Adds a node that reads `data`, and writes, in 16 bits."""
        lowered = [bool(name) and name in data for name in node.input]
        inputs = [self._low_input(name) if low else name for name, low in zip(node.input, lowered, strict=True)]
        outputs = [f"{name}:{self._dtype}" for name in node.output]
        self._in_16.update(zip(node.output, outputs, strict=True))
        self._only_16.update(node.output)
        if not self._twin:
            self._nodes.append(_renamed(node, inputs, outputs))
            return
        wide = [
            self._cast(name, f"{outputs[0]}:input_{index}", TensorProto.FLOAT) if low else name
            for index, (name, low) in enumerate(zip(inputs, lowered, strict=True))
        ]
        exact = [f"{name}:exact" for name in outputs]
        self._nodes.append(_renamed(node, wide, exact))
        for name, output in zip(exact, outputs, strict=True):
            self._cast(name, output, _ELEMENTS[self._dtype])

    def _low_input(self, name: str) -> str:
        """A tensor's 16-bit version: a weight is stored so, all else is cast once."""
        if name not in self._in_16:
            low = f"{name}:{self._dtype}"
            if name in self._weights:
                self._made.append(_stored(self._weights[name], low, self._dtype))
            else:
                self._cast(name, low, _ELEMENTS[self._dtype])
            self._in_16[name] = low
        return self._in_16[name]

    def _wide(self, name: str) -> str:
        """A tensor in float32, under its own name."""
        if name in self._only_16:
            self._only_16.remove(name)
            self._cast(self._in_16[name], name, TensorProto.FLOAT)
        return name

    def _cast(self, source: str, target: str, element: int) -> str:
        self._nodes.append(helper.make_node("Cast", [source], [target], name=f"{target}:Cast", to=element))
        return target


def _renamed(node: onnx.NodeProto, inputs: list[str], outputs: list[str]) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    del copy.input[:], copy.output[:]
    copy.input.extend(inputs)
    copy.output.extend(outputs)
    return copy


def _stored(tensor: onnx.TensorProto, name: str, dtype: str) -> onnx.TensorProto:
    values = numpy_helper.to_array(tensor)
    if dtype == "float16":
        largest = float(np.abs(values).max(initial=0.0))
        if not largest <= LARGEST_FLOAT16:
            raise ExportError(f"expected weights within float16's range, {tensor.name} has {largest:.3g}")
        return numpy_helper.from_array(values.astype(np.float16), name)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    # to the nearest, ties to even
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    stored = TensorProto(name=name, data_type=TensorProto.BFLOAT16, dims=tensor.dims)
    stored.raw_data = rounded.tobytes()
    return stored

"""Products in 8 bits that say so in plain ONNX: QuantizeLinear and DequantizeLinear around each, for TensorRT.

    x ─► Mul ─► Quantize ─► Dequantize ─► MatMul ─► y     one scale for the tensor, measured beforehand (`calibration`)
    8-bit weight ─────────► Dequantize ──────┘            one scale for each output

A builder that takes a file at its word makes one product in 8 bits of the four; elsewhere they are what they say, in
floats. Two kinds of code, `CODES`:

* int8, symmetric, zero being 0: TensorRT takes no other. Opset 17 knows its other side as float32 alone, so that a
  product of a graph in 16 bits has casts around it. One step for all channels of a tensor would be set by its largest,
  so channels are evened out first, exactly: what the factor in front divides a channel by, its row of the weight is
  multiplied by (SmoothQuant, arXiv:2211.10438; here the factor is chosen by activations alone, so that products of one
  tensor share it, and stands in the graph, where TensorRT makes it part of the norm or activation before it);
* float8 e4m3fn, of opset 19. Its steps grow with its numbers, so that small channels lose nothing to large ones, and no
  factor is needed. Scales have the type of the graph around.

What stays as it was, by kind and not by luck: norms, softmax, rotary embeddings, residuals, products of activations
with activations, token tables, convolutions, and `LAST_LAYERS`.

ONNX Runtime's own quantiser would write the same nodes (a test holds both to the same numbers). It wants the whole
graph in memory in float32, where these weights go from the checkpoint to the file one by one, and knows no other
precision beside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from segzero_rt.errors import ExportError

from .graph_builder import FLOAT8_OPSET, OPSET
from .lazy_weight import Floats, Weight
from .peaks import largest_magnitudes
from .weight_encoding import (
    FLOAT8,
    FLOATS,
    HIGHEST_FLOAT8,
    Encoding,
    Float8Encoding,
    FloatEncoding,
    Int8Encoding,
    float8_scale,
)
from .weight_store import InlineStore, WeightStore

LAST_LAYERS = ("merger/fc2", "pyramid/")
"""Beginnings of products that what follows sees as it is: the policy's picture tokens, the segmenter's features."""
HEADROOM = 1.1
"""Codes reach that much further than what was measured."""
SMOOTHING = 0.7
"""Power of a channel's magnitude that it is divided by. Of the tabletop pair, replies' mean divergence from PyTorch in
nats, and the largest error of features on a scene: 0.052 and 2.8 % at 0, 0.0042 and 2.0 % at 0.5, 0.0021 and 1.8 % at
0.7, 0.0025 and 1.6 % at 0.85, 0.0026 and 1.6 % at 1."""
FAINTEST = 1e-4
"""Of the largest channel's magnitude: what a channel that never held more is taken for."""
_PRODUCTS = ("MatMul", "Gemm")
_SCALE = ":scale"


@dataclass(frozen=True, kw_only=True, slots=True)
class Codes:
    """What products are rounded to."""

    name: str
    dtype: np.dtype
    highest: float
    opset: int
    """The first whose QuantizeLinear knows them."""
    smoothing: float
    """See `SMOOTHING`."""
    emulated: str = ""
    """How a CPU runs such products, for the manifest; empty where it has them."""

    @property
    def suffix(self) -> str:
        """Of the names of weights that are stored so."""
        return f":{self.name}"

    def encoding(self, path: str, weight: Weight, scale_dtype: str = "float32") -> Encoding:
        """Of a weight [out, in]."""
        names = {"name": f"{path}{self.suffix}", "scale_name": f"{path}{_SCALE}"}
        if self.dtype == FLOAT8:
            return Float8Encoding(path, weight, scale_dtype=scale_dtype, **names)
        return Int8Encoding(path, weight, **names)

    def step(self, highest: float, scale_dtype: str) -> NDArray[Any]:
        """The scale with which the highest code stands for `highest`."""
        if self.dtype == FLOAT8:
            return float8_scale(np.asarray(highest, np.float32), FLOATS[scale_dtype])
        return np.asarray(highest / self.highest, FLOATS[scale_dtype])


INT8 = Codes(name="int8", dtype=np.dtype(np.int8), highest=127, opset=OPSET, smoothing=SMOOTHING)
FP8 = Codes(
    name="fp8",
    dtype=FLOAT8,
    highest=HIGHEST_FLOAT8,
    opset=FLOAT8_OPSET,
    smoothing=0.0,
    emulated="factors rounded to float8 and back, multiplied in floats",
)
CODES = {codes.name: codes for codes in (INT8, FP8)}
"""By the storages that ask for them."""


def emulation(storage: str) -> dict[str, str]:
    """What a manifest says of a gate on a CPU, of products in these codes; nothing where a CPU has them."""
    emulated = CODES[storage].emulated if storage in CODES else ""
    return {"emulated": emulated} if emulated else {}


def in_8_bits(product: str) -> bool:
    """Whether a product of this path is to be rounded at all."""
    return not product.startswith(LAST_LAYERS)


@dataclass(frozen=True, slots=True)
class Reach:
    """How the codes of a product's input are laid out."""

    divisors: Floats
    """What each channel is divided by before it is rounded, [channels]."""
    highest: float
    """What the highest code stands for, after that."""

    @classmethod
    def of(cls, largest: Floats, smoothing: float = SMOOTHING) -> Reach:
        """For channels of these magnitudes, float32 [channels].

        Raises:
            ExportError: a magnitude is not finite, or all are 0.
        """
        if not (np.isfinite(largest).all() and largest.max(initial=0.0) > 0):
            raise ExportError(f"expected finite activations to round, got up to {largest.max(initial=0.0)}")
        held = np.maximum(largest, np.float32(FAINTEST) * largest.max())
        divisors = (held / np.exp(np.log(held).mean())) ** smoothing
        return cls(divisors.astype(np.float32), HEADROOM * float((held / divisors).max()))

    def key(self) -> bytes:
        """Equal for products that can share the codes of one tensor."""
        return self.divisors.tobytes() + np.float64(self.highest).tobytes()


def channel_peaks(model: onnx.ModelProto, inputs: dict[str, NDArray[Any]]) -> dict[str, Floats]:
    """The largest magnitude in each channel of what a float32 graph's products with a weight read, by their paths."""
    widths = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if tensor.name.endswith(".weight")}
    products = [node for node in model.graph.node if node.op_type in _PRODUCTS and node.input[1] in widths]
    peaks = largest_magnitudes(model, {node.input[0]: widths[node.input[1]] for node in products}, inputs)
    found: dict[str, Floats] = {}
    for node in products:  # several may share a weight
        product, held = node.input[1].removesuffix(".weight"), peaks[node.input[0]]
        found[product] = np.maximum(found[product], held) if product in found else held
    return found


class QdqStore(WeightStore):
    """Takes weights on their way to another store, and turns those of the products asked for into codes.

    Args:
        store: where all weights go.
        products: of which weights are turned, by path.
        scale_dtype: of the weights' scales.
    """

    def __init__(
        self, store: WeightStore, products: Mapping[str, Reach], codes: Codes = INT8, scale_dtype: str = "float32"
    ) -> None:
        super().__init__()
        self._store = store
        self._products = products
        self._codes = codes
        self._scale_dtype = scale_dtype

    def _add(self, encoding: Encoding) -> list[TensorProto]:
        product = encoding.path.removesuffix(".weight")
        if isinstance(encoding, FloatEncoding) and encoding.path != product and product in self._products:
            scaled = _scaled(encoding.weight, self._products[product])
            encoding = self._codes.encoding(encoding.path, scaled, self._scale_dtype)
        tensors = self._store.add(encoding)
        self.lossless = self._store.lossless
        return tensors

    def close(self) -> None:
        self._store.close()


def _scaled(weight: Weight, reach: Reach) -> Weight:
    """A weight [out, in] whose columns take what the channels were divided by."""
    return Weight(weight.shape, lambda start, stop: weight.rows(start, stop) * reach.divisors)


def scale_dtype(codes: Codes, computed: str) -> str:
    """Of all scales in a graph whose other products compute in `computed`: what QuantizeLinear takes there."""
    return computed if codes.opset >= FLOAT8_OPSET else "float32"


def quantize_file(path: Path, reach: Mapping[str, Reach], *, computed: str, codes: Codes = INT8) -> None:
    """Rewrites a graph whose weights came through a `QdqStore`; weights beside it are not read.

    Args:
        reach: of each product's input, by the product's path.
        computed: what those products compute in, before they are rounded.
    """
    model = onnx.load(str(path), load_external_data=False)
    quantized = _Quantizer(model, reach, codes, computed).run()
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(quantized.SerializeToString())
    temporary.replace(path)


def quantize_model(model: onnx.ModelProto, reach: Mapping[str, Reach], codes: Codes = INT8) -> onnx.ModelProto:
    """A float32 graph in memory, its weights as they are or behind casts, with the products of `reach` in codes."""
    store, kept = InlineStore(), []
    for tensor in model.graph.initializer:
        path = tensor.name.partition(":")[0]
        if path.endswith(".weight") and path.removesuffix(".weight") in reach:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            weight = Weight.of(np.ascontiguousarray(values.T))
            kept += store.add(codes.encoding(path, _scaled(weight, reach[path.removesuffix(".weight")])))
        else:
            kept.append(tensor)
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    del changed.graph.initializer[:]
    changed.graph.initializer.extend(kept)
    return _Quantizer(changed, reach, codes, "float32").run()


class _Quantizer:
    """One pass over the nodes in their order."""

    def __init__(self, model: onnx.ModelProto, reach: Mapping[str, Reach], codes: Codes, computed: str) -> None:
        self._model = model
        self._reach = reach
        self._codes = codes
        self._scale_dtype = scale_dtype(codes, computed)
        self._narrow = helper.np_dtype_to_tensor_dtype(FLOATS[computed])
        self._cast_around = self._scale_dtype != computed
        self._weights = {
            tensor.name.removesuffix(codes.suffix): tensor.name
            for tensor in model.graph.initializer
            if tensor.name.endswith(codes.suffix)
        }
        self._widened: set[str] = set()
        """Weights that stand in the graph as what their codes mean."""
        self._nodes: list[onnx.NodeProto] = []
        self._zero = f"{codes.name}_zero"
        self._made: list[TensorProto] = [numpy_helper.from_array(np.zeros((), codes.dtype), self._zero)]
        self._done: dict[tuple[str, bytes], str] = {}
        """Tensor and its reach -> its version that was rounded to codes and back."""

    def run(self) -> onnx.ModelProto:
        for node in self._model.graph.node:
            if node.op_type in _PRODUCTS and node.input[1] in self._weights:
                self._product(node)
            elif not (node.op_type == "Cast" and node.output[0] in self._weights):  # that of the weight which was float
                self._nodes.append(node)
        if missing := sorted(set(self._reach) - {path.removesuffix(".weight") for path in self._weights}):
            raise ExportError(f"expected a product {missing[0]} in the graph to make it {self._codes.name}, got none")
        quantized = onnx.ModelProto()
        quantized.CopyFrom(self._model)
        del quantized.graph.node[:]
        quantized.graph.node.extend(self._nodes)
        quantized.graph.initializer.extend(self._made)
        return quantized

    def _product(self, node: onnx.NodeProto) -> None:
        weight = node.input[1]
        product = weight.removesuffix(".weight")
        x = self._rounded(node.input[0], self._reach[product])
        if weight not in self._widened:
            self._add("DequantizeLinear", [self._weights[weight], f"{weight}{_SCALE}"], weight, axis=1)
            self._widened.add(weight)
        inputs = [x, weight]
        for added in node.input[2:]:
            inputs.append(self._cast(added, f"{added}:wide", TensorProto.FLOAT) if self._cast_around else added)
        output = f"{node.output[0]}:wide" if self._cast_around else node.output[0]
        wide = onnx.NodeProto()
        wide.CopyFrom(node)
        del wide.input[:], wide.output[:]
        wide.input.extend(inputs)
        wide.output.append(output)
        self._nodes.append(wide)
        if self._cast_around:
            self._cast(output, node.output[0], self._narrow)

    def _rounded(self, x: str, reach: Reach) -> str:
        """`x`, its channels evened out, as what its codes stand for."""
        if (x, reach.key()) not in self._done:
            base = f"{x}{self._codes.suffix}_{sum(name == x for name, _ in self._done)}"
            even = self._cast(x, f"{base}:wide", TensorProto.FLOAT) if self._cast_around else x
            steps = [f"{base}{_SCALE}", self._zero]
            self._made.append(numpy_helper.from_array(self._codes.step(reach.highest, self._scale_dtype), steps[0]))
            if (reach.divisors != 1).any():
                factors = (1 / reach.divisors).astype(FLOATS[self._scale_dtype])
                self._made.append(numpy_helper.from_array(factors, f"{base}:factors"))
                even = self._add("Mul", [even, f"{base}:factors"], f"{base}:even")
            codes = self._add("QuantizeLinear", [even, *steps], base)
            self._done[x, reach.key()] = self._add("DequantizeLinear", [codes, *steps], f"{base}:rounded")
        return self._done[x, reach.key()]

    def _cast(self, x: str, output: str, element: int) -> str:
        return self._add("Cast", [x], output, to=element)

    def _add(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self._nodes.append(helper.make_node(operator, inputs, [output], name=f"{output}:{operator}", **attributes))
        return output

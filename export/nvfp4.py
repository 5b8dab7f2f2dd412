"""Weights of 4 bits as NVIDIA's NVFP4 has them, spelled out in plain ONNX of opset 23 for TensorRT.

    block scales, float8 ─► Dequantize (one float32 scale) ─► Dequantize ─► MatMul
    numbers, float4 e2m1 ─────────────────────────────────────┘     blocks of 16 along a row

The largest number of a block becomes 6, float4's largest, by a scale that is itself rounded to float8 e4m3fn; those
reach up to 448 by one scale of the whole tensor. Rounding is done with the very scales that will be multiplied back.

Weights alone are rounded, those of the decoder's layers; activations, norms, the tower, token table and logits stay as
they were. Rows that are no multiple of a block stay floats, too: TensorRT's parser wants whole blocks.

No CPU has DequantizeLinear for float4, so gates run a twin of the graph in which each such weight is what its codes
stand for (`decoded`). Nothing else differs, but that devices may add products up in another order.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from segzero_rt.errors import ExportError

from .lazy_weight import Floats, Weight
from .weight_encoding import (
    FLOAT4,
    FLOAT8,
    FLOATS,
    HIGHEST_FLOAT8,
    Encoding,
    FloatEncoding,
    Stored,
    as_float8,
)
from .weight_store import WeightStore

FLOAT4_BLOCK, HIGHEST_FLOAT4 = 16, 6.0
EMULATED = "4-bit weights decoded to floats beforehand; activations are not rounded"
"""How gates run such a graph, for the manifest."""
_LAYERS = "layers."
"""Beginning of the paths whose weights are rounded."""
_NUMBERS, _BLOCK_SCALES, _SCALE, _STEPS = ":nvfp4", ":block_scales", ":scale", ":steps"


class Float4Encoding(Encoding):
    """Numbers [in, out] as float4 e2m1, two to a byte, float8 scales [in / 16, out], and one float32 scale.

    Args:
        dtype: what the graph gives the weight as, "float32" or "float16": block scales are rounded to it.

    Raises:
        ExportError: rows that are no multiple of a block.
    """

    def __init__(self, path: str, weight: Weight, *, dtype: str = "float32") -> None:
        out, width = weight.shape
        if width % FLOAT4_BLOCK:
            raise ExportError(f"expected rows in multiples of {FLOAT4_BLOCK} for nvfp4, got {width} in {path}")
        tensors = (
            Stored(name=f"{path}{_NUMBERS}", dtype=FLOAT4, shape=(width, out)),
            Stored(name=f"{path}{_BLOCK_SCALES}", dtype=FLOAT8, shape=(width // FLOAT4_BLOCK, out)),
            Stored(name=f"{path}{_SCALE}", dtype=FLOATS["float32"], shape=()),
        )
        super().__init__(path, weight, tensors)
        self._dtype = FLOATS[dtype]

    def pieces(self) -> Iterator[tuple[int, np.ndarray]]:
        self.lossless = False
        magnitudes = (np.abs(self._checked(values)).max(initial=0.0) for values in self.weight.chunks())
        scale = tensor_scale(float(max(magnitudes, default=0.0)))
        numbers = np.empty(self.tensors[0].shape, np.uint8)
        scales = np.empty(self.tensors[1].shape, np.uint8)
        start = 0
        for values in self.weight.chunks():
            rows = slice(start, start := start + len(values))
            codes, blocks = as_float4(values, scale, self._dtype)
            numbers[:, rows] = codes.view(np.uint8).T
            scales[:, rows] = blocks.view(np.uint8).T
        yield 0, packed(numbers)
        yield 1, scales.view(FLOAT8)
        yield 2, scale


def tensor_scale(largest: float) -> np.ndarray:
    """The float32 scale [] of block scales, for a tensor of magnitudes up to `largest`."""
    scale = largest / (HIGHEST_FLOAT4 * HIGHEST_FLOAT8)
    return np.asarray(max(scale, float(np.finfo(np.float32).smallest_normal)), np.float32)


def as_float4(values: Floats, scale: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Rounds float32 [rows, width], width a multiple of a block, to nearest, ties to even.

    Args:
        scale: of block scales, float32 [].
        dtype: that the product of both scales is rounded to before it multiplies.

    Returns:
        numbers, float4 [rows, width], and block scales, float8 [rows, width / 16].
    """
    blocks = values.reshape(len(values), -1, FLOAT4_BLOCK)
    scales = as_float8(np.abs(blocks).max(axis=2) / np.float32(HIGHEST_FLOAT4) / scale)
    steps = _steps(scales, scale, dtype)[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        exact = np.where(steps == 0, np.float32(0), blocks / steps)  # a block of zeros stays one
    held = np.clip(exact, -HIGHEST_FLOAT4, HIGHEST_FLOAT4)
    return held.astype(FLOAT4).reshape(values.shape), scales


def packed(codes: np.ndarray) -> np.ndarray:
    """uint8 codes of 4 bits each, of any shape, two to a byte as ONNX has them: the first in the lower half."""
    flat = np.append(codes.reshape(-1), np.zeros(codes.size % 2, np.uint8))
    return (flat[0::2] & 15) | ((flat[1::2] & 15) << 4)


def _steps(scales: np.ndarray, scale: np.ndarray, dtype: np.dtype) -> Floats:
    steps: Floats = (scales.astype(np.float32) * scale).astype(dtype).astype(np.float32)
    return steps


class Float4Store(WeightStore):
    """Takes weights on their way to another store, and turns those of a decoder's layers into float4.

    Args:
        store: where all weights go.
        kept: paths of products that stay floats.
        dtype: what the graph computes in.
    """

    def __init__(self, store: WeightStore, kept: Collection[str], dtype: str) -> None:
        super().__init__()
        self._store = store
        self._kept = frozenset(kept)
        self._dtype = dtype

    def _add(self, encoding: Encoding) -> list[TensorProto]:
        if isinstance(encoding, FloatEncoding) and self._is_rounded(encoding):
            encoding = Float4Encoding(encoding.path, encoding.weight, dtype=self._dtype)
        tensors = self._store.add(encoding)
        self.lossless = self._store.lossless
        return tensors

    def close(self) -> None:
        self._store.close()

    def _is_rounded(self, encoding: FloatEncoding) -> bool:
        product, is_weight = encoding.path.removesuffix(".weight"), encoding.path.endswith(".weight")
        shape = encoding.weight.shape
        whole = len(shape) == 2 and shape[1] % FLOAT4_BLOCK == 0
        return is_weight and whole and product.startswith(_LAYERS) and product not in self._kept


def dequantize_file(path: Path, computed: str) -> None:
    """Rewrites a graph whose weights came through a `Float4Store`; weights beside it are not read."""
    model = onnx.load(str(path), load_external_data=False)
    coded = _coded(model)
    nodes: list[NodeProto] = []
    widened: set[str] = set()
    for node in model.graph.node:
        if node.op_type == "Cast" and node.output[0] in coded:  # that of the weight which was float
            continue
        for weight in [name for name in node.input if name in coded and name not in widened]:
            nodes += _dequantized(weight, computed)
            widened.add(weight)
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(model.SerializeToString())
    temporary.replace(path)


def _coded(model: onnx.ModelProto) -> set[str]:
    names = (tensor.name for tensor in model.graph.initializer)
    return {name.removesuffix(_NUMBERS) for name in names if name.endswith(_NUMBERS)}


def _dequantized(weight: str, computed: str) -> list[NodeProto]:
    """Just before a weight's first use: a graph may be run layer by layer."""

    def node(operator: str, inputs: list[str], output: str, **attributes: Any) -> NodeProto:
        return helper.make_node(operator, inputs, [output], name=f"{output}:{operator}", **attributes)

    steps = weight + _STEPS
    nodes = [node("DequantizeLinear", [f"{weight}{_BLOCK_SCALES}", f"{weight}{_SCALE}"], steps)]
    if computed != "float32":
        narrow = f"{steps}:{computed}"
        nodes.append(node("Cast", [steps], narrow, to=helper.np_dtype_to_tensor_dtype(FLOATS[computed])))
        steps = narrow
    numbers = [f"{weight}{_NUMBERS}", steps]
    return [*nodes, node("DequantizeLinear", numbers, weight, axis=0, block_size=FLOAT4_BLOCK)]


def decoded(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """The same graph with floats in the place of its float4 weights, for a CPU.

    Args:
        model: its weights inside, or in files of `folder`.
    """
    coded = _coded(model)
    if not coded:
        return model
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    del twin.graph.node[:], twin.graph.initializer[:]
    makes = {weight + suffix for weight in coded for suffix in ("", _STEPS, *(f"{_STEPS}:{dtype}" for dtype in FLOATS))}
    twin.graph.node.extend(node for node in model.graph.node if node.output[0] not in makes)
    parts = {weight + suffix for weight in coded for suffix in (_NUMBERS, _BLOCK_SCALES, _SCALE)}
    twin.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name not in parts)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    read_by = {node.output[0]: node.input[1] for node in model.graph.node if node.output[0] in coded}
    for weight, steps in read_by.items():
        numbers, scales, scale = (_array(tensors[weight + part], folder) for part in (_NUMBERS, _BLOCK_SCALES, _SCALE))
        dtype = FLOATS[steps.rpartition(":")[2] if steps != weight + _STEPS else "float32"]
        by_row = np.repeat(_steps(scales, scale, dtype), FLOAT4_BLOCK, axis=0)
        twin.graph.initializer.append(
            numpy_helper.from_array((numbers.astype(np.float32) * by_row).astype(dtype), weight)
        )
    return twin


def _array(tensor: TensorProto, folder: Path) -> np.ndarray:
    held = TensorProto()
    held.CopyFrom(tensor)
    if uses_external_data(held):
        load_external_data_for_tensor(held, str(folder))
    values: np.ndarray = numpy_helper.to_array(held)
    return values

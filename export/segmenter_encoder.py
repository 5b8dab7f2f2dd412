"""SAM 2's image encoder (Hiera and its pyramid) as a graph, node by node (see `image_encoder_spec`).

    pixels ─► convolution + positions ─► blocks × [ norm ─► q, k, v ─► attention in windows or over all ─► + ─► MLP ]
           ─► stage ends ─► pyramid ─► image_embeddings, high_res_features_1, high_res_features_0

Where this departs from transformers' `Sam2VisionModel` (same numbers, other arithmetic order):
1. tokens stand window by window, and inside a window so that those that are pooled together stand on one axis:
   attention does not mind their order, so that windows are cut once per stage and not twice per block, and pooling is
   a maximum over an axis. Windows that reach beyond the picture are the exception: they are filled with zeros anew;
2. a bias of the keys shifts all scores of a query alike, which softmax does not see: it is left out. A bias of the
   values is added to every token alike: it is added behind the projection;
3. 1 x 1 convolutions are products; two in a row (pyramid, then the mask decoder's own) are one;
4. positions depend on the input's size alone, which is fixed in the graph: they are worked out at export;
5. in small windows, flavour "ort" attends head by head, each from projections of its own (see `SMALL_WINDOW`), or
   from none, where a product nearby takes its weight in (see `Folds`);
6. flavour "ort" goes through the first blocks in parts that fit into a cache (see `PIECE_BYTES`);
7. flavour "ort" has operators of `operators.py`, which mean the same: attention and hidden layers where it is stored in
   int8, products and hidden layers where in floats;
8. pyramid levels that no output reads, and a product of queries and keys that transformers drops, are not computed.

Stored in int8, the pyramid and the narrow first blocks' way back from their hidden layer stay in floats: masks follow
them most (of the gate's masks the worst kept 0.92 of its IoU instead of 0.83), and they take no longer so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import Sam2Model
from transformers.models.sam2.modeling_sam2 import Sam2MultiScaleBlock

from segzero_rt.graph_spec import GraphSpec

from .edgetam import RepVit
from .edgetam_graph import add_repvit
from .graph_builder import INT8_FROM_WIDTH, GraphBuilder
from .lazy_weight import Weight
from .operators import Layer, mlp
from .segmenter_windows import (
    Indices,
    Tokens,
    empty_windows,
    fill_windows,
    gather_rows,
    inverse,
    join,
    reordered,
    window_slots,
)

PIECE_BYTES, MOST_PIECES = 2 << 20, 16
"""The first blocks work window by window. While their hidden layers take more bytes than that, they are gone through
part by part, so that what a node writes is in the cache still when the next one reads it. Each part has nodes of its
own, which take time to load: a map that would be more parts than that is taken as a whole."""

SMALL_WINDOW, FEW_HEADS = 64, 4
"""Windows of up to so many tokens, and so many heads, are attended head by head: ONNX Runtime's fused attention moves
all numbers to other places first, which takes it longer there than the products do."""


def build_image_encoder(model: Sam2Model, spec: GraphSpec, *, flavour: str, storage: str) -> GraphBuilder:
    """The encoder's graph, for any number of pictures of the size in `spec`.

    Args:
        flavour: "ort" uses ONNX Runtime's own operators, "portable" only those of opset 17.
        storage: precision of the weights in the file, "float16", "float32" or "int8".

    Raises:
        ExportError: a stage's size cannot be pooled evenly.
    """
    builder = GraphBuilder(spec, storage=storage, fused=flavour == "ort", split_products=True)
    backbone = model.vision_encoder.backbone
    stages = _repvit(builder, backbone) if isinstance(backbone, RepVit) else _hiera(builder, model)
    with builder.scope("pyramid"):
        _Pyramid(builder, model, stages).add()
    return builder


def _hiera(builder: GraphBuilder, model: Sam2Model) -> list[_Stage]:
    """The ends of Hiera's stages."""
    backbone = model.vision_encoder.backbone
    parts = _embed(builder, model)
    stages: list[_Stage] = []
    for index, block in enumerate(backbone.blocks):
        if not _fits_parts(block, parts):
            parts = [join(builder, parts)]
        for place, tokens in enumerate(parts):
            with builder.scope(f"blocks.{index}"), builder.same_weights(place > 0):
                parts[place] = _Block(builder, block).add(tokens)
        if index in backbone.stage_ends:
            stages.append(tuple(parts))
    return stages


def _fits_parts(block: Sam2MultiScaleBlock, parts: Sequence[Tokens]) -> bool:
    """Whether a block is large enough for parts, and each holds whole windows of it, in the order that it wants."""
    size_hw = parts[0].size_hw
    windows = window_slots(size_hw, _window_hw(block, size_hw), _stride(block))
    if _hidden_bytes(block, windows.size // _stride(block) ** 2) <= PIECE_BYTES:
        return False
    whole = all(tokens.count % windows.shape[1] == 0 for tokens in parts)
    return whole and np.array_equal(windows.reshape(-1), np.concatenate([tokens.order for tokens in parts]))


def _hidden_bytes(block: Sam2MultiScaleBlock, rows: int) -> int:
    return 4 * rows * int(block.mlp.proj_in.out_features)


def _piece_count(windows: int, hidden_bytes: int) -> int:
    """In how many equal parts of whole windows to go through the first blocks, see `PIECE_BYTES`; 1 where many."""
    fits = (count for count in range(1, windows + 1) if windows % count == 0 and hidden_bytes <= count * PIECE_BYTES)
    count = next(fits, 1)
    return count if count <= MOST_PIECES else 1


def _repvit(builder: GraphBuilder, backbone: RepVit) -> list[_Stage]:
    """The ends of RepViT's stages, whose maps stand row by row."""
    _, _, height, width = builder.spec.inputs[0].shape
    assert isinstance(height, int) and isinstance(width, int), "the exporter knows every size"
    stages: list[_Stage] = []
    for level, (planes, channels) in enumerate(zip(add_repvit(builder, backbone), backbone.widths, strict=True)):
        size_hw = (height // (4 << level), width // (4 << level))
        rows = builder.node("Transpose", [builder.reshape(planes, [0, channels, -1])], perm=[0, 2, 1])
        name = builder.reshape(rows, [-1, channels])
        order = np.arange(size_hw[0] * size_hw[1])
        stages.append((Tokens(name=name, order=order, size_hw=size_hw, width=channels),))
    return stages


_Stage = tuple[Tokens, ...]
"""A whole map, in parts."""


def _embed(builder: GraphBuilder, model: Sam2Model) -> list[Tokens]:
    """Patches by convolution, and positions; tokens already in the order that the first block wants."""
    backbone = model.vision_encoder.backbone
    convolution = backbone.patch_embed.projection
    with torch.no_grad():
        height, width = convolution(torch.zeros(1, *map(int, builder.spec.inputs[0].shape[1:]))).shape[-2:]
        size_hw = (int(height), int(width))
        positions = backbone._get_pos_embed(size_hw)[0].numpy()
    channels = positions.shape[-1]
    inputs = ["pixel_values", builder.weight("patch_embed", _array(convolution.weight))]
    pads = [*convolution.padding, *convolution.padding]
    planes = builder.node("Conv", inputs, strides=[*convolution.stride], pads=pads)
    rows = builder.node("Transpose", [builder.reshape(planes, [0, channels, -1])], perm=[0, 2, 1])
    first = backbone.blocks[0]
    windows = window_slots(size_hw, _window_hw(first, size_hw), _stride(first))
    hidden_bytes = _hidden_bytes(first, windows.size // _stride(first) ** 2)
    count = _piece_count(len(windows), hidden_bytes) if builder.fused else 1
    order = windows.reshape(-1)
    order = order if (order >= 0).all() else np.arange(size_hw[0] * size_hw[1])
    added = positions.reshape(-1, channels)[order] + _array(convolution.bias)
    parts = []
    for part, (places, shifts) in enumerate(zip(np.split(order, count), np.split(added, count), strict=True)):
        shift = builder.weight("positions" if count == 1 else f"positions.{part}", shifts)
        placed = builder.node("Add", [gather_rows(builder, rows, places), shift])
        name = builder.reshape(placed, [-1, channels])
        parts.append(Tokens(name=name, order=places, size_hw=size_hw, width=channels))
    return parts


@dataclass(frozen=True, kw_only=True, slots=True)
class Folds:
    """Which products of attention's input are not made, since a product nearby can take their weight in.

    Scores are `query (Wk y)`, which is `(Wk' query) y`; what is mixed is `shares (y Wv')`, which is `(shares y) Wv'`.
    That pays where there are fewer queries than keys, and where a head is as wide as the input.
    """

    keys: bool = False
    values: bool = False

    @classmethod
    def of_fewest_products(cls, *, width: int, head_dim: int, out_width: int, slots: int, queries: int) -> Folds:
        """By the multiplications of one head in one window.

        Args:
            width: of the input; `out_width`: of the projection behind attention.
            slots: rows of a window; `queries`: those left after pooling.
        """
        keys = slots * width * head_dim + queries * slots * head_dim
        folded_keys = queries * slots * width
        if queries == slots:  # the two weights before a query become one
            keys, folded_keys = keys + slots * width * head_dim, folded_keys + slots * width * width
        else:
            folded_keys += queries * head_dim * width
        values = slots * width * head_dim + queries * slots * head_dim + queries * head_dim * out_width
        folded_values = queries * slots * width + queries * width * out_width
        return cls(keys=folded_keys < keys, values=folded_values < values)


NO_FOLDS = Folds()


class _Block:
    """One Hiera block."""

    def __init__(self, builder: GraphBuilder, block: Sam2MultiScaleBlock) -> None:
        self._builder = builder
        self._block = block
        self._heads = int(block.attn.num_attention_heads)
        self._head_dim = int(block.dim_out) // self._heads
        self._stride = _stride(block)

    def add(self, tokens: Tokens) -> Tokens:
        """Adds the block's nodes. Its output stands window by window where windows fit into the map."""
        builder, block = self._builder, self._block
        windows = window_slots(tokens.size_hw, _window_hw(block, tokens.size_hw), self._stride)
        windows = windows[np.isin(windows[:, 0], tokens.order)]
        padded = bool((windows < 0).any())
        # What is pooled together must stand together: in each window, or in the map as a whole.
        groups = window_slots(tokens.size_hw, tokens.size_hw, self._stride) if padded else windows
        if self._stride > 1 or (not padded and len(windows) > 1):
            tokens = reordered(builder, tokens, groups.reshape(-1))
        normed = _norm(builder, tokens.name, "norm1", block.layer_norm1)
        slots = windows.shape[1]
        if padded:
            filled = fill_windows(builder, replace(tokens, name=normed), windows)
            mixed, width = self._attend(filled, slots)
            after = replace(self._after(tokens, groups), name=mixed, width=width)
            mixed = empty_windows(builder, after, self._pool_places(windows, tokens))
        else:
            mixed, _ = self._attend(normed, slots)
        residual, widened_bias = tokens.name, 0.0
        if block.dim != block.dim_out:
            weight, widened_bias = _linear(block.proj)  # a maximum does not mind when the bias is added
            residual = self._pool(builder.linear(normed, "widen", weight, flat=True), groups.shape[1], block.dim_out)
        weight, bias = self._projection(slots)
        mixed = builder.linear(mixed, "proj", weight, bias + widened_bias, flat=True)
        residual = builder.node("Add", [residual, mixed])
        after = self._after(tokens, groups)
        if operator := self._mlp_operator():
            return replace(after, name=self._mlp(residual, operator), width=block.dim_out)
        hidden = _norm(builder, residual, "norm2", block.layer_norm2)
        hidden = builder.gelu(builder.linear(hidden, "fc1", *_linear(block.mlp.proj_in), flat=True))
        narrow = int(block.dim_out) < INT8_FROM_WIDTH
        hidden = builder.linear(hidden, "fc2", *_linear(block.mlp.proj_out), flat=True, in_floats=narrow)
        return replace(after, name=builder.node("Add", [residual, hidden]), width=block.dim_out)

    def _mlp_operator(self) -> str:
        """That norm, hidden layer and sum are together; "" where they are not."""
        sides = (int(self._block.dim_out), int(self._block.mlp.proj_in.out_features))
        if self._builder.by_split_products(*sides):
            return "SplitMlp"
        if not self._builder.by_operators(*sides):
            return ""
        return "Mlp" if sides[0] < INT8_FROM_WIDTH else "Int8Mlp"

    def _mlp(self, residual: str, operator: str) -> str:
        norm, layers = self._block.layer_norm2, self._block.mlp
        parts: list[Layer] = [
            (name, Weight.of(weight), Weight.of(bias))
            for name, weight, bias in (
                ("norm2", _array(norm.weight), _array(norm.bias)),
                ("fc1", *_linear(layers.proj_in)),
                ("fc2", *_linear(layers.proj_out)),
            )
        ]
        return mlp(self._builder, residual, parts[0], parts[1:], norm.eps, operator)

    def _attend(self, normed: str, slots: int) -> tuple[str, int]:
        """Rows in windows of `slots`, [batch * windows * slots, C], to mixed rows, pooled, before the projection.

        Returns:
            them, and how wide they are.
        """
        builder = self._builder
        if not self._head_by_head(slots):
            width = int(self._block.dim_out)
            parts = (self._queries(normed, slots, slice(0, width)), *self._keys_values(normed, slots, slice(0, width)))
            mixed = builder.attention(*parts, num_heads=self._heads, head_dim=self._head_dim)
            return builder.reshape(mixed, [-1, width]), width
        folds, heads = self._folds(slots), []
        width = int(self._block.dim) if folds.values else self._head_dim
        for head in range(self._heads):
            with builder.scope(f"head.{head}"):
                columns = slice(head * self._head_dim, (head + 1) * self._head_dim)
                query = (
                    self._folded_queries(normed, slots, columns)
                    if folds.keys
                    else self._queries(normed, slots, columns)
                )
                key, value = self._keys_values(normed, slots, columns, folds)
                if builder.by_operators(self._head_dim, int(self._block.dim)):
                    parts, scale = (query, key, value), self._head_dim**-0.5
                    mixed = builder.operator("HeadAttention", parts, num_heads=1, scale=scale)
                else:
                    mixed = _attend_one_head(builder, query, key, value, self._head_dim)
                heads.append(builder.reshape(mixed, [-1, width]))
        mixed = heads[0] if len(heads) == 1 else builder.node("Concat", heads, axis=-1)
        return mixed, self._heads * width

    def _head_by_head(self, slots: int) -> bool:
        return self._builder.fused and slots <= SMALL_WINDOW and self._heads <= FEW_HEADS

    def _folds(self, slots: int) -> Folds:
        return Folds.of_fewest_products(
            width=int(self._block.dim),
            head_dim=self._head_dim,
            out_width=int(self._block.dim_out),
            slots=slots,
            queries=slots // self._stride**2,
        )

    def _projection(self, slots: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Weight and bias of the product behind attention, with the values' bias, and their weight where folded."""
        weight, bias = _linear(self._block.attn.proj)
        out = int(self._block.dim_out)
        weights, biases = _linear(self._block.attn.qkv)
        bias = bias + weight @ biases[2 * out :]
        if not self._head_by_head(slots) or not self._folds(slots).values:
            return weight, bias
        per_head = zip(np.split(weight, self._heads, axis=1), np.split(weights[2 * out :], self._heads), strict=True)
        return np.concatenate([_product(one, values) for one, values in per_head], axis=1), bias

    def _queries(self, normed: str, slots: int, columns: slice) -> str:
        """Some columns of the queries, [batch * windows, slots, columns]; fewer slots where they are pooled."""
        builder = self._builder
        weights, biases = _linear(self._block.attn.qkv)
        weight, bias = weights[columns], biases[columns]
        query = builder.linear(normed, "query", weight, None if self._stride > 1 else bias, flat=True)
        if self._stride > 1:  # a maximum does not mind when the bias is added, and there are fewer to add it to
            query = builder.node("Add", [self._pool(query, slots, len(bias)), builder.weight("query.bias", bias)])
        return builder.reshape(query, [-1, slots // self._stride**2, len(bias)])

    def _folded_queries(self, normed: str, slots: int, columns: slice) -> str:
        """Queries of one head that are compared with `normed` itself: `(Wq x + b) Wk y = (Wk' Wq x + Wk' b) y`."""
        builder = self._builder
        weights, biases = _linear(self._block.attn.qkv)
        weight, bias = weights[columns], biases[columns]
        keys = weights[int(self._block.dim_out) :][columns].T  # [in, head_dim]
        rows = normed
        if self._stride > 1:
            rows = self._pool(builder.linear(normed, "query", weight, flat=True), slots, len(bias))
        weight = keys if self._stride > 1 else _product(keys, weight)
        query = builder.linear(rows, "query.key", weight, keys @ bias, flat=True)
        return builder.reshape(query, [-1, slots // self._stride**2, len(keys)])

    def _keys_values(self, normed: str, slots: int, columns: slice, folds: Folds = NO_FOLDS) -> tuple[str, str]:
        """Some columns of keys and values, [batch * windows, slots, columns]; what is folded is `normed` itself."""
        builder, width = self._builder, int(self._block.dim_out)
        weights = _linear(self._block.attn.qkv)[0].reshape(3, width, -1)[:, columns]
        plain = builder.reshape(normed, [-1, slots, int(self._block.dim)]) if folds.keys or folds.values else ""
        key, value = (
            plain
            if folded
            else builder.reshape(builder.linear(normed, part, weights[i], flat=True), [-1, slots, weights.shape[1]])
            for i, part, folded in ((1, "key", folds.keys), (2, "value", folds.values))
        )
        return key, value

    def _pool(self, rows: str, slots: int, width: int) -> str:
        """The largest of each neighbourhood: [groups * slots, width] to [groups * slots / stride^2, width]."""
        if self._stride == 1:
            return rows
        builder, members = self._builder, self._stride**2
        windows = builder.reshape(rows, [-1, members, slots // members, width])
        pooled = builder.reduce("ReduceMax", windows, 1, keepdims=0)
        return builder.reshape(pooled, [-1, width])

    def _after(self, tokens: Tokens, groups: Indices) -> Tokens:
        """Size and order of the block's output; the name is the input's still."""
        if self._stride == 1:
            return tokens
        size_hw = (tokens.size_hw[0] // self._stride, tokens.size_hw[1] // self._stride)
        return replace(tokens, order=self._pool_places(groups, tokens).reshape(-1), size_hw=size_hw)

    def _pool_places(self, slots: Indices, tokens: Tokens) -> Indices:
        """[groups, slots] of places to [groups, slots / stride^2] of places in the pooled map; -1 stays."""
        first = slots.reshape(len(slots), self._stride**2, -1)[:, 0]
        rows, columns = np.divmod(first, tokens.size_hw[1])
        pooled = rows // self._stride * (tokens.size_hw[1] // self._stride) + columns // self._stride
        return np.where(first < 0, -1, pooled)


def _attend_one_head(builder: GraphBuilder, query: str, key: str, value: str, head_dim: int) -> str:
    """Softmax attention with one head, [batch, rows, head_dim] each, in operators that take it as it lies."""
    scaled = builder.node("Mul", [query, builder.constant(head_dim**-0.5, "float32")])
    scores = builder.node("MatMul", [scaled, builder.node("Transpose", [key], perm=[0, 2, 1])])
    return builder.node("MatMul", [builder.node("Softmax", [scores], axis=-1), value])


class _Pyramid:
    """The neck and the mask decoder's own convolutions: stage ends to maps, coarsest first."""

    def __init__(self, builder: GraphBuilder, model: Sam2Model, stages: list[_Stage]) -> None:
        self._builder = builder
        self._parts = stages
        self._stages = [replace(parts[0], order=np.concatenate([part.order for part in parts])) for parts in stages]
        neck = model.vision_encoder.neck
        self._laterals = [_linear(convolution) for convolution in reversed(neck.convs)]
        self._top_down = set(neck.fpn_top_down_levels) - {len(stages) - 1}
        decoder = model.mask_decoder
        self._readers = {0: _linear(decoder.conv_s0), 1: _linear(decoder.conv_s1)}
        self._no_memory = model.no_memory_embedding.detach().reshape(-1).numpy()

    def add(self) -> None:
        """Adds the three outputs."""
        self._output(self._level(2, self._no_memory), 2, "image_embeddings")
        for index, name in ((0, "high_res_features_0"), (1, "high_res_features_1")):
            weight, bias = self._readers[index]
            if index in self._top_down:
                level = self._builder.linear(
                    self._level(index, 0.0), f"reader.{index}", weight, bias, flat=True, in_floats=True
                )
            else:
                lateral, lateral_bias = self._laterals[index]
                merged = (weight @ lateral, bias + weight @ lateral_bias)
                level = self._linear(index, f"level.{index}", *merged)
            self._output(level, index, name)

    def _level(self, index: int, added: NDArray[np.float32] | float) -> str:
        """[batch * places, width] in the stage's order, with everything that comes down from coarser levels."""
        builder, stage = self._builder, self._stages[index]
        weight, bias = self._laterals[index]
        with builder.scope(f"level.{index}"):
            level = self._linear(index, "lateral", weight, bias + added)
            if index not in self._top_down:
                return level
            coarse = self._stages[index + 1]
            rows, columns = np.divmod(stage.order, stage.size_hw[1])
            parents = inverse(coarse.order)[rows // 2 * coarse.size_hw[1] + columns // 2]
            above = builder.reshape(self._level(index + 1, 0.0), [-1, coarse.count, len(bias)])
            above = gather_rows(builder, above, parents)
            return builder.node("Add", [level, builder.reshape(above, [-1, len(bias)])])

    def _linear(self, index: int, name: str, weight: NDArray[np.float32], bias: NDArray[np.float32]) -> str:
        """Of a stage, part by part, since its rows are wider than what comes out."""
        parts = []
        for place, tokens in enumerate(self._parts[index]):
            with self._builder.same_weights(place > 0):
                rows = self._builder.linear(tokens.name, name, weight, bias, flat=True, in_floats=True)
            parts.append(replace(tokens, name=rows, width=len(bias)))
        return join(self._builder, parts).name

    def _output(self, level: str, index: int, name: str) -> None:
        """Rows to planes, [batch, channels, height, width]."""
        builder, stage = self._builder, self._stages[index]
        width = builder.spec.tensor(name).shape[1]
        assert isinstance(width, int), "the exporter knows every width"
        rows = builder.reshape(level, [-1, stage.count, width])
        rows = gather_rows(builder, rows, inverse(stage.order))
        planes = builder.node("Transpose", [rows], perm=[0, 2, 1])
        builder.node("Reshape", [planes, builder.constant([-1, width, *stage.size_hw])], output=name)


def _norm(builder: GraphBuilder, x: str, name: str, norm: nn.LayerNorm) -> str:
    scale, bias = (builder.weight(f"{name}.{part}", _array(getattr(norm, part))) for part in ("weight", "bias"))
    return builder.node("LayerNormalization", [x, scale, bias], axis=-1, epsilon=norm.eps)


def _stride(block: Any) -> int:
    return int(block.query_stride[0]) if block.query_stride else 1


def _window_hw(block: Sam2MultiScaleBlock, size_hw: tuple[int, int]) -> tuple[int, int]:
    """Without windows, the whole map is one."""
    return (block.window_size, block.window_size) if block.window_size else size_hw


def _linear(module: Any) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weight [out, in] and bias of an `nn.Linear`, or of an `nn.Conv2d` of 1 x 1."""
    weight = _array(module.weight)
    return weight.reshape(weight.shape[:2]) if weight.ndim == 4 else weight, _array(module.bias)


def _product(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of two weights, summed in float64: rounded once."""
    product: NDArray[np.float32] = (left.astype(np.float64) @ right.astype(np.float64)).astype(np.float32)
    return product


def _array(parameter: Any) -> NDArray[np.float32]:
    values: NDArray[np.float32] = parameter.detach().float().numpy()
    return values

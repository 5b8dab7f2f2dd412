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
5. in small windows, flavour "ort" attends head by head, each from projections of its own (see `SMALL_WINDOW`);
6. pyramid levels that no output reads, and a product of queries and keys that transformers drops, are not computed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import Sam2Model
from transformers.models.sam2.modeling_sam2 import Sam2MultiScaleBlock

from segzero_rt.errors import ExportError
from segzero_rt.graph_spec import GraphSpec

from .edgetam import RepVit
from .edgetam_graph import add_repvit
from .graph_builder import GraphBuilder

Indices = NDArray[np.int64]

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
    builder = GraphBuilder(spec, storage=storage, fused=flavour == "ort")
    backbone = model.vision_encoder.backbone
    stages = _repvit(builder, backbone) if isinstance(backbone, RepVit) else _hiera(builder, model)
    with builder.scope("pyramid"):
        _Pyramid(builder, model, stages).add()
    return builder


def _hiera(builder: GraphBuilder, model: Sam2Model) -> list[_Tokens]:
    """The ends of Hiera's stages."""
    backbone = model.vision_encoder.backbone
    tokens = _embed(builder, model)
    stages: list[_Tokens] = []
    for index, block in enumerate(backbone.blocks):
        with builder.scope(f"blocks.{index}"):
            tokens = _Block(builder, block).add(tokens)
        if index in backbone.stage_ends:
            stages.append(tokens)
    return stages


def _repvit(builder: GraphBuilder, backbone: RepVit) -> list[_Tokens]:
    """The ends of RepViT's stages, whose maps stand row by row."""
    _, _, height, width = builder.spec.inputs[0].shape
    assert isinstance(height, int) and isinstance(width, int), "the exporter knows every size"
    stages: list[_Tokens] = []
    for level, (planes, channels) in enumerate(zip(add_repvit(builder, backbone), backbone.widths, strict=True)):
        size_hw = (height // (4 << level), width // (4 << level))
        rows = builder.node("Transpose", [builder.reshape(planes, [0, channels, -1])], perm=[0, 2, 1])
        name = builder.reshape(rows, [-1, channels])
        stages.append(_Tokens(name=name, order=np.arange(size_hw[0] * size_hw[1]), size_hw=size_hw, width=channels))
    return stages


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tokens:
    """A map of features as rows of a matrix, [batch * height * width, channels]."""

    name: str
    order: Indices
    """Row i of a picture is this place of its map, counted row by row."""
    size_hw: tuple[int, int]
    width: int
    """Channels."""

    @property
    def count(self) -> int:
        return self.size_hw[0] * self.size_hw[1]


def _embed(builder: GraphBuilder, model: Sam2Model) -> _Tokens:
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
    order = window_slots(size_hw, _window_hw(first, size_hw), _stride(first)).reshape(-1)
    order = order if (order >= 0).all() else np.arange(size_hw[0] * size_hw[1])
    rows = _gather(builder, rows, order)
    added = positions.reshape(-1, channels)[order] + _array(convolution.bias)
    rows = builder.reshape(builder.node("Add", [rows, builder.weight("positions", added)]), [-1, channels])
    return _Tokens(name=rows, order=order, size_hw=size_hw, width=channels)


class _Block:
    """One Hiera block."""

    def __init__(self, builder: GraphBuilder, block: Sam2MultiScaleBlock) -> None:
        self._builder = builder
        self._block = block
        self._heads = int(block.attn.num_attention_heads)
        self._stride = _stride(block)

    def add(self, tokens: _Tokens) -> _Tokens:
        """Adds the block's nodes. Its output stands window by window where windows fit into the map."""
        builder, block = self._builder, self._block
        windows = window_slots(tokens.size_hw, _window_hw(block, tokens.size_hw), self._stride)
        padded = bool((windows < 0).any())
        # What is pooled together must stand together: in each window, or in the map as a whole.
        groups = window_slots(tokens.size_hw, tokens.size_hw, self._stride) if padded else windows
        if self._stride > 1 or (not padded and len(windows) > 1):
            tokens = _reordered(builder, tokens, groups.reshape(-1))
        normed = _norm(builder, tokens.name, "norm1", block.layer_norm1)
        if padded:
            filled = _fill_windows(builder, replace(tokens, name=normed), windows)
            mixed = self._attend(filled, windows.shape[1])
            after = replace(self._after(tokens, groups), name=mixed, width=block.dim_out)
            mixed = _empty_windows(builder, after, self._pool_places(windows, tokens))
        else:
            mixed = self._attend(normed, windows.shape[1])
        weight, bias = _linear(block.attn.proj)
        values_bias = _linear(block.attn.qkv)[1][2 * block.dim_out :]
        mixed = builder.linear(mixed, "proj", weight, bias + weight @ values_bias, flat=True)
        residual = tokens.name
        if block.dim != block.dim_out:
            residual = self._pool(
                builder.linear(normed, "widen", *_linear(block.proj), flat=True), groups.shape[1], block.dim_out
            )
        residual = builder.node("Add", [residual, mixed])
        hidden = _norm(builder, residual, "norm2", block.layer_norm2)
        hidden = builder.gelu(builder.linear(hidden, "fc1", *_linear(block.mlp.proj_in), flat=True))
        hidden = builder.linear(hidden, "fc2", *_linear(block.mlp.proj_out), flat=True)
        return replace(self._after(tokens, groups), name=builder.node("Add", [residual, hidden]), width=block.dim_out)

    def _attend(self, normed: str, slots: int) -> str:
        """Rows in windows of `slots`, [batch * windows * slots, C], to mixed rows, pooled, before the projection."""
        builder, width = self._builder, self._block.dim_out
        head_dim = width // self._heads
        if not builder.fused or slots > SMALL_WINDOW or self._heads > FEW_HEADS:
            parts = self._query_key_value(normed, slots, slice(0, width))
            mixed = builder.attention(*parts, num_heads=self._heads, head_dim=head_dim)
            return builder.reshape(mixed, [-1, width])
        heads = []
        for head in range(self._heads):
            with builder.scope(f"head.{head}"):
                columns = slice(head * head_dim, (head + 1) * head_dim)
                mixed = _attend_one_head(builder, *self._query_key_value(normed, slots, columns), head_dim)
                heads.append(builder.reshape(mixed, [-1, head_dim]))
        return heads[0] if len(heads) == 1 else builder.node("Concat", heads, axis=-1)

    def _query_key_value(self, normed: str, slots: int, columns: slice) -> tuple[str, str, str]:
        """Some columns of each, [batch * windows, slots, columns]; fewer slots for queries where they are pooled."""
        builder, width = self._builder, self._block.dim_out
        weights, bias = _linear(self._block.attn.qkv)
        weight = weights.reshape(3, width, -1)[:, columns]
        query_bias = bias[columns]
        pools, out = self._stride > 1, len(query_bias)
        query = builder.linear(normed, "query", weight[0], None if pools else query_bias, flat=True)
        key, value = (
            builder.reshape(builder.linear(normed, part, weight[i]), [-1, slots, out])
            for i, part in ((1, "key"), (2, "value"))
        )
        if pools:  # a maximum does not mind when the bias is added, and there are fewer to add it to
            query = builder.node("Add", [self._pool(query, slots, out), builder.weight("query.bias", query_bias)])
        return builder.reshape(query, [-1, slots // self._stride**2, out]), key, value

    def _pool(self, rows: str, slots: int, width: int) -> str:
        """The largest of each neighbourhood: [groups * slots, width] to [groups * slots / stride^2, width]."""
        if self._stride == 1:
            return rows
        builder, members = self._builder, self._stride**2
        windows = builder.reshape(rows, [-1, members, slots // members, width])
        pooled = builder.node("ReduceMax", [windows], axes=[1], keepdims=0)
        return builder.reshape(pooled, [-1, width])

    def _after(self, tokens: _Tokens, groups: Indices) -> _Tokens:
        """Size and order of the block's output; the name is the input's still."""
        if self._stride == 1:
            return tokens
        size_hw = (tokens.size_hw[0] // self._stride, tokens.size_hw[1] // self._stride)
        return replace(tokens, order=self._pool_places(groups, tokens).reshape(-1), size_hw=size_hw)

    def _pool_places(self, slots: Indices, tokens: _Tokens) -> Indices:
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

    def __init__(self, builder: GraphBuilder, model: Sam2Model, stages: list[_Tokens]) -> None:
        self._builder = builder
        self._stages = stages
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
                level = self._builder.linear(self._level(index, 0.0), f"reader.{index}", weight, bias, flat=True)
            else:
                lateral, lateral_bias = self._laterals[index]
                merged = (weight @ lateral, bias + weight @ lateral_bias)
                level = self._builder.linear(self._stages[index].name, f"level.{index}", *merged, flat=True)
            self._output(level, index, name)

    def _level(self, index: int, added: NDArray[np.float32] | float) -> str:
        """[batch * places, width] in the stage's order, with everything that comes down from coarser levels."""
        builder, stage = self._builder, self._stages[index]
        weight, bias = self._laterals[index]
        with builder.scope(f"level.{index}"):
            level = builder.linear(stage.name, "lateral", weight, bias + added, flat=True)
            if index not in self._top_down:
                return level
            coarse = self._stages[index + 1]
            rows, columns = np.divmod(stage.order, stage.size_hw[1])
            parents = _inverse(coarse.order)[rows // 2 * coarse.size_hw[1] + columns // 2]
            above = builder.reshape(self._level(index + 1, 0.0), [-1, coarse.count, len(bias)])
            above = _gather(builder, above, parents)
            return builder.node("Add", [level, builder.reshape(above, [-1, len(bias)])])

    def _output(self, level: str, index: int, name: str) -> None:
        """Rows to planes, [batch, channels, height, width]."""
        builder, stage = self._builder, self._stages[index]
        width = builder.spec.tensor(name).shape[1]
        assert isinstance(width, int), "the exporter knows every width"
        rows = builder.reshape(level, [-1, stage.count, width])
        rows = _gather(builder, rows, _inverse(stage.order))
        planes = builder.node("Transpose", [rows], perm=[0, 2, 1])
        builder.node("Reshape", [planes, builder.constant([-1, width, *stage.size_hw])], output=name)


def window_slots(size_hw: tuple[int, int], window_hw: tuple[int, int], stride: int) -> Indices:
    """Which place of a map, counted row by row, stands in each slot of each window.

    Args:
        size_hw: of the map.
        window_hw: of a window; those at the right and at the bottom may reach beyond the map.
        stride: side of the neighbourhoods that are pooled. Slots are `[stride^2, slots / stride^2]`: the members of a
            neighbourhood stand on the first axis; and so on inside, as far as halves go, for poolings to come.

    Returns:
        int64 [windows, slots]; -1 beyond the map.
    """
    inside = _pooling_order(window_hw, stride)  # [slots, 2]
    rows, columns = (-(-length // side) for length, side in zip(size_hw, window_hw, strict=True))
    corners = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1).reshape(-1, 1, 2)
    places = corners * np.array(window_hw) + inside  # [windows, slots, 2]
    flat: Indices = places[..., 0] * size_hw[1] + places[..., 1]
    return np.where((places < np.array(size_hw)).all(axis=-1), flat, -1)


def _pooling_order(window_hw: tuple[int, int], stride: int) -> Indices:
    """Rows and columns of a window's slots, [slots, 2]."""
    step = stride if stride > 1 else 2
    if any(length % step for length in window_hw):
        if stride > 1:
            raise ExportError(f"expected windows that {stride} x {stride} pooling divides, got {window_hw}")
        return np.argwhere(np.ones(window_hw, np.bool_)).astype(np.int64)
    members = np.argwhere(np.ones((step, step), np.bool_)).astype(np.int64)
    inner = _pooling_order((window_hw[0] // step, window_hw[1] // step), 1)
    return (inner[None] * step + members[:, None]).reshape(-1, 2)


def _fill_windows(builder: GraphBuilder, tokens: _Tokens, windows: Indices) -> str:
    """Rows to rows of padded windows; what lies beyond the map is zero."""
    by_picture = builder.reshape(tokens.name, [-1, tokens.count, tokens.width])
    by_picture = builder.node("Pad", [by_picture, builder.constant([0, 0, 0, 0, 1, 0])])  # one row of zeros behind
    slots = np.where(windows < 0, tokens.count, _inverse(tokens.order)[windows]).reshape(-1)
    return builder.reshape(_gather(builder, by_picture, slots), [-1, tokens.width])


def _empty_windows(builder: GraphBuilder, tokens: _Tokens, windows: Indices) -> str:
    """Undoes `_fill_windows`: from the rows of padded windows, named by `tokens`, to its order."""
    inside = np.flatnonzero(windows.reshape(-1) >= 0)
    place_to_slot = np.zeros(tokens.count, np.int64)
    place_to_slot[windows.reshape(-1)[inside]] = inside
    by_picture = builder.reshape(tokens.name, [-1, windows.size, tokens.width])
    return builder.reshape(_gather(builder, by_picture, place_to_slot[tokens.order]), [-1, tokens.width])


def _reordered(builder: GraphBuilder, tokens: _Tokens, order: Indices) -> _Tokens:
    """The same rows in another order; nothing where they stand so already."""
    if np.array_equal(tokens.order, order):
        return tokens
    by_picture = builder.reshape(tokens.name, [-1, tokens.count, tokens.width])
    moved = _gather(builder, by_picture, _inverse(tokens.order)[order])
    return replace(tokens, name=builder.reshape(moved, [-1, tokens.width]), order=order)


def _gather(builder: GraphBuilder, by_picture: str, rows: Indices) -> str:
    return builder.node("Gather", [by_picture, builder.constant(rows)], axis=1)


def _inverse(order: Indices) -> Indices:
    """Where each place stands."""
    return np.argsort(order)


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


def _array(parameter: Any) -> NDArray[np.float32]:
    values: NDArray[np.float32] = parameter.detach().float().numpy()
    return values

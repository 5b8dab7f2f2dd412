"""SAM 2's prompt and mask decoder as a graph, node by node (see `mask_decoder_spec`).

    points, labels ─► tokens ─┐ two layers: tokens among themselves, tokens ► picture, MLP, picture ► tokens
    picture ──────────────────┴─► tokens ► picture ─► heads ─► scores, object logits, weights of four masks
                              └─► two times larger, twice ─► weights × picture ─► mask logits

Where this departs from transformers' `Sam2Model` (same numbers, other arithmetic order):
1. tokens are projected head by head in one product; places of the picture are the last axis of queries, keys and
   values, so that nothing as large as the picture is moved to be cut into heads;
2. a bias of the keys shifts all scores of a query alike, which softmax does not see: it is left out. A bias of the
   values is added to every token alike: it is added behind the projection. Queries are scaled in their weight;
3. softmax over tokens, for each place, is written out: it is over an axis that is not the last. What is mixed is
   divided by the sum, not each share;
4. the "no mask" embedding is added to the picture where the first layer gives it out, and before that where it is
   more than a bias of keys or values;
5. the last layers of equal size (of four masks, scores and the object) are one product of several matrices;
6. a box arrives as two labelled points, and the filler point as a third, as in SAM 2's own predictor; labels become
   embeddings by comparison, which leaves no index out of range to a caller's mistake;
7. all four masks come out with their scores: choosing among them is the host's. Masks as prompts are a graph of their
   own (`segmenter_graphs.py`), which takes the "no mask" embedding off again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import Sam2Model
from transformers.models.sam2.modeling_sam2 import Sam2Attention, Sam2FeedForward, Sam2TwoWayAttentionBlock

from segzero_rt.graph_spec import GraphSpec
from segzero_rt.graph_spec_segmenter import LABEL_NOTHING

from .graph_builder import GraphBuilder

Floats = NDArray[np.float32]

SMALL_WEIGHT = 1024
"""Weights of up to so many numbers are stored as they are: they take no room, and rounding them would be felt."""


def build_mask_decoder(model: Sam2Model, spec: GraphSpec, *, flavour: str, storage: str) -> GraphBuilder:
    """The decoder's graph, for any number of pictures, objects and points.

    Args:
        flavour: "ort" uses ONNX Runtime's own operators, "portable" only those of opset 17.
        storage: precision of the large weights in the file, "float16" or "float32".
    """
    builder = GraphBuilder(spec, storage=storage, fused=flavour == "ort")
    _MaskDecoder(builder, model).add()
    return builder


class _MaskDecoder:
    """Axes: B pictures, N objects, T tokens, S places of the picture, D channels, H heads of C channels."""

    def __init__(self, builder: GraphBuilder, model: Sam2Model) -> None:
        self._builder = builder
        self._model = model
        self._decoder = model.mask_decoder
        self._width = int(self._decoder.hidden_size)
        _, _, rows, columns = builder.spec.tensor("image_embeddings").shape
        assert isinstance(rows, int) and isinstance(columns, int), "the exporter knows every size"
        self._size_hw = (rows, columns)

    def add(self) -> None:
        """Adds all nodes."""
        builder, transformer = self._builder, self._decoder.transformer
        with builder.scope("prompts"):
            tokens = self._tokens()
        picture = builder.reshape("image_embeddings", [0, 1, self._width, -1])
        picture = builder.node("Transpose", [picture], perm=[0, 1, 3, 2])  # [B, 1, S, D]
        with torch.no_grad():
            table = self._model.get_image_wide_positional_embeddings()[0].flatten(1).T.numpy()
        no_mask = _array(self._model.prompt_encoder.no_mask_embed.weight).reshape(-1)
        positions = self._weight("positions", table)
        prompts, missing = tokens, no_mask  # what the picture still lacks
        for index, layer in enumerate(transformer.layers):
            with builder.scope(f"layers.{index}"):
                placed = builder.node("Add", [picture, positions])
                tokens, picture = self._layer(layer, tokens, prompts, picture, placed, missing)
                missing = np.zeros_like(no_mask)
        with builder.scope("final"):
            placed = builder.node("Add", [picture, positions])
            asked = builder.node("Add", [tokens, prompts])
            mixed = self._tokens_to_picture(transformer.final_attn_token_to_image, asked, placed, picture, missing)
            tokens = self._norm("norm", builder.node("Add", [tokens, mixed]), transformer.layer_norm_final_attn)
        self._give_out(tokens, picture)

    def _tokens(self) -> str:
        """[B, N, T, D]: those of the object, the scores and the masks, then one for each point."""
        builder, prompt, decoder = self._builder, self._model.prompt_encoder, self._decoder
        frequencies = _array(prompt.shared_embedding.positional_embedding).astype(np.float64)  # [2, D / 2]
        side = float(prompt.input_image_size)
        # 2 pi (2 (xy + 0.5) / side - 1): the half moves a pixel's corner to its centre
        turns = (frequencies * (4 * math.pi / side)).astype(np.float32)
        shift = (frequencies.sum(axis=0) * 2 * math.pi * (1 / side - 1)).astype(np.float32)
        angles = builder.node("MatMul", ["points_xy", builder.weight("frequencies", turns, exact=True)])
        angles = builder.node("Add", [angles, builder.weight("shift", shift, exact=True)])
        places = builder.node("Concat", [builder.node("Sin", [angles]), builder.node("Cos", [angles])], axis=-1)
        label = builder.node("Unsqueeze", ["labels", builder.constant([-1])])
        nothing = builder.node("Equal", [label, builder.constant(LABEL_NOTHING)])
        places = builder.node("Where", [nothing, builder.constant(0.0, "float32"), places])
        kinds = np.concatenate([_array(prompt.not_a_point_embed.weight), _array(prompt.point_embed.weight)])
        each = builder.constant([LABEL_NOTHING, *range(len(kinds) - 1)])
        chosen = builder.cast(builder.node("Equal", [label, each]), "float32")  # [B, N, P, kinds]
        chosen = builder.node("MatMul", [chosen, builder.weight("labels", kinds, exact=True)])
        points = builder.node("Add", [places, chosen])
        special = [decoder.obj_score_token.weight, decoder.iou_token.weight, decoder.mask_tokens.weight]
        rows = np.concatenate([_array(weight) for weight in special])
        shape = self._per_object(*rows.shape)
        repeated = builder.node("Expand", [builder.weight("special", rows, exact=True), shape])
        return builder.node("Concat", [repeated, points], axis=2)

    def _per_object(self, *lengths: int) -> str:
        """The shape [B, N, *lengths]."""
        builder = self._builder
        return builder.node("Concat", [builder.lengths("labels", 0, 1), builder.constant(list(lengths))], axis=0)

    def _layer(
        self, layer: Sam2TwoWayAttentionBlock, tokens: str, prompts: str, picture: str, placed: str, missing: Floats
    ) -> tuple[str, str]:
        """Tokens [B, N, T, D] and picture [B, N or 1, S, D] to the same; `placed` is the picture with positions.

        Args:
            missing: [D], what is to be added to all places of the picture.
        """
        builder = self._builder
        if layer.skip_first_layer_pe:
            tokens = self._among_tokens(layer.self_attn, tokens, tokens)
        else:
            mixed = self._among_tokens(layer.self_attn, builder.node("Add", [tokens, prompts]), tokens)
            tokens = builder.node("Add", [tokens, mixed])
        tokens = self._norm("norm1", tokens, layer.layer_norm1)
        asked = builder.node("Add", [tokens, prompts])
        with builder.scope("to_picture"):
            mixed = self._tokens_to_picture(layer.cross_attn_token_to_image, asked, placed, picture, missing)
        tokens = self._norm("norm2", builder.node("Add", [tokens, mixed]), layer.layer_norm2)
        hidden = self._feed_forward(layer.mlp, tokens)
        tokens = self._norm("norm3", builder.node("Add", [tokens, hidden]), layer.layer_norm3)
        with builder.scope("to_tokens"):
            asked = builder.node("Add", [tokens, prompts])
            picture = self._picture_to_tokens(layer.cross_attn_image_to_token, placed, asked, tokens, picture, missing)
        return tokens, self._norm("norm4", picture, layer.layer_norm4)

    def _among_tokens(self, module: Sam2Attention, asked: str, tokens: str) -> str:
        builder = self._builder
        with builder.scope("among"):
            query, key = self._heads(module, "query", asked), self._heads(module, "key", asked)
            value = self._heads(module, "value", tokens)
            scores = builder.node("MatMul", [query, self._turned(key)])
            mixed = builder.node("MatMul", [builder.node("Softmax", [scores], axis=-1), value])
            return self._merge_heads(module, mixed, np.zeros(self._width, np.float32))

    def _tokens_to_picture(self, module: Sam2Attention, asked: str, placed: str, picture: str, missing: Floats) -> str:
        builder = self._builder
        query = self._heads(module, "query", asked)
        key, value = self._places(module, "key", placed), self._places(module, "value", picture)
        shares = builder.node("Softmax", [builder.node("MatMul", [query, key])], axis=-1)  # [B, N, H, T, S]
        mixed = builder.node("MatMul", [shares, self._turned(value)])
        return self._merge_heads(module, mixed, missing)

    def _picture_to_tokens(
        self, module: Sam2Attention, placed: str, asked: str, tokens: str, picture: str, missing: Floats
    ) -> str:
        """The picture with what it finds in the tokens, [B, N, S, D]."""
        builder = self._builder
        query = self._places(module, "query", placed, missing)
        key, value = self._heads(module, "key", asked), self._heads(module, "value", tokens)
        scores = builder.node("MatMul", [key, query])  # [B, N, H, T, S]
        scores = builder.node("Sub", [scores, builder.reduce("ReduceMax", scores, -2, keepdims=1)])
        shares = builder.node("Exp", [scores])
        total = builder.node("ReduceSum", [shares, builder.constant([-2])], keepdims=1)
        mixed = builder.node("Div", [builder.node("MatMul", [self._turned(value), shares]), total])
        mixed = builder.reshape(mixed, [0, 0, int(module.internal_dim), -1])  # [B, N, H * C, S]
        weight, bias = self._projection(module)
        mixed = builder.node("MatMul", [self._turned(mixed, heads=False), self._weight("out.weight", weight.T)])
        shift = builder.weight("out.bias", bias + missing, exact=True)
        return builder.node("Add", [builder.node("Add", [mixed, shift]), picture])

    def _heads(self, module: Sam2Attention, part: str, tokens: str) -> str:
        """Tokens [B, N, T, D] to [B, N, H, T, C]."""
        builder = self._builder
        weight, bias = _projected(module, part)
        heads = int(module.num_attention_heads)
        each = weight.reshape(heads, -1, self._width).transpose(0, 2, 1)
        alone = builder.node("Unsqueeze", [tokens, builder.constant([2])])
        rows = builder.node("MatMul", [alone, self._weight(f"{part}.weight", each)])
        if bias is None:
            return rows
        return builder.node("Add", [rows, builder.weight(f"{part}.bias", bias.reshape(heads, 1, -1), exact=True)])

    def _places(self, module: Sam2Attention, part: str, picture: str, missing: Floats | None = None) -> str:
        """The picture [B, N or 1, S, D], plus `missing`, to [B, N or 1, H, C, S]; keys and values do without it."""
        builder = self._builder
        weight, bias = _projected(module, part)
        if bias is not None and missing is not None:
            bias = bias + weight @ missing
        heads = int(module.num_attention_heads)
        planes = builder.node("MatMul", [self._weight(f"{part}.weight", weight), self._turned(picture, heads=False)])
        if bias is not None:
            planes = builder.node("Add", [planes, builder.weight(f"{part}.bias", bias[:, None], exact=True)])
        return builder.reshape(planes, [0, 0, heads, len(weight) // heads, -1])

    def _merge_heads(self, module: Sam2Attention, mixed: str, missing: Floats) -> str:
        """[B, N, H, T, C] to [B, N, T, D], projected; values were made without `missing`, [D]."""
        builder = self._builder
        weight, bias = self._projection(module, missing)
        rows = builder.node("Transpose", [mixed], perm=[0, 1, 3, 2, 4])
        rows = builder.reshape(rows, [0, 0, 0, int(module.internal_dim)])
        projected = builder.node("MatMul", [rows, self._weight("out.weight", weight.T)])
        return builder.node("Add", [projected, builder.weight("out.bias", bias, exact=True)])

    def _projection(self, module: Sam2Attention, missing: Floats | None = None) -> tuple[Floats, Floats]:
        """Weight and bias behind attention, with what values would have had added to each alike."""
        weight, bias = _array(module.o_proj.weight), _array(module.o_proj.bias)
        added = _array(module.v_proj.bias)
        if missing is not None:
            added = added + _array(module.v_proj.weight) @ missing
        return weight, bias + weight @ added

    def _feed_forward(self, module: Sam2FeedForward, tokens: str) -> str:
        builder = self._builder
        linears = [module.proj_in, *module.layers, module.proj_out]
        for index, linear in enumerate(linears):
            weight = self._weight(f"mlp.{index}.weight", _array(linear.weight).T)
            tokens = builder.node("MatMul", [tokens, weight])
            tokens = builder.node("Add", [tokens, builder.weight(f"mlp.{index}.bias", _array(linear.bias), exact=True)])
            tokens = tokens if linear is linears[-1] else builder.node("Relu", [tokens])
        return tokens

    def _give_out(self, tokens: str, picture: str) -> None:
        """Adds the three outputs."""
        builder, decoder = self._builder, self._decoder
        count = int(decoder.num_mask_tokens)
        with builder.scope("heads"):
            kinds = (
                [decoder.pred_obj_score_head],
                [decoder.iou_prediction_head],
                list(decoder.output_hypernetworks_mlps),
            )
            found, scores, weight = self._apply_heads(tokens, kinds)
            builder.node("Squeeze", [found, builder.constant([2])], output="object_logits")
            scores = builder.node("Squeeze", [scores, builder.constant([2])])
            builder.node("Sigmoid", [scores], output="iou_scores")
        with builder.scope("upscale"):
            planes = self._upscale(picture)
        logits = builder.node("MatMul", [weight, planes])
        height, width = (4 * length for length in self._size_hw)
        builder.node("Reshape", [logits, builder.constant([0, 0, count, height, width])], output="mask_logits")

    def _apply_heads(self, tokens: str, kinds: Sequence[Sequence[Sam2FeedForward]]) -> list[str]:
        """One MLP for each of the first tokens, kind by kind [B, N, heads, width]; in one product if equally large."""
        sizes = {(int(head.num_layers), head.proj_in.out_features) for heads in kinds for head in heads}
        stacks = [list(kinds)] if len(sizes) == 1 else [[heads] for heads in kinds]
        results: list[str] = []
        start = 0
        for stack in stacks:
            members = [head for heads in stack for head in heads]
            rows = self._slice(tokens, {2: (start, start + len(members))})
            rows = self._builder.node("Unsqueeze", [rows, self._builder.constant([3])])  # [B, N, members, 1, D]
            with self._builder.scope(str(start)):
                rows = self._stacked(rows, [[head.proj_in, *head.layers, head.proj_out] for head in members])
            rows = self._builder.node("Squeeze", [rows, self._builder.constant([3])])
            first = 0
            for heads in stack:
                limits = {2: (first, first + len(heads)), 3: (0, heads[0].proj_out.out_features)}
                results.append(self._slice(rows, limits))
                first += len(heads)
            start += len(members)
        return results

    def _slice(self, x: str, limits: dict[int, tuple[int, int]]) -> str:
        """By axis: from, to."""
        starts, stops = zip(*limits.values(), strict=True)
        return self._builder.node("Slice", [x, *map(self._builder.constant, (starts, stops, list(limits)))])

    def _stacked(self, rows: str, members: Sequence[Sequence[nn.Linear]]) -> str:
        """[B, N, members, 1, in] to [B, N, members, 1, widest out]; narrower ones are filled up with zeros."""
        builder = self._builder
        for depth, linears in enumerate(zip(*members, strict=True)):
            widest = max(linear.out_features for linear in linears)
            weight = np.stack(
                [np.pad(_array(one.weight).T, ((0, 0), (0, widest - one.out_features))) for one in linears]
            )
            bias = np.stack([np.pad(_array(one.bias), (0, widest - one.out_features)) for one in linears])
            rows = builder.node("MatMul", [rows, self._weight(f"{depth}.weight", weight)])
            rows = builder.node("Add", [rows, builder.weight(f"{depth}.bias", bias[:, None], exact=True)])
            rows = rows if depth == len(members[0]) - 1 else builder.node("Relu", [rows])
        return rows

    def _upscale(self, picture: str) -> str:
        """[B, N, S, D] to [B, N, D / 8, 16 S], with the encoder's finer features of each picture added."""
        builder, decoder, width = self._builder, self._decoder, self._width
        height, length = self._size_hw
        planes = builder.reshape(self._turned(picture, heads=False), [-1, width, height, length])
        planes = self._double(planes, "conv1", decoder.upscale_conv1, "high_res_features_1", 2)  # [B, N, D/4, 2h, 2w]
        rows = builder.node("Transpose", [planes], perm=[0, 1, 3, 4, 2])
        planes = builder.node("Transpose", [self._norm("norm", rows, decoder.upscale_layer_norm)], perm=[0, 1, 4, 2, 3])
        planes = builder.reshape(builder.gelu(planes), [-1, width // 4, 2 * height, 2 * length])
        planes = builder.gelu(self._double(planes, "conv2", decoder.upscale_conv2, "high_res_features_0", 4))
        return builder.reshape(planes, [0, 0, width // 8, -1])

    def _double(self, planes: str, name: str, module: nn.ConvTranspose2d, finer: str, times: int) -> str:
        """[B * N, in, h, w] to [B, N, out, 2h, 2w], plus the picture's features of that size."""
        builder = self._builder
        weight = self._weight(f"{name}.weight", _array(module.weight))
        bias = builder.weight(f"{name}.bias", _array(module.bias), exact=True)
        larger = builder.node("ConvTranspose", [planes, weight, bias], strides=[2, 2], kernel_shape=[2, 2])
        shape = self._per_object(module.out_channels, *(times * length for length in self._size_hw))
        return builder.node(
            "Add", [builder.reshape(larger, shape), builder.node("Unsqueeze", [finer, builder.constant([1])])]
        )

    def _norm(self, name: str, x: str, norm: nn.LayerNorm) -> str:
        builder = self._builder
        parts = [
            builder.weight(f"{name}.{part}", _array(getattr(norm, part)), exact=True) for part in ("weight", "bias")
        ]
        return builder.node("LayerNormalization", [x, *parts], axis=-1, epsilon=norm.eps)

    def _turned(self, x: str, *, heads: bool = True) -> str:
        """The two last axes exchanged, of five with heads, else of four; ONNX Runtime makes it part of the product."""
        return self._builder.node("Transpose", [x], perm=[0, 1, 2, 4, 3] if heads else [0, 1, 3, 2])

    def _weight(self, name: str, values: Floats) -> str:
        return self._builder.weight(name, np.ascontiguousarray(values), exact=values.size <= SMALL_WEIGHT)


def _projected(module: Sam2Attention, part: str) -> tuple[Floats, Floats | None]:
    """Weight [H * C, D] and bias of queries, keys or values; what softmax or the projection does is left out."""
    linear = {"query": module.q_proj, "key": module.k_proj, "value": module.v_proj}[part]
    weight = _array(linear.weight)
    if part != "query":
        return weight, None
    return weight * np.float32(module.scaling), _array(linear.bias) * np.float32(module.scaling)


def _array(parameter: torch.Tensor) -> Floats:
    values: Floats = parameter.detach().float().numpy()
    return values

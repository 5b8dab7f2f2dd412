"""SAM 2's image encoder and its prompt and mask decoder, as modules that export to ONNX.

Both hold the checkpoint's own submodules of transformers' `Sam2Model`, whatever its size. Where they depart from its
forward pass:

1. Attention is written out as matrix products and softmax: plain operators that every parser takes, TensorRT 10.3
   included, and that ONNX Runtime fuses by itself.
2. Hiera's absolute position table (bicubic interpolation, tiling) depends on the input's size alone, which is fixed in
   the graph: it is worked out at export and stored. So are the decoder's picture-wide positions.
3. A product of queries and keys that transformers' Hiera computes and drops is not computed.
4. Windows are cut by reshape and transpose with lengths known at export; padding exists only where a stage needs it.
5. A box arrives as two labelled points, and the filler point as a third, as in SAM 2's own predictor; labels become
   embeddings by comparison instead of look-up, which leaves no index out of range to a caller's mistake.
6. Mask prompts are left out: no policy gives them, so the "no mask" embedding is added to the picture once.
7. All four masks come out with their scores; choosing among them (multimask or not, stability rule) is the host's.
8. The picture is not repeated per object before the first layer needs it: broadcasting does that, and the result for
   any object is the same.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Sam2Model
from transformers.models.sam2.modeling_sam2 import Sam2Attention, Sam2MultiScaleBlock, Sam2TwoWayAttentionBlock

from segzero_rt.graph_spec_segmenter import LABEL_NOTHING


class ImageEncoderGraph(nn.Module):
    """pixel_values (B, 3, H, W) -> image_embeddings, high_res_features_0, high_res_features_1. H and W are fixed."""

    def __init__(self, model: Sam2Model, input_size_hw: tuple[int, int]) -> None:
        super().__init__()
        backbone = model.vision_encoder.backbone
        self.patch = backbone.patch_embed.projection
        self.neck = model.vision_encoder.neck
        self.num_levels = model.vision_encoder.num_feature_levels
        self.fine, self.middle = model.mask_decoder.conv_s0, model.mask_decoder.conv_s1
        self.no_memory = nn.Buffer(model.no_memory_embedding.detach().reshape(1, -1, 1, 1))
        with torch.no_grad():
            size_hw = self.patch(torch.zeros(1, self.patch.in_channels, *input_size_hw)).shape[-2:]
            self.positions = nn.Buffer(backbone._get_pos_embed(size_hw).detach())
        blocks, ends = [], set(backbone.stage_ends)
        for block in backbone.blocks:
            blocks.append(_Block(block, size_hw))
            size_hw = blocks[-1].size_out_hw
        self.blocks = nn.ModuleList(blocks)
        self.ends = [index in ends for index in range(len(blocks))]

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.patch(pixel_values).permute(0, 2, 3, 1) + self.positions  # (B, H/4, W/4, C)
        stages = []
        for block, is_end in zip(self.blocks, self.ends, strict=True):
            hidden = block(hidden)
            if is_end:
                stages.append(hidden)
        levels = self._pyramid(stages)
        return levels[2] + self.no_memory, self.fine(levels[0]), self.middle(levels[1])

    def _pyramid(self, stages: list[Tensor]) -> list[Tensor]:
        """The neck without its position encodings, finest level first."""
        last = len(stages) - 1
        levels: list[Tensor] = []
        for index in range(last, -1, -1):
            level = self.neck.convs[last - index](stages[index].permute(0, 3, 1, 2))
            if index in self.neck.fpn_top_down_levels and index != last:
                level = level + F.interpolate(levels[-1], scale_factor=2.0, mode="nearest")
            levels.append(level)
        return levels[-self.num_levels :][::-1]


class _Block(nn.Module):
    """One Hiera block at a known size (departures 1, 3 and 4)."""

    def __init__(self, block: Sam2MultiScaleBlock, size_hw: tuple[int, int]) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp = block.layer_norm1, block.layer_norm2, block.mlp
        self.qkv, self.out = block.attn.qkv, block.attn.proj
        self.heads, self.scale = block.attn.num_attention_heads, block.attn.scale
        self.widen = block.proj if block.dim != block.dim_out else None
        self.stride = int(block.query_stride[0]) if block.query_stride else 1
        self.size_hw = (int(size_hw[0]), int(size_hw[1]))
        # Without windows, the whole map is one window.
        self.window_hw = (block.window_size, block.window_size) if block.window_size else self.size_hw
        self.size_out_hw = (self.size_hw[0] // self.stride, self.size_hw[1] // self.stride)
        self.grid_hw = tuple(math.ceil(n / w) for n, w in zip(self.size_hw, self.window_hw, strict=True))

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm1(hidden)
        residual = hidden if self.widen is None else self._pool(self.widen(normed))
        hidden = residual + self._join(self._attend(self._split(normed)))
        return hidden + self.mlp(self.norm2(hidden))

    def _pool(self, hidden: Tensor) -> Tensor:
        if self.stride == 1:
            return hidden
        return F.max_pool2d(hidden.permute(0, 3, 1, 2), self.stride, self.stride).permute(0, 2, 3, 1)

    def _split(self, hidden: Tensor) -> Tensor:
        """(B, H, W, C) -> (B * windows, h, w, C)."""
        rows, columns = (grid * window for grid, window in zip(self.grid_hw, self.window_hw, strict=True))
        if (rows, columns) != self.size_hw:
            hidden = F.pad(hidden, (0, 0, 0, columns - self.size_hw[1], 0, rows - self.size_hw[0]))
        if self.grid_hw == (1, 1):
            return hidden
        (gh, gw), (h, w) = self.grid_hw, self.window_hw
        return hidden.reshape(-1, gh, h, gw, w, hidden.shape[-1]).transpose(2, 3).reshape(-1, h, w, hidden.shape[-1])

    def _attend(self, windows: Tensor) -> Tensor:
        """(B', h, w, C) -> (B', h / stride, w / stride, C')."""
        h, w = self.window_hw
        query, key, value = self.qkv(windows).chunk(3, dim=-1)
        query = self._pool(query)
        queries, keys = (h // self.stride) * (w // self.stride), h * w
        width = query.shape[-1] // self.heads
        query = query.reshape(-1, queries, self.heads, width).transpose(1, 2) * self.scale
        key = key.reshape(-1, keys, self.heads, width).permute(0, 2, 3, 1)
        value = value.reshape(-1, keys, self.heads, width).transpose(1, 2)
        mixed = torch.softmax(query @ key, dim=-1) @ value
        mixed = mixed.transpose(1, 2).reshape(-1, h // self.stride, w // self.stride, self.heads * width)
        return self.out(mixed)

    def _join(self, windows: Tensor) -> Tensor:
        """Undoes `_split`, at the size after pooling."""
        (gh, gw), (h, w) = self.grid_hw, tuple(length // self.stride for length in self.window_hw)
        channels = windows.shape[-1]
        if self.grid_hw != (1, 1):
            windows = windows.reshape(-1, gh, gw, h, w, channels).transpose(2, 3).reshape(-1, gh * h, gw * w, channels)
        return windows[:, : self.size_out_hw[0], : self.size_out_hw[1]]


class MaskDecoderGraph(nn.Module):
    """Features of B pictures and N prompts of P points each -> four masks per prompt, their scores, object logits."""

    def __init__(self, model: Sam2Model) -> None:
        super().__init__()
        prompt, self.decoder = model.prompt_encoder, model.mask_decoder
        self.side = float(prompt.input_image_size)
        self.frequencies = nn.Buffer(prompt.shared_embedding.positional_embedding.detach())
        self.point_labels = nn.Buffer(prompt.point_embed.weight.detach())  # (4, D): outside, inside, two corners
        self.nothing = nn.Buffer(prompt.not_a_point_embed.weight.detach())  # (1, D)
        self.no_mask = nn.Buffer(prompt.no_mask_embed.weight.detach().reshape(1, -1, 1, 1))
        with torch.no_grad():
            positions = model.get_image_wide_positional_embeddings()  # (1, D, h, w)
        self.positions = nn.Buffer(positions.flatten(2).transpose(1, 2).unsqueeze(1).detach())  # (1, 1, h * w, D)
        decoder = self.decoder
        tokens = [decoder.obj_score_token.weight, decoder.iou_token.weight, decoder.mask_tokens.weight]
        self.special = nn.Buffer(torch.cat(tokens).detach())  # (2 + masks, D)

    def forward(
        self,
        image_embeddings: Tensor,
        high_res_features_0: Tensor,
        high_res_features_1: Tensor,
        points_xy: Tensor,
        labels: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, objects = points_xy.shape[0], points_xy.shape[1]
        special = self.special.expand(batch, objects, -1, -1)
        tokens = torch.cat([special, self._embed(points_xy, labels)], dim=2)  # (B, N, T, D)
        image = (image_embeddings + self.no_mask).flatten(2).transpose(1, 2).unsqueeze(1)  # (B, 1, h * w, D)
        tokens, image = self._transform(tokens, image)
        height, width = image_embeddings.shape[-2:]
        image = image.transpose(2, 3).reshape(batch * objects, -1, height, width)
        upscaled = self._upscale(image, high_res_features_0, high_res_features_1, objects)
        masks = tokens[:, :, 2 : 2 + self.decoder.num_mask_tokens]
        mlps = self.decoder.output_hypernetworks_mlps
        weights = torch.stack([mlp(masks[:, :, index]) for index, mlp in enumerate(mlps)], dim=2)
        logits = weights @ upscaled.reshape(batch, objects, upscaled.shape[1], -1)
        logits = logits.reshape(batch, objects, self.decoder.num_mask_tokens, *upscaled.shape[-2:])
        scores = self.decoder.iou_prediction_head(tokens[:, :, 1])
        return logits, scores, self.decoder.pred_obj_score_head(tokens[:, :, 0])

    def _embed(self, points_xy: Tensor, labels: Tensor) -> Tensor:
        """(B, N, P, 2) and (B, N, P) -> (B, N, P, D)."""
        where = 2 * ((points_xy + 0.5) / self.side) - 1  # the half moves a pixel's corner to its centre
        angles = 2 * math.pi * (where @ self.frequencies)
        embedded = torch.cat([angles.sin(), angles.cos()], dim=-1)
        label = labels.unsqueeze(-1)
        embedded = torch.where(label == LABEL_NOTHING, self.nothing, embedded)
        for number in range(self.point_labels.shape[0]):
            embedded = embedded + (label == number).to(embedded.dtype) * self.point_labels[number]
        return embedded

    def _transform(self, tokens: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """SAM's two-way transformer; `image` gains its object axis by broadcasting in the first layer."""
        transformer = self.decoder.transformer
        prompts = tokens
        for layer in transformer.layers:
            tokens, image = self._layer(layer, tokens, image, prompts)
        query, key = tokens + prompts, image + self.positions
        tokens = tokens + _attention(transformer.final_attn_token_to_image, query, key, image)
        return transformer.layer_norm_final_attn(tokens), image

    def _layer(
        self, layer: Sam2TwoWayAttentionBlock, tokens: Tensor, image: Tensor, prompts: Tensor
    ) -> tuple[Tensor, Tensor]:
        if layer.skip_first_layer_pe:
            tokens = _attention(layer.self_attn, tokens, tokens, tokens)
        else:
            query = tokens + prompts
            tokens = tokens + _attention(layer.self_attn, query, query, tokens)
        tokens = layer.layer_norm1(tokens)
        key = image + self.positions
        tokens = tokens + _attention(layer.cross_attn_token_to_image, tokens + prompts, key, image)
        tokens = layer.layer_norm2(tokens)
        tokens = layer.layer_norm3(tokens + layer.mlp(tokens))
        image = image + _attention(layer.cross_attn_image_to_token, key, tokens + prompts, tokens)
        return tokens, layer.layer_norm4(image)

    def _upscale(self, image: Tensor, fine: Tensor, middle: Tensor, objects: int) -> Tensor:
        """(B * N, D, h, w) -> (B * N, D/8, 4h, 4w), with the encoder's finer features of each picture added."""
        decoder = self.decoder
        up = decoder.upscale_conv1(image)
        up = (up.unflatten(0, (-1, objects)) + middle.unsqueeze(1)).flatten(0, 1)
        up = decoder.activation(decoder.upscale_layer_norm(up))
        up = decoder.upscale_conv2(up)
        return decoder.activation((up.unflatten(0, (-1, objects)) + fine.unsqueeze(1)).flatten(0, 1))


def _attention(module: Sam2Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`Sam2Attention` written out: (B, N, Q, D), (B, N or 1, K, D) -> (B, N, Q, D)."""
    heads, width = module.num_attention_heads, module.head_dim
    query = module.q_proj(query).unflatten(-1, (heads, width)).transpose(2, 3) * module.scaling
    key = module.k_proj(key).unflatten(-1, (heads, width)).permute(0, 1, 3, 4, 2)
    value = module.v_proj(value).unflatten(-1, (heads, width)).transpose(2, 3)
    mixed = torch.softmax(query @ key, dim=-1) @ value
    return module.o_proj(mixed.transpose(2, 3).flatten(-2))

"""SAM 2's prompt and mask decoder, as a module that exports to ONNX.

It holds the checkpoint's own submodules of transformers' `Sam2Model`, whatever its size. Where it departs from its
forward pass:

1. Attention is written out as matrix products and softmax: plain operators that every parser takes, TensorRT 10.3
   included, and that ONNX Runtime fuses by itself.
2. A box arrives as two labelled points, and the filler point as a third, as in SAM 2's own predictor; labels become
   embeddings by comparison instead of look-up, which leaves no index out of range to a caller's mistake.
3. Masks as prompts are a graph of their own, `MaskPromptGraph`, which changes the picture's features: no policy gives
   them, so the decoder adds the "no mask" embedding, and the other graph takes it off again.
4. All four masks come out with their scores; choosing among them (multimask or not, stability rule) is the host's.
5. The picture is not repeated per object before the first layer needs it: broadcasting does that, and the result for
   any object is the same. Its positions are worked out at export.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import Sam2Model
from transformers.models.sam2.modeling_sam2 import Sam2Attention, Sam2TwoWayAttentionBlock

from segzero_rt.graph_spec_segmenter import LABEL_NOTHING


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


class MaskPromptGraph(nn.Module):
    """Features of B pictures and one mask each -> features that the decoder takes in their place."""

    def __init__(self, model: Sam2Model) -> None:
        super().__init__()
        self.embed = model.prompt_encoder.mask_embed
        self.no_mask = nn.Buffer(model.prompt_encoder.no_mask_embed.weight.detach().reshape(1, -1, 1, 1))

    def forward(self, image_embeddings: Tensor, mask_logits: Tensor) -> Tensor:
        return image_embeddings + (self.embed(mask_logits) - self.no_mask)


def _attention(module: Sam2Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`Sam2Attention` written out: (B, N, Q, D), (B, N or 1, K, D) -> (B, N, Q, D)."""
    heads, width = module.num_attention_heads, module.head_dim
    query = module.q_proj(query).unflatten(-1, (heads, width)).transpose(2, 3) * module.scaling
    key = module.k_proj(key).unflatten(-1, (heads, width)).permute(0, 1, 3, 4, 2)
    value = module.v_proj(value).unflatten(-1, (heads, width)).transpose(2, 3)
    mixed = torch.softmax(query @ key, dim=-1) @ value
    return module.o_proj(mixed.transpose(2, 3).flatten(-2))

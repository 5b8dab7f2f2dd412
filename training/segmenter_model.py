"""The segmenter as PyTorch sees it: `Sam2Model` at a small size, and its forward pass with every mask token kept.

`Sam2Model.forward` returns either the single mask or the three of an ambiguous prompt; training needs all four at
once. Nothing else differs from it, and a test holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import (
    Sam2Config,
    Sam2HieraDetConfig,
    Sam2MaskDecoderConfig,
    Sam2Model,
    Sam2PromptEncoderConfig,
    Sam2VisionConfig,
)
from transformers.models.sam2.modeling_sam2 import Sam2MultiScaleAttention, do_pool


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmenterSize:
    """Sizes of a `Sam2Model`; the architecture stays SAM 2's."""

    side: int = 256
    """Input pixels along each side; a multiple of 32."""
    stage_dims: tuple[int, int, int, int] = (48, 96, 192, 256)
    stage_blocks: tuple[int, int, int, int] = (1, 2, 5, 1)
    stage_heads: tuple[int, int, int, int] = (1, 2, 4, 8)
    stage_windows: tuple[int, int, int, int] = (8, 4, 8, 8)
    global_blocks: tuple[int, ...] = (5, 6, 7)
    decoder_dim: int = 128

    def __post_init__(self) -> None:
        if self.side % 32:
            raise ValueError(f"expected a side that is a multiple of 32, got {self.side}")

    def config(self) -> Sam2Config:
        """The transformers configuration of this size."""
        backbone = Sam2HieraDetConfig(
            hidden_size=self.stage_dims[0],
            num_attention_heads=self.stage_heads[0],
            image_size=[self.side, self.side],
            blocks_per_stage=list(self.stage_blocks),
            embed_dim_per_stage=list(self.stage_dims),
            num_attention_heads_per_stage=list(self.stage_heads),
            window_size_per_stage=list(self.stage_windows),
            global_attention_blocks=list(self.global_blocks),
        )
        vision = Sam2VisionConfig(
            backbone_config=backbone,
            backbone_channel_list=list(reversed(self.stage_dims)),
            backbone_feature_sizes=[[self.side // stride] * 2 for stride in (4, 8, 16)],
            fpn_hidden_size=self.decoder_dim,
        )
        prompt = Sam2PromptEncoderConfig(hidden_size=self.decoder_dim, image_size=self.side, patch_size=16)
        decoder = Sam2MaskDecoderConfig(
            hidden_size=self.decoder_dim, mlp_dim=4 * self.decoder_dim, iou_head_hidden_dim=self.decoder_dim
        )
        return Sam2Config(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)


def build_segmenter(size: SegmenterSize) -> Sam2Model:
    """A freshly initialised segmenter, with the attention that trains fastest on a CPU."""
    model = Sam2Model(size.config())
    # transformers starts every weight at deviation 0.02, to be overwritten by a checkpoint: at this width prompts
    # hardly reach the masks. SAM 2 itself starts from PyTorch's own initialisation.
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.Embedding)):
            module.reset_parameters()
    # In SAM 2 prompts and picture share one random table of frequencies; transformers draws two, to be overwritten.
    table = model.shared_image_embedding.positional_embedding
    model.prompt_encoder.shared_embedding.positional_embedding.copy_(table)
    # On CPUs the fused attention's backward pass takes several times as long as plain matrix products.
    model.mask_decoder.config._attn_implementation = "eager"
    for block in model.vision_encoder.backbone.blocks:
        block.attn.forward = partial(_lean_attention, block.attn)
    return model


def _lean_attention(attention: Sam2MultiScaleAttention, hidden_states: Tensor, **_: object) -> Tensor:
    """`Sam2MultiScaleAttention.forward` less a product that it drops, and with a 16-bit softmax under autocast."""
    batch, height, width, _ = hidden_states.shape
    heads = attention.num_attention_heads
    qkv = attention.qkv(hidden_states).view(batch, height * width, 3, heads, -1)
    query, key, value = qkv.unbind(2)
    if attention.query_stride:
        query = do_pool(query.reshape(batch, height, width, -1), attention.query_stride)
        height, width = query.shape[1:3]
        query = query.reshape(batch, height * width, heads, -1)
    with torch.autocast("cpu", enabled=False):
        query, key, value = (part.transpose(1, 2) for part in (query * attention.scale, key, value))
        mixed = torch.softmax(query @ key.transpose(-2, -1), dim=-1) @ value
    return attention.proj(mixed.transpose(1, 2).reshape(batch, height, width, -1))


def set_side(model: Sam2Model, side: int) -> None:
    """Makes the model take pictures of another side: no weight depends on it, only these numbers do."""
    model.prompt_encoder.input_image_size = side
    model.prompt_encoder.image_embedding_size = (side // 16, side // 16)
    model.prompt_encoder.mask_input_size = (side // 4, side // 4)
    model.backbone_feature_sizes = [[side // stride] * 2 for stride in (4, 8, 16)]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFeatures:
    """What the image encoder hands to the decoder; S is the input side, D the decoder's width."""

    embeddings: Tensor  # (B, D, S/16, S/16)
    fine: Tensor  # (B, D/8, S/4, S/4)
    middle: Tensor  # (B, D/4, S/8, S/8)


@dataclass(frozen=True, kw_only=True, slots=True)
class Predictions:
    """Every token's reading for B pictures and N prompts each."""

    mask_logits: Tensor  # (B, N, 4, S/4, S/4); index 0 is the single mask, 1..3 the ambiguous ones
    iou_scores: Tensor  # (B, N, 4), 0..1
    object_logits: Tensor  # (B, N, 1)


def encode(model: Sam2Model, pixel_values: Tensor) -> ImageFeatures:
    """Normalised pixels (B, 3, S, S) -> features, as `Sam2Model.forward` makes them."""
    fine, middle, coarse = model.vision_encoder(pixel_values, return_dict=True).fpn_hidden_states
    return ImageFeatures(
        embeddings=coarse + model.no_memory_embedding.view(1, -1, 1, 1),
        fine=model.mask_decoder.conv_s0(fine),
        middle=model.mask_decoder.conv_s1(middle),
    )


def decode(model: Sam2Model, features: ImageFeatures, points_xy: Tensor, labels: Tensor) -> Predictions:
    """Prompts as labelled points (B, N, P, 2), box corners being labels 2 and 3 -> all four tokens' masks."""
    decoder = model.mask_decoder
    batch, prompts = points_xy.shape[:2]
    with torch.autocast("cpu", enabled=False):  # 8 bits of mantissa would blur where a corner is by a pixel
        sparse, dense = model.prompt_encoder(points_xy, labels, None, None)
        positions = model.get_image_wide_positional_embeddings().repeat(batch * prompts, 1, 1, 1)
    special = torch.cat([decoder.obj_score_token.weight, decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([special.expand(batch, prompts, -1, -1), sparse], dim=2)
    image = (features.embeddings + dense[:1]).repeat_interleave(prompts, dim=0)
    tokens, image = decoder.transformer(tokens, image, positions, None)
    side = features.embeddings.shape[-1]
    image = image.transpose(2, 3).reshape(batch * prompts, -1, side, side)
    middle = features.middle.repeat_interleave(prompts, dim=0)
    fine = features.fine.repeat_interleave(prompts, dim=0)
    upscaled = decoder.activation(decoder.upscale_layer_norm(decoder.upscale_conv1(image) + middle))
    upscaled = decoder.activation(decoder.upscale_conv2(upscaled) + fine)
    mask_tokens = tokens[:, :, 2 : 2 + decoder.num_mask_tokens]
    mlps = decoder.output_hypernetworks_mlps
    weights = torch.stack([mlp(mask_tokens[:, :, index]) for index, mlp in enumerate(mlps)], dim=2)
    logits = weights @ upscaled.reshape(batch, prompts, upscaled.shape[1], -1)
    return Predictions(
        mask_logits=logits.reshape(batch, prompts, -1, *upscaled.shape[-2:]).float(),
        iou_scores=decoder.iou_prediction_head(tokens[:, :, 1]).float(),
        object_logits=decoder.pred_obj_score_head(tokens[:, :, 0]).float(),
    )

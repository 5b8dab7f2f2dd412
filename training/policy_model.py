"""The tabletop policy: Qwen2.5-VL at a few million parameters, and its packed forward pass for training.

The model is transformers' own class and its checkpoint loads there unchanged; only sizes differ from the released ones.
`packed_forward` computes exactly what that class computes for every question alone, but shares one vision pass and one
prefix per picture among all its questions: [prefix | question 1 | question 2 | …], each question seeing the prefix and
itself, its positions restarting behind the picture.

Shapes: B pictures, V visual tokens, P prefix tokens, S packed tokens, C hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
"""OpenAI CLIP's, as Qwen2.5-VL normalises."""

INPUT_SIDE = 280
PATCH, MERGE = 14, 2
GRID = INPUT_SIDE // (PATCH * MERGE)
"""Merged cells per side: 10, so 100 visual tokens."""


def tabletop_config(vocab_size: int, token_ids: dict[str, int]) -> Qwen2_5_VLConfig:
    """Sizes of the shipped policy, about 8 M parameters.

    Rotary frequencies differ from the released `rope_theta` 1e6 and sections 16/24/24. Qwen2.5-VL has no absolute
    position, and M-RoPE hands frequencies out in falling order to time, height and width: at 1e6 the width gets only
    those that a small model never learns to read. A theta of 20 mends that but leaves no slow frequency at all, and
    with none a word cannot find what it means among tokens 50 to 150 places away. With 1e4 and 2/4/26, height has 0.56
    to 0.24 radians per cell, width 0.18 and less, and the slow half of the width's serve content.
    """
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": 256,
            "intermediate_size": 640,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 4, 26]},
            "bos_token_id": None,
            "eos_token_id": token_ids["<|im_end|>"],
            "pad_token_id": token_ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 6,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_heads": 6,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "window_size": 140,
            "out_hidden_size": 256,
            "fullatt_block_indexes": [2, 5],
        },
        image_token_id=token_ids["<|image_pad|>"],
        video_token_id=token_ids["<|endoftext|>"],
        vision_start_token_id=token_ids["<|vision_start|>"],
        vision_end_token_id=token_ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one packed row is cut up. Static over a run, so masks and positions are made once."""

    prefix_length: int
    """0 for text without a picture."""
    image_start: int
    """Index of the first visual token in the prefix."""
    groups: tuple[tuple[int, int], ...]
    """(number of questions, tokens each), in order."""

    @property
    def length(self) -> int:
        return self.prefix_length + sum(count * tokens for count, tokens in self.groups)

    @property
    def starts(self) -> list[int]:
        """First token of every question, in order."""
        starts, at = [], self.prefix_length
        for count, tokens in self.groups:
            for _ in range(count):
                starts.append(at)
                at += tokens
        return starts

    @cached_property
    def position_ids(self) -> Tensor:
        """[3, S]: time, height, width; as transformers' `get_rope_index` gives for each question alone."""
        parts = []
        text_start = 0
        if self.prefix_length:
            cells = torch.arange(GRID * GRID)
            image = torch.stack([torch.zeros_like(cells), cells // GRID, cells % GRID]) + self.image_start
            before = torch.arange(self.image_start).expand(3, -1)
            num_after = self.prefix_length - self.image_start - GRID * GRID
            after = torch.arange(num_after).expand(3, -1) + self.image_start + GRID
            parts = [before, image, after]
            text_start = self.image_start + GRID + num_after
        for count, tokens in self.groups:
            parts += [torch.arange(text_start, text_start + tokens).expand(3, -1)] * count
        return torch.cat(parts, 1)

    @cached_property
    def prefix_mask(self) -> Tensor:
        """[P, P] additive, causal."""
        return torch.full((self.prefix_length, self.prefix_length), float("-inf")).triu(1)

    @cached_property
    def masks(self) -> list[Tensor]:
        """Per group: [L, P + L] additive, a question sees the whole prefix and itself causally."""
        masks = []
        for _, tokens in self.groups:
            own = torch.full((tokens, tokens), float("-inf")).triu(1)
            masks.append(torch.cat([torch.zeros(tokens, self.prefix_length), own], 1))
        return masks


class PackedPolicy(nn.Module):
    """`Qwen2_5_VLForConditionalGeneration` with the packed forward pass beside it."""

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        self._vision_rotary = self._make_vision_rotary()

    @property
    def text(self) -> Any:
        """transformers' text model; `Any` since a module's children have no types of their own."""
        return self.model.model.language_model

    @property
    def vision(self) -> Any:
        """transformers' vision tower."""
        return self.model.model.visual

    # -- vision ----------------------------------------------------------------------------------------------------

    def _windows_per_side(self) -> int:
        per_window: int = self.vision.config.window_size // (PATCH * MERGE)
        if GRID % per_window:
            raise ValueError(f"expected windows that tile {GRID} cells, got {per_window} cells per window")
        return GRID // per_window

    def _window_order(self) -> Tensor:
        """[V]: merged raster index of each visual token in window order."""
        count = self._windows_per_side()
        cells = torch.arange(GRID * GRID).view(count, GRID // count, count, GRID // count)
        return cells.permute(0, 2, 1, 3).reshape(-1)

    def _make_vision_rotary(self) -> tuple[Tensor, Tensor]:
        """cos, sin [1, 1, 4 V, head_dim] in window order, patches of a merged cell together."""
        cells = self._window_order()
        sub = torch.arange(MERGE * MERGE)
        rows = (cells[:, None] // GRID) * MERGE + sub // MERGE
        columns = (cells[:, None] % GRID) * MERGE + sub % MERGE
        positions = torch.stack([rows.reshape(-1), columns.reshape(-1)])  # [2, 4V]
        dim = self.vision.config.hidden_size // self.vision.config.num_heads
        inverse = 1.0 / (10000.0 ** (torch.arange(0, dim // 2, 2).float() / (dim // 2)))
        angles = torch.cat([positions[0][:, None] * inverse, positions[1][:, None] * inverse], 1)
        angles = torch.cat([angles, angles], 1)[None, None]
        return angles.cos(), angles.sin()

    def look(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 280, 280, 3] → visual tokens [B, V, C] in raster order."""
        batch = pixels.shape[0]
        mean, std = torch.tensor(IMAGE_MEAN), torch.tensor(IMAGE_STD)
        scaled = (pixels.float() / 255 - mean) / std
        tiles = scaled.view(batch, GRID, MERGE, PATCH, GRID, MERGE, PATCH, 3)
        # → [B, V, 4, 3 * 14 * 14]; both frames of a still picture are equal, so the temporal kernel is summed instead
        patches = tiles.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(batch, GRID * GRID, MERGE * MERGE, -1)
        patches = patches[:, self._window_order()].reshape(batch, GRID * GRID * MERGE * MERGE, -1)
        kernel = self.vision.patch_embed.proj.weight.sum(2).flatten(1)
        x = F.linear(patches, kernel)
        for number, block in enumerate(self.vision.blocks):
            windows = 1 if number in self.vision.fullatt_block_indexes else self._windows_per_side() ** 2
            x = x + self._vision_attention(block.attn, rms_norm(x, block.norm1), windows)
            x = x + block.mlp(rms_norm(x, block.norm2))
        merger = self.vision.merger
        merged = merger.mlp(rms_norm(x, merger.ln_q).view(batch, GRID * GRID, -1))
        raster: Tensor = merged[:, torch.argsort(self._window_order())]
        return raster

    def _vision_attention(self, attention: Any, x: Tensor, windows: int) -> Tensor:
        batch, tokens, width = x.shape
        heads = attention.num_heads
        q, k, v = attention.qkv(x).view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)  # [B, H, N, D]
        cos, sin = (table.to(q.dtype) for table in self._vision_rotary)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q, k, v = (
            t.reshape(batch, heads, windows, tokens // windows, -1).transpose(1, 2).flatten(0, 1) for t in (q, k, v)
        )
        out = attend(q, k, v)
        out = out.view(batch, windows, heads, tokens // windows, -1).permute(0, 1, 3, 2, 4)
        projected: Tensor = attention.proj(out.reshape(batch, tokens, width))
        return projected

    # -- text ------------------------------------------------------------------------------------------------------

    def _rotary(self, layout: Layout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        table = self.text.rotary_emb
        cos, sin = table(torch.zeros(1, dtype=torch.float32), layout.position_ids[:, None])
        return cos[:, None].to(dtype), sin[:, None].to(dtype)  # [1, 1, S, D]

    def read(
        self, token_ids: Tensor, visual: Tensor | None, layout: Layout, taps: tuple[int, ...] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """token_ids [B, S] → last hidden states [B, S, C] (normed) and the states after the layers in `taps`."""
        x = self.text.embed_tokens(token_ids)
        if visual is not None:
            start = layout.image_start
            x = torch.cat([x[:, :start], visual.to(x.dtype), x[:, start + visual.shape[1] :]], 1)
        cos, sin = self._rotary(layout, torch.bfloat16 if torch.is_autocast_enabled("cpu") else x.dtype)
        tapped = []
        for number, layer in enumerate(self.text.layers):
            x = x + self._text_attention(layer.self_attn, rms_norm(x, layer.input_layernorm), cos, sin, layout)
            x = x + layer.mlp(rms_norm(x, layer.post_attention_layernorm))
            if number in taps:
                tapped.append(x)
        return rms_norm(x, self.text.norm), tapped

    def watched(self, x: Tensor, layer: int, at: Tensor, layout: Layout) -> Tensor:
        """How much the first head of a decoder layer looks at each visual token, as log-probabilities [W, V].

        Args:
            x: [B, S, C], what enters the layer.
            at: int64 [W, 3], see `Batch.watch_at`.
        """
        rows, tokens, starts = at.T
        block = self.text.layers[layer]
        attention, dim = block.self_attn, block.self_attn.head_dim
        x = rms_norm(x, block.input_layernorm)
        cos, sin = (table[0, 0] for table in self._rotary(layout, torch.float32))  # [S, D]
        q = F.linear(x[rows, tokens], attention.q_proj.weight[:dim], attention.q_proj.bias[:dim]).float()
        k = F.linear(x, attention.k_proj.weight[:dim], attention.k_proj.bias[:dim]).float()
        q, k = rotate(q, cos[tokens], sin[tokens]), rotate(k, cos, sin)
        reach = starts[:, None] + torch.arange(max(length for _, length in layout.groups))  # [W, L]
        own = torch.einsum("wd,wld->wl", q, k[rows[:, None], reach.clamp(max=layout.length - 1)])
        own = own.masked_fill(reach > tokens[:, None], float("-inf"))
        prefix = torch.einsum("wd,wpd->wp", q, k[:, : layout.prefix_length][rows])
        scores = torch.cat([prefix, own], 1) * dim**-0.5
        return F.log_softmax(scores, -1)[:, layout.image_start : layout.image_start + GRID * GRID]

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.text.embed_tokens.weight)

    def _text_attention(self, attention: Any, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
        batch, tokens, _ = x.shape
        q = attention.q_proj(x).view(batch, tokens, attention.num_heads, -1).transpose(1, 2)
        k = attention.k_proj(x).view(batch, tokens, attention.num_key_value_heads, -1).transpose(1, 2)
        v = attention.v_proj(x).view(batch, tokens, attention.num_key_value_heads, -1).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (t.repeat_interleave(attention.num_key_value_groups, 1) for t in (k, v))
        # One split per tensor: its backward is one concatenation, that of many slices as many full-size additions.
        lengths = [layout.prefix_length, *(count * length for count, length in layout.groups)]
        (q0, *qs), (k0, *ks), (v0, *vs) = (torch.split(tensor, lengths, 2) for tensor in (q, k, v))
        parts = [attend(q0, k0, v0, layout.prefix_mask.to(q.dtype))] if layout.prefix_length else []
        for number, (count, _) in enumerate(layout.groups):
            parts.append(
                _grouped_attention(qs[number], (k0, ks[number]), (v0, vs[number]), count, layout.masks[number])
            )
        out = torch.cat(parts, 2)  # [B, H, S, D]
        projected: Tensor = attention.o_proj(out.transpose(1, 2).reshape(batch, tokens, -1))
        return projected


def _grouped_attention(
    q: Tensor, k: tuple[Tensor, Tensor], v: tuple[Tensor, Tensor], count: int, mask: Tensor
) -> Tensor:
    """`count` questions as a batch of their own, each beside the shared prefix.

    q [B, H, count * L, D]; k, v: (prefix, own).
    """
    batch, heads, total, dim = q.shape

    def own(t: Tensor) -> Tensor:  # [B * count, H, L, D]
        return t.view(batch, heads, count, -1, dim).transpose(1, 2).reshape(batch * count, heads, -1, dim)

    def with_prefix(shared: Tensor, t: Tensor) -> Tensor:
        if shared.shape[2] == 0:
            return own(t)
        spread = shared[:, None].expand(-1, count, -1, -1, -1).reshape(batch * count, heads, -1, dim)
        return torch.cat([spread, own(t)], 2)

    out = attend(own(q), with_prefix(*k), with_prefix(*v), mask.to(q.dtype))
    return out.view(batch, count, heads, -1, dim).transpose(1, 2).reshape(batch, heads, total, dim)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention in plain operators: on CPUs in bfloat16 its backward pass is 2-4 times as fast as the fused."""
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
    return torch.matmul(torch.softmax(scores if mask is None else scores + mask, -1, dtype=scores.dtype), v)


def rms_norm(x: Tensor, norm: Any) -> Tensor:
    """transformers' RMSNorm module, computed by the fused operator."""
    return F.rms_norm(x, norm.weight.shape, norm.weight.to(x.dtype), norm.variance_epsilon)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, halves convention."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin

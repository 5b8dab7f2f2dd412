"""A Qwen2.5-VL policy that reads a prompt once for all of its replies, with or without gradients.

TRL hands a prompt to the model once per sample, picture included, though only the replies differ. Here the vision tower
sees a picture once, the decoder a prompt once, and the replies attend to the prompt's keys and values beside their own:

    pictures ─► vision ─► prompts ─► keys, values of each prompt ──┐
                                     replies [G, n, T] ────────────┴─► hidden states [G, n, T, C]

The weights are the model's own parameters, read through its own modules: an optimiser's step or an adapter is seen at
once, and gradients flow back. It computes what `Qwen2_5_VLForConditionalGeneration` computes for every sample alone, in
another order of sums.

Shapes: G prompts, P prompt tokens, n replies to each, T reply tokens, K key-value heads, Q query heads for each of
them, D head width, C hidden size, V visual tokens in all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from .picture_memory import PictureMemory
from .policy_model import rms_norm, rotate

PADDING = 0
"""Token that fills prompts up at the right; nothing ever looks at it."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Distinct prompts and the distinct pictures in them."""

    token_ids: tuple[tuple[int, ...], ...]
    """Of each prompt, a placeholder for every visual token."""
    pixel_values: Tensor | None = None
    """float32 [patches of all pictures, patch_dim], as the image processor gives them."""
    image_grid_thw: Tensor | None = None
    """int64 [pictures, 3], patches along time, height and width."""
    pictures: tuple[tuple[int, ...], ...] = ()
    """Which pictures stand in each prompt, in order; one entry per prompt, or none where no prompt has any."""

    def __post_init__(self) -> None:
        if not self.token_ids or min(map(len, self.token_ids)) < 1:
            raise ValueError("expected at least one prompt, and a token in each; got an empty one")
        if (self.pixel_values is None) != (self.image_grid_thw is None):
            raise ValueError("expected pixel_values and image_grid_thw together, got one without the other")
        if self.pictures and len(self.pictures) != len(self.token_ids):
            raise ValueError(f"expected pictures for {len(self.token_ids)} prompts, got {len(self.pictures)}")
        known = 0 if self.image_grid_thw is None else len(self.image_grid_thw)
        asked = {number for row in self.pictures for number in row}
        if asked and not 0 <= min(asked) <= max(asked) < known:
            raise ValueError(f"expected pictures from 0 to {known - 1}, got {sorted(asked)}")

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_padded(self) -> int:
        """P: tokens of the longest prompt."""
        return max(map(len, self.token_ids))


@dataclass(frozen=True, kw_only=True)
class PromptState:
    """What the decoder keeps of prompts that it has read."""

    keys: tuple[Tensor, ...]
    """Per layer [G * K, P, D]."""
    values: tuple[Tensor, ...]
    bias: Tensor | None
    """[G * K, 1, P], minus infinity on padding; None where no prompt is padded."""
    hidden: Tensor
    """[G, C], the normed state of each prompt's last token."""
    next_positions: Tensor
    """int64 [G], position of the first reply token."""

    def select(self, prompts: Tensor) -> PromptState:
        """The state of the prompts with these numbers, int64 [G'], which may repeat."""
        count = len(self.next_positions)

        def rows(tensor: Tensor) -> Tensor:
            # index_select, whose backward pass is several times that of indexing
            return tensor.view(count, -1, *tensor.shape[1:]).index_select(0, prompts).flatten(0, 1)

        return PromptState(
            keys=tuple(map(rows, self.keys)),
            values=tuple(map(rows, self.values)),
            bias=None if self.bias is None else rows(self.bias),
            hidden=self.hidden.index_select(0, prompts),
            next_positions=self.next_positions.index_select(0, prompts),
        )


class ReplyCache:
    """Keys and values of the replies so far, per layer [G * K * n, capacity, D], written in place."""

    def __init__(self, rows: int, capacity: int) -> None:
        self.length = 0
        self._rows, self._capacity = rows, capacity
        self._tensors: list[tuple[Tensor, Tensor]] = []

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Adds [rows, T, D] after what is there; returns all of it. `advance` after the last layer."""
        if layer == len(self._tensors):
            shape = (self._rows, self._capacity, key.shape[-1])
            self._tensors.append((key.new_zeros(shape), value.new_zeros(shape)))
        end = self.length + key.shape[1]
        keys, values = self._tensors[layer]
        keys[:, self.length : end] = key
        values[:, self.length : end] = value
        return keys[:, :end], values[:, :end]

    def advance(self, tokens: int) -> None:
        self.length += tokens

    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows, int64 [rows']."""
        self._rows = len(rows)
        self._tensors = [(keys[rows], values[rows]) for keys, values in self._tensors]


class SharedPromptPolicy:
    """The forward pass above.

    Args:
        model: `Qwen2_5_VLForConditionalGeneration`, or a PEFT model around it; nothing that shards parameters.
        memory: keeps visual tokens, where the vision tower is frozen.

    Raises:
        TypeError: another model.
        ValueError: a setting that this pass does not compute.
    """

    def __init__(self, model: Any, memory: PictureMemory | None = None) -> None:
        base = model.get_base_model() if hasattr(model, "peft_config") else model
        if not isinstance(base, Qwen2_5_VLForConditionalGeneration):
            raise TypeError(f"expected a Qwen2_5_VLForConditionalGeneration, got {type(base).__name__}")
        self.model, self._memory = base, memory
        # The children of transformers' modules have no types of their own.
        self._inner: Any = base.model
        self._text: Any = self._inner.language_model
        config = self._text.config
        if config.attention_dropout or config.use_sliding_window:
            raise ValueError("expected a decoder without attention dropout and sliding windows, got one that has them")
        self._kv_heads: int = config.num_key_value_heads
        self._groups: int = config.num_attention_heads // config.num_key_value_heads
        self._head_dim: int = config.hidden_size // config.num_attention_heads

    @property
    def device(self) -> torch.device:
        return self.model.device

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., C] to logits [..., vocabulary] in float32."""
        scores: Tensor = self.model.lm_head(hidden)
        return scores.float()

    def look(self, pixel_values: Tensor, image_grid_thw: Tensor) -> tuple[Tensor, ...]:
        """Visual tokens of each picture, [its tokens, C]."""
        if self._memory is not None:
            return self._memory.look(self._look, pixel_values, image_grid_thw)
        return self._look(pixel_values, image_grid_thw)

    def _look(self, pixel_values: Tensor, image_grid_thw: Tensor) -> tuple[Tensor, ...]:
        features = self._inner.get_image_features(pixel_values.to(self.device), image_grid_thw.to(self.device))
        pooled: tuple[Tensor, ...] = features.pooler_output
        return pooled

    def read(self, prompts: Prompts) -> PromptState:
        """Reads each prompt once.

        Raises:
            ValueError: a prompt has another number of placeholders than its pictures have visual tokens.
        """
        ids = torch.full((len(prompts), prompts.num_padded), PADDING)
        for row, tokens in enumerate(prompts.token_ids):
            ids[row, : len(tokens)] = torch.tensor(tokens)
        lengths = torch.tensor([len(tokens) for tokens in prompts.token_ids])
        real = torch.arange(prompts.num_padded) < lengths[:, None]
        positions, next_positions = self._positions(prompts, ids, real)
        ids, lengths, real = ids.to(self.device), lengths.to(self.device), real.to(self.device)
        x = self._embed(prompts, ids, real)
        cos, sin = self._rotary(x, positions.to(self.device))
        keys, values = [], []
        for layer in self._text.layers:
            q, k, v = self._project(layer, x, cos, sin)
            keys.append(k.flatten(0, 1))
            values.append(v.flatten(0, 1))
            # Padding stands at the right, so that a causal mask keeps it from all that counts.
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = self._finish(layer, x, mixed.transpose(1, 2).flatten(2))
        last = x[torch.arange(len(prompts), device=x.device), lengths - 1]
        return PromptState(
            keys=tuple(keys),
            values=tuple(values),
            bias=self._padding_bias(real, x.dtype),
            hidden=rms_norm(last, self._text.norm),
            next_positions=next_positions.to(self.device),
        )

    def reply(self, state: PromptState, token_ids: Tensor, cache: ReplyCache | None = None) -> Tensor:
        """Hidden states, normed, [G, n, T, C] of reply tokens int64 [G, n, T].

        Args:
            cache: of what these replies said before; the tokens are added to it. Without, they are the whole replies.
        """
        prompts, replies, tokens = token_ids.shape
        start = 0 if cache is None else cache.length
        x = self._text.embed_tokens(token_ids.view(prompts, replies * tokens))
        steps = torch.arange(start, start + tokens, device=x.device).repeat(replies)
        cos, sin = self._rotary(x, (state.next_positions[:, None] + steps).expand(3, -1, -1))
        causal = None if tokens == 1 else _causal_bias(tokens, self._groups, start, x)
        for number, layer in enumerate(self._text.layers):
            q, k, v = self._project(layer, x, cos, sin)
            own = [part.reshape(-1, tokens, self._head_dim) for part in (k, v)]  # [G * K * n, T, D]
            if cache is not None:
                own = [*cache.append(number, own[0], own[1])]
            mixed = self._attend(
                q, replies, (state.keys[number], own[0]), (state.values[number], own[1]), state, causal
            )
            x = self._finish(layer, x, mixed)
        if cache is not None:
            cache.advance(tokens)
        hidden: Tensor = rms_norm(x, self._text.norm)
        return hidden.view(prompts, replies, tokens, -1)

    def _attend(
        self,
        q: Tensor,
        replies: int,
        keys: tuple[Tensor, Tensor],
        values: tuple[Tensor, Tensor],
        state: PromptState,
        causal: Tensor | None,
    ) -> Tensor:
        """Queries [G, K * Q, n * T, D] over (prompt, own) → [G, n * T, C].

        Query heads that share a key-value head are stacked along time, so that keys are never repeated.
        """
        prompts, length = q.shape[0], keys[0].shape[1]
        tokens = q.shape[2] // replies
        shape = (prompts, self._kv_heads, self._groups, replies, tokens, self._head_dim)
        stacked = (
            (q * self._head_dim**-0.5).view(shape).transpose(2, 3).reshape(prompts * self._kv_heads, -1, shape[-1])
        )
        on_prompt = torch.bmm(stacked, keys[0].transpose(1, 2))  # [G * K, n * Q * T, P]
        if state.bias is not None:
            on_prompt = on_prompt + state.bias
        rows = prompts * self._kv_heads * replies
        on_own = torch.bmm(stacked.view(rows, -1, shape[-1]), keys[1].transpose(1, 2))  # [G * K * n, Q * T, T so far]
        if causal is not None:
            on_own = on_own + causal
        scores = torch.cat([on_prompt.view(rows, -1, length), on_own], -1)
        shares = torch.softmax(scores, -1, dtype=torch.float32).to(values[0].dtype)
        own_mixed = torch.bmm(shares[..., length:], values[1])
        of_prompt = shares[..., :length].reshape(prompts * self._kv_heads, -1, length)
        mixed = own_mixed + torch.bmm(of_prompt, values[0]).view_as(own_mixed)
        ordered = mixed.view(prompts, self._kv_heads, replies, self._groups, tokens, -1).permute(0, 2, 4, 1, 3, 5)
        return ordered.reshape(prompts, replies * tokens, -1)

    def _project(self, layer: Any, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [G, K * Q, S, D], k and v [G, K, S, D], rotated."""
        attention = layer.self_attn
        normed = rms_norm(x, layer.input_layernorm)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (
            projection(normed).view(*x.shape[:2], -1, self._head_dim).transpose(1, 2) for projection in projections
        )
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def _finish(self, layer: Any, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + layer.self_attn.o_proj(mixed)
        mlp = layer.mlp
        normed = rms_norm(x, layer.post_attention_layernorm)
        added: Tensor = mlp.down_proj(F.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))
        return x + added

    def _embed(self, prompts: Prompts, ids: Tensor, real: Tensor) -> Tensor:
        x: Tensor = self._text.embed_tokens(ids)
        if prompts.pixel_values is None or prompts.image_grid_thw is None:
            return x
        features = self.look(prompts.pixel_values, prompts.image_grid_thw)
        placed = [features[number] for row in prompts.pictures for number in row]
        places = (ids == self.model.config.image_token_id) & real
        visual = torch.cat(placed) if placed else x.new_zeros(0, x.shape[-1])
        if int(places.sum()) != len(visual):
            raise ValueError(f"expected {len(visual)} placeholders for visual tokens, got {int(places.sum())}")
        return x.masked_scatter(places[..., None], visual.to(x.dtype))

    def _positions(self, prompts: Prompts, ids: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """M-RoPE positions int64 [3, G, P] and that of each prompt's first reply token, by transformers' own rule."""
        grids = prompts.image_grid_thw
        placed = [number for row in prompts.pictures for number in row]
        types = ((ids == self.model.config.image_token_id) & real).int()
        positions, _ = self._inner.get_rope_index(
            ids, types, image_grid_thw=None if grids is None else grids.cpu()[placed], attention_mask=real.long()
        )
        return positions, positions.amax((0, 2)) + 1

    def _padding_bias(self, real: Tensor, dtype: torch.dtype) -> Tensor | None:
        if bool(real.all()):
            return None
        bias = torch.zeros(real.shape, dtype=dtype, device=real.device).masked_fill(~real, float("-inf"))
        return bias.repeat_interleave(self._kv_heads, 0)[:, None]

    def _rotary(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._text.rotary_emb(x, positions)
        return cos[:, None], sin[:, None]


def _causal_bias(tokens: int, groups: int, start: int, like: Tensor) -> Tensor:
    """[Q * T, start + T], minus infinity where a token would look ahead."""
    bias = torch.full((tokens, start + tokens), float("-inf"), dtype=like.dtype, device=like.device)
    return bias.triu(start + 1).repeat(groups, 1)

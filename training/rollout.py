"""Samples replies from a live policy: every prompt is read once, all its replies are written side by side.

    prompts ─► SharedPromptPolicy.read ─► n replies each, token by token ─► sampled tokens and their log-probabilities

Replies that have ended leave the batch. A draw depends on the seed, the reply and the step alone, not on what else is
in the batch. Weights are the training's own: there is nothing to refresh after an optimiser's step.

The runtime's ONNX decoder was measured beside it and not taken: see `benchmarks/README.md`.

Shapes: G prompts, n replies to each, R = G * n replies, W vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from .shared_prompt import Prompts, PromptState, ReplyCache, SharedPromptPolicy

SHRINK_AT = 0.75
"""Ended replies are dropped once the batch would fall to this share: dropping copies what the others have cached."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn."""

    num_replies: int = 1
    """To each prompt."""
    max_new_tokens: int
    """Longest reply, its end token included."""
    temperature: float = 1.0
    """Logits are divided by it; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Draws from the fewest tokens that hold this share of the probability."""
    never: tuple[int, ...] = ()
    """Tokens that are not drawn, such as the picture's placeholder."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_replies < 1 or self.max_new_tokens < 1:
            raise ValueError(
                f"expected at least 1 reply of 1 token, got {self.num_replies} of at most {self.max_new_tokens}"
            )
        if not self.temperature >= 0.0 or not 0.0 < self.top_p <= 1.0:
            raise ValueError(
                f"expected a temperature from 0 and a top_p in (0, 1], got {self.temperature} and {self.top_p}"
            )


@dataclass(frozen=True, kw_only=True)
class Replies:
    """What was sampled, the replies to the first prompt first."""

    token_ids: tuple[tuple[int, ...], ...]
    """With the end token, where the reply came to one."""
    logprobs: tuple[tuple[float, ...], ...]
    """Of each token under the policy at the sampling temperature (1 for greedy replies), before `top_p` cut any off."""


def sample_replies(
    policy: SharedPromptPolicy, prompts: Prompts, sampling: Sampling, end_token_ids: Collection[int]
) -> Replies:
    """Samples `sampling.num_replies` replies to each prompt.

    Args:
        end_token_ids: tokens that end a reply.
    """
    rows = len(prompts) * sampling.num_replies
    with torch.inference_mode():
        batch = _Batch(policy.read(prompts), sampling)
        tokens = torch.zeros(rows, sampling.max_new_tokens, dtype=torch.int64)
        logprobs = torch.zeros(rows, sampling.max_new_tokens)
        lengths = torch.full((rows,), sampling.max_new_tokens)
        ends = torch.tensor(sorted(end_token_ids), dtype=torch.int64)
        draws = torch.Generator().manual_seed(sampling.seed)
        logits = policy.logits(batch.state.hidden).repeat_interleave(sampling.num_replies, 0)
        for step in range(sampling.max_new_tokens):
            uniform = torch.rand(rows, generator=draws)[batch.rows]
            drawn, scores = draw_tokens(logits, sampling, uniform.to(logits.device))
            drawn, scores = drawn.cpu(), scores.cpu()
            tokens[batch.rows, step], logprobs[batch.rows, step] = drawn, scores
            ended = torch.isin(drawn, ends) & batch.running
            lengths[batch.rows[ended]] = step + 1
            batch.running &= ~ended
            if step + 1 == sampling.max_new_tokens or not batch.running.any():
                break
            drawn = batch.shrink(drawn)
            hidden = policy.reply(batch.state, batch.by_prompt(drawn).to(policy.device), batch.cache)
            logits = policy.logits(hidden[:, :, -1].flatten(0, 1))
    return Replies(
        token_ids=tuple(tuple(row[:length]) for row, length in zip(tokens.tolist(), lengths, strict=True)),
        logprobs=tuple(tuple(row[:length]) for row, length in zip(logprobs.tolist(), lengths, strict=True)),
    )


def draw_tokens(logits: Tensor, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row by the inverse of its distribution function.

    Args:
        logits: float32 [R, W].
        uniform: float32 [R] in [0, 1), one draw per row.

    Returns:
        int64 [R] and the log-probabilities float32 [R], see `Replies.logprobs`.
    """
    temperature = sampling.temperature or 1.0
    scores = weights = torch.log_softmax(logits / temperature, -1)
    if sampling.never:
        allowed = logits.index_fill(1, torch.tensor(sampling.never, device=logits.device), float("-inf"))
        weights = torch.log_softmax(allowed / temperature, -1)
    if sampling.temperature == 0.0:
        drawn = weights.argmax(-1, keepdim=True)
    elif sampling.top_p == 1.0:
        drawn = _inverse(weights, uniform)
    else:
        ordered, order = weights.sort(-1, descending=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()  # nothing stands before the likeliest token: it always stays
        drawn = order.gather(1, _inverse(ordered.masked_fill(before >= sampling.top_p, float("-inf")), uniform))
    return drawn[:, 0], scores.gather(1, drawn)[:, 0]


def _inverse(weights: Tensor, uniform: Tensor) -> Tensor:
    """Draws from exp(weights), which need not sum to 1: places, int64 [R, 1]."""
    reached = weights.double().exp().cumsum(-1)
    # The first place whose sum passes the draw has a share above 0: the sum is flat before any other.
    return torch.searchsorted(reached, uniform.double()[:, None] * reached[:, -1:], right=True)


class _Batch:
    """The replies that are still written, [G', n'] of them, with their caches."""

    def __init__(self, state: PromptState, sampling: Sampling) -> None:
        prompts = len(state.next_positions)
        self.state = state
        self.rows = torch.arange(prompts * sampling.num_replies)
        """Which reply stands in each place of the batch."""
        self.running = torch.ones(len(self.rows), dtype=torch.bool)
        """False where a reply has ended and only keeps the batch rectangular."""
        self._heads = state.keys[0].shape[0] // prompts
        self._prompts = prompts
        self.cache = ReplyCache(len(self.rows) * self._heads, sampling.max_new_tokens)

    def by_prompt(self, values: Tensor) -> Tensor:
        """[G' * n'] to [G', n', 1]."""
        return values.view(self._prompts, -1, 1)

    def shrink(self, values: Tensor) -> Tensor:
        """Drops replies that have ended, if that is worth it; returns the others' entries of `values`, [G' * n']."""
        running = self.running.view(self._prompts, -1)
        counts = running.sum(1)
        prompts = counts.nonzero()[:, 0]
        most = int(counts.max())
        if len(prompts) * most > SHRINK_AT * len(self.rows):
            return values
        # Running replies first, then as many ended ones as the fullest prompt needs.
        order = running[prompts].int().argsort(dim=1, descending=True, stable=True)[:, :most]
        replies = running.shape[1]
        kept = (prompts[:, None] * replies + order).flatten()
        device = self.state.keys[0].device
        heads = torch.arange(self._heads)
        cached = (prompts[:, None, None] * self._heads + heads[:, None]) * replies + order[:, None]  # [G', K, n']
        self.cache.keep(cached.flatten().to(device))
        if len(prompts) < self._prompts:
            self.state = self.state.select(prompts.to(device))
        self.rows, self.running, self._prompts = self.rows[kept], self.running[kept], len(prompts)
        return values[kept]

"""One configuration of `speed_accuracy` in a process of its own, whose peak memory is then its own.

A configuration is a bundle, the side of the picture that its policy sees, and what becomes of the reply:

* `free`: the policy says what it wants.
* `think:N`: after N tokens the thinking is closed and the policy goes on with its answer; `think:0` closes it before
  the first. The question is read again for that, which is part of the latency; a thinking that ends earlier is left
  alone. Nothing makes the policy obey: one that has not learnt to do without goes on thinking inside its answer, which
  its tokens and its gIoU then show.
* `tokens:N`: the reply is cut after N tokens, whatever it has come to.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from segzero_rt.answer_format import ANSWER_OPEN, THINK_CLOSE, THINK_OPEN, AnswerFormat
from segzero_rt.bench.child import serve
from segzero_rt.bundle import Bundle
from segzero_rt.dataset import Sample, read_dataset
from segzero_rt.environment import bundle_card, peak_memory_bytes
from segzero_rt.errors import BundleError
from segzero_rt.evaluation import evaluate
from segzero_rt.image import ImageRgb
from segzero_rt.pipeline import SegZero
from segzero_rt.policy import Generation, Policy, View
from segzero_rt.segmentation import Segmentation

FREE, THINK, TOKENS = "free", "think", "tokens"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReplyRule:
    """What becomes of a reply.

    Raises:
        ValueError: not `free`, `think:N` from 0 or `tokens:N` from 1.
    """

    kind: str
    limit: int = 0

    @classmethod
    def parse(cls, text: str) -> ReplyRule:
        kind, colon, number = text.partition(":")
        if kind == FREE and not colon:
            return cls(kind=FREE)
        if kind in (THINK, TOKENS) and number.isascii() and number.isdigit() and int(number) >= (kind == TOKENS):
            return cls(kind=kind, limit=int(number))
        raise ValueError(f"expected {FREE}, {THINK}:N or {TOKENS}:N, got {text!r}")

    def __str__(self) -> str:
        return self.kind if self.kind == FREE else f"{self.kind}:{self.limit}"


class ThinkingCut:
    """A policy whose thinking is closed after some tokens. Everything else is the policy's own."""

    def __init__(self, policy: Policy, limit: int) -> None:
        self._policy, self._limit = policy, limit
        self._opening = policy.chat.reply_start(f"{THINK_OPEN} ")
        self.num_forced = 0
        """Tokens of the last reply that the policy did not choose."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def ask(
        self,
        view: View,
        question: str,
        *,
        answer_format: AnswerFormat | None = None,
        max_new_tokens: int | None = None,
        on_token: Callable[[str], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Generation:
        """As the policy's; `cancelled` is asked while it thinks, `on_token` gets nothing."""
        del on_token
        options: dict[str, Any] = {"answer_format": answer_format, "max_new_tokens": max_new_tokens}
        self.num_forced = 0
        begun, spent = THINK_OPEN, None
        if self._limit:
            pieces: list[str] = []
            asked = 0

            def over() -> bool:
                nonlocal asked
                asked += 1  # asked before each token
                if cancelled is not None and cancelled():
                    return True
                return asked > len(self._opening) + self._limit and THINK_CLOSE not in "".join(pieces)

            spent = self._policy.ask(view, question, on_token=pieces.append, cancelled=over, **options)
            if not spent.cancelled or (cancelled is not None and cancelled()):
                return spent
            begun = spent.text.rstrip()
        start = f"{begun} {THINK_CLOSE}\n{ANSWER_OPEN}"
        reply = self._policy.ask(view, question, reply_start=start, **options)
        # what the policy chose itself in the first round is read again in the second, as part of the start
        chosen = len(spent.token_ids) if spent is not None else 0
        self.num_forced = max(0, len(self._policy.chat.reply_start(start)) - chosen)
        if spent is None:
            return reply
        timings = {name: reply.timings_ms[name] + spent.timings_ms[name] for name in reply.timings_ms}
        return dataclasses.replace(reply, timings_ms=timings)


def with_input_side(bundle: Bundle, side: int) -> Bundle:
    """The bundle with a policy that sees pictures of `side` x `side` pixels; its files stay as they are.

    Raises:
        BundleError: the side is no multiple of a token's, or the picture would leave no room for words.
    """
    policy = bundle.manifest.policy
    token = policy.patch_size * policy.merge_size
    if side < token or side % token:
        raise BundleError(f"expected a side in multiples of {token} pixels, got {side}")
    tokens = (side // token) ** 2
    if tokens >= policy.max_length:
        raise BundleError(f"expected fewer than {policy.max_length} tokens, a side of {side} makes {tokens}")
    changed = dataclasses.replace(policy, input_size_hw=(side, side))
    return Bundle(root=bundle.root, manifest=dataclasses.replace(bundle.manifest, policy=changed))


def load(bundle: Path, side: int, rule: ReplyRule, threads: int | None = None) -> SegZero:
    """The pipeline of a configuration.

    Raises:
        BundleError: see `with_input_side`, or not a bundle.
    """
    opened = with_input_side(Bundle.open(bundle, verify="size"), side)
    pipeline = SegZero.load(opened, backend="cpu", threads=threads)
    if rule.kind == THINK:
        cut = ThinkingCut(pipeline.policy, rule.limit)
        pipeline.policy = cut  # type: ignore[assignment]  # the same calls
    return pipeline


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Asks every question once, one at a time.

    Args:
        settings: "bundle", "side", "reply", "dataset", "questions", "threads".

    Returns:
        `records`, `decode_ms` and `tokens` (of all replies; forced ones are not counted), `load_ms`,
        `peak_memory_bytes`, `bundle_bytes`, `bundle`; a `problem` alone where the graphs do not take the side.
    """
    start = time.perf_counter()
    rule = ReplyRule.parse(settings["reply"])
    pipeline = load(Path(settings["bundle"]), settings["side"], rule, settings["threads"])
    load_ms = (time.perf_counter() - start) * 1e3
    samples = read_dataset(settings["dataset"], limit=settings["questions"])
    budget = rule.limit if rule.kind == TOKENS else None
    decode_ms = tokens = 0.0

    def predict(sample: Sample, image_rgb: ImageRgb) -> Segmentation:
        nonlocal decode_ms, tokens
        result = pipeline(image_rgb, sample.text, max_new_tokens=budget)
        decode_ms += result.timings_ms["decode"]
        tokens += result.decode_counts["tokens"] - getattr(pipeline.policy, "num_forced", 0)
        return result

    for record, _ in evaluate(samples[:2], predict):  # once untimed
        if record.error is not None:
            return {"problem": " ".join(record.error.split())[:300]}
    decode_ms = tokens = 0.0

    def count(text: str) -> int:
        return len(pipeline.policy.chat.reply_start(text))

    records = [record.to_json() for record, _ in evaluate(samples, predict, count_tokens=count)]
    return {
        "records": records,
        "decode_ms": decode_ms,
        "tokens": tokens,
        "load_ms": load_ms,
        "peak_memory_bytes": peak_memory_bytes(),
        "bundle_bytes": pipeline.bundle.num_bytes,
        "bundle": bundle_card(pipeline.bundle),
    }


if __name__ == "__main__":
    serve(measure)

"""Tokens of a reply to what they say, on the device: bytes, status, thinking, prompts in source pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segzero_rt.answer import Answer, Prompt
from segzero_rt.answer_format import AnswerFormat
from segzero_rt.device import DeviceArray
from segzero_rt.kernels.device_kernels import DeviceKernels
from segzero_rt.kernels.parse_prompts import STATUSES
from segzero_rt.kernels.parse_prompts_device import NO_ROOM, PROMPT, REPLY, DeviceParser
from segzero_rt.kernels.reply_text_device import DeviceSpeller
from segzero_rt.policy import Policy
from segzero_rt.resident.arrays import Staging, rows

SLOTS = 8
"""Prompts of a reply that are kept on the device; a reply with more is parsed by the host."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DeviceReading:
    """What a reply says, on its way to the host; read it after a wait."""

    head: NDArray[Any]
    """`REPLY` [1]."""
    prompts: NDArray[Any]
    """`PROMPT` [slots]."""
    reply: bytes

    def answer(self, text: str) -> Answer | None:
        """The answer in a reply of this text; None where it did not fit on the device."""
        status, span, count = (self.head[name][0] for name in ("status", "thinking", "num_prompts"))
        if status == NO_ROOM:
            return None
        prompts = tuple(_prompt(prompt) for prompt in self.prompts[:count])
        thinking = self.reply[slice(*span.tolist())].decode("utf-8", "replace")
        return Answer(status=STATUSES[status], thinking=thinking, prompts=prompts, text=text)


class ReplyReader:
    """Reads replies of one policy, one at a time."""

    def __init__(self, staging: Staging, kernels: DeviceKernels, policy: Policy) -> None:
        self._device, self._staging, self._kernels, self._policy = staging.device, staging, kernels, policy
        tokens = policy.chat.token_bytes()
        tokens += [None] * (policy.manifest.vocab_size - len(tokens))
        self._tokens, device, most = tokens, staging.device, policy.manifest.max_length
        self._speller = DeviceSpeller(kernels, tokens, max_replies=1, max_tokens=most)
        self._counts = device.to_device(np.arange(most + 1, dtype=np.int32))
        self._flags = device.to_device(np.arange(2, dtype=np.uint8))
        self._head, self._prompts = device.pinned((1,), REPLY), device.pinned((SLOTS,), PROMPT)
        self._parsers: dict[AnswerFormat, DeviceParser] = {}
        self._parser(policy.default_format)  # now, not within the first question

    def enqueue(
        self,
        answer_format: AnswerFormat,
        token_ids: DeviceArray,
        num_tokens: int,
        *,
        finished: bool,
        source_size_hw: tuple[int, int],
    ) -> DeviceParser:
        """Enqueues reading a reply.

        Args:
            token_ids: int32 [max_length], the reply's first.
            num_tokens: of the reply, without the one that ended it.
            finished: whether the policy ended it.
            source_size_hw: of the picture.

        Returns:
            What has the reply's `replies` and `prompts`.
        """
        counts = rows(self._counts, num_tokens, num_tokens + 1)
        self._speller.enqueue(token_ids.view((1, len(token_ids))), counts)
        parser = self._parser(answer_format)
        sizes = np.array([[*self._policy.manifest.answer_size_hw, *source_size_hw]], np.int32)
        parser.enqueue(
            self._speller.text,
            self._speller.begins,
            self._speller.ends,
            self._staging.to_device(sizes),
            rows(self._flags, int(finished), int(finished) + 1),
        )
        return parser

    def download(self, parser: DeviceParser, token_ids: tuple[int, ...]) -> DeviceReading:
        """Enqueues bringing what was read to the host, which knows the tokens already."""
        self._device.download(parser.replies.view((1,)), self._head)
        self._device.download(parser.prompts.view((SLOTS,)), self._prompts)
        reply = b"".join(self._tokens[token_id] or b"" for token_id in token_ids)
        return DeviceReading(head=self._head, prompts=self._prompts, reply=reply)

    def _parser(self, answer_format: AnswerFormat) -> DeviceParser:
        if answer_format not in self._parsers:
            self._parsers[answer_format] = DeviceParser(self._kernels, answer_format, slots=SLOTS)
        return self._parsers[answer_format]


def _prompt(prompt: NDArray[Any]) -> Prompt:
    left, top, right, bottom = prompt["box_xyxy"].astype(np.float64).tolist()
    points = prompt["points_xy"][: prompt["num_points"]].astype(np.float64).tolist()
    return Prompt(box_xyxy=(left, top, right, bottom), points_xy=tuple((x, y) for x, y in points))

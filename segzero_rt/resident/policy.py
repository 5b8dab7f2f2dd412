"""The policy on a device: a frame and a question to tokens there, of which the host learns one step late.

look(frame):  frame ─► patches ─► vision graph ─┐ rows of
              prefix tokens ─► embedding ───────┴► embeds
ask(question):  question tokens ─► embedding ─► embeds ─► decoder ─► `reply.py` to the end
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from segzero_rt.answer_format import AnswerFormat
from segzero_rt.constrained import AnswerConstraint
from segzero_rt.device import DeviceArray
from segzero_rt.errors import QuestionError
from segzero_rt.kernels.device_kernels import DeviceKernels
from segzero_rt.kernels.preprocess_device import DeviceFrame, DevicePreprocessor
from segzero_rt.kernels.sample_token_device import DeviceGrammar, DeviceSampler
from segzero_rt.policy import Policy, cache_sizes
from segzero_rt.positions import PictureSpan
from segzero_rt.resident.arrays import Staging, rows
from segzero_rt.resident.cache import ResidentCache
from segzero_rt.resident.reply import LEAD, ResidentReply


@dataclass(kw_only=True, eq=False)
class ResidentView:
    """A picture that the policy has looked at. It serves until the next look: there is one cache."""

    serial: int
    pending: bool
    """Whether the cache still lacks what stands in `embeds`; read together with the first question."""


class ResidentPolicy:
    """A `Policy`'s graphs on one device. Its greedy replies, token by token, without guesses."""

    def __init__(self, policy: Policy, kernels: DeviceKernels, *, lead: int = LEAD) -> None:
        """
        Args:
            policy: whose graphs run in the stream of these kernels' device.
            lead: steps of the decode loop that are enqueued beyond the last token that is known.

        Raises:
            BackendError: the device has no room for the cache.
        """
        self.policy = policy
        device = kernels.device
        self._device, self._staging, self._kernels = device, Staging(device), kernels
        manifest, grid_hw = policy.manifest, policy.preprocessor.grid_hw
        self._picture = PictureSpan(start=len(policy.before_picture), grid_hw=grid_hw)
        sizes = cache_sizes(manifest)
        self.cache = ResidentCache.create(self._staging, policy.decoder, sizes, policy.rotary, self._picture)
        self._embeds = device.empty((manifest.max_length, sizes.hidden_size), "float32")
        self._layout = {name: device.to_device(values) for name, values in policy.layout.inputs().items()}
        tensor = policy.preprocessor.tensor
        self._patches = device.empty(tensor.shape, np.float32)
        self._preprocessor = DevicePreprocessor(kernels, tensor, order=policy.layout.patch_order)
        self._vision: dict[int, Callable[[], None]] = {}
        self.reply = ResidentReply(
            self._staging,
            policy.embedding,
            self.cache,
            max_new_tokens=manifest.max_length,
            end_token_ids=manifest.eos_token_ids,
            lead=lead,
        )
        self._samplers: dict[AnswerFormat | None, DeviceSampler] = {}
        self._sampler(policy.default_format)  # now, not within the first question: a grammar is large
        self._known = 0
        self._serial = 0

    def look(self, frame: DeviceFrame, *, ahead: bool = True) -> ResidentView:
        """Enqueues all that can be done before there is a question; `ahead` as in `Policy.look`."""
        # What stands before every picture is the same for each.
        self._known = self._picture.start if self.cache.length >= self._picture.start else 0
        self.cache.truncate(self._known)
        tokens = self.policy.prefix_tokens[self._known :]
        self._embed(tokens, 0)
        self._preprocessor.enqueue(frame, self._patches)
        self._device.call(self._vision_into(self._picture.start - self._known))
        if ahead:
            self.cache.extend(self._first_embeds(len(tokens)))
        self._serial += 1
        return ResidentView(serial=self._serial, pending=not ahead)

    def ask(
        self,
        view: ResidentView,
        question: str,
        *,
        answer_format: AnswerFormat | None = None,
        max_new_tokens: int | None = None,
        reply_start: str = "",
    ) -> Iterator[int]:
        """Tokens of the reply, each as soon as the host knows it; arguments and errors as in `Policy.ask`.

        Raises:
            QuestionError: another picture has been looked at since.
        """
        if view.serial != self._serial:
            raise QuestionError("expected a question on the latest picture, got one on an earlier; look at it again")
        policy = self.policy
        form = answer_format or policy.default_format
        budget = policy.manifest.max_new_tokens if max_new_tokens is None else max_new_tokens
        if budget < 1:
            raise QuestionError(f"expected a budget of at least 1 new token, got {budget}")
        started = policy.chat.reply_start(reply_start)
        prompt = [*policy.question_tokens(question, form), *started]
        prefix = len(policy.prefix_tokens)
        if prefix + len(prompt) >= self.cache.capacity:
            raise QuestionError(f"expected a reply_start that leaves room, got {len(started)} tokens; shorten it")
        state = AnswerConstraint(policy.grammar(form), started).state if policy.constrained else 0
        waiting = prefix - self._known if view.pending else 0
        if not view.pending:
            self.cache.truncate(prefix)
        self._embed(prompt, waiting)
        self.cache.extend(self._first_embeds(waiting + len(prompt)))
        view.pending = False
        budget = min(budget, self.cache.capacity - self.cache.length + 1)
        return self.reply.tokens(self._sampler(form), budget, state)

    def _embed(self, token_ids: Sequence[int], row: int) -> None:
        """Enqueues the tokens' embeddings into `embeds` from a row on."""
        ids = self._staging.to_device(np.array([token_ids], np.int64))
        target = rows(self._embeds, row, row + len(token_ids))
        batched = target.view((1, *target.shape))
        self._device.call(self.policy.embedding.enqueuer({"input_ids": ids}, {"inputs_embeds": batched}))

    def _first_embeds(self, count: int) -> DeviceArray:
        """float32 [1, count, hidden]."""
        return self._embeds.view((1, count, self._embeds.shape[1]))

    def _vision_into(self, row: int) -> Callable[[], None]:
        """A run of the vision graph that writes the picture's features into `embeds` from a row on."""
        if row not in self._vision:
            target = rows(self._embeds, row, row + self._picture.num_tokens)
            self._vision[row] = self.policy.vision.enqueuer(
                {"patches": self._patches.view((1, *self._patches.shape)), **self._layout},
                {"image_features": target.view((1, *target.shape))},
                fixed=True,
            )
        return self._vision[row]

    def _sampler(self, answer_format: AnswerFormat) -> DeviceSampler:
        """Made once for each format's grammar, or once for all where replies are free."""
        policy = self.policy
        held_to = answer_format if policy.constrained else None
        if held_to not in self._samplers:
            grammar = None if held_to is None else DeviceGrammar(self._device, policy.grammar(held_to))
            vocab_size = policy.manifest.vocab_size
            self._samplers[held_to] = DeviceSampler(self._kernels, 1, vocab_size, grammar=grammar)
        return self._samplers[held_to]

"""`ResidentSegZero`: a frame and a question to masks on one device, with one or two waits of the host.

look(frame)           its own stream: pixels ─► image encoder ─► features ────────────────────────────┐
                      patches ─► vision graph ─► embeds                                               │
ask(look, question)   decode loop ─► bytes ─► parser ─► prompts ─► points ─► mask decoder ◄───────────┘ ─► masks

The host learns the tokens while they are made, and so knows when to enqueue the rest. It enqueues masks for as many
objects as the text seems to name, each with all of its points, and waits once. Where the parser found otherwise those
masks are thrown away and made for the prompts as they are: a second wait.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segzero_rt.answer import Answer, AnswerStatus
from segzero_rt.answer_format import ANSWER_OPEN, AnswerFormat
from segzero_rt.answer_parser import parse_answer
from segzero_rt.chat import TextStream
from segzero_rt.device import DeviceArray, Event
from segzero_rt.image import ImageLike
from segzero_rt.kernels.device_kernels import DeviceKernels
from segzero_rt.kernels.handover import labels_of
from segzero_rt.kernels.handover_device import enqueue_place_prompts
from segzero_rt.kernels.parse_prompts_device import DeviceParser
from segzero_rt.kernels.postprocess_masks_device import DeviceMaskMaker
from segzero_rt.kernels.preprocess_device import DeviceFrame
from segzero_rt.pipeline import as_format, check_question
from segzero_rt.policy import Policy, tell
from segzero_rt.resident.arrays import Staging, rows
from segzero_rt.resident.dlpack import SharedArray
from segzero_rt.resident.frames import as_frame
from segzero_rt.resident.policy import ResidentPolicy, ResidentView
from segzero_rt.resident.reading import SLOTS, ReplyReader
from segzero_rt.resident.segmenter import ResidentEncoder, ResidentMaskDecoder
from segzero_rt.segmentation import Segmentation
from segzero_rt.segmenter import ImageEncoder, MaskDecoder, points_of, prompt_groups
from segzero_rt.segmenter_prompt import SegmenterPrompt


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ResidentLook:
    """A picture that was looked at; it serves until the next look."""

    frame: DeviceFrame
    """Kept with its memory for as long as a stream may read it."""
    view: ResidentView
    encoded: Event
    """Behind the features in their stream."""

    @property
    def size_hw(self) -> tuple[int, int]:
        return self.frame.size_hw


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ResidentSegmentation:
    """An answer with its masks where they were made."""

    masks: SharedArray
    """uint8 [N, H, W] of zeros and ones, in the source picture's size; others take it by DLPack or by its
    `__cuda_array_interface__`."""
    host_masks: NDArray[np.bool_] | None
    """The same on the host, bool; None where they were not asked for."""
    scores: NDArray[np.float32]
    """float32 [N], as in `Segmentation`."""
    answer: Answer
    host_waits: int = 0
    """How often the host waited for the device in this question."""
    decode_counts: dict[str, int] = field(default_factory=dict)
    """`tokens` of the reply, `runs` of the decoder; `pauses` of the host, which cost the device nothing."""
    timings_ms: dict[str, float] = field(default_factory=dict)
    """On the host's clock: "decode" until the reply's end was known, "masks" from there, "total"."""

    def on_host(self) -> Segmentation:
        """The same as `SegZero` gives it.

        Raises:
            ValueError: the masks were not asked for on the host.
        """
        if self.host_masks is None:
            raise ValueError("expected masks on the host, got none; ask with to_host=True")
        boxes = np.array([prompt.box_xyxy for prompt in self.answer.prompts], np.float32).reshape(-1, 4)
        return Segmentation(
            masks=self.host_masks,
            scores=self.scores,
            boxes_xyxy=boxes,
            answer=self.answer,
            timings_ms=self.timings_ms,
            decode_counts={**self.decode_counts, "host_waits": self.host_waits},
        )


class ResidentSegZero:
    """`SegZero`'s graphs on one device."""

    def __init__(
        self,
        policy: Policy,
        encoder: ImageEncoder,
        decoder: MaskDecoder,
        *,
        kernels: DeviceKernels,
        encoder_kernels: DeviceKernels,
    ) -> None:
        """
        Args:
            policy: whose graphs run in the stream of `kernels`, and so does the mask decoder's.
            encoder: whose graph runs in the stream of `encoder_kernels`, another one of the same device.

        Raises:
            BackendError: the device has no room for the buffers.
        """
        self.policy, self._kernels = policy, kernels
        self._device, self._encoder_device = kernels.device, encoder_kernels.device
        self.staging = Staging(self._device)
        """For frames, see `as_frame`."""
        self._resident = ResidentPolicy(policy, kernels)
        self._encoder = ResidentEncoder(encoder, encoder_kernels)
        self._decoder = ResidentMaskDecoder(decoder, self.staging, kernels, self._encoder.features)
        self._latest: ResidentLook | None = None
        self._landings: dict[str, NDArray[Any]] = {}
        self._reader = ReplyReader(self.staging, kernels, policy)

    def __call__(
        self,
        image: ImageLike,
        question: str,
        *,
        answer_format: AnswerFormat | str | None = None,
        max_new_tokens: int | None = None,
        on_token: Callable[[str], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Segmentation:
        """Answers one question about one picture, as `SegZero` does; arguments and errors as there.

        The picture may also be another library's array on the device, see `as_frame`.
        """
        check_question(question)
        self.policy.question_tokens(question, as_format(answer_format))  # before a look at the picture
        look = self.look(as_frame(image, self.staging), ahead=False)
        return self.ask(
            look,
            question,
            answer_format=answer_format,
            max_new_tokens=max_new_tokens,
            on_token=on_token,
            cancelled=cancelled,
            to_host=True,
        ).on_host()

    @property
    def num_host_waits(self) -> int:
        """How often the host has waited for either stream. Callers take differences."""
        return self._device.num_host_waits + self._encoder_device.num_host_waits

    def look(self, frame: DeviceFrame, *, ahead: bool = True) -> ResidentLook:
        """Enqueues all that can be done before there is a question; `ahead` as in `Policy.look`."""
        if self._latest is not None:
            # Its frame's memory may serve again in this stream, once the other has read it.
            self._device.wait_for(self._latest.encoded)
        # And the other stream writes its features anew, once this one has read them.
        encoded = self._encoder.encode(frame, self._device.record())
        look = ResidentLook(frame=frame, view=self._resident.look(frame, ahead=ahead), encoded=encoded)
        self._latest = look
        return look

    def ask(
        self,
        look: ResidentLook,
        question: str,
        *,
        answer_format: AnswerFormat | str | None = None,
        max_new_tokens: int | None = None,
        on_token: Callable[[str], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
        to_host: bool = False,
    ) -> ResidentSegmentation:
        """Answers a question about the latest picture; arguments and errors as in `SegZero.ask`.

        Args:
            to_host: bring the masks to the host as well, within the same waits.
        """
        begun, waits = time.perf_counter(), self.num_host_waits
        check_question(question)
        form = as_format(answer_format) or self.policy.default_format
        tokens = self._resident.ask(look.view, question, answer_format=form, max_new_tokens=max_new_tokens)
        text, said, stopped = self._listen(tokens, on_token, cancelled)
        decoded = time.perf_counter()
        if stopped:
            found = self._cancelled(text, form, look)
        else:
            found = self._segment(text, said, form, look, to_host)
        reply, ended = self._resident.reply, time.perf_counter()
        return replace(
            found,
            host_waits=self.num_host_waits - waits + reply.waits,
            decode_counts={"tokens": reply.num_tokens, "runs": reply.steps, "pauses": reply.pauses},
            timings_ms={
                "decode": (decoded - begun) * 1e3,
                "masks": (ended - decoded) * 1e3,
                "total": (ended - begun) * 1e3,
            },
        )

    def _listen(
        self, tokens: Iterator[int], on_token: Callable[[str], None] | None, cancelled: Callable[[], bool] | None
    ) -> tuple[str, tuple[int, ...], bool]:
        """The reply's text and tokens, and whether the caller stopped it."""
        stream = TextStream(self.policy.chat)
        pieces: list[str] = []
        while not (stopped := cancelled is not None and cancelled()):
            if (token_id := next(tokens, None)) is None:
                break
            tell(stream.push(token_id), pieces, on_token)
        tell(stream.finish(), pieces, on_token)
        return "".join(pieces), stream.token_ids, stopped

    def _parse_here(self, text: str, form: AnswerFormat, look: ResidentLook) -> Answer:
        """As the host reads it."""
        return parse_answer(
            text,
            answer_format=form,
            input_size_hw=self.policy.manifest.answer_size_hw,
            source_size_hw=look.size_hw,
            finished=self._resident.reply.finished,
        )

    def _cancelled(self, text: str, form: AnswerFormat, look: ResidentLook) -> ResidentSegmentation:
        answer = replace(self._parse_here(text, form, look), status=AnswerStatus.CANCELLED, prompts=())
        return self._none(answer, look.size_hw)

    def _none(self, answer: Answer, size_hw: tuple[int, int]) -> ResidentSegmentation:
        return ResidentSegmentation(
            masks=SharedArray(self._device.empty((0, *size_hw), np.uint8)),
            host_masks=np.zeros((0, *size_hw), np.bool_),
            scores=np.zeros(0, np.float32),
            answer=answer,
        )

    def _segment(
        self, text: str, said: tuple[int, ...], form: AnswerFormat, look: ResidentLook, to_host: bool
    ) -> ResidentSegmentation:
        reply, labels = self._resident.reply, labels_of(form.max_points)
        parser = self._reader.enqueue(
            form, reply.token_ids, reply.num_tokens, finished=reply.finished, source_size_hw=look.size_hw
        )
        self._device.wait_for(look.encoded)
        expected = _objects_in(text)
        masks, scores = self._placed_masks(parser, expected, labels, look.size_hw)
        brought = self._download(masks, scores, to_host)
        reading = self._reader.download(parser, said)
        self._device.synchronize()
        answer = reading.answer(text) or self._parse_here(text, form, look)
        count = len(answer.prompts)
        if not count:
            return self._none(answer, look.size_hw)
        if count > expected or any(len(prompt.points_xy) != form.max_points for prompt in answer.prompts):
            return self._again(answer, look.size_hw, to_host)
        return _brought(answer, rows(masks, 0, count), brought)

    def _placed_masks(
        self, parser: DeviceParser, count: int, labels: tuple[int, ...], size_hw: tuple[int, int]
    ) -> tuple[DeviceArray, DeviceArray]:
        """Enqueues masks for the first prompts of what was parsed, however many there are."""
        if not count:
            return self._device.empty((0, *size_hw), np.uint8), self._device.empty((0,), np.float32)
        enqueue_place_prompts(
            self._kernels,
            parser.replies.view((1,)),
            parser.prompts.view((count,)),
            input_size_hw=self._decoder.manifest.input_size_hw,
            source_size_hw=size_hw,
            points_xy=self._decoder.points_xy(count, labels),
        )
        return self._masks(count, labels, size_hw)

    def _again(self, answer: Answer, size_hw: tuple[int, int], to_host: bool) -> ResidentSegmentation:
        """Masks for prompts that are known, in as many runs as they have different labels."""
        prompts, device = [SegmenterPrompt.of(prompt) for prompt in answer.prompts], self._device
        masks = device.empty((len(prompts), *size_hw), np.uint8)
        scores = device.empty((len(prompts),), np.float32)
        for members in prompt_groups(prompts):
            group = [prompts[index] for index in members]
            self.staging.upload(
                points_of(group, self._decoder.manifest.input_size_hw, size_hw),
                self._decoder.points_xy(len(group), group[0].labels),
            )
            some_masks, some_scores = self._masks(len(group), group[0].labels, size_hw)
            for place, index in enumerate(members):
                device.copy(rows(some_masks, place, place + 1), rows(masks, index, index + 1))
                device.copy(rows(some_scores, place, place + 1), rows(scores, index, index + 1))
        brought = self._download(masks, scores, to_host)
        device.synchronize()
        return _brought(answer, masks, brought)

    def _masks(self, count: int, labels: tuple[int, ...], size_hw: tuple[int, int]) -> tuple[DeviceArray, DeviceArray]:
        """Enqueues masks uint8 [count, H, W] and scores float32 [count] for what lies in the decoder's points."""
        device = self._device
        logits = device.empty((count, *self._decoder.manifest.mask_size_hw), np.float32)
        scores = device.empty((count,), np.float32)
        self._decoder.decode(count, labels, logits=logits, scores=scores)
        maker = DeviceMaskMaker(
            self._kernels, (count, *self._decoder.manifest.mask_size_hw), size_hw, run_lengths=False
        )
        maker.enqueue(logits)
        return maker.masks, scores

    def _download(self, masks: DeviceArray, scores: DeviceArray, to_host: bool) -> _Brought:
        """Enqueues the copies; read them after a wait."""
        brought = _Brought(
            scores=self._landing("scores", scores.shape, np.float32),
            masks=self._landing("masks", masks.shape, np.uint8) if to_host else None,
        )
        self._device.download(scores, brought.scores)
        if brought.masks is not None:
            self._device.download(masks, brought.masks)
        return brought

    def _landing(self, name: str, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
        """Page-locked memory for one kind of result, kept from question to question: to lock it takes long."""
        count = math.prod(shape)
        if name not in self._landings or self._landings[name].size < count:
            self._landings[name] = self._device.pinned((count,), dtype)
        return self._landings[name][:count].reshape(shape)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Brought:
    """What comes to the host, page-locked."""

    scores: NDArray[np.float32]
    masks: NDArray[np.uint8] | None


def _objects_in(text: str) -> int:
    """How many objects the answer seems to name, up to `SLOTS`: a guess that costs no wait where it is right."""
    return min(SLOTS, text.count("{", max(0, text.rfind(ANSWER_OPEN))))


def _brought(answer: Answer, masks: DeviceArray, brought: _Brought) -> ResidentSegmentation:
    count = len(answer.prompts)
    return ResidentSegmentation(
        masks=SharedArray(masks),
        host_masks=None if brought.masks is None else np.array(brought.masks[:count], np.bool_),
        scores=np.array(brought.scores[:count]),
        answer=answer,
    )

"""`SegZero`: a picture and a question to thinking and masks.

look(picture)        ImageEncoder starts in its own thread ─────────────┐
                     Policy takes the picture in                        │
ask(look, question)  Policy answers ─► parser ─► prompts ─► MaskDecoder ◄┘ ─► Segmentation
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from segzero_rt.answer import Answer, AnswerStatus, Prompt
from segzero_rt.answer_format import FORMATS, AnswerFormat
from segzero_rt.answer_parser import parse_answer
from segzero_rt.bundle import Bundle
from segzero_rt.engines.record import TARGETS
from segzero_rt.errors import PromptError, QuestionError
from segzero_rt.graph import Backend, Stop, default_threads, resolve_backend
from segzero_rt.image import MAX_PIXELS, ImageLike, ImageRgb, as_image
from segzero_rt.kernels.backend import resolve_kernels
from segzero_rt.mask import tight_boxes
from segzero_rt.policy import Generation, Policy, View, is_small_decoder
from segzero_rt.segmentation import Segmentation
from segzero_rt.segmenter import ImageEmbedding, ImageEncoder, MaskDecoder
from segzero_rt.segmenter_prompt import SegmenterPrompt


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """A picture that has been looked at once, for any number of questions, one at a time."""

    image_rgb: ImageRgb
    view: View
    embedding: Callable[[], tuple[ImageEmbedding, float]]
    """Waits for the segmenter's embedding; gives it with the milliseconds that it took."""
    abandon: Callable[[], None]
    """Stops the work on the embedding, which nothing may ask for afterwards."""


class SegZero:
    """The whole of it. `SegZero.load(bundle)(image, "question")` gives a `Segmentation`."""

    def __init__(self, bundle: Bundle, policy: Policy, encoder: ImageEncoder, decoder: MaskDecoder) -> None:
        self.bundle, self.policy, self.encoder, self.decoder = bundle, policy, encoder, decoder
        # One frame at a time is encoded beside the policy; with a single core that would only slow both down.
        self._thread = ThreadPoolExecutor(1, "image-encoder") if default_threads() > 1 else None

    @classmethod
    def load(
        cls,
        bundle: Bundle | str | os.PathLike[str] | None = None,
        *,
        backend: str | Backend = "auto",
        threads: int | None = None,
        allow_ungated: bool = False,
        draft_tokens: int | None = None,
        constrained: bool = False,
    ) -> SegZero:
        """Opens a bundle, checks it and loads its graphs.

        Args:
            bundle: an opened bundle, a folder, or None for the embedded `tabletop`.
            backend: "auto", "cpu", "cuda", ...; a forced backend that is not there is an error. "tensorrt" and
                "tensorrt-rtx" run the engines that `segzero build` put into the bundle.
            threads: CPU threads of each graph. By default each takes the cores of this process; with a small policy,
                both decoders take one, and the picture's encoder the others.
            allow_ungated: take engines that were never compared with their reference.
            draft_tokens: guesses that the policy checks in one run, 0 for none; see `Policy.load`.
            constrained: hold replies to their format's grammar; see `Policy.load`.

        Raises:
            BundleError: not a bundle, or damaged.
            BackendError: the backend is not installed, or a forced build of the kernels cannot be had.
            GraphError: a graph differs from its spec.
            EngineError: the bundle has no engine that may run here.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        resolved = _resolve(backend, opened, allow_ungated)
        resolve_kernels()  # now, not in the first question: it may compile, or say that a forced build is not there
        policy = Policy.load(
            opened, backend=resolved, threads=threads, draft_tokens=draft_tokens, constrained=constrained
        )
        beside, last = threads, threads
        if threads is None and is_small_decoder(opened.file(opened.manifest.policy.graphs.decoder)):
            beside = max(1, default_threads() - 1)  # one core is the policy's, which answers at the same time
            last = 1  # as for the policy's decoder: waking threads would cost more than they save
        encoder = ImageEncoder.load(opened, backend=resolved, threads=beside)
        return cls(opened, policy, encoder, MaskDecoder.load(opened, backend=resolved, threads=last))

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
        """Answers one question about one picture.

        Args:
            image: uint8 [H, W, 3] RGB, a path, or the bytes of a picture file.
            question: what to find, in words.
            answer_format: a name of `FORMATS` or a format; the bundle's by default.
            max_new_tokens: budget of the answer; the bundle's by default.
            on_token: gets the text piece by piece while it is written.
            cancelled: asked before each token; True ends the answer with status `cancelled`.

        Raises:
            ImageError: the picture cannot be read or has another layout.
            QuestionError: the question is empty or too long. What the policy says never raises: see `status`.
        """
        start = time.perf_counter()
        image_rgb = as_image(image)
        check_question(question)
        # A question that does not fit the context must not cost a look at the picture first.
        self.policy.question_tokens(question, as_format(answer_format))
        look = self._look(image_rgb, ahead=False)
        result = self.ask(
            look,
            question,
            answer_format=answer_format,
            max_new_tokens=max_new_tokens,
            on_token=on_token,
            cancelled=cancelled,
        )
        if not result.answer.prompts:
            look.abandon()  # the next picture's embedding must not wait for one that nobody reads
        first = {name: look.view.timings_ms[name] for name in ("preprocess", "vision")}
        prefill = look.view.timings_ms["prefix"] + result.timings_ms["prefill"]
        return replace(
            result, timings_ms=first | dict(result.timings_ms) | {"prefill": prefill, "total": _since(start)}
        )

    def look(self, image: ImageLike) -> Look:
        """Takes a picture in once: the policy's prefix, and the segmenter's embedding in its own thread.

        Raises:
            ImageError: the picture cannot be read or has another layout.
        """
        return self._look(as_image(image), ahead=True)

    def _look(self, image_rgb: ImageRgb, *, ahead: bool) -> Look:
        embedding, abandon = self._embed(image_rgb)
        view = self.policy.look(image_rgb, ahead=ahead)
        return Look(image_rgb=image_rgb, view=view, embedding=embedding, abandon=abandon)

    def ask(
        self,
        look: Look,
        question: str,
        *,
        answer_format: AnswerFormat | str | None = None,
        max_new_tokens: int | None = None,
        on_token: Callable[[str], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Segmentation:
        """Answers a question about a picture that was looked at; arguments and errors as in `__call__`."""
        start = time.perf_counter()
        check_question(question)
        chosen = as_format(answer_format) or self.policy.default_format
        generation = self.policy.ask(
            look.view,
            question,
            answer_format=chosen,
            max_new_tokens=max_new_tokens,
            on_token=on_token,
            cancelled=cancelled,
        )
        parsing = time.perf_counter()
        answer = self._parse(generation, chosen, look.image_rgb)
        timings_ms = {
            "prefill": generation.timings_ms["question"],
            "decode": generation.timings_ms["decode"],
            "parse": _since(parsing),
        }
        result = self._segment(look.image_rgb, look.embedding, answer, timings_ms, start)
        return replace(result, decode_counts={"tokens": len(generation.token_ids), **asdict(generation.counts)})

    def segment(
        self, image: ImageLike, prompts: Sequence[Prompt | SegmenterPrompt], *, multimask: bool = True
    ) -> Segmentation:
        """The segmenter alone, for prompts given by hand.

        Args:
            image: uint8 [H, W, 3] RGB, a path, or the bytes of a picture file.
            prompts: boxes, points on and off each object, rough masks.
            multimask: take the best of the three readings of an ambiguous prompt; False prefers the single one.

        Returns:
            The answer holds the prompts as they were given; for one without a box, its mask's box, or where nothing
            was found the picture's.

        Raises:
            ImageError: the picture cannot be read or has another layout.
            PromptError: no prompt, one whose box or point lies outside the picture, or a mask that the bundle does not
                take.
        """
        start = time.perf_counter()
        image_rgb = as_image(image)
        asked = [SegmenterPrompt.of(prompt) for prompt in prompts]
        _check_prompts(asked, image_rgb)
        waiting = time.perf_counter()
        encoded, encode_ms = self._embed(image_rgb)[0]()
        decoding = time.perf_counter()
        predicted = self.decoder(encoded, asked, multimask=multimask)
        boxes = [_box(prompt, mask) for prompt, mask in zip(asked, predicted.masks, strict=True)]
        given = tuple(
            Prompt(box_xyxy=box, points_xy=prompt.points_xy) for box, prompt in zip(boxes, asked, strict=True)
        )
        return Segmentation(
            masks=predicted.masks,
            scores=predicted.scores,
            boxes_xyxy=np.array(boxes, np.float32),
            answer=Answer(status=AnswerStatus.OK, prompts=given),
            timings_ms={
                "mask_encode": encode_ms,
                "mask_wait": (decoding - waiting) * 1e3,
                "mask_decode": _since(decoding),
                "total": _since(start),
            },
        )

    def _embed(self, image_rgb: ImageRgb) -> tuple[Callable[[], tuple[ImageEmbedding, float]], Callable[[], None]]:
        """Two calls: wait for the embedding, and give it up."""
        stop = Stop()

        def encode() -> tuple[ImageEmbedding, float]:
            start = time.perf_counter()
            return self.encoder(image_rgb, stop=stop), _since(start)

        if self._thread is None:
            return functools.cache(encode), stop  # on the first call, and not at all when nothing is found
        image_rgb = image_rgb.copy()  # a camera loop may write its next frame into the array while this one is encoded
        return self._thread.submit(encode).result, stop

    def _parse(self, generation: Generation, answer_format: AnswerFormat, image_rgb: ImageRgb) -> Answer:
        answer = parse_answer(
            generation.text,
            answer_format=answer_format,
            input_size_hw=self.policy.manifest.answer_size_hw,
            source_size_hw=(image_rgb.shape[0], image_rgb.shape[1]),
            finished=generation.finished,
        )
        return replace(answer, status=AnswerStatus.CANCELLED, prompts=()) if generation.cancelled else answer

    def _segment(
        self,
        image_rgb: ImageRgb,
        embedding: Callable[[], tuple[ImageEmbedding, float]],
        answer: Answer,
        timings_ms: dict[str, float],
        start: float,
    ) -> Segmentation:
        size_hw = (image_rgb.shape[0], image_rgb.shape[1])
        if not answer.prompts:
            return Segmentation.empty(answer, size_hw, timings_ms | {"total": _since(start)})
        waiting = time.perf_counter()
        encoded, encode_ms = embedding()
        decoding = time.perf_counter()
        predicted = self.decoder(encoded, answer.prompts)
        return Segmentation(
            masks=predicted.masks,
            scores=predicted.scores,
            boxes_xyxy=np.array([prompt.box_xyxy for prompt in answer.prompts], np.float32),
            answer=answer,
            timings_ms=timings_ms
            | {
                "mask_encode": encode_ms,
                "mask_wait": (decoding - waiting) * 1e3,
                "mask_decode": _since(decoding),
                "total": _since(start),
            },
        )


def _resolve(backend: str | Backend, bundle: Bundle, allow_ungated: bool) -> Backend:
    if isinstance(backend, Backend):
        return backend
    if backend in TARGETS:
        from segzero_rt.engines.graph import EngineBackend  # pycuda and a library that others have not installed

        return EngineBackend.open(bundle, backend, allow_ungated=allow_ungated)
    return resolve_backend(backend)


def _since(start: float) -> float:
    return (time.perf_counter() - start) * 1e3


def check_question(question: object) -> None:
    """What holds for every policy; whether a question fits the context is the policy's to say."""
    if not isinstance(question, str) or not question.strip():
        raise QuestionError(f"expected a question in words, got {str(question)[:40]!r}; say what to look for")


def as_format(chosen: AnswerFormat | str | None) -> AnswerFormat | None:
    if isinstance(chosen, str):
        if chosen not in FORMATS:
            raise QuestionError(f"expected an answer format of {', '.join(FORMATS)}, got {chosen[:40]!r}")
        return FORMATS[chosen]
    return chosen


def _check_prompts(prompts: Sequence[SegmenterPrompt], image_rgb: ImageRgb) -> None:
    height, width = image_rgb.shape[:2]
    if not prompts:
        raise PromptError("expected at least one box, got none")
    for prompt in prompts:
        if prompt.box_xyxy is not None:
            left, top, right, bottom = prompt.box_xyxy
            beyond = max(map(abs, prompt.box_xyxy)) > MAX_PIXELS  # no picture is that long, and float32 has an end
            if beyond or left >= width or top >= height or right <= 0 or bottom <= 0:
                raise PromptError(f"expected a box inside the picture of {width}x{height}, got {prompt.box_xyxy}")
        for x, y in (*prompt.points_xy, *prompt.outside_xy):
            if not (0 <= x < width and 0 <= y < height):
                raise PromptError(f"expected a point inside the picture of {width}x{height}, got {(x, y)}")


def _box(prompt: SegmenterPrompt, mask: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """The prompt's box, else the mask's, else the picture's."""
    if prompt.box_xyxy is not None:
        return prompt.box_xyxy
    height, width = mask.shape
    left, top, right, bottom = tight_boxes(mask[None])[0].tolist() if mask.any() else (0, 0, width, height)
    return left, top, right, bottom

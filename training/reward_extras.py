"""Rewards beyond the papers, each optional: a preset that wants one names it.

    rewards = (*vision_reasoner_rewards(mode="tolerant"), abstention_reward(), empty_thinking_penalty())

abstention: the papers give `[]` nothing, right or wrong, so "there is no such object" is never learnt.
empty_thinking: an empty think block costs nothing in the originals (Seg-Zero issues #88 and #117).
closeness: accuracy without thresholds, in the place of VisionReasoner's `accuracy`.
brevity: accuracy first, then fewer tokens: a bonus for short thinking that only right answers get, and that is worth
    less than any criterion of accuracy.
mask_iou: the frozen segmenter's mask against the true one, as the evaluation scores it; needs masks in the rows.

All read the answer with the runtime's parser in the mode that is named.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segzero_rt.answer import Answer, AnswerStatus
from segzero_rt.answer_format import VISION_REASONER, AnswerFormat
from segzero_rt.answer_parser import ParseMode, parse_answer
from segzero_rt.bundle import Bundle
from segzero_rt.errors import DatasetError, ImageError
from segzero_rt.image import ImageRgb, as_image
from segzero_rt.mask import decode_rle, mask_iou
from segzero_rt.segmenter import ImageEmbedding, ImageEncoder, MaskDecoder

from .reward_geometry import MIN_BOX_IOU, NUM_CRITERIA, matched_score, pair_closeness, vision_reasoner_ious
from .reward_readings import parsed_answer
from .rewards import Case, Reward, list_accuracy
from .rows import IMAGE

_WORD = re.compile(r"\w+")
_TOKEN = re.compile(r"\w+|[^\w\s]")
_CACHED_PICTURES = 8  # the completions of a group follow one another


def abstention_reward(
    *, family: AnswerFormat = VISION_REASONER, mode: ParseMode = "tolerant", value: float | None = None
) -> Reward:
    """`value` for saying "there is no such object" where there is none; 0 for saying it wrongly, and for inventing one.

    By default `value` is what the family's other terms give a perfect answer but not this one (format and accuracy), so
    that both kinds of rows can earn the same.
    """
    most = value if value is not None else NUM_CRITERIA + (2.0 if family.multiple else 1.0)
    rule = functools.partial(_abstention, family=family, mode=mode, value=most)
    return Reward(name="abstention", rule=rule, maximum=most)


def empty_thinking_penalty(
    *,
    family: AnswerFormat = VISION_REASONER,
    mode: ParseMode = "tolerant",
    min_words: int = 3,
    cost: float = 1.0,
) -> Reward:
    """Minus `cost` for a thinking of fewer than `min_words` words, else 0. Marks are no words."""
    rule = functools.partial(_empty_thinking, family=family, mode=mode, min_words=min_words, cost=cost)
    return Reward(name="empty_thinking", rule=rule, maximum=0)


def closeness_reward(*, mode: ParseMode = "tolerant") -> Reward:
    """0 … 3, for lists: what `accuracy` asks, by degrees (`pair_closeness`), so that chance in digits weighs less."""
    rule = functools.partial(list_accuracy, mode=mode, of_pairs=pair_closeness)
    return Reward(name="closeness", rule=rule, maximum=NUM_CRITERIA)


def brevity_reward(
    *,
    budget: int,
    floor: int = 4,
    most: float = 0.5,
    family: AnswerFormat = VISION_REASONER,
    mode: ParseMode = "tolerant",
    count_tokens: Callable[[str], int] | None = None,
) -> Reward:
    """Up to `most` over the number of objects for a short thinking, if the answer is right (`is_right`); else 0.

    Accuracy comes first: among right answers a criterion of accuracy is worth 1 over the number of objects, so with
    `most` below 1 no brevity makes up for one. `empty_thinking_penalty` beside it keeps the thinking from vanishing.

    The bonus falls with the logarithm of the tokens, so halving a thinking is worth the same however long it was: a
    straight line, steep enough to shorten a thinking of ten tokens, has nothing left to give where questions about
    relations and several objects take fifteen to twenty, and those stay as they are.

    Args:
        budget: tokens of thinking from which on there is nothing to earn.
        floor: tokens up to which the bonus is whole; below, being shorter earns nothing.
        most: bonus for one object, below 1.
        family: whose answers are read.
        mode: how.
        count_tokens: tokens of a text, the policy's tokenizer for one; words and marks by default.

    Raises:
        ValueError: not 1 <= floor < budget, or `most` outside 0 … 1.
    """
    if not 1 <= floor < budget or not 0 < most < 1:
        raise ValueError(f"expected 1 <= floor < budget and 0 < most < 1, got {floor}, {budget} and {most}")
    rule = functools.partial(
        _brevity, budget=budget, floor=floor, most=most, family=family, mode=mode, count=count_tokens or count_marks
    )
    return Reward(name="brevity", rule=rule, maximum=most)


def mask_iou_reward(
    bundle: str | PathLike[str] | None = None,
    *,
    family: AnswerFormat = VISION_REASONER,
    mode: ParseMode = "tolerant",
    threads: int | None = 1,
) -> Reward:
    """0 … 1: IoU of the segmenter's masks for the answer with the true ones; without true objects, 1 for abstaining.

    The segmenter is that of a bundle (the embedded one by default) and runs on ONNX Runtime: it takes no memory of the
    training framework and cannot be trained. It is loaded at the first score, once a process.
    """
    rule = SegmenterIou(bundle, family=family, mode=mode, threads=threads)
    return Reward(name="mask_iou", rule=rule, maximum=1)


def is_right(case: Case, *, family: AnswerFormat, mode: ParseMode) -> bool:
    """Whether the answer names as many objects as there are, each box with IoU > 0.5 of its own; `[]` for none."""
    answer = parsed_answer(case.text, family, mode, case.input_size_hw)
    if not case.objects:
        return answer.status is AnswerStatus.NONE_FOUND
    if len(answer.prompts) != len(case.objects):
        return False
    boxes = np.array([prompt.box_xyxy for prompt in answer.prompts], np.float64)
    true_boxes = np.array([one.box_xyxy for one in case.objects], np.float64)
    return matched_score((vision_reasoner_ious(boxes, true_boxes) > MIN_BOX_IOU).astype(np.float64)) == 1


def count_marks(text: str) -> int:
    """Words and punctuation marks: what a tokenizer makes of plain text, roughly."""
    return len(_TOKEN.findall(text))


class SegmenterIou:
    """The rule of `mask_iou_reward`. Pickles without its graphs, which are loaded again where it is used."""

    def __init__(
        self,
        bundle: str | PathLike[str] | None = None,
        *,
        family: AnswerFormat = VISION_REASONER,
        mode: ParseMode = "tolerant",
        threads: int | None = 1,
    ) -> None:
        self._bundle = None if bundle is None else Path(bundle)
        self._family, self._mode, self._threads = family, mode, threads
        self._graphs: tuple[ImageEncoder, MaskDecoder] | None = None
        self._seen: OrderedDict[str, ImageEmbedding] = OrderedDict()

    def __call__(self, case: Case) -> float:
        """Scores one completion.

        Raises:
            ValueError: the data set has no picture column.
            DatasetError: a picture that does not load, an object without a mask, or of another size than the picture.
        """
        if not case.objects:
            answer = parsed_answer(case.text, self._family, self._mode, case.input_size_hw)
            return float(answer.status is AnswerStatus.NONE_FOUND)
        truth = _true_mask(case)
        answer = self._read(case, (truth.shape[0], truth.shape[1]))
        if not answer.prompts:
            return 0.0
        embedding = self._look(case, (truth.shape[0], truth.shape[1]))
        _, decoder = self._loaded()
        predicted = decoder(embedding, answer.prompts).masks.any(axis=0)
        return mask_iou(np.asarray(predicted, np.bool_), truth)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_graphs": None, "_seen": OrderedDict()}

    def _read(self, case: Case, source_size_hw: tuple[int, int]) -> Answer:
        return parse_answer(
            case.text,
            answer_format=self._family,
            input_size_hw=case.input_size_hw,
            source_size_hw=source_size_hw,
            mode=self._mode,
        )

    def _loaded(self) -> tuple[ImageEncoder, MaskDecoder]:
        if self._graphs is None:
            opened = Bundle.open(self._bundle)
            self._graphs = (
                ImageEncoder.load(opened, threads=self._threads),
                MaskDecoder.load(opened, threads=self._threads),
            )
        return self._graphs

    def _look(self, case: Case, size_hw: tuple[int, int]) -> ImageEmbedding:
        by_path = isinstance(case.image, (str, Path))
        image_rgb = None if by_path else _picture(case)
        key = str(case.image) if image_rgb is None else hashlib.sha256(image_rgb.tobytes()).hexdigest()
        if key in self._seen and self._seen[key].size_hw == size_hw:
            self._seen.move_to_end(key)
            return self._seen[key]
        image_rgb = _picture(case) if image_rgb is None else image_rgb
        if image_rgb.shape[:2] != size_hw:
            raise DatasetError(
                f"row {case.row_id!r:.60}: expected the picture in the masks' size {size_hw}, got "
                f"{image_rgb.shape[:2]}; give this reward the stored picture, not the resized one"
            )
        self._seen[key] = self._loaded()[0](image_rgb)
        if len(self._seen) > _CACHED_PICTURES:
            self._seen.popitem(last=False)
        return self._seen[key]


def _abstention(case: Case, *, family: AnswerFormat, mode: ParseMode, value: float) -> float:
    if case.objects:
        return 0.0
    answer = parsed_answer(case.text, family, mode, case.input_size_hw)
    return value if answer.status is AnswerStatus.NONE_FOUND else 0.0


def _empty_thinking(case: Case, *, family: AnswerFormat, mode: ParseMode, min_words: int, cost: float) -> float:
    thinking = parsed_answer(case.text, family, mode, case.input_size_hw).thinking
    return -cost if len(_WORD.findall(thinking)) < min_words else 0.0


def _brevity(
    case: Case,
    *,
    budget: int,
    floor: int,
    most: float,
    family: AnswerFormat,
    mode: ParseMode,
    count: Callable[[str], int],
) -> float:
    if not is_right(case, family=family, mode=mode):
        return 0.0
    spent = count(parsed_answer(case.text, family, mode, case.input_size_hw).thinking)
    share = min(1.0, max(0.0, math.log(budget / max(spent, floor)) / math.log(budget / floor)))
    return most * share / max(1, len(case.objects))


def _true_mask(case: Case) -> NDArray[np.bool_]:
    masks = []
    for index, one in enumerate(case.objects):
        if one.mask_rle is None:
            raise DatasetError(f"row {case.row_id!r:.60}: objects[{index}]: expected a mask for mask_iou, got none")
        try:
            masks.append(decode_rle(one.mask_rle))
        except ValueError as error:
            raise DatasetError(f"row {case.row_id!r:.60}: objects[{index}]: {error}") from error
        if masks[-1].shape != masks[0].shape or not masks[-1].any():
            raise DatasetError(
                f"row {case.row_id!r:.60}: objects[{index}]: expected masks of one size with pixels, got "
                f"{masks[-1].shape} with {np.count_nonzero(masks[-1])} beside {masks[0].shape}"
            )
    return np.asarray(np.any(masks, axis=0), np.bool_)


def _picture(case: Case) -> ImageRgb:
    image = case.image
    if image is None:
        raise ValueError(f"expected column `{IMAGE}` for mask_iou, the data set has none")
    if isinstance(image, Mapping):  # an undecoded picture of the `datasets` library
        image = image.get("bytes") or image.get("path")
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"), np.uint8)
    if not isinstance(image, (str, bytes, PathLike, np.ndarray)):
        raise DatasetError(f"row {case.row_id!r:.60}: expected a picture, got {type(image).__name__}")
    try:
        return as_image(image)
    except ImageError as error:
        raise DatasetError(f"row {case.row_id!r:.60}: {error}") from error

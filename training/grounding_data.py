"""Packed training batches: many questions on each cached picture, with labels for the text and for the read-outs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from segzero_rt.answer_format import SEG_ZERO, SYSTEM_PROMPT, THINK_OPEN, VISION_REASONER, AnswerFormat, AnswerObject

from .brief_thoughts import told_briefly
from .draws import pick
from .object_kinds import COLOURS, KINDS
from .phrases import article_name, where
from .policy_model import GRID, INPUT_SIDE, Layout
from .questions import ATTRIBUTE, NAME, NONE, RELATION, SEVERAL, Asker, Question
from .scene_cache import OWNER_GRID, CachedObject, SceneCache
from .tokenizer import OBJECT_STARTS, control_id
from .visual_questions import ask_about_picture, ask_about_world, think_about_world

IGNORED = -100
CELLS = GRID * GRID
SIZE_HW = (INPUT_SIDE, INPUT_SIDE)
KIND_INDEX = {kind: number for number, kind in enumerate(KINDS)}
COLOUR_INDEX = {colour: number for number, colour in enumerate(COLOURS)}

SHORT, LONG, EVERYTHING, PLAIN = 80, 152, 310, 36
"""Token budgets of a question: one object or none, several, all objects of the picture, plain text answers."""

SHORT_KINDS = (NAME, ATTRIBUTE, RELATION, NONE)
SHORT_SHARES = (0.22, 0.23, 0.28, 0.27)

THOUGHT_SHARE = 0.5
"""Of the text-only questions, those that are answered by the first sentence of a thinking."""
THOUGHT_BESIDE_SHARE = 0.16
"""Of the short questions on a picture, those that world knowledge answers: what comes to mind first, and no box. The
picture has no say in it, since what is meant is drawn without looking: knowledge must be at hand there too."""
WORLD_SHARE = 0.4
"""Of the short questions on a picture, those about what things are for: knowledge must be at hand beside a picture."""

SINGLE_FORMAT_SHARE = 0.15
"""Share of questions asked in Seg-Zero's single-object format."""
SWAPPED_THINKING_SHARE = 0.12
"""Share of questions whose thinking names another object, with that object's answer and no loss on the thinking: it
teaches that the answer follows the thinking, whatever was asked."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Shapes: B pictures, S packed tokens, V = 100 cells, Q pointers, R boxes."""

    pixels: Tensor
    """uint8 [B, 280, 280, 3]."""
    token_ids: Tensor
    """int64 [B, S]."""
    labels: Tensor
    """int64 [B, S], the next token, or -100 where nothing is learnt."""
    cell_kinds: Tensor
    """int64 [B, V], index into KINDS, its length = table."""
    cell_colours: Tensor
    cell_boxes: Tensor
    """float32 [B, V, 4], box of the cell's object in [0, 1]; NaN on the table."""
    pointer_at: Tensor
    """int64 [Q, 2]: picture, token that must point."""
    pointer_to: Tensor
    """float32 [Q, V + 1]: distribution over cells; the last entry stands for `nothing`."""
    box_at: Tensor
    """int64 [R, 2]: picture, token after which the coordinates follow."""
    box_to: Tensor
    """float32 [R, 4], xyxy in [0, 1]."""
    watch_at: Tensor
    """int64 [W, 3]: picture, token that should look at an object, first token of its question."""
    watch_to: Tensor
    """float32 [W, V]: distribution over the object's cells."""
    number_at: Tensor
    """int64 [N, 2]: picture, token before a digit of a coordinate."""
    number_to: Tensor
    """int64 [N]: the whole coordinate that the digit belongs to, in pixels."""


@dataclass
class _Segment:
    token_ids: list[int]
    num_prompt: int
    targets: tuple[int, ...]
    silent: tuple[int, int] = (0, 0)
    """Token range without loss: swapped thinking."""
    grounded: bool = True


@dataclass
class _Rows:
    pointer_at: list[tuple[int, int]] = field(default_factory=list)
    pointer_to: list[NDArray[np.float32]] = field(default_factory=list)
    box_at: list[tuple[int, int]] = field(default_factory=list)
    box_to: list[tuple[float, float, float, float]] = field(default_factory=list)
    watch_at: list[tuple[int, int, int]] = field(default_factory=list)
    watch_to: list[NDArray[np.float32]] = field(default_factory=list)
    number_at: list[tuple[int, int]] = field(default_factory=list)
    number_to: list[int] = field(default_factory=list)


class GroundingData:
    """Draws packed batches from a cache, deterministically from its own generator."""

    def __init__(
        self, cache: SceneCache, tokenizer: Tokenizer, split: str = "train", *, brief_share: float = 0.0
    ) -> None:
        """`brief_share`: how many of the thoughts are told in fewer words."""
        self.cache, self.tokenizer, self.split, self.brief_share = cache, tokenizer, split, brief_share
        self.end = control_id(tokenizer, "<|im_end|>")
        self.pad = control_id(tokenizer, "<|endoftext|>")
        self.object_starts = {control_id(tokenizer, phrase) for phrase in OBJECT_STARTS}
        self.think_close = control_id(tokenizer, "</think>")
        self.digits = {control_id(tokenizer, digit): digit for digit in "0123456789"}
        self.articles = {tokenizer.token_to_id(f"Ġ{article}") for article in ("a", "an")}
        head = f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n"
        self.text_prefix = tokenizer.encode(head, add_special_tokens=False).ids
        pads = [control_id(tokenizer, "<|image_pad|>")] * CELLS
        vision = [control_id(tokenizer, "<|vision_start|>"), *pads, control_id(tokenizer, "<|vision_end|>")]
        self.prefix = self.text_prefix + vision
        self.turn = tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False).ids

    def layout(self, *groups: tuple[int, int]) -> Layout:
        return Layout(prefix_length=len(self.prefix), image_start=len(self.text_prefix) + 1, groups=groups)

    def batch(self, rng: np.random.Generator, scenes: NDArray[np.int64], layout: Layout) -> Batch:
        """One packed row per scene index; every other draw mirrors the picture."""
        rows = _Rows()
        pixels, ids, labels, cells = [], [], [], []
        for number, scene in enumerate(scenes):
            mirrored = bool(rng.random() < 0.5)
            picture, owners, things = self._scene(int(scene), mirrored)
            cover = _coverage(owners, len(things))
            row_ids, row_labels = self._row(rng, things, layout, cover, number, rows)
            pixels.append(picture)
            ids.append(row_ids)
            labels.append(row_labels)
            cells.append(_cell_labels(cover, things))
        kinds, colours, boxes = zip(*cells, strict=True)
        return Batch(
            pixels=torch.from_numpy(np.stack(pixels)), token_ids=torch.tensor(ids), labels=torch.tensor(labels),
            cell_kinds=torch.from_numpy(np.stack(kinds)), cell_colours=torch.from_numpy(np.stack(colours)),
            cell_boxes=torch.from_numpy(np.stack(boxes)),
            pointer_at=_table(rows.pointer_at, 2), pointer_to=_table(rows.pointer_to, CELLS + 1, torch.float32),
            box_at=_table(rows.box_at, 2), box_to=_table(rows.box_to, 4, torch.float32),
            watch_at=_table(rows.watch_at, 3), watch_to=_table(rows.watch_to, CELLS, torch.float32),
            number_at=_table(rows.number_at, 2), number_to=torch.tensor(rows.number_to, dtype=torch.int64),
        )  # fmt: skip

    def knowledge_batch(self, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor, Layout]:
        """Text-only questions about the world: token ids and labels [count, L], and their layout."""
        segments = [
            self._thought(rng, self.text_prefix)
            if rng.random() < THOUGHT_SHARE
            else self._plain(self.text_prefix, *ask_about_world(rng))
            for _ in range(count)
        ]
        length = max(len(segment.token_ids) for segment in segments)
        ids, labels = zip(*(self._padded(segment, length) for segment in segments), strict=True)
        return torch.tensor(ids), torch.tensor(labels), Layout(prefix_length=0, image_start=0, groups=((1, length),))

    def _scene(self, index: int, mirrored: bool) -> tuple[NDArray[np.uint8], NDArray[np.uint8], list[CachedObject]]:
        picture, owners, things = self.cache.pixels[index], self.cache.owners[index], self.cache.objects[index]
        if mirrored:
            return picture[:, ::-1].copy(), owners[:, ::-1], [_mirror(thing) for thing in things]
        return np.asarray(picture), owners, things

    def _row(
        self, rng: np.random.Generator, things: list[CachedObject], layout: Layout, cover: NDArray[np.float32],
        number: int, rows: _Rows,
    ) -> tuple[list[int], list[int]]:  # fmt: skip
        asker = Asker(rng, things, SIZE_HW, self.split)
        ids, labels = list(self.prefix), [IGNORED] * len(self.prefix)
        for count, length in layout.groups:
            for _ in range(count):
                segment = self._segment(rng, asker, things, length)
                if segment.grounded:
                    self._point(segment, len(ids), number, things, cover, rows)
                padded, own_labels = self._padded(segment, length)
                ids += padded
                labels += own_labels
        return ids, labels

    def _padded(self, segment: _Segment, length: int) -> tuple[list[int], list[int]]:
        ids = segment.token_ids
        labels = [IGNORED] * (segment.num_prompt - 1) + ids[segment.num_prompt :] + [IGNORED]
        first, last = segment.silent
        for position in range(first, last):
            labels[position - 1] = IGNORED
        fill = length - len(ids)
        return ids + [self.pad] * fill, labels + [IGNORED] * fill

    def _point(
        self,
        segment: _Segment,
        offset: int,
        number: int,
        things: list[CachedObject],
        cover: NDArray[np.float32],
        rows: _Rows,
    ) -> None:
        starts = [
            at for at, token in enumerate(segment.token_ids) if at >= segment.num_prompt and token in self.object_starts
        ]
        asked = [(segment.num_prompt - 1, segment.targets)] if segment.silent == (0, 0) else []
        for at, targets in [*asked, *((at, (target,)) for at, target in zip(starts, segment.targets, strict=True))]:
            rows.pointer_at.append((number, offset + at))
            rows.pointer_to.append(_pointer_target(cover, targets))
        for at, target in zip(starts, segment.targets, strict=True):
            rows.box_at.append((number, offset + at))
            left, top, right, bottom = things[target].box_xyxy
            rows.box_to.append((left / INPUT_SIDE, top / INPUT_SIDE, right / INPUT_SIDE, bottom / INPUT_SIDE))
        for at, target in [*zip(starts, segment.targets, strict=True), *self._described(segment)]:
            seen = _pointer_target(cover, (target,))
            if seen[-1] == 0:
                rows.watch_at.append((number, offset + at, offset))
                rows.watch_to.append(seen[:CELLS])

        for first, value, length in self._coordinates(segment.token_ids, starts[0] if starts else None):
            rows.number_at += [(number, offset + at) for at in range(first - 1, first - 1 + length)]
            rows.number_to += [value] * length

    def _coordinates(self, ids: list[int], start: int | None) -> Iterator[tuple[int, int, int]]:
        """(first digit's position, value, number of digits) of every number from token `start` on."""
        at = len(ids) if start is None else start
        while at < len(ids):
            length = sum(1 for _ in itertools.takewhile(self.digits.__contains__, ids[at:]))
            if length:
                yield at, int("".join(self.digits[token] for token in ids[at : at + length])), length
            at += max(length, 1)

    def _described(self, segment: _Segment) -> list[tuple[int, int]]:
        """(token, object): the articles in the thinking after which an object of the answer is described."""
        ids = segment.token_ids
        if self.think_close not in ids[segment.num_prompt :]:
            return []
        end = ids.index(self.think_close, segment.num_prompt)
        articles = [at for at in range(segment.num_prompt, end) if ids[at] in self.articles]
        if len(segment.targets) == 1:
            articles = articles[-1:]  # what it is told apart from comes first
        return list(zip(articles, segment.targets, strict=True)) if len(articles) == len(segment.targets) else []

    def _segment(self, rng: np.random.Generator, asker: Asker, things: list[CachedObject], length: int) -> _Segment:
        if length == PLAIN:
            return self._short_answer(rng, things)
        if length == SHORT and rng.random() < THOUGHT_BESIDE_SHARE:
            segment = self._thought(rng, before=[])
            if len(segment.token_ids) <= length:
                return segment
        for _ in range(20):
            question = self._question(rng, asker, length)
            if question is None:
                continue
            segment = self._grounding(rng, question, things)
            if len(segment.token_ids) <= length:
                return segment
        return self._grounding(rng, asker.ask_for_nothing(), things)

    def _question(self, rng: np.random.Generator, asker: Asker, length: int) -> Question | None:
        if length == EVERYTHING:
            order = sorted(range(len(asker.things)), key=lambda i: asker.things[i].centre_xy[0])
            text = pick(rng, ("all objects", "everything on the table", "every object"))
            return Question(text=text, kind=SEVERAL, targets=tuple(order), thinking=f"There are {len(order)} objects.")
        if length == LONG:
            return asker.ask(SEVERAL)
        return asker.ask(SHORT_KINDS[int(rng.choice(len(SHORT_KINDS), p=SHORT_SHARES))])

    def _thought(self, rng: np.random.Generator, before: list[int]) -> _Segment:
        """What is meant by a question that finds things, and nothing of where that is; `before` goes ahead of it."""
        family = SEG_ZERO if rng.random() < SINGLE_FORMAT_SHARE else VISION_REASONER
        question, thought = think_about_world(rng)
        thought = self._told(rng, thought)
        prompt = before + self._encode(family.user_prompt(question)) + self.turn
        return _Segment([*prompt, *self._encode(f"{THINK_OPEN} {thought}")], len(prompt), (), grounded=False)

    def _short_answer(self, rng: np.random.Generator, things: list[CachedObject]) -> _Segment:
        """About the picture or, beside a picture that has no say in it, about the world."""
        while rng.random() < WORLD_SHARE:
            segment = self._plain([], *ask_about_world(rng))
            if len(segment.token_ids) <= PLAIN:
                return segment
        return self._plain([], *ask_about_picture(rng, things, SIZE_HW))

    def _plain(self, before: list[int], question: str, answer: str) -> _Segment:
        prompt = before + self._encode(question) + self.turn
        return _Segment([*prompt, *self._encode(answer), self.end], len(prompt), (), grounded=False)

    def _grounding(self, rng: np.random.Generator, question: Question, things: list[CachedObject]) -> _Segment:
        family = SEG_ZERO if len(question.targets) <= 1 and rng.random() < SINGLE_FORMAT_SHARE else VISION_REASONER
        prompt = self._encode(family.user_prompt(question.text)) + self.turn
        targets, thinking = question.targets, question.thinking
        swapped = len(targets) == 1 and len(things) > 1 and rng.random() < SWAPPED_THINKING_SHARE
        if swapped:
            targets = (int(rng.choice([i for i in range(len(things)) if i != targets[0]])),)
            thinking = f"There is {article_name(things[targets[0]])} {where(things[targets[0]].centre_xy, SIZE_HW)}."
        thinking = self._told(rng, thinking)
        answer = self._encode(family.assistant_text(thinking, [answer_object(things[i], family) for i in targets]))
        silent = (len(prompt), len(prompt) + answer.index(self.think_close)) if swapped else (0, 0)
        return _Segment([*prompt, *answer, self.end], len(prompt), targets, silent)

    def _told(self, rng: np.random.Generator, thinking: str) -> str:
        return told_briefly(thinking) if self.brief_share and rng.random() < self.brief_share else thinking

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)


def answer_object(thing: CachedObject, family: AnswerFormat) -> AnswerObject:
    """The object as a family writes it: whole pixels of the policy's input."""
    box = [round(value) for value in thing.box_xyxy]
    return box, [[int(x), int(y)] for x, y in thing.points_xy[: family.max_points]]


def _table(
    rows: Sequence[Sequence[float] | NDArray[np.float32]], width: int, dtype: torch.dtype = torch.int64
) -> Tensor:
    """[number of rows, width]; a picture that nothing is asked about gives none."""
    return torch.as_tensor(np.asarray(rows).reshape(len(rows), width)).to(dtype)


def _mirror(thing: CachedObject) -> CachedObject:
    left, top, right, bottom = thing.box_xyxy
    (x0, y0), (x1, y1) = thing.points_xy
    points = ((INPUT_SIDE - x0, y0), (INPUT_SIDE - x1, y1))
    box = (INPUT_SIDE - right, top, INPUT_SIDE - left, bottom)
    return dataclasses.replace(thing, box_xyxy=box, points_xy=points)


def _coverage(owners: NDArray[np.uint8], count: int) -> NDArray[np.float32]:
    """[count, V]: share of each cell that each object covers."""
    spots = OWNER_GRID // GRID
    cells = owners.reshape(GRID, spots, GRID, spots).transpose(0, 2, 1, 3).reshape(CELLS, spots * spots)
    cover = (cells[None] == np.arange(count, dtype=np.uint8)[:, None, None]).mean(2)
    return np.asarray(cover, np.float32)


def _cell_labels(
    cover: NDArray[np.float32], things: list[CachedObject]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    owner = cover.argmax(0)
    empty = cover.max(0) < 0.2
    kinds = np.asarray([KIND_INDEX[thing.kind] for thing in things])[owner]
    colours = np.asarray([COLOUR_INDEX[thing.colour] for thing in things])[owner]
    boxes = (np.asarray([thing.box_xyxy for thing in things], np.float32) / INPUT_SIDE)[owner]
    kinds[empty], colours[empty], boxes[empty] = len(KINDS), len(COLOURS), np.nan
    return kinds, colours, boxes


def _pointer_target(cover: NDArray[np.float32], targets: tuple[int, ...]) -> NDArray[np.float32]:
    """Uniform over the targets, within a target by coverage; `nothing` where no target is (or is big enough)."""
    distribution = np.zeros(CELLS + 1, np.float32)
    for target in targets:
        total = cover[target].sum()
        if total > 0:
            distribution[:CELLS] += cover[target] / total
    total = distribution.sum()
    if total == 0:
        distribution[-1] = 1
        return distribution
    return np.asarray(distribution / total, np.float32)

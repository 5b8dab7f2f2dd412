"""Whatever a policy writes is scored: hostile replies, mutants, and an oracle that states the rules again."""

from __future__ import annotations

import json
import math
import random
import re
import time

import pytest
from hostile_corpus import CORPUS, text_of
from reward_cases import (
    FENCED_LIST,
    FENCED_SINGLE,
    MUG,
    MUG_ITEM,
    MUG_JSON,
    PLATE,
    PLATE_ITEM,
    columns_of,
    reply,
    terms,
)

from segzero_rt.answer_format import SEG_ZERO
from segzero_rt.answer_parser import MODES
from training.reward_readings import has_think_format
from training.rewards import (
    seg_zero_rewards,
    vision_reasoner_rewards,
)

FRAGMENTS = [
    *"[]{}()\"'`,: \n\t<>-.0123456789", "<answer>", "</answer>", "<think>", "</think>", "```json", "[]", "{}", "é",
    '"bbox_2d": ', '"point_2d": ', '"bbox": ', '"points_1": ', "points_2", "null", "true", "NaN", "-Infinity",
    "1e999", "[100, 100, 300, 300]", "[180, 200]", "\ud800", "\x00", "\u00a0", "\x1c", MUG_ITEM, PLATE_ITEM, MUG_JSON,
    "A. A. A.",
]  # fmt: skip
SEEDS = [
    reply(MUG_JSON), reply(f"[{MUG_ITEM}, {PLATE_ITEM}]"), reply("[]"), reply("{}"), FENCED_LIST, FENCED_SINGLE,
    SEG_ZERO.assistant_text("A mug.", [((100, 100, 300, 300), [(180, 200), (240, 260)])]), "",
]  # fmt: skip


def mutants(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        text = rng.choice(SEEDS)
        for _ in range(rng.choice([0, 1, 1, 2, 3, 8])):
            begin = rng.randrange(len(text) + 1)
            end = min(len(text), begin + rng.choice([0, 0, 1, 1, 2, 10]))
            text = text[:begin] + rng.choice(FRAGMENTS) * rng.choice([0, 1, 1, 2]) + text[end:]
        texts.append(text)
    return texts


ALL_REWARDS = [
    *(seg_zero_rewards(strict=strict, mode=mode) for strict in (True, False) for mode in MODES if mode[0] != "v"),
    *(vision_reasoner_rewards(mode=mode) for mode in MODES if mode[0] != "s"),
]


def hostile_texts() -> list[str]:
    written = []
    for case in CORPUS:
        whole = text_of(case)
        written += [whole, reply(whole)]
    return written


def test_any_text_is_scored_within_bounds() -> None:
    texts = [*hostile_texts(), *mutants(800, seed=2)]
    assert len(texts) > 2000
    for number, text in enumerate(texts):
        objects = ((MUG,), (MUG,), ())[number % 3]
        for rewards in ALL_REWARDS:
            found = terms(rewards, text, *objects)
            assert all(0 <= found[reward.name] <= reward.maximum for reward in rewards), text
        found = terms(vision_reasoner_rewards(), text, MUG, PLATE)
        assert 0 <= found["accuracy"] <= 3


def test_think_format_is_the_papers_pattern() -> None:
    pattern = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
    texts = [
        *hostile_texts(), *mutants(3000, seed=3), "<think></think><answer></answer>", "<think></answer>",
        "<think><answer></think><answer></answer>", "<think></think>x<answer></answer>",
        "<think></think>\u3000<answer></answer>",
    ]  # fmt: skip
    met = [has_think_format(text) for text in texts]
    assert met == [pattern.fullmatch(text) is not None for text in texts]
    assert min(met.count(True), met.count(False)) > 300


# --- an oracle: the rules of the reference, written down once more as one would in a notebook


def oracle_vision_reasoner_format(text: str) -> float:
    value = 0.0
    try:
        found = re.search(r"<answer>\s*(.*?)\s*</answer>", text, re.DOTALL)
        items = json.loads(found[1])  # type: ignore[index]
        for one in items:
            for key, length in (("bbox_2d", 4), ("point_2d", 2)):
                if key in one and isinstance(one[key], list) and len(one[key]) == length:
                    value += 1 / len(items)
    except (TypeError, ValueError):
        pass
    return value


def oracle_seg_zero(text: str, strict: bool) -> list[float]:
    found = re.search(r"{[^}]+}", text)
    try:
        data = json.loads(found[0])  # type: ignore[index]
    except (TypeError, ValueError):
        return [0, 0, 0, 0]
    boxed = [key for key in data if key == "bbox" or (not strict and "bbox" in key.lower())][:1]
    pointed = [key for key in data if "point" in key.lower() and key not in boxed][:2]
    pointing = [key for key in data if "points" in key.lower()][:2]
    if strict:
        pointed = pointing = [key for key in ("points_1", "points_2") if key in data]
    whole = list if strict else (list, str, dict)
    shapes = [(data[key], 4) for key in boxed] + [(data[key], 2) for key in pointed]
    form = len(shapes) == 3 and all(isinstance(value, whole) and len(value) == length for value, length in shapes)
    box = data[boxed[0]] if boxed else None
    if not isinstance(box, list) or len(box) != 4 or not all(type(value) in (int, float) for value in box):
        return [float(form), 0, 0, 0]
    shared = [max(0.0, min(box[i + 2], MUG.box_xyxy[i + 2]) - max(box[i], MUG.box_xyxy[i])) for i in (0, 1)]
    inter = (shared[0] + 1) * (shared[1] + 1) if min(shared) > 0 else 0
    area = (box[2] - box[0] + 1) * (box[3] - box[1] + 1)
    union = area + 201 * 201 - inter
    l1 = sum(abs(value - true) for value, true in zip(box, MUG.box_xyxy, strict=True)) / 4
    near = 0.0
    try:
        (a, b), (c, d) = ([int(value) for value in data[key][:2]] for key in pointing)
        inside = all(box[0] <= x <= box[2] and box[1] <= y <= box[3] for x, y in ((a, b), (c, d)))
        (e, f), (g, h) = MUG.points_xy
        ways = (
            math.hypot(a - e, b - f) + math.hypot(c - g, d - h),
            math.hypot(a - g, b - h) + math.hypot(c - e, d - f),
        )
        near = float(inside and min(ways) / 2 < 100)
    except (TypeError, ValueError, OverflowError):
        pass
    return [float(form), float(union != 0 and inter / union > 0.5), float(l1 < 10), near]


def test_rules_hold_on_mutants() -> None:
    seen: dict[tuple[float, ...], int] = {}
    for text in mutants(3000, seed=4):
        if "true" in text:  # the documented departure
            continue
        for strict in (True, False):
            found = list(terms(seg_zero_rewards(strict=strict), text, MUG).values())[1:]
            assert found == oracle_seg_zero(text, strict), text
            seen[tuple(found)] = seen.get(tuple(found), 0) + 1
        format_score = terms(vision_reasoner_rewards(), text, MUG)["answer_format"]
        assert format_score == pytest.approx(oracle_vision_reasoner_format(text)), text
    assert len(seen) >= 6, seen


def test_ten_thousand_completions_take_seconds() -> None:
    texts = [*mutants(2500, seed=5), *(reply(f"[{MUG_ITEM}, {PLATE_ITEM}]", thinking=f"{n}.") for n in range(7500))]
    columns = columns_of(*[(MUG, PLATE)] * len(texts))
    begin = time.process_time()
    for reward in vision_reasoner_rewards():
        reward(["p"] * len(texts), texts, **columns)
    took_s = time.process_time() - begin
    print(f"{len(texts)} completions, four terms: {took_s:.2f} s of one core")
    assert took_s < 10  # about two

"""Scenes made around a question: the samples of every split, `segzero scenes`, and the reasoning data of GRPO.

Samples follow a fixed schedule, so that any prefix of a split is balanced: one in ten asks for something that is not
there, the rest go round the split's query kinds, and each query kind goes round the kinds of objects.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from segzero_rt.commands.progress import Progress
from segzero_rt.dataset import DatasetWriter, LabeledObject

from .draws import pick, shuffled
from .object_kinds import KINDS
from .phrases import article_name, where
from .questions import (
    ATTRIBUTE,
    COMPOSITIONAL,
    CONSEQUENCE,
    EXTREMES,
    FUNCTION,
    HELD_OUT_RELATION,
    NAME,
    NONE,
    QUERY_KINDS,
    RELATION,
    SEVERAL,
    SIDES,
    Asker,
    Question,
)
from .scenes import DEFAULT_SIZE_HW, HELD_OUT_LOOKS, Scene, allowed_looks, plan_scene, random_state, render

SPLIT_QUERY_KINDS: dict[str, tuple[str, ...]] = {
    "ood_colour": (NAME, ATTRIBUTE, RELATION),
    "ood_relation": (RELATION, COMPOSITIONAL),
    "ood_wording": (FUNCTION, CONSEQUENCE),
    "ood_function": (FUNCTION, COMPOSITIONAL),
}
"""What the out-of-distribution splits ask; the others ask everything."""

NONE_EVERY = 10
NUM_OBJECTS = (4, 9)
MAX_ATTEMPTS = 400

_Look = tuple[str, str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class QuestionScene:
    scene: Scene
    question: Question
    distractor: bool
    """Another object shares the target's kind or colour."""


def make_sample(split: str, seed: int, index: int, size_hw: tuple[int, int] = DEFAULT_SIZE_HW) -> QuestionScene:
    """Sample `index` of a split; a pure function of its arguments.

    Raises:
        ValueError: unknown split or negative numbers.
    """
    query_kind, target_kind = schedule(split, index)
    for attempt in range(MAX_ATTEMPTS):
        rng = random_state(split, seed, index, attempt)
        company = _company(rng, split, query_kind, target_kind)
        plan = plan_scene(rng, company, size_hw)
        scene = render(rng, plan, size_hw) if plan else None
        if scene is None:
            continue
        question = Asker(rng, scene.objects, size_hw, split).ask(query_kind, target_kind)
        if question is not None and _fits_split(split, scene, question):
            return QuestionScene(scene=scene, question=question, distractor=_has_distractor(scene, question))
    raise RuntimeError(
        f"no {query_kind} question about a {target_kind} fits {split}/{seed}/{index} in {MAX_ATTEMPTS} attempts"
    )


def schedule(split: str, index: int) -> tuple[str, str]:
    """(query kind, kind of the object asked for) of sample `index`."""
    kinds = SPLIT_QUERY_KINDS.get(split)
    names = list(KINDS)
    if kinds is None:
        if index % NONE_EVERY == NONE_EVERY - 1:
            return NONE, names[(index // NONE_EVERY) % len(names)]
        kinds = tuple(kind for kind in QUERY_KINDS if kind != NONE)
        index = index // NONE_EVERY * (NONE_EVERY - 1) + index % NONE_EVERY
    if split == "ood_colour":
        names = sorted({kind for kind, _ in HELD_OUT_LOOKS})
    query_kind, turn = kinds[index % len(kinds)], index // len(kinds)
    if split == "ood_relation" and query_kind == COMPOSITIONAL:  # "nearest to" has no compositional form
        names = [name for name in names if HELD_OUT_RELATION[name] in (*SIDES, *EXTREMES)]
    return query_kind, names[turn % len(names)]


def _company(rng: np.random.Generator, split: str, query_kind: str, target_kind: str) -> list[_Look]:
    """Who lies on the table: the target, often something like it, and strangers, any of which may lie on top."""
    count = int(rng.integers(NUM_OBJECTS[0], NUM_OBJECTS[1] + 1))
    target = (target_kind, *_target_look(rng, split, target_kind))
    company: list[_Look] = [] if query_kind == NONE else [target]
    twins = query_kind in (ATTRIBUTE, RELATION, COMPOSITIONAL, SEVERAL) and rng.random() < 0.75
    if twins:
        for _ in range(int(rng.integers(1, 3))):
            company.append((target_kind, *_other_look(rng, split, target_kind, target[1], query_kind == SEVERAL)))
    elif rng.random() < 0.75:
        like = [
            (kind, *look)
            for kind in KINDS
            if kind != target_kind
            for look in allowed_looks(kind, split)
            if look[0] == target[1]
        ]
        company.append(pick(rng, like))
    names = [kind for kind in KINDS if kind != target_kind]
    while len(company) < count:
        kind = pick(rng, names)
        looks = allowed_looks(kind, split)
        company.append((kind, *pick(rng, looks)))
    return shuffled(rng, company)


def _target_look(rng: np.random.Generator, split: str, kind: str) -> tuple[str, str]:
    looks = allowed_looks(kind, split)
    if split == "ood_colour":
        looks = [look for look in looks if (kind, look[0]) in HELD_OUT_LOOKS]
    return pick(rng, looks)


def _other_look(rng: np.random.Generator, split: str, kind: str, colour: str, same_allowed: bool) -> tuple[str, str]:
    looks = [look for look in allowed_looks(kind, split) if same_allowed or look[0] != colour]
    return pick(rng, looks)


def _fits_split(split: str, scene: Scene, question: Question) -> bool:
    if split != "ood_colour":
        return True
    return any((scene.objects[i].kind, scene.objects[i].colour) in HELD_OUT_LOOKS for i in question.targets)


def _has_distractor(scene: Scene, question: Question) -> bool:
    asked = [scene.objects[i] for i in question.targets]
    others = [thing for i, thing in enumerate(scene.objects) if i not in question.targets]
    return any(other.kind == thing.kind or other.colour == thing.colour for thing in asked for other in others)


def write_samples(folder: Path, split: str, seed: int, count: int) -> None:
    """Write samples `0 … count - 1` of a split as a dataset folder that `segzero eval` reads.

    Each line also carries `scene_objects` (everything on the table), the templated `thinking`, `detail`, `distractor`.

    Raises:
        DatasetError: the folder exists and is not empty.
    """
    with DatasetWriter(folder) as writer, Progress(count, f"scenes ({split})") as progress:
        for index in range(count):
            sample = make_sample(split, seed, index)
            objects = [
                LabeledObject.from_mask(article_name(thing).split(" ", 1)[1], thing.mask)
                for thing in (sample.scene.objects[i] for i in sample.question.targets)
            ]
            extra = {
                "split": split, "seed": seed, "detail": sample.question.detail, "thinking": sample.question.thinking,
                "distractor": sample.distractor, "scene_objects": list(_described(sample.scene)),
            }  # fmt: skip
            name = writer.add_image(sample.scene.image_rgb, f"{split}_{seed}_{index:05d}")
            writer.add_question(name, sample.question.text, kind=sample.question.kind, objects=objects, extra=extra)
            progress.step()


def _described(scene: Scene) -> Iterator[dict[str, object]]:
    for thing in scene.objects:
        yield {
            "kind": thing.kind, "name": article_name(thing).split(" ", 1)[1], "box_xyxy": list(thing.box_xyxy),
            "where": where(thing.centre_xy, scene.size_hw),
        }  # fmt: skip

"""Does the answer follow the thinking? It is taken away, shuffled among pictures, or made to name another object.

    python -m benchmarks.thinking_ablation TEST [--bundle B] [--limit N]

Every question is asked four times; all but the first time the reply is made to begin with a thinking that the policy
did not choose, up to and including `<answer>`, and the policy goes on from there:

* `normal`: nothing is forced.
* `removed`: the thinking is empty.
* `shuffled`: the thinking that the policy wrote for a question on another picture.
* `swapped`: the policy's own thinking, in which the last object that it names is replaced, name and place, by another
  object of the same picture. Only questions with one object, whose normal answer has one box that meets it (IoU > 0.5).

A swapped answer *follows* when its box has IoU > 0.5 with the other object's box, *stays* when it has so with the
original's; `follows_closer` counts those nearer to the other than to the original. Objects come from the key
`scene_objects` of each line: `[{name, box_xyxy, where}]`, as in "red mug" and "upper left". Where the thinking names no
object of the scene, a sentence is written instead ("There is a red mug at the upper left."), counted as `written`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from segzero_rt.answer import Answer, Prompt
from segzero_rt.answer_format import ANSWER_OPEN, THINK_CLOSE, THINK_OPEN
from segzero_rt.answer_parser import parse_answer
from segzero_rt.dataset import Sample, read_dataset
from segzero_rt.evaluation import Record, box_ious, giou_interval, score_sample
from segzero_rt.pipeline import SegZero
from segzero_rt.segmentation import Segmentation

from .measuring import RESULTS, run_and_exit, write_result

MATCH_IOU = 0.5
CONDITIONS = ("normal", "removed", "shuffled", "swapped")


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One object of a picture, as the dataset's `scene_objects` describes it."""

    name: str
    where: str
    box_xyxy: tuple[float, float, float, float]

    @property
    def place(self) -> str:
        """With its preposition: "at the upper left", "in the centre"."""
        if self.where.startswith(("at ", "in ", "on ")):
            return self.where
        return f"in the {self.where}" if self.where.startswith("cent") else f"at the {self.where}"

    @property
    def bare_place(self) -> str:
        """Without it: "upper left", "centre"."""
        return self.place.split(" the ", 1)[-1]

    @property
    def phrase(self) -> str:
        """As in "a red mug"."""
        return f"{article(self.name)} {self.name}"


@dataclass(frozen=True, kw_only=True)
class Swap:
    """A thinking made to name another object."""

    thinking: str
    original: SceneObject
    other: SceneObject
    written: bool
    """A new sentence, because the policy's thinking named no object of the scene."""


@dataclass(frozen=True, kw_only=True)
class SwapOutcome:
    """Where the answer went after a swap."""

    iou_other: float
    iou_original: float

    @property
    def follows(self) -> bool:
        return self.iou_other > MATCH_IOU

    @property
    def stays(self) -> bool:
        return self.iou_original > MATCH_IOU


class Subject(Protocol):
    """What is examined: answers questions, from a given beginning if one is given."""

    def ask(self, sample: Sample, reply_start: str) -> Segmentation:
        """One answer; an empty `reply_start` forces nothing."""


@dataclass
class BundleSubject:
    """A bundle, which looks at each picture once."""

    pipeline: SegZero
    _last: tuple[Path, Any, Any] | None = field(default=None, init=False)

    def ask(self, sample: Sample, reply_start: str) -> Segmentation:
        policy = self.pipeline.policy
        if self._last is None or self._last[0] != sample.image_path:
            image_rgb = sample.image_rgb
            self._last = (sample.image_path, policy.look(image_rgb), self.pipeline.encoder(image_rgb))
        _, view, embedding = self._last
        generation = policy.ask(view, sample.text, reply_start=reply_start)
        answer = parse_answer(
            generation.text,
            answer_format=policy.default_format,
            input_size_hw=policy.manifest.answer_size_hw,
            source_size_hw=sample.size_hw,
            finished=generation.finished,
        )
        if not answer.prompts:
            return Segmentation.empty(answer, sample.size_hw)
        predicted = self.pipeline.decoder(embedding, answer.prompts)
        return Segmentation(
            masks=predicted.masks, scores=predicted.scores, boxes_xyxy=prompt_boxes(answer.prompts), answer=answer
        )


def main() -> None:
    """Runs all conditions and writes one result file."""
    parser = argparse.ArgumentParser(description="gIoU with the thinking removed, shuffled and swapped")
    parser.add_argument("test", type=Path, help="dataset folder with scene_objects")
    parser.add_argument("--bundle", help="default: the embedded one")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0, help="chooses whose thinking is given to whom, and the swaps")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result file")
    arguments = parser.parse_args()
    samples = read_dataset(arguments.test, limit=arguments.limit)
    pipeline = SegZero.load(arguments.bundle, backend="cpu", threads=arguments.threads)
    result = ablate(samples, BundleSubject(pipeline), seed=arguments.seed)
    document = {"test": arguments.test.name, "bundle": pipeline.bundle.manifest.name, "seed": arguments.seed, **result}
    path = write_result("thinking_ablation", document, arguments.out)
    print(json.dumps({"result": str(path), **result}))


def ablate(samples: Sequence[Sample], subject: Subject, *, seed: int) -> dict[str, Any]:
    """Asks every sample under every condition.

    Returns:
        gIoU per condition (overall with its interval, by kind), and the shares of swapped answers that follow or stay.
    """
    rng = np.random.default_rng(seed)
    normal = [subject.ask(sample, "") for sample in told(samples, "normal")]
    records: dict[str, list[Record]] = {name: [] for name in CONDITIONS[:3]}
    outcomes: dict[str, list[SwapOutcome]] = {}
    num_written = 0
    donors = shuffled_donors(samples, rng)
    for index, sample in enumerate(told(samples, "forced")):
        thinking = normal[donors[index]].answer.thinking
        for name, result in (
            ("normal", normal[index]),
            ("removed", subject.ask(sample, forced_start(""))),
            ("shuffled", subject.ask(sample, forced_start(thinking))),
        ):
            records[name].append(score_sample(sample, result, latency_ms=0.0))
        swap = make_swap(sample, normal[index].answer, rng)
        if swap is None:
            continue
        num_written += swap.written
        outcome = judge_swap(swap, subject.ask(sample, forced_start(swap.thinking)).answer)
        outcomes.setdefault(sample.kind, []).append(outcome)
    everything = [outcome for kind in outcomes.values() for outcome in kind]
    return {
        "giou": {name: giou_by_kind(rows) for name, rows in records.items()},
        "swapped": {
            **_shares(everything),
            "written": num_written,
            "by_kind": {kind: _shares(rows) for kind, rows in sorted(outcomes.items())},
        },
    }


def forced_start(thinking: str) -> str:
    """The beginning of a reply with this thinking, up to where the answer's JSON follows."""
    inside = f" {thinking} " if thinking else " "
    return f"{THINK_OPEN}{inside}{THINK_CLOSE}\n{ANSWER_OPEN}"


def shuffled_donors(samples: Sequence[Sample], rng: np.random.Generator) -> list[int]:
    """For each sample another one, on another picture where there is any, whose thinking it gets."""
    donors = []
    for index, sample in enumerate(samples):
        others = [i for i, other in enumerate(samples) if other.image_path != sample.image_path]
        donors.append(others[int(rng.integers(len(others)))] if others else index)
    return donors


def make_swap(sample: Sample, answer: Answer, rng: np.random.Generator) -> Swap | None:
    """A thinking that names another object of the picture; None where the sample does not qualify."""
    scene = scene_objects(sample)
    if len(sample.objects) != 1 or len(answer.prompts) != 1 or len(scene) < 2:
        return None
    true = sample.boxes_xyxy[0]
    if _iou(prompt_boxes(answer.prompts)[0], true) <= MATCH_IOU:
        return None
    original = max(scene, key=lambda one: _iou(np.array(one.box_xyxy, np.float32), true))
    names = [one.name for one in scene]
    # An object that shares its name with another would leave open which of them the thinking means.
    others = [one for one in scene if one.name != original.name and names.count(one.name) == 1]
    if not others:
        return None
    other = others[int(rng.integers(len(others)))]
    replaced = swap_last_object(answer.thinking, scene, other)
    thinking = replaced if replaced is not None else f"There is {other.phrase} {other.place}."
    return Swap(thinking=thinking, original=original, other=other, written=replaced is None)


def swap_last_object(thinking: str, scene: Sequence[SceneObject], other: SceneObject) -> str | None:
    """Replaces name and place of the object that is named last; None when none is, or it is `other` already."""
    found = [(thinking.rfind(one.name), len(one.name), one) for one in scene if one.name in thinking]
    if not found:
        return None
    start, length, named = max(found, key=lambda row: (row[0], row[1]))
    if named.name == other.name:
        return None
    head, tail = thinking[:start], thinking[start + length :]
    old_article = f"{article(named.name)} "
    if head.lower().endswith(f" {old_article}") or head.lower() == old_article:
        word = head[-len(old_article) : -1]
        new = article(other.name)
        head = head[: -len(old_article)] + (new.capitalize() if word[0].isupper() else new) + " "
    # A brief thinking has places without their prepositions: "a red mug left."
    places = {one.bare_place: other.bare_place for one in scene} | {one.place: other.place for one in scene}
    for place in sorted(places, key=len, reverse=True):
        if place in tail:
            tail = tail.replace(place, places[place], 1)
            break
    return head + other.name + tail


def article(name: str) -> str:
    """Of a noun phrase in English, by its first letter."""
    return "an" if name[:1].lower() in "aeiou" else "a"


def judge_swap(swap: Swap, answer: Answer) -> SwapOutcome:
    """Best IoU of the answer's boxes with either object; 0 without boxes."""
    boxes = prompt_boxes(answer.prompts)
    targets = np.array([swap.other.box_xyxy, swap.original.box_xyxy], np.float32)
    best = box_ious(boxes, targets).max(axis=0) if len(boxes) else np.zeros(2)
    return SwapOutcome(iou_other=float(best[0]), iou_original=float(best[1]))


def scene_objects(sample: Sample) -> list[SceneObject]:
    """The extra key `scene_objects`; empty where it is absent."""
    rows: list[dict[str, Any]] = sample.extra.get("scene_objects", [])
    found = []
    for row in rows:
        left, top, right, bottom = (float(value) for value in row["box_xyxy"])
        found.append(SceneObject(name=row["name"], where=row["where"], box_xyxy=(left, top, right, bottom)))
    return found


def prompt_boxes(prompts: Sequence[Prompt]) -> NDArray[np.float32]:
    """float32 [N, 4]."""
    return np.array([prompt.box_xyxy for prompt in prompts], np.float32).reshape(-1, 4)


def _iou(one_xyxy: NDArray[np.float32], other_xyxy: NDArray[np.float32]) -> float:
    return float(box_ious(one_xyxy[None], other_xyxy[None])[0, 0])


def giou_by_kind(records: Sequence[Record]) -> dict[str, Any]:
    low, high = giou_interval(records)
    return {
        "giou": float(np.mean([record.iou for record in records])),
        "giou_interval_95": [low, high],
        "num_samples": len(records),
        "by_kind": {
            kind: float(np.mean([record.iou for record in records if record.kind == kind]))
            for kind in sorted({record.kind for record in records})
        },
    }


def _shares(outcomes: Sequence[SwapOutcome]) -> dict[str, Any]:
    if not outcomes:
        return {"num_samples": 0, "follows": None, "stays": None, "follows_closer": None}
    return {
        "num_samples": len(outcomes),
        "follows": float(np.mean([one.follows for one in outcomes])),
        "stays": float(np.mean([one.stays for one in outcomes])),
        "follows_closer": float(np.mean([one.iou_other > one.iou_original for one in outcomes])),
    }


def told(samples: Sequence[Sample], what: str) -> Sequence[Sample]:
    print(f"{what}: {len(samples)} questions", file=sys.stderr)
    return samples


if __name__ == "__main__":
    run_and_exit(main, "thinking_ablation")

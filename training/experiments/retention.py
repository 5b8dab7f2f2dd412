"""What a policy has forgotten: short visual questions, and things asked for by name, attribute or relation.

    python -m training.experiments.retention training/checkpoints/tabletop/base_brief runs/grpo/hf

Each picture is asked about in eight ways: its colours, counts, presence, places and regions in plain words (right or
wrong, word for word), and one thing by name, by attribute and by relation (box gIoU). No training of an answer with
boxes asks the first five. `lost` is what the base scores more, question by question, in points of 100, with its 95 %
interval over pictures; `kept` is the share of what the base answered well (right, or IoU above 0.5) that is still so.
Any change loses some of what was right by luck, so `kept` is below 1 even where nothing is lost: `lost` is the measure.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from segzero_rt.commands.options import positive_integer
from segzero_rt.errors import SegZeroError

from ..grounding_data import SIZE_HW
from ..picture_memory import TowerMemories
from ..questions import ATTRIBUTE, NAME, RELATION, Asker
from ..rewards import Case
from ..rows import RowObject
from ..scene_cache import CachedObject, SceneCache
from ..visual_questions import PICTURE_QUESTIONS
from .evaluate import add_shared_options
from .intervals import Interval, Scores, difference
from .live_policy import Asked, LivePolicy
from .measures import Score, box_score, by_kind, mean
from .shared_rows import split_scenes

FOUND_KINDS = (NAME, ATTRIBUTE, RELATION)
VISUAL_KINDS = tuple(PICTURE_QUESTIONS)
ALL, VISUAL, FOUND = "all", "visual", "found"
GROUPS = {ALL: (*VISUAL_KINDS, *FOUND_KINDS), VISUAL: VISUAL_KINDS, FOUND: FOUND_KINDS}
"""Kinds of questions that are reported together."""
_WELL = 0.5
_QUESTIONS_SEED = 9


@dataclass(frozen=True, kw_only=True)
class RetentionQuestion:
    """One question and what is right: words, or objects."""

    item: str
    kind: str
    scene: int
    text: str
    """The question itself, not yet in the words of an answer format."""
    answer: str | None
    """None where boxes are asked for."""
    objects: tuple[RowObject, ...] = ()


def retention_questions(cache: SceneCache, num_scenes: int, split: str) -> list[RetentionQuestion]:
    """Up to eight questions about each of the first `num_scenes` pictures; the same ones at every call."""
    questions = []
    for scene in range(num_scenes):
        rng = np.random.default_rng([_QUESTIONS_SEED, scene])
        things = cache.objects[scene]
        for kind, make in PICTURE_QUESTIONS.items():
            pair = make(rng, things, SIZE_HW)
            if pair is not None:
                item = f"{scene}-{kind}"
                questions.append(RetentionQuestion(item=item, kind=kind, scene=scene, text=pair[0], answer=pair[1]))
        asker = Asker(rng, things, SIZE_HW, split)
        for kind in FOUND_KINDS:
            asked = asker.ask(kind)
            if asked is not None:
                objects = tuple(_row_object(things[target]) for target in asked.targets)
                item = f"{scene}-{kind}"
                questions.append(
                    RetentionQuestion(item=item, kind=kind, scene=scene, text=asked.text, answer=None, objects=objects)
                )
    return questions


def score_retention(
    policy: LivePolicy, cache: SceneCache, questions: Sequence[RetentionQuestion], *, reply_start: str = "",
    told: str = "",
) -> list[Score]:  # fmt: skip
    """Asks all, greedily.

    Args:
        reply_start: what answers with boxes are made to begin with; plain answers never are.
    """
    pictures = {one.scene: np.array(cache.pixels[one.scene]) for one in questions}
    scores: dict[str, Score] = {}
    for found in (False, True):
        these = [one for one in questions if (one.answer is None) is found]
        asked = [
            Asked(text=policy.answer_format.user_prompt(one.text) if found else one.text, picture=pictures[one.scene])
            for one in these
        ]
        replies = policy.answer(asked, reply_start=reply_start if found else "", told=told)
        scores |= {one.item: _score(policy, one, reply, reply_start) for one, reply in zip(these, replies, strict=True)}
    return [scores[one.item] for one in questions]


@dataclass(frozen=True, kw_only=True)
class Retention:
    """What one policy has forgotten against another, in shares of 1."""

    lost: dict[str, Interval]
    """By group."""
    kept: dict[str, float | None]
    """By group; None where the base answered nothing well."""
    base: dict[str, float]
    """Mean values by group and by kind."""
    new: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Losses in points of 100."""
        lost = {
            group: {name: 100 * value for name, value in interval.to_json().items()}
            for group, interval in self.lost.items()
        }
        return {"lost_points": lost, "kept": self.kept, "base": self.base, "new": self.new}


def compare_retention(base: Scores, new: Scores) -> Retention:
    """Both arms' scores of `score_retention`, for each seed."""
    lost, kept = {}, {}
    for group, kinds in GROUPS.items():
        ours, theirs = _only(new, kinds), _only(base, kinds)
        lost[group] = difference([(theirs, ours)])
        well = [score.value > _WELL for score in theirs[0]]
        still = [[score.value > _WELL for score, before in zip(scores, well, strict=True) if before] for scores in ours]
        kept[group] = float(np.mean(still)) if any(well) else None
    return Retention(lost=lost, kept=kept, base=_means(base), new=_means(new))


def _only(arm: Scores, kinds: Sequence[str]) -> list[list[Score]]:
    return [[score for score in scores if score.kind in kinds] for scores in arm]


def _means(arm: Scores) -> dict[str, float]:
    every = [score for scores in arm for score in scores]
    grouped = {group: mean(score for score in every if score.kind in kinds) for group, kinds in GROUPS.items()}
    return grouped | {kind: mean(scores) for kind, scores in by_kind(every).items()}


def _row_object(thing: CachedObject) -> RowObject:
    return RowObject(box_xyxy=thing.box_xyxy, points_xy=thing.points_xy)


def _score(policy: LivePolicy, question: RetentionQuestion, reply: str, reply_start: str) -> Score:
    if question.answer is None:
        case = Case(text=reply, objects=question.objects, input_size_hw=SIZE_HW, row_id=question.item)
        return box_score(policy, case, kind=question.kind, picture=str(question.scene), reply_start=reply_start)
    right = reply.strip() == question.answer
    return Score(item=question.item, kind=question.kind, picture=str(question.scene), value=float(right), reply=reply)


def main(argv: Sequence[str] | None = None) -> int:
    """Asks both policies, or several against one; prints a table, and one JSON document with `--json`."""
    arguments = _arguments(argv)
    try:
        document = retention_of_folders(arguments)
    except SegZeroError as error:
        print(f"retention: {error}", file=sys.stderr)
        return 2
    print(render(document), file=sys.stderr if arguments.json else sys.stdout)
    if arguments.json:
        print(json.dumps(document))
    return 0


def retention_of_folders(arguments: argparse.Namespace) -> dict[str, Any]:
    """The document: `policies`, each with `Retention.to_json`.

    Raises:
        SegZeroError: no such split or policy.
    """
    import torch

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    cache = split_scenes(arguments.rows, arguments.split, seed=arguments.seed, num_scenes=arguments.pictures)
    questions = retention_questions(cache, arguments.pictures, arguments.split)
    memories = TowerMemories(arguments.pictures)
    scores = {
        folder: score_retention(LivePolicy.load(folder, memories=memories), cache, questions, told=folder)
        for folder in (arguments.base, *arguments.policies)
    }
    policies = [
        {"policy": folder, **compare_retention([scores[arguments.base]], [scores[folder]]).to_json()}
        for folder in arguments.policies
    ]
    return {
        "base": arguments.base, "split": arguments.split, "seed": arguments.seed, "pictures": arguments.pictures,
        "num_questions": len(questions), "policies": policies,
    }  # fmt: skip


def render(document: dict[str, Any]) -> str:
    """The base and each policy by kind, and points lost by group, in Markdown."""
    kinds = GROUPS[ALL]
    lines = [f"| policy | {' | '.join(kinds)} | points lost: all | visual | found |", "|---" * (len(kinds) + 4) + "|"]

    def cells(means: dict[str, float]) -> str:
        return " | ".join(f"{means[kind]:.3f}" if kind in means else "–" for kind in kinds)

    lines.append(f"| {document['base']} | {cells(document['policies'][0]['base'])} | | | |")
    for entry in document["policies"]:
        lost = [entry["lost_points"][group] for group in (ALL, VISUAL, FOUND)]
        told = " | ".join(f"{one['mean']:+.1f} ({one['low']:+.1f} to {one['high']:+.1f})" for one in lost)
        lines.append(f"| {entry['policy']} | {cells(entry['new'])} | {told} |")
    return "\n".join(lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training.experiments.retention", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("base", metavar="BASE", help="folder of the policy that the others began as")
    parser.add_argument("policies", nargs="+", metavar="NEW", help="folders of trained policies")
    parser.add_argument("--split", default="validation", metavar="S", help="of the pictures (default: validation)")
    parser.add_argument("--pictures", type=positive_integer, default=100, metavar="N", help="(default: 100)")
    parser.add_argument("--seed", type=int, default=7, metavar="K", help="of the pictures (default: 7)")
    add_shared_options(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())

"""The thinking ablation tells a policy that obeys its thinking from one that ignores it, and swaps what it says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.thinking_ablation import (
    SceneObject,
    ablate,
    forced_start,
    make_swap,
    scene_objects,
    shuffled_donors,
    swap_last_object,
)
from benchmarks.thinking_brevity import RULES, shorten
from segzero_rt.answer import Answer, AnswerStatus, Prompt
from segzero_rt.dataset import LabeledObject, Sample
from segzero_rt.segmentation import Segmentation

SIZE_HW = (30, 90)
MUG = SceneObject(name="red mug", where="left", box_xyxy=(0, 0, 20, 20))
PLATE = SceneObject(name="orange plate", where="centre", box_xyxy=(30, 0, 50, 20))
FORK = SceneObject(name="silver fork", where="upper right", box_xyxy=(60, 0, 80, 20))
SCENE = (MUG, PLATE, FORK)


def sample(target: SceneObject | None, path: str, kind: str = "name", scene: tuple[SceneObject, ...] = SCENE) -> Sample:
    rows = [{"kind": "x", "name": one.name, "where": one.where, "box_xyxy": list(one.box_xyxy)} for one in scene]
    objects = () if target is None else (LabeledObject.from_mask("x", box_mask(target.box_xyxy)),)
    return Sample(
        image_path=Path(path), text=f"find {target}", kind=kind, size_hw=SIZE_HW, objects=objects,
        extra={"scene_objects": rows},
    )  # fmt: skip


def box_mask(box: tuple[float, float, float, float]) -> np.ndarray:
    mask = np.zeros(SIZE_HW, dtype=bool)
    left, top, right, bottom = (int(value) for value in box)
    mask[top:bottom, left:right] = True
    return mask


def answer(target: SceneObject | None, thinking: str) -> Segmentation:
    if target is None:
        return Segmentation.empty(Answer(status=AnswerStatus.NONE_FOUND, thinking=thinking), SIZE_HW)
    return Segmentation(
        masks=box_mask(target.box_xyxy)[None],
        scores=np.ones(1, np.float32),
        boxes_xyxy=np.array([target.box_xyxy], np.float32),
        answer=Answer(status=AnswerStatus.OK, thinking=thinking, prompts=(Prompt(box_xyxy=target.box_xyxy),)),
    )


def truth(asked: Sample) -> SceneObject | None:
    return next((one for one in SCENE if asked.objects and one.box_xyxy == asked.objects[0].box_xyxy), None)


class Obedient:
    """Thinks of the right object, and answers with whatever its thinking names."""

    def ask(self, asked: Sample, reply_start: str) -> Segmentation:
        right = truth(asked)
        thinking = f"There is {right.phrase} {right.place}." if right else "There is nothing."
        if reply_start:
            thinking = reply_start.removeprefix("<think>").removesuffix("</think>\n<answer>").strip()
        named = next((one for one in SCENE if f"{one.phrase} {one.place}" in thinking), None)
        return answer(named, thinking)


class Stubborn(Obedient):
    """Answers right whatever it thinks."""

    def ask(self, asked: Sample, reply_start: str) -> Segmentation:
        return answer(truth(asked), super().ask(asked, reply_start).answer.thinking)


QUESTIONS = [sample(MUG, "a.png"), sample(PLATE, "b.png", "relation"), sample(FORK, "c.png"), sample(None, "d.png")]


def test_an_obedient_policy_follows() -> None:
    result = ablate(QUESTIONS, Obedient(), seed=0)
    assert result["giou"]["normal"]["giou"] == 1.0
    assert result["giou"]["removed"]["giou"] == 0.25  # without thinking it finds nothing, which is right once
    assert result["giou"]["shuffled"]["giou"] == 0.0
    swapped = result["swapped"]
    assert (swapped["num_samples"], swapped["follows"], swapped["stays"], swapped["written"]) == (3, 1.0, 0.0, 0)
    assert swapped["follows_closer"] == 1.0 and set(swapped["by_kind"]) == {"name", "relation"}


def test_a_stubborn_policy_does_not() -> None:
    result = ablate(QUESTIONS, Stubborn(), seed=0)
    assert [result["giou"][name]["giou"] for name in ("normal", "removed", "shuffled")] == [1.0, 1.0, 1.0]
    assert (result["swapped"]["follows"], result["swapped"]["stays"]) == (0.0, 1.0)


def test_without_scene_objects_nothing_is_swapped() -> None:
    result = ablate([sample(MUG, "a.png", scene=())], Obedient(), seed=0)
    assert result["swapped"]["num_samples"] == 0 and result["swapped"]["follows"] is None


@pytest.mark.parametrize("where", ["left", "at the left"])
def test_a_place_is_swapped_as_it_is_written(where: str) -> None:
    mug = dataclasses.replace(MUG, where=where)
    fork = dataclasses.replace(FORK, where="at the upper right")
    assert swap_last_object("a red mug left.", (mug, fork), fork) == "a silver fork upper right."
    assert swap_last_object("A red mug at the left.", (mug, fork), fork) == "A silver fork at the upper right."


@pytest.mark.parametrize(
    ("thinking", "other", "expected"),
    [
        ("There is a red mug at the left.", PLATE, "There is an orange plate in the centre."),
        ("There is an orange plate in the centre.", MUG, "There is a red mug at the left."),
        ("A red mug at the left.", PLATE, "An orange plate in the centre."),
        (
            "The red mug is at the left. Right of it is an orange plate in the centre.",
            FORK,
            "The red mug is at the left. Right of it is a silver fork at the upper right.",
        ),
        ("a red mug left.", PLATE, "an orange plate centre."),
        ("orange plate centre. a red mug left.", FORK, "orange plate centre. a silver fork upper right."),
        ("I see the red mug.", FORK, "I see the silver fork."),
        ("red mug", FORK, "silver fork"),
        ("There is a red mug at the left.", MUG, None),
        ("There is something.", MUG, None),
        ("", MUG, None),
    ],
    ids=[
        "article a",
        "article an",
        "capital",
        "last of two",
        "brief",
        "brief, last of two",
        "no place",
        "bare",
        "same object",
        "no object",
        "empty",
    ],
)
def test_swaps_name_article_and_place(thinking: str, other: SceneObject, expected: str | None) -> None:
    assert swap_last_object(thinking, SCENE, other) == expected


NAMELESS = "It is there."


@pytest.mark.parametrize(
    ("asked", "given", "qualifies"),
    [
        (sample(MUG, "a.png"), answer(MUG, "There is a red mug at the left."), True),
        (sample(MUG, "a.png"), answer(MUG, NAMELESS), True),
        (sample(MUG, "a.png"), answer(PLATE, NAMELESS), False),
        (sample(MUG, "a.png"), answer(None, NAMELESS), False),
        (sample(None, "a.png"), answer(None, NAMELESS), False),
        (sample(MUG, "a.png", scene=(MUG,)), answer(MUG, NAMELESS), False),
        (sample(MUG, "a.png", scene=(MUG, PLATE, PLATE)), answer(MUG, NAMELESS), False),
    ],
    ids=["right", "nameless", "wrong before", "nothing found", "none", "only one object", "others share a name"],
)
def test_only_clear_cases_are_swapped(asked: Sample, given: Segmentation, qualifies: bool) -> None:
    swap = make_swap(asked, given.answer, np.random.default_rng(0))
    assert (swap is not None) == qualifies
    if swap is not None:
        assert swap.original == MUG and swap.other in (PLATE, FORK)
        assert swap.written == (given.answer.thinking == NAMELESS)
        assert f"{swap.other.phrase} {swap.other.place}" in swap.thinking


def test_donors_come_from_other_pictures() -> None:
    samples = [sample(MUG, f"{index // 3}.png") for index in range(9)]
    donors = shuffled_donors(samples, np.random.default_rng(0))
    assert all(samples[donor].image_path != one.image_path for donor, one in zip(donors, samples, strict=True))
    assert shuffled_donors(samples[:2], np.random.default_rng(0)) == [0, 1]


def test_reads_scene_objects_and_places() -> None:
    assert tuple(scene_objects(QUESTIONS[0])) == SCENE
    assert [one.place for one in SCENE] == ["at the left", "in the centre", "at the upper right"]
    assert SceneObject(name="x", where="at the top", box_xyxy=(0, 0, 1, 1)).place == "at the top"
    assert scene_objects(Sample(image_path=Path("a"), text="x", kind="name", size_hw=(1, 1))) == []


def test_forced_start_ends_where_the_answer_begins() -> None:
    assert forced_start("because") == "<think> because </think>\n<answer>"
    assert forced_start("") == "<think> </think>\n<answer>"


@pytest.mark.slow
def test_a_forced_reply_goes_on_as_transformers_does(tmp_path: Path) -> None:
    import torch
    from policy_checkpoints import policy_bundle, random_picture, write_checkpoint

    from export.policy import export_policy
    from segzero_rt.policy import Policy

    model = write_checkpoint(tmp_path / "hf").eval()
    exported: Any = export_policy(tmp_path / "hf", tmp_path / "bundle", input_size_hw=(112, 112), max_length=1024)
    policy = Policy.load(policy_bundle(exported, tmp_path / "bundle"), backend="cpu", threads=1)
    picture = random_picture(0)
    start = forced_start("there is a red cup")
    given = policy.ask(policy.look(picture), "the red cup", reply_start=start, max_new_tokens=24)
    started = policy.chat.reply_start(start)
    assert given.text.startswith(start) and list(given.token_ids[: len(started)]) == started

    input_ids = torch.tensor([[*policy.prefix_tokens, *policy.question_tokens("the red cup"), *started]])
    pixels = torch.from_numpy(np.repeat(policy.preprocessor.patches(picture).reshape(-1, 3, 1, 196), 2, axis=2))
    with torch.inference_mode():
        expected = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            mm_token_type_ids=(input_ids == policy.manifest.image_token_id).int(),
            pixel_values=pixels.reshape(len(pixels), -1),
            image_grid_thw=torch.tensor([[1, 8, 8]]),
            max_new_tokens=24,
            do_sample=False,
        )[0, input_ids.shape[1] :].tolist()
    ends = policy.manifest.eos_token_ids
    assert list(given.token_ids[len(started) :]) == [token for token in expected if token not in ends]
    assert len(given.token_ids) > len(started)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("as it is", "There is a red mug at the upper left. Right of it is a fork in the centre."),
        ("without 'There is a'", "red mug at the upper left. Right of it is a fork in the centre."),
        ("without 'at the'", "There is a red mug upper left. Right of it is a fork centre."),
        ("without both", "red mug upper left. Right of it is a fork centre."),
        ("without places", "There is a red mug. Right of it is a fork."),
    ],
)
def test_rules_leave_out_what_they_say(rule: str, expected: str) -> None:
    assert RULES[rule]("There is a red mug at the upper left. Right of it is a fork in the centre.") == expected
    assert RULES[rule]("") == ""


@pytest.mark.parametrize(
    ("thinking", "left"),
    [
        ("There is a red mug at the left.", "There is a red mug."),
        ("a red mug upper left.", "a red mug."),
        ("2 mugs: a red mug left, a white mug centre.", "2 mugs: a red mug, a white mug."),
        ("a red mug left of the plate.", "a red mug left of the plate."),
        ("There is no spoon.", "There is no spoon."),
        ("", ""),
    ],
    ids=["in full", "brief", "several", "a relation", "no place", "empty"],
)
def test_places_are_left_out_however_they_are_written(thinking: str, left: str) -> None:
    assert RULES["without places"](thinking) == left


def test_what_a_shorter_thinking_costs_is_measured() -> None:
    """A policy that answers what it names with its place needs the places and can do without the opening words."""

    class Naming(Obedient):
        def ask(self, asked: Sample, reply_start: str) -> Segmentation:
            thinking = reply_start.removeprefix("<think>").removesuffix("</think>\n<answer>").strip()
            named = next((one for one in SCENE if f"{one.name} {one.place}" in thinking), None)
            return answer(named, thinking) if reply_start else super().ask(asked, "")

    found = shorten(QUESTIONS, Naming())
    assert [found[rule]["giou"] for rule in RULES] == [1.0, 1.0, 0.25, 0.25, 0.25]
    marks = [found[rule]["marks"] for rule in RULES]
    assert marks[0] > max(marks[1:]) and marks[3] < min(marks[1:3])

"""Live policies are asked as trainers and runtime ask; their scores, intervals and what they have forgotten."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("trl", reason="needs segzero-rt[train]")

import torch
from grpo_runs import SIDE, TABLETOP_POLICY, make_rows, write_policy
from PIL import Image
from policy_checkpoints import random_picture

from segzero_rt.answer_format import VISION_REASONER
from segzero_rt.errors import DatasetError, SegZeroError
from segzero_rt.image import load_image
from segzero_rt.preprocess import Preprocessor
from training.experiments import evaluate, retention
from training.experiments.design import EMPTY_THINKING
from training.experiments.intervals import difference, mean_interval
from training.experiments.live_policy import Asked, LivePolicy
from training.experiments.measures import Score, read_scores, score_reply, score_rows, summary, write_scores
from training.experiments.retention import compare_retention, retention_questions, score_retention
from training.experiments.shared_rows import split_rows, split_scenes
from training.experiments.supervised import label_text
from training.grpo_data import as_parts
from training.grpo_presets import debug
from training.picture_memory import TowerMemories
from training.policy_model import IMAGE_MEAN, IMAGE_STD
from training.visual_questions import PICTURE_QUESTIONS, ask_about_picture


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> LivePolicy:
    folder = write_policy(tmp_path_factory.mktemp("live") / "policy")
    preset = dataclasses.replace(debug(), input_size_hw=(SIDE, SIDE), max_completion_tokens=12)
    return LivePolicy.load(folder, preset)


# -- asking ------------------------------------------------------------------------------------------------------------


def test_prompts_are_the_trainer_s(policy: LivePolicy, tmp_path: Path) -> None:
    row = make_rows(tmp_path, 1)[0]
    given = policy.prompts([Asked(text=VISION_REASONER.user_prompt(row.question), picture=row.image)])
    resized = Preprocessor(
        input_size_hw=(SIDE, SIDE), patch_size=14, merge_size=2, image_mean=IMAGE_MEAN, image_std=IMAGE_STD
    ).resize(load_image(row.image))
    parts: Any = as_parts(row.question, VISION_REASONER)
    text = policy.processor.apply_chat_template(parts, add_generation_prompt=True)
    wanted = policy.processor(text=[text], images=[Image.fromarray(resized)], return_tensors="pt")
    assert given.token_ids == (tuple(wanted["input_ids"][0].tolist()),)
    assert given.pixel_values is not None and torch.equal(given.pixel_values, wanted["pixel_values"])


def test_a_picture_is_looked_at_once_and_replies_do_not_depend_on_their_batch(policy: LivePolicy) -> None:
    pictures = [random_picture(number, (SIDE, SIDE)) for number in range(2)]
    asked = [Asked(text=f"the cup {number}", picture=pictures[number % 2]) for number in range(5)]
    prompts = policy.prompts(asked)
    assert prompts.image_grid_thw is not None and len(prompts.image_grid_thw) == 2
    assert prompts.pictures == ((0,), (1,), (0,), (1,), (0,))
    together = policy.answer(asked)
    assert together == policy.answer(asked, num_at_once=1)
    assert len(set(together)) > 1, "the questions must matter, or this proves nothing"


def test_policies_with_one_tower_share_what_it_saw_and_reply_as_without(policy: LivePolicy, tmp_path: Path) -> None:
    asked = [Asked(text=f"the cup {number}", picture=random_picture(number, (SIDE, SIDE))) for number in range(3)]
    for name in ("one", "other"):
        policy.model.save_pretrained(tmp_path / name)
        policy.processor.save_pretrained(tmp_path / name)
    memories = TowerMemories(len(asked))
    for name in ("one", "other"):
        live = LivePolicy.load(tmp_path / name, policy.preset, memories=memories)
        assert live.answer(asked) == policy.answer(asked)
    assert len(memories.of(policy.model.model.visual)) == len(asked)


def test_a_reply_goes_on_where_it_is_made_to_begin(policy: LivePolicy) -> None:
    asked = [Asked(text="the cup", picture=random_picture(1, (SIDE, SIDE)))]
    ids = policy.prompts(asked).token_ids[0]
    assert policy.prompts(asked, reply_start="[1").token_ids[0] == (*ids, *policy.text_ids("[1"))
    begun = policy.answer(asked, reply_start="[1")[0]
    assert begun.startswith("[1") and begun != "[1" + policy.answer(asked)[0]


def test_pixels_of_another_size_are_refused(policy: LivePolicy) -> None:
    with pytest.raises(ValueError, match="expected pixels"):
        policy.answer([Asked(text="x", picture=random_picture(1, (28, 28)))])


# -- scores ------------------------------------------------------------------------------------------------------------


def test_rows_are_scored_one_by_one_and_kept(policy: LivePolicy, tmp_path: Path) -> None:
    rows = make_rows(tmp_path / "rows", 4)
    scores = score_rows(policy, rows)
    assert [score.item for score in scores] == [row.row_id for row in rows]
    assert [score.picture for score in scores] == [row.image.name for row in rows]
    write_scores(tmp_path / "scores.jsonl", scores)
    assert read_scores(tmp_path / "scores.jsonl") == scores
    (tmp_path / "scores.jsonl").write_text('{"item": 1}\n')
    with pytest.raises(SegZeroError, match="measure again"):
        read_scores(tmp_path / "scores.jsonl")


@pytest.mark.parametrize(
    ("reply", "start", "value", "parsed", "thinks"),
    [
        pytest.param("{answer}", EMPTY_THINKING, 1.0, True, False, id="answers at once"),
        pytest.param(
            " the cup. </think>\n<answer>{answer}", EMPTY_THINKING, 0.0, False, False, id="thinks all the same"
        ),
        pytest.param("<think> the cup. </think>\n<answer>{answer}", "", 1.0, True, True, id="may think"),
    ],
)
def test_thinking_in_an_answer_counts_nothing_where_none_is_wanted(
    policy: LivePolicy, tmp_path: Path, reply: str, start: str, value: float, parsed: bool, thinks: bool
) -> None:
    row = make_rows(tmp_path, 1)[0]
    whole = start + reply.format(answer=label_text(row, VISION_REASONER, EMPTY_THINKING))
    score = score_reply(policy, row, whole, start)
    assert (score.value, score.parsed, score.thinking_tokens > 0) == (value, parsed, thinks)
    assert score.reply == whole, "what was said is kept"


def scored(*values: float, pictures: str = "", kind: str = "name") -> list[Score]:
    """One score per value; `pictures` names each one's picture by a letter."""
    return [
        Score(item=str(number), kind=kind, picture=pictures[number] if pictures else str(number), value=value)
        for number, value in enumerate(values)
    ]


def test_summary_by_kind() -> None:
    told = summary([*scored(0.0, 1.0), *scored(0.5, kind="function")])
    assert told["value"] == pytest.approx(0.5)
    assert told["by_kind"] == {
        "function": {"value": 0.5, "num_questions": 1},
        "name": {"value": 0.5, "num_questions": 2},
    }
    with pytest.raises(ValueError, match="at least one"):
        summary([])
    with pytest.raises(ValueError, match="from 0 to 1"):
        scored(1.5)


# -- intervals ---------------------------------------------------------------------------------------------------------


def test_one_picture_has_no_spread() -> None:
    found = difference([([scored(0.2, 0.6, pictures="aa")], [scored(0.1, 0.3, pictures="aa")])])
    assert (found.mean, found.low, found.high) == pytest.approx((0.2, 0.2, 0.2))
    assert found.detectable == pytest.approx(0.0)


def test_two_pictures_by_hand() -> None:
    # Differences 1 and 0; both pictures twice with probability 1/4 each, else one of each: 1, 0 or 1/2.
    found = difference([([scored(1.0, 0.0)], [scored(0.0, 0.0)])], num_draws=20_000)
    assert (found.mean, found.low, found.high) == (0.5, 0.0, 1.0)
    assert found.standard_error == pytest.approx(np.sqrt(1 / 8), abs=0.005)
    assert found.detectable == pytest.approx(2.8 * np.sqrt(1 / 8), abs=0.02)


def test_questions_on_one_picture_are_drawn_together() -> None:
    apart = mean_interval([scored(*[1.0, 0.0] * 8)])
    together = mean_interval([scored(*[1.0] * 8, *[0.0] * 8, pictures="a" * 8 + "b" * 8)])
    assert together.standard_error > 2 * apart.standard_error
    uneven = mean_interval([scored(1.0, 1.0, 1.0, 0.0, pictures="aaab")], num_draws=20_000)
    assert uneven.mean == 0.75, "pictures with more questions weigh more"


def test_seeds_are_drawn_for_each_arm() -> None:
    # No spread over questions: 2 seeds at 1 and 0 against a constant give 1, 0 or 1/2, as two pictures would.
    ones, zeros = scored(1.0, 1.0), scored(0.0, 0.0)
    found = difference([([ones, zeros], [zeros])], num_draws=20_000)
    assert (found.mean, found.low, found.high) == (0.5, 0.0, 1.0)
    assert found.standard_error == pytest.approx(np.sqrt(1 / 8), abs=0.005)
    both = difference([([ones, zeros], [ones, zeros])], num_draws=20_000)
    assert both.standard_error == pytest.approx(np.sqrt(1 / 4), abs=0.01), "seeds are not pairs"


def test_splits_weigh_the_same_and_share_their_seeds() -> None:
    long, short = scored(*[1.0] * 9), scored(0.0)
    assert mean_interval([long]).mean == 1.0
    found = difference([([long], None), ([short], None)])
    assert (found.mean, found.low, found.high) == (0.5, 0.5, 0.5)
    good, bad = scored(1.0), scored(0.0)
    shared = difference([([good, bad], None), ([good, bad], None)], num_draws=20_000)
    assert shared.standard_error == pytest.approx(np.sqrt(1 / 8), abs=0.005), "one seed is good on both splits or none"


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        pytest.param([], "at least one split", id="no split"),
        pytest.param([([], None)], "at least one seed", id="no seed"),
        pytest.param([([scored(1.0)], [])], "at least one seed", id="no seed in the second arm"),
        pytest.param([([[]], None)], "at least one seed", id="no question"),
        pytest.param([([scored(1.0)], [scored(1.0, 0.0)])], "the same questions", id="more questions"),
        pytest.param([([scored(1.0)], [scored(1.0, pictures="b")])], "the same questions", id="other pictures"),
        pytest.param(
            [([scored(1.0)], None), ([scored(1.0), scored(1.0)], None)], "same number of seeds", id="more seeds"
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(splits: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        difference(splits)


# -- rows and retention ------------------------------------------------------------------------------------------------


def test_rows_are_rendered_once_and_grow(tmp_path: Path) -> None:
    first = split_rows(tmp_path, "ood_function", seed=3, num_rows=2)
    drawn = first[0].image.stat().st_mtime_ns
    more = split_rows(tmp_path, "ood_function", seed=3, num_rows=3)
    assert more[:2] == first and first[0].image.stat().st_mtime_ns == drawn
    assert split_rows(tmp_path, "ood_function", seed=3, num_rows=1) == first[:1]
    only = split_rows(tmp_path, "validation", seed=3, num_rows=2, kinds=("none",))
    assert [row.kind for row in only] == ["none", "none"]
    with pytest.raises(DatasetError, match="expected a split"):
        split_rows(tmp_path, "tests", seed=3, num_rows=1)


def test_a_picture_s_questions_are_drawn_as_ever() -> None:
    # The draws of a pretraining that goes on depend on the order in which kinds of question are tried.
    assert list(PICTURE_QUESTIONS) == ["colour", "count", "presence", "place", "region"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    split_scenes(folder, "validation", seed=5, num_scenes=2)
    return folder


def test_retention_asks_every_kind_of_the_same_pictures(scenes: Path) -> None:
    cache = split_scenes(scenes, "validation", seed=5, num_scenes=2)
    questions = retention_questions(cache, 2, "validation")
    assert questions == retention_questions(cache, 2, "validation")
    assert {one.kind for one in questions} <= set(retention.GROUPS[retention.ALL])
    assert len({one.item for one in questions}) == len(questions) > 10
    for one in questions:
        assert (one.answer is None) == (one.kind in retention.FOUND_KINDS) == bool(one.objects)
    rng = np.random.default_rng(3)
    assert ask_about_picture(rng, cache.objects[0], (280, 280))[1]


def test_the_shipped_policy_still_knows_what_it_was_taught(scenes: Path) -> None:
    cache = split_scenes(scenes, "validation", seed=5, num_scenes=2)
    questions = retention_questions(cache, 2, "validation")
    scores = score_retention(LivePolicy.load(TABLETOP_POLICY), cache, questions)
    assert [score.item for score in scores] == [one.item for one in questions]
    told = summary(scores)
    assert told["value"] > 0.6 and told["parse_rate"] == 1.0


@pytest.mark.parametrize(
    ("name", "base", "new", "lost", "kept"),
    [
        ("nothing", (1.0, 0.0), (1.0, 0.0), 0.0, 1.0),
        ("one of two", (1.0, 1.0), (1.0, 0.0), 50.0, 0.5),
        ("one for another", (1.0, 0.0), (0.0, 1.0), 0.0, 0.0),
        ("nothing to lose", (0.0, 0.0), (0.0, 1.0), -50.0, None),
    ],
)
def test_lost_and_kept(
    name: str, base: tuple[float, ...], new: tuple[float, ...], lost: float, kept: float | None
) -> None:
    visual = compare_retention(
        [[*scored(*base, kind="colour"), *scored(0.5, 0.5)]], [[*scored(*new, kind="colour"), *scored(0.5, 0.5)]]
    ).to_json()
    assert visual["lost_points"]["visual"]["mean"] == pytest.approx(lost)
    assert visual["kept"]["visual"] == kept
    assert visual["lost_points"]["found"]["mean"] == 0.0 and visual["kept"]["found"] is None


# -- the two programs --------------------------------------------------------------------------------------------------


def test_programs_print_one_document(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shipped = str(TABLETOP_POLICY)
    options = ["--rows", str(scenes), "--json"]
    status = retention.main([shipped, shipped, "--pictures", "2", "--seed", "5", *options])
    document = json.loads(capsys.readouterr().out)
    assert status == 0 and document["num_questions"] > 10
    assert document["policies"][0]["lost_points"]["all"]["mean"] == 0.0
    given = [shipped, "--base", shipped, "--questions", "2", "--kinds", "name,none", "--scores", str(tmp_path)]
    assert evaluate.main([*given, "--split", "validation", *options]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [entry["policy"] for entry in document["policies"]] == [shipped]
    assert document["policies"][0]["by_kind"].keys() == {"name", "none"}
    assert len(read_scores(tmp_path / "0-validation.jsonl")) == 2


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        pytest.param(evaluate, ["nowhere", "--split", "ood"], "expected a split", id="no such split"),
        pytest.param(evaluate, ["nowhere", "--kinds", "shape"], "kinds of question", id="no such kind"),
        pytest.param(retention, ["nowhere", "x", "--split", "tests"], "expected a split", id="split of retention"),
    ],
)
def test_programs_refuse_in_one_line(
    program: Any, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main([*arguments, "--rows", str(tmp_path)]) == 2
    told = capsys.readouterr()
    assert message in told.err and told.err.count("\n") == 1 and told.out == ""

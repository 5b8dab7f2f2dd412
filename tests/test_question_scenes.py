"""Samples of a split: the fixed schedule, what lies on the table, the dataset folder and `segzero scenes`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from segzero_rt.cli import main
from segzero_rt.dataset import read_dataset
from training.object_kinds import KINDS
from training.question_scenes import SPLIT_QUERY_KINDS, QuestionScene, _company, make_sample, schedule, write_samples
from training.questions import NONE, QUERY_KINDS, RELATION, SEVERAL
from training.scenes import HELD_OUT_LOOKS, SPLITS, random_state

SMALL_HW = (180, 240)


@pytest.fixture(scope="module")
def samples() -> list[QuestionScene]:
    return [make_sample("test", 11, index, SMALL_HW) for index in range(20)]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_any_prefix_is_balanced(split: str) -> None:
    asked = [schedule(split, index) for index in range(7 * 180)]
    kinds = Counter(query_kind for query_kind, _ in asked)
    assert kinds[NONE] == len(asked) / 10
    others = {kinds[kind] for kind in QUERY_KINDS if kind != NONE}
    assert max(others) - min(others) <= 1 and len(kinds) == len(QUERY_KINDS)
    for length in (13, 70, 333):
        prefix = Counter(query_kind for query_kind, _ in asked[:length])
        assert abs(prefix[NONE] - length / 10) <= 1
        assert max(prefix[k] for k in QUERY_KINDS if k != NONE) - min(prefix[k] for k in QUERY_KINDS if k != NONE) <= 1
    for query_kind in QUERY_KINDS:  # and each query kind goes round the kinds of objects
        targets = Counter(target for asked_kind, target in asked if asked_kind == query_kind)
        assert set(targets) == set(KINDS) and max(targets.values()) - min(targets.values()) <= 1


@pytest.mark.parametrize("split", SPLIT_QUERY_KINDS)
def test_splits_that_hold_out_ask_only_what_they_hold_out(split: str) -> None:
    asked = Counter(schedule(split, index)[0] for index in range(60))
    assert set(asked) == set(SPLIT_QUERY_KINDS[split]) and NONE not in asked
    assert len(set(asked.values())) == 1


def test_a_sample_is_a_function_of_its_arguments(samples: list[QuestionScene]) -> None:
    again = make_sample("test", 11, 4, SMALL_HW)
    assert np.array_equal(again.scene.image_rgb, samples[4].scene.image_rgb)
    assert again.question == samples[4].question
    assert make_sample("test", 12, 4, SMALL_HW).question != samples[4].question
    assert not np.array_equal(make_sample("train", 11, 4, SMALL_HW).scene.image_rgb, again.scene.image_rgb)


def test_samples_follow_the_schedule_with_four_to_nine_objects(samples: list[QuestionScene]) -> None:
    for index, sample in enumerate(samples):
        query_kind, target_kind = schedule("test", index)
        objects = sample.scene.objects
        assert sample.question.kind == query_kind
        assert 4 <= len(objects) <= 9
        if query_kind == NONE:
            assert sample.question.targets == ()
            assert all(thing.kind != target_kind for thing in objects)
        else:
            assert target_kind in {objects[i].kind for i in sample.question.targets}
        assert all((thing.kind, thing.colour) not in HELD_OUT_LOOKS for thing in objects)


def test_at_least_half_of_the_samples_have_a_distractor(samples: list[QuestionScene]) -> None:
    assert sum(sample.distractor for sample in samples) >= len(samples) / 2
    for sample in samples:
        asked = [sample.scene.objects[i] for i in sample.question.targets]
        others = [thing for i, thing in enumerate(sample.scene.objects) if i not in sample.question.targets]
        alike = {(a.kind, b.kind) for a in asked for b in others if a.kind == b.kind or a.colour == b.colour}
        assert sample.distractor == bool(alike)


def test_company_alone_gives_most_targets_something_alike() -> None:
    """Cheap, since nothing is drawn: hundreds of tables instead of twenty."""
    alike = 0
    for index in range(400):
        query_kind, target_kind = schedule("test", index)
        company = _company(random_state("test", 0, index), "test", query_kind, target_kind)
        assert 4 <= len(company) <= 9
        assert (query_kind == NONE) == all(kind != target_kind for kind, _, _ in company)
        target = next((thing for thing in company if thing[0] == target_kind), None)
        others = [thing for thing in company if thing is not target]
        alike += target is not None and any(o[0] == target[0] or o[1] == target[1] for o in others)
    assert alike >= 240


@pytest.mark.parametrize("split", ["ood_colour", "ood_relation", "ood_wording", "ood_function"])
def test_a_sample_of_each_held_out_split(split: str) -> None:
    sample = make_sample(split, 0, 0, SMALL_HW)
    assert sample.question.kind in SPLIT_QUERY_KINDS[split] and sample.question.targets
    looks = {(sample.scene.objects[i].kind, sample.scene.objects[i].colour) for i in sample.question.targets}
    assert bool(looks & HELD_OUT_LOOKS) == (split == "ood_colour")


@pytest.mark.parametrize(
    ("split", "index", "text", "boxes"),
    [
        ("test", 0, "cup", ((350, 186, 416, 261),)),
        ("test", 3, "the mugs", ((297, 72, 364, 152), (373, 267, 441, 349))),
        ("train", 5, "the tea is ready to be poured, what helps", ((341, 12, 410, 94),)),
        ("ood_relation", 1, "the thing to hold hot tea left of the key", ((107, 227, 178, 314),)),
    ],
)
def test_seeds_keep_their_samples(split: str, index: int, text: str, boxes: tuple[tuple[int, ...], ...]) -> None:
    """Trained weights and published scores belong to these pictures: a change here is a new data set."""
    sample = make_sample(split, 3, index)
    assert sample.question.text == text
    found = np.array([sample.scene.objects[i].box_xyxy for i in sample.question.targets])
    assert np.abs(found - np.array(boxes)).max() <= 1  # OpenCV builds may differ by a pixel's edge


@pytest.mark.parametrize(("split", "seed", "index"), [("nothing", 0, 0), ("test", -1, 0), ("test", 0, -1)])
def test_bad_requests_are_value_errors(split: str, seed: int, index: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        make_sample(split, seed, index)


def test_a_written_folder_reads_back_as_it_was_made(tmp_path: Path) -> None:
    write_samples(tmp_path / "scenes", "test", 5, 10)
    read = read_dataset(tmp_path / "scenes")
    assert len(read) == 10 and [sample.kind for sample in read].count(NONE) == 1
    for index in (2, 3, 9):  # relation, several, none
        made = make_sample("test", 5, index)
        sample = read[index]
        wanted = [made.scene.objects[i] for i in made.question.targets]
        assert sample.text == made.question.text and sample.kind == made.question.kind
        assert np.array_equal(sample.image_rgb, made.scene.image_rgb)
        assert len(sample.objects) == len(wanted)
        for label, thing in zip(sample.objects, wanted, strict=True):
            assert np.array_equal(label.mask, thing.mask) and label.box_xyxy == thing.box_xyxy
            assert label.label.endswith(thing.kind) and thing.colour in label.label
        assert len(sample.extra["scene_objects"]) == len(made.scene.objects)
        assert sample.extra["thinking"] == made.question.thinking
        assert (sample.extra["split"], sample.extra["seed"]) == ("test", 5)
    assert {read[2].kind, read[3].kind} == {RELATION, SEVERAL}


def test_the_command_writes_what_was_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scenes"
    assert main(["scenes", "--split", "validation", "--count", "2", "--seed", "9", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"2 questions of split validation in {out}\n"
    assert [sample.extra["split"] for sample in read_dataset(out)] == ["validation"] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "tset"], f"expected --split to be one of {', '.join(SPLITS)}, got 'tset'"),
        (["--count", "0"], "expected a whole number above 0 and below 10^9, got '0'"),
        (["--count", "many"], "expected a whole number above 0 and below 10^9, got 'many'"),
        (["--seed", "-1"], "expected a whole number from 0, got '-1'"),
        (["--seed", "1.5"], "expected a whole number from 0, got '1.5'"),
        (["--sede", "1"], "unrecognized arguments"),
    ],
)
def test_bad_options_get_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scenes", *arguments, "--out", str(tmp_path / "scenes")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert message in captured.err and not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["scenes", "--count", "1", "--out", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_help_names_every_split(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scenes", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(split in text for split in SPLITS) and "example" in text and "default" in text

"""Pretraining: what is learnt from and what is not, and that a run which was killed ends as one that was not."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_cache import make_cache, make_tokenizer
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from segzero_rt.answer_format import FORMATS, THINK_OPEN
from segzero_rt.cli import main
from training import pretrain
from training.grounding_data import EVERYTHING, IGNORED, LONG, PLAIN, SHORT, Batch, GroundingData
from training.knowledge import KNOWLEDGE
from training.policy_model import INPUT_SIDE, Layout
from training.pretrain import Pretraining, debug
from training.publish import publish
from training.scene_cache import SceneCache
from training.segmenter_train import presets as segmenter_presets
from training.tokenizer import OBJECT_STARTS
from training.visual_questions import ask_about_world

SIZE = INPUT_SIDE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pretrain")


@pytest.fixture(scope="module")
def cache(folder: Path) -> SceneCache:
    return make_cache(folder / "scenes")


@pytest.fixture(scope="module")
def data(cache: SceneCache, folder: Path) -> GroundingData:
    return GroundingData(cache, make_tokenizer(cache, folder))


@dataclasses.dataclass
class Segment:
    """One packed question, decoded."""

    prompt: str
    answer: str
    """What the policy sees."""
    learnt: str
    """What it is trained to say."""
    boxes: list[list[float]]
    """Box labels of the read-out, in pixels of the input."""


def segments_of(data: GroundingData, batch: Batch, layout: Layout) -> list[Segment]:
    turn = len(data.turn)
    lengths = [length for count, length in layout.groups for _ in range(count)]
    found = []
    for row in range(len(batch.token_ids)):
        for start, length in zip(layout.starts, lengths, strict=True):
            ids = batch.token_ids[row, start : start + length].tolist()
            labels = batch.labels[row, start : start + length].tolist()
            cut = next(i for i in range(length) if ids[i : i + turn] == data.turn) + turn
            assert all(label in (IGNORED, following) for label, following in zip(labels, [*ids[1:], -1], strict=True))
            assert labels[: cut - 1] == [IGNORED] * (cut - 1), "no loss on a prompt"
            answer = [one for one in ids[cut:] if one != data.pad]
            at = (batch.box_at[:, 0] == row) & (batch.box_at[:, 1] >= start) & (batch.box_at[:, 1] < start + length)
            decode = data.tokenizer.decode
            found.append(
                Segment(
                    prompt=decode(ids[: cut - turn], skip_special_tokens=False),
                    answer=decode(answer, skip_special_tokens=False),
                    learnt=decode([one for one in labels if one != IGNORED], skip_special_tokens=False),
                    boxes=(batch.box_to[at] * SIZE).tolist(),
                )
            )
    return found


@pytest.fixture(scope="module")
def segments(data: GroundingData) -> list[Segment]:
    rng = np.random.default_rng(5)
    found = []
    for groups in (((6, SHORT), (1, LONG), (3, PLAIN)), ((4, SHORT), (1, EVERYTHING), (2, PLAIN))):
        layout = data.layout(*groups)
        found += segments_of(data, data.batch(rng, np.arange(12).repeat(3), layout), layout)
    return found


def grounded(segments: list[Segment]) -> list[Segment]:
    return [one for one in segments if one.prompt.startswith("Please find") and not only_thought(one)]


def only_thought(segment: Segment) -> bool:
    return asks_for_knowledge(segment.prompt) and segment.answer.startswith(THINK_OPEN) and not segment.boxes


def asks_for_knowledge(prompt: str) -> bool:
    question = prompt.split('" with bbox')[0].split("' with bbox")[0]
    relation = question.replace("nearest to", "").replace("closest to", "").replace("next to", "")
    said = (use for one in KNOWLEDGE.values() for use in (*one.uses, *one.consequences))
    held_out = (use for one in KNOWLEDGE.values() for use in (one.held_out_use, one.held_out_consequence))
    return any(use in question for use in (*said, *held_out)) or "what helps" in question or " to " in relation


def test_the_answer_is_learnt_whole_or_from_behind_a_swapped_thinking(segments: list[Segment]) -> None:
    swapped = 0
    for one in segments:
        if only_thought(one):
            continue
        assert one.answer.endswith("<|im_end|>")
        if one.learnt != one.answer:
            assert one.learnt.startswith("</think>") and one.answer.endswith(one.learnt) and len(one.boxes) == 1
            swapped += 1
    assert 0.03 < swapped / len(grounded(segments)) < 0.2


def test_grounded_answers_are_in_the_format_that_was_asked_for(segments: list[Segment]) -> None:
    seen = set()
    for one in grounded(segments):
        family = next(known for known in FORMATS.values() if one.prompt.startswith(known.prompt_head))
        assert one.prompt.endswith(family.prompt_tail)
        match = re.fullmatch(r"<think> (.+) </think>\n<answer>(.+)</answer><\|im_end\|>", one.answer)
        assert match is not None
        written = json.loads(match[2])
        listed = written if family.multiple else [written] * bool(written)
        assert [entry[family.box_key] for entry in listed] == [[round(value) for value in box] for box in one.boxes]
        assert all(0 <= value <= SIZE for box in one.boxes for value in box)
        seen.add((family.name, min(len(listed), 2)))
    assert seen >= {("vision_reasoner", 0), ("vision_reasoner", 1), ("vision_reasoner", 2), ("seg_zero", 1)}


def test_no_question_by_function_or_consequence_carries_a_box(segments: list[Segment]) -> None:
    """Connecting what a thing is for with where it lies is left to reinforcement."""
    assert len(grounded(segments)) > 300
    assert not any(asks_for_knowledge(one.prompt) and one.boxes for one in segments)


def test_questions_left_to_reinforcement_are_only_thought_about(segments: list[Segment]) -> None:
    thoughts = [one for one in segments if only_thought(one)]
    assert thoughts and all(one.learnt == one.answer for one in thoughts)
    assert all(re.fullmatch(rf"{THINK_OPEN} [A-Z].+ (made to|helps?).*\.", one.answer) for one in thoughts)


def test_plain_questions_have_short_answers_and_no_boxes(segments: list[Segment]) -> None:
    plain = [one for one in segments if not one.prompt.startswith("Please find")]
    assert plain and all(not one.boxes and "<answer>" not in one.answer for one in plain)


def test_world_knowledge_is_read_without_a_picture(data: GroundingData) -> None:
    ids, labels, layout = data.knowledge_batch(np.random.default_rng(0), 48)
    assert ids.shape == labels.shape == (48, layout.length) and layout.prefix_length == 0
    assert not (ids == data.tokenizer.token_to_id("<|image_pad|>")).any()
    asked = {ask_about_world(np.random.default_rng(seed)) for seed in range(60)}
    assert any(answer.startswith("to ") for _, answer in asked) and {answer for _, answer in asked} & set(KNOWLEDGE)


def test_what_is_thought_without_a_picture_ends_before_an_answer(data: GroundingData) -> None:
    ids, labels, _ = data.knowledge_batch(np.random.default_rng(0), 48)
    learnt = [data.tokenizer.decode(row[row != IGNORED].tolist(), skip_special_tokens=False) for row in labels]
    prompts = [data.tokenizer.decode(row.tolist(), skip_special_tokens=False) for row in ids]
    thoughts = [said for said in learnt if said.startswith(THINK_OPEN)]
    assert 12 < len(thoughts) < 36
    assert all(re.fullmatch(rf"{THINK_OPEN} [A-Z].+ (made to|helps?).*\.", said) for said in thoughts), thoughts
    for prompt, said in zip(prompts, learnt, strict=True):
        assert ("Please find" in prompt) == said.startswith(THINK_OPEN), prompt


# -- runs ----------------------------------------------------------------------------------------------------------


def narrow_config(vocab_size: int, token_ids: dict[str, int]) -> Qwen2_5_VLConfig:
    """The shipped policy's depth, since the read-outs tap layers by number, at a fraction of its width."""
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 6,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 20.0, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "window_size": 140,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        },
        image_token_id=token_ids["<|image_pad|>"],
        video_token_id=token_ids["<|endoftext|>"],
        vision_start_token_id=token_ids["<|vision_start|>"],
        vision_end_token_id=token_ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def start(folder: Path, cache: SceneCache, monkeypatch: pytest.MonkeyPatch) -> Pretraining:
    monkeypatch.setattr(pretrain, "tabletop_config", narrow_config)
    return Pretraining(debug(), folder, cache)


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_was_killed_ends_as_one_that_was_not(
    cache: SceneCache, data: GroundingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain, "LOG_EVERY", 2)  # a line is a mean: it must not reach back over the kill
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        data.tokenizer.save(str(tmp_path / name / "tokenizer.json"))
    start(tmp_path / "whole", cache, monkeypatch).run()
    train_step = Pretraining._train_step

    def dies(self: Pretraining) -> dict[str, float]:
        if self.step == 4:
            raise KeyboardInterrupt
        return train_step(self)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Pretraining, "_train_step", dies)
        start(tmp_path / "killed", cache, monkeypatch).run()
    resumed = start(tmp_path / "killed", cache, monkeypatch)
    assert resumed.step == 4
    resumed.run()

    last = metrics_of(tmp_path / "whole")[-1]
    assert last["step"] == debug().num_steps and all(math.isfinite(value) for value in last.values())
    assert {"text", "pointer", "box", "box_iou", "vision_kind", "cells_box", "knowledge"} <= set(last)
    assert metrics_of(tmp_path / "killed")[-1] == pytest.approx(last, rel=1e-4)
    whole, killed = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "killed"))
    assert whole["step"] == killed["step"] == debug().num_steps
    for name, tensor in whole["policy"].items():
        torch.testing.assert_close(killed["policy"][name], tensor, atol=1e-5, rtol=1e-3)

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "whole" / "hf")
    assert torch.equal(model.model.language_model.embed_tokens.weight, whole["policy"]["lm_head.weight"])
    saved = (tmp_path / "whole" / "hf" / "tokenizer.json").read_text()
    assert json.loads(saved) == json.loads(data.tokenizer.to_str())
    assert not [path.name for path in (tmp_path / "whole").iterdir() if path.name.endswith(".part")]


def test_a_loss_that_is_not_finite_stops_the_run(
    cache: SceneCache, data: GroundingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data.tokenizer.save(str(tmp_path / "tokenizer.json"))
    run = start(tmp_path, cache, monkeypatch)
    with torch.no_grad():
        next(run.policy.vision.parameters()).fill_(math.nan)
    with pytest.raises(FloatingPointError, match="at step 0"):
        run.run()
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain", "--preset", "huge"], "expected --preset to be one of tabletop, tabletop_brief, debug"),
        (["pretrain", "--preset", "tabletop_brief"], "expected --start-from with --preset tabletop_brief"),
        (["segmenter", "--preset", "huge"], "expected --preset to be one of"),
        (["pretrain", "--preset", "debug", "--scenes", "5"], "expected --scenes of at least 6, got 5"),
        (["pretrain", "--scenes", "-3"], "expected a whole number above 0"),
        (["sleep"], "invalid choice: 'sleep'"),
        ([], "required: STAGE"),
    ],
)
def test_bad_options_get_one_line_and_leave_nothing(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "run")] if arguments[:1] in (["pretrain"], ["segmenter"]) else []
    assert main(["train", *arguments, *out]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and message in captured.err
    assert not list(tmp_path.iterdir())


def test_help_names_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    for stage, presets in (("pretrain", pretrain.PRESETS), ("segmenter", segmenter_presets())):
        assert main(["train", stage, "--help"]) == 0
        text = capsys.readouterr().out
        assert all(re.search(rf"\b{name}  ", text) for name in presets), stage


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ("pretrain", "segmenter", "example")),
        (["pretrain"], ("checkpoint.pt", "metrics.jsonl", "hf/", "debug", "runs/pretrain", "example")),
        (["segmenter"], ("checkpoint.pt", "log.jsonl", "hf/", "runs/segmenter", "example")),
    ],
)
def test_help_says_what_is_written_where(
    arguments: list[str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *arguments, "--help"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in words)
    assert max(map(len, text.splitlines())) <= 120


def test_every_coordinate_and_every_described_object_is_supervised_where_it_stands(
    data: GroundingData, cache: SceneCache
) -> None:
    layout = data.layout((4, SHORT), (1, LONG))
    batch = data.batch(np.random.default_rng(3), np.arange(6), layout)
    names = {number: token for token, number in data.tokenizer.get_vocab().items()}
    labelled = {
        (int(row), int(at)): int(value) for (row, at), value in zip(batch.number_at, batch.number_to, strict=True)
    }
    for row in range(6):
        position = layout.prefix_length
        while position < layout.length:
            if (row, position) not in labelled:
                position += 1
                continue
            value, first = labelled[(row, position)], position + 1
            digits = ""
            while labelled.get((row, position)) == value and names[int(batch.token_ids[row, position + 1])].isdigit():
                digits += names[int(batch.token_ids[row, position + 1])]
                position += 1
            assert int(digits) == value, (row, first)
    assert labelled and max(labelled.values()) <= SIZE
    assert torch.allclose(batch.watch_to.sum(1), torch.ones(len(batch.watch_to)), atol=1e-5)
    for row, at, start in batch.watch_at.tolist():
        assert start in layout.starts and start <= at
        assert names[int(batch.token_ids[row, at])] in ("Ġa", "Ġan", *OBJECT_STARTS)


def test_a_published_policy_is_gone_on_from(
    cache: SceneCache, data: GroundingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(tmp_path / "run", cache, monkeypatch)
    run.save()
    publish(tmp_path / "run", tmp_path / "published")
    stored = load_file(tmp_path / "published/model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    next_run = Pretraining(debug(), tmp_path / "next", cache, start_from=tmp_path / "published")
    assert next_run.step == debug().num_vision_steps
    for (name, before), after in zip(
        run.policy.model.state_dict().items(), next_run.policy.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(after, before.half().float(), msg=name)
    for before, after in zip(run.readouts.parameters(), next_run.readouts.parameters(), strict=True):
        torch.testing.assert_close(after, before.half().float())

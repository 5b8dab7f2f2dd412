"""A GRPO run asks as the runtime asks, refuses what it cannot train on, and goes on where it was killed."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("trl", reason="needs segzero-rt[train]")

import torch
from grpo_runs import SIDE, TABLETOP_POLICY, make_rows, make_run, write_policy
from PIL import Image
from policy_checkpoints import policy_bundle, random_picture

from segzero_rt.answer_format import SEG_ZERO, VISION_REASONER, AnswerFormat
from segzero_rt.chat import Chat
from segzero_rt.errors import DatasetError, SegZeroError
from segzero_rt.preprocess import Preprocessor
from training.grpo import build_trainer, check_rows, newest_checkpoint, train_grpo
from training.grpo_callbacks import METRICS_NAME, REPORT_NAME, read_metrics
from training.grpo_data import as_parts, training_dataset
from training.grpo_model import load_policy
from training.grpo_presets import PRESETS, GrpoPreset, Precision, Vllm, debug, seg_zero_3b, tabletop, with_lora
from training.grpo_processor import CHAT_TEMPLATE, load_processor
from training.grpo_trainer import SegmentationGrpoTrainer, SharedPromptGrpoTrainer
from training.policy_model import IMAGE_MEAN, IMAGE_STD
from training.rows import TrainingRow

ASSETS = Path(__file__).resolve().parent.parent.parent / "shared/assets/qwen2.5-vl-7b"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With `policy/`, so that each test need not make one."""
    path = tmp_path_factory.mktemp("grpo")
    write_policy(path / "policy")
    return path


# -- what the policy is asked ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [VISION_REASONER, SEG_ZERO], ids=lambda family: family.name)
@pytest.mark.parametrize("question", ["the red mug", "What's <think> for?", "Größe 🙂 \\n", "a  b\n\nc"])
def test_prompts_are_the_runtime_s(family: AnswerFormat, question: str) -> None:
    processor = load_processor(str(TABLETOP_POLICY))
    picture = Image.fromarray(random_picture(3, (280, 280)))
    parts = as_parts(question, family)
    parts[1]["content"][0]["image"] = picture
    given = processor.apply_chat_template([parts], add_generation_prompt=True, tokenize=True, return_dict=True)
    chat = Chat(TABLETOP_POLICY / "tokenizer.json")
    asked = [
        *chat.before_picture(family.system_prompt), *[chat.image_token_id] * 100, *chat.after_picture(),
        *chat.question(family.user_prompt(question)),
    ]  # fmt: skip
    assert list(given["input_ids"][0]) == asked


def test_pixels_are_the_runtime_s(tmp_path: Path) -> None:
    row = dataclasses.replace(make_rows(tmp_path, 1)[0], input_size_hw=(84, 56), objects=())
    dataset = training_dataset([row], VISION_REASONER, (84, 56))
    given = load_processor(str(TABLETOP_POLICY)).image_processor([dataset[0]["image"]], return_tensors="np")
    runtime = Preprocessor(
        input_size_hw=(84, 56), patch_size=14, merge_size=2, image_mean=IMAGE_MEAN, image_std=IMAGE_STD
    ).patches(np.asarray(Image.open(row.image)))
    frames = given["pixel_values"].reshape(len(runtime), 3, 2, 14 * 14)
    for frame in range(2):
        np.testing.assert_allclose(frames[:, :, frame].reshape(len(runtime), -1), runtime, atol=2e-6)
    assert given["image_grid_thw"].tolist() == [[1, 6, 4]]


@pytest.mark.skipif(not ASSETS.exists(), reason="needs ../shared/assets")
def test_the_template_writes_what_qwen_s_own_does() -> None:
    processor = load_processor(str(ASSETS))
    own = json.loads((ASSETS / "chat_template.json").read_text())["chat_template"]
    assert own != CHAT_TEMPLATE
    parts = as_parts("the red mug", SEG_ZERO)
    ours, theirs = (
        processor.apply_chat_template(parts, chat_template=template, add_generation_prompt=True)
        for template in (CHAT_TEMPLATE, own)
    )
    assert ours == theirs
    assert ours.count("<|image_pad|>") == 1


@pytest.mark.parametrize("shared", [True, False], ids=["shared-prompts", "trl"])
def test_evaluation_answers_greedily_as_the_runtime_does(folder: Path, tmp_path: Path, shared: bool) -> None:
    from export.policy import export_policy
    from segzero_rt.policy import Policy

    run = make_run(folder, max_completion_tokens=20, num_eval_rows=6, shared_prompts=shared)
    run = dataclasses.replace(run, out=tmp_path / "run", eval_rows=[*run.rows, *run.eval_rows])
    trainer = build_trainer(run)
    assert isinstance(trainer, SharedPromptGrpoTrainer) is shared
    said: dict[str, tuple[int, ...]] = {}
    observe = trainer.reward_funcs[-1]

    def remember(completion_ids: list[list[int]], **given: Any) -> list[float]:
        said.update(zip(given["row_id"], map(tuple, completion_ids), strict=True))
        values: list[float] = observe(completion_ids=completion_ids, **given)
        return values

    trainer.reward_funcs[-1] = remember
    trainer.evaluate()
    exported = export_policy(
        folder / "policy", tmp_path / "onnx", input_size_hw=(SIDE, SIDE), max_length=700, max_new_tokens=20,
        gate_questions=("the cup",),
    )  # fmt: skip
    runtime = Policy.load(policy_bundle(exported, tmp_path / "onnx"), backend="cpu", threads=1)
    assert len(said) == 6
    for row in run.eval_rows:
        expected = runtime.answer(np.asarray(Image.open(row.image)), row.question).token_ids
        assert said[row.row_id][: len(expected)] == expected, row.row_id
    assert len(set(said.values())) > 1, "the questions must matter, or this proves nothing"


# -- presets -----------------------------------------------------------------------------------------------------------

PUBLISHED: dict[str, dict[str, Any]] = {  # reference/segzero.md, section 3
    "seg_zero_3b": {"kl_coef": 5e-3, "max_completion_tokens": 1300, "rewards": "seg_zero_strict", "eval_every": 50},
    "seg_zero_7b": {"kl_coef": 5e-3, "max_completion_tokens": 1300, "rewards": "seg_zero_strict", "micro_batch": 1},
    "vision_reasoner_7b": {"kl_coef": 1e-2, "max_completion_tokens": 2000, "rewards": "vision_reasoner"},
}
SHARED_NUMBERS = {
    "num_generations": 8, "prompts_per_step": 16, "learning_rate": 1e-6, "warmup_steps": 0, "weight_decay": 1e-2,
    "max_grad_norm": 1.0, "entropy_coef": 1e-3, "clip_range": 0.2, "temperature": 1.0, "top_p": 1.0, "seed": 42,
    "max_prompt_tokens": 1300, "num_epochs": 1.0, "freeze_vision": False, "visual_tokens": 900,
    "precision": Precision.BF16_MIXED,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name: str) -> None:
    preset = PRESETS[name]()
    for field, value in {**SHARED_NUMBERS, **PUBLISHED[name]}.items():
        assert getattr(preset, field) == value, field
    assert preset.name == name
    assert "7B" in preset.policy or "3B" in preset.policy


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_becomes_a_trl_configuration(name: str, tmp_path: Path) -> None:
    from training.grpo import trl_config

    preset = dataclasses.replace(PRESETS[name](), vllm=None)
    config = trl_config(preset, tmp_path, num_rewards=3)
    assert config.generation_batch_size == preset.samples_per_step
    assert config.reward_weights == [1.0, 1.0, 1.0, 0.0]
    assert (config.beta, config.num_generations) == (preset.kl_coef, preset.num_generations)
    assert config.steps_per_generation == config.gradient_accumulation_steps


BAD_PRESETS: dict[str, Callable[[], GrpoPreset]] = {
    "one sample": lambda: dataclasses.replace(debug(), num_generations=1),
    "no whole micro batches": lambda: dataclasses.replace(tabletop(), micro_batch=48),
    "input of no whole cells": lambda: dataclasses.replace(debug(), input_size_hw=(280, 290)),
    "unknown format": lambda: dataclasses.replace(debug(), answer_format="xml"),
    "bfloat16 weights trained whole": lambda: dataclasses.replace(seg_zero_3b(), precision=Precision.BF16),
    "shared prompts with vLLM": lambda: dataclasses.replace(tabletop(), vllm=Vllm.COLOCATE),
    "all of the base": lambda: dataclasses.replace(debug(), base_share=1.0),
    "less than nothing of the base": lambda: dataclasses.replace(debug(), base_share=-0.1),
    "adapters mixed with the base": lambda: dataclasses.replace(with_lora(debug()), base_share=0.5),
    "no steps between evaluations": lambda: dataclasses.replace(debug(), eval_every=0),
    "4-bit weights and vLLM": lambda: dataclasses.replace(with_lora(seg_zero_3b(), four_bit=True), vllm=Vllm.COLOCATE),
    "a learning rate of nothing": lambda: dataclasses.replace(debug(), learning_rate=0.0),
    "a learning rate below nothing": lambda: dataclasses.replace(debug(), learning_rate=-1e-4),
    "a learning rate that is no number": lambda: dataclasses.replace(debug(), learning_rate=float("nan")),
    "a learning rate without end": lambda: dataclasses.replace(debug(), learning_rate=float("inf")),
    "a negative seed": lambda: dataclasses.replace(debug(), seed=-1),
    "a seed of more than 32 bits": lambda: dataclasses.replace(debug(), seed=2**32),
}


@pytest.mark.parametrize("make", BAD_PRESETS.values(), ids=BAD_PRESETS.keys())
def test_numbers_that_do_not_fit_are_refused(make: Callable[[], GrpoPreset]) -> None:
    with pytest.raises(ValueError, match="expected"):
        make()


def test_a_step_is_shared_out_evenly_or_not_at_all() -> None:
    preset = seg_zero_3b()
    assert [preset.accumulation_steps(processes) for processes in (1, 2, 8, 64)] == [64, 32, 8, 1]
    for processes in (3, 128):
        with pytest.raises(SegZeroError, match="micro-batch"):
            preset.accumulation_steps(processes)


def test_lora_freezes_the_rest() -> None:
    preset = with_lora(PRESETS["seg_zero_7b"](), four_bit=True)
    assert preset.lora is not None
    assert preset.lora.four_bit
    assert (preset.precision, preset.freeze_vision, preset.vllm) == (Precision.BF16, True, None)
    assert preset.learning_rate == pytest.approx(1e-5)


# -- what stops before training ----------------------------------------------------------------------------------------

BAD_ROWS: dict[str, tuple[Callable[[TrainingRow], TrainingRow], str]] = {
    "other input size": (lambda row: dataclasses.replace(row, input_size_hw=(84, 84)), "input_size_hw"),
    "control token": (lambda row: dataclasses.replace(row, question="x <|im_end|> y"), r"control token <\|im_end\|>"),
    "picture token": (lambda row: dataclasses.replace(row, question="<|image_pad|>"), r"control token <\|image_pad\|>"),
    "long question": (lambda row: dataclasses.replace(row, question="why " * 600), "at most 600 tokens"),
    "object without a point": (
        lambda row: dataclasses.replace(row, objects=(dataclasses.replace(row.objects[0], points_xy=()),)),
        "expected a point",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_bad_row_stops_before_training_and_is_named(
    folder: Path, tmp_path: Path, change: Callable[[TrainingRow], TrainingRow], message: str
) -> None:
    run = make_run(folder)
    rows = [*run.rows[:3], change(run.rows[3])]
    with pytest.raises(DatasetError, match=message) as error:
        train_grpo(dataclasses.replace(run, rows=rows, out=tmp_path / "run"))
    assert "row-3" in str(error.value)
    assert not (tmp_path / "run").exists()


def test_too_few_rows_are_refused(folder: Path) -> None:
    run = make_run(folder)
    with pytest.raises(DatasetError, match="at least 2 rows"):
        check_rows(dataclasses.replace(run, rows=run.rows[:1]))
    with pytest.raises(DatasetError, match="validation row"):
        check_rows(dataclasses.replace(run, eval_rows=[]))


def test_a_folder_that_is_no_policy_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    run = dataclasses.replace(make_run(folder), policy=str(tmp_path / "policy"), out=tmp_path / "run")
    with pytest.raises(SegZeroError, match="policy"):
        train_grpo(run)


# -- runs --------------------------------------------------------------------------------------------------------------


def steps_of(run: Any) -> list[dict[str, Any]]:
    """What must be the same whenever and however often a run was stopped."""
    keys = ("step", "loss", "reward", "grad_norm", "kl", "entropy", "completions/mean_length", "eval_reward")
    lines = read_metrics(run.out / METRICS_NAME)
    return [{key: line[key] for key in keys if key in line} for line in lines if "train_runtime" not in line]


def test_a_run_leaves_its_curve_its_report_and_the_best_policy(folder: Path) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration

    run = make_run(folder, out="whole", max_steps=3, learning_rate=1e-2)
    policy = train_grpo(run)
    lines = steps_of(run)
    assert [line["step"] for line in lines] == [0, 1, 1, 2, 2, 3, 3]
    report = (run.out / REPORT_NAME).read_text()
    assert "the cup 4" in report
    assert "data:image/jpeg" in report
    assert list((run.out / "runs").rglob("events.out.tfevents*"))
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(run.policy).state_dict()
    best = Qwen2_5_VLForConditionalGeneration.from_pretrained(policy).state_dict()
    assert base.keys() == best.keys()
    assert any(not torch.equal(base[name], best[name]) for name in base)
    reworded = [dataclasses.replace(run.rows[0], question="the plate"), *run.rows[1:]]
    for changed, named in (
        ({"preset": dataclasses.replace(run.preset, seed=7)}, "preset.seed 42 instead of 7"),
        ({"rows": reworded}, "rows_sha256"),
        ({"eval_rows": run.eval_rows[:1]}, "validation_sha256"),
    ):
        with pytest.raises(SegZeroError, match=f"{named}.*another --out"):
            train_grpo(dataclasses.replace(run, **changed))


def test_a_share_of_the_base_is_mixed_into_the_best_policy(folder: Path) -> None:
    """Half of it lies half way, in every weight."""
    runs = [
        make_run(folder, out=f"share-{share}", max_steps=2, learning_rate=1e-2, base_share=share)
        for share in (0.0, 0.5)
    ]
    base, best, mixed = (
        load_policy(runs[0].preset, str(path)).state_dict() for path in (runs[0].policy, *map(train_grpo, runs))
    )
    assert any(not torch.equal(base[name], best[name]) for name in base)
    for name in base:
        torch.testing.assert_close(mixed[name], (base[name] + best[name]) / 2, msg=name)


_KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from grpo_runs import make_run
from training.grpo import train_grpo
from training.grpo_observer import Observer

def dies(self, *arguments, trainer_state=None, **given):
    if trainer_state.global_step == 2 and len(given["row_id"]) == 4:  # sampled for the third step, not yet learnt from
        os.kill(os.getpid(), signal.SIGKILL)
    return observe(self, *arguments, trainer_state=trainer_state, **given)

observe = Observer.__call__
Observer.__call__ = dies
train_grpo(make_run(Path({folder!r}), out="killed", max_steps=4, learning_rate=1e-2))
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(folder: Path) -> None:
    torch.set_num_threads(1)
    whole = make_run(folder, out="unbroken", max_steps=4, learning_rate=1e-2)
    train_grpo(whole)
    script = _KILLED.format(tests=str(Path(__file__).parent), folder=str(folder))
    killed = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, timeout=600,
        cwd=Path(__file__).resolve().parent.parent, env={"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert killed.returncode == -9, killed.stderr[-2000:]
    run = make_run(folder, out="killed", max_steps=4, learning_rate=1e-2)
    assert [line["step"] for line in steps_of(run)][-1] == 2
    (run.out / "checkpoint-3").mkdir()  # as if it had been killed while it wrote one
    (run.out / "checkpoint-3" / "trainer_state.json").write_text('{"global')
    train_grpo(run)
    assert steps_of(run) == steps_of(whole)


def test_the_newest_whole_checkpoint_counts(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "absent") is None
    for step in (9, 10, 11, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-11" / "trainer_state.json").write_text('{"global')
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert not (tmp_path / "checkpoint-11").exists()


def test_a_checkpoint_without_its_weights_is_refused(folder: Path) -> None:
    run = make_run(folder, out="refused")
    trainer = build_trainer(run)
    result = trainer.model.load_state_dict({}, strict=False)
    with pytest.raises(SegZeroError, match="are missing"):
        trainer._issue_warnings_after_load(result)
    assert isinstance(trainer, SegmentationGrpoTrainer)

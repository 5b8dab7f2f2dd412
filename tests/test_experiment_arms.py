"""The arms of an experiment: labels, the supervised loop and its resuming, replies that begin with given text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs segzero-rt[train]")

import torch
from grpo_runs import SIDE, make_rows, make_run, write_policy

from segzero_rt.answer_format import ANSWER_CLOSE, SEG_ZERO, VISION_REASONER
from segzero_rt.answer_parser import parse_answer
from segzero_rt.errors import DatasetError
from training.experiments.design import EMPTY_THINKING
from training.experiments.live_policy import LivePolicy
from training.experiments.reinforced import begin_replies, step_seconds, train_reinforced
from training.experiments.supervised import SupervisedRun, SupervisedTraining, label_text
from training.grpo import build_trainer
from training.grpo_callbacks import METRICS_NAME, read_metrics
from training.grpo_presets import debug
from training.reward_readings import has_think_format
from training.rows import TrainingRow

START = "[1"
"""Text that a random policy would hardly begin with."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("arms")
    write_policy(path / "policy")
    return path


def labelled_rows(folder: Path, count: int) -> list[TrainingRow]:
    return [
        dataclasses.replace(row, extra={"thinking": f"There is a cup, number {number}."})
        for number, row in enumerate(make_rows(folder / "labelled", count))
    ]


def supervised(folder: Path, out: Path, **changes: Any) -> SupervisedRun:
    preset = dataclasses.replace(debug(), input_size_hw=(SIDE, SIDE), max_completion_tokens=8)
    rows = labelled_rows(folder, 8)
    options: dict[str, Any] = {
        "preset": dataclasses.replace(preset, **changes.pop("preset", {})), "out": out,
        "policy": str(folder / "policy"), "rows": rows[:6], "eval_rows": rows[6:], "reply_start": "",
        "learning_rate": 1e-2, "num_steps": 6, "batch": 4, "evaluations": 3, "warmup_steps": 2, "seed": 3,
    }  # fmt: skip
    return SupervisedRun(**{**options, **changes})


# -- labels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [VISION_REASONER, SEG_ZERO], ids=lambda family: family.name)
@pytest.mark.parametrize("number", [0, 2], ids=["one object", "none"])
def test_labels_are_what_the_parser_reads(folder: Path, family: Any, number: int) -> None:
    row = labelled_rows(folder, 3)[number]
    whole, answer = label_text(row, family, ""), label_text(row, family, EMPTY_THINKING)
    assert whole == family.assistant_text(row.extra["thinking"], []).partition("<answer>")[0] + "<answer>" + answer
    assert answer.endswith(ANSWER_CLOSE) and has_think_format(EMPTY_THINKING + answer)
    for text in (whole, EMPTY_THINKING + answer):
        read = parse_answer(text, answer_format=family, input_size_hw=(SIDE, SIDE), source_size_hw=(SIDE, SIDE))
        assert [prompt.box_xyxy for prompt in read.prompts] == [one.box_xyxy for one in row.objects]


def test_a_row_without_thinking_is_named(folder: Path) -> None:
    row = make_rows(folder / "bare", 1)[0]
    assert label_text(row, VISION_REASONER, EMPTY_THINKING)
    with pytest.raises(DatasetError, match=r"row-0.*thinking to learn from"):
        label_text(row, VISION_REASONER, "")


# -- the supervised loop -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["", EMPTY_THINKING], ids=["with a thinking", "answers alone"])
def test_it_learns_what_it_is_shown(folder: Path, tmp_path: Path, start: str) -> None:
    run = supervised(folder, tmp_path / "run", reply_start=start, num_steps=16, evaluations=1)
    training = SupervisedTraining(run)
    frozen = {name: weight.clone() for name, weight in training.model.model.visual.named_parameters()}
    policy = training.train()
    losses = [line["loss"] for line in read_metrics(run.out / METRICS_NAME) if "loss" in line]
    assert len(losses) == 2 and losses[1] < 0.7 * losses[0], "the mean of steps 11 to 16 against that of the first 10"
    assert run.preset.freeze_vision
    for name, weight in training.model.model.visual.named_parameters():
        assert torch.equal(weight, frozen[name])
    assert LivePolicy.load(policy, run.preset).model is not None


def test_the_loss_is_the_mean_over_the_tokens_of_the_labels(folder: Path, tmp_path: Path) -> None:
    training = SupervisedTraining(supervised(folder, tmp_path / "run", batch=2, reply_start=EMPTY_THINKING))
    rows = training.run.rows[:2]
    model, live = training.model, training.live
    expected, tokens = 0.0, 0
    for row in rows:
        asked = live.prompts([_asked(live, row)], reply_start=EMPTY_THINKING)
        reply = [*live.text_ids(label_text(row, live.answer_format, EMPTY_THINKING)), *live.end_ids()]
        ids = torch.tensor([[*asked.token_ids[0], *reply]])
        with torch.no_grad():
            types = (ids == model.config.image_token_id).int()
            logits = model(
                input_ids=ids, pixel_values=asked.pixel_values, image_grid_thw=asked.image_grid_thw,
                mm_token_type_ids=types,
            ).logits[0, -len(reply) - 1 : -1]  # fmt: skip
        expected -= float(torch.log_softmax(logits, -1).gather(1, torch.tensor(reply)[:, None]).sum())
        tokens += len(reply)
    assert training._loss(rows).item() == pytest.approx(expected / tokens, rel=1e-4)


def _asked(live: LivePolicy, row: TrainingRow) -> Any:
    from training.experiments.live_policy import Asked

    return Asked(text=live.answer_format.user_prompt(row.question), picture=row.image)


def test_every_pass_sees_every_row_once(folder: Path, tmp_path: Path) -> None:
    training = SupervisedTraining(supervised(folder, tmp_path / "run"))
    seen = []
    for step in range(6):  # 24 examples of 6 rows: four passes, which steps of 4 do not divide
        training.step = step
        seen += training._indices()
    passes = [seen[first : first + 6] for first in range(0, 24, 6)]
    assert all(sorted(one) == list(range(6)) for one in passes)
    assert len({tuple(one) for one in passes}) > 1, "in another order"
    other = SupervisedTraining(supervised(folder, tmp_path / "other", seed=4))
    assert other._indices() != seen[:4]


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.5), (1, 1.0), (2, 1.0), (3, 0.75), (5, 0.25)], ids=lambda value: str(value)
)
def test_the_rate_warms_up_and_decays(folder: Path, tmp_path: Path, step: int, expected: float) -> None:
    training = SupervisedTraining(supervised(folder, tmp_path / "run", learning_rate=1.0))
    assert training._rate(step) == pytest.approx(expected)


class Stopped(Exception):
    """Stands for a process that was killed."""


@pytest.mark.parametrize("at", [1, 3, 4], ids=["before a checkpoint", "behind one", "at the next"])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    torch.set_num_threads(1)
    whole = supervised(folder, tmp_path / "whole", preset={"freeze_vision": False})
    SupervisedTraining(whole).train()
    step = SupervisedTraining.train_step

    def stops(self: SupervisedTraining) -> float:
        if self.step == at:
            raise Stopped
        return step(self)

    broken = dataclasses.replace(whole, out=tmp_path / "broken")
    with monkeypatch.context() as patched:
        patched.setattr(SupervisedTraining, "train_step", stops)
        with pytest.raises(Stopped):
            SupervisedTraining(broken).train()
    resumed = SupervisedTraining(broken)
    assert resumed.step == at // 2 * 2
    resumed.train()
    ours, theirs = (
        [
            {key: line.get(key) for key in ("step", "loss", "validation")}
            for line in read_metrics(run.out / METRICS_NAME)
        ]
        for run in (whole, broken)
    )
    assert ours == theirs
    weights = [SupervisedTraining(run).model.state_dict() for run in (whole, broken)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


# -- replies that begin with given text --------------------------------------------------------------------------------


def begun_trainer(folder: Path, out: Path, **changes: Any) -> Any:
    run = make_run(
        folder, out=str(out), shared_prompts=True, num_generations=4, prompts_per_step=2, micro_batch=8, kl_coef=0.0,
        **{"entropy_coef": 0.0, **changes},
    )  # fmt: skip
    trainer: Any = build_trainer(run)
    begin_replies(trainer, START)
    return trainer


def batch_of(trainer: Any) -> dict[str, Any]:
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer.model.train()
    inputs: dict[str, Any] = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    return inputs


def test_every_reply_begins_with_it_and_rewards_see_it(folder: Path, tmp_path: Path) -> None:
    trainer = begun_trainer(folder, tmp_path / "run")
    heard: list[str] = []
    observe = trainer.reward_funcs[-1]

    def hear(completions: Sequence[Any], **given: Any) -> Any:
        heard.extend(str(completion[0]["content"]) for completion in completions)
        return observe(completions=completions, **given)

    trainer.reward_funcs[-1] = hear
    inputs = batch_of(trainer)
    start = trainer.processing_class.tokenizer(START)["input_ids"]
    assert all(row[: len(start)].tolist() == start for row in inputs["completion_ids"])
    trainer.evaluate()
    assert len(heard) > 8 and all(text.startswith(START) for text in heard), "in training and in evaluation"
    assert len(set(heard)) > 2, "and then they differ"


def test_what_is_given_teaches_nothing(folder: Path, tmp_path: Path) -> None:
    trainer = begun_trainer(folder, tmp_path / "run", loss="bnpo")
    inputs = batch_of(trainer)
    advantages = torch.tensor([1.0, -2.0, 0.5, 0.5])
    groups = inputs["prompt_ids"].tolist()
    shares: list[list[int]] = []
    advantage = torch.zeros(8)
    for row, prompt in enumerate(groups):  # samples stand shuffled: each group gets the same four
        advantage[row] = advantages[len([one for one in shares if one == prompt])]
        shares.append(prompt)
    inputs = {**inputs, "advantages": advantage}
    length = len(trainer.processing_class.tokenizer(START)["input_ids"])
    drawn = inputs["completion_mask"].clone()
    drawn[:, :length] = 0
    gradients = []
    for more, tokens in (({}, inputs["completion_mask"].sum()), ({"tool_mask": drawn}, drawn.sum())):
        trainer.model.zero_grad()
        trainer._compute_loss(trainer.model, {**inputs, **more}).backward()
        parts = [weight.grad.flatten() * tokens for weight in trainer.model.parameters() if weight.grad is not None]
        gradients.append(torch.cat(parts))
    assert gradients[1].norm() > 0
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[1].norm()


def test_only_trainers_that_share_prompts_can(folder: Path, tmp_path: Path) -> None:
    trainer = build_trainer(make_run(folder, out=str(tmp_path / "run"), shared_prompts=False))
    begin_replies(trainer, "")
    with pytest.raises(TypeError, match="shares prompts"):
        begin_replies(trainer, START)


def test_an_arm_trains_goes_on_and_is_timed(folder: Path, tmp_path: Path) -> None:
    run = make_run(folder, out=str(tmp_path / "run"), shared_prompts=True, max_steps=2)
    policy = train_reinforced(run, START)
    assert (policy / "config.json").is_file()
    assert train_reinforced(run, START) == policy, "a run that is done stays done"
    seconds = step_seconds(dataclasses.replace(run, out=tmp_path / "timed"), START)
    assert len(seconds) == 2 and min(seconds) > 0
    assert not list((tmp_path / "timed").glob("checkpoint-*"))

"""With shared prompts a GRPO step is TRL's step: the same loss, the same gradient, samples from the same policy."""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs segzero-rt[train]")

import torch
from grpo_runs import make_run, write_policy
from trl import GRPOTrainer

from training import grpo_trainer
from training.grpo import build_trainer
from training.grpo_presets import Lora, Precision


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shared")
    write_policy(path / "policy")
    return path


def shared_trainer(folder: Path, out: Path, **changes: Any) -> Any:
    run = make_run(folder, out=str(out), shared_prompts=True, num_generations=4, prompts_per_step=4, **changes)
    return build_trainer(run)


def micro_batches(trainer: Any) -> list[dict[str, Any]]:
    """What TRL makes of the first step's rows, samples shuffled among micro batches; advantages that matter."""
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    made = []
    for number in range(trainer.args.gradient_accumulation_steps):
        trainer._step = number
        inputs = trainer._prepare_inputs(batch)
        made.append({**inputs, "advantages": torch.linspace(-1, 2, len(inputs["advantages"]))})
    return made


def loss_and_gradient(trainer: Any, batches: list[dict[str, Any]]) -> tuple[float, dict[str, torch.Tensor]]:
    trainer.model.zero_grad()
    total = 0.0
    for inputs in batches:
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
        total += loss.item()
    return total, {
        name: weight.grad.clone() for name, weight in trainer.model.named_parameters() if weight.grad is not None
    }


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"micro_batch": 16}, id="one micro batch"),
        pytest.param({"micro_batch": 4}, id="groups torn apart by micro batches"),
        pytest.param({"micro_batch": 16, "temperature": 0.7, "kl_coef": 0.0}, id="colder, without KL"),
        pytest.param({"micro_batch": 16, "freeze_vision": True}, id="frozen vision"),
        pytest.param({"micro_batch": 8, "lora": Lora(rank=2, alpha=4)}, id="adapters"),
    ],
)
def test_loss_and_gradient_are_trl_s(folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    trainer = shared_trainer(folder, tmp_path / "run", precision=Precision.FLOAT32, **changes)
    batches = micro_batches(trainer)
    loss, gradient = loss_and_gradient(trainer, batches)
    theirs = GRPOTrainer._get_per_token_logps_and_entropies
    trainer._get_per_token_logps_and_entropies = MethodType(theirs, trainer)
    expected_loss, expected = loss_and_gradient(trainer, batches)
    assert loss == pytest.approx(expected_loss, rel=1e-4, abs=1e-6)
    assert gradient.keys() == expected.keys() and expected
    whole = torch.cat([weight.flatten() for weight in expected.values()]).norm()
    assert whole > 0
    for name in expected:
        assert (gradient[name] - expected[name]).norm() < 1e-3 * expected[name].norm() + 1e-5 * whole, name


def test_sampling_takes_trl_s_settings_and_a_new_seed_each_time(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = shared_trainer(folder, tmp_path / "run", micro_batch=16, temperature=0.9, top_p=0.8)
    asked = []
    sample = grpo_trainer.sample_replies

    def remembered(policy: Any, prompts: Any, sampling: Any, ends: Any) -> Any:
        asked.append((len(prompts), sampling, policy.model.training))
        return sample(policy, prompts, sampling, ends)

    monkeypatch.setattr(grpo_trainer, "sample_replies", remembered)
    micro_batches(trainer)
    trainer._buffered_inputs = None
    micro_batches(trainer)
    assert trainer.model.training
    trainer.evaluate()
    (num_prompts, first, training), (_, second, _), (_, greedy, _) = asked
    assert (num_prompts, first.num_replies, training) == (4, 4, False), "each prompt is read once, without dropout"
    assert (first.temperature, first.top_p, first.max_new_tokens) == (0.9, 0.8, 12)
    assert first.never == (trainer.model.config.image_token_id,)
    assert first.seed != second.seed
    assert (greedy.temperature, greedy.num_replies) == (0.0, 1)

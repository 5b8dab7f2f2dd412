"""Several GRPO runs from the same weights, and the mean of what they end with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs segzero-rt[train]")
pytest.importorskip("trl", reason="needs segzero-rt[train]")

from grpo_runs import make_run  # noqa: E402

from segzero_rt.errors import SegZeroError  # noqa: E402
from training import grpo_runs as runs  # noqa: E402
from training.grpo_model import load_policy  # noqa: E402
from training.grpo_presets import debug, with_lora  # noqa: E402
from training.grpo_runs import average_policies, train_runs  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def weights(run: Any, path: Path | str) -> dict[str, Any]:
    return dict(load_policy(run.preset, str(path)).state_dict())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_mean_counts_every_policy_alike(folder: Path, tmp_path: Path, count: int) -> None:
    run = make_run(folder, num_runs=2)
    model = load_policy(run.preset, run.policy)
    expected = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    policies = []
    for number in range(count):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)))
        policies.append(tmp_path / f"policy-{number}")
        model.save_pretrained(policies[-1])
        for name, value in model.state_dict().items():
            expected[name] += value / count
    found = weights(run, average_policies(policies, tmp_path / "mean", preset=run.preset))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_two_runs_end_in_the_mean_of_both(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(folder, out="two", max_steps=1, learning_rate=1e-2, num_runs=2)
    policy = train_runs(run)
    first, second = (weights(run, run.out / f"run-{number}" / "hf") for number in (1, 2))
    assert any(not torch.equal(first[name], second[name]) for name in first), "another seed, another run"
    for name, value in weights(run, policy).items():
        torch.testing.assert_close(value, (first[name] + second[name]) / 2, msg=name)
    assert {path.name for path in policy.iterdir()} == {path.name for path in (run.out / "run-1" / "hf").iterdir()}

    def again(_run: Any) -> Path:
        raise AssertionError("a run that has ended is not trained again")

    monkeypatch.setattr(runs, "train_grpo", again)
    assert train_runs(run) == policy
    with pytest.raises(SegZeroError, match="another --out"):
        train_runs(dataclasses.replace(run, preset=dataclasses.replace(run.preset, seed=7)))


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("none", {"num_runs": 0}, "num_runs of at least 1"),
        ("seeds beyond the last", {"num_runs": 2, "seed": 2**32 - 1}, "seed"),
    ],
)
def test_a_preset_refuses_runs(name: str, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        dataclasses.replace(debug(), **changes)


def test_adapters_are_trained_in_one_run() -> None:
    assert with_lora(dataclasses.replace(debug(), num_runs=3)).num_runs == 1
    with pytest.raises(ValueError, match="LoRA"):
        dataclasses.replace(with_lora(debug()), num_runs=2)

"""The rollout benchmark compares before it times, and puts the right side over the other."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import rollout, rollout_decoders


def arm(loop: float, alone: float) -> dict[str, float]:
    return {"loop_samples_per_s": loop, "rollout_samples_per_s": alone}


@pytest.mark.parametrize(
    ("arms", "expected"),
    [
        pytest.param({"trl": arm(2.0, 4.0)}, {}, id="TRL alone"),
        pytest.param({"shared": arm(2.0, 4.0)}, {}, id="nothing to compare with"),
        pytest.param(
            {"shared": arm(6.0, 20.0), "shared_sampling": arm(3.0, 18.0), "trl": arm(2.0, 4.0)},
            {"shared": {"loop": 3.0, "rollout": 5.0}, "shared_sampling": {"loop": 1.5, "rollout": 4.5}},
            id="all",
        ),
    ],
)
def test_speed_ups_are_over_trl(arms: dict[str, dict[str, float]], expected: dict[str, dict[str, float]]) -> None:
    assert rollout.speed_ups(arms) == expected


def test_one_step_cannot_be_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["rollout", "--steps", "1"])
    with pytest.raises(SystemExit):
        rollout.main()
    assert "at least 2 steps" in capsys.readouterr().err


@pytest.mark.slow
def test_the_shipped_policy_says_and_thinks_the_same_both_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rollout, "pin_to_cores", lambda count: None)  # the test's process goes on after it
    options = ["--prompts", "2", "--steps", "2", "--arms", "shared", "shared_sampling", "trl", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["rollout", *options])
    rollout.main()
    (path,) = tmp_path.glob("rollout_*.json")
    result = json.loads(path.read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["result"] == str(path)
    numerics = result["numerics"]
    assert numerics["equal_greedy"] == numerics["num_prompts"] == 2
    assert 0 < numerics["sampled_against_scored"] < 1e-3
    assert 0 < numerics["scored_against_trl"] < 1e-3
    assert set(result["speed_up"]) == {"shared", "shared_sampling"}
    for arm_result in result["arms"].values():
        assert len(arm_result["step_s"]) == 1
        assert arm_result["rollout_s"][0] + arm_result["rest_s"][0] == pytest.approx(arm_result["step_s"][0])


def test_decoders_are_timed_beside_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from policy_checkpoints import write_checkpoint

    write_checkpoint(tmp_path / "policy")
    monkeypatch.setattr(rollout_decoders, "pin_to_cores", lambda count: None)
    monkeypatch.setattr(rollout_decoders, "ORDINARY", (50, 300))
    options = ["--policy", str(tmp_path / "policy"), "--prompts", "2", "--replies", "3", "--length", "9"]
    monkeypatch.setattr(sys, "argv", ["rollout_decoders", *options, "--out", str(tmp_path)])
    rollout_decoders.main()
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(told["step_ms"]) == {"onnx_packed", "onnx_unpacked", "shared_prompt"}
    assert min(told["step_ms"].values()) > 0

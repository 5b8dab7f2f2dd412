"""The picture of a GRPO run: what it reads of the metrics, that it is drawn, and its errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs segzero-rt[train]")
pytest.importorskip("matplotlib", reason="needs segzero-rt[train]")

from training.grpo_curves import main, validation_curves


def evaluation(step: int, value: float, **kinds: float) -> dict[str, Any]:
    return {
        "step": step, "eval_rewards/box_giou/mean": value,
        **{f"eval_box_giou/{kind}": score for kind, score in kinds.items()},
    }  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    lines = [
        evaluation(0, 0.5, name=0.8, function=0.1),
        {"step": 1, "reward": 5.0, "box_giou/function": 0.9},
        evaluation(50, 0.7, name=0.7, function=0.6),
    ]
    cut = '{"step": 51, "rew'  # as a run that was killed leaves it
    (tmp_path / "metrics.jsonl").write_text("\n".join([*map(json.dumps, lines), cut]))
    return tmp_path


def test_only_evaluations_count(run: Path) -> None:
    assert validation_curves(run) == {
        "all questions": [(0, 0.5), (50, 0.7)], "name": [(0, 0.8), (50, 0.7)], "function": [(0, 0.1), (50, 0.6)],
    }  # fmt: skip


def test_the_same_run_makes_the_same_picture(run: Path) -> None:
    drawn = []
    for name in ("one.svg", "other.svg"):
        out = run / name / "curves.svg"
        out.parent.mkdir()
        assert main([str(run), "--out", str(out)]) == 0
        drawn.append(out.read_text())
    assert drawn[0] == drawn[1] and "function" in drawn[0] and "consequence" not in drawn[0]
    assert sorted(path.name for path in (run / "one.svg").iterdir()) == ["curves.svg"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        pytest.param(None, "metrics.jsonl, found none", id="no run"),
        pytest.param('{"step": 1, "reward": 2.0}\n', "expected an evaluation", id="none yet"),
    ],
)
def test_nothing_to_draw_is_one_line(
    tmp_path: Path, lines: str | None, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    if lines is not None:
        (tmp_path / "metrics.jsonl").write_text(lines)
    assert main([str(tmp_path), "--out", str(tmp_path / "curves.svg")]) == 2
    told = capfd.readouterr().err
    assert message in told and told.count("\n") == 1
    assert not (tmp_path / "curves.svg").exists()

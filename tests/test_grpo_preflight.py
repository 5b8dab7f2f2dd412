"""What `segzero train grpo` refuses before it renders, reads or loads anything, and what it says then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs segzero-rt[train]")

from grpo_runs import TABLETOP_POLICY

from segzero_rt import cli
from segzero_rt.errors import SegZeroError
from segzero_rt.training import grpo_preflight as installed_preflight
from training import grpo_preflight
from training.grpo_preflight import RUN_NAME, check_claim, check_processes, settings_of
from training.grpo_presets import PRESETS, debug

POLICY = str(TABLETOP_POLICY)


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """A folder that looks as if it had rows; whoever reads them stops with another message."""
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/rows.jsonl").write_text("no JSON\n")
    return str(tmp_path / "rows")


REFUSED = [
    pytest.param(["--vllm", "colocate"], "no vLLM", id="vLLM where prompts are shared"),
    pytest.param(["--vllm", "server"], "no vLLM", id="a vLLM server where prompts are shared"),
    pytest.param(["--qlora"], "segzero-rt[qlora]", id="4-bit weights without their library"),
    pytest.param(["--qlora", "--vllm", "colocate"], "4-bit weights without vLLM", id="4-bit weights with vLLM"),
    pytest.param(["--lora", "--qlora"], "not allowed with", id="two kinds of adapters"),
    pytest.param(["--lora", "--base-share", "0.2"], "without LoRA", id="a share of the base with adapters"),
    pytest.param(["--precision", "bf16"], "LoRA with bfloat16", id="whole bfloat16 weights"),
    pytest.param(["--micro-batch", "48"], "micro batches", id="no whole micro batches"),
    pytest.param(["--learning-rate", "nan"], "a learning rate", id="no learning rate"),
    pytest.param(["--seed", "-1"], "a seed from 0", id="a negative seed"),
    pytest.param(["--policy", "/nowhere"], "config.json", id="no such policy"),
    pytest.param(["--policy", "runs/nowhere/hf"], "config.json", id="a policy of another folder"),
    pytest.param(["--data", "/nowhere"], "found no /nowhere", id="no rows to train on"),
    pytest.param(["--validation", "/nowhere"], "found no /nowhere", id="no rows to validate on"),
    pytest.param(["--preset", "seg_zero_7b"], "give --data", id="a preset that renders nothing"),
    pytest.param(["--preset", "seg_zero_7b", "--data", "ROWS"], "give --data", id="the same without validation"),
    pytest.param(
        ["--preset", "seg_zero_7b", "--data", "ROWS", "--validation", "ROWS"], "groups of 2", id="vLLM over two of one"
    ),
    pytest.param(
        ["--preset", "seg_zero_7b", "--vllm", "server", "--data", "ROWS", "--validation", "ROWS"], "pip install vllm",
        id="vLLM that is not installed",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_cannot_work_is_refused_before_anything_begins(
    options: list[str], message: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for module in (grpo_preflight, installed_preflight):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    options = [rows if option == "ROWS" else option for option in options]
    policy = [] if "--policy" in options else ["--policy", POLICY]
    status = cli.main(["train", "grpo", *policy, *options, "--out", str(tmp_path / "run")])
    told = capsys.readouterr().err
    assert status == 2 and message in told and told.count("\n") == 1, told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("preset", "processes", "message"),
    [
        pytest.param("tabletop", 2, "--base-share 0", id="a share of the base on two processes"),
        pytest.param("seg_zero_3b", 3, "micro-batch", id="a step that cannot be shared out"),
        pytest.param("seg_zero_3b", 1, "--vllm off", id="half a vLLM group"),
        pytest.param("seg_zero_3b", 8, "", id="the authors' machine"),
        pytest.param("vision_reasoner_7b", 4, "", id="four GPUs"),
        pytest.param("tabletop", 1, "", id="one process"),
    ],
)
def test_processes_fit_or_are_refused(preset: str, processes: int, message: str) -> None:
    if not message:
        check_processes(PRESETS[preset](), processes)
        return
    with pytest.raises(SegZeroError, match=message):
        check_processes(PRESETS[preset](), processes)


def changed(settings: dict[str, Any], **values: Any) -> str:
    return json.dumps({**settings, "preset": {**settings["preset"], **values}})


EARLIER = {
    "the same": (lambda settings: json.dumps(settings), ""),
    "an earlier version's, with fewer settings": (lambda settings: '{"policy": "p"}', ""),
    "another seed": (lambda settings: changed(settings, seed=7), r"preset\.seed 7 instead of 42"),
    "adapters": (lambda settings: changed(settings, lora={"rank": 8}), r'preset\.lora {"rank": 8} instead of null'),
    "another policy": (lambda settings: json.dumps({**settings, "policy": "q"}), 'policy "q" instead of "p"'),
    "many changes": (
        lambda settings: changed(settings, seed=7, beta=1, max_steps=9, eval_every=9, num_rows=9, num_eval_rows=9),
        "and 1 more",
    ),
    "half a file": (lambda settings: json.dumps(settings)[:40], "to hold a run's settings"),
    "no settings": (lambda settings: "[]", "to hold a run's settings"),
}


@pytest.mark.parametrize(("earlier", "message"), EARLIER.values(), ids=EARLIER.keys())
def test_a_folder_is_one_run_s_and_says_what_differs(earlier: Any, message: str, tmp_path: Path) -> None:
    settings = settings_of(debug(), "p")
    (tmp_path / RUN_NAME).write_text(earlier(settings))
    if not message:
        check_claim(tmp_path, settings)
        return
    with pytest.raises(SegZeroError, match=message) as error:
        check_claim(tmp_path, settings)
    assert "choose another --out" in str(error.value)


def test_a_folder_of_another_run_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / RUN_NAME).write_text(json.dumps(settings_of(PRESETS["tabletop"](), POLICY)))
    status = cli.main(["train", "grpo", "--policy", POLICY, "--seed", "43", "--out", str(tmp_path)])
    assert status == 2 and "preset.seed 42 instead of 43" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [RUN_NAME]

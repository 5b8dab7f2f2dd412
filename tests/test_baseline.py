"""The baseline harness: fair pairing, honest accounting of children, and equal answers from both sides."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.baseline import interleave
from benchmarks.measuring import check_files, paired, run_and_exit, shown_argument, write_result
from benchmarks.process import check_answers, run_once
from segzero_rt.commands.bench import Task, draw_picture
from segzero_rt.errors import DatasetError
from segzero_rt.graph import default_threads
from segzero_rt.mask import mask_iou

ROOT = Path(__file__).parent.parent
ALLOCATE = "import sys; block = bytearray({megabytes} * 1_000_000); print('{{\"objects\": []}}'); sys.exit({status})"


def test_paired_by_hand() -> None:
    result = paired([1.0, 2.0, 3.0], [10.0, 20.0, 60.0])
    assert (result["segzero_median"], result["baseline_median"], result["ratio"]) == (2.0, 20.0, 10.0)
    low, high = result["ratio_interval_95"]
    assert low <= 10.0 <= high and low >= 10.0 * 0.99 and high <= 20.0 * 1.01
    assert paired([2.0], [3.0])["ratio_interval_95"] == [1.5, 1.5]


@pytest.mark.parametrize(("ours", "theirs"), [([], []), ([1.0], [1.0, 2.0])], ids=["empty", "unequal"])
def test_paired_refuses(ours: list[float], theirs: list[float]) -> None:
    with pytest.raises(ValueError, match="one length"):
        paired(ours, theirs)


@pytest.mark.parametrize(
    ("ends_with", "status", "line"),
    [
        pytest.param(None, None, "", id="nothing"),
        pytest.param(0, 0, "", id="zero"),
        pytest.param(DatasetError("expected a folder"), 2, "some: expected a folder\n", id="refused"),
        pytest.param(FileNotFoundError(2, "No such file", "x"), 2, "some: [Errno 2] No such file: 'x'\n", id="no file"),
        pytest.param(subprocess.CalledProcessError(2, ["child"]), 2, "", id="a child has said it"),
    ],
)
def test_a_program_refuses_in_one_line(
    ends_with: Any, status: int | None, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def program() -> int | None:
        if isinstance(ends_with, Exception):
            raise ends_with
        return ends_with

    with pytest.raises(SystemExit) as ended:
        run_and_exit(program, "some")
    assert ended.value.code == status and capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("part", "shown"),
    [
        pytest.param("--bundle", "--bundle", id="an option"),
        pytest.param("bundles/tabletop", "bundles/tabletop", id="within the checkout"),
        pytest.param("/somewhere/else/B", "B", id="elsewhere"),
        pytest.param("int8=/somewhere/B", "int8=B", id="a name and elsewhere"),
        pytest.param("--out=/somewhere", "--out=somewhere", id="an option and elsewhere"),
        pytest.param("int8=bundles/B", "int8=bundles/B", id="a name and within"),
    ],
)
def test_results_do_not_tell_where_things_lay(part: str, shown: str) -> None:
    assert shown_argument(part) == shown


def test_files_that_a_child_would_miss(tmp_path: Path) -> None:
    check_files(Path(__file__))
    with pytest.raises(FileNotFoundError, match=r"config.json: expected a file"):
        check_files(Path(__file__), tmp_path / "config.json")


def test_a_program_that_is_broken_shows_where() -> None:
    with pytest.raises(ZeroDivisionError):
        run_and_exit(lambda: 1 // 0, "some")


def test_interleave_takes_turns_and_keeps_sides_apart() -> None:
    order: list[str] = []

    def side(name: str, seconds: float) -> Any:
        def ask(image_rgb: np.ndarray, question: str) -> dict[str, float]:
            order.append(f"{name}{question}")
            time.sleep(seconds)
            return {name: seconds * 1e3}

        return ask

    tasks = [Task(question=str(index), load_image=lambda: np.zeros((1, 1, 3), np.uint8)) for index in range(3)]
    result = interleave(side("a", 0.005), side("b", 0.02), tasks)
    assert order == ["a0", "b0", "b1", "a1", "a2", "b2"]
    assert result["end_to_end_ms"]["ratio"] == pytest.approx(4, rel=0.5)
    assert result["segzero"]["stages_ms"] == {"a": {"p50": 5.0, "p90": 5.0, "p99": 5.0}}
    assert result["end_to_end_ms"]["num_pairs"] == 3


def test_counts_the_memory_of_the_child_and_not_of_this_process() -> None:
    ballast = np.ones(400_000_000, np.uint8)  # larger than both children together
    small, large = (
        run_once([sys.executable, "-c", ALLOCATE.format(megabytes=size, status=0)], cores=1) for size in (1, 150)
    )
    assert ballast[-1] == 1
    assert 140e6 < large.peak_bytes - small.peak_bytes < 160e6
    assert small.peak_bytes < 100e6
    assert large.wall_ms > 0 and large.cpu_ms > 0 and large.document == {"objects": []}


def test_a_run_without_an_answer_counts_and_a_crash_does_not() -> None:
    run = run_once([sys.executable, "-c", ALLOCATE.format(megabytes=1, status=3)], cores=1)
    assert run.document == {"objects": []}
    with pytest.raises(SystemExit, match="ended with 1"):
        run_once([sys.executable, "-c", ALLOCATE.format(megabytes=1, status=1)], cores=1)


def test_large_outputs_do_not_block() -> None:
    script = "import sys; sys.stderr.write('x' * 300_000); print('y' * 300_000); print('{}')"
    assert run_once([sys.executable, "-c", script], cores=1).document == {}


@pytest.mark.parametrize("cores", [1, 2])
def test_children_are_pinned(cores: int) -> None:
    script = "import json, os; print(json.dumps(len(os.sched_getaffinity(0))))"
    assert run_once([sys.executable, "-c", script], cores=cores).document == min(cores, default_threads())


def test_different_answers_are_not_timed() -> None:
    same = {"objects": [{"box_xyxy": [1.0, 2.0, 3.0, 4.0], "score": 0.5}]}
    check_answers(same, {"objects": [{"box_xyxy": [1, 2, 3, 4]}]})
    with pytest.raises(SystemExit, match="same answer"):
        check_answers(same, {"objects": []})


def test_results_are_dated_whole_and_name_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--policy", "/home/someone/secret/hf", "--questions", "3"])
    path = write_result("baseline", {"value": 1}, tmp_path)
    document = json.loads(path.read_text())
    assert document["command"] == "python -m benchmarks.baseline --policy hf --questions 3"
    assert document["value"] == 1 and document["environment"]["cores"] >= 1
    assert document["date"][:10].replace("-", "") in path.name
    assert "secret" not in path.read_text()
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models with random weights: checkpoints `policy` and `segmenter`, and the `bundle` that is made of them."""
    import torch
    from policy_checkpoints import write_checkpoint
    from transformers import Sam2Model

    from export import command
    from training.segmenter_model import SegmenterSize

    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder / "policy")
    torch.manual_seed(0)
    size = SegmenterSize(stage_dims=(16, 32, 64, 128), decoder_dim=32)
    Sam2Model(size.config()).half().float().save_pretrained(folder / "segmenter")
    parser = argparse.ArgumentParser()
    command.configure(parser)
    checkpoints = ["--policy", str(folder / "policy"), "--segmenter", str(folder / "segmenter")]
    assert command.execute(parser.parse_args(["tabletop", *checkpoints, "--out", str(folder / "bundle")])) == 0
    return folder


def run_program(name: str, tiny: Path, *options: str) -> dict[str, Any]:
    checkpoints = ["--policy", str(tiny / "policy"), "--segmenter", str(tiny / "segmenter")]
    command = [sys.executable, "-m", f"benchmarks.{name}", *options, *checkpoints, "--bundle", str(tiny / "bundle")]
    run = subprocess.run([*command, "--out", str(tiny / "results")], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    document: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    assert Path(document["result"]).is_file()
    return document


@pytest.mark.slow
def test_both_sides_say_the_same(tiny: Path) -> None:
    result = run_program("baseline", tiny, "--questions", "4", "--threads", "1")["by_threads"]["1"]
    # Random weights come to ties: in one reply of four, two tokens' logits were 5e-7 apart after 33 equal tokens.
    assert result["num_equal"] >= 3 and result["num_equal"] + len(result["different"]) == 4
    assert result["new_tokens"]["segzero"] > 10
    assert result["end_to_end_ms"]["ratio"] > 1
    assert {"generate", "set_image"} <= set(result["baseline"]["stages_ms"])


@pytest.mark.slow
def test_whole_processes(tiny: Path) -> None:
    picture = tiny / "picture.png"
    Image.fromarray(draw_picture(0)).save(picture)
    document = run_program("process", tiny, str(picture), "the red cup", "--runs", "1", "--threads", "1")
    assert document["memory_share"] < 1 and document["wall_ms"]["ratio"] > 1


@pytest.mark.slow
def test_a_compiled_baseline_runs_its_models_through_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compiler makes of them takes it a minute; that they are handed to it, and asked, is seen here."""
    import torch

    from benchmarks.transformers_pipeline import TransformersPipeline
    from segzero_rt.bundle import EMBEDDED

    asked: set[str] = set()

    def record(forward: Any, **options: Any) -> Any:
        def run(*given: Any, **named: Any) -> Any:
            asked.add(type(forward.__self__).__name__)
            return forward(*given, **named)

        return run

    monkeypatch.setattr(torch, "compile", record)
    checkpoints = ROOT / "training" / "checkpoints" / "tabletop"
    folders = (EMBEDDED, checkpoints / "policy", checkpoints / "segmenter")
    pipeline = TransformersPipeline(*folders, round_weights=True, compiled=True)
    pipeline(draw_picture(0), "the red mug", max_new_tokens=2)
    assert len(asked) == 3 and any("Vision" in name for name in asked) and any("Text" in name for name in asked)


@pytest.mark.slow
def test_both_segmenters_mask_the_same() -> None:
    """With trained weights: fresh ones make logits whose signs rounding decides."""
    from benchmarks.transformers_pipeline import TransformersPipeline
    from segzero_rt.answer import Prompt
    from segzero_rt.bundle import EMBEDDED
    from segzero_rt.pipeline import SegZero

    checkpoints = ROOT / "training" / "checkpoints" / "tabletop"
    theirs = TransformersPipeline(EMBEDDED, checkpoints / "policy", checkpoints / "segmenter", round_weights=True)
    ours = SegZero.load(EMBEDDED, backend="cpu", threads=1)
    picture = np.asarray(Image.open(ROOT / "docs" / "tabletop.png").convert("RGB"))
    prompt = Prompt(box_xyxy=(210, 52, 322, 180), points_xy=((275, 100),))
    result = ours.segment(picture, [prompt])
    mask, score = theirs.segment(picture, list(prompt.box_xyxy), list(prompt.points_xy[0]))
    assert mask.sum() > 1000 and mask_iou(result.masks[0], mask) > 0.97, "the bundle's weights are int8"
    assert float(result.scores[0]) == pytest.approx(score, abs=0.03)

"""Checkpoints of random weights: whole ones, and one line for what cannot be written."""

from __future__ import annotations

import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="weights are drawn with it")

from benchmarks import random_policy
from benchmarks.measuring import run_and_exit
from benchmarks.random_policy import SIZES, TOKENIZER_FILES, Size
from export.policy_checkpoint import PolicyCheckpoint

SMALL = Size(
    hidden=64,
    intermediate=96,
    layers=3,
    heads=4,
    kv_heads=2,
    vocab=90,
    tied=False,
    vision={"depth": 2, "hidden_size": 48, "intermediate_size": 80, "num_heads": 4},
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in TOKENIZER_FILES:
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "small", SMALL)


def program(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Any:
    """Its exit status."""
    monkeypatch.setattr(sys, "argv", ["random_policy", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        run_and_exit(random_policy.main, "random_policy")
    return stopped.value.code


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("layers", "expected"), [((), 3), (("--layers", "2"), 2)], ids=["all", "fewer layers"])
def test_a_checkpoint_is_whole(
    layers: tuple[str, ...],
    expected: int,
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "deep" / "checkpoint"
    assert not program(monkeypatch, "--like", "small", "--tokenizer", tokenizer, "--out", out, *layers)
    checkpoint = PolicyCheckpoint(out)
    assert checkpoint.text.num_layers == expected and checkpoint.vision.depth == 2
    assert int(capsys.readouterr().out) == 2 * checkpoint.num_parameters
    assert all((out / name).is_file() for name in TOKENIZER_FILES)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no tokenizer", "tokenizer.json: expected a file, found none"),
        ("no generation settings", "generation_config.json: expected a file, found none"),
        ("weights there already", "expected a folder without weights, found model-00001.safetensors"),
        ("a file in its place", "expected a folder or nothing, found a file"),
        ("no room", "expected 0.0 GB of room, found 0.0 GB"),
        ("no layers", "--layers: expected 1 to 3 of small, got 0"),
        ("too many layers", "--layers: expected 1 to 3 of small, got 4"),
        ("an unknown size", "invalid choice: 'huge'"),
    ],
)
def test_what_cannot_be_written_is_one_line(
    name: str,
    message: str,
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "checkpoint"
    options: list[object] = ["--like", "huge" if name == "an unknown size" else "small", "--out", out]
    if name == "no tokenizer":
        (tokenizer / "tokenizer.json").unlink()
    elif name == "no generation settings":
        (tokenizer / "generation_config.json").unlink()
    elif name == "weights there already":
        out.mkdir()
        (out / "model-00001.safetensors").write_bytes(b"")
    elif name == "a file in its place":
        out.write_text("")
    elif name == "no room":
        usage = namedtuple("usage", ["free"])
        monkeypatch.setattr(random_policy.shutil, "disk_usage", lambda path: usage(1000))
    elif name.endswith("layers"):
        options += ["--layers", 0 if name == "no layers" else 4]
    assert program(monkeypatch, "--tokenizer", tokenizer, *options) == 2
    told = capsys.readouterr().err
    assert message in told.splitlines()[-1] and "Traceback" not in told
    assert not list(out.glob("config.json")), "nothing is written"

"""What commands write to terminals, pipes and files: nothing half-written, nothing that a terminal would obey."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from segzero_rt.commands.output import ThinkingStream, printable

REPOSITORY = Path(__file__).resolve().parent.parent


def test_a_picture_whose_writing_is_interrupted_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from segzero_rt.commands import output_files

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "o.md").write_text("old")
    monkeypatch.setattr(output_files.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        output_files.write_text(tmp_path / "o.md", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"o.md": "old"}


def test_thinking_is_streamed_without_tags_or_answer(capsys: pytest.CaptureFixture[str]) -> None:
    text = "<think> The <b mug </think>\n<answer>[]</answer>"
    for size in (1, 2, 3, 7, len(text)):
        stream = ThinkingStream()
        for start in range(0, len(text), size):
            stream(text[start : start + size])
        stream.close()
        assert stream.text == text
        assert capsys.readouterr().err == " The <b mug \n"


def test_control_characters_never_reach_the_terminal() -> None:
    assert printable("a\x1b[31m\nb\u202e") == "a�[31m b�"


def test_a_file_name_that_is_no_text(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff\xfe.png"
    for option in ([], ["--json"]):
        result = subprocess.run(
            [sys.executable, "-m", "segzero_rt.cli", "run", name, "x", *option],
            capture_output=True,
            cwd=REPOSITORY,
            check=False,
        )
        assert result.returncode == 2
        assert b"Traceback" not in result.stderr and result.stderr.count(b"\n") == 1


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"{sys.executable} -m segzero_rt.cli --help | head -n 1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert result.returncode == 0 and result.stderr == ""
    assert result.stdout.startswith("usage:")

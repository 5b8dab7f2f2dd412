"""What an export says while it runs: its own lines, and nobody else's."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="one of the libraries that are to be quiet")

from transformers.utils import logging as hub_logging

from export.messages import WrittenBytes, quiet_libraries, say

REPOSITORY = Path(__file__).resolve().parent.parent


def chatter() -> None:
    """What libraries say during an export."""
    warnings.warn("an axis will not be used", UserWarning, stacklevel=1)
    logging.getLogger("torch.onnx._internal.exporter").warning("torchvision is not installed")
    hub_logging.get_logger("transformers.modeling_utils").warning("unrecognised keys")
    for _ in hub_logging.tqdm(range(2), desc="Loading weights"):
        pass


def test_other_libraries_are_quiet_meanwhile_and_talk_again_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("torch.onnx", "transformers")
    levels = [logging.getLogger(name).level for name in names]
    with quiet_libraries():
        chatter()
        say("weights")
    assert capsys.readouterr().err == "export: weights\n"
    assert [logging.getLogger(name).level for name in names] == levels
    with pytest.warns(UserWarning, match="an axis"):
        chatter()
    assert "Loading weights" in capsys.readouterr().err


def test_errors_of_other_libraries_still_come(caplog: pytest.LogCaptureFixture) -> None:
    with quiet_libraries():
        logging.getLogger("torch.onnx._internal.exporter").error("it broke")
    assert "it broke" in caplog.text


def test_pytorch_is_quiet_even_when_nobody_imported_it_before() -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from export.messages import quiet_libraries\n"
        "with quiet_libraries():\n"
        "    import logging, torch\n"
        "    logging.getLogger('torch.onnx._internal.exporter._registration').warning('torchvision is not installed')\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("total", "parts", "last"),
    [
        (3_500_000, [900_000, 900_000, 700_000, 1_000_000], "weights 3/3"),
        (2_000_000, [2_000_000], "weights 2/2"),
        (10, [10], ""),
        (0, [], ""),
    ],
    ids=["pieces", "at once", "less than one", "nothing"],
)
def test_progress_counts_whole_megabytes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, total: int, parts: list[int], last: str
) -> None:
    clock = iter(range(0, 100_000, 100))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    with WrittenBytes(total, "weights") as progress:
        for part in parts:
            progress.add(part)
    lines = capsys.readouterr().err.splitlines()
    assert (lines[-1] if lines else "").startswith(last)
    assert bool(lines) is bool(last)

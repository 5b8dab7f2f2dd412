"""JetPack 6 is Python 3.10, where wheels end at onnxruntime 1.23.2 and NumPy 2.2.6: every graph loads there."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PYTHON = os.environ.get("SEGZERO_PYTHON310", str(REPOSITORY / ".venv-py310/bin/python"))


@pytest.mark.slow
@pytest.mark.skipif(not Path(PYTHON).exists(), reason="no Python 3.10 environment; `make test` makes one where it can")
def test_every_graph_loads_and_runs(bundle_path: Path) -> None:
    result = subprocess.run(
        [PYTHON, str(REPOSITORY / "tests/run_under_python310.py"), str(bundle_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["python"] == [3, 10]
    assert document["onnxruntime"] == "1.23.2"
    assert document["numpy"] == "2.2.6"
    assert document["mask_shape"] == [1, 120, 160]

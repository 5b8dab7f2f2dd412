"""A robot's disk is small: core + [cpu] stays under its limit, bundle included."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.install_size import measure, sizes_of

LIMIT_MIB = 370


def test_sizes_leave_out_what_every_environment_has(tmp_path: Path) -> None:
    for name, size in (("numpy/core.so", 100), ("numpy/a.py", 1), ("pip/x.py", 50), ("setuptools-65.dist-info/M", 9)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    assert sizes_of(tmp_path) == {"numpy": 101}


@pytest.mark.slow
def test_core_and_cpu_fit() -> None:
    result = measure(starts=3)
    assert result["total_mib"] <= LIMIT_MIB, result["largest_mib"]
    assert result["start_ms"]["import segzero_rt"] < result["start_ms"]["python -c pass"] + 200

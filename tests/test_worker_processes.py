"""Pieces of work on several processes: the same results in the same order, errors kept, nobody left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("cv2", reason="needs segzero-rt[cpu]")

from segzero_rt.errors import SegZeroError
from training.worker_processes import in_order

PIECES = list(range(40))


def square(number: int) -> int:
    return number * number


def refuse_30(number: int) -> int:
    if number == 30:
        raise KeyError("thirty")
    return number


def die_at_30(number: int) -> int:
    if number == 30:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def whoever_works(_: int) -> int:
    time.sleep(0.02)
    return os.getpid()


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 40])
def test_results_come_in_order(processes: int, count: int) -> None:
    found = list(in_order(square, PIECES[:count], processes=processes))
    assert found == [number * number for number in PIECES[:count]]


def test_many_pieces_are_shared_out_and_few_are_not() -> None:
    assert len(set(in_order(whoever_works, PIECES, processes=2))) == 2
    assert set(in_order(whoever_works, PIECES[:9], processes=2)) == {os.getpid()}


def test_what_a_piece_raises_arrives() -> None:
    with pytest.raises(KeyError, match="thirty"):
        list(in_order(refuse_30, PIECES, processes=2))


def test_a_process_that_is_killed_is_named_and_does_not_hang() -> None:
    with pytest.raises(SegZeroError, match="one was killed"):
        list(in_order(die_at_30, PIECES, processes=2))


def test_nobody_goes_on_when_whoever_started_them_is_killed(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, time\n"
        "from training.worker_processes import in_order\n"
        "from worker_pieces import slow\n"
        "if __name__ == '__main__':\n"
        "    for pid in in_order(slow, range(64), processes=2):\n"
        "        print(pid, flush=True)\n"
    )
    (tmp_path / "worker_pieces.py").write_text(
        "import os, time\ndef slow(_):\n    time.sleep(0.2)\n    return os.getpid()\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parents[1]}{os.pathsep}{tmp_path}"}
    started = subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True, env=environment)
    assert started.stdout is not None
    workers = {int(started.stdout.readline()) for _ in range(8)}
    started.kill()
    started.communicate()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(map(_runs, workers)):
        time.sleep(0.1)
    assert len(workers) == 2 and not any(map(_runs, workers))


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False

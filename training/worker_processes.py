"""Work that is cut into many small pieces, on several processes, with results in the order of the pieces."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import cv2

from segzero_rt.errors import SegZeroError
from segzero_rt.graph import default_threads

Piece = TypeVar("Piece")
Result = TypeVar("Result")

MOST_PROCESSES = 16
"""Unless more are asked for: each holds 100 MB."""
_PIECES_AT_A_TIME = 4
_LEAST_PIECES = 16
"""Of one process: fewer are done before it has begun."""


def default_processes() -> int:
    """One for each core that this process may run on, within reason."""
    return min(default_threads(), MOST_PROCESSES)


def in_order(work: Callable[[Piece], Result], pieces: Sequence[Piece], *, processes: int) -> Iterator[Result]:
    """`map(work, pieces)`, on up to so many processes.

    A process that is started imports the program's main module anew, which must not begin anything by being imported.
    It ends with whoever started it, even one that is killed.

    Args:
        work: can be pickled, and its results.
        pieces: any number.
        processes: at least 1, which is this one.

    Raises:
        SegZeroError: a process was killed.
    """
    processes = min(processes, len(pieces) // _LEAST_PIECES)
    if processes < 2:
        yield from map(work, pieces)
        return
    # Not forked: a copy of a process with threads (PyTorch's, OpenCV's) may wait for ever for one it has not got.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_begin) as pool:
        try:
            yield from pool.map(work, pieces, chunksize=_PIECES_AT_A_TIME)
        except BrokenProcessPool as error:
            raise SegZeroError(
                f"expected {processes} processes to work side by side, one was killed (is there memory for them?); "
                "ask for fewer --workers, what is done stays done"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """What a process does first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of them; whoever started them ends them
    cv2.setNumThreads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)

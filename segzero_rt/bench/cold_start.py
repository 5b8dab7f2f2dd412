"""Cold start: a new process until its first answer, with the bundle's files in the page cache and without."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from segzero_rt.bench.child import run_child, serve


def measure_cold_start(settings: Mapping[str, Any], *, runs: int = 3) -> dict[str, Any]:
    """Wall time of whole processes, of each of which "import_ms", "load_ms" and "first_question_ms" are told by itself.

    Args:
        settings: "bundle", "images", "backend", "given_threads", "draft_tokens", "allow_ungated",
            "max_new_tokens", "format".
        runs: with the files cached, of which the fastest counts; one more comes before them with the files evicted.

    Returns:
        `evicted` and `cached`, each with `process_ms`, the three parts and `peak_memory_bytes`; or a `problem`. What
        lies beneath (Python, libraries) is in the page cache both times, and `evicted` is None where the system does
        not let go of files.
    """
    evicted = _run(settings) if _evict(Path(settings["bundle"])) else None
    cached = [_run(settings) for _ in range(runs)]
    for one in (evicted, *cached):
        if one is not None and "problem" in one:
            return one
    return {"evicted": evicted, "cached": min(cached, key=lambda one: float(one["process_ms"]))}


def _run(settings: Mapping[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    document = run_child(__name__, settings)
    return {"process_ms": (time.perf_counter() - start) * 1e3, **document}


def _evict(folder: Path) -> bool:
    """Asks the system to drop a folder's files from its page cache; it may keep what others have mapped."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def _measure(settings: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    from segzero_rt.bench.tasks import make_tasks
    from segzero_rt.environment import peak_memory_bytes
    from segzero_rt.pipeline import SegZero

    imported = time.perf_counter()
    task = next(make_tasks(settings["images"], 1))
    image_rgb = task.load_image()
    loading = time.perf_counter()
    pipeline = SegZero.load(
        settings["bundle"],
        backend=settings["backend"],
        threads=settings["given_threads"],
        allow_ungated=settings["allow_ungated"],
        draft_tokens=settings["draft_tokens"],
    )
    asking = time.perf_counter()
    pipeline(image_rgb, task.question, answer_format=settings["format"], max_new_tokens=settings["max_new_tokens"])
    answered = time.perf_counter()
    return {
        "import_ms": (imported - start) * 1e3,
        "load_ms": (asking - loading) * 1e3,
        "first_question_ms": (answered - asking) * 1e3,
        "peak_memory_bytes": peak_memory_bytes(),
    }


if __name__ == "__main__":
    serve(_measure)

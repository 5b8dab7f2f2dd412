"""What an export says while it runs, on stderr; and what other libraries then do not."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from segzero_rt.commands.progress import Progress

_NOISY = ("torch.onnx", "transformers", "peft")
_MEGABYTE = 1_000_000


def say(text: str) -> None:
    """One line for whoever waits."""
    print(f"export: {text}", file=sys.stderr, flush=True)


class WrittenBytes:
    """Progress over weights, in megabytes. Use as a context manager."""

    def __init__(self, total_bytes: int, what: str) -> None:
        self._progress = Progress(max(1, total_bytes // _MEGABYTE), what)
        self._rest = 0

    def __enter__(self) -> WrittenBytes:
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.__exit__(None, None, None)

    def add(self, num_bytes: int) -> None:
        """So many bytes more are done."""
        megabytes, self._rest = divmod(self._rest + num_bytes, _MEGABYTE)
        if megabytes:
            self._progress.step("MB", count=megabytes)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keeps hints, deprecations and progress bars of PyTorch and transformers off stderr; their errors still come."""
    import torch  # noqa: F401 - sets the levels of its loggers when it is imported, over ours if it came later

    hub_logging: Any = import_module("transformers.utils.logging")  # typed in part alone
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    bars = hub_logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    hub_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            hub_logging.enable_progress_bar()

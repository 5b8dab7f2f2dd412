"""A progress line on stderr: rewritten in place on a terminal, once a minute in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

_TERMINAL_INTERVAL_S = 0.1
_LOG_INTERVAL_S = 60.0


class Progress:
    """Counts to `total`. Use as a context manager, so that the line is ended whatever happens."""

    def __init__(self, total: int, what: str) -> None:
        self._total, self._what = total, what
        self._done = 0
        self._on_terminal = sys.stderr.isatty()
        self._interval_s = _TERMINAL_INTERVAL_S if self._on_terminal else _LOG_INTERVAL_S
        self._start_s = self._shown_s = time.monotonic()
        self._was_shown = False

    def __enter__(self) -> Progress:
        return self

    def step(self, note: str = "", *, count: int = 1) -> None:
        """One more is done, or `count`; `note` follows the count."""
        self._done += count
        now_s = time.monotonic()
        if now_s - self._shown_s >= self._interval_s:
            self._shown_s = now_s
            self._show(note)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._was_shown and self._on_terminal:
            print(file=sys.stderr)

    def _show(self, note: str) -> None:
        elapsed_s = time.monotonic() - self._start_s
        left_s = elapsed_s / self._done * (self._total - self._done)
        line = f"{self._what} {self._done}/{self._total}, {left_s:.0f} s left  {note}"
        # \r returns to the line's start, \x1b[K clears what an earlier, longer line left behind.
        print(f"\r{line}\x1b[K" if self._on_terminal else line, end="" if self._on_terminal else "\n", file=sys.stderr)
        sys.stderr.flush()
        self._was_shown = True

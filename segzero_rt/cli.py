"""`segzero`: finds the subcommand, parses its options, and turns every `SegZeroError` into one line and exit status 2.

The runtime's own commands are listed here; others join through the entry-point group `segzero.commands`. Only the
command that was asked for is imported, and each imports what it runs on when it runs: `--help` starts no backend.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn, Protocol, cast

from segzero_rt import __version__
from segzero_rt.errors import SegZeroError

if TYPE_CHECKING:  # 15 ms that the built-in commands need not wait for
    from importlib.metadata import EntryPoint

ENTRY_POINT_GROUP = "segzero.commands"
EXIT_OK, EXIT_BAD_INPUT, EXIT_NO_ANSWER = 0, 2, 3
EXIT_INTERRUPTED = 130
"""What a shell gives for a program that Ctrl-C ended."""

_BUILT_IN = ("run", "segment", "eval", "bench", "build", "doctor")

_DESCRIPTION = """Reasoning segmentation: an image and a question to thinking and instance masks, without PyTorch.

exit status: 0 answered (or: there is no such object), 3 the policy gave no usable answer, 2 bad input"""
_EPILOG = """examples:
  segzero run table.png "something to cut paper with" --out overlay.png
  segzero run table.png "the red mug" --json
  segzero doctor

`segzero COMMAND --help` tells a command's options."""


class Command(Protocol):
    """What an entry of the group resolves to: a module or an object with these names."""

    NAME: str
    HELP: str
    """One line, lower case, for the list of commands."""

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Adds the command's arguments. Imports nothing heavy: this runs for `--help`, too."""

    def execute(self, arguments: argparse.Namespace) -> int:
        """Runs it; returns the exit status."""


class UsageError(SegZeroError):
    """The command line itself is wrong."""


class _Parser(argparse.ArgumentParser):
    """Raises instead of printing usage over several lines, so that bad options get one line like any other error."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script. Returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in arguments[: arguments.index("--")] if "--" in arguments else "--json" in arguments
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # absent where a caller replaced the stream
            stream.reconfigure(errors="backslashreplace")  # a file name may hold bytes that are no text
    return run_reporting(lambda: _dispatch(arguments), as_json=as_json)


def run_reporting(work: Callable[[], int], *, as_json: bool) -> int:
    """Runs a command; whatever is the user's to mend becomes one line on stderr. Returns the exit status."""
    try:
        status = work()
        sys.stdout.flush()
        return status
    except SegZeroError as error:
        return _report(error, as_json=as_json)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except KeyboardInterrupt:
        print("segzero: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except OSError as error:  # a path that is too long or not allowed, a disk that is full: not this package's to mend
        return _report(error, as_json=as_json)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_top_help())
        return EXIT_OK if arguments else EXIT_BAD_INPUT
    name, rest = arguments[0], arguments[1:]
    if name in ("-V", "--version"):
        print(f"segzero {__version__}")
        return EXIT_OK
    command = _find(name)
    parser = make_parser(command)
    try:
        parsed = parser.parse_args(rest)
    except SystemExit as stop:  # argparse's own way to end after `--help`
        return int(stop.code or 0)
    return execute_command(command, parsed)


def execute_command(command: Command, parsed: argparse.Namespace) -> int:
    """Runs a command with its options.

    Raises:
        UsageError: what it needs is not installed.
    """
    try:
        return command.execute(parsed)
    except ModuleNotFoundError as error:  # commands outside the runtime import what they need when they run
        if command.NAME in _BUILT_IN or (error.name or "segzero_rt").partition(".")[0] == "segzero_rt":
            raise
        raise _not_installed(command.NAME, error) from error


def make_parser(command: Command) -> argparse.ArgumentParser:
    """The parser of one command, as `segzero NAME` uses it."""
    parser = _Parser(
        prog=f"segzero {command.NAME}",
        description=command.HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.configure(parser)
    return parser


def find_command(name: str) -> Command:
    """The command called `name`, built in or installed.

    Raises:
        UsageError: there is none, or what it needs is not installed.
    """
    return _find(name)


def _find(name: str) -> Command:
    if name in _BUILT_IN:
        return cast("Command", importlib.import_module(f"segzero_rt.commands.{name}"))
    installed = {entry.name: entry for entry in _entry_points()}
    if name not in installed:
        known = ", ".join((*_BUILT_IN, *sorted(installed)))
        raise UsageError(f"expected a command, one of {known}; got {name[:60]!r}; see `segzero --help`")
    try:
        return cast("Command", installed[name].load())
    except (ImportError, AttributeError) as error:
        raise _not_installed(name, error) from error


def _entry_points() -> Iterator[EntryPoint]:
    from importlib.metadata import entry_points

    yield from entry_points(group=ENTRY_POINT_GROUP)


def _not_installed(name: str, error: Exception) -> UsageError:
    extra = "export" if name == "export" else "train"
    return UsageError(
        f"`segzero {name}` cannot start here: {error}; install what it needs (pip install 'segzero-rt[{extra}]')"
    )


def _top_help() -> str:
    lines = []
    for name in (*_BUILT_IN, *sorted(entry.name for entry in _entry_points() if entry.name not in _BUILT_IN)):
        try:
            lines.append(f"  {name:<9} {_find(name).HELP}")
        except (UsageError, ImportError) as error:
            lines.append(f"  {name:<9} not available: {error}")
    usage = "usage: segzero COMMAND ... | segzero --help | segzero --version"
    return "\n\n".join((usage, _DESCRIPTION, "commands:\n" + "\n".join(lines), _EPILOG))


def _report(error: SegZeroError | OSError, *, as_json: bool) -> int:
    """One line on stderr. With `--json` it is a document, which stdout gets as well, so that it never stays empty."""
    message = " ".join(str(error).split())
    if as_json:
        line = json.dumps({"status": "error", "error": {"type": type(error).__name__, "message": message}})
    else:
        line = "segzero: " + "".join(char if char.isprintable() else "?" for char in message)
    print(line, file=sys.stderr)
    try:
        if as_json:
            print(line)
        sys.stdout.flush()
    except OSError:  # stdout is what failed; left as it is, the interpreter would complain once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())

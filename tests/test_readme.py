"""Commands of the pages parse and their links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from segzero_rt.cli import UsageError, find_command, make_parser

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = (
    "README.md",
    "benchmarks/README.md",
    "export/README.md",
    "segzero_rt/kernels/README.md",
    "segzero_rt/operators/README.md",
    "segzero_rt/readers/README.md",
    "training/README.md",
    "training/experiments/README.md",
)
TEXTS = {page: (REPOSITORY / page).read_text(encoding="utf-8") for page in PAGES}
ELLIPSIS = "…"
"""Stands for the rest of a command that another place of the page has whole."""


def shell_lines(text: str) -> list[str]:
    """Lines of shell blocks, continued ones joined."""
    blocks = re.findall(r"^```(?:bash|sh|console|shell)\n(.*?)^```", text, re.M | re.S)
    return [line.strip().removeprefix("$ ") for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def commands(text: str) -> list[str]:
    """Calls of `segzero` in shell blocks and between backticks."""
    in_blocks = [part.strip() for line in shell_lines(text) for part in line.split("&&")]
    in_prose = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    whole = [re.sub(r"\s[|><].*$", "", line) for line in (*in_blocks, *in_prose) if line.startswith("segzero ")]
    return [line for line in whole if ELLIPSIS not in line]


COMMANDS = [
    pytest.param(line, id=f"{page}: {line[:60]}") for page in PAGES for line in sorted({*commands(TEXTS[page])})
]
TARGETS = [shlex.split(line, comments=True)[1] for line in shell_lines(TEXTS["README.md"]) if line.startswith("make ")]
LINKS = sorted(
    {
        (page, link)
        for page, text in TEXTS.items()
        for link in (*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r'(?:src|href)="([^"]+)"', text))
        if not link.startswith(("http://", "https://"))
    }
)


def test_the_pages_show_commands_and_links() -> None:
    assert len(COMMANDS) >= 30 and len(LINKS) >= 20 and len(TARGETS) >= 2
    folders = ("segzero_rt", "export", "training", "benchmarks", "docs")
    found = {
        str(path.relative_to(REPOSITORY)) for folder in folders for path in (REPOSITORY / folder).rglob("README.md")
    }
    assert found <= {*PAGES}, "a page that is not held to its commands and links"


@pytest.mark.parametrize("line", COMMANDS)
def test_each_segzero_line_parses(line: str) -> None:
    name, *rest = shlex.split(line, comments=True)[1:]
    if name.startswith("-"):
        return
    parser = make_parser(find_command(name))
    if not rest and any(action.required for action in parser._actions):
        return  # the name of a command, not a call of it
    try:
        parser.parse_args(rest)
    except UsageError as error:
        pytest.fail(f"{line}: {error}")


def test_each_make_target_exists() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for target in TARGETS:
        assert re.search(rf"^{re.escape(target)}:", makefile, re.M), target


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_each_relative_link_resolves(page: str, link: str) -> None:
    path, _, anchor = link.partition("#")
    target = (REPOSITORY / page).parent / path if path else REPOSITORY / page
    assert target.exists(), link
    assert target.resolve().is_relative_to(REPOSITORY), f"{link} leads out of the repository"
    if anchor:
        text = target.read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.+)$", text, re.M)
        anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in anchors, link


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_compile(page: str) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", TEXTS[page], re.M | re.S):
        compile(block, page, "exec")

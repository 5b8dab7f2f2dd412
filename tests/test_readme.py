"""README's commands parse and its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from segzero_rt.cli import UsageError, find_command, make_parser

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
_BLOCKS = re.findall(r"^```(?:bash|sh|console|shell)\n(.*?)^```", README, re.M | re.S)
_LINES = [line.strip().removeprefix("$ ") for block in _BLOCKS for line in block.replace("\\\n", " ").splitlines()]
COMMANDS = [part.strip() for line in _LINES for part in line.split("&&") if part.strip().startswith("segzero ")]
TARGETS = [shlex.split(line, comments=True)[1] for line in _LINES if line.startswith("make ")]
LINKS = [*re.findall(r"\]\(([^)\s]+)\)", README), *re.findall(r'(?:src|href)="([^"]+)"', README)]


def test_the_readme_shows_commands_and_links() -> None:
    assert len(COMMANDS) >= 5 and LINKS


@pytest.mark.parametrize("line", COMMANDS)
def test_each_segzero_line_parses(line: str) -> None:
    name, *rest = shlex.split(line, comments=True)[1:]
    if name.startswith("-"):
        return
    try:
        make_parser(find_command(name)).parse_args(rest)
    except UsageError as error:
        pytest.fail(f"{line}: {error}")


def test_each_make_target_exists() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for target in TARGETS:
        assert re.search(rf"^{re.escape(target)}:", makefile, re.M), target


@pytest.mark.parametrize("link", sorted({link for link in LINKS if not link.startswith(("http://", "https://"))}))
def test_each_relative_link_resolves(link: str) -> None:
    path, _, anchor = link.partition("#")
    target = REPOSITORY / path if path else REPOSITORY / "README.md"
    assert target.exists(), link
    assert target.resolve().is_relative_to(REPOSITORY), f"{link} leads out of the repository"
    if anchor:
        text = target.read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.+)$", text, re.M)
        anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in anchors, link


def test_python_blocks_compile() -> None:
    for block in re.findall(r"^```python\n(.*?)^```", README, re.M | re.S):
        compile(block, "README.md", "exec")

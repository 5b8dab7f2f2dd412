"""`optimum-cli export segzero`, as installed and with the real Optimum: the same command under another name."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("optimum.commands.optimum_cli", reason="pip install 'segzero-rt[optimum]'")

from test_packaging import _build_wheel


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to import from: the wheel's files, or nothing where the package is installed, even as an editable one.

    Optimum reads every folder of its namespace, and refuses the command that two of them hold.
    """
    folder = tmp_path_factory.mktemp("optimum")
    if importlib.util.find_spec("optimum.commands.register") is not None:
        return folder
    _build_wheel(folder, SEGZERO_EXTENSION="0").extractall(folder / "site")
    return folder / "site"


def optimum_cli(site: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=site, check=False)


def test_optimum_lists_the_command_and_its_options_are_segzero_export_s(site: Path) -> None:
    listed = optimum_cli(site, "export", "--help")
    assert listed.returncode == 0 and "segzero" in listed.stdout, listed.stderr
    options = optimum_cli(site, "export", "segzero", "--help")
    own = subprocess.run(
        [sys.executable, "-m", "segzero_rt.cli", "export", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=site,
    )
    assert options.returncode == 0, options.stderr
    assert _after_usage(options.stdout) == _after_usage(own.stdout)
    assert "--gate-dataset" in options.stdout


def test_a_checkpoint_that_is_not_there_is_one_line_and_status_2(site: Path, tmp_path: Path) -> None:
    arguments = ("export", "segzero", "tabletop", "--policy", "gone", "--segmenter", "gone", "--out", tmp_path / "out")
    refused = optimum_cli(site, *arguments)
    assert refused.returncode == 2
    assert refused.stderr.strip().splitlines()[-1].startswith("segzero: --policy gone: expected a folder")
    document = json.loads(optimum_cli(site, *arguments, "--json").stdout)
    assert document["status"] == "error" and "config.json" in document["error"]["message"]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_bundle_is_exported(site: Path, tiny_checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    policy, segmenter = tiny_checkpoints
    out = tmp_path / "bundle"
    arguments = ("tabletop", "--policy", policy, "--segmenter", segmenter, "--out", out, "--no-trial", "--json")
    done = optimum_cli(site, "export", "segzero", *arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["name"] == "tabletop"
    assert (out / "manifest.json").is_file()


def _after_usage(text: str) -> str:
    """Arguments and examples: what comes behind the usage and the description, which name the program."""
    return text[text.index("positional arguments:") :]

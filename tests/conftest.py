"""Bundles for tests: `tiny_bundle_path` has random weights and is made here, `bundle_path` is the one that ships."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tiny_bundles import BUNDLES_VARIABLE, export_tiny_bundle, write_tiny_checkpoints

from segzero_rt.bundle import EMBEDDED

if TYPE_CHECKING:
    from exported_segmenter import Exported

    from export.policy import PolicyExport


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a policy and a segmenter with random weights, as transformers saves them."""
    pytest.importorskip("torch", reason="writes checkpoints; it comes with segzero-rt[export]")
    return write_tiny_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def exported_segmenter(tiny_checkpoints: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The tiny segmenter's graphs with unrounded weights, beside it."""
    from exported_segmenter import export_tiny

    return export_tiny(tiny_checkpoints[1], tmp_path_factory.mktemp("segmenter"))


@pytest.fixture(scope="session")
def tiny_bundle_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a few hundred kilobytes with random weights, exported as any other. It says nothing sensible."""
    return _tiny_bundle("tiny", request, tmp_path_factory)


@pytest.fixture(scope="session")
def portable_bundle_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle once more, in operators that TensorRT reads; no gate, since none of its answers is looked at."""
    return _tiny_bundle("portable", request, tmp_path_factory)


def _tiny_bundle(name: str, request: pytest.FixtureRequest, temporary: pytest.TempPathFactory) -> Path:
    made_elsewhere = os.environ.get(BUNDLES_VARIABLE)
    if made_elsewhere:
        return Path(made_elsewhere) / name
    work = temporary.mktemp(name)
    return export_tiny_bundle(request.getfixturevalue("tiny_checkpoints"), name, work / "parts", work / "bundle")


@pytest.fixture(scope="session")
def bundle_path(request: pytest.FixtureRequest) -> Path:
    """The embedded bundle; in a checkout that has none yet, the tiny one."""
    if (EMBEDDED / "manifest.json").is_file():
        return EMBEDDED
    path: Path = request.getfixturevalue("tiny_bundle_path")
    return path


@pytest.fixture(scope="session")
def policy_folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a checkpoint by the name of its sizes; each is made once."""
    pytest.importorskip("torch", reason="writes checkpoints; it comes with segzero-rt[export]")
    from policy_checkpoints import SIZES, write_checkpoint

    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("hf") / name
            write_checkpoint(made[name], seed=len(made), **SIZES[name])
        return made[name]

    return folder


@pytest.fixture(scope="session", params=["ort", "portable"])
def exported_policy(
    request: pytest.FixtureRequest, policy_folders: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[PolicyExport, Path]:
    """A policy's files in both flavours, and their folder."""
    from export.policy import export_policy

    folder = tmp_path_factory.mktemp("exported")
    options: dict[str, Any] = {"input_size_hw": (280, 280), "max_length": 700, "max_new_tokens": 40}
    return export_policy(policy_folders("grouped-heads"), folder, flavour=request.param, **options), folder

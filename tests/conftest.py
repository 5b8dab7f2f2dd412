"""Bundles for tests: `tiny_bundle_path` has random weights and is made here, `bundle_path` is the one that ships."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from segzero_rt.bundle import EMBEDDED, write_bundle

if TYPE_CHECKING:
    from exported_segmenter import Exported

    from export.policy import PolicyExport


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a policy and a segmenter with random weights, as transformers saves them."""
    from policy_checkpoints import write_checkpoint

    from training.segmenter_model import SegmenterSize, build_segmenter

    folder = tmp_path_factory.mktemp("checkpoints")
    write_checkpoint(folder / "policy")
    size = SegmenterSize(
        side=64,
        stage_dims=(16, 32, 64, 128),
        stage_blocks=(1, 1, 2, 1),
        stage_heads=(1, 1, 2, 2),
        stage_windows=(4, 2, 4, 2),
        global_blocks=(3,),
        decoder_dim=32,
    )
    build_segmenter(size).save_pretrained(folder / "segmenter")
    return folder / "policy", folder / "segmenter"


@pytest.fixture(scope="session")
def exported_segmenter(tiny_checkpoints: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The tiny segmenter's graphs with unrounded weights, beside it."""
    from exported_segmenter import export_tiny

    return export_tiny(tiny_checkpoints[1], tmp_path_factory.mktemp("segmenter"))


@pytest.fixture(scope="session")
def tiny_bundle_path(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoints: tuple[Path, Path]) -> Path:
    """A bundle of a few hundred kilobytes with random weights, exported as any other. It says nothing sensible."""
    from dataclasses import replace

    from export.command import assemble, tabletop
    from export.policy import export_policy
    from export.segmenter import export_segmenter

    work = tmp_path_factory.mktemp("tiny")
    preset = replace(tabletop(), name="tiny", input_size_hw=(56, 84), max_length=512, max_new_tokens=24)
    policy = export_policy(
        tiny_checkpoints[0],
        work / "parts",
        input_size_hw=preset.input_size_hw,
        max_length=preset.max_length,
        max_new_tokens=preset.max_new_tokens,
        gate_questions=("the red cup",),
    )
    segmenter = export_segmenter(tiny_checkpoints[1], work / "parts")
    manifest, files = assemble(preset, "tiny", policy, segmenter, None)
    return write_bundle(work / "bundle", manifest, files).root


@pytest.fixture(scope="session")
def portable_bundle_path(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoints: tuple[Path, Path]) -> Path:
    """The tiny bundle once more, in operators that TensorRT reads; no gate, since none of its answers is looked at."""
    from dataclasses import replace

    from export.command import assemble, tabletop
    from export.policy import export_policy
    from export.segmenter import export_segmenter

    work = tmp_path_factory.mktemp("portable")
    preset = replace(tabletop(), name="portable", input_size_hw=(56, 84), max_length=512, flavour="portable")
    policy = export_policy(
        tiny_checkpoints[0],
        work / "parts",
        input_size_hw=preset.input_size_hw,
        flavour=preset.flavour,
        max_length=preset.max_length,
        max_new_tokens=24,
        gate_questions=("the red cup",),
    )
    segmenter = export_segmenter(tiny_checkpoints[1], work / "parts", flavour=preset.flavour)
    manifest, files = assemble(preset, "portable", policy, segmenter, None)
    return write_bundle(work / "bundle", manifest, files).root


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

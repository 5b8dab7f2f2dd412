"""Bundles for tests: `tiny_bundle_path` has random weights and is made here, `bundle_path` is the one that ships."""

from __future__ import annotations

from pathlib import Path

import pytest

from segzero_rt.bundle import EMBEDDED, write_bundle


@pytest.fixture(scope="session")
def tiny_bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a few hundred kilobytes with random weights, exported as any other. It says nothing sensible."""
    from dataclasses import replace

    from policy_checkpoints import write_checkpoint

    from export.command import assemble, tabletop
    from export.policy import export_policy
    from export.segmenter import export_segmenter
    from training.segmenter_model import SegmenterSize, build_segmenter

    folder = tmp_path_factory.mktemp("tiny")
    preset = replace(tabletop(), name="tiny", input_size_hw=(56, 84), max_length=512, max_new_tokens=24)
    write_checkpoint(folder / "policy-checkpoint")
    size = SegmenterSize(
        side=64,
        stage_dims=(16, 32, 64, 128),
        stage_blocks=(1, 1, 2, 1),
        stage_heads=(1, 1, 2, 2),
        stage_windows=(4, 2, 4, 2),
        global_blocks=(3,),
        decoder_dim=32,
    )
    build_segmenter(size).save_pretrained(folder / "segmenter-checkpoint")
    policy = export_policy(
        folder / "policy-checkpoint",
        folder / "work",
        input_size_hw=preset.input_size_hw,
        max_length=preset.max_length,
        max_new_tokens=preset.max_new_tokens,
        gate_questions=("the red cup",),
    )
    segmenter = export_segmenter(folder / "segmenter-checkpoint", folder / "work")
    manifest, files = assemble(preset, "tiny", policy, segmenter, None)
    return write_bundle(folder / "bundle", manifest, files).root


@pytest.fixture(scope="session")
def bundle_path(request: pytest.FixtureRequest) -> Path:
    """The embedded bundle; in a checkout that has none yet, the tiny one."""
    if (EMBEDDED / "manifest.json").is_file():
        return EMBEDDED
    path: Path = request.getfixturevalue("tiny_bundle_path")
    return path

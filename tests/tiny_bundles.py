"""Bundles of a few hundred kilobytes with random weights, exported as any other: `python tests/tiny_bundles.py FOLDER`.

`conftest.py` makes them for each run of the tests; the program, for a machine without PyTorch (`SEGZERO_TEST_BUNDLES`).
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

BUNDLES_VARIABLE = "SEGZERO_TEST_BUNDLES"
"""Names a folder with a bundle for each name in `FLAVOURS`."""
FLAVOURS = {"tiny": "ort", "portable": "portable"}


def write_tiny_checkpoints(folder: Path) -> tuple[Path, Path]:
    """Folders of a policy and a segmenter with random weights, as transformers saves them."""
    from policy_checkpoints import write_checkpoint

    from training.segmenter_model import SegmenterSize, build_segmenter

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


def export_tiny_bundle(checkpoints: tuple[Path, Path], name: str, work: Path, bundle: Path) -> Path:
    """Exports the checkpoints in the flavour of that name by way of the folder `work`; returns the bundle's folder."""
    from export.command import assemble, tabletop
    from export.policy import export_policy
    from export.segmenter import export_segmenter
    from segzero_rt.bundle import write_bundle

    preset = replace(
        tabletop(), name=name, flavour=FLAVOURS[name], input_size_hw=(56, 84), max_length=512, max_new_tokens=24
    )
    policy = export_policy(
        checkpoints[0],
        work,
        input_size_hw=preset.input_size_hw,
        flavour=preset.flavour,
        max_length=preset.max_length,
        max_new_tokens=preset.max_new_tokens,
        gate_questions=("the red cup",),
    )
    segmenter = export_segmenter(checkpoints[1], work, flavour=preset.flavour)
    manifest, files = assemble(preset, name, policy, segmenter, None)
    return write_bundle(bundle, manifest, files).root


def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as work:
        checkpoints = write_tiny_checkpoints(Path(work) / "checkpoints")
        for name in FLAVOURS:
            export_tiny_bundle(checkpoints, name, Path(work) / name, folder / name)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout's `export` and `training`
    main(Path(sys.argv[1]))

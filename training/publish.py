"""Writes the checkpoint folders that ship with the repository: float16 weights, as the bundle stores them.

    python -m training.publish runs/pretrain training/checkpoints/tabletop/policy
    python -m training.publish runs/segmenter training/checkpoints/tabletop/segmenter

A folder so written is what `segzero export` reads, what the benchmarks compare with, and where a later training may
start (`segzero train pretrain --start-from`). The policy's read-outs go along for that.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

READOUTS_NAME = "readouts.safetensors"


def publish(run: Path, target: Path) -> None:
    """Round `run/hf` to float16 and put it at `target`, replacing what is there once the new folder is whole."""
    source = run / "hf"
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"expected a training run with hf/config.json, found none in {run}")
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            save_file(_halved(load_file(file)), staged / file.name, metadata={"format": "pt"})
        else:
            shutil.copy(file, staged / file.name)
    checkpoint = run / "checkpoint.pt"
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        if "readouts" in state:
            save_file(_halved(state["readouts"]), staged / READOUTS_NAME)
    shutil.rmtree(target, ignore_errors=True)
    staged.chmod(0o755)  # mkdtemp and safetensors write for the owner alone
    for file in staged.iterdir():
        file.chmod(0o644)
    staged.rename(target)


def _halved(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.half().contiguous() if value.is_floating_point() else value for name, value in weights.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a training run's weights as a shipped checkpoint folder.")
    parser.add_argument("run", type=Path, help="folder of a run, with hf/")
    parser.add_argument("target", type=Path, help="checkpoint folder to write")
    arguments = parser.parse_args()
    publish(arguments.run, arguments.target)

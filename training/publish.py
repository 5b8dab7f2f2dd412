r"""Writes the checkpoint folders that ship with the repository: float16 weights, as the bundle stores them.

    python -m training.publish runs/pretrain training/checkpoints/tabletop/base
    python -m training.publish runs/brief training/checkpoints/tabletop/base_brief
    python -m training.publish runs/grpo training/checkpoints/tabletop/policy
    python -m training.publish runs/segmenter training/checkpoints/tabletop/segmenter
    python -m training.publish runs/more training/checkpoints/tabletop/segmenter \
        --mix-with training/checkpoints/tabletop/segmenter --mix-share 0.25

The last line ships a mean of what a further training ended with and what it began with: most of the gain on what
was trained, and some back of what was forgotten (Wortsman et al., "Robust fine-tuning of zero-shot models", 2022).
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
ARGUMENTS_NAME = "training_args.bin"
"""A pickle that transformers leaves beside weights: of the run, and nothing to load from others."""


def publish(run: Path, target: Path, *, mix_with: Path | None = None, mix_share: float = 0.0) -> None:
    """Round `run/hf` to float16 and put it at `target`, replacing what is there once the new folder is whole.

    Args:
        run: folder of a training run.
        target: checkpoint folder to write; may be `mix_with`.
        mix_with: checkpoint folder of the same model whose weights are mixed in.
        mix_share: their share, 0..1.

    Raises:
        FileNotFoundError: the run has no `hf/config.json`.
        ValueError: the share is out of range, or the two hold different tensors.
    """
    if not 0 <= mix_share <= 1:
        raise ValueError(f"expected a share between 0 and 1, got {mix_share}")
    source = run / "hf"
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"expected a training run with hf/config.json, found none in {run}")
    weights = {file.name: load_file(file) for file in source.glob("*.safetensors")}
    if mix_with is not None:
        weights = {name: _mixed(each, load_file(mix_with / name), mix_share) for name, each in weights.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    for file in source.iterdir():
        if file.name == ARGUMENTS_NAME:
            continue
        if file.name in weights:
            save_file(_halved(weights[file.name]), staged / file.name, metadata={"format": "pt"})
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


def _mixed(weights: dict[str, torch.Tensor], other: dict[str, torch.Tensor], share: float) -> dict[str, torch.Tensor]:
    shapes, other_shapes = ({name: value.shape for name, value in each.items()} for each in (weights, other))
    if shapes != other_shapes:
        raise ValueError("expected two checkpoints of one model to mix, got tensors of other names or shapes")
    return {
        name: torch.lerp(value.float(), other[name].float(), share) if value.is_floating_point() else value
        for name, value in weights.items()
    }


def _halved(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.half().contiguous() if value.is_floating_point() else value for name, value in weights.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a training run's weights as a shipped checkpoint folder.")
    parser.add_argument("run", type=Path, help="folder of a run, with hf/")
    parser.add_argument("target", type=Path, help="checkpoint folder to write")
    parser.add_argument("--mix-with", type=Path, help="checkpoint folder whose weights are mixed in")
    parser.add_argument("--mix-share", type=float, default=0.5, help="their share, 0 to 1 (default 0.5)")
    arguments = parser.parse_args()
    publish(arguments.run, arguments.target, mix_with=arguments.mix_with, mix_share=arguments.mix_share)

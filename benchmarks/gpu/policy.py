"""Qwen2.5-VL's shapes with random weights made here: PyTorch, eager and compiled, beside ONNX Runtime.

Every side sees the same picture (840 x 840, 900 tokens) and the same hundred tokens of text behind it, and then says
64 tokens greedily, none guessed. What is timed lies on the device: the vision tower, reading the prompt, a token.
Both sides compute in 16 bits: PyTorch in bfloat16, as published, ONNX Runtime in float16 with products that leave its
range in float32. How many first tokens agree is told; random weights choose between near equals.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.random_policy import SIZES, Size, write_policy
from segzero_rt.positions import PictureSpan, mrope_positions

from .errors import GpuCheckError
from .roofline import Peaks
from .stages import Context, Figures

if TYPE_CHECKING:
    import torch

    from export.policy_checkpoint import PolicyCheckpoint

SEED = 0
_TINY_TOWER = {"hidden_size": 64, "intermediate_size": 96, "num_heads": 4}
TINY = Size(hidden=128, intermediate=192, layers=2, heads=4, kv_heads=2, vocab=400, tied=True, vision=_TINY_TOWER)
_SAID = "said.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What every side is asked."""

    input_size_hw: tuple[int, int]
    text_tokens: int
    """Behind the picture; as many stand before it as a system prompt has."""
    before_tokens: int
    new_tokens: int
    rounds: int
    cell: int = 28
    """Side in pixels of what one token sees."""

    @property
    def picture(self) -> PictureSpan:
        rows, columns = (length // self.cell for length in self.input_size_hw)
        return PictureSpan(start=self.before_tokens, grid_hw=(rows, columns))

    @property
    def prompt_tokens(self) -> int:
        return self.picture.end + self.text_tokens

    @property
    def max_length(self) -> int:
        return self.prompt_tokens + self.new_tokens


FULL_TASK = Task(input_size_hw=(840, 840), text_tokens=80, before_tokens=20, new_tokens=64, rounds=10)
TINY_TASK = Task(input_size_hw=(56, 84), text_tokens=5, before_tokens=3, new_tokens=6, rounds=2)


def task_of(context: Context) -> Task:
    return TINY_TASK if context.tiny else FULL_TASK


def folder_of(context: Context, like: str) -> Path:
    """Where a shape's checkpoint and graphs are."""
    return context.work / f"policy-{like}-{context.size}"


def open_checkpoint(context: Context, like: str) -> PolicyCheckpoint:
    """The random checkpoint that the step `graphs` wrote.

    Raises:
        GpuCheckError: it has not run.
    """
    from export.policy_checkpoint import PolicyCheckpoint

    folder = folder_of(context, like) / "checkpoint"
    if not (folder / "config.json").is_file():
        raise GpuCheckError(f"expected a checkpoint in {folder}, found none; run the step `graphs` of the stage first")
    return PolicyCheckpoint(folder)


def graphs(context: Context, like: str) -> Figures:
    """Writes a checkpoint of random weights, and its graphs in float16 for any ONNX runtime.

    Raises:
        GpuCheckError: the disk has not the room for both.
    """
    from export.policy_checkpoint import PolicyCheckpoint
    from export.policy_graphs import PolicyGraphWriter, Precision, float32_by_rule

    folder, task = folder_of(context, like), task_of(context)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "graphs").mkdir(parents=True)
    size = TINY if context.tiny else SIZES[like]
    free = shutil.disk_usage(folder).free
    if not context.tiny and free < 5 * _parameters(size):
        raise GpuCheckError(
            f"expected {5 * _parameters(size) / 1e9:.0f} GB of room in {folder}, got {free / 1e9:.0f} GB"
        )
    num_bytes = write_policy(size, None, folder / "checkpoint")
    checkpoint = PolicyCheckpoint(folder / "checkpoint")
    precision = Precision(storage="float16", computed="float16", float32_products=float32_by_rule(checkpoint))
    writer = PolicyGraphWriter(
        checkpoint,
        folder / "graphs",
        precision,
        flavour="portable",
        input_size_hw=task.input_size_hw,
        max_length=task.max_length,
    )
    writer.plan()
    writer.write()
    return {"like": like if not context.tiny else "tiny", "checkpoint_bytes": num_bytes, "task": _shown(task)}


def inputs_of(context: Context, checkpoint: PolicyCheckpoint) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Patches [patches, 3 * side**2] in the processor's order, token ids [1, tokens], positions [3, 1, max_length]."""
    import torch

    task, draw = task_of(context), torch.Generator().manual_seed(SEED)
    rows, columns = (2 * length for length in task.picture.grid_hw)
    patches = torch.randn(rows * columns, 3 * checkpoint.vision.patch_size**2, generator=draw)
    ids = torch.randint(0, min(1000, checkpoint.text.vocab_size), (1, task.prompt_tokens), generator=draw)
    positions = torch.from_numpy(mrope_positions(task.max_length, task.picture))[:, None]
    return patches.to(context.device), ids.to(context.device), positions.to(context.device)


def reached(
    peaks: Peaks, checkpoint: PolicyCheckpoint, task: Task, seconds: dict[str, float], dtype: str
) -> dict[str, Figures]:
    """Each stage beside its ceiling: weights and cache read once in 16 bits, operations of products and attention."""
    text = checkpoint.text
    layers = decoder_parameters(checkpoint)
    head = text.vocab_size * text.hidden_size
    cache_bytes = 2 * 2 * text.num_layers * text.num_kv_heads * text.head_dim
    attention = 4 * text.num_layers * text.num_heads * text.head_dim
    prompt, tokens = task.prompt_tokens, task.picture.num_tokens
    blocks, merger = tower_parameters(checkpoint)
    context = prompt + task.new_tokens // 2
    work = {
        "vision": (2.0 * (blocks + merger), 2.0 * (4 * blocks + merger) * tokens),
        "prefill": (
            2.0 * (layers + head) + prompt * cache_bytes,
            2.0 * (layers * prompt + head) + attention * prompt**2 / 2,
        ),
        "token": (2.0 * (layers + head) + context * cache_bytes, 2.0 * (layers + head) + attention * context),
    }
    return {stage: peaks.reached(value, *work[stage], dtype) for stage, value in seconds.items()}


def decoder_parameters(checkpoint: PolicyCheckpoint) -> int:
    """Of the layers' products."""
    text = checkpoint.text
    heads = 2 * (text.num_heads + text.num_kv_heads) * text.head_dim
    return text.num_layers * text.hidden_size * (heads + 3 * text.intermediate_size)


def tower_parameters(checkpoint: PolicyCheckpoint) -> tuple[int, int]:
    """Of the vision tower's products: those that see every patch, and the merger's, which sees each token once."""
    vision = checkpoint.vision
    width, merged = vision.hidden_size, vision.hidden_size * vision.merge_size**2
    blocks = vision.depth * width * (4 * width + 3 * vision.intermediate_size)
    return blocks, merged * (merged + checkpoint.text.hidden_size)


def keep_tokens(context: Context, like: str, side: str, tokens: list[int]) -> Figures:
    """Keeps what a side said; returns how many first tokens agree with each side that spoke before."""
    path = folder_of(context, like) / _SAID
    said: dict[str, list[int]] = json.loads(path.read_text()) if path.is_file() else {}
    agree = {
        other: next((n for n, pair in enumerate(zip(tokens, theirs, strict=True)) if pair[0] != pair[1]), len(tokens))
        for other, theirs in said.items()
        if other != side
    }
    path.write_text(json.dumps({**said, side: tokens}))
    return {"tokens": len(tokens), "first_tokens_that_agree": agree}


def _parameters(size: Size) -> int:
    """About how many, the tower's included."""
    return size.layers * 4 * size.hidden * size.intermediate + 2 * size.vocab * size.hidden + 700_000_000


def _shown(task: Task) -> Figures:
    return {
        "input_size_hw": task.input_size_hw,
        "picture_tokens": task.picture.num_tokens,
        "prompt_tokens": task.prompt_tokens,
        "new_tokens": task.new_tokens,
    }

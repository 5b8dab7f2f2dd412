"""Small GRPO runs for tests: rows of painted blocks, and a policy of a few thousand weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from policy_checkpoints import random_picture, write_checkpoint

from training.rows import RowObject, TrainingRow

SIDE = 56
TABLETOP_POLICY = Path(__file__).resolve().parent.parent / "training/checkpoints/tabletop/policy"


def make_rows(folder: Path, count: int, side: int = SIDE) -> list[TrainingRow]:
    """Rows on random pictures; every third asks for what is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        path = folder / f"{number}.png"
        Image.fromarray(random_picture(number)).save(path)
        box = RowObject(box_xyxy=(4.0, 6.0 + number, 30.0, 40.0), points_xy=((16.0, 20.0), (10.0, 30.0)))
        none = number % 3 == 2
        rows.append(
            TrainingRow(
                row_id=f"row-{number}", question=f"the cup {number}", image=path, input_size_hw=(side, side),
                objects=() if none else (box,), kind="none" if none else "name",
            )
        )  # fmt: skip
    return rows


def write_policy(folder: Path) -> Path:
    """A checkpoint with a tokenizer that ends turns, as transformers reads it."""
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    model = write_checkpoint(folder)
    tokenizer_class: Any = PreTrainedTokenizerFast
    tokenizer = tokenizer_class(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)
    del model
    return folder


def make_run(folder: Path, *, out: str = "run", **changes: Any) -> Any:
    """A run of the `debug` preset on the small policy; `changes` are the preset's."""
    from training.grpo import GrpoRun
    from training.grpo_presets import debug

    policy = folder / "policy"
    if not policy.exists():
        write_policy(policy)
    defaults = {"input_size_hw": (SIDE, SIDE), "max_completion_tokens": 12, "max_prompt_tokens": 600, "warmup_steps": 0}
    preset = replace(debug(), **{**defaults, **changes})
    rows = make_rows(folder / "rows", 6)
    return GrpoRun(preset=preset, out=folder / out, policy=str(policy), rows=rows[:4], eval_rows=rows[4:])

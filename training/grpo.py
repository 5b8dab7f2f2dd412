"""GRPO on TRL's trainer: outcome rewards only, no supervised reasoning.

    segzero train grpo --preset tabletop --policy training/checkpoints/tabletop/base_brief --out runs/grpo
    accelerate launch --config_file training/accelerate/fsdp.yaml -m training.grpo --preset seg_zero_3b --data rows …

Where the `seg_zero_*` and `vision_reasoner_7b` presets depart from the authors' training (EasyR1, a fork of verl):

1. TRL's `GRPOTrainer` on accelerate (FSDP or DeepSpeed ZeRO-3) takes the place of EasyR1's FSDP workers.
2. Advantages are divided by (std + 1e-4) of the group, TRL's constant; theirs is 1e-6.
3. The KL estimate is the same (`low_var_kl`), but not clamped to [-10, 10].
4. Sampling by vLLM is corrected by TRL's truncated importance weights; theirs trusts vLLM's samples.
5. The policy cannot sample the picture's placeholder token.
6. A prompt longer than 1,300 tokens stops the run before it begins, with its row named; theirs is cut off at the right.
7. The prompt is the one that the policy is asked with at run time: no line feed between picture and text, which
   VisionReasoner's training has and its inference has not.
8. Pictures are resized from their files with Pillow's bilinear filter, as at run time; the published sets hold pictures
   that OpenCV's area filter brought to 840 x 840. Rows made of those sets are trained on as they are.
9. Validation rows are answered greedily every so many steps and the best checkpoint by box gIoU is kept; theirs keeps
   one every 50 or 100 steps, and which was released is chosen by hand.
10. `rewards.py` and `reward_readings.py` list where scoring departs.
11. Micro batches are those of their 8 x 80 GB scripts. Their FSDP trains in mixed precision as here: float32 weights,
    bfloat16 passes.
12. LoRA, 4-bit weights and a frozen vision tower are additions: theirs always trains every weight.

`tabletop` is this repository's own: VisionReasoner's rewards at 280 pixels, with accuracy by degrees, and a learning
rate for a policy three orders of magnitude smaller.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint
from trl.trainer.grpo_config import GRPOConfig

from segzero_rt.answer_format import FORMATS
from segzero_rt.errors import DatasetError

from .grpo_callbacks import MetricsLog, RewardProgress, SampleReport
from .grpo_data import check_prompts, training_dataset
from .grpo_model import load_policy, lora_config
from .grpo_observer import BOX_GIOU, Observer
from .grpo_preflight import check_before_rows, claim, settings_of
from .grpo_presets import GrpoPreset, Precision, Vllm
from .grpo_processor import load_processor
from .grpo_rewards import reward_set
from .grpo_trainer import SegmentationGrpoTrainer, SharedPromptGrpoTrainer
from .rows import TrainingRow, read_rows
from .tabletop_rows import build_tabletop_rows

POLICY_FOLDER = "hf"
_CHECKPOINT_STATE = "trainer_state.json"


@dataclass(frozen=True, kw_only=True)
class GrpoRun:
    """One run: what is trained, on what, and where it is kept."""

    preset: GrpoPreset
    out: Path
    """Gets `run.json`, `checkpoint-*/`, `metrics.jsonl`, `report.html`, `tensorboard/`, and `hf/` in the end."""
    policy: str
    """Folder or hub name of the policy to start from."""
    rows: Sequence[TrainingRow]
    eval_rows: Sequence[TrainingRow]


def train_grpo(run: GrpoRun) -> Path:
    """Trains, or goes on where a stopped run of the same settings was; returns the folder of the best policy.

    Raises:
        DatasetError: a row that cannot be asked or scored, before anything is trained.
        SegZeroError: as `check_before_rows`, or the policy does not load.
    """
    check_before_rows(run.preset, out=run.out, policy=run.policy)
    check_rows(run)
    claim(run.out, settings_of(run.preset, run.policy, run.rows, run.eval_rows))
    trainer = build_trainer(run)
    checkpoint = newest_checkpoint(run.out)
    trainer.args.eval_on_start = checkpoint is None
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if run.preset.base_share:
        mix_in(trainer.model, load_policy(run.preset, run.policy), run.preset.base_share)
    return save_best(trainer, run.out / POLICY_FOLDER)


def check_rows(run: GrpoRun) -> None:
    """Raises `DatasetError`, naming the row, unless every row can be asked and scored as the preset does."""
    preset = run.preset
    if len(run.rows) < preset.prompts_per_step:
        raise DatasetError(f"expected at least {preset.prompts_per_step} rows for one step, got {len(run.rows)}")
    if not run.eval_rows:
        raise DatasetError("expected at least one validation row, got none")
    processor = load_processor(run.policy)
    for rows in (run.rows, run.eval_rows):
        reward_set(preset.rewards).check_rows(rows)
        check_prompts(rows, processor, FORMATS[preset.answer_format], preset)


def build_trainer(run: GrpoRun) -> SegmentationGrpoTrainer:
    """The trainer of a checked run, nothing trained yet."""
    preset = run.preset
    answer_format = FORMATS[preset.answer_format]
    rewards = reward_set(preset.rewards).rewards
    observer = Observer(answer_format, rewards)
    terms: list[Any] = [*rewards, observer]
    shared = preset.shared_prompts and PartialState().num_processes == 1
    trainer = (SharedPromptGrpoTrainer if shared else SegmentationGrpoTrainer)(
        model=load_policy(preset, run.policy),
        reward_funcs=terms,
        args=trl_config(preset, run.out, num_rewards=len(rewards)),
        train_dataset=training_dataset(run.rows, answer_format, preset.input_size_hw),
        eval_dataset=training_dataset(run.eval_rows[: preset.num_eval_rows], answer_format, preset.input_size_hw),
        processing_class=load_processor(run.policy),
        peft_config=None if preset.lora is None else lora_config(preset.lora),
    )
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(MetricsLog(run.out))
    trainer.add_callback(RewardProgress([reward.name for reward in rewards]))
    trainer.add_callback(SampleReport(run.out, observer, preset.num_eval_rows))
    return trainer


def trl_config(preset: GrpoPreset, out: Path, *, num_rewards: int) -> GRPOConfig:
    """The preset in TRL's words; the observer's weight of 0 stands behind those of the rewards."""
    accumulation = preset.accumulation_steps(PartialState().num_processes)
    return GRPOConfig(
        output_dir=str(out),
        seed=preset.seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=preset.precision is not Precision.FLOAT32,
        gradient_checkpointing=preset.gradient_checkpointing,
        per_device_train_batch_size=preset.micro_batch,
        gradient_accumulation_steps=accumulation,
        num_generations=preset.num_generations,
        max_completion_length=preset.max_completion_tokens,
        temperature=preset.temperature,
        top_p=preset.top_p,
        learning_rate=preset.learning_rate,
        lr_scheduler_type=preset.learning_rate_schedule,
        warmup_steps=preset.warmup_steps,
        weight_decay=preset.weight_decay,
        max_grad_norm=preset.max_grad_norm,
        beta=preset.kl_coef,
        scale_rewards=preset.reward_scale,
        entropy_coef=preset.entropy_coef,
        epsilon=preset.clip_range,
        loss_type=preset.loss,
        reward_weights=[1.0] * num_rewards + [0.0],
        max_steps=preset.max_steps,
        num_train_epochs=preset.num_epochs,
        logging_steps=1,
        report_to=["tensorboard"],
        remove_unused_columns=False,
        eval_strategy="steps",
        eval_steps=preset.eval_every,
        per_device_eval_batch_size=preset.micro_batch,
        num_generations_eval=1,
        save_strategy="steps",
        save_steps=preset.eval_every,
        save_total_limit=preset.keep_checkpoints,
        load_best_model_at_end=True,
        metric_for_best_model=f"rewards/{BOX_GIOU}/mean",
        greater_is_better=True,
        **_vllm_options(preset),
    )


def _vllm_options(preset: GrpoPreset) -> dict[str, Any]:
    if preset.vllm is None:
        return {}
    options: dict[str, Any] = {
        "use_vllm": True,
        "vllm_mode": preset.vllm.value,
        "vllm_max_model_length": preset.max_prompt_tokens + preset.max_completion_tokens,
    }
    if preset.vllm is Vllm.COLOCATE:
        options |= {
            "vllm_gpu_memory_utilization": preset.vllm_memory_share,
            "vllm_tensor_parallel_size": preset.vllm_tensor_parallel,
        }
    return options


def newest_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint that is whole; those that were being written when a run was stopped are removed.

    The trainer's state is what transformers writes last.
    """
    last: Any = get_last_checkpoint  # without types in transformers 5
    while (found := last(str(out)) if out.is_dir() else None) is not None:
        try:
            json.loads((Path(found) / _CHECKPOINT_STATE).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            shutil.rmtree(found)
        else:
            return Path(found)
    return None


def mix_in(policy: Any, base: Any, share: float) -> None:
    """Moves every weight of `policy` by `share` of the way to that of `base`, in place."""
    with torch.no_grad():
        for weight, other in zip(policy.parameters(), base.parameters(), strict=True):
            weight.lerp_(other.to(weight), share)


def save_best(trainer: SegmentationGrpoTrainer, folder: Path) -> Path:
    """Write the trainer's weights (after training: the best ones) as `segzero export` reads them."""
    temporary = folder.with_name(f"{folder.name}.part")
    if trainer.args.should_save:
        shutil.rmtree(temporary, ignore_errors=True)
    if isinstance(trainer.model, PeftModel):
        merged: Any = trainer.model.merge_and_unload()
        merged.save_pretrained(temporary)
    else:
        trainer.save_model(str(temporary))
    if trainer.args.should_save:
        processor: Any = trainer.processing_class
        processor.tokenizer.save_pretrained(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
    return folder


def rows_of(
    preset: GrpoPreset,
    folder: Path,
    split: str,
    num_rows: int,
    given: Path | None,
    kinds: tuple[str, ...] = (),
    *,
    processes: int = 1,
) -> list[TrainingRow]:
    """Rows that were given, or tabletop questions, rendered into `folder` by the first process.

    Args:
        kinds, processes: as `build_tabletop_rows` takes them.

    Raises:
        DatasetError: a row is wrong, or the folder holds other ones.
    """
    if given is not None:
        return read_rows(given)
    with PartialState().main_process_first():
        build_tabletop_rows(folder, split=split, seed=preset.seed, num_rows=num_rows, kinds=kinds, processes=processes)
    return read_rows(folder, limit=num_rows)


if __name__ == "__main__":
    from segzero_rt.cli import main

    sys.exit(main(["train", "grpo", *sys.argv[1:]]))

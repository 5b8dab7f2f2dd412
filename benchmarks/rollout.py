"""Samples per second of GRPO's rollout–update loop: prompts read once against TRL's own, same policy, rows and machine.

    python -m benchmarks.rollout [--policy HF] [--data ROWS] [--prompts 4] [--steps 4] [--threads 1]

Three trainers run the same steps one after the other, each from the same weights on the same prompts in the same order:

* `trl`: TRL's `GRPOTrainer` as it is, sampled by transformers' `generate`, pictures by transformers' processor;
* `shared_sampling`: sampled by this repository, scored and learnt by TRL;
* `shared`: sampled, scored and learnt by this repository, as the `tabletop` preset does.

Before anything is timed, greedy replies of both ways are compared token by token, and log-probabilities of sampled
replies number by number: as sampled, as scored here, as scored by TRL.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .measuring import RESULTS, pin_to_cores, run_and_exit, write_result

if TYPE_CHECKING:  # torch and TRL are imported once the process is pinned
    from training.grpo import GrpoRun
    from training.rows import TrainingRow

TRL, SAMPLING, SHARED = "trl", "shared_sampling", "shared"
ARMS = (SHARED, SAMPLING, TRL)


def main() -> None:
    """Compares, times each trainer, writes one result file."""
    arguments = _parse()
    pin_to_cores(arguments.threads)
    import torch

    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        rows = _rows(arguments, Path(scratch))
        runs = {arm: _run(arguments, rows, Path(scratch) / arm, shared=arm != TRL) for arm in arguments.arms}
        document: dict[str, Any] = {
            "policy": arguments.policy.name,
            "prompts_per_step": arguments.prompts,
            "samples_per_prompt": next(iter(runs.values())).preset.num_generations,
            "max_completion_tokens": next(iter(runs.values())).preset.max_completion_tokens,
            "threads": arguments.threads,
            "numerics": compare(_run(arguments, rows, Path(scratch) / "compared", shared=True)),
            "arms": {arm: time_loop(run, arm) for arm, run in runs.items()},
        }
        document["speed_up"] = speed_ups(document["arms"])
    path = write_result("rollout", document, arguments.out)
    print(json.dumps({"result": str(path), "speed_up": document["speed_up"], "numerics": document["numerics"]}))


def compare(run: GrpoRun) -> dict[str, Any]:
    """What both ways say and think of what was said, on the prompts of the first step.

    Returns:
        `equal_greedy` of `num_prompts` replies have the same tokens; largest absolute differences in nats between
        log-probabilities of sampled tokens: `sampled_against_scored` (both here), `scored_against_trl`.
    """
    import torch
    from trl import GRPOTrainer

    trainer: Any = quiet_trainer(run)
    count, group = run.preset.prompts_per_step, run.preset.num_generations
    prompts = [_conversation(trainer.train_dataset[number]) for number in range(count)]
    ids, pictures, fields = trainer._tokenize_prompts(prompts)
    trainer.model.eval()
    with trainer._greedy():
        ours, _ = trainer._generate_single_turn(ids, pictures, fields, 1)
        theirs, _ = GRPOTrainer._generate_single_turn(trainer, ids, pictures, fields, 1)
    trainer.model.train()
    repeated = [prompt for prompt in prompts for _ in range(group)]
    ids, pictures, fields = trainer._tokenize_prompts(repeated)
    replies, sampled = trainer._generate_single_turn(ids, pictures, fields, group)
    inputs, mask = _scoring_inputs(trainer, ids, replies, fields)
    with torch.no_grad():
        here, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, **inputs)
        trl, _, _ = GRPOTrainer._get_per_token_logps_and_entropies(trainer, trainer.model, **inputs)
    drawn = torch.zeros_like(here)
    for row, told in enumerate(sampled):
        drawn[row, : len(told)] = torch.tensor(told)
    return {
        "num_prompts": count,
        "equal_greedy": sum(one == other for one, other in zip(ours, theirs, strict=True)),
        "sampled_against_scored": float(((drawn - here) * mask).abs().max()),
        "scored_against_trl": float(((here - trl) * mask).abs().max()),
    }


def time_loop(run: GrpoRun, arm: str) -> dict[str, Any]:
    """Trains the run's steps as one arm does; the first is a warm-up.

    Returns:
        Seconds of each timed step, of its rollout (prompts to tokens) and of the rest (rewards, scores, update);
        samples per second of the medians; and how long the replies were.
    """
    trainer: Any = quiet_trainer(run)
    if arm == SAMPLING:
        _learn_as_trl(trainer)
    if arm == TRL:
        _work_on_pictures_as_transformers(trainer.processing_class)
    clock = _step_clock()
    trainer.add_callback(clock)
    rollout_s: list[float] = []
    trainer._generate = _timed(trainer._generate, rollout_s)
    clock.last = time.perf_counter()
    trainer.train()
    steps, rollouts = clock.seconds[1:], rollout_s[1:]
    samples = run.preset.samples_per_step
    logs = [entry for entry in trainer.state.log_history if "completions/mean_length" in entry][1:]
    result = {
        "step_s": steps,
        "rollout_s": rollouts,
        "rest_s": [whole - part for whole, part in zip(steps, rollouts, strict=True)],
        "loop_samples_per_s": samples / statistics.median(steps),
        "rollout_samples_per_s": samples / statistics.median(rollouts),
        "mean_reply_tokens": statistics.mean(entry["completions/mean_length"] for entry in logs),
        "longest_reply_tokens": max(entry["completions/max_length"] for entry in logs),
    }
    print(f"{arm}: {result['loop_samples_per_s']:.2f} samples/s, {result['rollout_samples_per_s']:.2f} of rollout")
    return result


def speed_ups(arms: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Each arm's samples per second over TRL's, of the loop and of the rollout alone; empty where TRL was not run."""
    if TRL not in arms:
        return {}
    return {
        arm: {
            what: result[f"{what}_samples_per_s"] / arms[TRL][f"{what}_samples_per_s"] for what in ("loop", "rollout")
        }
        for arm, result in arms.items()
        if arm != TRL
    }


def quiet_trainer(run: GrpoRun) -> Any:
    """The run's trainer, writing nothing and evaluating never."""
    from transformers.integrations import TensorBoardCallback

    from training.grpo import build_trainer

    trainer: Any = build_trainer(run)
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"
    trainer.args.load_best_model_at_end = False
    trainer.remove_callback(TensorBoardCallback)
    return trainer


def _learn_as_trl(trainer: Any) -> None:
    from types import MethodType

    from trl import GRPOTrainer

    trainer._get_per_token_logps_and_entropies = MethodType(GRPOTrainer._get_per_token_logps_and_entropies, trainer)


def _work_on_pictures_as_transformers(processor: Any) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    settings = processor.image_processor.to_dict()
    processor.image_processor = Qwen2VLImageProcessorPil.from_dict(settings)


def _timed(call: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def timed(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        result = call(*arguments, **options)
        seconds.append(time.perf_counter() - started)
        return result

    return timed


def _step_clock() -> Any:
    from transformers import TrainerCallback

    class StepClock(TrainerCallback):  # type: ignore[misc]  # transformers' callbacks are untyped
        """Seconds from one step's end to the next one's."""

        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.last = 0.0

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now = time.perf_counter()
            self.seconds.append(now - self.last)
            self.last = now

    return StepClock()


def _conversation(example: dict[str, Any]) -> Any:
    from trl.data_utils import prepare_multimodal_messages

    return prepare_multimodal_messages(example["prompt"], images=[example["image"]])


def _scoring_inputs(trainer: Any, prompt_ids: Any, replies: Any, fields: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """TRL's batch: prompts padded at the left, replies at the right; and the mask of the replies."""
    import torch
    from trl.trainer.utils import pad

    sides = {"left": prompt_ids, "right": replies}
    padding = trainer.processing_class.tokenizer.pad_token_id
    ids, masks = [], []
    for side, rows in sides.items():
        tensors = [torch.tensor(row) for row in rows]
        ids.append(pad(tensors, padding_value=padding, padding_side=side))
        masks.append(pad([torch.ones_like(row) for row in tensors], padding_value=0, padding_side=side))
    token_ids = torch.cat(ids, 1)
    inputs = {
        "input_ids": token_ids,
        "attention_mask": torch.cat(masks, 1),
        "logits_to_keep": ids[1].shape[1],
        "pixel_values": torch.as_tensor(fields["pixel_values"]),
        "image_grid_thw": torch.as_tensor(fields["image_grid_thw"]),
        "num_images": [1] * len(replies),
        "mm_token_type_ids": (token_ids == trainer.model.config.image_token_id).int(),
    }
    return inputs, masks[1]


def _rows(arguments: argparse.Namespace, scratch: Path) -> list[TrainingRow]:
    from training.grpo_presets import tabletop
    from training.rows import read_rows
    from training.tabletop_rows import build_tabletop_rows

    wanted = arguments.prompts * arguments.steps
    folder = arguments.data or scratch / "rows"
    if arguments.data is None:
        build_tabletop_rows(folder, split="train", seed=tabletop().seed, num_rows=wanted)
    rows: list[TrainingRow] = read_rows(folder, limit=wanted)
    return rows


def _run(arguments: argparse.Namespace, rows: list[TrainingRow], out: Path, *, shared: bool) -> GrpoRun:
    from training.grpo import GrpoRun
    from training.grpo_presets import Precision, tabletop

    preset = tabletop()
    preset = replace(
        preset,
        precision=Precision.FLOAT32,  # in which both sides can be compared digit by digit
        prompts_per_step=arguments.prompts,
        micro_batch=arguments.prompts * preset.num_generations,
        max_steps=arguments.steps,
        shared_prompts=shared,
    )
    out.mkdir()
    return GrpoRun(preset=preset, out=out, policy=str(arguments.policy), rows=rows, eval_rows=rows[:1])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="samples per second of the rollout-update loop against plain TRL")
    parser.add_argument("--policy", type=Path, default=Path("training/checkpoints/tabletop/policy"))
    parser.add_argument("--data", type=Path, help="training rows (default: drawn)")
    parser.add_argument("--prompts", type=int, default=4, help="prompts of one step, 8 samples each")
    parser.add_argument("--steps", type=int, default=4, help="steps of each trainer, the first not timed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result file")
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error(f"expected at least 2 steps, the first of which is not timed, got {arguments.steps}")
    return arguments


if __name__ == "__main__":
    run_and_exit(main, "rollout")

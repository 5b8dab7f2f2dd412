"""What a run shows and leaves while it goes on: a progress line with every reward term, `metrics.jsonl`, the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .grpo_observer import BOX_GIOU, Observer
from .grpo_report import write_report

METRICS_NAME = "metrics.jsonl"
REPORT_NAME = "report.html"
STEP = "step"


class MetricsLog(TrainerCallback):
    """One line of JSON for each of TRL's logs; lines behind the checkpoint that a run goes on from are dropped."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS_NAME

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero and self.path.exists():
            kept = [line for line in read_metrics(self.path) if line[STEP] <= state.global_step]
            temporary = self.path.with_suffix(".part")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            temporary.replace(self.path)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        if state.is_world_process_zero:
            logs: dict[str, Any] = given["logs"]
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({STEP: state.global_step, **logs}) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` that are whole."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


class RewardProgress(TrainerCallback):
    """A progress line with the sum of the rewards, every term, KL and length."""

    def __init__(self, reward_names: Sequence[str]) -> None:
        self.reward_names = tuple(reward_names)
        self._bar: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="grpo", unit="step")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        logs: dict[str, Any] = given["logs"]
        if self._bar is None:
            return
        if "reward" in logs:
            shown = {"reward": "reward", **{name: f"rewards/{name}/mean" for name in self.reward_names}}
            shown |= {"kl": "kl", "tokens": "completions/mean_length"}
            self._bar.set_postfix(
                {name: f"{logs[key]:.2f}" for name, key in shown.items() if logs.get(key) is not None}
            )
        elif f"eval_rewards/{BOX_GIOU}/mean" in logs:
            giou, reward = logs[f"eval_rewards/{BOX_GIOU}/mean"], logs["eval_reward"]
            tqdm.write(f"step {state.global_step}: validation box gIoU {giou:.3f}, reward {reward:.2f}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._bar is not None:
            self._bar.close()


class SampleReport(TrainerCallback):
    """Rewrites the report after every evaluation: the curves so far, and what the policy said last."""

    def __init__(self, folder: Path, observer: Observer, num_eval_rows: int) -> None:
        self.folder, self.observer, self.num_eval_rows = folder, observer, num_eval_rows

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            newest = list(self.observer.samples)[-self.num_eval_rows :]
            metrics = read_metrics(self.folder / METRICS_NAME)
            write_report(self.folder / REPORT_NAME, metrics, newest)

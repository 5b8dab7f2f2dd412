"""Supervised fine-tuning on labelled replies: the loop of the arms that GRPO is compared with.

    rows ─► labelled replies ─► log-probabilities under the policy (`reply_scores`) ─► mean over tokens ─► AdamW

The forward pass is GRPO's own, so that arms differ in what they learn from and in nothing else. It takes a few lines
here where TRL's `SFTTrainer` would bring a collator, a data format and a forward pass of its own for pictures.

A run is seeded and goes on from its last validation as if nothing had happened: which rows a step sees depends on the
seed and the step alone, and nothing else is drawn. (Visual tokens that are remembered may differ in their last bit with
the batch that they were first seen in.)
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from segzero_rt.answer_format import ANSWER_CLOSE, AnswerFormat, AnswerObject
from segzero_rt.errors import DatasetError

from ..grpo import POLICY_FOLDER
from ..grpo_callbacks import METRICS_NAME, read_metrics
from ..grpo_model import load_policy
from ..grpo_presets import GrpoPreset, Precision
from ..grpo_processor import load_processor
from ..picture_memory import PictureMemory
from ..reply_scores import score_replies
from ..rows import TrainingRow
from ..shared_prompt import SharedPromptPolicy
from .jobs import VALIDATION
from .live_policy import Asked, LivePolicy
from .measures import mean, score_rows

CHECKPOINT_NAME = "checkpoint.pt"
_LOG_EVERY = 10


@dataclass(frozen=True, kw_only=True)
class SupervisedRun:
    """One run.

    Raises:
        ValueError: steps that evaluations do not divide.
    """

    preset: GrpoPreset
    """Says the policy's input, format and precision, what is frozen, weight decay and clipping."""
    out: Path
    """Gets `metrics.jsonl`, `checkpoint.pt` while it goes on, and `hf/` in the end."""
    policy: str
    rows: Sequence[TrainingRow]
    eval_rows: Sequence[TrainingRow]
    reply_start: str
    """What replies begin with, given; empty where the labelled reply has its thinking."""
    learning_rate: float
    num_steps: int
    batch: int
    evaluations: int
    warmup_steps: int
    seed: int

    def __post_init__(self) -> None:
        if self.evaluations < 1 or self.num_steps % self.evaluations:
            raise ValueError(f"expected steps that {self.evaluations} evaluations divide, got {self.num_steps}")


def label_text(row: TrainingRow, answer_format: AnswerFormat, reply_start: str) -> str:
    """What the policy should say behind `reply_start`: the answer, or a thinking and the answer.

    Raises:
        DatasetError: a thinking is wanted and the row has none.
    """
    objects: list[AnswerObject] = [
        (
            [round(value) for value in one.box_xyxy],
            [[int(x), int(y)] for x, y in one.points_xy[: answer_format.max_points]],
        )
        for one in row.objects
    ]
    if reply_start:
        return answer_format.answer_text(objects) + ANSWER_CLOSE
    thinking = row.extra.get("thinking")
    if not isinstance(thinking, str) or not thinking:
        raise DatasetError(f"row {row.row_id!r:.60}: expected a thinking to learn from, got {thinking!r:.60}")
    return answer_format.assistant_text(thinking, objects)


class SupervisedTraining:
    """A run in memory, at the step that its checkpoint holds."""

    def __init__(self, run: SupervisedRun) -> None:
        self.run = run
        preset = run.preset
        run.out.mkdir(parents=True, exist_ok=True)
        self.model: Any = load_policy(preset, run.policy)
        # Every picture is seen once in a pass, so memory must hold all of them to serve at all: 0.1 MB each.
        memory = PictureMemory(len(run.rows) + len(run.eval_rows)) if preset.freeze_vision else None
        self.live = LivePolicy(self.model, load_processor(run.policy), preset, memory=memory)
        self.shared = SharedPromptPolicy(self.model, memory)
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=run.learning_rate, weight_decay=preset.weight_decay)
        self.step = 0
        self.best: float | None = None
        self._resume()

    def train(self) -> Path:
        """Trains to the end; returns the folder of the best policy."""
        run = self.run
        if self.step == 0 and self.best is None:
            self._log({VALIDATION: self.validate()})
        every = run.num_steps // run.evaluations
        losses = []
        bar = tqdm(total=run.num_steps, initial=self.step, desc="sft", unit="step", mininterval=5)
        while self.step < run.num_steps:
            losses.append(self.train_step())
            self.step += 1
            bar.update(1)
            if self.step % _LOG_EVERY == 0 or self.step % every == 0:
                self._log({"loss": float(np.mean(losses)), "learning_rate": self._rate(self.step - 1)})
                losses.clear()
            if self.step % every == 0:
                self._keep(self.validate())
        bar.close()
        return run.out / POLICY_FOLDER

    def train_step(self) -> float:
        """One optimiser step; returns its loss in nats per token.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(self.step)
        loss = self._loss([self.run.rows[index] for index in self._indices()])
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"loss is {value} at step {self.step} of {self.run.out}")
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        trained = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, self.run.preset.max_grad_norm)
        self.optimizer.step()
        return value

    def validate(self) -> float:
        """Mean box gIoU of greedy answers to the validation rows."""
        return mean(score_rows(self.live, self.run.eval_rows, reply_start=self.run.reply_start, told=VALIDATION))

    def _loss(self, rows: Sequence[TrainingRow]) -> Tensor:
        start, answer_format = self.run.reply_start, self.live.answer_format
        asked = [Asked(text=answer_format.user_prompt(row.question), picture=row.image) for row in rows]
        prompts = self.live.prompts(asked, reply_start=start)
        replies = [[*self.live.text_ids(label_text(row, answer_format, start)), *self.live.end_ids()] for row in rows]
        mixed = self.run.preset.precision is not Precision.FLOAT32
        with torch.autocast(self.shared.device.type, torch.bfloat16, enabled=mixed):
            logprobs, _ = score_replies(self.shared, prompts, range(len(rows)), replies)
        return -logprobs.sum() / sum(map(len, replies))

    def _indices(self) -> list[int]:
        """Rows of this step: passes over all of them, each in an order of its own."""
        count = len(self.run.rows)
        places = range(self.step * self.run.batch, (self.step + 1) * self.run.batch)
        orders = {
            number: np.random.default_rng([self.run.seed, number]).permutation(count)
            for number in {place // count for place in places}
        }
        return [int(orders[place // count][place % count]) for place in places]

    def _rate(self, step: int) -> float:
        """Of a step, counted from 0: linear warm-up, then linear decay to 0, as GRPO's recipe has it."""
        run = self.run
        warm = (step + 1) / max(1, run.warmup_steps)
        left = (run.num_steps - step) / max(1, run.num_steps - run.warmup_steps)
        return run.learning_rate * min(warm, left, 1.0)

    # -- what stays ------------------------------------------------------------------------------------------------

    def _log(self, values: dict[str, float]) -> None:
        with (self.run.out / METRICS_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.step, **values}) + "\n")

    def _keep(self, value: float) -> None:
        """Logs a validation, keeps the policy if it is the best, and makes this the place to go on from."""
        self._log({VALIDATION: value})
        if self.best is None or value > self.best:
            self.best = value
            self._save_policy()
        state = {
            "step": self.step, "best": self.best, "policy": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip
        temporary = self.run.out / f"{CHECKPOINT_NAME}.part"
        torch.save(state, temporary)
        temporary.replace(self.run.out / CHECKPOINT_NAME)

    def _save_policy(self) -> None:
        folder = self.run.out / POLICY_FOLDER
        temporary = folder.with_name(f"{POLICY_FOLDER}.part")
        shutil.rmtree(temporary, ignore_errors=True)
        self.model.save_pretrained(temporary)
        self.live.tokenizer.save_pretrained(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)

    def _resume(self) -> None:
        path, metrics = self.run.out / CHECKPOINT_NAME, self.run.out / METRICS_NAME
        if not path.exists():
            metrics.unlink(missing_ok=True)
            return
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.best = state["step"], state["best"]
        kept = [line for line in read_metrics(metrics) if line["step"] <= self.step]
        temporary = metrics.with_suffix(".part")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        temporary.replace(metrics)

"""Trains the base policy from scratch: grounding, short visual questions, world knowledge and the answer format.

Two phases: the vision tower alone on its read-outs (cheap, dense), then everything together. Seeded, logged to
`metrics.jsonl`, resumable: a run that was stopped goes on from its last checkpoint with the same schedule.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from .grounding_data import EVERYTHING, IGNORED, LONG, PLAIN, SHORT, GroundingData
from .policy_model import PackedPolicy, tabletop_config
from .publish import READOUTS_NAME
from .readouts import TAPS, WATCHING_LAYER, Readouts, watching_loss
from .scene_cache import SceneCache
from .tokenizer import CONTROL_TOKENS, control_id, train_tokenizer

LOG_EVERY = 10
"""Steps behind one line of `metrics.jsonl`; each figure is their mean."""


@dataclass(frozen=True, kw_only=True)
class PretrainPreset:
    """A complete configuration; presets are the functions below."""

    seed: int = 0
    num_vision_steps: int
    """Steps of the vision tower alone."""
    num_steps: int
    """Steps in all."""
    decay_steps: int
    """Last steps over which the learning rate falls linearly to 3 %."""
    vision_batch: int
    """Pictures a step while the vision tower trains alone."""
    batch: int
    """Pictures a step afterwards; each carries about ten questions."""
    learning_rate: float
    weight_decay: float = 0.05
    warmup_steps: int = 100
    readout_weight: float = 1.0
    sparse_until: int = 0
    """Up to this step only pictures of one to three objects: the curriculum's first rung."""
    knowledge_every: int = 4
    """One step in so many also reads 48 text-only questions."""
    brief_share: float = 0.0
    """Of the thoughts, those that are taught in fewer words (`brief_thoughts`)."""
    goes_on: bool = False
    """Makes no sense from scratch: a published base must be given to start from."""
    compiled: bool = True
    """Fuse the passes with torch.compile: minutes to start, then twice as fast on a CPU."""
    checkpoint_minutes: float = 4.0


def tabletop() -> PretrainPreset:
    """The recipe of the shipped policy, never yet run in one go.

    The shipped weights had 328 steps of vision and 3,572 of everything, batches of 16, and the learning rate annealed
    four times; rotary frequencies, read-outs and question shares changed on the way. Uses in the words of questions
    came with the last 650 steps, openings with the last 340, thoughts with the last 160; from the 650th on every step
    read text-only questions.
    """
    return PretrainPreset(
        num_vision_steps=400, num_steps=9000, decay_steps=2500, vision_batch=48, batch=24, learning_rate=1.2e-3,
        sparse_until=500,
    )  # fmt: skip


def tabletop_brief() -> PretrainPreset:
    """Further steps of the shipped base (`--start-from training/checkpoints/tabletop/base`), in which two of five
    thoughts are taught in fewer words: a base in which a reward for brevity finds something to prefer."""
    return PretrainPreset(
        num_vision_steps=0, num_steps=300, decay_steps=270, vision_batch=48, batch=16, learning_rate=3e-4,
        warmup_steps=30, knowledge_every=2, brief_share=0.4, goes_on=True,
    )  # fmt: skip


def debug() -> PretrainPreset:
    """Seconds, for tests: every code path, nothing learnt."""
    return PretrainPreset(
        num_vision_steps=2, num_steps=6, decay_steps=2, vision_batch=2, batch=2, learning_rate=1e-3, warmup_steps=2,
        knowledge_every=2, compiled=False, checkpoint_minutes=0.0,
    )  # fmt: skip


PRESETS = {"tabletop": tabletop, "tabletop_brief": tabletop_brief, "debug": debug}


class Pretraining:
    """One run in `folder`: `tokenizer.json`, `checkpoint.pt`, `metrics.jsonl`, and `hf/` for the exporter."""

    def __init__(
        self, preset: PretrainPreset, folder: Path, cache: SceneCache, *, start_from: Path | None = None
    ) -> None:
        self.preset, self.folder, self.cache, self.start_from = preset, folder, cache, start_from
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer = self._tokenizer()
        torch.manual_seed(preset.seed)
        ids = {token: control_id(self.tokenizer, token) for token in CONTROL_TOKENS}
        config = tabletop_config(self.tokenizer.get_vocab_size(), ids)
        self.policy = PackedPolicy(Qwen2_5_VLForConditionalGeneration(config))
        if preset.compiled:
            self.policy.look = torch.compile(self.policy.look, dynamic=False)  # type: ignore[method-assign]
            self.policy.read = torch.compile(self.policy.read, dynamic=False)  # type: ignore[method-assign]
        self.readouts = Readouts(self.policy.text.config.hidden_size)
        self.data = GroundingData(cache, self.tokenizer, brief_share=preset.brief_share)
        self.usual = self.data.layout((6, SHORT), (1, LONG), (3, PLAIN))
        self.dense = self.data.layout((4, SHORT), (1, EVERYTHING), (2, PLAIN))
        self.optimizer = torch.optim.AdamW(self._parameter_groups(), lr=preset.learning_rate, betas=(0.9, 0.95))
        self.step = 0
        self._resume()

    def _tokenizer(self) -> Tokenizer:
        path = self.folder / "tokenizer.json"
        if self.start_from is not None and not path.exists():
            shutil.copy(self.start_from / "tokenizer.json", path)
        return Tokenizer.from_file(str(path)) if path.exists() else train_tokenizer(self.cache, path)

    def _parameter_groups(self) -> list[dict[str, Any]]:
        named = [*self.policy.named_parameters(), *self.readouts.named_parameters()]
        decayed = [p for _, p in named if p.dim() >= 2]
        plain = [p for _, p in named if p.dim() < 2]
        return [{"params": decayed, "weight_decay": self.preset.weight_decay}, {"params": plain, "weight_decay": 0.0}]

    # -- the loop --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        preset = self.preset
        saved_at = time.monotonic()
        with (self.folder / "metrics.jsonl").open("a") as log:
            progress = tqdm(
                range(self.step, preset.num_steps), initial=self.step, total=preset.num_steps, mininterval=5
            )
            recent: list[dict[str, float]] = []
            for _ in progress:
                recent.append(self._train_step())
                self.step += 1
                if self.step % LOG_EVERY == 0 or self.step == preset.num_steps:
                    metrics = _means(recent)
                    recent.clear()
                    log.write(json.dumps({"step": self.step, **metrics}) + "\n")
                    log.flush()
                    shown = ("text", "pointed", "box_iou", "vision_kind")
                    progress.set_postfix({k: f"{metrics[k]:.3f}" for k in shown if k in metrics})
                if time.monotonic() - saved_at > 60 * preset.checkpoint_minutes:
                    self.save()
                    saved_at = time.monotonic()
        self.save()

    def _learning_rate(self) -> float:
        preset = self.preset
        warm = min(1.0, (self.step + 1) / preset.warmup_steps)
        joint = self.step - preset.num_vision_steps
        if 0 <= joint < preset.warmup_steps:  # the decoder starts cold when it joins
            warm = (joint + 1) / preset.warmup_steps
        left = (preset.num_steps - self.step) / max(1, preset.decay_steps)
        return preset.learning_rate * warm * max(0.03, min(1.0, left))

    def _train_step(self) -> dict[str, float]:
        rng = np.random.default_rng([self.preset.seed, self.step])
        rate = self._learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.step % 25 == 0:
            self.cache.refresh()
        with torch.autocast("cpu", torch.bfloat16):
            losses, metrics = (
                self._vision_losses(rng) if self.step < self.preset.num_vision_steps else self._losses(rng)
            )
        loss = torch.stack(list(losses.values())).sum()
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(
                f"loss is {value} at step {self.step}: { ({k: v.item() for k, v in losses.items()}) }"
            )
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_([*self.policy.parameters(), *self.readouts.parameters()], 1.0)
        self.optimizer.step()
        return {"loss": value, "rate": rate, "norm": norm.item(), **metrics, **{k: v.item() for k, v in losses.items()}}

    def _draw(self, rng: np.random.Generator, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        available = len(self.cache.objects)
        if self.step < self.preset.sparse_until:
            return rng.integers((available + 5) // 6, size=count) * 6  # see scene_cache.num_objects_of
        return rng.integers(available, size=count)

    def _vision_losses(self, rng: np.random.Generator) -> tuple[dict[str, Tensor], dict[str, float]]:
        scenes = rng.integers(len(self.cache.objects), size=self.preset.vision_batch)
        batch = self.data.batch(rng, scenes, self.data.layout((1, SHORT)))
        losses = self.readouts.vision(self.policy.look(batch.pixels), batch)
        return {f"vision_{name}": loss for name, loss in losses.items()}, {}

    def _losses(self, rng: np.random.Generator) -> tuple[dict[str, Tensor], dict[str, float]]:
        layout = self.dense if self.step % 4 == 3 else self.usual
        batch = self.data.batch(rng, self._draw(rng, self.preset.batch), layout)
        visual = self.policy.look(batch.pixels)
        hidden, (cells, pointing, writing) = self.policy.read(batch.token_ids, visual, layout, TAPS)
        image = slice(layout.image_start, layout.image_start + visual.shape[1])
        weight = self.preset.readout_weight
        losses = {"text": self._text_loss(hidden, batch.labels)}
        for name, loss in self.readouts.vision(visual, batch).items():
            losses[f"vision_{name}"] = 0.5 * weight * loss
        for name, loss in self.readouts.cells(cells[:, image], batch).items():
            losses[f"cells_{name}"] = 0.3 * weight * loss
        pointer, pointed = self.readouts.pointer(pointing, pointing[:, image], batch)
        box, iou = self.readouts.box(pointing, batch)
        watching = watching_loss(self.policy.watched(cells, WATCHING_LAYER, batch.watch_at, layout), batch)
        number, counted = self.readouts.number(writing, batch)
        losses |= {"pointer": 0.5 * weight * pointer, "box": weight * box, "watching": 0.5 * weight * watching}
        losses["number"] = 0.5 * weight * number
        if self.step % self.preset.knowledge_every == 0:
            ids, labels, text_layout = self.data.knowledge_batch(rng, 48)
            losses["knowledge"] = 0.3 * self._text_loss(self.policy.read(ids, None, text_layout)[0], labels)
        return losses, {"pointed": pointed.item(), "box_iou": iou.item(), "counted": counted.item()}

    def _text_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        learnt = labels != IGNORED
        return F.cross_entropy(self.policy.logits(hidden[learnt]).float(), labels[learnt])

    # -- what stays ------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint and the Hugging Face folder, each to a temporary name first."""
        state = {
            "step": self.step, "preset": asdict(self.preset), "policy": self.policy.model.state_dict(),
            "readouts": self.readouts.state_dict(), "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip
        temporary = self.folder / "checkpoint.pt.part"
        torch.save(state, temporary)
        temporary.replace(self.folder / "checkpoint.pt")
        save_policy(self.policy.model, self.tokenizer, self.folder / "hf")

    def _resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            if self.start_from is not None:
                self._start_from_published(self.start_from)
            return
        state = torch.load(path, weights_only=True)
        self.policy.model.load_state_dict(state["policy"])
        self.readouts.load_state_dict(state["readouts"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def _start_from_published(self, folder: Path) -> None:
        """Weights alone, from a folder of `publish.py`: a new schedule, with the vision tower's own phase behind it."""
        published = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        self.policy.model.load_state_dict(published.state_dict())
        self.readouts.load_state_dict(load_file(folder / READOUTS_NAME))
        self.step = self.preset.num_vision_steps


def _means(recent: list[dict[str, float]]) -> dict[str, float]:
    """Mean of every figure over the steps that have it: question layouts and the text-only batch take turns."""
    names = dict.fromkeys(name for metrics in recent for name in metrics)
    values = {name: [metrics[name] for metrics in recent if name in metrics] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items()}


def save_policy(model: Qwen2_5_VLForConditionalGeneration, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a folder that transformers and `segzero export` read; whole, or the earlier one stays."""
    temporary = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer_class: Any = PreTrainedTokenizerFast  # without types in transformers 5
    fast = tokenizer_class(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.save_pretrained(temporary)
    tokenizer.save(str(temporary / "tokenizer.json"))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)

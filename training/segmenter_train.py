"""Trains the segmenter: `train_segmenter(presets()["tabletop"], folder)`.

Everything that a run needs lies in its folder: rendered pictures (`cache/`), the last checkpoint (`checkpoint.pt`), the
log (`log.jsonl`, one line per 20 steps) and the averaged weights as a transformers folder (`hf/`). Kill it at any time
and call it again: it goes on from the last checkpoint, and the generators are seeded by step.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d
from tqdm import tqdm
from transformers import Sam2Model

from segzero_rt.errors import SegZeroError

from .segmenter_data import Picture, fill_cache, portrait_pictures, scene_pictures, shape_pictures
from .segmenter_loss import readout_loss, segmenter_loss
from .segmenter_model import SegmenterSize, build_segmenter, decode, encode, set_side
from .segmenter_prompts import PromptKind, draw_kind, draw_targets

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureSource:
    """One kind of training picture: how to render it, how many, and its share of a batch."""

    name: str
    render: Callable[[int], Callable[[int], Picture]]
    """Input side -> (seed -> picture)."""
    shards: int
    per_shard: int = 256
    share: float = 1.0
    zoom_share: float = 0.4
    """Probability of being zoomed into when drawn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """A stretch of the run at one input side: coarse pictures first, since they cost a fraction."""

    until_step: int
    side: int
    pictures_per_step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmenterPreset:
    """A whole training run. Presets are functions below; the command line only names one."""

    name: str
    size: SegmenterSize
    sources: tuple[PictureSource, ...]
    phases: tuple[Phase, ...] = (
        Phase(until_step=1_500, side=128, pictures_per_step=6),
        Phase(until_step=3_500, side=192, pictures_per_step=4),
        Phase(until_step=6_000, side=256, pictures_per_step=4),
        Phase(until_step=8_000, side=384, pictures_per_step=3),
    )
    decay_steps: int = 3_000
    """The learning rate falls to a hundredth, along a cosine, over the last so many steps."""
    warmup_steps: int = 150
    box_only_steps: int = 1_000
    """Until here every prompt is a box: what a box means has to be found before anything else is learnt."""
    prompts_per_picture: int = 8
    learning_rate: float = 3e-4
    """Of the decoder, which stops learning at thrice that."""
    encoder_rate_factor: float = 2.0
    weight_decay: float = 0.05
    ema_decay: float = 0.998
    seed: int = 1
    needs_weights: bool = False
    """The run makes sense only in a folder that has a checkpoint or `hf/`."""
    checkpoint_seconds: float = 180.0
    threads: int = 1

    def __post_init__(self) -> None:
        if self.phases[-1].side != self.size.side:
            raise ValueError(
                f"expected the last phase at the model's side {self.size.side}, got {self.phases[-1].side}"
            )

    @property
    def steps(self) -> int:
        """Length of the run."""
        return self.phases[-1].until_step

    def phase(self, step: int) -> Phase:
        """The phase that a step belongs to."""
        return next(phase for phase in self.phases if step < phase.until_step)


def presets() -> dict[str, SegmenterPreset]:
    """Name -> preset. `tabletop-more` is for a folder that has `hf/` already: more of the last phase.

    The shipped weights are `tabletop`, stopped early, and several runs of `tabletop-more`, all but the last at a side
    of 320; benchmarks/README.md tells what was found.
    """
    size = SegmenterSize(side=384, stage_windows=(8, 4, 12, 12))  # windows that divide 96, 48, 24 and 12 tokens
    shapes = PictureSource(name="shapes", render=shape_pictures, shards=38, share=0.3)
    portraits = PictureSource(name="portraits", render=portrait_pictures, shards=13, share=0.25)
    scenes = PictureSource(name="scenes", render=scene_pictures, shards=34, per_shard=128, share=0.45, zoom_share=0.2)
    return {
        "tabletop": SegmenterPreset(name="tabletop", size=size, sources=(shapes, portraits, scenes)),
        "tabletop-more": SegmenterPreset(
            name="tabletop-more",
            size=size,
            sources=(replace(shapes, share=0.25), replace(portraits, share=0.35), replace(scenes, share=0.4)),
            phases=(Phase(until_step=4_800, side=size.side, pictures_per_step=3),),
            warmup_steps=50,
            decay_steps=4_500,
            box_only_steps=0,
            needs_weights=True,
        ),
        "smoke": SegmenterPreset(
            name="smoke",
            size=SegmenterSize(
                side=64, stage_dims=(16, 32, 64, 96), stage_blocks=(1, 1, 2, 1), global_blocks=(3,), decoder_dim=32
            ),
            sources=(PictureSource(name="shapes", render=shape_pictures, shards=1, per_shard=8),),
            phases=(
                Phase(until_step=3, side=32, pictures_per_step=2),
                Phase(until_step=6, side=64, pictures_per_step=2),
            ),
            decay_steps=2,
            warmup_steps=2,
            box_only_steps=2,
            prompts_per_picture=2,
        ),
    }


class PictureCache:
    """Random pictures from the shards on disk, by the sources' shares. New shards are seen within a minute."""

    def __init__(self, folder: Path, sources: tuple[PictureSource, ...], side: int) -> None:
        self._sources = [(folder / f"{source.name}-{side}", source.share, source.zoom_share) for source in sources]
        self._shards: list[list[np.ndarray]] = []
        self._read_at = -math.inf

    def _refresh(self) -> None:
        if time.monotonic() - self._read_at > 60:
            self._shards = [
                [np.load(path, mmap_mode="r") for path in sorted(folder.glob("shard-*.npy"))]
                for folder, _, _ in self._sources
            ]
            self._read_at = time.monotonic()

    def draw(self, rng: np.random.Generator, side: int) -> Picture:
        """One picture at `side`, mirrored half of the time, sometimes zoomed into."""
        self._refresh()
        shares = np.array(
            [share if shards else 0.0 for (_, share, _), shards in zip(self._sources, self._shards, strict=True)]
        )
        source = rng.choice(len(shares), p=shares / shares.sum())
        shards = self._shards[source]
        shard = shards[rng.integers(len(shards))]
        packed = np.array(shard[rng.integers(len(shard))])
        if rng.random() < 0.5:
            packed = packed[:, ::-1]
        image, labels = np.ascontiguousarray(packed[..., :3]), np.ascontiguousarray(packed[..., 3:])
        if rng.random() < self._sources[source][2]:
            image, labels = _zoom(rng, image, labels)
        if side != image.shape[0]:
            # Enlarging, INTER_AREA would repeat pixels instead of interpolating.
            method = cv2.INTER_AREA if side < image.shape[0] else cv2.INTER_LINEAR
            image = cv2.resize(image, (side, side), interpolation=method)
            labels = cv2.resize(labels, (side, side), interpolation=cv2.INTER_NEAREST_EXACT)
        return image, labels[..., 0], labels[..., 1]


def _zoom(rng: np.random.Generator, image: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    side = image.shape[0]
    height, width = (rng.uniform(0.35, 1.0) * rng.uniform(0.8, 1.25, 2) * side).clip(0.3 * side, side).astype(int)
    top, left = rng.integers(0, side - height + 1), rng.integers(0, side - width + 1)
    window = (slice(top, top + height), slice(left, left + width))
    image = cv2.resize(image[window], (side, side), interpolation=cv2.INTER_LINEAR)
    # INTER_NEAREST would move the labels by half a pixel, which the masks would learn.
    return image, cv2.resize(labels[window], (side, side), interpolation=cv2.INTER_NEAREST_EXACT)


def normalise(images: np.ndarray) -> Tensor:
    """uint8 [B, S, S, 3] RGB -> float32 (B, 3, S, S) as the model takes it."""
    mean, std = np.float32(IMAGE_MEAN), np.float32(IMAGE_STD)
    return torch.from_numpy((images.astype(np.float32) / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Batch:
    """One step's pictures and prompts."""

    pixels: Tensor  # (B, 3, S, S)
    points_xy: Tensor  # (B, N, P, 2)
    labels: Tensor  # (B, N, P)
    truth: Tensor  # (B, N, S/2, S/2), soft
    instances: Tensor  # (B, S, S)
    kind: PromptKind


def _batch(preset: SegmenterPreset, cache: PictureCache, step: int) -> _Batch:
    rng = np.random.default_rng((preset.seed, step))
    kind = PromptKind(with_box=True, num_points=0) if step < preset.box_only_steps else draw_kind(rng)
    phase = preset.phase(step)
    pictures = [cache.draw(rng, phase.side) for _ in range(phase.pictures_per_step)]
    targets = [
        draw_targets(rng, instances, parts, kind, preset.prompts_per_picture) for _, instances, parts in pictures
    ]
    points = np.stack([[target.points_xy for target in row] for row in targets])
    labels = np.stack([[target.labels for target in row] for row in targets])
    masks = torch.from_numpy(np.stack([[target.mask for target in row] for row in targets])).float()
    pixels = normalise(np.stack([image for image, _, _ in pictures]))
    return _Batch(
        pixels=pixels,
        points_xy=torch.from_numpy(points),
        labels=torch.from_numpy(labels),
        truth=avg_pool2d(masks, 2),
        instances=torch.from_numpy(np.stack([instances for _, instances, _ in pictures])),
        kind=kind,
    )


def _learning_rate(preset: SegmenterPreset, step: int) -> float:
    rate = preset.learning_rate * min(1.0, (step + 1) / preset.warmup_steps)
    into_decay = step - (preset.steps - preset.decay_steps)
    if into_decay <= 0:
        return rate
    return rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, into_decay / preset.decay_steps))))


@dataclass(slots=True)
class _Run:
    """What a checkpoint holds."""

    model: Sam2Model
    readout: nn.Conv2d
    average: dict[str, Tensor]
    optimiser: torch.optim.AdamW
    step: int = 0

    def save(self, path: Path) -> None:
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "readout": self.readout.state_dict(),
            "average": self.average,
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
        }
        temporary = path.with_suffix(".partial")
        torch.save(state, temporary)
        temporary.replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.readout.load_state_dict(state["readout"])
        self.average = state["average"]
        self.optimiser.load_state_dict(state["optimiser"])
        self.step = state["step"]

    def start_from(self, model: Sam2Model) -> None:
        """Takes weights over, and nothing else of a run."""
        self.model.load_state_dict(model.state_dict())
        self.average = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _start(preset: SegmenterPreset) -> _Run:
    torch.manual_seed(preset.seed)
    model = build_segmenter(preset.size).train()
    readout = nn.Conv2d(preset.size.decoder_dim // 8, 2, kernel_size=1)
    encoder = [*model.vision_encoder.parameters(), *readout.parameters()]
    inside = {id(parameter) for parameter in encoder}
    decoder = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    groups = [
        {
            "params": [parameter for parameter in parameters if (parameter.ndim >= 2) == is_matrix],
            "weight_decay": preset.weight_decay if is_matrix else 0.0,
            "rate_factor": factor,
        }
        for parameters, factor in ((encoder, preset.encoder_rate_factor), (decoder, 1.0))
        for is_matrix in (True, False)
    ]
    optimiser = torch.optim.AdamW(groups, lr=preset.learning_rate, betas=(0.9, 0.98), fused=True)
    average = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return _Run(model=model, readout=readout, average=average, optimiser=optimiser)


@torch.no_grad()
def _update_average(run: _Run, decay: float) -> None:
    decay = min(decay, (1 + run.step) / (10 + run.step))
    for name, tensor in run.model.state_dict().items():
        if tensor.dtype.is_floating_point:
            run.average[name].lerp_(tensor, 1 - decay)


def save_averaged(run: _Run, size: SegmenterSize, folder: Path) -> None:
    """Writes the averaged weights as a transformers folder (config.json, model.safetensors), whole or not at all."""
    model = Sam2Model(size.config())
    model.load_state_dict(run.average)
    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)


def train_segmenter(preset: SegmenterPreset, out_dir: str | Path, resume: bool = True) -> Path:
    """Trains to the preset's last step and returns the transformers folder with the averaged weights.

    Args:
        preset: see `presets()`.
        out_dir: the run's folder; pictures are rendered into `out_dir/cache` first, where they are missing.
        resume: go on from `out_dir/checkpoint.pt` where there is one; else start at step 0 with the weights in
            `out_dir/hf` where there are some (of any input side). False starts anew (the pictures stay).

    Raises:
        SegZeroError: the preset needs weights to go on from, and there are none.
    """
    torch.set_num_threads(preset.threads)
    out_dir = Path(out_dir)
    if preset.needs_weights and not any((out_dir / name).exists() for name in ("checkpoint.pt", "hf/config.json")):
        raise SegZeroError(
            f"expected {out_dir}/hf to hold a segmenter for preset {preset.name} to go on from, got none; copy one, "
            "such as training/checkpoints/tabletop/segmenter"
        )
    for source in preset.sources:
        folder = out_dir / "cache" / f"{source.name}-{preset.size.side}"
        fill_cache(
            folder, source.render(preset.size.side), shards=source.shards, per_shard=source.per_shard, seed=preset.seed
        )
    run = _start(preset)
    checkpoint = out_dir / "checkpoint.pt"
    if resume and checkpoint.exists():
        run.load(checkpoint)
    elif resume and (out_dir / "hf").exists():
        run.start_from(Sam2Model.from_pretrained(out_dir / "hf", local_files_only=True))
    _loop(preset, run, out_dir)
    return out_dir / "hf"


def _loop(preset: SegmenterPreset, run: _Run, out_dir: Path) -> None:
    cache = PictureCache(out_dir / "cache", preset.sources, preset.size.side)
    saved_at = time.monotonic()
    stopped = threading.Event()
    if threading.current_thread() is threading.main_thread():  # a polite kill loses nothing
        signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    window: list[tuple[float, float, float, float]] = []
    with (out_dir / "log.jsonl").open("a") as log:
        log.write(json.dumps({"preset": preset.name, "from_step": run.step, "size": asdict(preset.size)}) + "\n")
        bar = tqdm(total=preset.steps, initial=run.step, desc=preset.name, mininterval=10)
        while run.step < preset.steps and not stopped.is_set():
            window.append(_step(preset, run, cache))
            bar.update()
            if run.step % 20 == 0:
                loss, single, chosen, best = np.mean(window, 0)
                window.clear()
                line = {"step": run.step, "loss": loss, "single_iou": single, "chosen_iou": chosen, "best_iou": best}
                log.write(json.dumps({key: round(float(value), 4) for key, value in line.items()}) + "\n")
                log.flush()
                bar.set_postfix(loss=f"{loss:.3f}", iou=f"{chosen:.3f}")
            is_last = run.step == preset.steps or stopped.is_set()
            if is_last or time.monotonic() - saved_at > preset.checkpoint_seconds:
                run.save(out_dir / "checkpoint.pt")
                save_averaged(run, preset.size, out_dir / "hf")
                saved_at = time.monotonic()
        bar.close()


def _step(preset: SegmenterPreset, run: _Run, cache: PictureCache) -> tuple[float, float, float, float]:
    """One update; loss and the three IoUs of `SegmenterLoss`."""
    torch.manual_seed(preset.seed * 1_000_003 + run.step)  # a run that goes on draws what the whole one would have
    batch = _batch(preset, cache, run.step)
    set_side(run.model, batch.pixels.shape[-1])
    for group in run.optimiser.param_groups:
        group["lr"] = group["rate_factor"] * _learning_rate(preset, run.step)
    with torch.autocast("cpu", torch.bfloat16):
        features = encode(run.model, batch.pixels)
        predictions = decode(run.model, features, batch.points_xy, batch.labels)
        readout = run.readout(features.fine)
    loss = segmenter_loss(predictions, batch.truth, is_clear=batch.kind.with_box)
    total = loss.total + readout_loss(readout.float(), batch.instances)
    run.optimiser.zero_grad(set_to_none=True)
    total.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimiser.step()
    run.step += 1
    _update_average(run, preset.ema_decay)
    return total.item(), loss.single_iou, loss.chosen_iou, loss.best_iou

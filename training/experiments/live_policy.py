"""Greedy answers of a policy that is in memory, many questions at once, each picture looked at once a batch.

    pictures, texts ─► LivePolicy.answer ─► replies

It computes what the runtime computes, from the same weights, in PyTorch: for measuring while and after something is
trained, without an export. `tests/test_experiment_measures.py` holds its replies to the trainer's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from segzero_rt.answer_format import FORMATS
from segzero_rt.image import load_image
from segzero_rt.preprocess import Preprocessor

from ..grpo_model import load_policy
from ..grpo_presets import GrpoPreset, Precision, tabletop
from ..grpo_processor import IMAGE_TOKEN, PictureProcessor, load_processor
from ..picture_memory import PictureMemory, TowerMemories
from ..policy_model import IMAGE_MEAN, IMAGE_STD, MERGE, PATCH
from ..rollout import Sampling, sample_replies
from ..shared_prompt import Prompts, SharedPromptPolicy

ASKED_AT_ONCE = 32
"""Questions of one batch."""

Picture = Path | NDArray[np.uint8]
"""A picture file of any size, or uint8 [H, W, 3] in the size that the policy sees."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """One user turn."""

    text: str
    """All of it: a segmentation question in the words of its answer format, or a plain question."""
    picture: Picture


class LivePolicy:
    """A policy with its processor.

    Args:
        model: `Qwen2_5_VLForConditionalGeneration`; its mode and gradients are left as they are.
        processor: of the same policy.
        preset: says the picture's size, the answer format and the longest reply.
        memory: keeps visual tokens, where the vision tower is frozen.
    """

    def __init__(
        self, model: Any, processor: PictureProcessor, preset: GrpoPreset, *, memory: PictureMemory | None = None
    ) -> None:
        self.model, self.processor, self.preset, self._memory = model, processor, preset, memory
        self.answer_format = FORMATS[preset.answer_format]
        self.tokenizer: Any = processor.tokenizer
        self._preprocessor = Preprocessor(
            input_size_hw=preset.input_size_hw, patch_size=PATCH, merge_size=MERGE, image_mean=IMAGE_MEAN,
            image_std=IMAGE_STD,
        )  # fmt: skip

    @classmethod
    def load(
        cls, folder: str | Path, preset: GrpoPreset | None = None, *, memories: TowerMemories | None = None
    ) -> LivePolicy:
        """Loads a policy folder in float32, as the runtime computes.

        Args:
            memories: of earlier policies that are asked about the same pictures; this one is not to be trained then.

        Raises:
            SegZeroError: the folder holds no policy.
        """
        preset = tabletop() if preset is None else preset
        whole = replace(preset, precision=Precision.FLOAT32, lora=None, freeze_vision=False)
        model, processor = load_policy(whole, str(folder)), load_processor(str(folder))
        memory = None if memories is None else memories.of(model.model.visual)
        return cls(model, processor, preset, memory=memory)

    def answer(
        self, asked: Sequence[Asked], *, reply_start: str = "", told: str = "", num_at_once: int = ASKED_AT_ONCE
    ) -> list[str]:
        """Replies in order, each with `reply_start` in front.

        Args:
            reply_start: what every reply begins with: given, not said by the policy.
            told: name of the progress bar; empty shows none.
            num_at_once: questions of one batch.
        """
        replies: list[str] = []
        with tqdm(total=len(asked), desc=told, unit="question", disable=not told, leave=False) as progress:
            for first in range(0, len(asked), num_at_once):
                batch = asked[first : first + num_at_once]
                replies += self._answer_batch(batch, reply_start)
                progress.update(len(batch))
        return replies

    def prompts(self, asked: Sequence[Asked], *, reply_start: str = "") -> Prompts:
        """The prompts of a batch; pictures that occur several times in it stand there once."""
        pixels, grids, numbers = self._pictures(asked)
        start = self.text_ids(reply_start)
        tokens = [
            (*self._prompt_ids(one.text, self._visual_tokens(grids[number])), *start)
            for one, number in zip(asked, numbers, strict=True)
        ]
        return Prompts(
            token_ids=tuple(tokens), pixel_values=pixels, image_grid_thw=grids,
            pictures=tuple((number,) for number in numbers),
        )  # fmt: skip

    def text_ids(self, text: str) -> list[int]:
        """Tokens of a reply or of what it begins with."""
        return list(self.tokenizer(text)["input_ids"]) if text else []

    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a reply."""
        return (int(self.tokenizer.eos_token_id),)

    def _answer_batch(self, asked: Sequence[Asked], reply_start: str) -> list[str]:
        sampling = Sampling(
            max_new_tokens=self.preset.max_completion_tokens, temperature=0.0,
            never=(int(self.model.config.image_token_id),),
        )  # fmt: skip
        training = self.model.training
        self.model.eval()
        prompts = self.prompts(asked, reply_start=reply_start)
        replies = sample_replies(SharedPromptPolicy(self.model, self._memory), prompts, sampling, self.end_ids())
        self.model.train(training)
        texts = self.tokenizer.batch_decode([list(ids) for ids in replies.token_ids], skip_special_tokens=True)
        return [reply_start + text for text in texts]

    def _pictures(self, asked: Sequence[Asked]) -> tuple[Tensor, Tensor, list[int]]:
        """Pixels and grids of the distinct pictures, and which one each question is about."""
        places: dict[Path | int, int] = {}
        images: list[Image.Image] = []
        numbers = []
        for one in asked:
            key = one.picture if isinstance(one.picture, Path) else id(one.picture)
            if key not in places:
                places[key] = len(images)
                images.append(self._image(one.picture))
            numbers.append(places[key])
        seen = self.processor.image_processor(images, return_tensors="pt")
        return torch.as_tensor(seen["pixel_values"]), torch.as_tensor(seen["image_grid_thw"]), numbers

    def _image(self, picture: Picture) -> Image.Image:
        if isinstance(picture, Path):
            return Image.fromarray(np.ascontiguousarray(self._preprocessor.resize(load_image(picture))))
        if picture.shape != (*self.preset.input_size_hw, 3):
            raise ValueError(f"expected pixels [{self.preset.input_size_hw}, 3], got {picture.shape}")
        return Image.fromarray(picture)

    def _visual_tokens(self, grid_thw: Tensor) -> int:
        return int(grid_thw.prod()) // MERGE**2

    def _prompt_ids(self, text: str, visual_tokens: int) -> list[int]:
        turns: Any = [
            {"role": "system", "content": [{"type": "text", "text": self.answer_format.system_prompt}]},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]},
        ]
        written = self.processor.apply_chat_template(turns, add_generation_prompt=True)
        placeholder = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        ids = self.tokenizer(written)["input_ids"]
        at = ids.index(placeholder)
        return [*ids[:at], *[placeholder] * visual_tokens, *ids[at + 1 :]]

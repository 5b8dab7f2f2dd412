"""Training rows as the data set that TRL's trainer reads, checked against the policy before anything is trained.

A row becomes one conversation: the family's system text, then picture and question as the runtime asks. Pictures stay
files until they are needed; each is resized by the runtime's function to the size that the policy sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image

from segzero_rt.answer_format import AnswerFormat
from segzero_rt.errors import DatasetError
from segzero_rt.image import load_image
from segzero_rt.preprocess import Preprocessor

from .grpo_presets import GrpoPreset
from .grpo_processor import IMAGE_TOKEN, PictureProcessor
from .policy_model import IMAGE_MEAN, IMAGE_STD, MERGE, PATCH
from .rows import IMAGE, IMAGE_PATH, PROMPT, TrainingRow

QUESTION = "question"
_CACHED_PICTURES = 64
"""Pictures kept in memory: a prompt is drawn once for each of its samples."""


def training_dataset(
    rows: Sequence[TrainingRow], answer_format: AnswerFormat, input_size_hw: tuple[int, int]
) -> Dataset:
    """The rows as TRL's columns: `rows.COLUMNS`, the question and the picture's file besides."""
    columns = [
        {**row.to_columns(), PROMPT: conversation(row.question, answer_format), QUESTION: row.question} for row in rows
    ]
    for entry in columns:
        entry[IMAGE_PATH] = entry.pop(IMAGE)
    dataset = Dataset.from_list(columns)
    picture = _picture_reader(input_size_hw)

    def with_pictures(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {**batch, IMAGE: [picture(path) for path in batch[IMAGE_PATH]]}

    return dataset.with_transform(with_pictures)


def conversation(question: str, answer_format: AnswerFormat) -> list[dict[str, str]]:
    """System and user turn; TRL puts the picture before the user's text."""
    return [
        {"role": "system", "content": answer_format.system_prompt},
        {"role": "user", "content": answer_format.user_prompt(question)},
    ]


def check_prompts(
    rows: Sequence[TrainingRow], processor: PictureProcessor, answer_format: AnswerFormat, preset: GrpoPreset
) -> None:
    """Refuse prompts that the policy could not be asked, or that would say something else than at run time.

    A control token in a question is text to the runtime; transformers' tokenizers would let it end the turn.

    Raises:
        DatasetError: naming the first such row.
    """
    tokenizer = processor.tokenizer
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    control = sorted({IMAGE_TOKEN, *tokenizer.all_special_tokens, *added})
    for row in rows:
        if row.input_size_hw != preset.input_size_hw:
            raise DatasetError(
                f"row {row.row_id!r:.60}: expected input_size_hw {preset.input_size_hw}, which the preset trains with, "
                f"got {row.input_size_hw}; prepare the rows again"
            )
        found = [token for token in control if token in row.question]
        if found:
            raise DatasetError(f"row {row.row_id!r:.60}: the question holds the control token {found[0]}; rephrase it")
        turns = processor.apply_chat_template(as_parts(row.question, answer_format), add_generation_prompt=True)
        length = len(tokenizer(turns)["input_ids"]) + preset.visual_tokens - 1
        if length > preset.max_prompt_tokens:
            raise DatasetError(
                f"row {row.row_id!r:.60}: expected a prompt of at most {preset.max_prompt_tokens} tokens, the question "
                f"makes it {length}; shorten it"
            )


def as_parts(question: str, answer_format: AnswerFormat) -> list[dict[str, Any]]:
    """`conversation` as TRL hands it to the processor, without the picture itself."""
    system, user = conversation(question, answer_format)
    return [
        {"role": system["role"], "content": [{"type": "text", "text": system["content"]}]},
        {"role": user["role"], "content": [{"type": "image"}, {"type": "text", "text": user["content"]}]},
    ]


def _picture_reader(input_size_hw: tuple[int, int]) -> Any:
    preprocessor = Preprocessor(
        input_size_hw=input_size_hw, patch_size=PATCH, merge_size=MERGE, image_mean=IMAGE_MEAN, image_std=IMAGE_STD
    )

    @lru_cache(maxsize=_CACHED_PICTURES)
    def read(path: str) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(preprocessor.resize(load_image(path))))

    return read

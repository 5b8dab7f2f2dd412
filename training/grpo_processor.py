"""The bridge from TRL's conversations to the runtime's prompts: same tokens, same pixels, for any Qwen2.5-VL folder.

TRL gives messages and pictures to a transformers processor. This one needs no torchvision, which the processor that
`AutoProcessor` makes wants for videos, and it does no resizing: pictures come in the policy's size, resized by the
runtime's own function, since resampling is part of the model.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2_5_VLConfig, Qwen2_5_VLProcessor
from transformers.processing_utils import ProcessorMixin

from segzero_rt.errors import SegZeroError

from .distinct_pictures import DistinctPictureProcessor
from .policy_model import IMAGE_MEAN, IMAGE_STD

IMAGE_TOKEN = "<|image_pad|>"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% for part in message['content'] -%}
{%- if part['type'] == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>{%- else -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""
"""Qwen2.5-VL's turns as the runtime writes them (`segzero_rt.chat`); every message's content is a list of parts."""


class PictureProcessor(Qwen2_5_VLProcessor):
    """transformers' processor without its video half."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        self.image_token, self.video_token = IMAGE_TOKEN, None
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), None
        # Not the parent's own initialiser: it insists on a video processor.
        ProcessorMixin.__init__(  # type: ignore[no-untyped-call]
            self, image_processor, tokenizer, chat_template=chat_template
        )


def load_processor(policy: str) -> PictureProcessor:
    """The processor of a policy's folder (or hub name), padding and cutting on the left as TRL samples.

    Raises:
        SegZeroError: there is no policy, or its tokenizer lacks a token that the turns need.
    """
    if not (Path(policy) / "config.json").is_file() and (Path(policy).exists() or not _HUB_NAME.fullmatch(policy)):
        raise SegZeroError(
            f"expected a Qwen2.5-VL policy in {policy}, found no folder with a config.json; give --policy a folder "
            "(seen from where the command runs) or a hub name"
        )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            policy, padding_side="left", truncation_side="left"
        )
        vision: Any = Qwen2_5_VLConfig.from_pretrained(policy).vision_config
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise SegZeroError(f"expected a Qwen2.5-VL policy in {policy}, could not read one: {reason}") from error
    for token in (IMAGE_TOKEN, "<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>"):
        if token not in tokenizer.get_vocab():
            raise SegZeroError(f"expected the token {token} in the tokenizer of {policy}, found none")
    image_processor = DistinctPictureProcessor(
        do_resize=False,
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
    )
    return PictureProcessor(image_processor, tokenizer, chat_template=CHAT_TEMPLATE)

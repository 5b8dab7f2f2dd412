"""The baseline: the authors' pipeline on transformers, with the same weights as the bundle.

As Seg-Zero's and VisionReasoner's own scripts do it, one step after the other: question into the prompt, `generate`
(greedy, with its cache), regular expression and `json.loads`, `set_image` on the original picture, one `predict` per
object with its box and point, three masks, the best score wins. `Sam2Processor` wants torchvision, so the few lines
that it would do (stretch, normalise, scale prompts, enlarge masks) stand here.

Only what the pipeline needs is imported: `transformers_run.py` is timed as a whole process.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Sam2Model,
)

from segzero_rt.answer_format import FORMATS

_RESAMPLERS = {"pillow_bilinear": Image.Resampling.BILINEAR, "pillow_bicubic": Image.Resampling.BICUBIC}
_CHAT = (
    "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n<|vision_start|>{image}<|vision_end|>{user}<|im_end|>\n"
    "<|im_start|>assistant\n"
)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What one question gave."""

    text: str
    token_ids: list[int]
    """Without the one that ended the reply."""
    boxes_xyxy: list[list[float]]
    points_xy: list[list[float]]
    masks: np.ndarray
    """bool [N, H, W]."""
    scores: list[float]
    timings_ms: dict[str, float]


class TransformersPipeline:
    """Loads both models; call it with a picture and a question."""

    def __init__(
        self, bundle: Path, policy: Path, segmenter: Path, *, round_weights: bool, compiled: bool = False
    ) -> None:
        """Sizes, constants and the answer format come from the bundle's manifest, weights from two checkpoint folders.

        Args:
            round_weights: round to float16 and back first, as the bundle's files store them, so that both compute with
                the same numbers.
            compiled: the image encoder, the vision tower and the decoder by `torch.compile`, which works in the first
                questions. The cache grows as in eager mode: a static one was slower on a CPU.
        """
        self.manifest: dict[str, Any] = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
        settings = self.manifest["policy"]
        self.format = FORMATS[self.manifest["answer_format"]]
        self.policy = Qwen2_5_VLForConditionalGeneration.from_pretrained(policy, dtype=torch.float32).eval()
        self.segmenter = Sam2Model.from_pretrained(segmenter, dtype=torch.float32).eval()
        if round_weights:
            for parameter in [*self.policy.parameters(), *self.segmenter.parameters()]:
                parameter.data = parameter.data.half().float()
        if compiled:
            self.segmenter.vision_encoder.forward = torch.compile(self.segmenter.vision_encoder.forward, dynamic=False)
            for part in (self.policy.model.visual, self.policy.model.language_model):
                part.forward = torch.compile(part.forward)
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(policy / "tokenizer.json"))
        self.processor = Qwen2VLImageProcessorPil(
            do_resize=False,  # the picture is stretched to the policy's size before, as the authors do
            patch_size=settings["patch_size"],
            temporal_patch_size=settings["temporal_patch_size"],
            merge_size=settings["merge_size"],
            image_mean=list(settings["image_mean"]),
            image_std=list(settings["image_std"]),
        )

    @torch.inference_mode()
    def __call__(self, image_rgb: np.ndarray, question: str, *, max_new_tokens: int | None = None) -> Reply:
        """Answers a question about a uint8 [H, W, 3] picture."""
        timings_ms: dict[str, float] = {}
        start = time.perf_counter()
        picture = Image.fromarray(image_rgb)
        inputs = self._inputs(picture, question)
        start = _lap(timings_ms, "preprocess", start)
        token_ids = self._generate(inputs, max_new_tokens or self.manifest["policy"]["max_new_tokens"])
        start = _lap(timings_ms, "generate", start)
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        boxes, points = self._parse(text, image_rgb.shape[:2])
        start = _lap(timings_ms, "parse", start)
        embeddings = self._set_image(picture)
        start = _lap(timings_ms, "set_image", start)
        found = [self._predict(embeddings, *one, image_rgb.shape[:2]) for one in zip(boxes, points, strict=True)]
        _lap(timings_ms, "predict", start)
        masks = np.stack([mask for mask, _ in found]) if found else np.zeros((0, *image_rgb.shape[:2]), bool)
        return Reply(
            text=text,
            token_ids=token_ids,
            boxes_xyxy=boxes,
            points_xy=points,
            masks=masks,
            scores=[score for _, score in found],
            timings_ms=timings_ms,
        )

    @torch.inference_mode()
    def segment(self, image_rgb: np.ndarray, box: list[float], point: list[float]) -> tuple[np.ndarray, float]:
        """Mask bool [H, W] and score of one prompt in pixels of the picture."""
        return self._predict(self._set_image(Image.fromarray(image_rgb)), box, point, image_rgb.shape[:2])

    def _inputs(self, picture: Image.Image, question: str) -> dict[str, torch.Tensor]:
        settings = self.manifest["policy"]
        height, width = settings["input_size_hw"]
        resized = picture.resize((width, height), _RESAMPLERS[settings["resampler"]])
        pixels = self.processor(images=[resized], return_tensors="pt")
        num_tokens = int(pixels["image_grid_thw"].prod()) // settings["merge_size"] ** 2
        prompt = _CHAT.format(
            system=self.format.system_prompt,
            image="<|image_pad|>" * num_tokens,
            user=self.format.user_prompt(question),
        )
        input_ids = torch.tensor([self.tokenizer(prompt, add_special_tokens=False)["input_ids"]])
        return {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            # Newer transformers tells pictures from text by this mask rather than by the token.
            "mm_token_type_ids": (input_ids == settings["image_token_id"]).int(),
            "pixel_values": pixels["pixel_values"],
            "image_grid_thw": pixels["image_grid_thw"],
        }

    def _generate(self, inputs: dict[str, torch.Tensor], max_new_tokens: int) -> list[int]:
        ends = list(self.manifest["policy"]["eos_token_ids"])
        output = self.policy.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=ends,
            pad_token_id=ends[0],
        )
        token_ids: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
        return token_ids[:-1] if token_ids and token_ids[-1] in ends else token_ids

    def _parse(self, text: str, size_hw: tuple[int, ...]) -> tuple[list[list[float]], list[list[float]]]:
        """As `infer_multi_object.py` of Seg-Zero; what does not parse finds nothing."""
        match = re.search(r"<answer>\s*(.*?)\s*</answer>", text, re.DOTALL)
        height, width = self.manifest["policy"]["input_size_hw"]
        x_factor, y_factor = size_hw[1] / width, size_hw[0] / height
        factors = (x_factor, y_factor, x_factor, y_factor)
        try:
            found = json.loads(match.group(1)) if match else []
            boxes = [[float(int(v * f + 0.5)) for v, f in zip(one["bbox_2d"], factors, strict=True)] for one in found]
            points = [
                [float(int(v * f + 0.5)) for v, f in zip(one["point_2d"], factors[:2], strict=True)] for one in found
            ]
        except (ValueError, KeyError, TypeError):
            return [], []
        return boxes, points

    def _set_image(self, picture: Image.Image) -> list[torch.Tensor]:
        settings = self.manifest["segmenter"]
        height, width = settings["input_size_hw"]
        resized = np.asarray(picture.resize((width, height), _RESAMPLERS[settings["resampler"]]), dtype=np.float32)
        pixels = (resized / 255 - np.float32(settings["image_mean"])) / np.float32(settings["image_std"])
        return list(self.segmenter.get_image_embeddings(torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()))

    def _predict(
        self, embeddings: list[torch.Tensor], box: list[float], point: list[float], size_hw: tuple[int, ...]
    ) -> tuple[np.ndarray, float]:
        height, width = self.manifest["segmenter"]["input_size_hw"]
        x_factor, y_factor = width / size_hw[1], height / size_hw[0]
        output = self.segmenter(
            image_embeddings=embeddings,
            input_boxes=torch.tensor([[[box[0] * x_factor, box[1] * y_factor, box[2] * x_factor, box[3] * y_factor]]]),
            input_points=torch.tensor([[[[point[0] * x_factor, point[1] * y_factor]]]]),
            input_labels=torch.ones(1, 1, 1, dtype=torch.int64),
            multimask_output=True,
        )
        scores = output.iou_scores[0, 0]
        best = int(scores.argmax())
        logits = output.pred_masks[:, 0, best : best + 1]
        enlarged = torch.nn.functional.interpolate(logits, size=tuple(size_hw), mode="bilinear", align_corners=False)
        return (enlarged[0, 0] > 0).numpy(), float(scores[best])


def _lap(timings_ms: dict[str, float], name: str, start: float) -> float:
    now = time.perf_counter()
    timings_ms[name] = (now - start) * 1e3
    return now

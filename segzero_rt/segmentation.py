"""`Segmentation`: what a run gives back, as arrays and as the JSON document of the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segzero_rt.answer import Answer, AnswerStatus


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Segmentation:
    """Instance masks with the answer that asked for them. Nothing found is arrays of length 0, never None."""

    masks: NDArray[np.bool_]
    """bool [N, H, W], in the source picture's size; instance i belongs to `answer.prompts[i]`."""
    scores: NDArray[np.float32]
    """float32 [N]: the segmenter's own estimate of each mask's IoU, mostly in [0, 1]."""
    boxes_xyxy: NDArray[np.float32]
    """float32 [N, 4]: the answer's boxes, in source pixels."""
    answer: Answer
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    """Milliseconds per stage. The policy and `mask_encode` run side by side, so the stages may add up to more than
    `total`."""
    decode_counts: Mapping[str, int] = field(default_factory=dict)
    """`tokens` of the reply, `runs` of the decoder that they took, tokens `drafted` and of them `accepted`."""

    def __post_init__(self) -> None:
        count = len(self.answer.prompts)
        if self.masks.dtype != np.bool_ or self.masks.ndim != 3 or len(self.masks) != count:
            raise ValueError(f"expected {count} masks, bool [N, H, W], got {self.masks.dtype} {self.masks.shape}")
        if self.scores.shape != (count,) or self.boxes_xyxy.shape != (count, 4):
            raise ValueError(f"expected {count} scores and boxes, got {self.scores.shape} and {self.boxes_xyxy.shape}")

    @classmethod
    def empty(
        cls, answer: Answer, size_hw: tuple[int, int], timings_ms: Mapping[str, float] | None = None
    ) -> Segmentation:
        """A result without objects for a picture of `size_hw`."""
        return cls(
            masks=np.zeros((0, *size_hw), np.bool_),
            scores=np.zeros(0, np.float32),
            boxes_xyxy=np.zeros((0, 4), np.float32),
            answer=answer,
            timings_ms=timings_ms or {},
        )

    @property
    def status(self) -> AnswerStatus:
        """How it went."""
        return self.answer.status

    @property
    def thinking(self) -> str:
        """What the policy wrote before its answer."""
        return self.answer.thinking

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width of the source picture."""
        return self.masks.shape[1], self.masks.shape[2]

    @property
    def union(self) -> NDArray[np.bool_]:
        """bool [H, W]: all instances together."""
        return np.asarray(self.masks.any(axis=0), np.bool_)

    def __len__(self) -> int:
        return len(self.masks)

    def to_json(self) -> dict[str, Any]:
        """The document that `segzero run --json` prints; masks are compressed COCO RLE."""
        from segzero_rt.mask import encode_rle

        objects = [
            {
                "box_xyxy": [float(value) for value in box],
                "points_xy": [[float(value) for value in point] for point in prompt.points_xy],
                "score": round(float(score), 4),
                "mask_rle": encode_rle(mask),
            }
            for box, prompt, score, mask in zip(
                self.boxes_xyxy, self.answer.prompts, self.scores, self.masks, strict=True
            )
        ]
        return {
            "status": self.answer.status.value,
            "thinking": self.answer.thinking,
            "objects": objects,
            "size_hw": list(self.size_hw),
            "timings_ms": {stage: round(float(value), 3) for stage, value in self.timings_ms.items()},
            "decode_counts": dict(self.decode_counts),
        }

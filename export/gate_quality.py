"""What a bundle loses on labelled questions against its checkpoints in PyTorch float32: the gate of design choice 4.

Both answer every question freely and greedily; gIoU of one is subtracted from that of the other, question by question.
The other gates compare numbers on a few pictures. This one says what rounded or quantised weights cost a user.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from segzero_rt.answer import Answer
from segzero_rt.answer_parser import parse_answer
from segzero_rt.bundle import Bundle
from segzero_rt.commands.progress import Progress
from segzero_rt.dataset import ANNOTATIONS_NAME, Sample, read_dataset
from segzero_rt.errors import ExportError, QuestionError
from segzero_rt.evaluation import Predict, Record, evaluate, giou_loss, summarize
from segzero_rt.manifest import GATE_NOT_RUN, GATE_PASSED
from segzero_rt.pipeline import SegZero
from segzero_rt.segmentation import Segmentation
from segzero_rt.segmenter import ImageEncoder, MaskDecoder

from .reference import TorchImageEncoder, TorchMaskDecoder, TorchPolicy

if TYPE_CHECKING:
    from segzero_rt.graph import Graph

MIN_QUESTIONS = 200
MAX_LOSS, MAX_LOSS_QUANTIZED = 0.005, 0.02
"""Of gIoU, for weights of 16 bits and more, and for fewer."""

NOT_RUN: dict[str, Any] = {"status": GATE_NOT_RUN}
"""The record where no labelled questions were given."""
PYTORCH, SAME = "pytorch float32", "the bundle's own"
"""What stood against a part of the bundle; a part that was taken from another bundle has no checkpoint here."""


def max_loss(storage: str) -> float:
    """Largest mean loss of gIoU for weights stored as "float32", "float16", "int8", ..."""
    return MAX_LOSS if storage in ("float32", "float16", "bfloat16") else MAX_LOSS_QUANTIZED


def read_gate_dataset(folder: Path) -> list[Sample]:
    """Questions for `gate_quality`.

    Raises:
        DatasetError: not a dataset folder.
        ExportError: fewer than `MIN_QUESTIONS` questions.
    """
    samples = read_dataset(folder)
    if len(samples) < MIN_QUESTIONS:
        raise ExportError(
            f"--gate-dataset {folder}: expected at least {MIN_QUESTIONS} questions, got {len(samples)}; "
            "`segzero scenes --split validation --count 300` writes so many"
        )
    return samples


def dataset_card(folder: Path) -> dict[str, str]:
    """Name of a dataset folder and the hash of its annotations."""
    digest = hashlib.sha256((folder / ANNOTATIONS_NAME).read_bytes()).hexdigest()
    return {"name": folder.resolve().name, "annotations_sha256": digest}


def gate_quality(
    bundle: Bundle,
    samples: Sequence[Sample],
    *,
    policy_folder: Path | None,
    segmenter_folder: Path | None,
    limit: float,
    adapter: Path | None = None,
) -> dict[str, Any]:
    """Asks the bundle and its checkpoints everything.

    Args:
        bundle: written and opened.
        samples: labelled questions; those on one picture best stand together.
        policy_folder: the checkpoint in transformers' layout; None measures with the bundle's own answers.
        segmenter_folder: likewise of a `Sam2Model`.
        limit: largest mean loss of gIoU, see `max_loss`.
        adapter: of the policy's checkpoint, in PEFT's layout.

    Returns:
        figures for the manifest.

    Raises:
        ExportError: the loss is beyond the limit.
        DatasetError: a picture cannot be decoded.
    """
    pipeline = SegZero.load(bundle, backend="cpu")
    reference = _Reference(pipeline, policy_folder, segmenter_folder, adapter)
    ours: list[Record] = []
    theirs: list[Record] = []
    same = 0
    with Progress(len(samples), "quality gate") as progress:
        for sample in samples:
            record, answer = _score(sample, lambda one, image_rgb: pipeline(image_rgb, one.text))
            expected_record, expected = _score(sample, partial(reference, known=answer))
            ours.append(record)
            theirs.append(expected_record)
            same += _text(answer) == _text(expected)
            progress.step(f"gIoU {_mean_iou(ours):.3f}, PyTorch {_mean_iou(theirs):.3f}")
    loss, interval = giou_loss(ours, theirs)
    figures = {
        "status": GATE_PASSED,
        "questions": len(ours),
        "pictures": len({record.image for record in ours}),
        "giou": _mean_iou(ours),
        "reference_giou": _mean_iou(theirs),
        "giou_loss": loss,
        "giou_loss_interval_95": list(interval),
        "parse_rate": summarize(ours)["parse_rate"],
        "same_replies": same / len(ours),
        "reference": {
            "policy": PYTORCH if policy_folder else SAME,
            "segmenter": PYTORCH if segmenter_folder else SAME,
        },
        "limit": limit,
    }
    if not loss <= limit:
        raise ExportError(
            f"expected the bundle to lose at most {limit} gIoU against PyTorch, got {loss:.4f} "
            f"({interval[0]:.4f} to {interval[1]:.4f}) over {len(ours)} questions; nothing was written. "
            "Export with another --storage"
        )
    return figures


class _Reference:
    """The checkpoints as `SegZero` would ask them; a part without a checkpoint is the pipeline's own."""

    def __init__(
        self, pipeline: SegZero, policy_folder: Path | None, segmenter_folder: Path | None, adapter: Path | None
    ) -> None:
        self._pipeline = pipeline
        self._policy = TorchPolicy(policy_folder, pipeline.policy, adapter=adapter) if policy_folder else None
        self._encoder, self._decoder = pipeline.encoder, pipeline.decoder
        if segmenter_folder:
            from .segmenter_checkpoint import load_checkpoint

            model = load_checkpoint(segmenter_folder)
            manifest = pipeline.bundle.manifest.segmenter
            self._encoder = ImageEncoder(cast("Graph", TorchImageEncoder(model)), manifest)
            self._decoder = MaskDecoder(cast("Graph", TorchMaskDecoder(model)), manifest)

    def __call__(self, sample: Sample, image_rgb: NDArray[np.uint8], *, known: Segmentation | None) -> Segmentation:
        """Answers a sample's question; `known` is what the bundle answered, None where it could not."""
        answer = self._answer(image_rgb, sample.text, known)
        if not answer.prompts:
            return Segmentation.empty(answer, (image_rgb.shape[0], image_rgb.shape[1]))
        predicted = self._decoder(self._encoder(image_rgb), answer.prompts)
        return Segmentation(
            masks=predicted.masks,
            scores=predicted.scores,
            boxes_xyxy=np.array([prompt.box_xyxy for prompt in answer.prompts], np.float32),
            answer=answer,
        )

    def _answer(self, image_rgb: NDArray[np.uint8], question: str, known: Segmentation | None) -> Answer:
        if self._policy is None:
            if known is None:
                raise QuestionError(f"expected a question that the bundle takes, got {question[:40]!r}")
            return known.answer
        policy = self._pipeline.policy
        self._policy.set_picture(image_rgb)
        text, finished = self._policy.reply(question, draft=_text(known), max_new_tokens=policy.manifest.max_new_tokens)
        return parse_answer(
            text,
            answer_format=policy.default_format,
            input_size_hw=policy.manifest.answer_size_hw,
            source_size_hw=(image_rgb.shape[0], image_rgb.shape[1]),
            finished=finished,
        )


def _score(sample: Sample, predict: Predict) -> tuple[Record, Segmentation | None]:
    (pair,) = evaluate([sample], predict)
    return pair


def _text(result: Segmentation | None) -> str:
    return "" if result is None else result.answer.text


def _mean_iou(records: Sequence[Record]) -> float:
    return sum(record.iou for record in records) / len(records)

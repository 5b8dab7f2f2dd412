"""SAM's losses: focal and dice on masks, squared error on the predicted IoU, cross-entropy on "is anything there".

Departures from SAM 2's training code:
1. Masks are compared at half of the input side against area-averaged (soft) truth, not at full side against hard truth.
2. Besides the picture-wide focal term, plain cross-entropy averaged over the neighbourhood of the truth, so that small
   things weigh as much as large ones; pixels at the truth's edge weigh twice.
3. The single-mask token is trained in every step. A prompt with a box is clear, so all three ambiguous masks are
   trained to it as well; for bare points only the best of them is, as in SAM. (Policies ask with boxes and take the
   best scored of the three: three readings of one box would make that a lottery.)
4. The focal term weighs inside and outside alike. SAM's alpha of 0.25 pulls unsure pixels out of the mask, and with so
   short a training large things came out empty.
5. Dice weighs more: it asks for the best overlap, where pixel-wise terms leave out what they are unsure of. Real photos
   came out too small: above -0.5 instead of 0 their IoU was 0.04 higher.
6. A read-out of the finest features, thrown away after training, is asked where things end and what is a thing at all.
   That teaches the image encoder from every pixel, long before the prompts reach it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .segmenter_model import Predictions

FOCAL_WEIGHT, DICE_WEIGHT, NEAR_WEIGHT, IOU_WEIGHT, OBJECT_WEIGHT, READOUT_WEIGHT = 20.0, 3.0, 1.0, 1.0, 0.2, 1.0
FOCAL_GAMMA = 2.0
EDGE_WEIGHT = 1.0
"""What a pixel at the truth's edge weighs in the neighbourhood, on top of 1: most of what was still lost was there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmenterLoss:
    """The sum to minimise, and figures for the log."""

    total: Tensor
    single_iou: float
    """Mean IoU of the single-mask token with the truth."""
    chosen_iou: float
    """Mean IoU of the ambiguous mask that the model itself scores best: what the runtime will use."""
    best_iou: float
    """Mean IoU of the best of the three."""


def _mask_losses(logits: Tensor, truth: Tensor, near: Tensor) -> Tensor:
    """(..., H, W) logits against soft truth 0..1 -> weighted loss (...)."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    probability = logits.sigmoid()
    missed = probability + truth - 2 * probability * truth  # 1 - p_t for hard truth
    focal = (0.5 * missed**FOCAL_GAMMA * cross_entropy).mean((-2, -1))
    overlap = (probability * truth).sum((-2, -1))
    dice = 1 - (2 * overlap + 1) / (probability.sum((-2, -1)) + truth.sum((-2, -1)) + 1)
    local = (cross_entropy * near).sum((-2, -1)) / near.sum((-2, -1)).clamp(min=1)
    return FOCAL_WEIGHT * focal + DICE_WEIGHT * dice + NEAR_WEIGHT * local


def _neighbourhood(truth: Tensor) -> Tensor:
    """1 inside the truth's bounding box grown by a tenth of the picture, else 0."""
    reach = max(1, truth.shape[-1] // 20)
    present = (truth > 0).float()
    rows = F.max_pool1d(present.amax(-1).flatten(0, -2).unsqueeze(1), 2 * reach + 1, 1, reach)
    columns = F.max_pool1d(present.amax(-2).flatten(0, -2).unsqueeze(1), 2 * reach + 1, 1, reach)
    row_span = rows.cummax(-1).values * rows.flip(-1).cummax(-1).values.flip(-1)
    column_span = columns.cummax(-1).values * columns.flip(-1).cummax(-1).values.flip(-1)
    return (row_span.transpose(1, 2) * column_span).view(truth.shape)


def _edge(truth: Tensor) -> Tensor:
    """1 within about two pixels of where the truth changes, else 0; sides must be even."""
    share = F.avg_pool2d(F.avg_pool2d(truth, 2), 3, 1, 1, count_include_pad=False)
    return F.interpolate(((share > 0.01) & (share < 0.99)).float().unsqueeze(1), scale_factor=2)[:, 0]


@torch.no_grad()
def mask_iou(logits: Tensor, truth: Tensor) -> Tensor:
    """(..., H, W) logits thresholded at 0 and soft truth at 0.5 -> IoU (...); two empty masks agree."""
    predicted, wanted = logits > 0, truth > 0.5
    union = (predicted | wanted).sum((-2, -1))
    return torch.where(union > 0, (predicted & wanted).sum((-2, -1)) / union.clamp(min=1), 1.0)


def _enlarge(logits: Tensor, truth: Tensor) -> Tensor:
    return F.interpolate(logits, size=truth.shape[-2:], mode="bilinear", align_corners=False)


def segmenter_loss(predictions: Predictions, truth: Tensor, *, is_clear: bool) -> SegmenterLoss:
    """Predictions for (B, N) prompts against soft truth (B, N, S/2, S/2); `is_clear` when the prompts hold a box."""
    logits = predictions.mask_logits.flatten(0, 1)  # (M, 4, h, w)
    truth = truth.flatten(0, 1)  # (M, H, W)
    there = truth.amax((-2, -1)) > 0
    wanted = truth.unsqueeze(1)
    near = _neighbourhood(truth) + EDGE_WEIGHT * _edge(truth)
    with torch.no_grad():
        fine = _enlarge(logits, truth)
        ious = mask_iou(fine, wanted.expand_as(fine))
    rows = torch.arange(len(logits))
    if is_clear:
        best = 1 + ious[:, 1:].argmax(1)
        trained = torch.randint(
            1, logits.shape[1], best.shape
        )  # one of the three stands for all, at a third of the cost
    else:
        with torch.no_grad():
            readings = fine[:, 1:]
            ranking = _mask_losses(readings, wanted.expand_as(readings), near.unsqueeze(1).expand_as(readings))
            best = trained = 1 + ranking.argmin(1)
    kept = _enlarge(torch.stack([logits[:, 0], logits[rows, trained]], 1), truth)
    masks = _mask_losses(kept, wanted.expand_as(kept), near.unsqueeze(1).expand_as(kept)).sum(1)
    scores = predictions.iou_scores.flatten(0, 1)
    object_loss = F.binary_cross_entropy_with_logits(predictions.object_logits.flatten(), there.float())
    weight = there.float() / there.float().sum().clamp(min=1)
    iou_loss = ((scores - ious) ** 2).sum(1)
    total = ((masks + IOU_WEIGHT * iou_loss) * weight).sum() + OBJECT_WEIGHT * object_loss
    chosen = 1 + scores[:, 1:].argmax(1)
    return SegmenterLoss(
        total=total,
        single_iou=float((ious[:, 0] * weight).sum()),
        chosen_iou=float((ious[rows, chosen] * weight).sum()),
        best_iou=float((ious[rows, best] * weight).sum()),
    )


def readout_loss(readout: Tensor, instances: Tensor) -> Tensor:
    """Logits (B, 2, S/4, S/4) of "a thing ends here" and "this is a thing" against instance numbers (B, S, S)."""
    stride = instances.shape[-1] // readout.shape[-1]
    numbers = instances.float().unsqueeze(1)
    highest = F.max_pool2d(numbers, stride + 1, stride, stride // 2)[..., : readout.shape[-2], : readout.shape[-1]]
    lowest = -F.max_pool2d(-numbers, stride + 1, stride, stride // 2)[..., : readout.shape[-2], : readout.shape[-1]]
    thing = F.avg_pool2d((numbers > 0).float(), stride)
    truth = torch.cat([(highest != lowest).float(), thing], 1)
    return READOUT_WEIGHT * F.binary_cross_entropy_with_logits(readout, truth)

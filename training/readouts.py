"""Auxiliary read-outs, trained beside the policy and thrown away: they say early what the answer's digits say late.

* per cell, from the vision tower and from the middle of the decoder: kind, colour, box of the object that covers it,
  and in the decoder its own row and column;
* a pointer from the question's last token, and from every token before an object's coordinates, to the object's cells;
* the first attention head of that layer, made to look there itself, at those tokens and where the thinking describes an
  object (the only one that adds no weights: it trains the policy's own head);
* the object's box, right after that layer;
* one layer later, at every token before a digit, the coordinate that is being written, in steps of ten pixels.

Plain next-token training of so small a model does not ground at all within thousands of steps; with these it does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .grounding_data import Batch
from .object_kinds import COLOURS, KINDS
from .policy_model import GRID, INPUT_SIDE

CELL_LAYER, WATCHING_LAYER, NUMBER_LAYER = 2, 3, 4
"""Decoder layers (0-based): cells are read after the first; the second looks, pointer and box are read after it."""
TAPS = (CELL_LAYER, WATCHING_LAYER, NUMBER_LAYER)


class CellReadout(nn.Module):
    """Kind, colour and box of the object at every visual token.

    The vision tower knows places only relative to each other, so its box is told as a distance from the cell's centre.
    In the decoder (`placed`) the box is absolute, and row and column are read out too: coordinates are written in the
    picture's frame, and a token can only pass on a place that it knows.
    """

    def __init__(self, width: int, *, placed: bool) -> None:
        super().__init__()
        self.placed = placed
        if placed:
            self.row, self.column = nn.Linear(width, GRID), nn.Linear(width, GRID)
        self.norm = nn.LayerNorm(width)
        self.kind = nn.Linear(width, len(KINDS) + 1)
        self.colour = nn.Linear(width, len(COLOURS) + 1)
        self.box = nn.Linear(width, 4)
        centres = (torch.arange(GRID) + 0.5) / GRID
        grid = torch.stack([centres.expand(GRID, -1), centres[:, None].expand(-1, GRID)], -1).reshape(-1, 2)
        self.register_buffer("centres", torch.cat([grid, grid], 1), persistent=False)  # [V, 4]

    def forward(self, visual: Tensor, batch: Batch) -> dict[str, Tensor]:
        x = self.norm(visual.float())
        present = ~batch.cell_boxes[..., 0].isnan()
        boxes = self.box(x).float() + (0.5 if self.placed else self.get_buffer("centres"))
        boxes = boxes[present]
        return self._place_losses(x) | {
            "kind": F.cross_entropy(self.kind(x).float().flatten(0, 1), batch.cell_kinds.flatten()),
            "colour": F.cross_entropy(self.colour(x).float().flatten(0, 1), batch.cell_colours.flatten()),
            "box": 8 * F.smooth_l1_loss(boxes, batch.cell_boxes[present], beta=0.05),
        }

    def _place_losses(self, x: Tensor) -> dict[str, Tensor]:
        if not self.placed:
            return {}
        cells = torch.arange(GRID * GRID).expand(len(x), -1).flatten()
        return {
            "row": F.cross_entropy(self.row(x).float().flatten(0, 1), cells // GRID),
            "column": F.cross_entropy(self.column(x).float().flatten(0, 1), cells % GRID),
        }


class PointerReadout(nn.Module):
    """Where a token looks: scaled dot product against the visual tokens of the same layer, and a learnt `nothing`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_norm, self.key_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, 64), nn.Linear(width, 64)
        self.nothing = nn.Parameter(torch.zeros(64))

    def forward(self, hidden: Tensor, visual: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns the loss and the share of pointers whose best cell belongs to a target."""
        rows, at = batch.pointer_at.T
        query = self.query(self.query_norm(hidden[rows, at].float()))  # [Q, 64]
        keys = self.key(self.key_norm(visual.float()))  # [B, V, 64]
        keys = torch.cat([keys, self.nothing.to(keys.dtype).expand(len(keys), 1, -1)], 1)[rows]  # [Q, V + 1, 64]
        scores = torch.einsum("qd,qvd->qv", query.float(), keys.float()) / 8
        loss = -(batch.pointer_to * F.log_softmax(scores, -1)).sum(-1).mean()
        hit = batch.pointer_to.gather(1, scores.argmax(-1, keepdim=True)) > 0
        return loss, hit.float().mean()


class BoxReadout(nn.Module):
    """The box whose digits come next, in [0, 1]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 4))

    def forward(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns the loss and the mean IoU."""
        rows, at = batch.box_at.T
        boxes = self.mlp(self.norm(hidden[rows, at].float())).float().sigmoid()
        iou = _paired_iou(boxes.detach(), batch.box_to)
        return 8 * F.smooth_l1_loss(boxes, batch.box_to, beta=0.05), iou.mean()


class NumberReadout(nn.Module):
    """The coordinate whose digits are being written: without it, digits follow the words of the thinking alone."""

    STEP_PX = 10

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.bins = nn.Linear(width, INPUT_SIDE // self.STEP_PX + 1)

    def forward(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns the loss and the share of coordinates in the right step."""
        rows, at = batch.number_at.T
        scores = self.bins(self.norm(hidden[rows, at].float())).float()
        wanted = batch.number_to // self.STEP_PX
        return F.cross_entropy(scores, wanted), (scores.argmax(-1) == wanted).float().mean()


def watching_loss(looked: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of the watching head's attention [W, V] (log-probabilities) to the object's cells."""
    return -(batch.watch_to * looked).sum(-1).mean()


def _paired_iou(a: Tensor, b: Tensor) -> Tensor:
    corner = torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])
    overlap = corner.clamp(min=0).prod(1)
    areas = (a[:, 2:] - a[:, :2]).clamp(min=0).prod(1) + (b[:, 2:] - b[:, :2]).prod(1)
    return overlap / (areas - overlap).clamp(min=1e-9)


class Readouts(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.vision = CellReadout(width, placed=False)
        self.cells = CellReadout(width, placed=True)
        self.pointer = PointerReadout(width)
        self.box = BoxReadout(width)
        self.number = NumberReadout(width)

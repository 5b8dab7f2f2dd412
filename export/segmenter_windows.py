"""Hiera's maps as rows of a matrix: in which order places stand, whole or in parts, and how windows are cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from segzero_rt.errors import ExportError

from .graph_builder import GraphBuilder

Indices = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """A map of features, or whole windows of it, as rows of a matrix, [batch * places, channels]."""

    name: str
    order: Indices
    """Row i of a picture is this place of its map, counted row by row."""
    size_hw: tuple[int, int]
    width: int
    """Channels."""

    @property
    def count(self) -> int:
        """Rows of a picture."""
        return len(self.order)


def join(builder: GraphBuilder, parts: Sequence[Tokens]) -> Tokens:
    """Parts of a map, one behind the other."""
    if len(parts) == 1:
        return parts[0]
    by_picture = [builder.reshape(tokens.name, [-1, tokens.count, tokens.width]) for tokens in parts]
    rows = builder.reshape(builder.node("Concat", by_picture, axis=1), [-1, parts[0].width])
    return replace(parts[0], name=rows, order=np.concatenate([tokens.order for tokens in parts]))


def window_slots(size_hw: tuple[int, int], window_hw: tuple[int, int], stride: int) -> Indices:
    """Which place of a map, counted row by row, stands in each slot of each window.

    Args:
        size_hw: of the map.
        window_hw: of a window; those at the right and at the bottom may reach beyond the map.
        stride: side of the neighbourhoods that are pooled. Slots are `[stride^2, slots / stride^2]`: the members of a
            neighbourhood stand on the first axis; and so on inside, as far as halves go, for poolings to come.

    Returns:
        int64 [windows, slots]; -1 beyond the map.
    """
    inside = _pooling_order(window_hw, stride)  # [slots, 2]
    rows, columns = (-(-length // side) for length, side in zip(size_hw, window_hw, strict=True))
    corners = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1).reshape(-1, 1, 2)
    places = corners * np.array(window_hw) + inside  # [windows, slots, 2]
    flat: Indices = places[..., 0] * size_hw[1] + places[..., 1]
    return np.where((places < np.array(size_hw)).all(axis=-1), flat, -1)


def _pooling_order(window_hw: tuple[int, int], stride: int) -> Indices:
    """Rows and columns of a window's slots, [slots, 2]."""
    step = stride if stride > 1 else 2
    if any(length % step for length in window_hw):
        if stride > 1:
            raise ExportError(f"expected windows that {stride} x {stride} pooling divides, got {window_hw}")
        return np.argwhere(np.ones(window_hw, np.bool_)).astype(np.int64)
    members = np.argwhere(np.ones((step, step), np.bool_)).astype(np.int64)
    inner = _pooling_order((window_hw[0] // step, window_hw[1] // step), 1)
    return (inner[None] * step + members[:, None]).reshape(-1, 2)


def fill_windows(builder: GraphBuilder, tokens: Tokens, windows: Indices) -> str:
    """Rows to rows of padded windows; what lies beyond the map is zero."""
    by_picture = builder.reshape(tokens.name, [-1, tokens.count, tokens.width])
    by_picture = builder.node("Pad", [by_picture, builder.constant([0, 0, 0, 0, 1, 0])])  # one row of zeros behind
    slots = np.where(windows < 0, tokens.count, inverse(tokens.order)[windows]).reshape(-1)
    return builder.reshape(gather_rows(builder, by_picture, slots), [-1, tokens.width])


def empty_windows(builder: GraphBuilder, tokens: Tokens, windows: Indices) -> str:
    """Undoes `fill_windows`: from the rows of padded windows, named by `tokens`, to its order."""
    inside = np.flatnonzero(windows.reshape(-1) >= 0)
    place_to_slot = np.zeros(tokens.count, np.int64)
    place_to_slot[windows.reshape(-1)[inside]] = inside
    by_picture = builder.reshape(tokens.name, [-1, windows.size, tokens.width])
    return builder.reshape(gather_rows(builder, by_picture, place_to_slot[tokens.order]), [-1, tokens.width])


def reordered(builder: GraphBuilder, tokens: Tokens, order: Indices) -> Tokens:
    """The same rows in another order; nothing where they stand so already."""
    if np.array_equal(tokens.order, order):
        return tokens
    by_picture = builder.reshape(tokens.name, [-1, tokens.count, tokens.width])
    moved = gather_rows(builder, by_picture, inverse(tokens.order)[order])
    return replace(tokens, name=builder.reshape(moved, [-1, tokens.width]), order=order)


def gather_rows(builder: GraphBuilder, by_picture: str, rows: Indices) -> str:
    return builder.node("Gather", [by_picture, builder.constant(rows)], axis=1)


def inverse(order: Indices) -> Indices:
    """Where each place stands."""
    return np.argsort(order)

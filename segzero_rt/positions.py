"""Where tokens and patches stand: M-RoPE positions, rotary tables, attention windows of the vision tower.

NumPy only. The rules are those of Qwen2.5-VL (arXiv 2502.13923, sections 2.1.1 and 2.1.2) for one picture per question;
Qwen3-VL's (arXiv 2511.21631) differ in which frequencies belong to which axis, and in learned positions of patches.

M-RoPE in one paragraph: a text token has one position, used for all three axes (time, row, column). Tokens of a picture
all take the time `start`, the row `start + row` and the column `start + column`. The text after the picture goes on at
the largest position so far plus 1, so position = place in the sequence + a constant, the delta (negative for pictures).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from segzero_rt.graph_spec import MASKED

if TYPE_CHECKING:
    from segzero_rt.manifest import PolicyManifest

VISION_ROPE_THETA = 10000.0
"""Base of the vision tower's rotary frequencies; the same in every checkpoint of these families."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureSpan:
    """A picture's place in a sequence of tokens."""

    start: int
    """Tokens before the picture."""
    grid_hw: tuple[int, int]
    """Rows and columns of merged tokens."""

    def __post_init__(self) -> None:
        if self.start < 0 or min(self.grid_hw) < 1:
            raise ValueError(f"expected a start from 0 and a grid from 1x1, got {self.start} and {self.grid_hw}")

    @property
    def num_tokens(self) -> int:
        return self.grid_hw[0] * self.grid_hw[1]

    @property
    def end(self) -> int:
        """First place after the picture."""
        return self.start + self.num_tokens

    @property
    def mrope_delta(self) -> int:
        """Position minus place, for every token after the picture."""
        return max(self.grid_hw) - self.num_tokens


def mrope_positions(length: int, picture: PictureSpan | None = None) -> NDArray[np.int64]:
    """Positions of `length` tokens as int64 [3, length] (time, row, column), with at most one picture among them.

    Raises:
        ValueError: the picture does not lie within the sequence.
    """
    positions = np.tile(np.arange(length, dtype=np.int64), (3, 1))
    if picture is None:
        return positions
    if picture.end > length:
        raise ValueError(f"expected a picture within {length} tokens, got places {picture.start} to {picture.end}")
    rows, columns = picture.grid_hw
    inside = positions[:, picture.start : picture.end]
    inside[0] = picture.start
    inside[1] = picture.start + np.repeat(np.arange(rows), columns)
    inside[2] = picture.start + np.tile(np.arange(columns), rows)
    positions[:, picture.end :] += picture.mrope_delta
    return positions


def inverse_frequencies(width: int, theta: float) -> NDArray[np.float32]:
    """`theta ** (-2 i / width)` for i in 0..width/2, float32 [width / 2], rounded at each step as PyTorch does."""
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    powers: NDArray[np.float32] = np.float32(theta) ** exponents
    return (np.float32(1.0) / powers).astype(np.float32)


class MropeTable:
    """Cosines and sines for every place of a sequence, from one table over single positions.

    Args:
        head_dim: width of an attention head.
        theta: base of the frequencies.
        mrope_section: how many of the `head_dim / 2` frequencies belong to time, row and column.
        max_length: places that the table serves.
        interleaved: the axes take turns, time, row, column, time, ..., until the latter two have had their number;
            the rest is time's. Otherwise each has a run of them.
    """

    def __init__(
        self,
        *,
        head_dim: int,
        theta: float,
        mrope_section: tuple[int, int, int],
        max_length: int,
        interleaved: bool = False,
    ) -> None:
        if 2 * sum(mrope_section) != head_dim:
            raise ValueError(f"expected an mrope_section that sums to {head_dim // 2}, got {mrope_section}")
        angles = np.arange(max_length, dtype=np.float32)[:, None] * inverse_frequencies(head_dim, theta)
        self._cos = np.cos(angles)
        self._sin = np.sin(angles)
        self._axes = np.repeat(np.arange(3), mrope_section)
        if interleaved:
            self._axes = np.zeros(head_dim // 2, dtype=np.int64)
            for axis in (1, 2):
                self._axes[axis : 3 * mrope_section[axis] : 3] = axis
        self.max_length = max_length

    def rows(self, picture: PictureSpan | None = None) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Cosines and sines as float32 [max_length, head_dim / 2]; row i belongs to place i of the sequence."""
        if picture is None:
            return self._cos, self._sin
        by_axis = np.ascontiguousarray(
            mrope_positions(self.max_length, picture)[self._axes].T
        )  # [length, head_dim / 2]
        frequencies = np.arange(len(self._axes))
        return self._cos[by_axis, frequencies], self._sin[by_axis, frequencies]


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionLayout:
    """Everything that the vision graph must know about one size of picture; fields are named as its inputs are.

    Patches come from the processor in merge blocks (the patches of one merged token are consecutive), tokens in raster
    order. Windows reorder whole tokens.
    """

    patch_order: NDArray[np.int64]
    """[patches]: which patch of the processor's order stands at place i of the window order."""
    rotary_cos: NDArray[np.float32]
    """[patches, head_dim / 2]"""
    rotary_sin: NDArray[np.float32]
    window_patches: NDArray[np.int64]
    """[windows, slots]"""
    window_bias: NDArray[np.float32]
    """[windows, 1, 1, slots]"""
    patch_slots: NDArray[np.int64]
    """[patches]"""
    token_order: NDArray[np.int64]
    """[tokens]"""
    position_taps: NDArray[np.int64] | None = None
    """[patches, 4]; None where the tower has no learned positions."""
    position_weights: NDArray[np.float32] | None = None

    def inputs(self) -> dict[str, NDArray[np.generic]]:
        """The vision graph's inputs, but for the patches."""
        learned: dict[str, NDArray[np.generic]] = {}
        if self.position_taps is not None and self.position_weights is not None:
            learned = {"position_taps": self.position_taps, "position_weights": self.position_weights}
        return {
            **learned,
            "rotary_cos": self.rotary_cos,
            "rotary_sin": self.rotary_sin,
            "window_patches": self.window_patches,
            "window_bias": self.window_bias,
            "patch_slots": self.patch_slots,
            "token_order": self.token_order,
        }


def window_index(grid_hw: tuple[int, int], window_tokens: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens of a raster grid in window order, and how many each window holds.

    Windows are squares of `window_tokens`, laid from the top left; those at the right and at the bottom may be cut.

    Args:
        grid_hw: rows and columns of merged tokens.
        window_tokens: side of a window in merged tokens.

    Returns:
        int64 [tokens] and int64 [windows]; the latter sums to the number of tokens.
    """
    rows, columns = grid_hw
    raster = np.arange(rows * columns, dtype=np.int64).reshape(rows, columns)
    windows = [
        raster[top : top + window_tokens, left : left + window_tokens].reshape(-1)
        for top in range(0, rows, window_tokens)
        for left in range(0, columns, window_tokens)
    ]
    return np.concatenate(windows), np.array([len(window) for window in windows], dtype=np.int64)


def vision_layout(
    grid_hw: tuple[int, int],
    *,
    merge_size: int,
    window_tokens: int,
    head_dim: int,
    theta: float,
    masked: float,
    position_side: int = 0,
) -> VisionLayout:
    """Lays out one picture for the vision graph.

    Args:
        grid_hw: rows and columns of merged tokens.
        merge_size: side of a token in patches.
        window_tokens: side of a window in merged tokens.
        head_dim: width of an attention head of the tower.
        theta: base of the tower's rotary frequencies.
        masked: what is added to scores of empty slots.
        position_side: side of the square of learned positions, 0 for none.
    """
    token_index, lengths = window_index(grid_hw, window_tokens)
    unit = merge_size**2
    patch_order = (token_index[:, None] * unit + np.arange(unit)).reshape(-1)
    lengths = lengths * unit
    slots = int(lengths.max())
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    filled = np.arange(slots) < lengths[:, None]  # [windows, slots]
    window_patches = np.where(filled, starts[:, None] + np.arange(slots), 0)
    bias = np.where(filled, 0.0, masked).astype(np.float32)
    cos, sin = _vision_rotary(grid_hw, merge_size, head_dim, theta)
    return VisionLayout(
        patch_order=patch_order,
        rotary_cos=cos[patch_order],
        rotary_sin=sin[patch_order],
        window_patches=window_patches.astype(np.int64),
        window_bias=bias[:, None, None, :],
        patch_slots=np.flatnonzero(filled).astype(np.int64),
        token_order=np.argsort(token_index).astype(np.int64),
        **_learned_positions(grid_hw, merge_size, position_side, patch_order),
    )


def policy_rotary(manifest: PolicyManifest) -> MropeTable:
    """The decoder's rotary table for all places that the cache has."""
    return MropeTable(
        head_dim=manifest.head_dim,
        theta=manifest.rope_theta,
        mrope_section=manifest.mrope_section,
        max_length=manifest.max_length,
        interleaved=manifest.mrope_interleaved,
    )


def policy_layout(manifest: PolicyManifest) -> VisionLayout:
    """The layout of pictures in the manifest's size."""
    cell = manifest.patch_size * manifest.merge_size
    height, width = manifest.input_size_hw
    return vision_layout(
        (height // cell, width // cell),
        merge_size=manifest.merge_size,
        window_tokens=manifest.window_size // cell,
        head_dim=manifest.vision_head_dim,
        theta=VISION_ROPE_THETA,
        masked=MASKED,
        position_side=manifest.position_side,
    )


def _learned_positions(
    grid_hw: tuple[int, int], merge_size: int, side: int, patch_order: NDArray[np.int64]
) -> dict[str, NDArray[Any]]:
    """`position_taps` and `position_weights` of a layout: the square's corners on the picture's, bilinear between."""
    if not side:
        return {}
    rows, columns = (_linear_taps(length * merge_size, side) for length in grid_hw)
    places = _processor_places(grid_hw, merge_size)[:, patch_order]
    row_taps, row_weights, column_taps, column_weights = (
        part[place] for axis, place in zip((rows, columns), places, strict=True) for part in axis
    )
    taps = row_taps[:, :, None] * side + column_taps[:, None, :]
    weights = row_weights[:, :, None] * column_weights[:, None, :]
    return {"position_taps": taps.reshape(-1, 4), "position_weights": weights.reshape(-1, 4)}


def _linear_taps(length: int, side: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """For each of `length` places along an axis: the two of `side` it lies between, and their shares, [length, 2]."""
    at = np.arange(length, dtype=np.float32) * np.float32(side - 1) / np.float32(max(length - 1, 1))
    before = np.floor(at)
    taps = np.minimum(before[:, None].astype(np.int64) + np.arange(2), side - 1)
    share = at - before
    return taps, np.stack([1 - share, share], axis=-1)


def _vision_rotary(
    grid_hw: tuple[int, int], merge_size: int, head_dim: int, theta: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines, [patches, head_dim / 2], in the processor's order: rows' angles first, then columns'."""
    frequencies = inverse_frequencies(head_dim // 2, theta)
    places = _processor_places(grid_hw, merge_size).astype(np.float32)
    angles = places[..., None] * frequencies  # [2, patches, head_dim / 4]
    both = np.concatenate([angles[0], angles[1]], axis=-1)
    return np.cos(both), np.sin(both)


def _processor_places(grid_hw: tuple[int, int], merge_size: int) -> NDArray[np.int64]:
    """Row and column of each patch in the processor's order, [2, patches]."""
    rows, columns = grid_hw[0] * merge_size, grid_hw[1] * merge_size
    places = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"))  # [2, rows, columns]
    return places.reshape(2, grid_hw[0], merge_size, grid_hw[1], merge_size).transpose(0, 1, 3, 2, 4).reshape(2, -1)

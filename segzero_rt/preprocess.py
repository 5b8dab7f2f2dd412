"""A picture to the policy's patches, as `Qwen2VLImageProcessor` of transformers does it: `kernels.preprocess`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from segzero_rt.image import check_image
from segzero_rt.kernels.preprocess import Frame, InputTensor, preprocess
from segzero_rt.resampling import RESAMPLERS, resize


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessor:
    """Resizes to one size, normalises, cuts into patches.

    Raises:
        ValueError: the size is not a multiple of a token's side, or the resampler is unknown.
    """

    input_size_hw: tuple[int, int]
    """Pixels; multiples of `patch_size * merge_size`."""
    patch_size: int
    merge_size: int
    image_mean: tuple[float, float, float]
    """Per channel, of values in 0..1."""
    image_std: tuple[float, float, float]
    resampler: str = "pillow_bilinear"

    def __post_init__(self) -> None:
        side = self.patch_size * self.merge_size
        if side < 1 or min(self.input_size_hw) < side or any(length % side for length in self.input_size_hw):
            raise ValueError(f"expected an input size in multiples of {side} pixels, got {self.input_size_hw}")
        if self.resampler not in RESAMPLERS:
            raise ValueError(f"expected a resampler of {', '.join(RESAMPLERS)}, got {self.resampler!r}")
        if min(self.image_std) <= 0:
            raise ValueError(f"expected positive image_std, got {self.image_std}")

    @property
    def grid_hw(self) -> tuple[int, int]:
        """Rows and columns of merged tokens."""
        side = self.patch_size * self.merge_size
        return self.input_size_hw[0] // side, self.input_size_hw[1] // side

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch of one frame."""
        return 3 * self.patch_size**2

    def resize(self, image_rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The picture in the policy's size, uint8 [H, W, 3]; aspect is not kept.

        Raises:
            ImageError: not uint8 [H, W, 3], or empty.
        """
        check_image(image_rgb)
        return resize(image_rgb, self.input_size_hw, self.resampler)

    @property
    def tensor(self) -> InputTensor:
        """What the vision graph takes, patch order aside."""
        return InputTensor(
            size_hw=self.input_size_hw,
            image_mean=self.image_mean,
            image_std=self.image_std,
            resampler=self.resampler,
            patch_size=self.patch_size,
            merge_size=self.merge_size,
        )

    def patches(self, image_rgb: NDArray[np.uint8], *, order: NDArray[np.integer] | None = None) -> NDArray[np.float32]:
        """Normalised patches of one frame, float32 [patches, 3 * patch_size ** 2], the patches of a token consecutive.

        The published processor repeats each patch for two equal frames; the exported tower takes it once.

        Args:
            order: int [patches], which patch stands at each place; by default they stand token by token.

        Raises:
            ImageError: not uint8 [H, W, 3], or empty.
        """
        return preprocess(Frame.rgb(image_rgb), self.tensor, order=order)

"""Resizing, which is part of a model: what training saw is what every implementation has to give.

A model trained on Pillow's antialiased bilinear pictures sees something else in OpenCV's, by up to 98 of 255 levels
when shrinking. A manifest names its resampler; this is the one place that knows what the names mean.

Pillow rounds to eight bits between its two passes. Before version 13 rows were shortened first, always; 13 begins with
the pass that leaves less, so that pictures higher than wide come out otherwise: noise by a level, bicubic by up to 18.
Here each pass is asked for by itself, rows first: the same pixels with every Pillow, and with `kernels.preprocess`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # manifests are read by commands that touch no picture
    import numpy as np
    from numpy.typing import NDArray

RESAMPLERS = ("pillow_bilinear", "pillow_bicubic")


def resize(image_rgb: NDArray[np.uint8], size_hw: tuple[int, int], resampler: str) -> NDArray[np.uint8]:
    """The picture stretched to `size_hw`, uint8 [H, W, 3]; the same array where it has that size already.

    Raises:
        ValueError: not one of `RESAMPLERS`.
    """
    if resampler not in RESAMPLERS:
        raise ValueError(f"expected a resampler of {', '.join(RESAMPLERS)}, got {resampler!r}")
    if image_rgb.shape[:2] == size_hw:
        return image_rgb
    import numpy as np
    from PIL import Image

    filters = {"pillow_bilinear": Image.Resampling.BILINEAR, "pillow_bicubic": Image.Resampling.BICUBIC}
    height, width = size_hw
    narrowed = Image.fromarray(image_rgb).resize((width, image_rgb.shape[0]), filters[resampler])
    return np.asarray(narrowed.resize((width, height), filters[resampler]))

"""How a checkpoint's pictures become numbers: what its processor's settings say, beside what `config.json` says.

No gate would notice a picture that is normalised otherwise than in training, since PyTorch is shown the same numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from segzero_rt.errors import ExportError

from .policy_sizes import VisionSizes

_FILES = ("preprocessor_config.json", "processor_config.json")
"""The first of transformers before 5, the second of 5, where the settings of pictures are a part."""
_PART = "image_processor"
_CHANNELS = 3
_BYTE_SCALE = 1 / 255


def with_picture_settings(folder: Path, vision: VisionSizes) -> VisionSizes:
    """The sizes with the checkpoint's own mean and deviation of colours; as they are where it has no such file.

    Args:
        folder: of a checkpoint in transformers' layout.
        vision: with the family's mean and deviation, of 0 … 1.

    Raises:
        ExportError: settings that cannot be read, that contradict `config.json`, or of pictures that are not scaled to
            0 … 1 and normalised.
    """
    path = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if path is None:
        return vision
    settings = _read(path)
    for name, expected in (
        ("patch_size", vision.patch_size),
        ("temporal_patch_size", vision.temporal_patch_size),
        ("merge_size", vision.merge_size),
        ("do_rescale", True),
        ("do_normalize", True),
    ):
        if (found := settings.get(name, expected)) != expected:
            raise ExportError(f"expected {name} {expected} in {path}, got {found!r:.60}")
    scale = settings.get("rescale_factor", _BYTE_SCALE)
    if not isinstance(scale, (int, float)) or not math.isclose(scale, _BYTE_SCALE, rel_tol=1e-3):
        raise ExportError(f"expected rescale_factor 1/255 in {path}, got {scale!r:.60}")
    return replace(
        vision,
        image_mean=_colours(settings, "image_mean", vision.image_mean, path),
        image_std=_colours(settings, "image_std", vision.image_std, path, least=1e-6),
    )


def _read(path: Path) -> Mapping[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        part = settings.get(_PART, {}) if path.name == _FILES[1] else settings
        part.get(_PART)
    except (OSError, ValueError, AttributeError) as error:
        raise ExportError(f"expected settings of pictures as a JSON object in {path}: {error}") from error
    found: Mapping[str, Any] = part
    return found


def _colours(
    settings: Mapping[str, Any], name: str, family: tuple[float, float, float], path: Path, least: float = 0.0
) -> tuple[float, float, float]:
    given = settings.get(name)
    if given is None:
        return family
    numbers = given if isinstance(given, list) else []
    if len(numbers) != _CHANNELS or not all(
        isinstance(one, (int, float)) and not isinstance(one, bool) and least <= one <= 1 for one in numbers
    ):
        raise ExportError(f"expected {name} of three numbers from {least:g} to 1 in {path}, got {given!r:.60}")
    red, green, blue = map(float, numbers)
    return red, green, blue

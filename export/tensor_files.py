"""Safetensors files and what their headers say: names, shapes and types, before a number is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from segzero_rt.errors import ExportError

_FLOAT_TYPES = ("BF16", "F16", "F32", "F64")
"""As safetensors calls them."""
_COUNTER = ".num_batches_tracked"
"""Of a batch norm, which counts training steps in an integer."""
_EXPORT_THE_ORIGINAL = "export the checkpoint that it was made from; --storage int4 or int8 makes it as small"
_QUANTIZATIONS = ("quantization_config", "compression_config")
"""Settings that programs leave which round weights."""
_LFS_POINTER = b"version https://git-lfs"


def tensor_shapes(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor in a file.

    Raises:
        ExportError: the file is damaged, or holds weights that are no floats.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                part = tensors.get_slice(name)
                if part.get_dtype() not in _FLOAT_TYPES and not name.endswith(_COUNTER):
                    raise ExportError(
                        f"expected weights as floats of {', '.join(_FLOAT_TYPES)}, got {name} as {part.get_dtype()} "
                        f"in {path}; {_EXPORT_THE_ORIGINAL}"
                    )
                yield name, tuple(part.get_shape())
    except (OSError, SafetensorError) as error:
        remedy = "`git lfs pull` fetches it" if _is_pointer(path) else "fetch it again"
        raise ExportError(f"expected a whole safetensors file at {path}, got: {error}; {remedy}") from error


def refuse_quantized(folder: Path, config: Mapping[str, Any]) -> None:
    """Weights that another program rounded lie in layouts of its own, and would be rounded twice.

    Args:
        folder: of the checkpoint.
        config: its `config.json`.

    Raises:
        ExportError: names what quantized it.
    """
    text = config.get("text_config")
    parts = (config, text if isinstance(text, dict) else {})
    found = next((part[name] for part in parts for name in _QUANTIZATIONS if part.get(name)), None)
    if found is None and (folder / "quantize_config.json").is_file():
        found = {"quant_method": "gptq"}
    if found is not None:
        method = found.get("quant_method", "an unknown method") if isinstance(found, dict) else found
        raise ExportError(
            f"expected a checkpoint whose weights are floats in {folder}, got one quantized by {str(method)[:40]}; "
            f"{_EXPORT_THE_ORIGINAL}"
        )


def _is_pointer(path: Path) -> bool:
    """What a clone holds in the place of a large file that was not fetched."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER

"""Is there a checkpoint at all? What a path holds instead, and what to do about it, before anything is read."""

from __future__ import annotations

import re
from pathlib import Path

from segzero_rt.errors import ExportError

CONFIG_FILE, TOKENIZER_FILE, WEIGHTS = "config.json", "tokenizer.json", "*.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
TORCH_SUFFIXES = (".pt", ".pth")

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_RESAVE = "`AutoModelForImageTextToText.from_pretrained(OLD).save_pretrained(NEW)` of transformers"


def check_policy(path: Path) -> None:
    """A folder of transformers' layout with a tokenizer in its fast format.

    Raises:
        ExportError: what is there instead, and how to come to such a folder.
    """
    if not _is_transformers_folder(path):
        raise ExportError(f"--policy {path}: expected a folder with {CONFIG_FILE} and {WEIGHTS}, {_instead(path)}")
    if not (path / TOKENIZER_FILE).is_file():
        raise ExportError(
            f"--policy {path}: expected {TOKENIZER_FILE} there, got none; copy the base model's, or make it with "
            "`AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)` of transformers"
        )


def check_segmenter(path: Path) -> None:
    """A folder of transformers' layout, or a file of SAM 2's own package.

    Raises:
        ExportError: what is there instead, and how to come to such a checkpoint.
    """
    if path.suffix in TORCH_SUFFIXES and not path.is_dir():
        if not path.is_file():
            raise ExportError(
                f"--segmenter {path}: expected a checkpoint of SAM 2's own package, there is no such file"
            )
    elif not _is_transformers_folder(path):
        raise ExportError(
            f"--segmenter {path}: expected a folder with {CONFIG_FILE} and {WEIGHTS}, or a sam2*.pt, {_instead(path)}"
        )


def _is_transformers_folder(path: Path) -> bool:
    return (path / CONFIG_FILE).is_file() and any(path.glob(WEIGHTS))


def _instead(path: Path) -> str:
    """What came, and what to do."""
    if not path.exists():
        is_name = _HUB_NAME.fullmatch(str(path)) is not None
        fetch = f"; if that is a name on the Hugging Face hub: `hf download {path} --local-dir DIR`, then DIR"
        return "got nothing there" + (fetch if is_name else "")
    if path.is_file():
        return f"got a file; give its folder, {path.parent}, if the rest of the checkpoint is there"
    if (path / ADAPTER_CONFIG).is_file():
        return "got a LoRA adapter; give it as --adapter, and the model that it was trained on as --policy"
    if snapshots := sorted(one for one in path.glob("snapshots/*") if _is_transformers_folder(one)):
        return f"got the hub's cache of one; give {snapshots[-1]}"
    if any(path.glob("model_world_size_*_rank_*.pt")) or any(path.glob("actor/model_world_size_*_rank_*.pt")):
        return "got shards of a training run (FSDP); merge them with the model_merger of verl or EasyR1 first"
    if pickled := sorted(path.glob("*.bin")):
        return f"got pickled weights ({pickled[0].name}), which are not read here; save them anew: {_RESAVE}"
    if tensors := sorted(one for suffix in TORCH_SUFFIXES for one in path.glob(f"*{suffix}")):
        return f"got {tensors[0].name} there; if it is SAM 2's own checkpoint, give that file"
    if deeper := sorted(one.parent for one in path.glob(f"*/{CONFIG_FILE}") if _is_transformers_folder(one.parent)):
        return f"got none there; did you mean {deeper[0]}?"
    missing = CONFIG_FILE if not (path / CONFIG_FILE).is_file() else WEIGHTS
    return f"got no {missing} there; fetch the whole checkpoint"

"""Reads a policy checkpoint in Hugging Face's layout: `config.json` and safetensors, in one file or in shards.

Two generations of files are understood: those of transformers 5 (text settings nested, keys under
`model.language_model.`) and the published ones of Qwen2.5-VL (text settings flat, keys under `model.` and `visual.`).
Nothing is read before it is asked for, so that a checkpoint larger than the memory can be exported tensor by tensor.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from segzero_rt.errors import ExportError
from segzero_rt.manifest import POLICY_FAMILIES

from .lazy_weight import Floats, Weight
from .picture_settings import with_picture_settings
from .policy_adapter import PolicyAdapter
from .policy_sizes import read_sizes
from .tensor_files import refuse_quantized, tensor_shapes

_OLD_PREFIXES = (
    ("visual.", "model.visual."),
    ("model.layers.", "model.language_model.layers."),
    ("model.embed_tokens.", "model.language_model.embed_tokens."),
    ("model.norm.", "model.language_model.norm."),
)

_UNUSED_ENDINGS = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")
"""Buffers that old checkpoints keep; they follow from the configuration."""


_ONE = np.ones(1, np.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Factors:
    """What a weight is multiplied by, float32; of length 1 where all of an axis is."""

    rows: Floats = field(default_factory=_ONE.copy)
    """Along its first axis: the outputs of a product, the channels of a norm or bias."""
    columns: Floats = field(default_factory=_ONE.copy)
    """Along its second, of a matrix."""

    def applied(self, weight: Weight) -> Weight:
        """The weight times the factors, still read by rows."""

        def rows(start: int, stop: int) -> Floats:
            along = self.rows if len(self.rows) == 1 else self.rows[start:stop]
            values = weight.rows(start, stop)
            return values * (along if values.ndim == 1 else along[:, None] * self.columns)

        return Weight(weight.shape, rows)


class PolicyCheckpoint:
    """A checkpoint folder, opened.

    Args:
        folder: `config.json` and safetensors.
        adapter: folder of a LoRA adapter in PEFT's layout, whose changes every weight is given with.

    Raises:
        ExportError: a file is missing or damaged, or the family or a size is not one that the exporter knows.
    """

    def __init__(self, folder: Path, adapter: Path | None = None) -> None:
        self.folder = folder
        self.config = _read_json(folder / "config.json")
        self.family = str(self.config.get("model_type", ""))
        if self.family not in POLICY_FAMILIES:
            raise ExportError(
                f"expected a checkpoint of family {', '.join(POLICY_FAMILIES)}, got {self.family!r} "
                f"in {folder / 'config.json'}"
            )
        refuse_quantized(folder, self.config)
        try:
            vision, self.text = read_sizes(self.family, self.config)
            self.image_token_id = int(self.config["image_token_id"])
        except ExportError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
            raise ExportError(
                f"expected the settings of {self.family} in {folder / 'config.json'}, got none or a wrong one: "
                f"{type(error).__name__} {error}"
            ) from error
        self.vision = with_picture_settings(folder, vision)
        self._files = _weight_files(folder)
        self._asked_for: set[str] = set()
        self._adapter = PolicyAdapter(adapter, _current_key) if adapter is not None else None
        if self._adapter is not None:
            self._adapter.check_fits({key: found.shape for key, found in self._files.items()})
        self._factors: dict[str, Factors] = {}

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: `generation_config.json` where there is one, else the configuration."""
        generation = self.folder / "generation_config.json"
        settings = _read_json(generation) if generation.is_file() else {}
        text = self.config.get("text_config") or {}
        for found in (settings.get("eos_token_id"), text.get("eos_token_id"), self.config.get("eos_token_id")):
            if found is not None:
                tokens = found if isinstance(found, list) else [found]
                if not all(isinstance(token, int) for token in tokens):
                    raise ExportError(f"expected numbers of tokens as eos_token_id in {self.folder}, got {tokens}")
                return tuple(tokens)
        raise ExportError(f"expected eos_token_id in {self.folder}, got none")

    def weight(self, key: str, shape: tuple[int, ...] | None = None) -> Weight:
        """One weight by its transformers 5 key; its numbers are read when they are asked for.

        Raises:
            ExportError: it is missing or has another shape.
        """
        if key not in self._files:
            raise ExportError(f"expected a weight {key} in {self.folder}, got none; is the checkpoint complete?")
        found = self._files[key]
        if shape is not None and found.shape != shape:
            raise ExportError(f"expected {key} of shape {shape}, got {found.shape} in {found.path}")
        self._asked_for.add(key)
        weight = Weight(found.shape, found.rows)
        weight = weight if self._adapter is None else self._adapter.applied(key, weight)
        return self._factors[key].applied(weight) if key in self._factors else weight

    def rescaled(self, factors: Mapping[str, Factors]) -> PolicyCheckpoint:
        """The same checkpoint, some of its weights multiplied as they are read.

        Args:
            factors: by transformers 5 key.
        """
        other = copy.copy(self)
        other._factors = dict(factors)
        return other

    def tensor(self, key: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """One weight as float32, read now. Raises as `weight`."""
        return self.weight(key, shape).array()

    def has(self, key: str) -> bool:
        """True when the files hold this weight."""
        return key in self._files

    def check_nothing_is_left(self) -> None:
        """To be called when every weight of the graphs was asked for.

        Raises:
            ExportError: the files hold a weight that nobody asked for: the checkpoint is of another architecture.
        """
        unused = [key for key in self._files if key not in self._asked_for and not key.endswith(_UNUSED_ENDINGS)]
        if self.text.tied:
            unused = [key for key in unused if key != "lm_head.weight"]  # some save tied weights twice
        if unused:
            raise ExportError(
                f"expected the weights of {self.family} in {self.folder}, got {len(unused)} that it has not, such as "
                f"{min(unused)}; is it of another architecture?"
            )
        if self._adapter is not None:
            self._adapter.check_nothing_is_left()

    @property
    def num_bytes(self) -> int:
        """Of the files that hold the weights."""
        return sum(path.stat().st_size for path in {found.path for found in self._files.values()})

    @property
    def num_parameters(self) -> int:
        """Numbers in all weights."""
        return sum(int(np.prod(found.shape)) for found in self._files.values())

    def fingerprint(self) -> str:
        """Changes when a file of the checkpoint does: names, sizes and times of its files, and its configuration."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for path in sorted({found.path for found in self._files.values()}):
            status = path.stat()
            digest.update(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}\n".encode())
        if self._adapter is not None:
            digest.update(self._adapter.fingerprint().encode())
        for key, factors in sorted(self._factors.items()):
            digest.update(key.encode() + factors.rows.tobytes() + factors.columns.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """Where one weight lies."""

    path: Path
    key: str
    """In that file."""
    shape: tuple[int, ...]

    def rows(self, start: int, stop: int) -> Floats:
        """The file is opened for each read: a map that stays open keeps in memory all that was ever read of it."""
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as weights:  # PyTorch, because NumPy has no bfloat16
            part = weights.get_slice(self.key)[start:stop] if self.shape else weights.get_tensor(self.key)
            values: Floats = part.float().numpy()
            return values.copy() if values.base is not None and part.dtype.itemsize == 4 else values


def _weight_files(folder: Path) -> dict[str, _Found]:
    """Every weight in the files, by its transformers 5 key."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.is_file():
        paths = _shards(index)
        if single.is_file() and single not in paths:  # transformers would read the one, an index names the others
            raise ExportError(
                f"expected the weights of {folder} once, got {single.name} and an index of other files; remove those "
                "that are of an earlier save"
            )
    elif single.is_file():
        paths = [single]
    else:
        beside = min((path.name for path in folder.glob("*.safetensors")), default="no safetensors")
        raise ExportError(
            f"expected {single.name} or {index.name} in {folder}, got neither beside {beside}; fetch the rest"
        )
    found: dict[str, _Found] = {}
    for path in paths:
        for key, shape in tensor_shapes(path):
            name = _current_key(key)
            if name in found:
                raise ExportError(
                    f"expected each weight once, got {found[name].key} in {found[name].path} and {key} in {path}"
                )
            found[name] = _Found(path=path, key=key, shape=shape)
    return found


def _shards(index: Path) -> list[Path]:
    """The files that an index names. Each lies beside it: a checkpoint may come from anywhere."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ExportError(f"expected a weight_map of tensors and files in {index}, got {str(weight_map)[:40]}")
    paths = []
    for name in sorted(set(map(str, weight_map.values()))):
        if not name.endswith(".safetensors") or Path(name).name != name or "\\" in name:
            raise ExportError(f"expected names of safetensors files beside {index} in it, got {name[:80]!r}")
        if not (index.parent / name).is_file():
            raise ExportError(f"expected the file {name} that {index} names, got none; fetch the rest")
        paths.append(index.parent / name)
    return paths


def _current_key(key: str) -> str:
    for old, new in _OLD_PREFIXES:
        if key.startswith(old):
            return new + key[len(old) :]
    return key


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"expected a JSON file at {path}, got: {error}") from error
    if not isinstance(document, dict):
        raise ExportError(f"expected a JSON object in {path}, got {type(document).__name__}")
    return document

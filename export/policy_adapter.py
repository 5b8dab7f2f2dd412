"""LoRA adapters in PEFT's layout, added to a checkpoint's weights as they are read: `W + scale * B @ A`, row by row."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segzero_rt.errors import ExportError

from .lazy_weight import Floats, Weight
from .sources import ADAPTER_CONFIG

WEIGHTS_FILE, PICKLED_FILE = "adapter_model.safetensors", "adapter_model.bin"

_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])(?:\.default)?\.weight$")
_EXPECTED = {"peft_type": "LORA", "bias": "none"}
_UNSET = (
    *("use_dora", "fan_in_fan_out", "modules_to_save", "trainable_token_indices", "lora_bias", "layer_replication"),
    *("alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config"),
)
"""Settings that are off where an adapter is a sum of products and nothing else; the names are those of PEFT 0.21."""
_BASE_KEPT = (True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` with which PEFT leaves the weights of the base model as they are."""


@dataclass(frozen=True, slots=True)
class _Product:
    """What is added to one weight."""

    down: Floats
    """A, [rank, in]."""
    up: Floats
    """B, [out, rank]."""
    scale: float

    def rows(self, start: int, stop: int) -> Floats:
        added: Floats = np.float32(self.scale) * (self.up[start:stop] @ self.down)
        return added


class PolicyAdapter:
    """An adapter folder, read whole: it is small.

    Args:
        folder: `adapter_config.json` and `adapter_model.safetensors`.
        current_key: a weight's transformers 5 key, from any that the adapter may know it by.

    Raises:
        ExportError: a file is missing or damaged, or it is an adapter of another kind than plain LoRA.
    """

    def __init__(self, folder: Path, current_key: Callable[[str], str]) -> None:
        self.folder = folder
        try:
            config: dict[str, Any] = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ExportError(f"expected an adapter with {ADAPTER_CONFIG} in {folder}, got: {error}") from error
        _check(config, folder)
        self.base = str(config.get("base_model_name_or_path") or "an unknown model")
        """What it was trained on, in the words of its settings."""
        self._products = _products(folder, config, current_key)
        self._used: set[str] = set()

    def check_fits(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """To be called before anything is applied, with the shape of each weight that the checkpoint has.

        Raises:
            ExportError: the adapter was made for a weight that is not there, or has another shape.
        """
        for key, product in sorted(self._products.items()):
            shape = (product.up.shape[0], product.down.shape[1])
            if shapes.get(key) != shape:
                came = f"where the checkpoint has {shapes[key]}" if key in shapes else "which the checkpoint has not"
                raise ExportError(
                    f"expected an adapter of this checkpoint in {self.folder}, got one that changes {key} of shape "
                    f"{shape}, {came}; it was trained on {self.base[:80]}"
                )

    def applied(self, key: str, weight: Weight) -> Weight:
        """The weight with what the adapter adds to it."""
        product = self._products.get(key)
        if product is None:
            return weight
        self._used.add(key)
        return Weight(weight.shape, lambda start, stop: weight.rows(start, stop) + product.rows(start, stop))

    def check_nothing_is_left(self) -> None:
        """To be called when every weight was asked for.

        Raises:
            ExportError: the adapter changes a weight that no graph reads.
        """
        unused = sorted(set(self._products) - self._used)
        if unused:
            raise ExportError(f"expected an adapter in {self.folder} of weights in use, got one of {unused[0]}")

    def fingerprint(self) -> str:
        """Changes when the adapter does."""
        digest = hashlib.sha256((self.folder / ADAPTER_CONFIG).read_bytes())
        digest.update((self.folder / WEIGHTS_FILE).read_bytes())
        return digest.hexdigest()


def _check(config: Any, folder: Path) -> None:
    """Refuses settings whose adapters are more than a sum of products."""
    if not isinstance(config, dict):
        raise ExportError(f"expected a JSON object in {folder / ADAPTER_CONFIG}, got {type(config).__name__}")
    strange = [(name, value, config[name]) for name, value in _EXPECTED.items() if config.get(name, value) != value]
    strange += [(name, "unset", config[name]) for name in _UNSET if config.get(name)]
    started = config.get("init_lora_weights", True)
    if started not in _BASE_KEPT:
        strange.append(("init_lora_weights", "that leaves the base model as it is", started))
    if strange:
        name, expected, got = strange[0]
        raise ExportError(
            f"expected an adapter with {name} {expected}, got {str(got)[:60]} in {folder}; merge it with PEFT "
            "(merge_and_unload) and export the merged checkpoint"
        )
    patterns = (config.get("alpha_pattern") or {}, config.get("rank_pattern") or {})
    if not all(isinstance(pattern, dict) for pattern in patterns):
        raise ExportError(
            f"expected alpha_pattern and rank_pattern by module in {folder / ADAPTER_CONFIG}, got another"
        )


def _products(folder: Path, config: dict[str, Any], current_key: Callable[[str], str]) -> dict[str, _Product]:
    from safetensors import SafetensorError, safe_open

    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickled = (folder / PICKLED_FILE).is_file()
        came = f"{PICKLED_FILE} alone, a pickle: load it with PEFT and save it again" if pickled else "none"
        raise ExportError(f"expected {WEIGHTS_FILE} in {folder}, got {came}")
    parts: dict[str, dict[str, Floats]] = {}
    try:
        with safe_open(path, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118 - no mapping
                match = _KEY.match(key)
                if match is None:
                    raise ExportError(f"expected weights of LoRA in {path}, got {key}")
                parts.setdefault(match["module"], {})[match["part"]] = weights.get_tensor(key).float().numpy()
    except (OSError, SafetensorError) as error:
        raise ExportError(f"expected a whole safetensors file at {path}, got: {error}; fetch it again") from error
    found = {}
    for module, pair in parts.items():
        shapes = {name: list(part.shape) for name, part in sorted(pair.items())}
        matrices = set(pair) == {"A", "B"} and all(part.ndim == 2 and part.size for part in pair.values())
        if not matrices or pair["A"].shape[0] != pair["B"].shape[1]:
            raise ExportError(f"expected lora_A and lora_B of one rank for {module} in {path}, got {shapes}")
        try:
            scale = _scale(config, module, pair["A"].shape[0])
        except (TypeError, ValueError, re.error) as error:
            raise ExportError(f"expected numbers for alpha in {folder / ADAPTER_CONFIG}, got: {error}") from error
        found[current_key(f"{module}.weight")] = _Product(pair["A"], pair["B"], scale)
    return found


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank); alpha may be one of its own for modules that a pattern names."""
    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    own = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
    alpha = float(next(own, config.get("lora_alpha", rank)))
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank

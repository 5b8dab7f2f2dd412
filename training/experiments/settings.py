"""What an experiment in a folder was begun with: a preset by name, changes to it, and the base policy."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from segzero_rt.errors import SegZeroError

from .design import PRESETS, ExperimentPreset

SETTINGS_NAME = "experiment.json"
_PRESET, _CHANGES, _POLICY, _WHOLE = "preset", "changes", "policy", "whole"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One experiment.

    Raises:
        SegZeroError: no such preset, or changes that do not fit.
    """

    name: str
    """Of the preset."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Fields of the preset that differ; plain JSON types, sequences as lists."""
    policy: str
    """Folder or hub name of the base policy; empty: the recipe's."""
    preset: ExperimentPreset = field(init=False)

    def __post_init__(self) -> None:
        if self.name not in PRESETS:
            raise SegZeroError(f"expected --preset to be one of {', '.join(PRESETS)}, got {self.name!r:.60}")
        changed: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in self.changes.items()
        }
        try:
            preset = replace(PRESETS[self.name](), **changed)
        except ValueError as error:
            raise SegZeroError(f"{error}; change --steps, --evaluations or --seeds") from error
        object.__setattr__(self, "preset", preset)
        object.__setattr__(self, "policy", self.policy or preset.grpo.policy)

    def to_json(self) -> dict[str, Any]:
        """All settings as plain JSON types, every field of the preset among them."""
        whole = {
            _PRESET: self.name, _CHANGES: self.changes, _POLICY: self.policy, _WHOLE: asdict(self.preset)
        }  # fmt: skip
        plain: dict[str, Any] = json.loads(json.dumps(whole))
        return plain


def claim_folder(folder: Path, settings: Settings) -> None:
    """Writes the settings into a new folder, or checks that it holds these.

    Raises:
        SegZeroError: it holds an experiment with other settings, or one that the program's present recipe is not.
    """
    path = folder / SETTINGS_NAME
    folder.mkdir(parents=True, exist_ok=True)
    wanted = settings.to_json()
    if not path.exists():
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(wanted, indent=1), encoding="utf-8")
        temporary.replace(path)
    earlier = json.loads(path.read_text(encoding="utf-8"))
    if earlier != wanted:
        differing = _differing(earlier, wanted)
        raise SegZeroError(
            f"expected {folder} to hold an experiment with these settings, its {', '.join(differing)} differ(s) (see "
            f"{path}); choose another --out"
        )


def read_settings(folder: Path) -> Settings:
    """The settings of the experiment in a folder.

    Raises:
        SegZeroError: there is none, or the program has changed since.
    """
    path = folder / SETTINGS_NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        settings = Settings(name=found[_PRESET], changes=found[_CHANGES], policy=found[_POLICY])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise SegZeroError(f"expected an experiment in {folder}, could not read {path}: {error}") from error
    claim_folder(folder, settings)
    return settings


def _differing(earlier: Any, wanted: Any, name: str = "") -> list[str]:
    """Names of the settings that differ, the innermost ones."""
    if not isinstance(earlier, dict) or not isinstance(wanted, dict):
        return [name] if earlier != wanted else []
    keys = sorted({*earlier, *wanted})
    return [
        found
        for key in keys
        for found in _differing(earlier.get(key), wanted.get(key), f"{name}.{key}" if name else key)
    ]

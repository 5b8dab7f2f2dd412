"""`manifest.json` as values: what a bundle holds, how its inputs are prepared, what its gates measured.

The file is one JSON object with the fields of `Manifest`, and `digest`, the sha256 of all the others in canonical form
(sorted keys, no spaces). A changed digit anywhere in it is noticed, as is a changed byte in any file that it lists.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, TypeVar

from segzero_rt.engines.record import EngineRecord
from segzero_rt.errors import BundleError
from segzero_rt.graph_spec import DECODER_FLAVOURS
from segzero_rt.resampling import RESAMPLERS

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 4 << 20
QUALITY_GATE = "quality"
"""Key in `gates` of what the weights' precision costs on labelled questions."""
GATE_PASSED, GATE_NOT_RUN = "passed", "not_run"
"""`status` of a gate's record; one that failed is never written."""
POLICY_FAMILIES, SEGMENTER_FAMILIES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl"), ("sam2",)
"""Architectures whose positions, windows and prompts this runtime computes; another's graphs would run and be wrong."""

CACHE_DTYPES = ("float32", "float16")

INPUT_PIXELS, RELATIVE_1000 = "input_pixels", "relative_1000"
COORDINATES = (INPUT_PIXELS, RELATIVE_1000)
"""What a policy's answers count in: pixels of the picture as it sees it, or thousandths of the picture's sides."""
RELATIVE_SIDE = 1000

LATER: Mapping[str, bool] = types.MappingProxyType({"later": True})
"""Marks fields that came after the first bundles were written: where one is missing it has its default."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """What one file of the bundle must be."""

    sha256: str
    """64 lower-case hexadecimal digits."""
    bytes: int

    def __post_init__(self) -> None:
        if len(self.sha256) != 64 or set(self.sha256) - set("0123456789abcdef"):
            raise BundleError(f"expected a sha256 of 64 lower-case hexadecimal digits, got {self.sha256!r}")
        _require_positive(self, "bytes")


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyGraphs:
    """Paths of the policy's three graphs inside the bundle."""

    vision: str
    embedding: str
    decoder: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmenterGraphs:
    """Paths of the segmenter's graphs inside the bundle."""

    encoder: str
    decoder: str
    mask_prompt: str | None = field(default=None, metadata=LATER)
    """Takes masks in as prompts; None where the segmenter never learnt to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyManifest:
    """The vision-language model: its preprocessing, its sizes, its graphs."""

    family: str
    """Architecture, such as "qwen2_5_vl"."""
    flavour: str
    """How the decoder graph keeps keys and values; `KVCache` alone reads it."""
    input_size_hw: tuple[int, int]
    """Size that every picture is resized to; multiples of `patch_size * merge_size`."""
    resampler: str
    """One of `RESAMPLERS`; part of the model, since training saw its pixels."""
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    """Of values in [0, 1], per RGB channel."""
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    window_size: int
    """Side of the vision tower's attention windows, in pixels."""
    vision_head_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    rope_theta: float
    mrope_section: tuple[int, int, int]
    """Share of `head_dim / 2` that turns with time, row and column."""
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    image_token_id: int
    max_length: int
    """Rows of the KV cache: prompt, picture and answer together."""
    max_new_tokens: int
    """Budget of an answer, unless the caller gives another."""
    graphs: PolicyGraphs
    cache_dtype: str = field(default="float32", metadata=LATER)
    """What the decoder's keys and values are kept in, one of `CACHE_DTYPES`."""
    mrope_interleaved: bool = field(default=False, metadata=LATER)
    """Time, row and column take turns among the frequencies; otherwise each has a run of them."""
    deepstack: int = field(default=0, metadata=LATER)
    """How many of the decoder's first layers have features of the tower's depths added behind them."""
    position_side: int = field(default=0, metadata=LATER)
    """Side of the tower's square of learned positions, which is stretched over the picture; 0 where it has none."""
    coordinates: str = field(default=INPUT_PIXELS, metadata=LATER)
    """What numbers in answers count, one of `COORDINATES`."""

    def __post_init__(self) -> None:
        _require_positive(
            self,
            *("patch_size", "temporal_patch_size", "merge_size", "window_size", "vision_head_dim", "num_layers"),
            *("num_heads", "num_kv_heads", "head_dim", "hidden_size", "rope_theta", "vocab_size", "max_length"),
            *("max_new_tokens", "input_size_hw", "image_std"),
        )
        _require_known("policy.family", self.family, POLICY_FAMILIES)
        _require_known("policy.flavour", self.flavour, DECODER_FLAVOURS)
        _require_known("policy.resampler", self.resampler, RESAMPLERS)
        _require_known("policy.cache_dtype", self.cache_dtype, CACHE_DTYPES)
        _require_known("policy.coordinates", self.coordinates, COORDINATES)
        if min(self.deepstack, self.position_side) < 0 or self.deepstack >= self.num_layers:
            raise BundleError(
                f"policy: expected deepstack from 0 to {self.num_layers - 1} and position_side from 0, got "
                f"{self.deepstack} and {self.position_side}"
            )
        cell = self.patch_size * self.merge_size
        if any(side % cell for side in self.input_size_hw):
            raise BundleError(f"policy.input_size_hw: expected multiples of {cell}, got {self.input_size_hw}")
        if 2 * sum(self.mrope_section) != self.head_dim:
            raise BundleError(
                f"policy.mrope_section: expected a sum of head_dim / 2 = {self.head_dim / 2}, got {self.mrope_section}"
            )
        if self.num_heads % self.num_kv_heads:
            raise BundleError(f"policy.num_kv_heads: expected a divisor of {self.num_heads}, got {self.num_kv_heads}")
        special_ids = (*self.eos_token_ids, self.image_token_id)
        if not self.eos_token_ids or any(not 0 <= token < self.vocab_size for token in special_ids):
            raise BundleError(
                f"policy: token ids must lie in [0, {self.vocab_size}), got end {self.eos_token_ids}, "
                f"image {self.image_token_id}"
            )

    @property
    def answer_size_hw(self) -> tuple[int, int]:
        """Height and width that the numbers in this policy's answers count up to."""
        return (RELATIVE_SIDE, RELATIVE_SIDE) if self.coordinates == RELATIVE_1000 else self.input_size_hw


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmenterManifest:
    """The promptable segmenter: its preprocessing, its sizes, its graphs."""

    family: str
    """Architecture, such as "sam2"."""
    input_size_hw: tuple[int, int]
    """Every picture is stretched to this size; prompts are scaled alike."""
    resampler: str
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    mask_size_hw: tuple[int, int]
    """Size of the mask logits that the decoder gives."""
    graphs: SegmenterGraphs

    def __post_init__(self) -> None:
        _require_positive(self, "input_size_hw", "mask_size_hw", "image_std")
        _require_known("segmenter.family", self.family, SEGMENTER_FAMILIES)
        _require_known("segmenter.resampler", self.resampler, RESAMPLERS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Everything that the runtime knows about a bundle; nothing is guessed from file names."""

    name: str
    created_by: str
    """Program and version that wrote the bundle."""
    answer_format: str
    """Default `AnswerFormat`; `--format` overrides it."""
    policy: PolicyManifest
    segmenter: SegmenterManifest
    tokenizer: str
    """Path of `tokenizer.json` inside the bundle."""
    gates: Mapping[str, Any] = field(default_factory=dict)
    """What the export measured against PyTorch: gate name to figures."""
    memory_bytes: Mapping[str, int] = field(default_factory=dict)
    """Measured need of the runtime, such as {"cpu_peak": 130000000}."""
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    """Every file but the manifest: relative POSIX path to size and hash."""
    engines: tuple[EngineRecord, ...] = field(default=(), metadata=LATER)
    """What `segzero build` made of the graphs."""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise BundleError(version_message(self.format_version))
        for path in (*self.files, *self.required_files):
            check_relative_path(path)
        for engine in self.engines:
            if engine.file not in self.files or engine.graph not in self.files:
                raise BundleError(f"manifest.json: engines: expected {engine.file} and {engine.graph} among the files")
        folded = {path.casefold() for path in self.files}
        if len(folded) != len(self.files):
            raise BundleError("manifest.json: two files have names that differ only in case")

    @property
    def required_files(self) -> tuple[str, ...]:
        """Paths that the runtime opens by their role."""
        graphs = (self.policy.graphs, self.segmenter.graphs)
        paths = (getattr(g, f.name) for g in graphs for f in dataclasses.fields(g))
        return (self.tokenizer, *(path for path in paths if path is not None))

    def to_json(self) -> str:
        """The text of `manifest.json`, digest included."""
        document = dataclasses.asdict(self)
        document["digest"] = _digest(document)
        return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read `manifest.json`.

        Raises:
            BundleError: not JSON, another version, a field missing, unknown, of the wrong type or out of range, or the
                digest differs.
        """
        try:
            document = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"manifest.json: expected JSON, got {str(error)[:100]}; fetch it again") from error
        if not isinstance(document, dict):
            raise BundleError(f"manifest.json: expected an object, got {type(document).__name__}")
        if document.get("format_version") != FORMAT_VERSION:
            raise BundleError(version_message(document.get("format_version")))
        digest = document.pop("digest", None)
        if digest != _digest(document):
            raise BundleError("manifest.json: its digest differs, so it was changed or damaged; fetch the bundle again")
        return _decode(cls, document, "manifest.json")


def version_message(found: object) -> str:
    """One line that names both versions."""
    return (
        f"manifest.json: expected format_version {FORMAT_VERSION}, got {str(found)[:40]}; "
        "export the bundle again, or install the segzero-rt that wrote it"
    )


def check_relative_path(path: str) -> None:
    """Raise unless `path` is a plain relative POSIX path below the bundle's folder.

    Raises:
        BundleError: empty, absolute, with "..", ".", a backslash, a drive, a NUL or an empty component.
    """
    parts = path.split("/")
    hostile = any(part in ("", ".", "..") or part != part.strip() for part in parts) or set(path) & set("\\:\0")
    if hostile or PurePosixPath(path).is_absolute() or not path.isprintable() or path.casefold() == MANIFEST_NAME:
        raise BundleError(f"manifest.json: expected a relative path inside the bundle, got {path[:80]!r}")


def _digest(document: Mapping[str, Any]) -> str:
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return document


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _decode(cls: type[T], value: object, where: str) -> T:
    """Build the dataclass `cls` from a JSON object, refusing unknown, missing and mistyped fields."""
    if not isinstance(value, dict):
        raise BundleError(f"{where}: expected an object, got {type(value).__name__}")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]  # every `cls` here is a dataclass
    if unknown := sorted(set(value) - set(known)):
        raise BundleError(f"{where}: unknown field {str(unknown[0])[:60]!r}; a newer segzero-rt may know it")
    if missing := sorted(name for name in set(known) - set(value) if known[name].metadata != LATER):
        raise BundleError(f"{where}: expected the field {missing[0]!r}, which is missing")
    return cls(**{name: _convert(hints[name], value[name], f"{where}: {name}") for name in known if name in value})


def _convert(hint: Any, value: object, where: str) -> Any:
    """`value` as the type `hint`; JSON arrays become tuples."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _convert(next(a for a in arguments if a is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        return _decode(typing.cast("type[Any]", hint), value, where)
    if origin is tuple and isinstance(value, list):
        of = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(of) == len(value):
            return tuple(_convert(h, v, where) for h, v in zip(of, value, strict=True))
    if origin is Mapping and isinstance(value, dict):
        return {key: _convert(arguments[1], item, f"{where}[{key[:60]!r}]") for key, item in value.items()}
    if hint is Any:
        return value
    if hint is float and type(value) is int:
        value = float(value)
    if origin is None and type(value) is hint and (not isinstance(value, float) or math.isfinite(value)):
        return value
    raise BundleError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {str(value)[:60]}")


def _require_positive(manifest: object, *names: str) -> None:
    for name in names:
        value = getattr(manifest, name)
        if any(number <= 0 for number in (value if isinstance(value, tuple) else (value,))):
            raise BundleError(f"manifest.json: {name}: expected more than 0, got {value}")


def _require_known(field_name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise BundleError(
            f"manifest.json: {field_name}: expected one of {', '.join(known)}, got {value[:40]!r}; "
            "a newer segzero-rt may know it"
        )

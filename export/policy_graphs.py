"""Writes the three graphs of a policy and their weights: planned first without reading any, then tensor by tensor."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from segzero_rt.errors import ExportError

from .disk import DiskFullError, readable
from .graph_builder import FLOAT4_OPSET, OPSET, GraphBuilder
from .messages import WrittenBytes
from .nvfp4 import Float4Store, dequantize_file
from .policy_checkpoint import PolicyCheckpoint
from .policy_decoder import build_decoder
from .policy_embedding import TABLE_FILE, build_embedding, write_token_table
from .policy_vision import build_vision
from .precisions import NVFP4
from .qdq import CODES, QdqStore, Reach, in_8_bits, quantize_file, scale_dtype
from .weight_store import DryStore, FileStore, InlineStore, WeightStore

EXTERNAL_FROM_BYTES = 1 << 30
"""Weights of more lie in files beside the graphs: an ONNX file ends at 2 GB."""

GRAPHS = ("embedding", "vision", "decoder")

_OF_3B_TOWER, _OF_3B_TEXT = (32, 1280), 2048
"""Depth and width of Qwen2.5-VL's vision tower, and the text width by which the 3B model's is told from others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """How weights are stored, what is computed in, and what is excepted from that."""

    storage: str = "float16"
    """Of the weights in the files, one of `POLICY_STORAGES`."""
    computed: str = "float32"
    """Of products and attention; other than float32 for flavour "portable" and weights stored alike."""
    float32_products: tuple[str, ...] = ()
    """Paths of products, such as "vision/blocks.31/down", that stay in float32 in a graph of 16 bits."""

    codes: str = ""
    """What products are rounded to by plain operators, beside all that: "int8", "fp8", "nvfp4" or nothing."""

    def opset(self, graph: str) -> int:
        """The least that one graph, "vision" or "decoder", is to be written in."""
        if self.codes == NVFP4:
            return FLOAT4_OPSET if graph == "decoder" else OPSET
        return CODES[self.codes].opset if self.codes else OPSET

    def of(self, graph: str) -> tuple[str, ...]:
        """The excepted products of one graph, without its name."""
        return tuple(path.partition("/")[2] for path in self.float32_products if path.partition("/")[0] == graph)


def float32_by_rule(checkpoint: PolicyCheckpoint) -> tuple[str, ...]:
    """Products that are known to leave float16's range: the last `down` of the vision tower of Qwen2.5-VL-3B.

    TensorRT-Edge-LLM's exporter kept the same product in float32 up to release 0.5.
    """
    vision = checkpoint.vision
    if (vision.depth, vision.hidden_size) == _OF_3B_TOWER and checkpoint.text.hidden_size == _OF_3B_TEXT:
        return (f"vision/blocks.{vision.depth - 1}/down",)
    return ()


class PolicyGraphWriter:
    """The graphs of one checkpoint on their way into `folder`. Call `plan`, then `write`.

    Args:
        reach: of the inputs of products, by their paths ("decoder/layers.0/qkv"): those products are rounded
            by plain operators (see `qdq`), where flavour "ort" has operators of its own for that. Of no use to nvfp4.
    """

    def __init__(
        self,
        checkpoint: PolicyCheckpoint,
        folder: Path,
        precision: Precision,
        *,
        flavour: str,
        input_size_hw: tuple[int, int],
        max_length: int | None = None,
        reach: Mapping[str, Reach] | None = None,
    ) -> None:
        self.folder = folder
        self.precision = precision
        self.lossless = True
        """False once a weight was rounded to be stored."""
        self.resumed = 0
        """Weights that an earlier, killed export had written."""
        self.builders: dict[str, GraphBuilder] = {}
        self._checkpoint = checkpoint
        self._flavour = flavour
        self._input_size_hw = input_size_hw
        self._max_length = max_length
        self._reach = dict(reach or {})
        self._external = False
        self._planned_bytes = 0

    @property
    def file_names(self) -> tuple[str, ...]:
        """All files in `folder` that belong to the bundle."""
        beside = [path for path in (self.folder / f"{name}.data" for name in GRAPHS) if path.is_file()]
        data = [path.name for path in beside if path.stat().st_size]  # none where all weights are small
        return (*(f"{name}.onnx" for name in GRAPHS), *data, TABLE_FILE)

    def plan(self, external: bool | None = None, *, check_room: bool = True) -> None:
        """Goes through all graphs without reading a weight.

        Args:
            external: keep weights in files of their own; by default where they are too many for one.
            check_room: compare what they need with what is free.

        Raises:
            ExportError: a weight is missing, superfluous or of another shape, or the disk has not the room.
        """
        stores = [DryStore() for _ in GRAPHS]
        self._write_table(stores[0])
        for name, store in zip(("vision", "decoder"), stores[1:], strict=True):
            self._check_products(name, self._build(name, store).products)
        self._checkpoint.check_nothing_is_left()
        needed = sum(store.num_bytes for store in stores)
        self._planned_bytes = needed
        self._external = needed > EXTERNAL_FROM_BYTES if external is None else external
        missing = needed - sum(path.stat().st_size for path in self.folder.iterdir())
        free = shutil.disk_usage(self.folder).free
        if check_room and missing > free:
            raise DiskFullError(
                f"expected {readable(missing)} of room in {self.folder.parent.parent} for the policy's graphs, got "
                f"{readable(free)}; free some, or store fewer bits"
            )

    def write(self) -> None:
        """Writes all files, reading each weight once.

        Raises:
            ExportError: a weight is not finite or does not fit its precision, or the disk is full.
        """
        with WrittenBytes(self._planned_bytes, "weights") as progress:
            self._write(progress.add)

    def _write(self, on_added: Callable[[int], None]) -> None:
        store: WeightStore = self._file_store(TABLE_FILE, whole_file=True)
        store.on_added = on_added
        self.lossless = self._write_table(store).lossless
        self.builders["embedding"] = build_embedding(self._checkpoint, storage=self.precision.storage)
        self.builders["embedding"].save(self.folder / "embedding.onnx")
        for name in ("vision", "decoder"):
            if self._external:
                store = self._file_store(f"{name}.data")
            else:
                (self.folder / f"{name}.data").unlink(missing_ok=True)  # of a killed export with other options
                store = InlineStore()
            store.on_added = on_added
            builder = self._build(name, store)
            builder.save(self.folder / f"{name}.onnx")
            if self._reach:
                codes = CODES[self.precision.codes]
                quantize_file(
                    self.folder / f"{name}.onnx", self._reach_of(name), computed=self.precision.computed, codes=codes
                )
            elif self._is_float4(name):
                dequantize_file(self.folder / f"{name}.onnx", self.precision.computed)
            self.lossless = self.lossless and builder.lossless
            self.builders[name] = builder

    def _check_products(self, graph: str, products: set[str]) -> None:
        unknown = sorted(set(self.precision.of(graph)) - products)
        if unknown:
            raise ExportError(f"expected a product of the {graph} graph to keep in float32, got {graph}/{unknown[0]}")

    def _write_table(self, store: WeightStore) -> WeightStore:
        return write_token_table(self._checkpoint, self.folder, storage=self.precision.storage, store=store)

    def _reach_of(self, graph: str) -> dict[str, Reach]:
        """Ranges of one graph's products that are rounded, without its name."""
        paths = {path.partition("/")[2]: reach for path, reach in self._reach.items() if path.startswith(f"{graph}/")}
        excepted = self.precision.of(graph)
        return {path: reach for path, reach in paths.items() if in_8_bits(path) and path not in excepted}

    def _build(self, name: str, store: WeightStore) -> GraphBuilder:
        computed = self.precision.computed
        if self._reach:
            codes = CODES[self.precision.codes]
            store = QdqStore(store, self._reach_of(name), codes, scale_dtype(codes, computed))
        elif self._is_float4(name):
            store = Float4Store(store, self.precision.of(name), computed)
        options = {
            "flavour": self._flavour,
            "storage": self.precision.storage,
            "computed": computed,
            "float32_products": self.precision.of(name),
            "store": store,
            "opset": self.precision.opset(name),
        }
        if name == "vision":
            return build_vision(self._checkpoint, input_size_hw=self._input_size_hw, **options)  # type: ignore[arg-type]
        return build_decoder(self._checkpoint, max_length=self._max_length, **options)  # type: ignore[arg-type]

    def _is_float4(self, graph: str) -> bool:
        return self.precision.codes == NVFP4 and graph == "decoder"

    def _file_store(self, name: str, *, whole_file: bool = False) -> FileStore:
        options = f"{self.precision} {self._flavour} {self._input_size_hw}"
        codes = hashlib.sha256(b"".join(path.encode() + reach.key() for path, reach in sorted(self._reach.items())))
        quantized = f" {codes.hexdigest()}" if self._reach else ""
        fingerprint = f"{self._checkpoint.fingerprint()} {options}{quantized}"
        try:
            store = FileStore(self.folder / name, fingerprint, whole_file=whole_file)
        except OSError as error:
            raise ExportError(f"expected to write {self.folder / name}, got: {error}") from error
        self.resumed += store.resumed
        return store

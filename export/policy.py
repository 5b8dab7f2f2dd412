"""A policy checkpoint to the three graphs and the manifest section of a bundle."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from segzero_rt.chat import Chat
from segzero_rt.errors import BundleError, ExportError
from segzero_rt.graph import Graph
from segzero_rt.manifest import PolicyGraphs, PolicyManifest
from segzero_rt.operators.library import resolve_operators
from segzero_rt.policy import Policy
from segzero_rt.positions import VISION_ROPE_THETA

from .awq import awq_checkpoint
from .calibration import Calibration, Question, calibrate, questions_of
from .gate import QUESTIONS, GateLimits, default_limits, gate_policy, plain_pictures
from .gate_layers import check_float16_range, gate_policy_layers
from .graph_builder import check_precision
from .messages import say
from .nvfp4 import EMULATED, decoded
from .operators import uses_operators
from .policy_checkpoint import PolicyCheckpoint
from .policy_decoder import cache_dtype
from .policy_graphs import PolicyGraphWriter, Precision, float32_by_rule
from .precisions import EXPLICIT_STORAGES, INT4_METHODS, NVFP4
from .qdq import CODES, Reach, emulation
from .sources import TOKENIZER_FILE, check_policy
from .static_int8 import make_decoder_static

LAYERS_FROM_PARAMETERS = 500_000_000
"""Twice 2 GB of float32, in PyTorch and in ONNX Runtime: beyond this the gate takes one layer at a time."""

REPLY_TOKENS = 64
"""Longest reply that gates and calibrations wait for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyExport:
    """What `export_policy` wrote."""

    manifest: PolicyManifest
    tokenizer: str
    files: dict[str, Path]
    """Path inside the bundle to the file that was written."""
    gate: dict[str, Any]
    """Figures of `gate_policy` or `gate_policy_layers`."""


def export_policy(
    hf_folder: Path,
    out_dir: Path,
    *,
    adapter: Path | None = None,
    input_size_hw: tuple[int, int] = (840, 840),
    flavour: str = "ort",
    storage: str = "float16",
    computed: str = "float32",
    float32_products: Sequence[str] = (),
    resampler: str = "pillow_bilinear",
    max_length: int = 4096,
    max_new_tokens: int = 512,
    answer_format: str = "vision_reasoner",
    external: bool | None = None,
    gate_layers: bool | None = None,
    gate_pictures: Sequence[NDArray[np.uint8]] = (),
    gate_questions: Sequence[str] = QUESTIONS,
    gate_limits: GateLimits | None = None,
    int4_method: str = "rtn",
    calibration: Sequence[Question] = (),
) -> PolicyExport:
    """Writes the graphs of a policy into `out_dir`, and compares them with PyTorch.

    What an earlier call for the same checkpoint and options left in `out_dir` when it was killed is taken up.

    Args:
        hf_folder: `config.json`, safetensors and `tokenizer.json`.
        adapter: a LoRA adapter in PEFT's layout, merged into the weights on the way.
        input_size_hw: size in pixels that pictures are resized to, in multiples of a token's side.
        flavour: of the decoder, one of `DECODER_FLAVOURS`.
        storage: precision of the weights in the files. Floats ("float16", "bfloat16", "float32") are computed in
            float32; "int8" is computed in int8, faster and less exact, in flavours other than "ort" by plain operators
            (see `qdq`), as "fp8" is; "int4" is the decoder's in 4 bits and the tower's in 8, for flavour "ort" alone;
            "nvfp4" is the decoder's in 4 bits (see `nvfp4`), all else float16, for the other flavours.
        computed: what graphs are computed in, for flavours other than "ort"; weights are stored alike.
        float32_products: products that stay in float32 in a graph of 16 bits, beside those of `float32_by_rule`.
        resampler: what training resized with.
        max_length: tokens of the cache, for prefix, picture, question and reply together.
        max_new_tokens: default budget of a reply.
        answer_format: whose prompts the gate asks with.
        external: keep weights in files beside the graphs; by default where they are more than `EXTERNAL_FROM_BYTES`.
        gate_layers: compare layer by layer, with one layer in memory at a time; by default for checkpoints of more than
            `LAYERS_FROM_PARAMETERS`. Otherwise whole replies are compared too.
        gate_pictures: uint8 [H, W, 3] of any size; some patches of colour by default.
        gate_questions: asked on each of them.
        gate_limits: what the export must reach; by default what its storage allows.
        int4_method: how the weights of storage "int4" get their 4 bits, one of `INT4_METHODS`.
        calibration: pictures with questions that ranges and scales are measured on; by default the gate's.

    Raises:
        ExportError: the checkpoint is incomplete, has a part that the graphs cannot express, does not fit on the disk,
            or the gate failed.
    """
    checkpoint, precision = open_policy(
        hf_folder,
        adapter=adapter,
        input_size_hw=input_size_hw,
        flavour=flavour,
        storage=storage,
        computed=computed,
        float32_products=float32_products,
        int4_method=int4_method,
    )
    tokenizer = hf_folder / TOKENIZER_FILE
    max_length = min(max_length, checkpoint.text.max_position_embeddings)
    export = _Export(
        checkpoint=checkpoint,
        hf_folder=hf_folder,
        adapter=adapter,
        folder=out_dir / "policy",
        manifest=_manifest(checkpoint, input_size_hw, flavour, resampler, max_length, max_new_tokens, computed),
        precision=precision,
        storage=storage,
        int4_method=int4_method,
        external=external,
        layered=checkpoint.num_parameters > LAYERS_FROM_PARAMETERS if gate_layers is None else gate_layers,
        answer_format=answer_format,
        pictures=gate_pictures or plain_pictures(),
        questions=gate_questions,
        calibration=calibration,
    )
    export.folder.mkdir(parents=True, exist_ok=True)
    graphs = export.planned()
    graphs.write()
    if graphs.resumed:
        say(f"policy: {graphs.resumed} weights were whole from an earlier export")
    shutil.copyfile(tokenizer, export.folder / "tokenizer.json")
    limits = gate_limits or default_limits(storage, lossless=graphs.lossless, computed=computed)
    return PolicyExport(
        manifest=export.manifest,
        tokenizer="policy/tokenizer.json",
        files={f"policy/{name}": export.folder / name for name in (*graphs.file_names, "tokenizer.json")},
        gate=export.gated(graphs, limits) | export.remarks(),
    )


def open_policy(
    hf_folder: Path,
    *,
    adapter: Path | None,
    input_size_hw: tuple[int, int],
    flavour: str,
    storage: str,
    computed: str,
    float32_products: Sequence[str],
    int4_method: str,
) -> tuple[PolicyCheckpoint, Precision]:
    """What `export_policy` begins with, within seconds: the checkpoint, of which headers alone are read.

    Raises:
        ExportError: it is incomplete, or no graph of it can be what is asked for.
    """
    check_policy(hf_folder)
    checkpoint = PolicyCheckpoint(hf_folder, adapter)
    _check(checkpoint, input_size_hw, float32_products, computed)
    _check_tokenizer(checkpoint)
    return checkpoint, _precision(checkpoint, flavour, storage, computed, float32_products, int4_method)


def plan_policy(hf_folder: Path, out_dir: Path, *, max_length: int, **options: Any) -> None:
    """What `export_policy` does before it reads a weight: every name and shape, and the room on the disk.

    Args:
        out_dir: where the graphs will be; its folder "policy" is made.
        max_length: as `export_policy` takes it.
        options: as `open_policy` takes them.

    Raises:
        ExportError: a weight is missing, superfluous or of another shape, or the disk has not the room.
    """
    checkpoint, precision = open_policy(hf_folder, **options)
    folder = out_dir / "policy"
    folder.mkdir(parents=True, exist_ok=True)
    flavour, size_hw = options["flavour"], options["input_size_hw"]
    graphs = PolicyGraphWriter(
        checkpoint, folder, precision, flavour=flavour, input_size_hw=size_hw, max_length=max_length
    )
    graphs.plan(check_room=not precision.codes)  # codes take less room than the floats that these graphs have


@dataclass(frozen=True, kw_only=True, slots=True)
class _Export:
    """One call of `export_policy`, its arguments checked."""

    checkpoint: PolicyCheckpoint
    hf_folder: Path
    adapter: Path | None
    folder: Path
    manifest: PolicyManifest
    precision: Precision
    storage: str
    int4_method: str
    external: bool | None
    layered: bool
    answer_format: str
    pictures: Sequence[NDArray[np.uint8]]
    questions: Sequence[str]
    calibration: Sequence[Question]

    @property
    def reply_tokens(self) -> int:
        """Of a reply that gates and calibrations wait for, at most."""
        return min(self.manifest.max_new_tokens, REPLY_TOKENS)

    def planned(self) -> PolicyGraphWriter:
        """The graphs, ready to be written: the disk has room, and what their rounding needs is measured."""
        measured, scaled = self.precision.codes in CODES, self.int4_method == "awq"
        graphs = self._writer(self.checkpoint)
        if not measured:  # before anything is; codes take less room than these would
            graphs.plan(self.external)
        narrow = self.precision.computed == "float16" and not self.layered  # the gate by layers checks ranges itself
        if not (measured or scaled or narrow):
            return graphs
        found = self._calibrated(keep_rows=scaled)
        if self.precision.computed == "float16":
            check_float16_range(found.largest, self.precision.float32_products)
        if measured:
            smoothing = CODES[self.precision.codes].smoothing
            reach = {product: Reach.of(one.largest, smoothing) for product, one in found.held.items()}
            graphs = self._writer(self.checkpoint, reach)
        elif scaled:
            graphs = self._writer(awq_checkpoint(self.checkpoint, found.held))
        graphs.plan(self.external)
        return graphs

    def gated(self, graphs: PolicyGraphWriter, limits: GateLimits) -> dict[str, Any]:
        """Compares the written graphs with PyTorch."""
        say(f"policy: comparing with PyTorch{', layer by layer' if self.layered else ''}")
        if self.layered:
            return gate_policy_layers(self.checkpoint, self.manifest, graphs, limits=limits)
        if self.storage == "int8" and not self.precision.codes:
            self._give_ranges()
        with self._runnable() as decoder:
            files = {name: self.folder / f"{name}.onnx" for name in ("vision", "embedding")} | {"decoder": decoder}
            policy = Policy.from_files(
                self.manifest,
                files,
                self.folder / "tokenizer.json",
                answer_format=self.answer_format,
                backend="cpu",
            )
        return gate_policy(
            self.hf_folder,
            policy,
            pictures=self.pictures,
            questions=self.questions,
            limits=limits,
            max_new_tokens=self.reply_tokens,
            adapter=self.adapter,
            towers=self._towers(files["vision"], policy),
        )

    def _towers(self, path: Path, policy: Policy) -> list[Graph]:
        """The vision graph without compiled operators, as other processors run it, where the gated one has some."""
        if resolve_operators().path is None or not uses_operators(path):
            return []
        return [Graph.load(path, policy.vision.spec, backend="cpu", operators=False)]

    def remarks(self) -> dict[str, str]:
        """What the manifest says of the gate beside its figures."""
        if self.storage == "int4":
            return {"int4_method": self.int4_method}
        return {"emulated": EMULATED} if self.precision.codes == NVFP4 else emulation(self.precision.codes)

    def _writer(self, checkpoint: PolicyCheckpoint, reach: dict[str, Reach] | None = None) -> PolicyGraphWriter:
        return PolicyGraphWriter(
            checkpoint,
            self.folder,
            self.precision,
            flavour=self.manifest.flavour,
            input_size_hw=self.manifest.input_size_hw,
            max_length=self.manifest.max_length,
            reach=reach,
        )

    def _calibrated(self, *, keep_rows: bool) -> Calibration:
        say("policy: measuring activations in PyTorch")
        return calibrate(
            self.checkpoint,
            self.manifest,
            questions=self.calibration or questions_of(self.pictures, self.questions),
            answer_format=self.answer_format,
            max_new_tokens=0 if self.layered else self.reply_tokens,
            adapter=self.adapter,
            keep_rows=keep_rows,
        )

    def _give_ranges(self) -> None:
        """Writes ranges into ONNX Runtime's own int8 decoder, so that guessed tokens change no numbers."""
        make_decoder_static(
            self.checkpoint,
            self.manifest,
            self.folder,
            answer_format=self.answer_format,
            pictures=self.pictures,
            questions=self.questions,
            max_new_tokens=self.reply_tokens,
        )

    @contextmanager
    def _runnable(self) -> Iterator[Path]:
        """The decoder's graph, or while it is loaded a twin of it that a CPU can run."""
        path = self.folder / "decoder.onnx"
        if self.precision.codes != NVFP4:
            yield path
            return
        twin = self.folder / "decoder.twin.onnx"
        try:
            twin.write_bytes(decoded(onnx.load(str(path), load_external_data=False), self.folder).SerializeToString())
            yield twin
        finally:
            twin.unlink(missing_ok=True)


def _check(
    checkpoint: PolicyCheckpoint, input_size_hw: tuple[int, int], float32_products: Sequence[str], computed: str
) -> None:
    """Refuses what no graph of this checkpoint can be, before anything is read."""
    if checkpoint.vision.rope_theta != VISION_ROPE_THETA:
        raise ExportError(f"expected a vision rope_theta of {VISION_ROPE_THETA}, got {checkpoint.vision.rope_theta}")
    cell = checkpoint.vision.patch_size * checkpoint.vision.merge_size
    if any(length % cell for length in input_size_hw):
        raise ExportError(
            f"expected an input size in multiples of {cell} pixels for {checkpoint.family}, got {input_size_hw}; take "
            "the preset of that family, or another --input-size"
        )
    if strangers := [path for path in float32_products if path.partition("/")[0] not in ("vision", "decoder")]:
        raise ExportError(f"expected a product as vision/blocks.31/down, got {strangers[0]!r}")
    if float32_products and computed == "float32":
        raise ExportError("expected a graph computed in float16 to keep products of it in float32, got float32")


def _check_tokenizer(checkpoint: PolicyCheckpoint) -> None:
    """Refuses a tokenizer of another model: its numbers would be other words'."""
    path = checkpoint.folder / TOKENIZER_FILE
    try:
        chat = Chat(path)
    except BundleError as error:
        raise ExportError(f"{error}; copy {TOKENIZER_FILE} from the base model") from error
    expected = checkpoint.image_token_id, checkpoint.text.vocab_size
    if chat.image_token_id != expected[0] or chat.vocab_size > expected[1]:
        raise ExportError(
            f"expected a tokenizer with <|image_pad|> as token {expected[0]} and at most {expected[1]} tokens, got "
            f"{chat.image_token_id} and {chat.vocab_size} in {path}; copy {TOKENIZER_FILE} from the base model"
        )
    strange = [token for token in checkpoint.eos_token_ids if not 0 <= token < expected[1]]
    if strange or not checkpoint.eos_token_ids:
        raise ExportError(
            f"expected eos_token_id below {expected[1]} in {checkpoint.folder}, got {strange or 'none'}; copy "
            "generation_config.json from the base model"
        )


def _precision(
    checkpoint: PolicyCheckpoint,
    flavour: str,
    storage: str,
    computed: str,
    float32_products: Sequence[str],
    int4_method: str,
) -> Precision:
    """What the graphs are stored and computed in."""
    if int4_method not in INT4_METHODS:
        raise ExportError(f"expected 4 bits by {' or '.join(INT4_METHODS)}, got {int4_method!r}")
    if int4_method != "rtn" and storage != "int4":
        raise ExportError(f"expected storage int4 for 4 bits by {int4_method}, got {storage}")
    explicit = storage in ("int8", *EXPLICIT_STORAGES) and flavour != "ort"
    by_rule = float32_by_rule(checkpoint) if computed != "float32" else ()
    precision = Precision(
        storage="float16" if explicit else storage,
        computed=computed,
        float32_products=(*by_rule, *float32_products),
        codes=storage if explicit else "",
    )
    check_precision(precision.storage, computed, fused=flavour == "ort")
    return precision


def _manifest(
    checkpoint: PolicyCheckpoint,
    input_size_hw: tuple[int, int],
    flavour: str,
    resampler: str,
    max_length: int,
    max_new_tokens: int,
    computed: str,
) -> PolicyManifest:
    vision, text = checkpoint.vision, checkpoint.text
    return PolicyManifest(
        family=checkpoint.family,
        flavour=flavour,
        input_size_hw=input_size_hw,
        resampler=resampler,
        image_mean=vision.image_mean,
        image_std=vision.image_std,
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.merge_size,
        window_size=vision.window_size,
        vision_head_dim=vision.head_dim,
        num_layers=text.num_layers,
        num_heads=text.num_heads,
        num_kv_heads=text.num_kv_heads,
        head_dim=text.head_dim,
        hidden_size=text.hidden_size,
        rope_theta=text.rope_theta,
        mrope_section=text.mrope_section,
        vocab_size=text.vocab_size,
        eos_token_ids=checkpoint.eos_token_ids,
        image_token_id=checkpoint.image_token_id,
        max_length=max_length,
        max_new_tokens=max_new_tokens,
        graphs=PolicyGraphs(
            vision="policy/vision.onnx", embedding="policy/embedding.onnx", decoder="policy/decoder.onnx"
        ),
        cache_dtype=cache_dtype(computed),
        mrope_interleaved=text.mrope_interleaved,
        deepstack=len(vision.deepstack_blocks),
        position_side=vision.position_side,
        coordinates=text.coordinates,
    )

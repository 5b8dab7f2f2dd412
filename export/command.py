"""`segzero export`: checkpoints to a bundle, gated against PyTorch, written whole or not at all."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segzero_rt import __version__
from segzero_rt.answer_format import FORMATS
from segzero_rt.bundle import Bundle, check_target, write_bundle
from segzero_rt.commands.options import positive_integer
from segzero_rt.commands.output import print_document
from segzero_rt.errors import ExportError
from segzero_rt.graph_spec import DECODER_FLAVOURS
from segzero_rt.manifest import QUALITY_GATE, Manifest
from segzero_rt.preflight.memory_plan import plan_memory
from segzero_rt.resampling import RESAMPLERS

from .messages import quiet_libraries, say
from .precisions import COMPUTED, ENCODER_COMPUTED, INT4_METHODS, NVFP4, POLICY_STORAGES
from .sources import check_policy, check_segmenter
from .workplace import workplace

if TYPE_CHECKING:  # both import torch, which `--help` must not wait for
    from .policy import PolicyExport
    from .segmenter import SegmenterExport

NAME = "export"
HELP = "checkpoints to a bundle: ONNX graphs, gated against PyTorch"

_EPILOG = """examples:
  segzero export tabletop --policy runs/policy --segmenter runs/segmenter --out segzero_rt/bundles/tabletop --overwrite
  segzero export tabletop --policy runs/policy --base segzero_rt/bundles/tabletop --out runs/next-bundle
  segzero export vision-reasoner --policy VisionReasoner-7B --segmenter sam2.1-hiera-large --out bundles/vr-7b
  segzero export vision-reasoner --policy VisionReasoner-7B --segmenter sam2.1_hiera_large.pt --out bundles/vr-7b
  segzero export qwen3-vl --policy Qwen3-VL-4B-Instruct --segmenter sam2.1-hiera-large --storage int4 --out bundles/q3
  segzero export tabletop --policy runs/policy --segmenter runs/segmenter --storage int8 --gate-dataset scenes --out b

Checkpoints are folders as transformers saves them; SAM 2's may be a file of its own package, which is recognised by
its shapes and never unpickled as code. Every export compares its graphs with PyTorch on a few pictures:
--gate-images, by default patches of colour. What the stored weights cost in gIoU is measured with --gate-dataset;
without it the manifest says that this gate was not run.
exit status: 0 written, 2 a checkpoint cannot be exported or a gate failed; nothing is written then"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """What a family of checkpoints was trained with, and how it is stored."""

    name: str
    input_size_hw: tuple[int, int]
    """Pictures are resized to this, without keeping their aspect."""
    resampler: str
    answer_format: str
    max_length: int
    """Tokens of prompt, picture and reply."""
    max_new_tokens: int
    flavour: str = "ort"
    storage: str = "float16"
    """Weights in the files: floats are computed in float32, "int8" in int8 where that is faster; "int4" is the policy's
    decoder in 4 bits and all else as "int8"; "fp8" and "nvfp4" are the policy's alone, for TensorRT."""
    computed: str = "float32"
    """What a portable policy's graphs are computed in."""
    mask_prompts: bool = True
    """The segmenter learnt to take masks in as prompts."""

    def __post_init__(self) -> None:
        if self.answer_format not in FORMATS or self.resampler not in RESAMPLERS:
            raise ValueError(f"expected a known format and resampler, got {self.answer_format}, {self.resampler}")


def tabletop() -> Preset:
    """The pair that this repository trains."""
    return Preset(
        name="tabletop",
        input_size_hw=(280, 280),
        resampler="pillow_bilinear",
        answer_format="vision_reasoner",
        max_length=1024,
        max_new_tokens=192,
        mask_prompts=False,
    )


def vision_reasoner() -> Preset:
    """VisionReasoner-7B and its kin: 840 x 840 pixels, resized with Pillow's bilinear filter."""
    return Preset(
        name="vision-reasoner",
        input_size_hw=(840, 840),
        resampler="pillow_bilinear",
        answer_format="vision_reasoner",
        max_length=4096,
        max_new_tokens=1024,
    )


def seg_zero() -> Preset:
    """Seg-Zero-7B: as VisionReasoner, with its own prompt and one object."""
    return replace(vision_reasoner(), name="seg-zero", answer_format="seg_zero")


def qwen3_vl() -> Preset:
    """Qwen3-VL as published, asked as VisionReasoner is: 900 tokens a picture, as in 840 x 840 pixels of Qwen2.5-VL."""
    return replace(vision_reasoner(), name="qwen3-vl", input_size_hw=(960, 960), resampler="pillow_bicubic")


TRIAL_SHARE = 0.9
"""Of the free memory that a bundle's plan may fill for its trial run: other programs take some meanwhile."""
_SEGMENTER_STORAGE = {"int4": "int8", "bfloat16": "float16", "fp8": "float16", NVFP4: "float16"}
"""The segmenter is small and draws edges: it has no weights of 4 bits, and floats of 8 bits move its masks too far (see
README.md). Nor are SAM 2's checkpoints bfloat16."""

PRESETS = {"tabletop": tabletop, "vision-reasoner": vision_reasoner, "seg-zero": seg_zero, "qwen3-vl": qwen3_vl}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("preset", choices=tuple(PRESETS), help="the family that the policy belongs to")
    parser.add_argument("--policy", type=Path, metavar="DIR", help="config.json, *.safetensors, tokenizer.json")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="a LoRA adapter of PEFT to merge into the policy")
    parser.add_argument(
        "--segmenter",
        type=Path,
        metavar="PATH",
        help="SAM 2 or EdgeTAM: a .pt, or a folder of config.json and *.safetensors",
    )
    parser.add_argument(
        "--segmenter-config",
        metavar="NAME",
        help="SAM 2's name of a .pt's size, as sam2.1_hiera_l (default: its shapes')",
    )
    parser.add_argument(
        "--segmenter-computed",
        choices=ENCODER_COMPUTED,
        default="float32",
        help="what the image encoder's products compute in: 16 bits are for GPUs, bfloat16 for them alone (float32)",
    )
    parser.add_argument(
        "--segmenter-float32",
        action="append",
        default=[],
        metavar="PRODUCT",
        help="keep this product of the image encoder in float32 all the same, as its gate asks for it; may repeat",
    )
    parser.add_argument("--base", type=Path, metavar="BUNDLE", help="take the part that is not given from this bundle")
    parser.add_argument("--out", type=Path, required=True, metavar="BUNDLE", help="where the bundle is written")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a bundle that is there, once the new is whole"
    )
    parser.add_argument("--name", help="name in the manifest (default: the preset's)")
    parser.add_argument("--format", choices=tuple(FORMATS), help="default answer format (default: the preset's)")
    parser.add_argument(
        "--flavour",
        choices=DECODER_FLAVOURS,
        help="operators: ort has ONNX Runtime's own, portable plain ones, trt11 those of TensorRT from 10.15 on",
    )
    parser.add_argument("--storage", choices=POLICY_STORAGES, help="weights in the files (default: the preset's)")
    parser.add_argument(
        "--int4-method",
        choices=INT4_METHODS,
        help="how weights of 4 bits are rounded: to nearest (rtn, the default), or scaled by activations before (awq)",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="DATASET",
        help="pictures and questions that ranges of codes and awq's scales are measured on (default: the gate's)",
    )
    parser.add_argument(
        "--calibration-count", type=positive_integer, default=24, metavar="N", help="at most N of its questions (24)"
    )
    parser.add_argument(
        "--computed", choices=COMPUTED, help="what a portable policy's graphs compute in (default: float32)"
    )
    parser.add_argument(
        "--float32-product",
        action="append",
        default=[],
        metavar="PATH",
        help="keep this product in float32 where all else is float16, as a gate asks for it; may be given repeatedly",
    )
    parser.add_argument(
        "--input-size",
        type=_size_hw,
        metavar="H,W",
        help="pixels that the policy's pictures are resized to, in multiples of a token's side (default: the preset's)",
    )
    parser.add_argument("--max-length", type=positive_integer, metavar="N", help="tokens of the KV cache")
    parser.add_argument("--gate-images", type=Path, metavar="DIR", help="pictures that the gates compare on")
    parser.add_argument("--gate-count", type=positive_integer, default=4, metavar="N", help="at most N of them (4)")
    parser.add_argument(
        "--gate-dataset",
        type=Path,
        metavar="DATASET",
        help="labelled questions, 200 or more: refuse the bundle when it loses more than 0.005 gIoU against PyTorch "
        "(0.02 with weights of 8 bits)",
    )
    parser.add_argument(
        "--no-trial",
        action="store_true",
        help="do not run the bundle once it is written; its need of memory stays unknown then",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def execute(arguments: argparse.Namespace) -> int:
    start = time.perf_counter()
    preset = _preset(arguments)
    check_target(arguments.out, overwrite=arguments.overwrite)
    base = Bundle.open(arguments.base) if arguments.base else None
    if (arguments.policy is None or arguments.segmenter is None) and base is None:
        raise ExportError("expected --policy and --segmenter, or --base with the part that is not given")
    if arguments.policy is None and arguments.segmenter is None:
        raise ExportError("expected --policy or --segmenter beside --base, got neither: there is nothing to export")
    if arguments.policy is not None:
        check_policy(arguments.policy)
    if arguments.segmenter is not None:
        check_segmenter(arguments.segmenter)
    if arguments.segmenter_config and arguments.segmenter is None:
        raise ExportError("expected --segmenter with --segmenter-config: what --base holds is taken as it is")
    if arguments.policy is None and (arguments.adapter or arguments.float32_product):
        raise ExportError("expected --policy with --adapter or --float32-product: --base is taken as it is")
    if arguments.segmenter_computed == "bfloat16" and not arguments.no_trial:
        raise ExportError("expected --no-trial with --segmenter-computed bfloat16: no CPU can run that encoder")
    if arguments.policy and preset.storage == NVFP4 and (arguments.gate_dataset or not arguments.no_trial):
        raise ExportError(
            f"expected --no-trial, and no --gate-dataset, with --storage {NVFP4}: no CPU can run that decoder"
        )
    if arguments.policy is None and (arguments.max_length or arguments.input_size):
        raise ExportError("expected --policy with --max-length or --input-size: what --base holds is taken as it is")
    if arguments.policy is None and arguments.int4_method:
        raise ExportError("expected --policy with --int4-method: what --base holds is taken as it is")
    if arguments.policy is None and arguments.calibration and (preset.storage != "int8" or preset.flavour == "ort"):
        raise ExportError(
            "expected --policy with --calibration, or a segmenter with --storage int8 in another flavour than ort"
        )
    pictures = _gate_pictures(arguments.gate_images, arguments.gate_count)
    calibration = _calibration(arguments.calibration, arguments.calibration_count) if arguments.calibration else []
    samples = _imported("gate_quality").read_gate_dataset(arguments.gate_dataset) if arguments.gate_dataset else []
    options = _policy_options(arguments, preset)
    if arguments.policy is not None:  # what cannot be exported is told before the work
        _imported("policy").open_policy(arguments.policy, **options)
    with quiet_libraries(), workplace(arguments.out, arguments.policy) as work:
        if arguments.policy is not None:
            _imported("policy").plan_policy(arguments.policy, work, max_length=preset.max_length, **options)
        # The segmenter first: a checkpoint that cannot be read shows within a minute, and a policy may take an hour.
        segmenter = _export_segmenter(arguments, work, preset, pictures, calibration) if arguments.segmenter else None
        policy = _export_policy(arguments, work, preset, options, pictures, calibration) if arguments.policy else None
        manifest, files = assemble(preset, arguments.name or preset.name, policy, segmenter, base)
        if arguments.format:
            manifest = replace(manifest, answer_format=arguments.format)
        trial = write_bundle(work / "trial", manifest, files, link_below=work)
        manifest = replace(
            manifest,
            memory_bytes={} if arguments.no_trial else _memory_bytes(trial),
            gates={**manifest.gates, QUALITY_GATE: _quality(trial, arguments, preset, samples)},
        )
        bundle = write_bundle(arguments.out, manifest, files, overwrite=arguments.overwrite, link_below=work)
    document = {
        "bundle": str(bundle.root),
        "name": manifest.name,
        "num_bytes": bundle.num_bytes,
        "gates": dict(manifest.gates),
        "memory_bytes": dict(manifest.memory_bytes),
        "seconds": round(time.perf_counter() - start, 1),
    }
    if arguments.json:
        print_document(document)
    else:
        for name, figures in manifest.gates.items():
            print(f"gate {name}: {json.dumps(figures)}")
        print(f"{bundle.root}: {bundle.num_bytes / 2**20:.1f} MiB, written in {document['seconds']} s")
    return 0


def assemble(
    preset: Preset,
    name: str,
    policy: PolicyExport | None,
    segmenter: SegmenterExport | None,
    base: Bundle | None,
) -> tuple[Manifest, dict[str, Path | bytes]]:
    """The manifest and the files of a bundle; a part that is None is taken from `base`, a policy with its format.

    Raises:
        ExportError: a part is missing in both.
    """
    if base is None and (policy is None or segmenter is None):
        raise ExportError("expected both parts, or a bundle to take the other from")
    files: dict[str, Path | bytes] = {}
    gates: dict[str, Any] = {}
    for part, folder in ((policy, "policy"), (segmenter, "segmenter")):
        if part is not None:
            files.update(part.files)
            gates[folder] = dict(part.gate)
        elif base is not None:
            files.update({path: base.file(path) for path in base.manifest.files if path.startswith(f"{folder}/")})
            gates[folder] = base.manifest.gates.get(folder, {})
    parts = base.manifest if base is not None else None
    manifest = Manifest(
        name=name,
        created_by=f"segzero-rt {__version__}",
        answer_format=preset.answer_format if policy is not None else parts.answer_format,  # type: ignore[union-attr]
        policy=policy.manifest if policy is not None else parts.policy,  # type: ignore[union-attr]
        segmenter=segmenter.manifest if segmenter is not None else parts.segmenter,  # type: ignore[union-attr]
        tokenizer=policy.tokenizer if policy is not None else parts.tokenizer,  # type: ignore[union-attr]
        gates=gates,
    )
    return manifest, files


def _preset(arguments: argparse.Namespace) -> Preset:
    given = {
        "answer_format": arguments.format,
        "input_size_hw": arguments.input_size,
        "flavour": arguments.flavour,
        "storage": arguments.storage,
        "computed": arguments.computed,
        "max_length": arguments.max_length,
    }
    return replace(PRESETS[arguments.preset](), **{name: value for name, value in given.items() if value is not None})


def _size_hw(text: str) -> tuple[int, int]:
    """An argparse type: two positive numbers with a comma between them."""
    numbers = [int(part) for part in text.split(",") if part.isascii() and part.isdigit()]
    if len(numbers) != 2 or text.count(",") != 1 or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"expected a height and a width in pixels, such as 560,840, got {text[:40]!r}")
    return numbers[0], numbers[1]


def _policy_options(arguments: argparse.Namespace, preset: Preset) -> dict[str, Any]:
    """What decides whether a policy can be exported at all."""
    return {
        "adapter": arguments.adapter,
        "input_size_hw": preset.input_size_hw,
        "flavour": preset.flavour,
        "storage": preset.storage,
        "computed": preset.computed,
        "float32_products": arguments.float32_product,
        "int4_method": arguments.int4_method or INT4_METHODS[0],
    }


def _export_policy(
    arguments: argparse.Namespace,
    work: Path,
    preset: Preset,
    options: dict[str, Any],
    pictures: list[Any],
    calibration: list[Any],
) -> PolicyExport:
    export_policy = _imported("policy").export_policy
    merged = f", with {arguments.adapter} merged into it" if arguments.adapter else ""
    say(f"policy: {arguments.policy}{merged}")
    exported: PolicyExport = export_policy(
        arguments.policy,
        work,
        **options,
        resampler=preset.resampler,
        max_length=preset.max_length,
        max_new_tokens=preset.max_new_tokens,
        answer_format=preset.answer_format,
        gate_pictures=pictures,
        calibration=calibration,
    )
    return exported


def _export_segmenter(
    arguments: argparse.Namespace, work: Path, preset: Preset, pictures: list[Any], calibration: list[Any]
) -> SegmenterExport:
    export_segmenter = _imported("segmenter").export_segmenter
    say(f"segmenter: {arguments.segmenter}")
    in_16_bits = arguments.segmenter_computed != "float32"
    exported: SegmenterExport = export_segmenter(
        arguments.segmenter,
        work,
        config=arguments.segmenter_config,
        storage="float16" if in_16_bits else _SEGMENTER_STORAGE.get(preset.storage, preset.storage),
        flavour="ort" if preset.flavour == "ort" else "portable",
        computed=arguments.segmenter_computed,
        float32_products=arguments.segmenter_float32,
        mask_prompts=preset.mask_prompts,
        pictures=pictures,
        calibration=[picture for picture, _ in calibration],
    )
    return exported


def _imported(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f".{module}", __package__)
    except ImportError as error:
        raise ExportError(f"expected PyTorch and its companions: {error}; install segzero-rt[export]") from error


def _gate_pictures(folder: Path | None, count: int) -> list[Any]:
    if folder is None:
        return []
    from segzero_rt.image import load_image

    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not paths:
        raise ExportError(f"--gate-images {folder}: expected PNG or JPEG pictures, got none there")
    return [load_image(path) for path in paths[:: max(1, len(paths) // count)][:count]]


def _calibration(dataset: Path, count: int) -> list[Any]:
    """Pictures with their questions, spread evenly over a data set."""
    from segzero_rt.dataset import read_dataset
    from segzero_rt.image import load_image

    samples = read_dataset(dataset)
    return [(load_image(one.image_path), one.text) for one in samples[:: max(1, len(samples) // count)][:count]]


def _quality(trial: Bundle, arguments: argparse.Namespace, preset: Preset, samples: list[Any]) -> dict[str, Any]:
    """The record of the quality gate: figures, or that it was not run."""
    quality = _imported("gate_quality")
    if not samples:
        return dict(quality.NOT_RUN)
    say(f"quality gate: {len(samples)} questions, against PyTorch")
    record: dict[str, Any] = quality.gate_quality(
        trial,
        samples,
        policy_folder=arguments.policy,
        adapter=arguments.adapter,
        segmenter_folder=arguments.segmenter,
        limit=quality.max_loss(preset.storage),
    )
    return record | {"dataset": quality.dataset_card(arguments.gate_dataset)}


def _memory_bytes(bundle: Bundle) -> dict[str, int]:
    """What the runtime needs: measured, or nothing where this machine has not the room for a run of the bundle."""
    needed, free = plan_memory(bundle).run_bytes, _available_bytes()
    if needed > TRIAL_SHARE * free:  # by the plan that the runtime itself goes by, which would refuse
        say(f"no trial: it is to take {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free")
        return {}
    say("trying the bundle in a process of its own")
    return {"cpu_peak": _peak_memory_bytes(bundle)}


def _available_bytes() -> float:
    """Free memory of this machine; no limit where the system does not tell."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text(encoding="ascii").splitlines() if meminfo.is_file() else []
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return kilobytes[0] * 1024 if kilobytes else math.inf


def _peak_memory_bytes(bundle: Bundle) -> int:
    """Runs the bundle in a fresh process, which also proves that it runs without PyTorch."""
    command = [sys.executable, "-m", "segzero_rt.cli", "doctor", str(bundle.root), "--backend", "cpu", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise ExportError(f"the bundle does not run: {' '.join(result.stderr.split())[-300:]}; nothing was written")
    return int(json.loads(result.stdout)["trial"]["peak_memory_bytes"])

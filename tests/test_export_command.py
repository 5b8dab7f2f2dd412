"""`segzero export`: a bundle that runs, or nothing at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from export import command
from export.command import PRESETS, assemble, tabletop
from segzero_rt.bundle import EMBEDDED, Bundle
from segzero_rt.cli import UsageError, make_parser
from segzero_rt.errors import BundleError, ExportError, SegZeroError
from segzero_rt.preflight.memory_plan import plan_memory

PUBLISHED = Path(__file__).resolve().parent.parent / "training/checkpoints/tabletop/policy"


@pytest.fixture
def export(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    def call(*arguments: object) -> dict[str, Any]:
        parsed = make_parser(command).parse_args([*map(str, arguments), "--json"])  # type: ignore[arg-type]
        capsys.readouterr()
        assert command.execute(parsed) == 0
        said = capsys.readouterr()
        assert [line for line in said.err.splitlines() if not line.startswith("export: ")] == []
        document: dict[str, Any] = json.loads(said.out.splitlines()[-1])
        return document

    return call


@pytest.mark.parametrize(("name", "share", "tried"), [("room enough", 1.2, True), ("a little too few", 1.05, False)])
def test_a_bundle_is_tried_where_the_runtime_would_find_room_for_it(
    name: str, share: float, tried: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the plan that the runtime goes by itself: it refused what was tried, and a whole export was lost."""
    bundle = Bundle.open(EMBEDDED)
    monkeypatch.setattr(command, "_available_bytes", lambda: share * plan_memory(bundle).run_bytes)
    found = command._memory_bytes(bundle)
    assert set(found) == ({"cpu_peak"} if tried else set())
    assert ("no trial" in capsys.readouterr().err) is not tried


@pytest.mark.slow
def test_checkpoints_become_a_bundle_and_a_part_of_it_can_be_replaced(
    export: Callable[..., dict[str, Any]], tiny_checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    policy, segmenter = tiny_checkpoints
    out = tmp_path / "bundle"
    document = export("tabletop", "--policy", policy, "--segmenter", segmenter, "--out", out, "--name", "first")
    bundle = Bundle.open(out)
    assert bundle.manifest.name == document["name"] == "first"
    assert bundle.manifest.policy.input_size_hw == tabletop().input_size_hw
    assert set(bundle.manifest.gates) == {"policy", "segmenter", "quality"}
    assert bundle.manifest.gates["quality"] == {"status": "not_run"}
    assert bundle.manifest.memory_bytes["cpu_peak"] > 10_000_000
    with pytest.raises(BundleError, match="overwrite"):
        export("tabletop", "--segmenter", segmenter, "--base", out, "--out", out)
    export("tabletop", "--segmenter", segmenter, "--base", out, "--out", out, "--overwrite", "--format", "seg_zero")
    replaced = Bundle.open(out)
    assert replaced.manifest.answer_format == "seg_zero"
    assert replaced.manifest.policy == bundle.manifest.policy
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--policy", "gone", "--segmenter", "gone"), "config.json"),
        (("--policy", "."), "--segmenter"),
        ((), "--policy and --segmenter"),
        (("--policy", str(PUBLISHED), "--segmenter", "."), "--segmenter .: expected a folder"),
        (("--policy", str(PUBLISHED), "--segmenter", str(PUBLISHED), "--gate-images", "."), "PNG or JPEG"),
        (("--base", "gone"), "gone"),
        (("--base", str(EMBEDDED)), "nothing to export"),
        (("--base", str(EMBEDDED), "--segmenter", "gone"), "--segmenter gone: expected a folder"),
        (("--base", str(EMBEDDED), "--segmenter", str(PUBLISHED), "--max-length", "9"), "expected --policy"),
        (("--base", str(EMBEDDED), "--segmenter", str(PUBLISHED), "--input-size", "28,28"), "or --input-size"),
        (("--base", str(EMBEDDED), "--policy", str(PUBLISHED), "--input-size", "280,290"), "multiples of 28 pixels"),
        (("--base", str(EMBEDDED), "--segmenter", str(PUBLISHED), "--int4-method", "awq"), "--policy with --int4"),
        (("--base", str(EMBEDDED), "--segmenter", str(PUBLISHED), "--calibration", "x"), "--policy with --calibration"),
        (("--base", str(EMBEDDED), "--segmenter", str(PUBLISHED), "--adapter", "a"), "--policy with --adapter"),
        (("--base", str(EMBEDDED), "--segmenter", str(PUBLISHED), "--float32-product", "a/b"), "--policy with"),
        (("--base", str(EMBEDDED), "--policy", str(PUBLISHED), "--adapter", "gone"), "adapter_config.json in gone"),
        (("--base", str(EMBEDDED), "--policy", str(PUBLISHED), "--computed", "float16"), "flavour portable"),
        (("--base", str(EMBEDDED), "--policy", str(PUBLISHED), "--float32-product", "a/b"), "as vision/"),
        (("--base", str(EMBEDDED), "--policy", str(PUBLISHED), "--segmenter-config", "x"), "expected --segmenter with"),
        (("--base", str(EMBEDDED), "--segmenter", "gone.pt"), "--segmenter gone.pt: .* no such file"),
        (("--base", str(EMBEDDED), "--segmenter", __file__), "expected a folder .* or a sam2"),
        (
            ("--base", str(EMBEDDED), "--segmenter", str(PUBLISHED), "--segmenter-computed", "bfloat16"),
            "expected --no-trial",
        ),
        (("--base", str(EMBEDDED), "--policy", str(PUBLISHED), "--storage", "nvfp4"), "--no-trial, and no"),
        (("--base", str(EMBEDDED), "--policy", str(PUBLISHED), "--storage", "fp8"), "flavour portable or trt11"),
    ],
    ids=[
        "gone",
        "no segmenter",
        "nothing",
        "bad segmenter",
        "no pictures",
        "no base",
        "base alone",
        "gone beside base",
        "no policy",
        "a size without a policy",
        "half a token",
        "4 bits without a policy",
        "a calibration that nothing is measured by",
        "an adapter without a policy",
        "a product without a policy",
        "gone adapter",
        "float16 in flavour ort",
        "no such product",
        "no segmenter beside its size",
        "gone file",
        "another kind of file",
        "bfloat16 tried on a CPU",
        "float4 tried on a CPU",
        "float8 in flavour ort",
    ],
)
def test_what_cannot_be_exported_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    parsed = make_parser(command).parse_args(["tabletop", *arguments, "--out", "out"])  # type: ignore[arg-type]
    with pytest.raises(SegZeroError, match=expected):
        command.execute(parsed)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("preset", "options", "expected"),
    [
        ("qwen3-vl", (), "multiples of 28 pixels for qwen2_5_vl.*the preset of that family"),
        ("tabletop", ("--storage", "bfloat16", "--int4-method", "awq"), "storage int4 for 4 bits by awq"),
        ("tabletop", ("--adapter", "gone"), "adapter_config.json in gone"),
    ],
    ids=["another family's preset", "a method without its bits", "gone adapter"],
)
def test_what_no_policy_can_be_is_told_before_the_segmenter_is_exported(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_checkpoints: tuple[Path, Path],
    preset: str,
    options: tuple[str, ...],
    expected: str,
) -> None:
    monkeypatch.setattr(command, "_export_segmenter", lambda *_: pytest.fail("began to export"))
    policy, segmenter = map(str, tiny_checkpoints)
    arguments = [preset, "--policy", policy, "--segmenter", segmenter, *options, "--out", str(tmp_path / "out")]
    with pytest.raises(ExportError, match=expected):
        command.execute(make_parser(command).parse_args(arguments))  # type: ignore[arg-type]


def test_a_failed_gate_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoints: tuple[Path, Path]
) -> None:
    from export import gate

    for name in ("EXACT", "ROUNDED"):
        monkeypatch.setattr(gate, name, gate.GateLimits(max_vision_error=-1.0))
    policy_folder, segmenter_folder = tiny_checkpoints
    options = ("--policy", str(policy_folder), "--segmenter", str(segmenter_folder), "--out", str(tmp_path / "out"))
    with pytest.raises(ExportError, match="vision_error"):
        command.execute(make_parser(command).parse_args(["tabletop", *options]))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("out", "expected"),
    [("taken", "expected a new path"), ("file/bundle", "is a file")],
    ids=["something is there", "below a file"],
)
def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, tiny_checkpoints: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, out: str, expected: str
) -> None:
    monkeypatch.setattr(command, "_export_policy", lambda *_: pytest.fail("began to export"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").write_text("")
    policy, segmenter = map(str, tiny_checkpoints)
    arguments = ["tabletop", "--policy", policy, "--segmenter", segmenter, "--out", str(tmp_path / out)]
    with pytest.raises(SegZeroError, match=expected):
        command.execute(make_parser(command).parse_args(arguments))  # type: ignore[arg-type]


def test_a_size_of_pictures_takes_the_presets_place() -> None:
    arguments = ["seg-zero", "--input-size", "560,840", "--out", "out"]
    preset = command._preset(make_parser(command).parse_args(arguments))  # type: ignore[arg-type]
    assert preset == replace(command.seg_zero(), input_size_hw=(560, 840))


def test_presets_are_whole_configurations() -> None:
    for name, preset in PRESETS.items():
        assert preset().name == name
    with pytest.raises(ValueError, match="format"):
        command.Preset(**{**_fields(tabletop()), "answer_format": "xml"})


@pytest.mark.parametrize("size", ["840", "840x560", "0,28", "-28,28", "28,28,28", "28,", "", "\u0663,28", "2.8,28"])
def test_sizes_that_are_none_are_refused(size: str) -> None:
    with pytest.raises(UsageError, match="such as 560,840"):
        make_parser(command).parse_args(["tabletop", f"--input-size={size}", "--out", "out"])  # type: ignore[arg-type]


def test_assembling_needs_both_parts() -> None:
    with pytest.raises(ExportError, match="both parts"):
        assemble(tabletop(), "x", None, None, None)


def _fields(preset: command.Preset) -> dict[str, Any]:
    return {name: getattr(preset, name) for name in preset.__slots__}


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ({"weight_map": {"a": "../policy/model.safetensors"}}, "beside"),
        ({"weight_map": {"a": "/etc/passwd"}}, "beside"),
        ({"weight_map": {"a": "..\\\\model.safetensors"}}, "beside"),
        ({"weight_map": {"a": ".."}}, "beside"),
        ({"weight_map": {"a": "model.bin"}}, "beside"),
        ({"weight_map": {"a": 7}}, "beside"),
        ({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}, "model-2.safetensors"),
        ({"weight_map": {}}, "weight_map"),
        ({"weight_map": ["model.safetensors"]}, "weight_map"),
        ({}, "weight_map"),
        ([], "JSON object"),
    ],
    ids=str,
)
def test_an_index_names_files_beside_it_alone(
    tmp_path: Path, tiny_checkpoints: tuple[Path, Path], index: object, expected: str
) -> None:
    from export.policy_checkpoint import PolicyCheckpoint

    copy = tmp_path / "copy"
    shutil.copytree(tiny_checkpoints[0], copy)
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ExportError, match=expected):
        PolicyCheckpoint(copy)


def test_a_whole_index_is_read(tmp_path: Path, tiny_checkpoints: tuple[Path, Path]) -> None:
    from export.policy_checkpoint import PolicyCheckpoint

    copy = tmp_path / "copy"
    shutil.copytree(tiny_checkpoints[0], copy)
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert PolicyCheckpoint(copy).has("model.visual.merger.mlp.2.bias")

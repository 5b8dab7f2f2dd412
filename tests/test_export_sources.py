"""Checkpoints as they lie on disks: caches, clones, half downloads, others' formats; one clear error for each."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="writes checkpoints with PyTorch; it comes with segzero-rt[export]")
pytest.importorskip("transformers", reason="writes checkpoints; it comes with segzero-rt[export]")

import torch
from safetensors.torch import load_file, save_file

from export import command
from export.policy_checkpoint import PolicyCheckpoint
from export.segmenter import export_segmenter
from export.segmenter_checkpoint import load_checkpoint
from export.sources import check_policy, check_segmenter
from segzero_rt.cli import make_parser, run_reporting
from segzero_rt.errors import ExportError

Change = Callable[[Path], object]


def settings(**changes: object) -> Change:
    """Changes `config.json`; None takes a setting out, a dictionary is merged into what is there."""

    def change(folder: Path) -> None:
        document = json.loads((folder / "config.json").read_text())
        for name, value in changes.items():
            if isinstance(value, dict) and isinstance(document.get(name), dict):
                document[name] = document[name] | value
            elif value is None:
                document.pop(name)
            else:
                document[name] = value
        (folder / "config.json").write_text(json.dumps(document))

    return change


def weights(edit: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def only(*names: str) -> Change:
    """Puts empty files of these names in the weights' place."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"")

    return change


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def written(name: str, document: object) -> Change:
    return lambda folder: (folder / name).write_text(json.dumps(document))


def without_token(token: str) -> Change:
    def change(folder: Path) -> None:
        document = json.loads((folder / "tokenizer.json").read_text())
        document["added_tokens"] = [one for one in document["added_tokens"] if one["content"] != token]
        document["model"]["vocab"].pop(token, None)
        (folder / "tokenizer.json").write_text(json.dumps(document))

    return change


def renamed(name: str, other: str) -> Change:
    return lambda folder: (folder / name).rename(folder / other)


def twice(name: str) -> Change:
    """The same weights in another file, and an index that names that one alone."""

    def change(folder: Path) -> None:
        shutil.copyfile(folder / "model.safetensors", folder / name)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))

    return change


def without(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


POLICIES: list[tuple[str, Change, str]] = [
    ("pickled weights alone", only("pytorch_model-00001-of-00002.bin"), r"pickled weights .*save_pretrained\(NEW\)"),
    ("shards of a training", only("model_world_size_8_rank_0.pt"), "FSDP.*model_merger"),
    ("shards below actor", only("actor/model_world_size_2_rank_1.pt"), "FSDP"),
    ("settings without weights", only(), r"got no \*\.safetensors there"),
    ("weights without settings", without("config.json"), r"got no config\.json there"),
    ("no fast tokenizer", without("tokenizer.json"), r"expected tokenizer\.json.*AutoTokenizer"),
    ("a clone without large files", pointer, "git lfs pull"),
    ("another family", settings(model_type="llama"), "expected a checkpoint of family qwen2_5_vl.*got 'llama'"),
    ("a mixture of experts", settings(model_type="qwen3_vl_moe"), "got 'qwen3_vl_moe'"),
    ("AWQ", settings(quantization_config={"quant_method": "awq", "bits": 4}), "quantized by awq; export the"),
    ("bitsandbytes", settings(quantization_config={"quant_method": "bitsandbytes"}), "by bitsandbytes"),
    ("float8", settings(quantization_config={"quant_method": "fp8"}), "by fp8"),
    ("GPTQ beside the settings", lambda f: (f / "quantize_config.json").write_text("{}"), "by gptq"),
    ("quantized text", settings(text_config={"quantization_config": {"quant_method": "gptq"}}), "by gptq"),
    (
        "codes without a word of it",
        weights(lambda w: w.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)})),
        "norm.weight as I8",
    ),
    ("half a file", lambda f: os.truncate(f / "model.safetensors", 9_000), "whole safetensors file .* fetch it again"),
    (
        "a shard that was not fetched",
        written("model.safetensors.index.json", {"weight_map": {"a": "model-00002-of-00002.safetensors"}}),
        "the file model-00002-of-00002.safetensors that .* names, got none; fetch the rest",
    ),
    ("an index without its files", renamed("model.safetensors", "model-00001-of-00002.safetensors"), "neither beside"),
    (
        "weights of two saves",
        twice("model-00001-of-00001.safetensors"),
        "weights of .* once, got model.safetensors and",
    ),
    ("an adapter", renamed("config.json", "adapter_config.json"), "got a LoRA adapter; give it as --adapter"),
    (
        "a weight under an old and a new name",
        weights(lambda w: w.update({"model.language_model.norm.weight": torch.ones(64)})),
        r"each weight once, got model\.(language_model\.)?norm",
    ),
    ("a weight too few", weights(lambda w: w.pop("model.layers.1.mlp.up_proj.weight")), r"up_proj.weight .* got none"),
    ("a weight too many", weights(lambda w: w.update({"model.extra": torch.zeros(3)})), "1 that it has not, such as"),
    ("a weight of another shape", weights(lambda w: w.update({"model.norm.weight": torch.zeros(63)})), r"got \(63,\)"),
    ("a tokenizer of another kind", written("tokenizer.json", {"model": {"type": "Unigram"}}), "from the base model"),
    ("a tokenizer without pictures", without_token("<|image_pad|>"), r"<\|image_pad\|>.*copy tokenizer\.json"),
    ("another number for pictures", settings(image_token_id=7), r"<\|image_pad\|> as token 7 .*got 5 and"),
    ("ends as text", written("generation_config.json", {"eos_token_id": "<|im_end|>"}), "numbers of tokens as eos"),
    ("an end out of reach", written("generation_config.json", {"eos_token_id": [2, 999]}), r"below 400.*got \[999\]"),
    ("no end", written("generation_config.json", {"eos_token_id": []}), "got none; copy generation_config"),
    ("no heads", settings(text_config={"num_attention_heads": 0}), "settings of qwen2_5_vl.*ZeroDivision"),
    ("a short section", settings(text_config={"rope_parameters": {"mrope_section": [8]}}), "IndexError"),
    ("a tower that is a list", settings(vision_config=[]), "settings of qwen2_5_vl"),
    ("rotation as text", settings(text_config={"rope_parameters": "default"}), "settings of qwen2_5_vl"),
    ("an endless depth", settings(vision_config={"patch_size": 1e999}), "settings of qwen2_5_vl"),
]


@pytest.mark.parametrize(("change", "expected"), [row[1:] for row in POLICIES], ids=[row[0] for row in POLICIES])
def test_a_policy_that_cannot_be_exported_is_one_line_before_any_work(
    tiny_checkpoints: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: Change,
    expected: str,
) -> None:
    shutil.copytree(tiny_checkpoints[0], tmp_path / "policy")
    change(tmp_path / "policy")
    monkeypatch.setattr(command, "_export_segmenter", lambda *_: pytest.fail("began to export"))
    options = ("--policy", tmp_path / "policy", "--segmenter", tiny_checkpoints[1], "--out", tmp_path / "out/bundle")
    parsed = make_parser(command).parse_args(["tabletop", *map(str, options)])  # type: ignore[arg-type]
    assert run_reporting(lambda: command.execute(parsed), as_json=False) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(expected, error), error
    assert list(tmp_path.rglob("out/*")) == []


def hub_cache(folder: Path, source: Path) -> Path:
    """A checkpoint as huggingface_hub keeps it; returns the snapshot's folder."""
    snapshot = folder / "models--owner--name/snapshots/0123abcd"
    blobs = folder / "models--owner--name/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in source.iterdir() if path.is_file())):
        shutil.copyfile(path, blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    return snapshot


def test_a_snapshot_of_the_hubs_cache_is_read_through_its_links(
    tiny_checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "cache of caf\u00e9 \u6771\u4eac"
    policy, segmenter = (hub_cache(folder / name, source) for name, source in zip("ab", tiny_checkpoints, strict=True))
    check_policy(policy)
    check_segmenter(segmenter)
    assert PolicyCheckpoint(policy).num_parameters == PolicyCheckpoint(tiny_checkpoints[0]).num_parameters
    assert load_checkpoint(segmenter).config.model_type == "sam2"


@pytest.mark.parametrize(
    ("check", "path", "expected"),
    [
        (check_policy, "owner/Seg-Zero-7B", r"got nothing there; .* `hf download owner/Seg-Zero-7B"),
        (check_policy, "/no/such/place", "got nothing there$"),
        (check_policy, "here/config.json", r"got a file; give its folder, here"),
        (
            check_policy,
            "a/models--owner--name",
            "the hub's cache of one; give a/models--owner--name/snapshots/0123",
        ),
        (check_policy, "a/models--owner--name/snapshots", "did you mean a/models--owner--name/snapshots/0123abcd"),
        (check_segmenter, "owner/sam2.1-hiera-large", "hf download owner"),
        (check_segmenter, "official", r"got sam2.1_hiera_tiny.pt there; .* give that file"),
        (check_segmenter, "gone.pt", r"no such file"),
        (check_segmenter, "here/config.json", r"or a sam2\*.pt, got a file"),
    ],
    ids=[
        "a name on the hub",
        "nothing",
        "one of its files",
        "a cache",
        "its snapshots",
        "a segmenter on the hub",
        "a folder with a file",
        "a file that is gone",
        "another file",
    ],
)
def test_what_is_there_instead_is_named(
    tiny_checkpoints: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    check: Callable[[Path], None],
    path: str,
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    hub_cache(Path("a"), tiny_checkpoints[0])
    for name in ("here/config.json", "official/sam2.1_hiera_tiny.pt", "official/sam2.1_hiera_t.yaml"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("{}")
    with pytest.raises(ExportError, match=expected):
        check(Path(path))


PATCHES = "vision_encoder.backbone.patch_embed.projection.weight"
SEGMENTERS: list[tuple[str, Change, str]] = [
    ("half a file", lambda f: os.truncate(f / "model.safetensors", 70_000), "whole safetensors file .* fetch it again"),
    ("an empty file", lambda f: os.truncate(f / "model.safetensors", 0), "whole safetensors file .* fetch it again"),
    ("a clone without large files", pointer, "git lfs pull"),
    ("codes", weights(lambda w: w.update({PATCHES: w[PATCHES].to(torch.int8)})), "patch_embed.projection.weight as I8"),
    ("a weight of another shape", weights(lambda w: w.update({PATCHES: torch.zeros(16, 3, 5, 5)})), r"got \[16, 3, 5"),
    ("a weight too few", weights(lambda w: w.pop(PATCHES)), f"1 are missing, first {PATCHES}"),
    ("not a number", weights(lambda w: w[PATCHES].fill_(float("nan"))), "finite weights, got nan in patch_embed"),
    ("bitsandbytes", settings(quantization_config={"quant_method": "bitsandbytes"}), "by bitsandbytes"),
    ("a tower as text", settings(vision_config="large"), "expected a SAM 2 checkpoint .*vision_config"),
    ("SAM 1", settings(model_type="sam"), "expected model_type sam2 or"),
    ("SAM 3", settings(model_type="sam3"), "expected model_type sam2 or"),
]


@pytest.mark.parametrize(("change", "expected"), [row[1:] for row in SEGMENTERS], ids=[row[0] for row in SEGMENTERS])
def test_a_segmenter_that_cannot_be_exported_is_one_error(
    tiny_checkpoints: tuple[Path, Path], tmp_path: Path, change: Change, expected: str
) -> None:
    folder = tmp_path / "segmenter"
    shutil.copytree(tiny_checkpoints[1], folder)
    change(folder)
    with pytest.raises(ExportError, match=expected):
        export_segmenter(folder, tmp_path / "out")


def test_shards_of_a_segmenter_are_read_together(tiny_checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoints[1], tmp_path / "segmenter")
    tensors = load_file(tmp_path / "segmenter/model.safetensors")
    (tmp_path / "segmenter/model.safetensors").unlink()
    places = {key: f"model-0000{number % 2 + 1}-of-00002.safetensors" for number, key in enumerate(sorted(tensors))}
    for name in set(places.values()):
        half = {key: tensor for key, tensor in tensors.items() if places[key] == name}
        save_file(half, tmp_path / "segmenter" / name, metadata={"format": "pt"})
    index = tmp_path / "segmenter/model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    whole, shards = (load_checkpoint(folder).state_dict() for folder in (tiny_checkpoints[1], tmp_path / "segmenter"))
    assert all(torch.equal(tensor, shards[key]) for key, tensor in whole.items())
    (tmp_path / "segmenter" / places[PATCHES]).unlink()
    with pytest.raises(ExportError, match=places[PATCHES]):
        load_checkpoint(tmp_path / "segmenter")

"""Large checkpoints: weights go from file to file piece by piece, and an export that was killed goes on."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="reads and writes checkpoints with PyTorch")
pytest.importorskip("transformers", reason="compares with transformers")

import onnx
import torch
from safetensors.torch import load_file, save_file

from export import weight_store
from export.disk import DiskFullError
from export.policy import export_policy, plan_policy
from export.policy_checkpoint import PolicyCheckpoint
from export.policy_graphs import PolicyGraphWriter, Precision
from export.weight_store import FileStore
from segzero_rt.errors import ExportError
from segzero_rt.external_data import external_entries

SIZE = (56, 84)


def writer(source: Path, folder: Path, **precision: Any) -> PolicyGraphWriter:
    folder.mkdir(parents=True, exist_ok=True)
    return PolicyGraphWriter(
        PolicyCheckpoint(source), folder, Precision(**precision), flavour="ort", input_size_hw=SIZE
    )


def write(source: Path, folder: Path, **precision: Any) -> PolicyGraphWriter:
    graphs = writer(source, folder, **precision)
    graphs.plan(external=True)
    graphs.write()
    return graphs


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".journal")}


def changed(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(source, target)
    weights = load_file(target / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors")
    return target


def in_shards(source: Path, target: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The same checkpoint in three files and another precision."""
    shutil.copytree(source, target)
    weights = {key: value.to(dtype) for key, value in load_file(target / "model.safetensors").items()}
    (target / "model.safetensors").unlink()
    weight_map = {key: f"model-{place % 3 + 1}-of-3.safetensors" for place, key in enumerate(sorted(weights))}
    for name in set(weight_map.values()):
        save_file({key: weights[key] for key in weights if weight_map[key] == name}, target / name)
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return target


# --- files beside the graphs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sizes", "storage"), [("grouped-heads", "float16"), ("untied", "float32")])
def test_graphs_with_weights_beside_them_say_what_pytorch_says(
    policy_folders: Callable[[str], Path], tmp_path: Path, sizes: str, storage: str
) -> None:
    exported = export_policy(
        policy_folders(sizes), tmp_path, storage=storage, external=True, input_size_hw=SIZE, max_length=600
    )
    assert exported.gate["same_tokens"] == 1.0
    assert {"policy/decoder.data", "policy/vision.data", "policy/token_table.bin"} <= set(exported.files)
    assert exported.files["policy/decoder.onnx"].stat().st_size < exported.files["policy/decoder.data"].stat().st_size
    places = [entry["location"] for entry in external_entries(exported.files["policy/decoder.onnx"])]
    assert set(places) == ({"decoder.data", "token_table.bin"} if sizes == "grouped-heads" else {"decoder.data"})


def test_small_tensors_stay_in_the_graph_and_large_ones_begin_on_a_page(
    policy_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    write(policy_folders("grouped-heads"), tmp_path, storage="float32")
    model = onnx.load(str(tmp_path / "decoder.onnx"), load_external_data=False)
    outside = [tensor for tensor in model.graph.initializer if tensor.external_data]
    assert len(outside) > 8
    for tensor in outside:
        assert int({entry.key: entry.value for entry in tensor.external_data}["offset"]) % 4096 == 0
    norms = [tensor for tensor in model.graph.initializer if tensor.name.endswith("layernorm")]
    assert norms and not any(tensor.external_data for tensor in norms)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32"])
def test_shards_of_any_precision_are_stored_as_asked_and_loss_is_told(
    policy_folders: Callable[[str], Path], tmp_path: Path, dtype: torch.dtype, storage: str
) -> None:
    """The weights of these checkpoints are float16's own numbers, so that bfloat16 loses some of them."""
    source = in_shards(policy_folders("grouped-heads"), tmp_path / "hf", dtype)
    graphs = write(source, tmp_path / "out", storage=storage)
    if storage == "bfloat16":
        assert graphs.lossless is (dtype is torch.bfloat16)
    elif dtype is not torch.bfloat16 or storage == "float32":
        assert graphs.lossless
    if dtype is not torch.bfloat16:
        write(policy_folders("grouped-heads"), tmp_path / "whole", storage=storage)
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# --- killed, full, changed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [0, 1, 4, 9])
def test_a_killed_export_goes_on_where_it_ended(
    policy_folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: int
) -> None:
    source = policy_folders("grouped-heads")
    write(source, tmp_path / "whole")
    written: list[str] = []
    real = FileStore._write

    def kill(store: FileStore, encoding: Any) -> Any:
        if len(written) == pieces:
            store._file.write(b"half of a tensor")  # on disk, but not in the journal
            store._journal.write('{"name": "hal')
            store.close()
            raise KeyboardInterrupt
        written.append(encoding.path)
        return real(store, encoding)

    monkeypatch.setattr(FileStore, "_write", kill)
    with pytest.raises(KeyboardInterrupt):
        write(source, tmp_path / "killed")
    again: list[str] = []
    monkeypatch.setattr(FileStore, "_write", lambda store, one: again.append(one.path) or real(store, one))
    graphs = write(source, tmp_path / "killed")
    assert graphs.resumed == pieces
    assert not set(again) & set(written), "nothing is read or written twice"
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_another_checkpoint_or_precision_begins_anew(policy_folders: Callable[[str], Path], tmp_path: Path) -> None:
    source = policy_folders("grouped-heads")
    write(source, tmp_path / "out")
    assert write(source, tmp_path / "out").resumed > 10
    assert write(source, tmp_path / "out", storage="float32").resumed == 0
    other = changed(source, tmp_path / "hf", lambda weights: weights["model.norm.weight"].add_(1.0))
    assert write(other, tmp_path / "out", storage="float32").resumed == 0


def test_weights_of_a_killed_export_do_not_get_into_a_bundle_that_has_its_own(
    policy_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    source = policy_folders("grouped-heads")
    assert "decoder.data" in write(source, tmp_path / "out", storage="float32").file_names
    graphs = writer(source, tmp_path / "out", storage="int8")
    graphs.plan(external=False)
    graphs.write()
    assert not [name for name in graphs.file_names if name.endswith(".data")]


def test_a_full_disk_is_told_before_the_work(
    policy_folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DiskFullError, match=r"expected 0\.[1-9] MB of room .* got 0\.0 MB"):
        export_policy(policy_folders("grouped-heads"), tmp_path, input_size_hw=SIZE, max_length=600)


@pytest.mark.parametrize(
    ("storage", "refused"), [("float16", True), ("int8", False)], ids=["floats", "codes that take less"]
)
def test_room_is_looked_for_before_anything_else_is_exported(
    policy_folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str, refused: bool
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DiskFullError) if refused else nullcontext():
        plan_policy(
            policy_folders("grouped-heads"),
            tmp_path,
            max_length=600,
            adapter=None,
            input_size_hw=SIZE,
            flavour="portable",
            storage=storage,
            computed="float32",
            float32_products=(),
            int4_method="rtn",
        )


def test_a_disk_that_fills_up_is_one_error_and_what_is_whole_stays(
    policy_folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = policy_folders("grouped-heads")
    real = weight_store._raw
    count = 0

    def fill_up(values: np.ndarray) -> bytes:
        nonlocal count
        large = values.nbytes >= weight_store.INLINE_BYTES
        count += large
        if large and count == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(values)

    monkeypatch.setattr(weight_store, "_raw", fill_up)
    with pytest.raises(DiskFullError, match="full; free some and run the same command again"):
        write(source, tmp_path / "out")
    assert write(source, tmp_path / "out").resumed >= 3


# --- checkpoints that are not what they say ------------------------------------------------------------------------


def rename_one(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.0.mlp.gate_up_proj.weight"] = weights.pop("model.layers.0.mlp.gate_proj.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda w: w.pop("visual.merger.ln_q.weight"), "merger.ln_q", id="one-missing"),
        pytest.param(
            lambda w: w.update({"visual.deepstack.0.weight": torch.zeros(3)}), "deepstack.0", id="one-too-many"
        ),
        pytest.param(rename_one, "gate_proj", id="another-name"),
        pytest.param(lambda w: w.update({"model.norm.weight": torch.zeros(63)}), r"\(63,\)", id="another-shape"),
    ],
)
def test_a_checkpoint_of_another_architecture_is_told_before_a_weight_is_written(
    policy_folders: Callable[[str], Path], tmp_path: Path, change: Callable[[Any], None], message: str
) -> None:
    source = changed(policy_folders("grouped-heads"), tmp_path / "hf", change)
    with pytest.raises(ExportError, match=message):
        writer(source, tmp_path / "out").plan()
    assert list((tmp_path / "out").iterdir()) == []


def test_weights_that_are_saved_twice_or_follow_from_the_settings_are_passed_over(
    policy_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    def add(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        weights["visual.rotary_pos_emb.inv_freq"] = torch.ones(3)

    writer(changed(policy_folders("grouped-heads"), tmp_path / "hf", add), tmp_path / "out").plan()


@pytest.mark.parametrize("keep", [0, 7, 100, -1], ids=["empty", "in-the-length", "in-the-header", "one-byte-short"])
def test_a_truncated_shard_is_named(policy_folders: Callable[[str], Path], tmp_path: Path, keep: int) -> None:
    source = in_shards(policy_folders("grouped-heads"), tmp_path / "hf")
    shard = source / "model-2-of-3.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(ExportError, match=r"model-2-of-3\.safetensors.*fetch it again"):
        PolicyCheckpoint(source)

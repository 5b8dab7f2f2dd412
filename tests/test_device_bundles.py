"""The documented commands for devices: what the page holds, and one of them run on small checkpoints."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import device_bundles
from benchmarks.device_bundles import PAGE, documented_commands, with_paths

DEVICES = ("cpu", "orin", "thor", "rtx")


def test_the_page_has_a_command_for_each_device() -> None:
    commands = documented_commands(PAGE.read_text(encoding="utf-8"))
    assert tuple(commands) == DEVICES
    for name, command in commands.items():
        assert command[:3] == ["segzero", "export", "seg-zero"]
        assert command[-2:] == ["--out", f"bundles/{name}"]
        assert {"--policy", "--segmenter"} < set(command)


def test_paths_alone_are_replaced() -> None:
    command = documented_commands(PAGE.read_text(encoding="utf-8"))["thor"]
    changed = with_paths(command, policy=Path("P"), segmenter=Path("S"), out=Path("O"))
    differing = [(before, after) for before, after in zip(command, changed, strict=True) if before != after]
    assert differing == [("Seg-Zero-7B", "P"), ("sam2.1_hiera_large.pt", "S"), ("bundles/thor", "O")]
    with pytest.raises(ValueError, match="scratch"):
        with_paths(command, scratch=Path("S"))


def test_a_command_is_run_and_its_memory_seen(tmp_path: Path) -> None:
    figures = device_bundles.run(["segzero", "scenes", "--count", "3", "--out", str(tmp_path / "scenes")])
    assert figures["command"].startswith("segzero scenes --count 3")
    assert len(list((tmp_path / "scenes/images").iterdir())) == 3
    assert figures["peak_bytes"] > figures["own_bytes"] > 1 << 20 and figures["seconds"] > 0


def test_what_a_command_refuses_ends_the_measurement(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = ["cpu", "--policy", "nowhere", "--segmenter", "nowhere.pt", "--scratch", str(tmp_path)]
    with pytest.raises(subprocess.CalledProcessError):
        device_bundles.main([*given, "--out", str(tmp_path / "results")])
    assert re.search(r"--policy nowhere: expected a folder", capfd.readouterr().err)
    assert not (tmp_path / "results").exists()


def test_an_export_and_its_engines_become_a_result(
    tiny_checkpoints: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a page of its own: the documented ones resize pictures to 840 x 840, which takes small weights as long."""
    pytest.importorskip("tensorrt_rtx", reason="pip install 'segzero-rt[tensorrt-rtx]'")
    page = tmp_path / "page.md"
    options = "--flavour portable --input-size 56,84 --max-length 512"
    page.write_text(f"| small | `segzero export tabletop --policy P --segmenter S {options} --out bundles/small` |\n")
    monkeypatch.setattr(device_bundles, "PAGE", page)
    policy, segmenter = map(str, tiny_checkpoints)
    given = ["small", "--policy", policy, "--segmenter", segmenter, "--scratch", str(tmp_path), "--build"]
    device_bundles.main([*given, "--out", str(tmp_path)])
    (path,) = tmp_path.glob("device_bundles_small_*.json")
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["export"]["gates"]["policy"]["top1"] > 0.9
    assert document["build"]["engine_bytes"] > document["export"]["bundle_bytes"] / 4
    assert set(document["build"]["seconds_by_graph"]) >= {"policy/vision.onnx", "segmenter/image_encoder.onnx"}
    assert not (tmp_path / "small").exists(), "only kept where that is asked for"

"""Bundles: whole, damaged in every way that a copy can be damaged, hostile, and written all or nothing."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path

import pytest

from segzero_rt.bundle import Bundle, write_bundle
from segzero_rt.errors import BundleError
from segzero_rt.manifest import (
    FORMAT_VERSION,
    INPUT_PIXELS,
    RELATIVE_1000,
    FileRecord,
    Manifest,
    PolicyGraphs,
    PolicyManifest,
    SegmenterGraphs,
    SegmenterManifest,
    _digest,
    check_relative_path,
)

POLICY = PolicyManifest(
    family="qwen2_5_vl",
    flavour="ort",
    input_size_hw=(280, 280),
    resampler="pillow_bilinear",
    image_mean=(0.48145466, 0.4578275, 0.40821073),
    image_std=(0.26862954, 0.26130258, 0.27577711),
    patch_size=14,
    temporal_patch_size=2,
    merge_size=2,
    window_size=112,
    vision_head_dim=32,
    num_layers=6,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    hidden_size=256,
    rope_theta=50.0,
    mrope_section=(8, 12, 12),
    vocab_size=1024,
    eos_token_ids=(1,),
    image_token_id=5,
    max_length=1024,
    max_new_tokens=192,
    graphs=PolicyGraphs(vision="policy/vision.onnx", embedding="policy/embedding.onnx", decoder="policy/decoder.onnx"),
)
SEGMENTER = SegmenterManifest(
    family="sam2",
    input_size_hw=(256, 256),
    resampler="pillow_bilinear",
    image_mean=(0.485, 0.456, 0.406),
    image_std=(0.229, 0.224, 0.225),
    mask_size_hw=(64, 64),
    graphs=SegmenterGraphs(encoder="segmenter/encoder.onnx", decoder="segmenter/decoder.onnx"),
)
MANIFEST = Manifest(
    name="toy",
    created_by="a test",
    answer_format="vision_reasoner",
    policy=POLICY,
    segmenter=SEGMENTER,
    tokenizer="tokenizer.json",
    gates={"decoder": {"max_kl": 1e-7, "passed": True}},
    memory_bytes={"cpu_peak": 130_000_000},
)
FILES: dict[str, Path | bytes] = {name: f"contents of {name}".encode() * 7 for name in MANIFEST.required_files} | {
    "policy/extra.data": b"\0" * 5000
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "toy", MANIFEST, FILES).root


def edit_manifest(folder: Path, **changes: object) -> None:
    """Changes top-level fields and mends the digest, as a careful attacker would."""
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    document.update(changes)
    document.pop("digest")
    document["digest"] = _digest(document)
    path.write_text(json.dumps(document))


def refused(folder: Path) -> str:
    """The one line that opening gives."""
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def test_what_is_written_is_what_is_opened(folder: Path) -> None:
    bundle = Bundle.open(folder)
    assert dataclasses.replace(bundle.manifest, files={}) == MANIFEST
    assert set(bundle.manifest.files) == set(FILES)
    assert bundle.file("tokenizer.json").read_bytes() == FILES["tokenizer.json"]
    assert bundle.num_bytes == sum(len(contents) for contents in FILES.values() if isinstance(contents, bytes))
    assert Bundle.open(os.fspath(folder), verify="size").manifest == bundle.manifest


def test_a_bundle_may_be_moved_and_read_through_a_link_to_its_folder(folder: Path, tmp_path: Path) -> None:
    moved = folder.rename(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(moved)
    assert Bundle.open(tmp_path / "link").file("tokenizer.json").is_file()


def test_only_listed_files_are_handed_out(folder: Path) -> None:
    (folder / "stray.onnx").write_bytes(b"not listed")
    bundle = Bundle.open(folder)
    for name in ("stray.onnx", "../toy/tokenizer.json", "manifest.json", "/etc/passwd", ""):
        with pytest.raises(BundleError):
            bundle.file(name)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "emptied", "longer", "missing", "a folder", "unreadable text"])
def test_each_damaged_file_is_noticed(folder: Path, name: str, damage: str) -> None:
    path = folder / name
    contents = path.read_bytes()
    path.unlink()
    match damage:
        case "truncated":
            path.write_bytes(contents[:-2])
        case "emptied":
            path.write_bytes(b"")
        case "longer":
            path.write_bytes(contents + b"x")
        case "a folder":
            path.mkdir()
        case "unreadable text":
            path.write_bytes(b"\xff\xfe" * (len(contents) // 2) + b"\xff" * (len(contents) % 2))
    assert name.split("/")[-1] in refused(folder)


@pytest.mark.parametrize("name", list(FILES))
def test_a_flipped_bit_anywhere_in_a_file_is_noticed(folder: Path, name: str) -> None:
    path = folder / name
    contents = path.read_bytes()
    for position in {0, len(contents) // 2, len(contents) - 1}:
        flipped = bytearray(contents)
        flipped[position] ^= 1
        path.write_bytes(flipped)
        assert "sha256" in refused(folder)
    path.write_bytes(contents)
    Bundle.open(folder)


def test_a_flipped_bit_in_the_manifest_is_noticed_or_changes_nothing(folder: Path) -> None:
    """Only a byte between two JSON tokens can change without changing what the manifest says."""
    path = folder / "manifest.json"
    contents = path.read_bytes()
    whole = Bundle.open(folder).manifest
    opened = 0
    for position in range(len(contents)):
        flipped = bytearray(contents)
        flipped[position] ^= 1 << (position % 8)
        try:
            manifest = Manifest.from_json(flipped.decode())
        except (BundleError, UnicodeDecodeError):
            continue
        opened += 1
        assert manifest == whole
    assert opened < len(contents) // 50


def test_swapped_files_are_noticed(folder: Path) -> None:
    first, second = folder / "policy/vision.onnx", folder / "policy/embedding.onnx"
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    refused(folder)


@pytest.mark.parametrize(
    "path",
    [
        "../outside.onnx",
        "policy/../../outside.onnx",
        "/etc/hostname",
        "policy//vision.onnx",
        "./vision.onnx",
        "policy/.",
        "..",
        "",
        "policy\\vision.onnx",
        "C:/vision.onnx",
        "policy/vision.onnx\0.txt",
        "policy/vision\n.onnx",
        " vision.onnx",
        "manifest.json",
        "Manifest.JSON",
        "policy/",
    ],
)
def test_no_path_leaves_the_bundle(folder: Path, path: str) -> None:
    (folder.parent / "outside.onnx").write_bytes(b"x")
    with pytest.raises(BundleError):
        check_relative_path(path)
    record = {"sha256": "0" * 64, "bytes": 1}
    files = json.loads((folder / "manifest.json").read_text())["files"]
    edit_manifest(folder, files=files | {path: record})
    assert "inside the bundle" in refused(folder)
    edit_manifest(folder, files=files, tokenizer=path)
    assert "inside the bundle" in refused(folder)
    with pytest.raises(BundleError):
        write_bundle(folder.parent / "new", MANIFEST, FILES | {path: b"x"})
    assert not (folder.parent / "new").exists()


@pytest.mark.parametrize("link", ["file", "folder", "inside", "loop"])
def test_links_inside_a_bundle_are_refused(folder: Path, tmp_path: Path, link: str) -> None:
    victim = folder / "policy/vision.onnx"
    outside = tmp_path / "outside"
    outside.mkdir()
    match link:
        case "file":
            victim.rename(outside / "vision.onnx")
            victim.symlink_to(outside / "vision.onnx")
        case "folder":
            (folder / "policy").rename(outside / "policy")
            (folder / "policy").symlink_to(outside / "policy")
        case "inside":
            victim.rename(folder / "other.onnx")
            victim.symlink_to(folder / "other.onnx")
        case "loop":
            victim.unlink()
            victim.symlink_to(victim)
    refused(folder)


def test_the_manifest_itself_may_not_be_a_link(folder: Path, tmp_path: Path) -> None:
    (folder / "manifest.json").rename(tmp_path / "manifest.json")
    (folder / "manifest.json").symlink_to(tmp_path / "manifest.json")
    refused(folder)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "JSON"),
        ("{", "JSON"),
        ("[]", "object"),
        ("null", "object"),
        ("{}", f"format_version {FORMAT_VERSION}"),
        ('{"format_version": 2}', "got 2"),
        ('{"format_version": "1"}', "digest"),
        ('{"format_version": 1}', "digest"),
        ('{"format_version": 1, "format_version": 1}', "twice"),
        ('{"format_version": NaN}', "NaN"),
        ("[" * 100_000, "JSON"),
        ('{"format_version": ' + "9" * 10_000 + "}", "JSON"),
        ("import os", "JSON"),
        ("\x80\x04]q\x00.", "JSON"),  # a pickle
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_manifest_that_is_none(folder: Path, text: str, expected: str) -> None:
    (folder / "manifest.json").write_text(text)
    message = refused(folder)
    assert expected in message or "got" in message
    assert len(message) < 600


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"format_version": FORMAT_VERSION + 1}, f"format_version {FORMAT_VERSION}, got {FORMAT_VERSION + 1}"),
        ({"surprise": 1}, "unknown field 'surprise'"),
        ({"name": 3}, "name: expected str"),
        ({"policy": []}, "policy: expected an object"),
        ({"files": {}}, "does not list"),
        ({"files": {"a": {"sha256": "x", "bytes": 1}}}, "sha256"),
        ({"files": {"a": {"sha256": "0" * 64, "bytes": 0}}}, "bytes"),
        ({"files": {"a": {"sha256": "0" * 64, "bytes": True}}}, "bytes"),
        ({"memory_bytes": {"cpu": "much"}}, "memory_bytes['cpu']"),
        ({"gates": None}, "gates"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_manifest_with_a_wrong_field(folder: Path, changes: dict[str, object], expected: str) -> None:
    edit_manifest(folder, **changes)
    assert expected in refused(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("patch_size", 0),
        ("input_size_hw", [280, 281]),
        ("input_size_hw", [280]),
        ("input_size_hw", [0, 0]),
        ("rope_theta", -1.0),
        ("rope_theta", "50"),
        ("mrope_section", [8, 12, 13]),
        ("num_kv_heads", 3),
        ("eos_token_ids", []),
        ("eos_token_ids", [1024]),
        ("image_token_id", -1),
        ("resampler", "opencv_linear"),
        ("family", "qwen9_vl"),
        ("flavour", "fancy"),
        ("image_std", [0.0, 0.1, 0.1]),
        ("image_mean", [0.1, 0.1]),
        ("max_length", 1.5),
        ("deepstack", -1),
        ("deepstack", 99),
        ("position_side", -2),
        ("coordinates", "inches"),
        ("mrope_interleaved", 1),
    ],
)
def test_a_policy_with_an_impossible_value(folder: Path, field: str, value: object) -> None:
    policy = json.loads((folder / "manifest.json").read_text())["policy"]
    edit_manifest(folder, policy=policy | {field: value})
    assert field.split("_")[0] in refused(folder) or "token ids" in refused(folder)


@pytest.mark.parametrize(
    ("coordinates", "size_hw"), [(INPUT_PIXELS, MANIFEST.policy.input_size_hw), (RELATIVE_1000, (1000, 1000))]
)
def test_answers_count_up_to_the_picture_s_sides_or_to_a_thousand(coordinates: str, size_hw: tuple[int, int]) -> None:
    assert dataclasses.replace(MANIFEST.policy, coordinates=coordinates).answer_size_hw == size_hw


def test_two_names_that_differ_only_in_case_are_refused() -> None:
    record = FileRecord(sha256="0" * 64, bytes=1)
    with pytest.raises(BundleError, match="case"):
        dataclasses.replace(MANIFEST, files={"a.onnx": record, "A.onnx": record})


@pytest.mark.parametrize("kind", ["nothing", "a file", "an empty folder", "a huge manifest"])
def test_what_is_no_bundle(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "a file":
        path.write_text("no bundle")
    elif kind != "nothing":
        path.mkdir()
    if kind == "a huge manifest":
        (path / "manifest.json").write_bytes(b" " * (5 << 20))
    assert str(path) in refused(path)


def test_writing_refuses_to_replace_unless_asked(folder: Path) -> None:
    with pytest.raises(BundleError, match="overwrite"):
        write_bundle(folder, MANIFEST, FILES)
    replaced = write_bundle(folder, dataclasses.replace(MANIFEST, name="second"), FILES, overwrite=True)
    assert replaced.manifest.name == Bundle.open(folder).manifest.name == "second"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["toy"]


def test_a_failed_write_leaves_the_old_bundle_and_nothing_else(folder: Path) -> None:
    incomplete = {name: contents for name, contents in FILES.items() if name != "tokenizer.json"}
    for files, error in ((incomplete, BundleError), (FILES | {"gone": folder / "gone"}, FileNotFoundError)):
        with pytest.raises(error):
            write_bundle(folder, MANIFEST, files, overwrite=True)
        assert Bundle.open(folder).manifest.name == "toy"
        assert sorted(path.name for path in folder.parent.iterdir()) == ["toy"]


def test_writing_never_replaces_what_is_no_bundle(tmp_path: Path) -> None:
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(BundleError, match="something else"):
        write_bundle(precious, MANIFEST, FILES, overwrite=True)
    assert (precious / "thesis.txt").read_text() == "years of work"


def test_files_may_be_copied_from_paths(tmp_path: Path) -> None:
    source = tmp_path / "weights.bin"
    source.write_bytes(b"w" * 3_000_000)
    bundle = write_bundle(tmp_path / "deep/er/toy", MANIFEST, FILES | {"policy/weights.bin": source})
    assert bundle.file("policy/weights.bin").stat().st_size == 3_000_000


@pytest.mark.parametrize("refuses", [False, True], ids=["linked", "a disk without links"])
def test_files_that_are_given_away_are_linked_and_others_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: bool
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if refuses:
        monkeypatch.setattr(os, "link", refuse)
    given, kept, alias = tmp_path / "work/given.bin", tmp_path / "kept.bin", tmp_path / "work/alias.bin"
    given.parent.mkdir()
    given.write_bytes(b"g" * 5000)
    kept.write_bytes(b"k" * 5000)
    alias.symlink_to(given)
    files = FILES | {"policy/given.bin": given, "policy/kept.bin": kept, "policy/alias.bin": alias}
    bundle = write_bundle(tmp_path / "toy", MANIFEST, files, link_below=given.parent)
    assert bundle.file("policy/given.bin").samefile(given) is not refuses
    assert not bundle.file("policy/kept.bin").samefile(kept)
    assert not bundle.file("policy/alias.bin").samefile(given)
    assert bundle.file("policy/given.bin").read_bytes() == given.read_bytes()

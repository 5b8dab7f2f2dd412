"""Files in pieces: cut, carried over several calls, checked, put together."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest

from benchmarks.gpu.errors import GpuCheckError
from benchmarks.gpu.packing import checkout_bytes, fill, load_room, write_loads
from benchmarks.gpu.pieces import (
    CONTENTS,
    MAX_PIECE_BYTES,
    Carried,
    Piece,
    join,
    missing,
    piece_lengths,
    read_contents,
    receive,
    split,
    write_contents,
)


def bytes_of(count: int) -> bytes:
    return random.Random(count).randbytes(count)


@pytest.fixture
def packed(tmp_path: Path) -> tuple[Path, Carried, Path]:
    """A file of 1000 bytes, its pieces of at most 300, and their folder."""
    path, folder = tmp_path / "x.whl", tmp_path / "load"
    path.write_bytes(bytes_of(1000))
    folder.mkdir()
    carried = split(path, folder, 300, first_bytes=150)
    write_contents(folder, [carried])
    return path, carried, folder


@pytest.mark.parametrize(
    ("total", "most", "first", "lengths"),
    [
        pytest.param(0, 10, 10, [0], id="empty"),
        pytest.param(1, 10, 10, [1], id="one byte"),
        pytest.param(10, 10, 10, [10], id="exactly one"),
        pytest.param(11, 10, 10, [10, 1], id="one byte too many"),
        pytest.param(25, 10, 3, [3, 10, 10, 2], id="first fills up a load"),
        pytest.param(2, 10, 3, [2], id="all in what was left"),
    ],
)
def test_lengths_of_pieces(total: int, most: int, first: int, lengths: list[int]) -> None:
    assert piece_lengths(total, most, first) == lengths


@pytest.mark.parametrize("count", [0, 1, 299, 300, 301, 1000, (1 << 20) + 7], ids=str)
def test_what_is_cut_is_put_together_again(count: int, tmp_path: Path) -> None:
    path = tmp_path / "source"
    path.write_bytes(bytes_of(count))
    (tmp_path / "pieces").mkdir()
    carried = split(path, tmp_path / "pieces", max(300, count // 3))
    joined = join(carried, tmp_path / "pieces", tmp_path / "joined")
    assert joined.read_bytes() == bytes_of(count) and carried.sha256 == hashlib.sha256(bytes_of(count)).hexdigest()
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("sizes", [(0, None), (MAX_PIECE_BYTES + 1, None), (10, 11), (10, 0)], ids=str)
def test_sizes_of_pieces_that_are_refused(sizes: tuple[int, int | None], tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"1")
    with pytest.raises(GpuCheckError, match=r"expected pieces of 1 to 60000000 bytes"):
        split(tmp_path / "x", tmp_path, sizes[0], first_bytes=sizes[1])


def test_a_missing_piece_is_named(packed: tuple[Path, Carried, Path], tmp_path: Path) -> None:
    _, carried, folder = packed
    (folder / carried.pieces[1].name).unlink()
    (folder / carried.pieces[2].name).write_bytes(b"short")
    assert missing(carried, folder) == ["x.whl.2of4", "x.whl.3of4"]
    with pytest.raises(GpuCheckError, match=r"missing: x\.whl\.2of4, x\.whl\.3of4; carry them"):
        join(carried, folder, tmp_path / "joined")


def test_a_damaged_piece_is_named_and_nothing_is_left(packed: tuple[Path, Carried, Path], tmp_path: Path) -> None:
    _, carried, folder = packed
    path = folder / carried.pieces[3].name
    path.write_bytes(bytes(len(path.read_bytes())))
    with pytest.raises(GpuCheckError, match=r"x\.whl\.4of4 as it was packed"):
        join(carried, folder, tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


def test_pieces_arrive_over_several_calls(packed: tuple[Path, Carried, Path], tmp_path: Path) -> None:
    path, carried, folder = packed
    kept = tmp_path / "kept"
    assert receive(tmp_path / "absent", kept) == [] and read_contents(kept) == ()
    for number, piece in enumerate(carried.pieces):
        arrived = tmp_path / f"call{number}"
        arrived.mkdir()
        (arrived / CONTENTS).write_bytes((folder / CONTENTS).read_bytes())
        (arrived / piece.name).write_bytes((folder / piece.name).read_bytes())
        assert len(missing(carried, kept)) == 4 - number
        assert receive(arrived, kept) == [piece.name]
        assert receive(arrived, kept) == [], "a second time nothing is new"
    assert join(read_contents(kept)[0], kept, tmp_path / "joined").read_bytes() == path.read_bytes()


def test_what_must_not_be_taken_in(packed: tuple[Path, Carried, Path], tmp_path: Path) -> None:
    _, carried, folder = packed
    kept = tmp_path / "kept"
    receive(folder, kept)
    other = tmp_path / "other"
    other.mkdir()
    (other / "x.whl.1of4").write_bytes(b"")
    with pytest.raises(GpuCheckError, match=r"expected contents\.json in .*other"):
        receive(other, kept)
    (tmp_path / "y").write_bytes(b"y")
    write_contents(other, [split(tmp_path / "y", other)])
    with pytest.raises(GpuCheckError, match="pieces of one packing"):
        receive(other, kept)
    (folder / carried.pieces[0].name).write_bytes(bytes(150))
    with pytest.raises(GpuCheckError, match=r"x\.whl\.1of4 as it was packed"):
        receive(folder, tmp_path / "fresh")


@pytest.mark.parametrize(
    "text",
    ["{", "[1]", "{}x", '[{"name": "a"}]', '[{"name": "a", "num_bytes": 1, "sha256": "", "pieces": [{"name": "b"}]}]'],
    ids=["no JSON", "no object", "text behind", "half a file", "half a piece"],
)
def test_damaged_contents(text: str, tmp_path: Path) -> None:
    (tmp_path / CONTENTS).write_text(text)
    with pytest.raises(GpuCheckError, match=r"contents\.json.*pack again"):
        read_contents(tmp_path)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "", "..", "a/b"])
def test_names_that_would_leave_the_folder(name: str, tmp_path: Path) -> None:
    piece = {"name": name, "num_bytes": 0, "sha256": "0" * 64}
    for document in ({"name": "a", "pieces": [piece]}, {"name": name, "pieces": []}):
        (tmp_path / CONTENTS).write_text(json.dumps([{"num_bytes": 0, "sha256": "0" * 64, **document}]))
        with pytest.raises(GpuCheckError, match="plain"):
            read_contents(tmp_path)


def carried_of(**sizes: int) -> list[Carried]:
    return [
        Carried(name=name, num_bytes=size, sha256="0" * 64, pieces=(Piece(name=name, num_bytes=size, sha256="0" * 64),))
        for name, size in sizes.items()
    ]


def test_loads_hold_what_fits_in_order() -> None:
    loads = fill(carried_of(a=3, b=4, c=5, d=10, e=1), 10)
    assert [[piece.name for piece in load] for load in loads] == [["a", "b"], ["c"], ["d"], ["e"]]
    assert fill([], 10) == []


def test_written_loads_are_full_and_join(tmp_path: Path) -> None:
    for name, count in (("big", 1000), ("small", 90), ("empty", 0)):
        (tmp_path / name).write_bytes(bytes_of(count))
    loads = write_loads([tmp_path / name for name in ("big", "small", "empty")], tmp_path / "carried", 200)
    assert [sum(piece.num_bytes for piece in load) for load in loads] == [200, 200, 200, 200, 200, 90]
    kept = tmp_path / "kept"
    for number in range(1, 7):
        receive(tmp_path / "carried" / f"load{number}", kept)
    for one in read_contents(kept):
        assert join(one, kept, tmp_path / "joined").read_bytes() == (tmp_path / one.name).read_bytes()
    assert write_loads([tmp_path / "small"], tmp_path / "carried", 200), "an earlier packing is replaced"
    assert len(list((tmp_path / "carried").iterdir())) == 1


def test_packing_keeps_off_other_folders(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("")
    (tmp_path / "a").write_text("")
    with pytest.raises(GpuCheckError, match="holds other things"):
        write_loads([tmp_path / "a"], tmp_path / "folder", 10)
    with pytest.raises(GpuCheckError, match="different names"):
        write_loads([tmp_path / "a", tmp_path / "folder" / ".." / "a"], tmp_path / "carried", 10)


@pytest.mark.parametrize(
    ("checkout", "transfer", "piece", "room"),
    [
        pytest.param(20_000_000, 64 << 20, 60_000_000, (64 << 20) - 20_000_000 - (1 << 20), id="beside a checkout"),
        pytest.param(0, 1 << 40, 60_000_000, 60_000_000, id="a piece is the limit"),
        pytest.param(0, 1 << 40, 1, 1, id="tiny pieces"),
    ],
)
def test_room_of_a_load(checkout: int, transfer: int, piece: int, room: int) -> None:
    assert load_room(checkout, transfer_bytes=transfer, piece_bytes=piece) == room


def test_no_room_for_a_load() -> None:
    with pytest.raises(GpuCheckError, match="leave more of it behind"):
        load_room(66_000_000, transfer_bytes=64 << 20, piece_bytes=60_000_000)
    with pytest.raises(GpuCheckError, match="pieces of 1 to"):
        load_room(0, transfer_bytes=64 << 20, piece_bytes=60_000_001)


def test_a_checkout_without_some_folders(tmp_path: Path) -> None:
    import subprocess

    with pytest.raises(GpuCheckError, match="git checkout"):
        checkout_bytes(tmp_path, ())
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    for name, count in (("a", 5), ("heavy/b", 100), ("ignored/c", 1000)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(count))
    (tmp_path / ".gitignore").write_text("ignored\n")
    assert checkout_bytes(tmp_path, ()) == 5 + 100 + 8
    assert checkout_bytes(tmp_path, ("heavy",)) == 5 + 8

"""Files that are carried to a machine in pieces, and put together there: each piece and each whole has its SHA-256.

A folder of pieces has `contents.json`, which says what belongs together, and the pieces beside it. They may arrive over
several transfers: `receive` copies what is there into a folder that stays, and says what is still missing.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from segzero_rt.commands.output_files import write_text

from .errors import GpuCheckError

CONTENTS = "contents.json"
MAX_PIECE_BYTES = 60_000_000
"""What a transfer takes at most."""
_BLOCK = 1 << 20
_DIGEST_LENGTH = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A part of a file, in a file of its own."""

    name: str
    """File name in the folder of pieces."""
    num_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if Path(self.name).name != self.name or self.name in ("", ".", ".."):
            raise GpuCheckError(f"expected a piece's plain file name, got {self.name[:80]!r}; pack again")
        if self.num_bytes < 0 or len(self.sha256) != _DIGEST_LENGTH:
            raise GpuCheckError(f"expected size and SHA-256 of piece {self.name}, got others; pack again")


@dataclass(frozen=True, kw_only=True, slots=True)
class Carried:
    """A file and the pieces that it is carried in, in order."""

    name: str
    num_bytes: int
    sha256: str
    pieces: tuple[Piece, ...]

    def __post_init__(self) -> None:
        if Path(self.name).name != self.name or self.name in ("", ".", ".."):
            raise GpuCheckError(f"expected a carried file's plain name, got {self.name[:80]!r}; pack again")
        if sum(piece.num_bytes for piece in self.pieces) != self.num_bytes:
            raise GpuCheckError(f"expected pieces of {self.num_bytes} bytes for {self.name}, got others; pack again")


def split(path: Path, folder: Path, piece_bytes: int = MAX_PIECE_BYTES, *, first_bytes: int | None = None) -> Carried:
    """Writes the pieces of a file into `folder`; an empty file has one empty piece.

    Args:
        piece_bytes: most bytes of a piece.
        first_bytes: most bytes of the first, which may fill up what others have left; `piece_bytes` by default.

    Raises:
        GpuCheckError: a piece size below 1 or beyond `MAX_PIECE_BYTES`.
    """
    first = piece_bytes if first_bytes is None else first_bytes
    if not 1 <= first <= piece_bytes <= MAX_PIECE_BYTES:
        raise GpuCheckError(f"expected pieces of 1 to {MAX_PIECE_BYTES} bytes, got {first} and {piece_bytes}")
    lengths = piece_lengths(path.stat().st_size, piece_bytes, first)
    whole, pieces = hashlib.sha256(), []
    with path.open("rb") as source:
        for number, length in enumerate(lengths, start=1):
            name = f"{path.name}.{number}of{len(lengths)}"
            digest = hashlib.sha256()
            with (folder / name).open("wb") as target:
                left = length
                while left:
                    block = source.read(min(_BLOCK, left))
                    if not block:
                        raise GpuCheckError(f"expected {sum(lengths)} bytes in {path}, it ended early; pack again")
                    for one in (digest, whole):
                        one.update(block)
                    target.write(block)
                    left -= len(block)
            pieces.append(Piece(name=name, num_bytes=length, sha256=digest.hexdigest()))
    return Carried(name=path.name, num_bytes=sum(lengths), sha256=whole.hexdigest(), pieces=tuple(pieces))


def piece_lengths(total: int, piece_bytes: int, first_bytes: int) -> list[int]:
    """Bytes of each piece: the first as large as it may be, all but the last of the others full."""
    lengths = [min(total, first_bytes)]
    while (left := total - sum(lengths)) > 0:
        lengths.append(min(left, piece_bytes))
    return lengths


def join(carried: Carried, folder: Path, target: Path) -> Path:
    """Puts a file together as `target`; it is there whole or not at all.

    Raises:
        GpuCheckError: a piece is missing or damaged, or the whole is not what was packed.
    """
    if gone := missing(carried, folder):
        raise GpuCheckError(f"expected all pieces of {carried.name}, missing: {', '.join(gone)}; carry them here")
    unfinished = target.with_name(target.name + ".part")
    whole = hashlib.sha256()
    with unfinished.open("wb") as stream:
        for piece in carried.pieces:
            _check(piece, folder)
            for block in _blocks(folder / piece.name):
                whole.update(block)
                stream.write(block)
    if whole.hexdigest() != carried.sha256:
        unfinished.unlink()
        raise GpuCheckError(f"expected {carried.name} with SHA-256 {carried.sha256[:12]}…, got another; pack again")
    unfinished.replace(target)
    return target


def missing(carried: Carried, folder: Path) -> list[str]:
    """Names of pieces that are not in `folder` in full length."""
    return [
        piece.name
        for piece in carried.pieces
        if not (folder / piece.name).is_file() or (folder / piece.name).stat().st_size != piece.num_bytes
    ]


def write_contents(folder: Path, files: Sequence[Carried]) -> None:
    """Writes what a folder of pieces holds."""
    write_text(folder / CONTENTS, json.dumps([asdict(one) for one in files], indent=1) + "\n")


def read_contents(folder: Path) -> tuple[Carried, ...]:
    """What a folder of pieces holds, or will hold; nothing where no `contents.json` came yet.

    Raises:
        GpuCheckError: the file is damaged.
    """
    path = folder / CONTENTS
    if not path.is_file():
        return ()
    try:
        return tuple(
            Carried(**{**one, "pieces": tuple(Piece(**piece) for piece in one["pieces"])})
            for one in json.loads(path.read_text(encoding="utf-8"))
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise GpuCheckError(f"expected a list of carried files in {path}, got {error}; pack again") from error


def receive(arrived: Path, kept: Path) -> list[str]:
    """Copies what arrived into the folder that stays; returns the names of pieces that are new there.

    Raises:
        GpuCheckError: a piece came damaged, or the pieces are of two packings.
    """
    kept.mkdir(parents=True, exist_ok=True)
    if not arrived.is_dir():
        return []
    known, coming = read_contents(kept), read_contents(arrived)
    if not coming:
        if any(arrived.iterdir()):
            raise GpuCheckError(f"expected {CONTENTS} in {arrived}, got pieces without it; carry it with each of them")
        return []
    if known and known != coming:
        raise GpuCheckError(f"expected pieces of one packing, got two in {arrived} and {kept}; empty {kept}")
    new = []
    for piece in (piece for one in coming for piece in one.pieces):
        source, target = arrived / piece.name, kept / piece.name
        if source.is_file() and not target.is_file():
            _check(piece, arrived)
            shutil.copyfile(source, target.with_name(target.name + ".part"))
            target.with_name(target.name + ".part").replace(target)
            new.append(piece.name)
    if not known:
        write_contents(kept, coming)
    return new


def _check(piece: Piece, folder: Path) -> None:
    digest = hashlib.sha256()
    for block in _blocks(folder / piece.name):
        digest.update(block)
    if digest.hexdigest() != piece.sha256:
        raise GpuCheckError(f"expected piece {piece.name} as it was packed, got other bytes; carry it again")


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            yield block

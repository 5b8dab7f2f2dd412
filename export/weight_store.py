"""Where the weights of a graph in the making go: into the model itself, or into a file beside it.

ONNX files end at 2 GB. Large graphs keep their weights in one file of raw numbers beside them; it is written tensor by
tensor, and a journal names what is whole, so that an export that was killed goes on where it ended.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
from onnx import TensorProto

from .disk import disk_error
from .weight_encoding import Encoding, Stored

INLINE_BYTES = 16 << 10
"""Smaller tensors stay in the model: ONNX Runtime wants to see shapes and axes when it loads."""
ALIGNMENT = 4096
"""Of tensors in a file: a page, so that they can be mapped."""


class WeightStore(ABC):
    """Takes encoded weights and gives tensors for the model."""

    def __init__(self) -> None:
        self.lossless = True
        """False once a weight was rounded to be stored."""
        self.num_bytes = 0
        """Of all that was added."""
        self.on_added: Callable[[int], None] = lambda num_bytes: None
        """Told the bytes of each weight that is stored."""

    def add(self, encoding: Encoding) -> list[TensorProto]:
        """Stores a weight; returns its tensors, with their numbers or with the place where those lie.

        Raises:
            ExportError: a number cannot be stored, or the disk is full.
        """
        num_bytes = sum(tensor.num_bytes for tensor in encoding.tensors)
        self.num_bytes += num_bytes
        protos = self._add(encoding)
        self.on_added(num_bytes)
        return protos

    @abstractmethod
    def _add(self, encoding: Encoding) -> list[TensorProto]: ...

    @abstractmethod
    def close(self) -> None:
        """Nothing will be added any more."""


class InlineStore(WeightStore):
    """Keeps the numbers in the model."""

    def _add(self, encoding: Encoding) -> list[TensorProto]:
        protos = [tensor.proto() for tensor in encoding.tensors]
        parts: list[list[bytes]] = [[] for _ in protos]
        for index, values in encoding.pieces():
            parts[index].append(_raw(values))
        for proto, pieces in zip(protos, parts, strict=True):
            proto.raw_data = b"".join(pieces)
        self.lossless = self.lossless and encoding.lossless
        return protos

    def close(self) -> None:
        """Nothing is open."""


class DryStore(WeightStore):
    """Reads and writes nothing: what a graph will need, before anything is done."""

    def _add(self, encoding: Encoding) -> list[TensorProto]:
        return [tensor.proto() for tensor in encoding.tensors]

    def close(self) -> None:
        """Nothing is open."""


class FileStore(WeightStore):
    """Writes the numbers into a file beside the model; small tensors stay in it.

    Args:
        path: the file; what an earlier, killed export left of it is taken up.
        fingerprint: of everything that the file's contents follow from; with another one it is begun anew.
        whole_file: the only tensor of the file, at its very beginning; nothing stays in the model.
    """

    def __init__(self, path: Path, fingerprint: str, *, whole_file: bool = False) -> None:
        super().__init__()
        self.path = path
        self._inline = InlineStore()
        self._whole_file = whole_file
        self._journal_path = path.with_name(path.name + ".journal")
        self._done, end = _read_journal(self._journal_path, path, fingerprint)
        self.resumed = len(self._done)
        """Weights that were there already."""
        self._file: BinaryIO = path.open("r+b" if end else "wb")
        self._file.truncate(end)
        self._file.seek(end)
        self._journal = _new_journal(self._journal_path, [{"fingerprint": fingerprint}, *self._done.values()])

    def _add(self, encoding: Encoding) -> list[TensorProto]:
        if not self._whole_file and all(tensor.num_bytes < INLINE_BYTES for tensor in encoding.tensors):
            protos = self._inline.add(encoding)
            self.lossless = self.lossless and self._inline.lossless
            return protos
        entry = self._done.get(encoding.tensors[0].name)
        if entry is None:
            entry = self._write(encoding)
        self.lossless = self.lossless and entry["lossless"]
        return [
            external_tensor(tensor, self.path.name, offset)
            for tensor, offset in zip(encoding.tensors, entry["offsets"], strict=True)
        ]

    def close(self) -> None:
        self._file.close()
        self._journal.close()

    def _write(self, encoding: Encoding) -> dict[str, Any]:
        offsets: list[int] = []
        try:
            for index, values in encoding.pieces():
                if index == len(offsets):
                    self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
                    offsets.append(self._file.tell())
                self._file.write(_raw(values))
            self._file.flush()
            os.fdatasync(self._file.fileno())
        except OSError as error:
            raise disk_error(error, self.path) from error
        self._check_lengths(encoding.tensors, offsets)
        entry = {
            "name": encoding.tensors[0].name,
            "offsets": offsets,
            "end": self._file.tell(),
            "lossless": encoding.lossless,
        }
        self._log(entry)
        return entry

    def _check_lengths(self, tensors: Sequence[Stored], offsets: list[int]) -> None:
        ends = [offset + tensor.num_bytes for tensor, offset in zip(tensors, offsets, strict=True)]
        if ends[-1] != self._file.tell():
            raise AssertionError(f"{tensors[0].name}: the encoding wrote another length than it declared")

    def _log(self, entry: dict[str, Any]) -> None:
        try:
            self._journal.write(json.dumps(entry) + "\n")
            self._journal.flush()
        except OSError as error:
            raise disk_error(error, self._journal_path) from error


def external_tensor(tensor: Stored, location: str, offset: int = 0) -> TensorProto:
    """A tensor whose numbers lie in the file `location` beside the model."""
    proto = tensor.proto()
    proto.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(tensor.num_bytes))):
        proto.external_data.add(key=key, value=value)
    return proto


def _raw(values: np.ndarray) -> bytes:
    little = values.astype(values.dtype.newbyteorder("<"), copy=False) if values.dtype.kind in "fiu" else values
    return little.tobytes()


def _new_journal(path: Path, entries: Sequence[dict[str, Any]]) -> TextIO:
    """A journal of these entries, open for more; the line that a kill may have cut is gone from it."""
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
        temporary.replace(path)
        return path.open("a", encoding="utf-8")
    except OSError as error:
        raise disk_error(error, path) from error


def _read_journal(journal: Path, data: Path, fingerprint: str) -> tuple[dict[str, Any], int]:
    """What is whole of an earlier run, by name, and where it ends; nothing when it was of another export."""
    if not journal.is_file() or not data.is_file():
        return {}, 0
    entries = []
    for line in journal.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            break  # the line that was being written when the run was killed
    if not entries or entries[0] != {"fingerprint": fingerprint}:
        return {}, 0
    size = data.stat().st_size
    whole = [entry for entry in entries[1:] if entry["end"] <= size]
    return {entry["name"]: entry for entry in whole}, max((entry["end"] for entry in whole), default=0)

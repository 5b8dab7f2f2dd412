"""Engines into a bundle and out of it again: the manifest is replaced last and in one step.

An engine's file is named after its contents, so it never replaces one that the manifest in force lists. Whoever is
killed at any moment leaves the bundle as it was, and at most a file that no manifest lists; the next build removes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from segzero_rt.bundle import Bundle, file_record, replace_manifest, sync
from segzero_rt.engines.record import EngineRecord
from segzero_rt.errors import BundleError, EngineError
from segzero_rt.manifest import FileRecord
from segzero_rt.onnx_summary import read_summary

ENGINE_FOLDER = "engines"
_PART = ".part"
_DIGEST_DIGITS = 16


def graph_digest(bundle: Bundle, graph: str) -> str:
    """sha256 over the hashes of a graph's file and of the files beside it that hold its weights.

    Raises:
        GraphError: the graph cannot be read.
        BundleError: weights lie in a file that the manifest does not list.
    """
    folder = graph.rpartition("/")[0]
    beside = sorted(read_summary(bundle.file(graph)).external_files)
    names = [graph, *(f"{folder}/{name}" if folder else name for name in beside)]
    for name in names:
        if name not in bundle.manifest.files:
            raise BundleError(f"{bundle.root}: {graph}: expected its weights in a listed file, got {name[:80]!r}")
    text = "\n".join(bundle.manifest.files[name].sha256 for name in names)
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def building(bundle: Bundle) -> Iterator[None]:
    """Holds the right to change a bundle's engines; leftovers of builds that were killed are removed first.

    Raises:
        BundleError: the folder cannot be written.
        EngineError: another process is building there.
    """
    if not os.access(bundle.root, os.W_OK):
        raise BundleError(f"{bundle.root}: expected a bundle that can be written, got none; copy it elsewhere first")
    folder = os.open(bundle.root, os.O_RDONLY)  # a lock file would stay behind in bundles that get no engine
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise EngineError(f"{bundle.root}: another `segzero build` is running there; wait for it to end") from error
        _remove_unlisted(bundle)
        yield
    finally:
        os.close(folder)


def write_engine(bundle: Bundle, name: str, data: memoryview) -> tuple[str, FileRecord]:
    """Writes an engine's bytes below the bundle, flushed to disk, where no manifest lists them yet.

    Args:
        name: readable part of the file's name.

    Returns:
        path inside the bundle, and what the manifest has to say of it.

    Raises:
        EngineError: the disk is full, or refuses.
    """
    folder = bundle.root / ENGINE_FOLDER
    part = folder / f"{name}{_PART}"
    try:
        folder.mkdir(exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < data.nbytes:
            raise EngineError(f"{folder}: expected {data.nbytes} bytes of free disk for {name}, got {free}; make room")
        with part.open("wb") as stream:
            stream.write(data)
        record = file_record(part)
        file = f"{ENGINE_FOLDER}/{name}-{record.sha256[:_DIGEST_DIGITS]}.engine"
        sync(part)
        part.replace(bundle.root / file)
        sync(folder)
    except OSError as error:
        raise EngineError(f"{folder}: cannot write {name}: {error.strerror}; the bundle is as it was") from error
    finally:
        part.unlink(missing_ok=True)
    return file, record


def record_engines(bundle: Bundle, built: Sequence[tuple[EngineRecord, FileRecord]]) -> Bundle:
    """Puts engines into the manifest, in the place of those that they replace, and removes the files of the latter.

    Raises:
        BundleError: the manifest cannot be written; the bundle is as it was.
    """
    records = [record for record, _ in built]
    kept = [old for old in bundle.manifest.engines if not any(new.replaces(old) for new in records)]
    gone = {old.file for old in bundle.manifest.engines} - {engine.file for engine in (*kept, *records)}
    files = {name: record for name, record in bundle.manifest.files.items() if name not in gone}
    files.update({record.file: listed for record, listed in built})
    manifest = dataclasses.replace(bundle.manifest, files=files, engines=(*kept, *records))
    changed = replace_manifest(bundle, manifest)
    _remove_unlisted(changed)
    return changed


def _remove_unlisted(bundle: Bundle) -> None:
    """Files of builds that were killed, and of engines that were replaced."""
    listed = {Path(name).name for name in bundle.manifest.files if name.startswith(f"{ENGINE_FOLDER}/")}
    folder = bundle.root / ENGINE_FOLDER
    for path in folder.iterdir() if folder.is_dir() else ():
        ours = path.suffix in (_PART, ".engine") and path.is_file() and not path.is_symlink()
        if ours and path.name not in listed:
            with contextlib.suppress(OSError):  # still open on some network disks; the next build tries again
                path.unlink()

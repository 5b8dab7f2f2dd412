"""A bundle: one folder with everything that a run needs, checked before any of it is used.

Nothing in it is executed or unpickled, no path in it leaves it, and a file that is not exactly what the manifest says
is an error, not a guess. Writing is all or nothing: readers see the old bundle or the new one, never half of one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from segzero_rt.errors import BundleError
from segzero_rt.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, FileRecord, Manifest, check_relative_path

EMBEDDED = Path(__file__).parent / "bundles" / "tabletop"
_CHUNK_BYTES = 1 << 20

Verify = Literal["full", "size"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """An opened, verified bundle. Make one with `Bundle.open`."""

    root: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str] | None = None, *, verify: Verify = "full") -> Bundle:
        """Open a bundle and check it.

        Args:
            path: the bundle's folder; None opens the embedded `tabletop` bundle.
            verify: "full" compares size and sha256 of every file (about 1 s per GB), "size" the sizes alone, for a
                bundle that this machine has checked before.

        Raises:
            BundleError: no such folder, not a bundle, another format version, or any file differs from the manifest.
        """
        root = EMBEDDED if path is None else Path(path)
        text = _read_manifest_text(root)
        bundle = cls(root=root.resolve(), manifest=Manifest.from_json(text))
        for name in bundle.manifest.required_files:
            if name not in bundle.manifest.files:
                raise BundleError(f"{root}: the manifest names {name!r} as a part but does not list it among its files")
        for name, record in bundle.manifest.files.items():
            _verify_file(bundle.root, name, record, verify)
        return bundle

    def file(self, name: str) -> Path:
        """Absolute path of a file that the manifest lists.

        Raises:
            BundleError: the manifest does not list it.
        """
        if name not in self.manifest.files:
            raise BundleError(f"{self.root}: expected a file of the manifest, got {name!r}")
        return self.root / name

    @property
    def num_bytes(self) -> int:
        """Size of all listed files."""
        return sum(record.bytes for record in self.manifest.files.values())


def write_bundle(
    target: str | os.PathLike[str],
    manifest: Manifest,
    files: Mapping[str, Path | bytes],
    *,
    overwrite: bool = False,
    link_below: Path | None = None,
) -> Bundle:
    """Write a bundle so that `target` is either untouched or complete.

    All is written to a temporary folder beside `target`, flushed to disk, opened and verified there, and renamed.

    Args:
        manifest: its `files` is replaced by what is written.
        files: path inside the bundle to contents, or to a file to copy.
        overwrite: replace a bundle that is there; it stays until the new one is complete.
        link_below: files under this folder are the caller's to give away, and never change again; they are linked where
            the disk allows it, so that gigabytes are not copied.

    Raises:
        BundleError: `target` exists and `overwrite` is false, or is no bundle, or the parts do not make a valid bundle.
    """
    target = Path(target).absolute()
    check_target(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        records = {
            name: _write_file(staging, name, source, link_below=link_below) for name, source in sorted(files.items())
        }
        text = dataclasses.replace(manifest, files=records).to_json()
        _write_file(staging, MANIFEST_NAME, text.encode(), check=False)
        for folder in {staging, *(path.parent for path in staging.rglob("*"))}:
            sync(folder)
        Bundle.open(staging)
        staging.chmod(0o755)
        _put_in_place(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # gone already when all went well
    return Bundle.open(target, verify="size")


def replace_manifest(bundle: Bundle, manifest: Manifest) -> Bundle:
    """Puts another manifest in the place of a bundle's, in one step: readers see the old one or the new one.

    Every file that it lists must be there already. Files that it no longer lists are the caller's to remove.

    Raises:
        BundleError: the manifest does not fit the files, or the folder cannot be written; nothing has changed then.
    """
    temporary = bundle.root / f".{MANIFEST_NAME}.part"
    try:
        for name, record in manifest.files.items():
            _verify_file(bundle.root, name, record, "size")
        temporary.write_text(manifest.to_json(), encoding="utf-8")
        sync(temporary)
        temporary.replace(bundle.root / MANIFEST_NAME)
        sync(bundle.root)
    except OSError as error:
        raise BundleError(f"{bundle.root}: cannot write {MANIFEST_NAME}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return Bundle.open(bundle.root, verify="size")


def file_record(path: Path) -> FileRecord:
    """Size and hash of a file that is to be listed."""
    return FileRecord(sha256=_sha256(path), bytes=path.stat().st_size)


def _read_manifest_text(root: Path) -> str:
    path = root / MANIFEST_NAME
    try:
        if not root.is_dir():
            found = "a file" if root.exists() else "nothing there"
            raise BundleError(f"{root}: expected a bundle's folder, got {found}")
        if path.is_symlink() or not path.is_file():
            raise BundleError(
                f"{root}: expected a bundle, but it has no {MANIFEST_NAME}; export one with `segzero export`"
            )
        with path.open("rb") as stream:
            data = stream.read(MAX_MANIFEST_BYTES + 1)
        if len(data) > MAX_MANIFEST_BYTES:
            raise BundleError(f"{path}: expected at most {MAX_MANIFEST_BYTES} bytes, got more")
        return data.decode()
    except UnicodeDecodeError as error:
        raise BundleError(f"{path}: expected UTF-8 text, got other bytes; fetch the bundle again") from error
    except OSError as error:
        raise BundleError(f"{str(path)[:200]}: cannot be read: {error.strerror}") from error


def _verify_file(root: Path, name: str, record: FileRecord, verify: Verify) -> None:
    path = root / name
    try:
        if path.resolve() != path:  # `root` is resolved, so only a link inside the bundle can differ
            raise BundleError(f"{root}: {name}: expected a plain file, got a link; copy the file into the bundle")
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise BundleError(f"{root}: {name}: expected a plain file, got something else")
        if status.st_size != record.bytes:
            raise BundleError(f"{root}: {name}: expected {record.bytes} bytes, got {status.st_size}; fetch it again")
        if verify == "full" and _sha256(path) != record.sha256:
            raise BundleError(f"{root}: {name}: damaged: its sha256 differs from the manifest's; fetch it again")
    except FileNotFoundError as error:
        raise BundleError(f"{root}: {name}: expected a file, got nothing there; fetch the bundle again") from error
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise BundleError(f"{root}: {name}: cannot be read: {error}") from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def check_target(target: Path, *, overwrite: bool) -> None:
    """Refuses a place where `write_bundle` could not write, so that nobody waits for an export to learn it.

    Raises:
        BundleError: something is there that may not be replaced, or a file stands where a folder above it would.
    """
    above = next(folder for folder in target.absolute().parents if folder.exists())
    if not above.is_dir():
        raise BundleError(f"{target}: expected a folder above it, but {above} is a file; choose another path")
    if not target.exists() and not target.is_symlink():
        return
    if not overwrite:
        raise BundleError(f"{target}: expected a new path, got one that exists; choose another or ask to overwrite it")
    if target.is_symlink() or not (target / MANIFEST_NAME).is_file():
        raise BundleError(f"{target}: expected a bundle to replace, got something else; nothing was changed")


def _write_file(
    root: Path, name: str, source: Path | bytes, *, check: bool = True, link_below: Path | None = None
) -> FileRecord:
    if check:
        check_relative_path(name)
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(source, bytes):
        path.write_bytes(source)
    elif link_below is None or not source.is_relative_to(link_below) or not _linked(source, path):
        shutil.copyfile(source, path)
    sync(path)
    return file_record(path)


def _linked(source: Path, path: Path) -> bool:
    """Gives a plain file a second name; false where the disk has no such names, or the two lie on different ones."""
    if source.is_symlink():
        return False
    try:
        os.link(source, path)
    except OSError:
        return False
    return True


def sync(path: Path) -> None:
    """Waits until a file's contents, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(staging: Path, target: Path) -> None:
    """Rename `staging` to `target`; a bundle that was there is moved aside first and put back if the rename fails."""
    if not target.exists():
        staging.rename(target)
    else:
        old = staging.with_suffix(".old")
        target.rename(old)
        try:
            staging.rename(target)
        except OSError:
            old.rename(target)
            raise
        shutil.rmtree(old)
    sync(target.parent)

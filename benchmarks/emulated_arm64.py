"""A Debian arm64 Python in a folder of an x86-64 machine: packages unpacked, run by qemu-user. No root, no container.

    python -m benchmarks.emulated_arm64 .venv-arm64

Debian's packages come from the machine's own apt sources, into the folder alone: nothing is installed, and the
machine's package lists stay as they are. The folder is a virtual environment too: `bin/python` is a script that
starts the arm64 Python under qemu, so that what Python starts as `sys.executable` is emulated as well, without
binfmt_misc. Compiling is done by a cross compiler: a program of the host, which an emulated process can start too.

About 300 MB of downloads and 0.7 GB of disk, once; a folder that is finished is left as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PROCESSOR = "cortex-a76"
"""What qemu shows: Armv8.2 with half floats and dot products, next of kin to Orin's Cortex-A78AE."""
ARM64_PACKAGES = ("python3", "libpython3-dev", "libstdc++6", "libgomp1")
HOST_PACKAGES = ("qemu-user-static", "g++-aarch64-linux-gnu")
QEMU_NAMES = ("qemu-aarch64-static", "qemu-aarch64")
"""Debian dropped the suffix when all of its builds became static."""
TEST_PACKAGES = ("setuptools", "pytest", "onnx", "tokenizers")
"""What builds the project's wheel, and what its runtime's tests use beside the runtime's own requirements."""
STEP_LIMIT_S = 1800
NEEDED_BYTES = 1_500_000_000
PACKAGED = ("segzero_rt", "export", "training", "setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE")
"""The parts of the checkout that a wheel is made of."""
_BEGUN, _FINISHED, _INSTALLED = "emulated_arm64", "finished", "installed_project"
_FEATURES = "fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
_UNPACKAGED = {"__pycache__", "checkpoints"}
_UNREAD = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info")


class MachineError(RuntimeError):
    """The emulated machine cannot be made or used here: says what was expected, what came and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EmulatedArm64:
    """A finished folder."""

    folder: Path

    @classmethod
    def open(cls, folder: Path) -> EmulatedArm64:
        """
        Raises:
            MachineError: there is no finished machine in the folder.
        """
        if not (folder / _FINISHED).is_file():
            raise MachineError(
                f"expected an emulated arm64 machine in {folder}, there is none; make it with "
                f"`python -m benchmarks.emulated_arm64 {folder}`"
            )
        return cls(folder=folder.resolve())

    @property
    def python(self) -> Path:
        return self.folder / "bin/python"

    @property
    def segzero(self) -> Path:
        """The command, once `install_project` has brought the package."""
        return self.folder / "bin/segzero"

    def run(
        self,
        command: Sequence[str | Path],
        *,
        timeout_s: float,
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a program of the machine's `bin` in a folder, with more environment variables; its output is captured.

        Raises:
            MachineError: it does not end in time.
        """
        try:
            return subprocess.run(
                [str(part) for part in command],
                cwd=folder,
                env={**os.environ, **self._variables(), **(environment or {})},
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            shown = " ".join(map(str, command[1:4]))
            raise MachineError(f"expected `{shown} …` to end on arm64, it did not in {timeout_s:.0f} s") from None

    def _variables(self) -> dict[str, str]:
        """In place of the host's own."""
        compiler = str(self.folder / "bin/c++")
        return {"SEGZERO_CACHE": str(self.folder / "cache"), "CC": compiler, "CXX": compiler}

    def packages(self) -> dict[str, str]:
        """Versions of what is installed, by name."""
        found = importlib.metadata.distributions(path=[str(_site(self.folder))])
        versions = {it.metadata["Name"]: it.version for it in found}
        return dict(sorted(versions.items(), key=lambda item: item[0].lower()))

    def installed(self) -> str:
        """A digest of what the installed wheel was built from; "" before `install_project`."""
        note = self.folder / _INSTALLED
        return note.read_text("utf-8") if note.is_file() else ""

    def install_project(self) -> bool:
        """Builds the checkout's wheel on the emulated machine, kernels included, and installs it unless it is there.

        Returns:
            Whether there was something to do.

        Raises:
            MachineError: setuptools, the compiler or pip refuses.
        """
        note, digest = self.folder / _INSTALLED, _digest()
        if note.is_file() and note.read_text("utf-8") == digest:
            return False
        note.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(prefix="segzero-arm64-") as copy:
            for name in PACKAGED:  # building in the checkout would leave its traces there
                _copy(REPOSITORY / name, Path(copy) / name)
            setup: list[str | Path] = [self.python, "setup.py", "-q", "bdist_wheel", "--compression", "stored"]
            done = self.run(setup, timeout_s=STEP_LIMIT_S, folder=Path(copy))
            wheels = list(Path(copy).glob("dist/*_aarch64.whl"))
            if done.returncode or len(wheels) != 1:
                raise MachineError(f"expected a wheel for arm64, kernels included; setup.py says: {_last_lines(done)}")
            install = [*_pip(self.folder, ["linux_aarch64"]), "--no-deps", "--upgrade", str(wheels[0])]
            _do(install, "the wheel to install")
        note.write_text(digest, "utf-8")
        return True


def make_machine(folder: Path, pins: Sequence[str] = ()) -> EmulatedArm64:
    """Makes the machine in a folder, or finds it finished there; what is half-made is made anew.

    Args:
        folder: Becomes a virtual environment; never one that holds anything else.
        pins: Requirements that replace the newest wheels, such as "numpy==2.2.6".

    Raises:
        MachineError: this is no x86-64 Debian, a tool or the network is missing, the disk is full, a step fails or
            takes longer than `STEP_LIMIT_S`.
    """
    _check_host(folder)
    if (folder / _FINISHED).is_file() and (folder / _FINISHED).read_text("utf-8") == _recipe(pins):
        _write_programs(folder.resolve(), _python_version(folder / "root"))  # as they are written now
        (folder / _FINISHED).touch()  # for make, which compares times
        return EmulatedArm64.open(folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / _BEGUN).touch()
    folder = folder.resolve()
    _step("Debian's arm64 Python and libraries")
    _unpack_packages(folder, "arm64", ARM64_PACKAGES, folder / "root")
    _step("qemu-user and a cross compiler")
    _unpack_packages(folder, "amd64", HOST_PACKAGES, folder / "tools")
    shutil.rmtree(folder / "apt")
    _write_processor(folder / "root")
    _write_programs(folder, _python_version(folder / "root"))
    _step("wheels for arm64")
    _install_wheels(folder, pins)
    _step("a first run")
    machine = EmulatedArm64(folder=folder)
    done = machine.run([machine.python, "-c", "import cv2, numpy, onnxruntime, PIL, pytest"], timeout_s=STEP_LIMIT_S)
    if done.returncode:
        raise MachineError(f"expected the arm64 wheels to load under qemu, it says: {_last_lines(done)}")
    (folder / _FINISHED).write_text(_recipe(pins), "utf-8")
    return EmulatedArm64.open(folder)


def requirements(extra: str = "cpu") -> list[str]:
    """What the runtime and one extra ask for, as the installed metadata of this checkout says."""
    from packaging.requirements import Requirement

    parsed = map(Requirement, importlib.metadata.requires("segzero-rt") or [])
    return [f"{it.name}{it.specifier}" for it in parsed if it.marker is None or it.marker.evaluate({"extra": extra})]


def processor_info(count: int) -> str:
    """`/proc/cpuinfo` as Linux writes it for `PROCESSOR`; on the host's own, of another kind, ONNX Runtime crashes.

    Its features are those that qemu announces (`AT_HWCAP`).
    """
    facts = (
        *(("BogoMIPS", "62.50"), ("Features", _FEATURES), ("CPU implementer", "0x41"), ("CPU architecture", "8")),
        *(("CPU variant", "0x4"), ("CPU part", "0xd0b"), ("CPU revision", "1")),
    )
    lines = "".join(f"{key}\t: {value}\n" for key, value in facts)
    return "".join(f"processor\t: {number}\n{lines}\n" for number in range(count))


def _check_host(folder: Path) -> None:
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise MachineError(
            f"expected Linux on x86-64 to emulate arm64, this is {platform.system()} on {platform.machine()}; on arm64 "
            "run the tests as they are: make test"
        )
    missing = [tool for tool in ("apt-get", "dpkg-deb", "tar") if shutil.which(tool) is None]
    if missing:
        raise MachineError(f"expected Debian's tools, found no {', '.join(missing)}; this needs a Debian-like machine")
    if folder.exists() and not (folder / _BEGUN).is_file() and any(folder.iterdir()):
        raise MachineError(f"expected an empty folder or an emulated machine in {folder}, it holds other things")
    free = shutil.disk_usage(next(parent for parent in folder.absolute().parents if parent.exists())).free
    if free < NEEDED_BYTES and not (folder / _FINISHED).is_file():
        raise MachineError(f"expected {NEEDED_BYTES / 1e9:.1f} GB of free disk for {folder}, found {free / 1e9:.1f} GB")


def _recipe(pins: Sequence[str]) -> str:
    """What a finished folder was made of: another recipe makes it anew."""
    return "\n".join([PROCESSOR, *ARM64_PACKAGES, *HOST_PACKAGES, *TEST_PACKAGES, *requirements(), *pins]) + "\n"


def _unpack_packages(folder: Path, architecture: str, packages: Sequence[str], target: Path) -> None:
    """Downloads Debian packages with all that they depend on, and unpacks them; no script of theirs is run."""
    state = folder / "apt"
    shutil.rmtree(state, ignore_errors=True)
    for name in ("lists/partial", "archives/partial"):
        (state / name).mkdir(parents=True)
    (state / "status").touch()  # nothing counts as installed, so everything is brought
    settings = {
        "APT::Architecture": architecture,
        "APT::Architectures": architecture,
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "",
        "Debug::NoLocking": "true",
        "Dir::State": str(state),
        "Dir::State::lists": str(state / "lists"),
        "Dir::State::status": str(state / "status"),
        "Dir::Cache": str(state),
    }
    apt = ["apt-get", "-q", *(part for key, value in settings.items() for part in ("-o", f"{key}={value}"))]
    _do([*apt, "update"], f"lists of {architecture} packages (a network, a Debian mirror in apt's sources)")
    _do([*apt, "install", "-y", "--download-only", *packages], f"packages of {architecture} from apt's sources")
    for part in ("bin", "sbin", "lib"):
        (target / "usr" / part).mkdir(parents=True)
        (target / part).symlink_to(f"usr/{part}")  # as on every Debian today
    for package in sorted((state / "archives").glob("*.deb")):
        unpack = 'dpkg-deb --fsys-tarfile "$0" | tar -x --keep-directory-symlink --no-same-owner -C "$1"'
        _do(["sh", "-c", unpack, str(package), str(target)], "a downloaded package to unpack")
    for name in _UNREAD:
        shutil.rmtree(target / name, ignore_errors=True)


def _python_version(root: Path) -> str:
    """Such as "3.11", by where Debian's `python3` leads."""
    return str((root / "usr/bin/python3").readlink()).removeprefix("python")


def _write_processor(root: Path) -> None:
    (root / "proc").mkdir()
    # All that /sys lists, not those that this process may use: ONNX Runtime matches both by number.
    (root / "proc/cpuinfo").write_text(processor_info(os.cpu_count() or 1), "ascii")


def _write_programs(folder: Path, version: str) -> None:
    """The virtual environment's Python, and the compiler that the emulated Python is told of."""
    tools, root = folder / "tools", folder / "root"
    qemu = next(path for name in QEMU_NAMES if (path := tools / "usr/bin" / name).is_file())
    for other in (tools / "usr/bin").glob("qemu-*"):
        if other != qemu:
            other.unlink()  # of other processors, 190 MB
    for script in (tools / "usr/aarch64-linux-gnu/lib").glob("lib*.so"):
        if not script.is_symlink() and (text := script.read_bytes()).startswith(b"/* GNU ld script"):
            script.write_bytes(text.replace(b"/usr/aarch64-linux-gnu/lib/", b""))  # its place on Debian, not here
    (folder / "pyvenv.cfg").write_text(
        f"home = {root}/usr/bin\ninclude-system-site-packages = false\nversion = {version}\n", "utf-8"
    )
    _write_program(
        folder / "bin/python",
        "unset LD_LIBRARY_PATH LD_PRELOAD PYTHONHOME",  # meant for the host's programs
        # Whoever names a compiler has that one, also where what is emulated starts this Python again.
        f'export CC="${{CC:-{folder}/bin/c++}}" CXX="${{CXX:-{folder}/bin/c++}}"',
        f'exec "{qemu}" -cpu {PROCESSOR} -L "{root}" -0 "{folder}/bin/python" "{root}/usr/bin/python{version}" "$@"',
    )
    # As the wheel's entry point says; a script of the host's pip would name the host's Python.
    _write_program(folder / "bin/segzero", f'exec "{folder}/bin/python" -P -m segzero_rt.cli "$@"')
    _write_program(
        folder / "bin/c++",
        f'for part; do shift; [ "$part" = -march=native ] && part=-mcpu={PROCESSOR}; set -- "$@" "$part"; done',
        f'export LD_LIBRARY_PATH="{tools}/usr/lib/x86_64-linux-gnu"',
        f'exec "{tools}/usr/bin/aarch64-linux-gnu-g++" -isystem "{root}/usr/include/python{version}" '
        f'-isystem "{root}/usr/include" "$@"',
    )


def _write_program(path: Path, *lines: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]), "utf-8")
    path.chmod(0o755)


def _site(folder: Path) -> Path:
    return folder / f"lib/python{_python_version(folder / 'root')}/site-packages"


def _pip(folder: Path, tags: Sequence[str]) -> list[str]:
    """The host's pip, told of another platform: unpacking under emulation would take minutes."""
    options = ["--quiet", "--disable-pip-version-check", "--root-user-action=ignore", "--no-compile"]
    place = ["--target", str(_site(folder)), "--python-version", _python_version(folder / "root")]
    platforms = [part for tag in tags for part in ("--platform", tag)]
    return [sys.executable, "-m", "pip", "install", *options, *place, "--only-binary=:all:", *platforms]


def _install_wheels(folder: Path, pins: Sequence[str]) -> None:
    # Up to the C library of the oldest Debian that has these packages.
    tags = ["manylinux2014_aarch64", *(f"manylinux_2_{minor}_aarch64" for minor in range(17, 37))]
    _do([*_pip(folder, tags), *requirements(), *TEST_PACKAGES, *pins], "arm64 wheels from the package index")
    # Behind the installed package: tests use the checkout's other folders, never its `segzero_rt`.
    (_site(folder) / "checkout.pth").write_text(f"{REPOSITORY}\n", "utf-8")


def _do(command: Sequence[str], what: str) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=STEP_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise MachineError(f"expected {what}; {Path(command[0]).name} had no end after {STEP_LIMIT_S} s") from None
    if done.returncode:
        raise MachineError(f"expected {what}; {Path(command[0]).name} says: {_last_lines(done)}")


def _last_lines(done: subprocess.CompletedProcess[str], count: int = 5) -> str:
    said = [line for line in (done.stderr + "\n" + done.stdout).splitlines() if line.strip()]
    errors = [line for line in said if re.match(r"(E|ERROR|error|Err):?\b", line)]
    return " | ".join((errors or said)[-count:]) or f"nothing, status {done.returncode}"


def _digest() -> str:
    """Of every file that goes into the wheel."""
    digest = hashlib.sha256()
    for name in PACKAGED:
        path = REPOSITORY / name
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.is_file() and file.suffix != ".so" and not _UNPACKAGED & set(file.parts):
                digest.update(str(file.relative_to(REPOSITORY)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(*_UNPACKAGED, "*.so"))
    else:
        shutil.copy(source, target)


def _step(what: str) -> None:
    print(f"arm64: {what}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the machine is made, such as .venv-arm64")
    parser.add_argument("--pin", action="append", default=[], help="a wheel, such as numpy==2.2.6; repeatable")
    options = parser.parse_args(arguments)
    try:
        make_machine(options.folder, options.pin)
    except MachineError as error:
        print(f"arm64: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

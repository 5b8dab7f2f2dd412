"""Size of an installation: core + [cpu] in a fresh virtual environment, without pip and setuptools, and its start-up.

    python benchmarks/install_size.py            # a table
    python benchmarks/install_size.py --json     # one JSON document

1 MiB is 2**20 bytes of file contents; the byte-code that pip compiles and the embedded bundle are in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
_NOT_OURS = ("pip", "setuptools", "pkg_resources", "_distutils_hack", "distutils-precedence.pth", "wheel")


def measure(extra: str = "cpu", starts: int = 5) -> dict[str, Any]:
    """Installs `.[extra]` into a temporary environment; returns sizes in bytes and start-up times in ms."""
    with tempfile.TemporaryDirectory(prefix="segzero-size-") as folder:
        environment = Path(folder) / "venv"
        venv.create(environment, with_pip=True)
        python = environment / "bin" / "python"
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, f"{REPOSITORY}[{extra}]"], check=True, stderr=subprocess.DEVNULL)
        (site,) = (environment / "lib").glob("python*/site-packages")
        sizes = sizes_of(site)
        return {
            "extra": extra,
            "python": sys.version.split()[0],
            "total_bytes": sum(sizes.values()),
            "total_mib": round(sum(sizes.values()) / 2**20, 1),
            "largest_mib": {name: round(size / 2**20, 1) for name, size in list(sizes.items())[:10]},
            "start_ms": {
                name: _median_ms(
                    [str(environment / "bin" / part) if part == "segzero" else part for part in command], starts
                )
                for name, command in {
                    "import segzero_rt": [str(python), "-c", "import segzero_rt"],
                    "segzero --version": ["segzero", "--version"],
                    "segzero run --help": ["segzero", "run", "--help"],
                    "python -c pass": [str(python), "-c", "pass"],
                }.items()
            },
        }


def sizes_of(site: Path) -> dict[str, int]:
    """Bytes per top-level name of a site-packages folder, largest first, without what every environment has."""
    sizes: dict[str, int] = {}
    for path in site.rglob("*"):
        top = path.relative_to(site).parts[0]
        if path.is_file() and not path.is_symlink() and top.split("-")[0] not in _NOT_OURS:
            sizes[top] = sizes.get(top, 0) + path.stat().st_size
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def _median_ms(command: list[str], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/")
        times.append((time.perf_counter() - start) * 1e3)
    return round(statistics.median(times), 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extra", default="cpu")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = measure(arguments.extra)
    if arguments.json:
        print(json.dumps(result))
    else:
        print(f"core + [{result['extra']}]: {result['total_mib']} MiB ({result['total_bytes'] / 1e6:.1f} MB)")
        for name, size in result["largest_mib"].items():
            print(f"  {size:7.1f}  {name}")
        for name, milliseconds in result["start_ms"].items():
            print(f"{name}: {milliseconds} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())

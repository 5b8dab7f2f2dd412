"""The kernels under the address and undefined-behaviour sanitizers, on memory of exactly the size that is needed."""

from __future__ import annotations

import random
import struct
import subprocess
from itertools import islice
from pathlib import Path

import pytest
from hostile_corpus import CORPUS, text_of
from kernel_builds import NEEDS_COMPILER

from benchmarks.answer_mutants import mutants
from benchmarks.kernel_fuzz import seeds
from segzero_rt.answer_format import SEG_ZERO, VISION_REASONER
from segzero_rt.answer_parser import MODES
from segzero_rt.kernels.backend import resolve_kernels
from segzero_rt.kernels.build import find_compiler
from segzero_rt.kernels.parse_prompts import encode_reply, parse_prompts
from segzero_rt.kernels.parse_prompts_host import rules_of

TESTS = Path(__file__).resolve().parent
SIDES = (1, 27, 480, 840, 1080, 1 << 30)
FORMATS = (VISION_REASONER, SEG_ZERO)
FLAGS = ("-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")

pytestmark = [pytest.mark.slow, NEEDS_COMPILER]


def _program(source: str, folder: Path) -> Path:
    """A test program, with sanitizers; skips where the compiler brings none."""
    compiler = find_compiler()
    assert compiler is not None
    empty = folder / "empty.cpp"
    empty.write_text("int main() { return 0; }\n")
    probe = subprocess.run(
        [compiler, *SANITIZERS, "-o", str(folder / "empty"), str(empty)], capture_output=True, text=True, check=False
    )
    if probe.returncode != 0:
        pytest.skip(f"{compiler} has no address and undefined-behaviour sanitizers: {probe.stderr[:200]}")
    target = folder / Path(source).stem
    command = [compiler, *FLAGS, *SANITIZERS, "-o", str(target), "-x", "c++", str(TESTS / source)]
    subprocess.run(command, check=True, timeout=300)
    return target


def _records(rng: random.Random) -> list[bytes]:
    """Six bytes of choices before each reply: the corpus, 6,000 mutants, and nothing at all."""
    replies = [encode_reply(text) for text in map(text_of, CORPUS) if len(text) < 20_000]
    replies += [*islice(mutants(seeds(), 17), 6000), b""]
    return [bytes(rng.randrange(256) for _ in range(6)) + reply for reply in replies]


def _expected(record: bytes) -> str:
    """The line that the program prints, by the reference."""
    sides = [SIDES[choice % 6] for choice in record[1:5]]
    read = parse_prompts(
        [record[6:]],
        answer_format=FORMATS[record[0] >> 2 & 1],
        mode=MODES[record[0] & 3],
        finished=bool(record[0] & 8),
        input_size_hw=(sides[0], sides[1]),
        source_size_hw=(sides[2], sides[3]),
        kernels=resolve_kernels("reference"),
    )
    numbers = [int(read.status[0]), *read.thinking_spans[0].tolist(), int(read.num_objects[0]), len(read.boxes_xyxy)]
    for prompt in read.prompts(0):
        numbers += [int(value) for value in (*prompt.box_xyxy, *(side for point in prompt.points_xy for side in point))]
    return " ".join(map(str, numbers))


def test_replies(tmp_path: Path) -> None:
    program = _program("parse_prompts_fuzz.cpp", tmp_path)
    rules = tmp_path / "rules"
    rules.write_bytes(b"".join(bytes(rules_of(known)) for known in FORMATS))
    records = _records(random.Random(3))
    fed = b"".join(struct.pack("<I", len(record)) + record for record in records)
    run = subprocess.run([program, rules], input=fed, capture_output=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr.decode(errors="replace")[-3000:]
    lines = run.stdout.decode().splitlines()
    assert len(lines) == len(records)
    for record, line in zip(records, lines, strict=True):
        assert line == _expected(record), record


@pytest.mark.parametrize(
    ("source", "jobs"),
    [
        *(("postprocess_masks_fuzz.cpp", 3000), ("preprocess_fuzz.cpp", 3000), ("sample_token_fuzz.cpp", 1000)),
        ("handover_fuzz.cpp", 20_000),
    ],
)
def test_random_jobs(source: str, jobs: int, tmp_path: Path) -> None:
    """Masks; frames and tokens, and there the device's kernels as well, compiled by g++; what lies between, which is
    kernels alone."""
    program = _program(source, tmp_path)
    run = subprocess.run([program, str(jobs), "1"], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-3000:]

"""Mutants against both builds: `python -m benchmarks.kernel_fuzz --mutants 1000000`.

Each mutant is read by the reference and by the host's build in a mode, format and picture size drawn for it, and every
field is compared. The first disagreements are printed with what reproduces them; none may be left.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.answer_mutants import mutants
from benchmarks.measuring import write_result
from segzero_rt.answer_format import FORMATS
from segzero_rt.answer_parser import MODES
from segzero_rt.kernels.backend import Kernels, resolve_kernels
from segzero_rt.kernels.parse_prompts import STATUSES, ParsedReplies, encode_reply, parse_prompts

REPOSITORY = Path(__file__).resolve().parent.parent
HOSTILE = REPOSITORY / "tests/hostile_answers.jsonl"
REAL = REPOSITORY / "../shared/assets/model_outputs.jsonl.gz"
FIELDS = ("status", "thinking_spans", "num_objects", "object_offsets", "boxes_xyxy", "point_offsets", "points_xy")
_CHUNK = 100
_SIDES = (1, 27, 480, 840, 1080, 1_000_000)


def seeds() -> list[bytes]:
    """The hostile replies of the tests, and 400 real ones where they are at hand."""
    cases = [json.loads(line)["text"] for line in HOSTILE.read_text("ascii").splitlines()]
    texts = [case for case in cases if isinstance(case, str)]
    if REAL.exists():
        with gzip.open(REAL, "rt", encoding="utf-8") as lines:
            real = [json.loads(line)["output"] for line in lines]
        texts += random.Random(0).sample(real, 400)
    return [encode_reply(text) for text in texts]


def disagreements(
    replies: Sequence[bytes], arguments: dict[str, Any], builds: Sequence[Kernels]
) -> tuple[list[bytes], ParsedReplies]:
    """Replies that not all builds read alike in every field, and the first build's reading of all."""
    one, *others = (parse_prompts(replies, kernels=build, **arguments) for build in builds)
    if all(np.array_equal(getattr(one, field), getattr(other, field)) for other in others for field in FIELDS):
        return [], one
    if len(replies) == 1:
        return [replies[0]], one
    return [reply for reply in replies if disagreements([reply], arguments, builds)[0]], one


def draw_arguments(rng: random.Random) -> dict[str, Any]:
    """Mode, format, sizes and `finished` for a chunk of replies."""
    return {
        "answer_format": rng.choice(list(FORMATS.values())),
        "input_size_hw": (840, 840) if rng.random() < 0.7 else (rng.choice(_SIDES), rng.choice(_SIDES)),
        "source_size_hw": (rng.choice(_SIDES), rng.choice(_SIDES)),
        "finished": rng.random() < 0.6,
        "mode": rng.choice((*MODES, "tolerant", "tolerant")),
    }


def fuzz(
    count: int, seed: int, builds: Sequence[Kernels] = ()
) -> Iterator[tuple[list[bytes], dict[str, Any], ParsedReplies]]:
    """Chunks of mutants: those that the builds (by default the host's) and the reference do not all read alike, the
    arguments, the first build's reading."""
    compared = (*(builds or (resolve_kernels("host"),)), resolve_kernels("reference"))
    stream = mutants(seeds(), seed)
    rng = random.Random(seed + 1)
    for begin in range(0, count, _CHUNK):
        arguments = draw_arguments(rng)
        replies = list(islice(stream, min(_CHUNK, count - begin)))
        wrong, read = disagreements(replies, arguments, compared)
        yield wrong, arguments, read


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=20_000, metavar="N")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="write a result file")
    options = parser.parse_args()
    start, found = time.monotonic(), 0
    statuses: Counter[str] = Counter()
    for wrong, arguments, read in fuzz(options.mutants, options.seed):
        found += len(wrong)
        for code, number in zip(*np.unique(read.status, return_counts=True), strict=True):
            statuses[f"{arguments['mode']} {STATUSES[code].value}"] += int(number)
        for reply in wrong[:3]:
            print(f"disagreement: {reply!r} with {arguments}")
    document = {
        "num_mutants": options.mutants,
        "seed": options.seed,
        "num_seeds": len(seeds()),
        "num_disagreements": found,
        "by_mode_and_status": dict(sorted(statuses.items())),
        "seconds": round(time.monotonic() - start, 1),
    }
    if options.save:
        print(f"result: {write_result('kernel_fuzz', document)}")
    print(json.dumps(document))
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())

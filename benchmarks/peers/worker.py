"""What each peer's program does alike; imported by file, on the standard library alone: a peer has no more.

Settings come as JSON in the first argument: `model` (a path), `threads`, `prompt` (token numbers), `new_tokens`. The
first line out is JSON with version and loading time. For each line in, the reply is generated once, greedily, and a
line tells its tokens and times: `prefill_ms` to the first token, `token_ms` for each further one, `answer_ms` in all.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

Generate = Callable[[list[int], int], Iterator[int]]
"""Prompt and number of tokens to the tokens of the reply, each as soon as it is known."""


def serve(load: Callable[[dict[str, Any]], tuple[str, Generate]]) -> None:
    """Loads with `load`, which gives a version and the generator, then generates for each line."""
    settings = json.loads(sys.argv[1])
    start = time.perf_counter()
    version, generate = load(settings)
    _tell({"version": version, "load_ms": (time.perf_counter() - start) * 1e3})
    for _ in sys.stdin:
        token_ids, start, times_s = [], time.perf_counter(), []
        for token_id in generate(settings["prompt"], settings["new_tokens"]):
            token_ids.append(int(token_id))
            times_s.append(time.perf_counter())
        decode_s = (times_s[-1] - times_s[0]) / (len(times_s) - 1)
        took = {"prefill_ms": times_s[0] - start, "token_ms": decode_s, "answer_ms": times_s[-1] - start}
        _tell({"token_ids": token_ids, **{name: seconds * 1e3 for name, seconds in took.items()}})


def _tell(document: dict[str, Any]) -> None:
    print("RESULT " + json.dumps(document), flush=True)

"""One step of the GPU check, as a process: `python -m benchmarks.gpu.step STAGE STEP`. Prints its figures as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from segzero_rt.errors import SegZeroError

from .errors import NotHereError
from .running import SKIP_STATUS
from .stages import DEVICES, SIZES, Context, bind, choose


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage")
    parser.add_argument("step")
    parser.add_argument("--device", choices=DEVICES, default=DEVICES[0])
    parser.add_argument("--size", choices=SIZES, default=SIZES[0])
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args(arguments)
    context = Context(device=options.device, size=options.size, work=options.work)
    (stage,) = choose([options.stage])
    step = next(one for one in stage.steps if one.name == options.step)
    try:
        figures = bind(step, context)()
    except NotHereError as error:
        print(error, file=sys.stderr)
        return SKIP_STATUS
    except SegZeroError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(figures, allow_nan=False))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

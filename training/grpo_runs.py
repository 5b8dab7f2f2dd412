"""Several runs of one preset from the same weights, and the mean of what they end with.

Runs that differ in nothing but their seed end in weights that lie close enough for their mean to be a policy, and a
better one than each: what one run overfitted to or forgot is not what another did (Wortsman et al., "Model soups:
averaging weights of multiple fine-tuned models improves accuracy without increasing inference time", 2022).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .grpo import POLICY_FOLDER, GrpoRun, mix_in, train_grpo
from .grpo_model import load_policy
from .grpo_preflight import claim, settings_of
from .grpo_presets import GrpoPreset

_WEIGHTS = "*.safetensors*"


def train_runs(run: GrpoRun) -> Path:
    """Trains as often as the preset says, with its seed and those after it; returns the folder of the mean policy.

    Stopped, it goes on where it was; runs that have ended are not trained again.

    Args:
        run: `out` gets a folder `run-1`, `run-2`, … for each, and `hf/` in the end; one run alone gets `out` itself.

    Raises:
        DatasetError, SegZeroError: as `train_grpo`, before the first run begins.
    """
    if run.preset.num_runs == 1:
        return train_grpo(run)
    claim(run.out, settings_of(run.preset, run.policy, run.rows, run.eval_rows))
    policies = []
    for number in range(run.preset.num_runs):
        one = replace(
            run,
            out=run.out / f"run-{number + 1}",
            preset=replace(run.preset, num_runs=1, seed=run.preset.seed + number),
        )
        ended = one.out / POLICY_FOLDER
        policies.append(ended if ended.is_dir() else train_grpo(one))
    return average_policies(policies, run.out / POLICY_FOLDER, preset=run.preset)


def average_policies(policies: Sequence[Path], folder: Path, *, preset: GrpoPreset) -> Path:
    """Writes the mean of policies' weights as `segzero export` reads it; all else is the first one's.

    Args:
        policies: folders of one model, as `train_grpo` returns them; at least one.
        folder: to write; it appears whole.
        preset: in whose precision the weights are held, at most two policies at a time.

    Raises:
        SegZeroError: a folder holds no policy.
    """
    mean = load_policy(preset, str(policies[0]))
    for number, other in enumerate(policies[1:], start=2):
        mix_in(mean, load_policy(preset, str(other)), 1 / number)  # the mean so far counts number - 1 times
    temporary = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(policies[0], temporary, ignore=shutil.ignore_patterns(_WEIGHTS))
    mean.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)
    return folder

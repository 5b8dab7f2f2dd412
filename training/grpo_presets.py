"""Complete configurations of GRPO runs, as functions, and what may be changed on top of them for a smaller machine.

The numbers of `seg_zero_*` and `vision_reasoner_7b` are the authors' (EasyR1 configurations of
`dvlab-research/Seg-Zero` 77f9ea5 and `JIA-Lab-research/VisionReasoner` c013132); where they are not, `grpo.py` says so
in its list of departures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

from segzero_rt.answer_format import FORMATS, SEG_ZERO, VISION_REASONER
from segzero_rt.errors import SegZeroError

from .policy_model import INPUT_SIDE
from .questions import ATTRIBUTE, COMPOSITIONAL, CONSEQUENCE, FUNCTION, NAME, NONE, RELATION, SEVERAL

CELL_PX = 28
"""A visual token's side in pixels: 14-pixel patches, merged 2 × 2."""
PUBLISHED_SIDE = 840
"""Side of the square picture that the published policies see: 900 visual tokens."""
MOST_SEED = 2**32 - 1
"""NumPy's legacy generator, which transformers seeds, takes no more."""


TABLETOP_KINDS = (
    FUNCTION, CONSEQUENCE, COMPOSITIONAL, NAME, RELATION, FUNCTION, CONSEQUENCE, COMPOSITIONAL, ATTRIBUTE, SEVERAL,
    FUNCTION, NONE,
)  # fmt: skip
"""Seven in twelve ask what the base policy never saw a box for; the others keep what it knows."""


class Precision(str, Enum):
    """Of the weights and of the passes over them."""

    FLOAT32 = "float32"
    BF16_MIXED = "bf16_mixed"
    """Weights float32, passes in bfloat16."""
    BF16 = "bf16"
    """Weights bfloat16: frozen ones under LoRA."""


class Vllm(str, Enum):
    """Where vLLM samples."""

    COLOCATE = "colocate"
    """On the training GPUs, between updates."""
    SERVER = "server"
    """On GPUs of its own, started with `trl vllm-serve`."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters on the decoder's projections; all other weights stay as they are.

    Raises:
        ValueError: a rank below 1.
    """

    rank: int = 64
    alpha: int = 128
    dropout: float = 0.0
    four_bit: bool = False
    """Hold the frozen weights in NF4 (QLoRA; needs bitsandbytes and a GPU)."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"expected a rank of at least 1, got {self.rank}")


@dataclass(frozen=True, kw_only=True)
class GrpoPreset:
    """Everything that decides a run but the policy's folder, the rows and the number of devices.

    Raises:
        ValueError: numbers that do not fit together.
    """

    name: str
    policy: str
    """Folder or hub name of the policy to start from, when none is given."""
    answer_format: str
    rewards: str
    """Name in `grpo_rewards.REWARD_SETS`."""
    input_size_hw: tuple[int, int]
    """Pixels of the picture that the policy sees."""
    num_generations: int = 8
    """Samples of each prompt: GRPO's group."""
    prompts_per_step: int = 16
    """Prompts of one optimiser step, over all devices; their samples make one on-policy update."""
    micro_batch: int
    """Samples of one pass on one device."""
    max_prompt_tokens: int = 1300
    """Visual tokens included; rows with longer prompts are refused."""
    max_completion_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    learning_rate: float = 1e-6
    warmup_steps: int = 0
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    learning_rate_schedule: str = "constant_with_warmup"
    """transformers' name."""
    kl_coef: float
    """0: no reference policy is held."""
    reward_scale: str = "group"
    """Whose standard deviation divides advantages, TRL's name. In a `group` that differs in nothing but a point or two
    these count as much as the right object does in another; over the `batch` they keep their sizes."""
    entropy_coef: float = 1e-3
    clip_range: float = 0.2
    loss: str = "bnpo"
    """TRL's name: the mean over the tokens of a micro batch."""
    max_steps: int = -1
    """-1: one epoch."""
    num_epochs: float = 1.0
    eval_every: int
    """Optimiser steps between evaluations, and between checkpoints."""
    num_rows: int = 0
    """Tabletop questions that are rendered where no rows are given; 0: rows must be given."""
    row_kinds: tuple[str, ...] = ()
    """Kinds of those that are trained on, in turn; a kind may stand more than once. Empty: the split's own order."""
    num_eval_rows: int
    """Rows of the validation set that an evaluation answers, greedily."""
    keep_checkpoints: int = 2
    """The newest ones; the best stays besides."""
    precision: Precision
    attention: str = "sdpa"
    gradient_checkpointing: bool = True
    shared_prompts: bool = False
    """Read a prompt once for all its samples (`SharedPromptGrpoTrainer`); one process, no vLLM, no checkpointing."""
    freeze_vision: bool = False
    base_share: float = 0.0
    """Of the weights that a run began with, mixed into the best ones at its end: what training on a few kinds of
    questions made a policy forget of others comes back, at little cost to what it learnt (Wortsman et al., "Robust
    fine-tuning of zero-shot models", 2022). Whole weights in one process only."""
    num_runs: int = 1
    """Runs from the same weights on the same questions, of this seed and those after it; the mean of what they end with
    is the policy (`grpo_runs`). Whole weights in one process only."""
    lora: Lora | None = None
    vllm: Vllm | None = None
    vllm_memory_share: float = 0.5
    vllm_tensor_parallel: int = 1
    seed: int = 42

    def __post_init__(self) -> None:
        if self.answer_format not in FORMATS:
            raise ValueError(f"expected an answer format of {', '.join(FORMATS)}, got {self.answer_format!r}")
        if any(length < CELL_PX or length % CELL_PX for length in self.input_size_hw):
            raise ValueError(f"expected an input size in multiples of {CELL_PX} pixels, got {self.input_size_hw}")
        if self.num_generations < 2:
            raise ValueError(f"expected at least 2 samples of a prompt to compare, got {self.num_generations}")
        positive = (
            "prompts_per_step", "micro_batch", "max_completion_tokens", "eval_every", "num_eval_rows", "num_runs",
        )  # fmt: skip
        for field in positive:
            if getattr(self, field) < 1:
                raise ValueError(f"expected {field} of at least 1, got {getattr(self, field)}")
        if self.samples_per_step % self.micro_batch:
            raise ValueError(
                f"expected {self.samples_per_step} samples a step in micro batches, got {self.micro_batch}"
            )
        if self.precision is Precision.BF16 and self.lora is None:
            raise ValueError("expected LoRA with bfloat16 weights: an update of 1e-6 is lost in them")
        if not 0.0 <= self.base_share < 1.0:
            raise ValueError(f"expected a base share of at least 0 and below 1, got {self.base_share}")
        if self.base_share and self.lora is not None:
            raise ValueError("expected a base share without LoRA, whose alpha says how much of the adapters counts")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"expected a learning rate above 0 and below 1, got {self.learning_rate}")
        if self.num_runs > 1 and self.lora is not None:
            raise ValueError(f"expected one run with LoRA, whose adapters have no mean, got {self.num_runs}")
        if not 0 <= self.seed <= MOST_SEED - self.num_runs + 1:
            raise ValueError(f"expected a seed from 0 to {MOST_SEED} for each run, got {self.seed}")
        if self.vllm is not None and self.lora is not None and self.lora.four_bit:
            raise ValueError("expected 4-bit weights without vLLM, to which packed weights cannot be handed; use LoRA")
        if self.shared_prompts and (self.vllm is not None or self.gradient_checkpointing):
            raise ValueError(
                f"expected no vLLM and no gradient checkpointing with shared prompts, as preset {self.name} samples"
            )

    @property
    def samples_per_step(self) -> int:
        return self.prompts_per_step * self.num_generations

    @property
    def visual_tokens(self) -> int:
        return self.input_size_hw[0] // CELL_PX * (self.input_size_hw[1] // CELL_PX)

    def accumulation_steps(self, num_processes: int) -> int:
        """Micro batches of one process in one optimiser step.

        Raises:
            SegZeroError: the samples of a step cannot be shared out evenly.
        """
        steps, rest = divmod(self.samples_per_step, self.micro_batch * num_processes)
        if rest or steps < 1:
            raise SegZeroError(
                f"expected {self.samples_per_step} samples a step to divide by {num_processes} processes x "
                f"{self.micro_batch} samples; change --micro-batch"
            )
        return steps


def debug() -> GrpoPreset:
    """Two steps on four rows of tabletop scenes: every code path in seconds, nothing learnt."""
    return replace(
        tabletop(), name="debug", num_generations=2, prompts_per_step=2, micro_batch=4, max_completion_tokens=96,
        max_steps=2, eval_every=1, num_rows=4, num_eval_rows=2, kl_coef=1e-2, base_share=0.0, num_runs=1,
        precision=Precision.FLOAT32,
    )  # fmt: skip


def tabletop() -> GrpoPreset:
    """The shipped policy on two CPU cores.

    Temperature: from 1 to 0.7 and 0.5 box gIoU of samples about names rose from 0.64 to 0.69 and 0.70, while of eight
    replies to a question by function 7.2, 6.2 and 5.2 still had a thinking of their own (24 questions each).
    Precision: passes in bfloat16 were 1.8 times as fast on a core with AMX, in one run beside other work;
    log-probabilities of 5,741 sampled tokens differed by 0.0005 nats between sampling and scoring, 0.07 at most.
    Elsewhere choose float32.
    Base share: with 0.25 the mean of three runs loses 0.1 points of what the base could answer of 150 validation
    pictures, with 0.15 1.1; box gIoU of 400 validation questions is 0.734, 0.730 and, with 0.35, 0.732.
    Runs: each alone has 0.720, 0.709 and 0.715 there.
    """
    return GrpoPreset(
        name="tabletop", policy="training/checkpoints/tabletop/base_brief", answer_format=VISION_REASONER.name,
        rewards="tabletop+brevity:32:0.9", input_size_hw=(INPUT_SIDE, INPUT_SIDE), micro_batch=128,
        max_completion_tokens=160, temperature=0.6, learning_rate=1e-4, warmup_steps=10,
        learning_rate_schedule="linear", kl_coef=0.0, entropy_coef=0.0, reward_scale="batch", max_steps=300,
        eval_every=50, num_rows=9600, row_kinds=TABLETOP_KINDS, num_eval_rows=300, precision=Precision.BF16_MIXED,
        gradient_checkpointing=False, shared_prompts=True, freeze_vision=True, base_share=0.25, num_runs=3,
    )  # fmt: skip


def seg_zero_3b() -> GrpoPreset:
    """Seg-Zero-3B: RefCOCOg, one object an answer."""
    return _published(
        name="seg_zero_3b", policy="Qwen/Qwen2.5-VL-3B-Instruct", answer_format=SEG_ZERO.name,
        rewards="seg_zero_strict", micro_batch=2, max_completion_tokens=1300, kl_coef=5e-3, eval_every=50,
    )  # fmt: skip


def seg_zero_7b() -> GrpoPreset:
    """Seg-Zero-7B."""
    return replace(seg_zero_3b(), name="seg_zero_7b", policy="Qwen/Qwen2.5-VL-7B-Instruct", micro_batch=1)


def vision_reasoner_7b() -> GrpoPreset:
    """VisionReasoner-7B: lists of objects."""
    return _published(
        name="vision_reasoner_7b", policy="Qwen/Qwen2.5-VL-7B-Instruct", answer_format=VISION_REASONER.name,
        rewards="vision_reasoner", micro_batch=2, max_completion_tokens=2000, kl_coef=1e-2, eval_every=100,
    )  # fmt: skip


def _published(
    *, name: str, policy: str, answer_format: str, rewards: str, micro_batch: int, max_completion_tokens: int,
    kl_coef: float, eval_every: int,
) -> GrpoPreset:  # fmt: skip
    return GrpoPreset(
        name=name, policy=policy, answer_format=answer_format, rewards=rewards, micro_batch=micro_batch,
        max_completion_tokens=max_completion_tokens, kl_coef=kl_coef, eval_every=eval_every,
        input_size_hw=(PUBLISHED_SIDE, PUBLISHED_SIDE), num_eval_rows=200, precision=Precision.BF16_MIXED,
        vllm=Vllm.COLOCATE, vllm_tensor_parallel=2,
    )  # fmt: skip


PRESETS: dict[str, Callable[[], GrpoPreset]] = {
    preset.__name__: preset for preset in (debug, tabletop, seg_zero_3b, seg_zero_7b, vision_reasoner_7b)
}


def with_lora(preset: GrpoPreset, *, four_bit: bool = False) -> GrpoPreset:
    """The preset for one 24 GB GPU: adapters on frozen bfloat16 (or NF4) weights, sampled by transformers.

    Adapters take a learning rate ten times that of the weights they stand for, and the vision tower stays frozen.
    """
    return replace(
        preset, lora=Lora(four_bit=four_bit), precision=Precision.BF16, micro_batch=1, attention="sdpa",
        learning_rate=10 * preset.learning_rate, freeze_vision=True, vllm=None, shared_prompts=False, base_share=0.0,
        num_runs=1,
    )  # fmt: skip

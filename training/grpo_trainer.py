"""TRL's trainer with what a segmentation policy needs: greedy evaluation, checkpoints that load, shared prompts.

The two methods of `SharedPromptGrpoTrainer` are the seam between TRL's loop and this repository's own passes: one turns
a batch of prompts into sampled tokens, the other scores given tokens. All else is TRL's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedModel
from trl.trainer.grpo_trainer import GRPOTrainer

from segzero_rt.errors import SegZeroError

from .picture_memory import PictureMemory, is_frozen
from .reply_scores import score_replies
from .rollout import Sampling, sample_replies
from .shared_prompt import Prompts, SharedPromptPolicy


class SegmentationGrpoTrainer(GRPOTrainer):
    """Answers greedily while it evaluates, as the runtime does, and samples while it trains."""

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        with self._greedy():
            metrics: dict[str, float] = super().evaluate(*arguments, **options)
        return metrics

    @contextmanager
    def _greedy(self) -> Iterator[None]:
        if self.use_vllm:
            sampled = self.vllm_generation.temperature
            self.vllm_generation.temperature = 0.0
            try:
                yield
            finally:
                self.vllm_generation.temperature = sampled
            return
        config, options = self.generation_config, self.generation_kwargs
        unused = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "min_p": None}
        self.generation_config = copy.deepcopy(config)
        self.generation_config.update(**unused)  # type: ignore[no-untyped-call]
        self.generation_kwargs = {**options, **unused}
        try:
            yield
        finally:
            self.generation_config, self.generation_kwargs = config, options

    def _get_train_sampler(self, dataset: Any = None) -> EpochSampler:
        sampler = super()._get_train_sampler(dataset)
        return EpochSampler(sampler, lambda: int(self.state.epoch or 0))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Checkpoints keep the names that the model's modules have now.

        transformers writes Qwen2.5-VL under its first names and reads checkpoints back without translating: a run that
        goes on would begin with the base policy's weights (huggingface/transformers#43701, open in 5.23).
        """
        if not isinstance(self.model, PreTrainedModel):
            super()._save(output_dir, state_dict)
            return
        own_names = partial(self.model.save_pretrained, save_original_format=False)
        self.model.save_pretrained = own_names  # type: ignore[method-assign]
        try:
            super()._save(output_dir, state_dict)
        finally:
            del self.model.save_pretrained

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Raises `SegZeroError` where a checkpoint lacks weights; transformers only warns."""
        tied = set(self.model.all_tied_weights_keys) if isinstance(self.model, PreTrainedModel) else set()
        if missing := sorted(set(load_result.missing_keys) - tied):
            raise SegZeroError(f"expected every weight in the checkpoint, {len(missing)} are missing: {missing[0]}, …")


class EpochSampler(Sampler[int]):
    """TRL's sampler, whose order within an epoch depends on the seed and the epoch alone.

    Its own order depends on the epochs that this process has seen: a run that goes on in its second epoch would see the
    first one's order again.

    Args:
        sampler: TRL's, shuffling with its own generator.
        epoch: number of the epoch that begins, from 0.
    """

    def __init__(self, sampler: Any, epoch: Callable[[], int]) -> None:
        self.sampler, self.epoch = sampler, epoch

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator.manual_seed(self.sampler.seed + self.epoch())
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


class SharedPromptGrpoTrainer(SegmentationGrpoTrainer):
    """Reads each prompt and picture once for all its samples, in sampling and in scoring; for one process."""

    _memory: PictureMemory | None = None

    def _policy(self, model: Any) -> SharedPromptPolicy:
        """The policy or its reference. A frozen tower is the same in both, so they share what it has seen."""
        if self._memory is None and self._vision_is_frozen():
            self._memory = PictureMemory()
        return SharedPromptPolicy(model, self._memory)

    def _vision_is_frozen(self) -> bool:
        policy: Any = self.accelerator.unwrap_model(self.model)
        base = policy.get_base_model() if hasattr(policy, "peft_config") else policy
        return is_frozen(base.model.visual)

    def _generate_single_turn(
        self,
        prompt_ids: Sequence[Sequence[int]],
        images: Any,
        multimodal_fields: dict[str, Any],
        num_generations: int,
        has_tool_images: bool = False,
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Samples a completion for every prompt of the batch, in which a prompt stands once per completion.

        Returns:
            Token ids and their log-probabilities, a list for each prompt, with the end token where one came.
        """
        groups = _Groups(
            [tuple(ids) for ids in prompt_ids],
            torch.as_tensor(multimodal_fields["pixel_values"]),
            torch.as_tensor(multimodal_fields["image_grid_thw"]),
        )
        model = self.accelerator.unwrap_model(self.model)
        training = model.training
        model.eval()
        sampling = Sampling(
            num_replies=max(map(len, groups.rows)),
            max_new_tokens=int(self.max_completion_length or 0),
            temperature=self.temperature if training else 0.0,
            top_p=self.top_p,
            never=tuple(self.generation_config.suppress_tokens or ()),
            # From the generator whose state checkpoints keep: a run that goes on draws what it would have drawn.
            seed=int(torch.randint(2**31, ())),
        )
        with self.accelerator.autocast():
            replies = sample_replies(self._policy(model), groups.prompts, sampling, self.eos_token_ids)
        model.train(training)
        tokens: list[list[int]] = [[] for _ in prompt_ids]
        logprobs: list[list[float]] = [[] for _ in prompt_ids]
        for number, rows in enumerate(groups.rows):
            for place, row in enumerate(rows):
                reply = number * sampling.num_replies + place
                tokens[row], logprobs[row] = list(replies.token_ids[reply]), list(replies.logprobs[reply])
        return tokens, logprobs

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        compute_entropy: bool = False,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        """Log-probabilities and entropies float32 [B, logits_to_keep] of the completions that end `input_ids`."""
        real = attention_mask.bool()
        split = input_ids.shape[1] - logits_to_keep
        pairs = list(zip(input_ids, real, strict=True))
        prompts = [tuple(ids[:split][kept[:split]].tolist()) for ids, kept in pairs]
        replies = [ids[split:][kept[split:]].tolist() for ids, kept in pairs]
        groups = _Groups(prompts, pixel_values, image_grid_thw)
        prompt_of = [0] * len(prompts)
        for number, rows in enumerate(groups.rows):
            for row in rows:
                prompt_of[row] = number
        with self.accelerator.autocast():
            logprobs, entropies = score_replies(
                self._policy(self.accelerator.unwrap_model(model)), groups.prompts, prompt_of, replies,
                temperature=self.temperature,
            )  # fmt: skip
        fill = (0, logits_to_keep - logprobs.shape[1])
        logprobs, entropies = (torch.nn.functional.pad(scores, fill) for scores in (logprobs, entropies))
        return logprobs, entropies if compute_entropy else None, None


class _Groups:
    """The distinct prompts of a batch, one picture in each, and the rows of the batch in which they stand."""

    def __init__(
        self, token_ids: Sequence[tuple[int, ...]], pixel_values: Tensor | None, image_grid_thw: Tensor | None
    ) -> None:
        if pixel_values is None or image_grid_thw is None:
            raise ValueError("expected one picture in each prompt, got a batch without pictures")
        pictures = torch.split(pixel_values, image_grid_thw.prod(1).tolist())
        found: dict[tuple[int, ...], list[list[int]]] = {}
        for row, ids in enumerate(token_ids):
            alike = found.setdefault(ids, [])
            for rows in alike:
                if torch.equal(pictures[rows[0]], pictures[row]):
                    rows.append(row)
                    break
            else:
                alike.append([row])
        self.rows = [rows for alike in found.values() for rows in alike]
        """Rows of the batch, for each distinct prompt."""
        first = [rows[0] for rows in self.rows]
        self.prompts = Prompts(
            token_ids=tuple(token_ids[row] for row in first),
            pixel_values=torch.cat([pictures[row] for row in first]),
            image_grid_thw=image_grid_thw[first],
            pictures=tuple((number,) for number in range(len(first))),
        )

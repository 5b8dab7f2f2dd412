"""Checkpoints in PyTorch, float32, behind the runtime's own host code: what the gates compare a bundle with.

Both take exactly the tokens, patches and pixels that the runtime makes, so that a difference is the graphs' or the
weights'.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segzero_rt.errors import ExportError
from segzero_rt.graph import Stop
from segzero_rt.policy import Policy


class TorchPolicy:
    """A policy's checkpoint in transformers, float32, asked as `policy` is; with an adapter, merged by PEFT.

    Raises:
        ExportError: there is an adapter, and no PEFT.
    """

    def __init__(self, hf_folder: Path, policy: Policy, *, adapter: Path | None = None) -> None:
        import torch
        from transformers import AutoModelForImageTextToText

        self._torch = torch
        self._policy = policy
        self._model = AutoModelForImageTextToText.from_pretrained(hf_folder, dtype=torch.float32).eval()
        if adapter is not None:
            self._model = _merged(self._model, adapter)
        rows, columns = (length * policy.manifest.merge_size for length in policy.preprocessor.grid_hw)
        self._grid = torch.tensor([[1, rows, columns]])
        self._patches: Any = None

    def look(self, image_rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Sets the picture; returns its features, [tokens, hidden]."""
        self.set_picture(image_rgb)
        with self._torch.no_grad():
            return all_features(self._model.model.visual(self._patches, self._grid))

    def set_picture(self, image_rgb: NDArray[np.uint8]) -> None:
        """Sets the picture, uint8 [H, W, 3], that `ask` and `reply` are about."""
        frame = self._policy.preprocessor.patches(image_rgb)
        by_channel = frame.reshape(len(frame), 3, 1, -1)
        frames = np.repeat(by_channel, self._policy.manifest.temporal_patch_size, axis=2).reshape(len(frame), -1)
        self._patches = self._torch.from_numpy(frames)

    def ask(self, question: str, max_new_tokens: int) -> tuple[list[int], NDArray[np.float32]]:
        """Greedy reply, with the token that ended it, and the logits that chose each of its tokens."""
        output = self._generate(self._prompt(question), max_new_tokens, output_logits=True)
        return output.sequences[0, -len(output.logits) :].tolist(), np.concatenate(
            [step.float().numpy() for step in output.logits]
        )

    def reply(self, question: str, *, draft: str, max_new_tokens: int) -> tuple[str, bool]:
        """The same greedy reply as text, and whether it ended by itself.

        Args:
            draft: what the reply may turn out to be. All its tokens are checked in one pass, and only from the first
                that PyTorch would not have chosen is the reply written token by token. A wrong draft costs time alone.
            max_new_tokens: budget, as `Policy.ask` counts it.

        Raises:
            QuestionError: the question is empty, or leaves no room for a reply.
        """
        ends = self._policy.manifest.eos_token_ids
        prompt = self._prompt(question)
        budget = min(max_new_tokens, self._policy.manifest.max_length - len(prompt) + 1)
        drafted = self._policy.chat.reply_start(draft)[: budget - 1]
        chosen = self._choices([*prompt, *drafted], len(drafted) + 1)
        same = next((place for place, token in enumerate(drafted) if chosen[place] != token), len(drafted))
        tokens = chosen[: same + 1]
        if tokens[-1] not in ends and len(tokens) < budget:
            output = self._generate([*prompt, *tokens], budget - len(tokens))
            tokens = output.sequences[0, len(prompt) :].tolist()
        finished = tokens[-1] in ends
        return self._policy.chat.text(tokens[:-1] if finished else tokens), finished

    def _prompt(self, question: str) -> list[int]:
        return [*self._policy.prefix_tokens, *self._policy.question_tokens(question)]

    def _inputs(self, token_ids: list[int]) -> dict[str, Any]:
        ids = self._torch.tensor([token_ids])
        return {
            "input_ids": ids,
            "attention_mask": self._torch.ones_like(ids),
            "pixel_values": self._patches,
            "image_grid_thw": self._grid,
            "mm_token_type_ids": (ids == self._policy.manifest.image_token_id).int(),
        }

    def _choices(self, token_ids: list[int], count: int) -> list[int]:
        """Likeliest token after each of the last `count` tokens."""
        with self._torch.no_grad():
            logits = self._model(**self._inputs(token_ids), logits_to_keep=count).logits
        choices: list[int] = logits[0].argmax(dim=-1).tolist()
        return choices

    def _generate(self, token_ids: list[int], max_new_tokens: int, **options: Any) -> Any:
        ends = self._policy.manifest.eos_token_ids
        with self._torch.no_grad():
            return self._model.generate(
                **self._inputs(token_ids),
                max_new_tokens=max_new_tokens,
                eos_token_id=list(ends),
                pad_token_id=ends[0],
                do_sample=False,
                return_dict_in_generate=True,
                **options,
            )


def all_features(output: Any) -> NDArray[np.float32]:
    """A tower's output as the graphs give it, [tokens, hidden] of each depth that the decoder takes, side by side."""
    depths = [output.pooler_output, *(getattr(output, "deepstack_features", None) or ())]
    features: NDArray[np.float32] = np.concatenate([depth.detach().numpy() for depth in depths], axis=-1)
    return features


def _merged(model: Any, adapter: Path) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ExportError(f"expected PEFT, to compare a merged adapter with: {error}; install peft") from error
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().eval()


class TorchImageEncoder:
    """A SAM 2 checkpoint's image encoder with the interface of `Graph`, for `segzero_rt.segmenter.ImageEncoder`."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def run(self, inputs: dict[str, Any], *, stop: Stop | None = None) -> dict[str, Any]:
        """`pixel_values` float32 [1, 3, H, W] to the checkpoint's own features at three scales; runs to its end."""
        import torch

        with torch.no_grad():
            return {"embeddings": self._model.get_image_embeddings(torch.from_numpy(inputs["pixel_values"]))}


class TorchMaskDecoder:
    """The same checkpoint's prompt and mask decoder, for `segzero_rt.segmenter.MaskDecoder`."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def run(self, inputs: dict[str, Any]) -> dict[str, NDArray[np.float32]]:
        """Masks 1 to 3 of each prompt; mask 0, which multimask output never chooses, is left empty."""
        import torch

        with torch.no_grad():
            output = self._model(
                image_embeddings=inputs["embeddings"],
                input_points=torch.from_numpy(inputs["points_xy"][:, :, :-1]),  # transformers adds the filler itself
                input_labels=torch.from_numpy(inputs["labels"][:, :, :-1]),
                multimask_output=True,
            )
        masks, scores = output.pred_masks.numpy(), output.iou_scores.numpy()
        return {
            "mask_logits": np.pad(masks, ((0, 0), (0, 0), (1, 0), (0, 0), (0, 0))),
            "iou_scores": np.pad(scores, ((0, 0), (0, 0), (1, 0))),
            "object_logits": output.object_score_logits.numpy(),
        }

"""A checkpoint of any size in PyTorch, float32: transformers' own modules, one layer's weights in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from segzero_rt.errors import ExportError

from .policy_checkpoint import PolicyCheckpoint
from .policy_embedding import TOKEN_TABLE_KEY
from .reference import all_features

_VISION, _TEXT = "model.visual.", "model.language_model."


class LayeredReference:
    """transformers' model on the "meta" device; a layer's weights are read when its turn comes, and let go after it.

    What goes from layer to layer is kept under the names that the graphs use: "blocks.3", "merger", "layers.2", "norm".

    Args:
        watch: gets what goes into each linear product, [..., channels], by the product's name as in `largest`.
    """

    def __init__(self, checkpoint: PolicyCheckpoint, *, watch: Callable[[str, Tensor], None] | None = None) -> None:
        from transformers import AutoConfig, AutoModelForImageTextToText

        self._checkpoint = checkpoint
        self._watcher = watch
        self.hidden: dict[str, NDArray[np.float32]] = {}
        """The residual that each layer took in, by the layer's name."""
        self.largest: dict[str, float] = {}
        """Largest magnitude that went into or came out of each linear product, by "vision/blocks.3.mlp.up_proj"."""
        config = AutoConfig.from_pretrained(checkpoint.folder)
        config.dtype = torch.float32
        with torch.device("meta"):
            model: Any = AutoModelForImageTextToText.from_config(config)
        self._model = model.eval()
        for name, module in list(model.named_modules()):
            if "RotaryEmbedding" in type(module).__name__:  # its buffers follow from the configuration
                model.set_submodule(name, type(module)(module.config))
        text = model.model.language_model
        text.embed_tokens = _TokenRows(checkpoint)
        tower, layers = model.model.visual, text.layers
        for place, block in enumerate(tower.blocks):
            self._stream(block, f"{_VISION}blocks.{place}", f"vision/blocks.{place}", f"blocks.{place}")
        self._stream(tower.patch_embed, f"{_VISION}patch_embed", "vision/patch_embed", None)
        self._stream(tower.merger, f"{_VISION}merger", "vision/merger", "merger")
        if checkpoint.vision.position_side:
            self._stream(tower.pos_embed, f"{_VISION}pos_embed", "vision/pos_embed", None)
        for place in range(len(checkpoint.vision.deepstack_blocks)):
            merger = f"deepstack_merger_list.{place}"
            self._stream(tower.deepstack_merger_list[place], f"{_VISION}{merger}", f"vision/deepstack.{place}", None)
        for place, layer in enumerate(layers):
            self._stream(layer, f"{_TEXT}layers.{place}", f"decoder/layers.{place}", f"layers.{place}")
        self._stream(text.norm, f"{_TEXT}norm", "decoder/norm", "norm")
        self.features: NDArray[np.float32] = np.zeros((0, 0), np.float32)
        """What the vision tower made of the picture, [tokens, hidden] in raster order."""
        tower.register_forward_hook(self._keep_features)

    def logits(self, inputs: dict[str, Tensor], rows: int) -> NDArray[np.float32]:
        """Logits of the last `rows` tokens, [rows, vocab]; `inputs` as the model's forward takes them."""
        with torch.no_grad():
            states = self._model.model(**inputs, use_cache=False).last_hidden_state[0, -rows:]
            text = self._checkpoint.text
            key = TOKEN_TABLE_KEY if text.tied else "lm_head.weight"
            parts = [states @ torch.from_numpy(table).T for table in self._checkpoint.weight(key).chunks()]
            logits: NDArray[np.float32] = torch.cat(parts, dim=1).numpy()
        return logits

    def _stream(self, module: nn.Module, prefix: str, place: str, label: str | None) -> None:
        """Has the module's weights read before it runs and let go afterwards."""

        def load(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            state = {
                name: torch.from_numpy(self._checkpoint.tensor(f"{prefix}.{name}", tuple(parameter.shape)))
                for name, parameter in module.named_parameters()
            }
            module.load_state_dict(state, assign=True)
            if label is not None:
                entering = arguments[0] if arguments else options["hidden_states"]
                self.hidden[label] = entering.detach().numpy()

        def let_go(*_: object) -> None:
            module.to("meta")

        module.register_forward_pre_hook(load, with_kwargs=True)
        module.register_forward_hook(let_go)
        for name, part in module.named_modules():
            if isinstance(part, nn.Linear):
                part.register_forward_hook(self._watch(f"{place}.{name}"))

    def _keep_features(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        self.features = all_features(output)

    def _watch(self, place: str) -> Callable[..., None]:
        def record(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            largest = max(float(arguments[0].abs().max()), float(output.abs().max()))
            self.largest[place] = max(self.largest.get(place, 0.0), largest)
            if self._watcher is not None:
                self._watcher(place, arguments[0])

        return record


class _TokenRows(nn.Module):
    """The token embedding, of which only the rows asked for are read."""

    def __init__(self, checkpoint: PolicyCheckpoint) -> None:
        super().__init__()
        self._table = checkpoint.weight(TOKEN_TABLE_KEY)

    def forward(self, input_ids: Tensor) -> Tensor:
        known = {int(token): self._table.rows(int(token), int(token) + 1) for token in input_ids.unique()}
        if not known:
            raise ExportError("expected tokens to embed, got none")
        rows = np.concatenate([known[int(token)] for token in input_ids.flatten()])
        return torch.from_numpy(rows).reshape(*input_ids.shape, -1)

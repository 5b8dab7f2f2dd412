"""Weights of 4 bits that lose less where it counts: scales by the activations that they meet (AWQ, arXiv:2306.00978).

A column of a weight that large activations meet is multiplied before it is rounded, so that its numbers get finer steps
of their block, and what makes those activations is divided by as much. In exact arithmetic nothing changes. As in the
paper, section 3.2:

* a channel's factor is its mean magnitude to a power, one power for each product, searched in a grid by how far the
  rounded product is from the exact one on rows of real inputs. Power 0 is rounding to nearest, so that it is never
  worse on these rows;
* the products behind a norm share its factors, which the norm's weight takes; those of `down` go into the rows of `up`.
  `o` is left as it is: several heads of queries share the values that would have to take its factors.

The rounding that is searched with is that of the files (`weight_encoding`), which the libraries' searches do not know:
NVIDIA's ModelOpt 0.47 rounds to a symmetric grid, and llm-compressor 0.14 asks for an older transformers.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .calibration import Held
from .lazy_weight import Floats, Weight
from .policy_checkpoint import Factors, PolicyCheckpoint
from .weight_encoding import as_four_bits

POWERS = tuple(step / 10 for step in range(11))
"""Tried of each product."""
SEARCHED_OUTPUTS, OUTPUTS_AT_ONCE = 2048, 64
"""Rows of a weight that a search looks at, at most, and how many stand together: time goes with their number."""
_LEAST = 1e-4
"""Smallest mean magnitude: of a channel that held nothing."""


def awq_checkpoint(checkpoint: PolicyCheckpoint, held: Mapping[str, Held]) -> PolicyCheckpoint:
    """The same policy with a decoder that bears 4 bits better.

    Args:
        held: rows of the inputs of the decoder's products, by their paths in the graph, from `calibrate`.
    """
    factors: dict[str, Factors] = {}
    for layer in range(checkpoint.text.num_layers):
        factors |= _of_layer(checkpoint, held, layer)
    return checkpoint.rescaled(factors)


def _of_layer(checkpoint: PolicyCheckpoint, held: Mapping[str, Held], layer: int) -> dict[str, Factors]:
    prefix, path = f"model.language_model.layers.{layer}.", f"decoder/layers.{layer}/"

    def searched(product: str, *keys: str) -> Floats:
        weight = Weight.stacked([checkpoint.weight(f"{prefix}{key}.weight") for key in keys])
        return search_scales(weight, np.concatenate(held[path + product].rows))

    attended = searched("qkv", *(f"self_attn.{part}_proj" for part in "qkv"))
    widened = searched("gate", "mlp.gate_proj", "mlp.up_proj")
    narrowed = searched("down", "mlp.down_proj")
    factors = {
        "input_layernorm": Factors(rows=np.reciprocal(attended)),
        **{f"self_attn.{part}_proj": Factors(columns=attended) for part in "qkv"},
        "post_attention_layernorm": Factors(rows=np.reciprocal(widened)),
        "mlp.gate_proj": Factors(columns=widened),
        "mlp.up_proj": Factors(rows=np.reciprocal(narrowed), columns=widened),
        "mlp.down_proj": Factors(columns=narrowed),
    }
    return {f"{prefix}{name}.weight": factor for name, factor in factors.items()}


def search_scales(weight: Weight, rows: Floats) -> Floats:
    """What to multiply the columns of a weight by before it is rounded to 4 bits.

    Args:
        weight: [outputs, channels].
        rows: inputs that it met, float32 [rows, channels].

    Returns:
        float32 [channels], all ones where nothing is better than rounding to nearest.
    """
    import torch

    sampled = _some_outputs(weight)
    inputs = torch.from_numpy(rows)
    magnitude = np.maximum(np.abs(rows).mean(axis=0), _LEAST * max(float(np.abs(rows).mean()), 1e-12))
    best, least = np.ones(rows.shape[1], np.float32), np.inf
    for power in POWERS:
        scales = (magnitude**power).astype(np.float32)
        scales /= np.sqrt(scales.max() * scales.min())
        missed = as_four_bits(sampled * scales) / scales - sampled
        error = float((inputs @ torch.from_numpy(missed).T).square().sum())
        if error < least:
            best, least = scales, error
    return best


def _some_outputs(weight: Weight) -> Floats:
    """Rows of a weight, spread evenly over all of them."""
    outputs = weight.shape[0]
    if outputs <= SEARCHED_OUTPUTS:
        return weight.array()
    starts = np.linspace(0, outputs - OUTPUTS_AT_ONCE, SEARCHED_OUTPUTS // OUTPUTS_AT_ONCE).astype(int)
    return np.concatenate([weight.rows(int(start), int(start) + OUTPUTS_AT_ONCE) for start in starts])

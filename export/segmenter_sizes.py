"""The published sizes of SAM 2: what a checkpoint of tensors alone does not say (heads, windows, global attention)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from segzero_rt.errors import ExportError

if TYPE_CHECKING:
    from transformers import Sam2Config


@dataclass(frozen=True, kw_only=True, slots=True)
class HieraSize:
    """One published size; SAM 2.0 and 2.1 share them, and pictures are 1024 x 1024 in all."""

    name: str
    """As in the file names of SAM 2's configurations, such as "hiera_b+"."""
    width: int
    """Channels of the first stage; each later stage doubles them, and the heads."""
    heads: int
    blocks: tuple[int, int, int, int]
    """Per stage."""
    global_blocks: tuple[int, ...]
    """Blocks, counted through all stages, that attend to the whole map."""
    windows: tuple[int, int, int, int]
    """Side of the attention windows per stage, in tokens."""
    background_hw: tuple[int, int]
    """Size of the positional embedding that is stretched over the picture."""

    def __post_init__(self) -> None:
        if self.width % self.heads or max(self.global_blocks) >= sum(self.blocks):
            raise ValueError(f"expected heads that divide the width and global blocks that exist, got {self}")

    @property
    def stage_widths(self) -> tuple[int, ...]:
        return tuple(self.width << stage for stage in range(4))

    def config(self) -> Sam2Config:
        """The transformers configuration of this size."""
        from transformers import Sam2Config, Sam2HieraDetConfig, Sam2VisionConfig

        backbone = Sam2HieraDetConfig(
            hidden_size=self.width,
            num_attention_heads=self.heads,
            blocks_per_stage=list(self.blocks),
            embed_dim_per_stage=list(self.stage_widths),
            num_attention_heads_per_stage=[self.heads << stage for stage in range(4)],
            window_size_per_stage=list(self.windows),
            global_attention_blocks=list(self.global_blocks),
            window_positional_embedding_background_size=list(self.background_hw),
        )
        vision = Sam2VisionConfig(backbone_config=backbone, backbone_channel_list=list(reversed(self.stage_widths)))
        return Sam2Config(vision_config=vision)


# https://github.com/facebookresearch/sam2, sam2/configs: what the files leave out are the defaults of its `Hiera`.
TINY = HieraSize(
    name="hiera_t",
    width=96,
    heads=1,
    blocks=(1, 2, 7, 2),
    global_blocks=(5, 7, 9),
    windows=(8, 4, 14, 7),
    background_hw=(7, 7),
)
SMALL = HieraSize(
    name="hiera_s",
    width=96,
    heads=1,
    blocks=(1, 2, 11, 2),
    global_blocks=(7, 10, 13),
    windows=(8, 4, 14, 7),
    background_hw=(7, 7),
)
BASE_PLUS = HieraSize(
    name="hiera_b+",
    width=112,
    heads=2,
    blocks=(2, 3, 16, 3),
    global_blocks=(12, 16, 20),
    windows=(8, 4, 14, 7),
    background_hw=(14, 14),
)
LARGE = HieraSize(
    name="hiera_l",
    width=144,
    heads=2,
    blocks=(2, 6, 36, 4),
    global_blocks=(23, 33, 43),
    windows=(8, 4, 16, 8),
    background_hw=(7, 7),
)
HIERA_SIZES = (TINY, SMALL, BASE_PLUS, LARGE)

RELEASES = ("sam2", "sam2.1")
"""2.1 learnt more for video; its image encoder and mask decoder are those of 2.0, with other weights."""
CONFIG_NAMES = tuple(f"{release}_{size.name}" for release in RELEASES for size in HIERA_SIZES)
"""What `--segmenter-config` takes: SAM 2's own configuration names."""


def size_of_config(name: str) -> HieraSize:
    """The size that one of `CONFIG_NAMES` names; SAM 2's `.yaml` behind it does no harm.

    Raises:
        ExportError: no such configuration.
    """
    plain = name.removesuffix(".yaml")
    if plain not in CONFIG_NAMES:
        raise ExportError(f"--segmenter-config: expected one of {', '.join(CONFIG_NAMES)}, got {name[:60]!r}")
    return next(size for size in HIERA_SIZES if plain.endswith(f"_{size.name}"))

"""EdgeTAM, the on-device variant of SAM 2: RepViT in Hiera's place, all else that images need is SAM 2's own.

transformers takes its backbone from timm, which wants torchvision. Images need neither: `RepVit` here has timm's names,
so that checkpoints load as they are, and `Sam2Model` does the rest. EdgeTAM has one published size (RepViT-M1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import Sam2Config, Sam2HieraDetConfig, Sam2Model, Sam2VisionConfig
from transformers.models.sam2.modeling_sam2 import Sam2HieraDetModelOutput

CONFIG_NAME = "edgetam"
WIDTHS, DEPTHS = (48, 96, 192, 384), (2, 2, 14, 2)
"""Channels and blocks of RepViT-M1's stages."""
_MLP_RATIO = 2


class ConvNorm(nn.Module):
    """A convolution without bias, and the batch norm behind it."""

    def __init__(self, inputs: int, outputs: int, side: int = 1, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.c = nn.Conv2d(inputs, outputs, side, stride, side // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.bn(self.c(x))
        return normed

    def fused(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one convolution that both are in evaluation, float64."""
        scale = self.bn.weight.double() / (self.bn.running_var.double() + self.bn.eps).sqrt()
        bias = self.bn.bias.double() - self.bn.running_mean.double() * scale
        return self.c.weight.double() * scale[:, None, None, None], bias


class TokenMixer(nn.Module):
    """Each channel for itself: 3 x 3 and 1 x 1 beside the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = ConvNorm(width, width, 3, groups=width)
        self.conv1 = ConvNorm(width, width, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.conv(x) + self.conv1(x) + x
        return mixed

    def fused(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one 3 x 3 convolution that all three are, float64."""
        (weight, bias), (point, point_bias) = self.conv.fused(), self.conv1.fused()
        return weight + functional.pad(point + 1, (1, 1, 1, 1)), bias + point_bias  # + 1: the input itself


class SqueezeExcite(nn.Module):
    """Weighs channels by what the whole map holds."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = max(8, (width // 4 + 4) // 8 * 8)  # a quarter, to the next multiple of 8
        self.fc1, self.fc2 = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        shares = self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu())
        return x * shares.sigmoid()


class ChannelMixer(nn.Module):
    """Two products with GELU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = ConvNorm(width, width * _MLP_RATIO), ConvNorm(width * _MLP_RATIO, width)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.conv2(functional.gelu(self.conv1(x)))
        return mixed


class Block(nn.Module):
    def __init__(self, width: int, *, squeezes: bool) -> None:
        super().__init__()
        self.token_mixer = TokenMixer(width)
        self.se = SqueezeExcite(width) if squeezes else nn.Identity()
        self.channel_mixer = ChannelMixer(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.se(self.token_mixer(x))
        mixed: Tensor = x + self.channel_mixer(x)
        return mixed


class Downsample(nn.Module):
    """Halves the map and widens it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.pre_block = Block(inputs, squeezes=False)
        self.spatial_downsample = ConvNorm(inputs, inputs, 3, stride=2, groups=inputs)
        self.channel_downsample = ConvNorm(inputs, outputs)
        self.ffn = ChannelMixer(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.channel_downsample(self.spatial_downsample(self.pre_block(x)))
        widened: Tensor = x + self.ffn(x)
        return widened


class Stage(nn.Module):
    def __init__(self, inputs: int, outputs: int, depth: int) -> None:
        super().__init__()
        self.downsample = nn.Identity() if inputs == outputs else Downsample(inputs, outputs)
        self.blocks = nn.Sequential(*(Block(outputs, squeezes=index % 2 == 0) for index in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.downsample(x))
        return x


class Stem(nn.Module):
    """A picture to a map of a quarter of its side."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = ConvNorm(3, width // 2, 3, stride=2), ConvNorm(width // 2, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        embedded: Tensor = self.conv2(functional.gelu(self.conv1(x)))
        return embedded


class RepVit(nn.Module):
    """float32 [B, 3, H, W] -> maps of a 4th, 8th, 16th and 32nd of its side, as `Sam2Model` wants a backbone's."""

    def __init__(self, widths: Sequence[int] = WIDTHS, depths: Sequence[int] = DEPTHS) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.stem = Stem(widths[0])
        for index, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            setattr(self, f"stages_{index}", Stage(widths[max(0, index - 1)], width, depth))

    @property
    def stages(self) -> list[Stage]:
        return [getattr(self, f"stages_{index}") for index in range(len(self.widths))]

    def forward(self, pixel_values: Tensor, **_: Any) -> Sam2HieraDetModelOutput:
        x = self.stem(pixel_values)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x.permute(0, 2, 3, 1))
        return Sam2HieraDetModelOutput(last_hidden_state=maps[-1], intermediate_hidden_states=tuple(maps))


def edgetam_model(config: Sam2Config | None = None, backbone: RepVit | None = None) -> Sam2Model:
    """A freshly made EdgeTAM for images, its weights to be loaded; of the published size by default."""
    config = config or Sam2Config(vision_config=Sam2VisionConfig(backbone_channel_list=list(reversed(WIDTHS))))
    # `Sam2Model` insists on a backbone of its own, which RepViT replaces: the smallest that there is.
    config.vision_config.backbone_config = Sam2HieraDetConfig(
        hidden_size=8,
        num_attention_heads=1,
        blocks_per_stage=[1, 1, 1, 1],
        embed_dim_per_stage=[8, 8, 8, 8],
        num_attention_heads_per_stage=[1, 1, 1, 1],
        window_size_per_stage=[8, 4, 2, 1],
        global_attention_blocks=[],
    )
    model = Sam2Model(config)
    model.vision_encoder.backbone = backbone or RepVit()
    return model.eval()


def is_edgetam(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the tensors of EdgeTAM's own checkpoint."""
    return "image_encoder.trunk.body.stem.conv1.c.weight" in tensors


def folded(pair: tuple[Tensor, Tensor]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What `fused` gives, as it goes into a graph."""
    weight, bias = (part.detach().float().numpy() for part in pair)
    return weight, bias

"""EdgeTAM's backbone as nodes of a graph: one convolution where the checkpoint has a convolution and a batch norm, or,
in a token mixer, two of each and the input itself."""

from __future__ import annotations

from numpy.typing import NDArray
from torch import Tensor, nn

from .edgetam import Block, ChannelMixer, Downsample, RepVit, SqueezeExcite, folded
from .graph_builder import GraphBuilder


def add_repvit(builder: GraphBuilder, backbone: RepVit) -> list[str]:
    """Adds RepViT's nodes to a graph whose input is `pixel_values`; the stages' maps, [batch, channels, h, w]."""
    with builder.scope("stem"):
        stem = backbone.stem
        x = builder.gelu(_convolve(builder, "pixel_values", "conv1", folded(stem.conv1.fused()), stride=2))
        x = _convolve(builder, x, "conv2", folded(stem.conv2.fused()), stride=2)
    maps = []
    for index, stage in enumerate(backbone.stages):
        with builder.scope(f"stages.{index}"):
            if isinstance(stage.downsample, Downsample):
                with builder.scope("downsample"):
                    x = _downsample(builder, x, stage.downsample)
            for place, block in enumerate(stage.blocks):
                assert isinstance(block, Block)
                with builder.scope(f"blocks.{place}"):
                    x = _block(builder, x, block)
        maps.append(x)
    return maps


def _downsample(builder: GraphBuilder, x: str, module: Downsample) -> str:
    with builder.scope("pre_block"):
        x = _block(builder, x, module.pre_block)
    spatial, channels = folded(module.spatial_downsample.fused()), folded(module.channel_downsample.fused())
    x = _convolve(builder, x, "spatial", spatial, stride=2, groups=len(spatial[1]))
    return _mix_channels(builder, _convolve(builder, x, "channels", channels), module.ffn)


def _block(builder: GraphBuilder, x: str, block: Block) -> str:
    mixer = folded(block.token_mixer.fused())
    x = _convolve(builder, x, "token_mixer", mixer, groups=len(mixer[1]))
    if isinstance(block.se, SqueezeExcite):
        x = _squeeze(builder, x, block.se)
    return _mix_channels(builder, x, block.channel_mixer)


def _squeeze(builder: GraphBuilder, x: str, module: SqueezeExcite) -> str:
    inner = builder.node("GlobalAveragePool", [x])
    inner = builder.node("Relu", [_convolve(builder, inner, "se.fc1", _plain(module.fc1))])
    shares = builder.node("Sigmoid", [_convolve(builder, inner, "se.fc2", _plain(module.fc2))])
    return builder.node("Mul", [x, shares])


def _mix_channels(builder: GraphBuilder, x: str, module: ChannelMixer) -> str:
    """The sum with `x` included."""
    inner = builder.gelu(_convolve(builder, x, "fc1", folded(module.conv1.fused())))
    return builder.node("Add", [x, _convolve(builder, inner, "fc2", folded(module.conv2.fused()))])


def _plain(convolution: nn.Conv2d) -> tuple[NDArray, NDArray]:
    assert isinstance(convolution.bias, Tensor)
    return folded((convolution.weight, convolution.bias))


def _convolve(
    builder: GraphBuilder, x: str, name: str, parts: tuple[NDArray, NDArray], *, stride: int = 1, groups: int = 1
) -> str:
    weight, bias = (
        builder.weight(f"{name}.{part}", values) for part, values in zip(("weight", "bias"), parts, strict=True)
    )
    side = parts[0].shape[-1]
    pads, strides = [side // 2] * 4, [stride, stride]
    return builder.node("Conv", [x, weight, bias], group=groups, pads=pads, strides=strides)

"""A class-conditional generator and its mirror, the discriminator, without normalisation layers.

After Huang et al. 2024, "The GAN is dead; long live the GAN!" (R3GAN): residual blocks that start
as the identity (Zhang et al. 2019, Fixup), bilinear resampling, leaky ReLU, and a projection
discriminator (Miyato & Koyama 2018).
"""

import itertools
import math

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional


class ResidualBlock(nn.Module):
    """`x + conv(lrelu(conv(lrelu(x))))`; the last convolution starts at zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.kaiming_normal_(self.conv1.weight, a=0.2)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(functional.leaky_relu(x, 0.2))
        result: Tensor = x + self.conv2(functional.leaky_relu(hidden, 0.2))
        return result


def _blocks(channels: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(ResidualBlock(channels) for _ in range(count)))


class Generator(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers is untyped
    """`latent [B, latent_size]`, `label [B]` -> image `[B, out_channels, S, S]`, S = 4 * 2^levels.

    The output is not bounded: a picture is its clip to [-1, 1].
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        latent_size: int = 64,
        num_class_embeds: int = 10,
        out_channels: int = 1,
        block_out_channels: tuple[int, ...] = (192, 128, 64, 32),
        layers_per_block: int = 1,
    ) -> None:
        super().__init__()
        first = block_out_channels[0]
        self.class_embedding = nn.Embedding(num_class_embeds, latent_size)
        self.input = nn.Linear(2 * latent_size, first * 16)
        levels = zip(block_out_channels, (*block_out_channels[1:], None), strict=True)
        self.blocks = nn.ModuleList()
        self.transitions = nn.ModuleList()
        for channels, following in levels:
            self.blocks.append(_blocks(channels, layers_per_block))
            if following is not None:
                self.transitions.append(nn.Conv2d(channels, following, 1))
        self.output = nn.Conv2d(block_out_channels[-1], out_channels, 3, padding=1)

    def forward(self, latent: Tensor, label: Tensor) -> Tensor:
        style = torch.cat([latent, self.class_embedding(label)], dim=1)
        x = self.input(style).reshape(latent.shape[0], -1, 4, 4)
        x = self.blocks[0](x)
        for transition, block in zip(self.transitions, self.blocks[1:], strict=True):
            x = functional.interpolate(
                transition(x), scale_factor=2.0, mode="bilinear", align_corners=False
            )
            x = block(x)
        image: Tensor = self.output(functional.leaky_relu(x, 0.2))
        return image


class Discriminator(nn.Module):
    """Image `[B, C, S, S]`, `label [B]` -> logit `[B]`; `block_out_channels` from 4x4 upwards."""

    def __init__(
        self,
        num_class_embeds: int,
        in_channels: int,
        block_out_channels: tuple[int, ...],
        layers_per_block: int,
    ) -> None:
        super().__init__()
        downwards = block_out_channels[::-1]
        self.input = nn.Conv2d(in_channels, downwards[0], 3, padding=1)
        self.blocks = nn.ModuleList(_blocks(c, layers_per_block) for c in downwards)
        self.transitions = nn.ModuleList(
            nn.Conv2d(c, following, 1) for c, following in itertools.pairwise(downwards)
        )
        self.output = nn.Linear(downwards[-1] * 16, downwards[-1])
        self.class_embedding = nn.Embedding(num_class_embeds, downwards[-1])

    def forward(self, image: Tensor, label: Tensor) -> Tensor:
        x = self.blocks[0](self.input(image))
        for transition, block in zip(self.transitions, self.blocks[1:], strict=True):
            x = block(transition(functional.avg_pool2d(x, 2)))
        features = self.output(functional.leaky_relu(x, 0.2).flatten(1))
        score: Tensor = (features * self.class_embedding(label)).sum(1)
        return score / math.sqrt(features.shape[1])

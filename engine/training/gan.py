"""Training of a class-conditional GAN.

Default loss: the relativistic pairing loss (Jolicoeur-Martineau 2018) with zero-centred R1 and R2
penalties on real and generated images (Huang et al. 2024); option: the non-saturating loss of
Goodfellow et al. 2014 under the same penalties.
"""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.checkpoint import save_checkpoint
from engine.errors import OptionError
from engine.networks.gan import Discriminator, Generator
from engine.training.config import GanConfig
from engine.training.optimize import adam, clip_and_step, update_ema


class GanTrainer:
    """Generator, its EMA, discriminator, both optimizers, and one training step."""

    def __init__(self, config: GanConfig, names: tuple[str, ...], device: torch.device):
        self.config, self.names, self.device = config, names, device
        network, data = config.network, config.data
        resolution = 4 * 2 ** (len(network.block_out_channels) - 1)
        if resolution != data.resolution:
            raise OptionError(
                f"network.block_out_channels has {len(network.block_out_channels)} levels, which "
                f"make {resolution}x{resolution} images, but data.resolution is {data.resolution}"
            )
        torch.manual_seed(config.seed)
        shape = (network.block_out_channels, network.layers_per_block)
        self.generator = Generator(network.latent_size, len(names), data.channels, *shape)
        self.generator.to(device, memory_format=torch.channels_last)
        self.discriminator = Discriminator(len(names), data.channels, *shape)
        self.discriminator.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = copy.deepcopy(self.generator).requires_grad_(False).eval()
        self.generator_adam, self.learning_rate = adam(self.generator, config)
        self.discriminator_adam, _ = adam(self.discriminator, config)

    def modules(self) -> dict[str, nn.Module]:
        return {
            "generator": self.generator,
            "ema": self.ema,
            "discriminator": self.discriminator,
        }

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"generator": self.generator_adam, "discriminator": self.discriminator_adam}

    def step(
        self, images: Tensor, labels: Tensor, generator: torch.Generator, step: int
    ) -> dict[str, float]:
        """One discriminator and one generator step on images `[B, C, H, W]` in [-1, 1]."""
        config = self.config
        loss, penalty = self._discriminator_loss(images, labels, generator, step)
        clip_and_step(
            loss + penalty, self.discriminator, self.discriminator_adam,
            self.learning_rate, config, step,
        )  # fmt: skip
        generator_loss = self._generator_loss(images, labels, generator)
        norm = clip_and_step(
            generator_loss, self.generator, self.generator_adam, self.learning_rate, config, step
        )
        update_ema(self.ema, self.generator, config.ema_decay, step)
        return {
            "discriminator_loss": loss.item(),
            "generator_loss": generator_loss.item(),
            "penalty": penalty.item(),
            "gradient_norm": norm,
        }

    def _generate(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        latent = torch.randn(len(labels), self.config.network.latent_size, generator=generator)
        image: Tensor = self.generator(latent.to(self.device), labels)
        return image

    def _autocast(self, enabled: bool = True) -> torch.autocast:
        wanted = enabled and self.config.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=wanted)

    def _discriminator_loss(
        self, images: Tensor, labels: Tensor, generator: torch.Generator, step: int
    ) -> tuple[Tensor, Tensor]:
        penalised = step % self.config.penalty_every == 0
        with self._autocast(), torch.no_grad():
            fakes = self._generate(labels, generator).float()
        real, fake = (x.detach().requires_grad_(penalised) for x in (images, fakes))
        with self._autocast(enabled=not penalised):  # second derivatives want fp32
            real_logits = self.discriminator(real, labels).float()
            fake_logits = self.discriminator(fake, labels).float()
        penalty = torch.zeros((), device=self.device)
        if penalised:  # seldom but stronger: Karras et al. 2020, lazy regularisation
            weight = self.config.penalty_weight * self.config.penalty_every
            squared = squared_gradient(real_logits, real) + squared_gradient(fake_logits, fake)
            penalty = weight / 2 * squared
        if self.config.loss == "relativistic":
            return functional.softplus(fake_logits - real_logits).mean(), penalty
        loss = functional.softplus(-real_logits).mean() + functional.softplus(fake_logits).mean()
        return loss, penalty

    def _generator_loss(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        with self._autocast():
            fake_logits = self.discriminator(self._generate(labels, generator), labels).float()
        if self.config.loss == "relativistic":
            with self._autocast(), torch.no_grad():
                real_logits = self.discriminator(images, labels).float()
            return functional.softplus(real_logits - fake_logits).mean()
        return functional.softplus(-fake_logits).mean()

    def save(self, folder: Path) -> None:
        """Write the EMA generator in the diffusers layout."""
        save_checkpoint(folder, "GanPipeline", {"generator": self.ema}, self.names)


def squared_gradient(logits: Tensor, images: Tensor) -> Tensor:
    """Mean over rows of `|d logit / d image|^2`, differentiable (Mescheder et al. 2018)."""
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean()

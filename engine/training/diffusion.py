"""Training of a class-conditional diffusion model (Ho et al. 2020; Salimans & Ho 2022; flow:
Lipman et al. 2023)."""

import copy
from pathlib import Path

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from torch import Tensor, nn
from torch.nn import functional

from engine.checkpoint import save_checkpoint
from engine.errors import OptionError
from engine.training.config import DiffusionConfig, UNetConfig
from engine.training.optimize import adam, clip_and_step, update_ema


def build_unet(config: UNetConfig, channels: int, resolution: int, classes: int) -> UNet2DModel:
    """diffusers' `UNet2DModel` with `classes + 1` labels: the last one means "no label"."""
    _refuse_misfit(config, resolution)
    levels = len(config.block_out_channels)
    plain = levels - config.attention_levels
    attends = [level >= plain for level in range(levels)]
    return UNet2DModel(
        sample_size=resolution,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=config.layers_per_block,
        block_out_channels=config.block_out_channels,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]),
        attention_head_dim=config.attention_head_dim,
        norm_num_groups=config.norm_num_groups,
        num_class_embeds=classes + 1,
    )


def _refuse_misfit(config: UNetConfig, resolution: int) -> None:
    """Sizes that would fail inside diffusers: while it is built, or at the first step."""
    channels, groups = config.block_out_channels, config.norm_num_groups
    if not channels or resolution % 2 ** (len(channels) - 1):
        raise OptionError(
            f"network.block_out_channels must have at least 1 level, and every further one halves "
            f"data.resolution {resolution} without a remainder, got {len(channels)} levels"
        )
    if any(count % groups for count in channels):
        raise OptionError(
            f"network.norm_num_groups must divide block_out_channels {channels}, got {groups}"
        )
    attending = channels[-max(config.attention_levels, 1) :]  # the middle block always attends
    if config.attention_head_dim > min(attending):
        raise OptionError(
            f"network.attention_head_dim must be 1..{min(attending)}, the fewest channels that "
            f"attend, got {config.attention_head_dim}"
        )


class DiffusionTrainer:
    """The network, its EMA, its optimizer, and one training step."""

    def __init__(self, config: DiffusionConfig, names: tuple[str, ...], device: torch.device):
        self.config, self.names, self.device = config, names, device
        data = config.data
        torch.manual_seed(config.seed)
        self.unet = build_unet(config.network, data.channels, data.resolution, len(names))
        self.unet.to(device, memory_format=torch.channels_last).train()
        self.ema = copy.deepcopy(self.unet).requires_grad_(False).eval()
        self.optimizer, self.learning_rate = adam(self.unet, config)
        self.scheduler = make_scheduler(config)

    def modules(self) -> dict[str, nn.Module]:
        return {"unet": self.unet, "ema": self.ema}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"adam": self.optimizer}

    def step(
        self, images: Tensor, labels: Tensor, generator: torch.Generator, step: int
    ) -> dict[str, float]:
        """One Adam step on images `[B, C, H, W]` in [-1, 1]; returns the scalars to log."""
        config = self.config
        start_noise = torch.randn(images.shape, generator=generator).to(self.device)
        dropped = torch.rand(len(labels), generator=generator) < config.label_dropout
        labels = labels.masked_fill(dropped.to(self.device), len(self.names))
        noisy, target, timesteps = self._corrupt(images, start_noise, generator)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            prediction = self.unet(noisy, timesteps, labels).sample
        loss = functional.mse_loss(prediction.float(), target)
        norm = clip_and_step(loss, self.unet, self.optimizer, self.learning_rate, config, step)
        update_ema(self.ema, self.unet, config.ema_decay, step)
        return {"loss": loss.item(), "gradient_norm": norm}

    def _corrupt(
        self, images: Tensor, start_noise: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy images, the network's target and the timesteps."""
        rows, steps = len(images), self.config.num_train_timesteps
        if self.config.prediction_type == "flow_prediction":
            # logit-normal times (Esser et al. 2024): x = (1 - sigma) x0 + sigma n, target n - x0
            sigma = torch.sigmoid(torch.randn(rows, generator=generator)).to(self.device)
            noisy = torch.lerp(images, start_noise, sigma[:, None, None, None])
            return noisy, start_noise - images, sigma * steps
        timesteps = torch.randint(steps, (rows,), generator=generator).to(self.device)
        # x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) n: t steps of x_t = sqrt(1-b) x + sqrt(b) n
        noisy = self.scheduler.add_noise(images, start_noise, timesteps)
        if self.config.prediction_type == "v_prediction":
            return noisy, self.scheduler.get_velocity(images, start_noise, timesteps), timesteps
        return noisy, start_noise, timesteps

    def save(self, folder: Path) -> None:
        """Write the EMA weights as a diffusers checkpoint."""
        # DDIMPipeline would turn a flow scheduler into DDIM; DDPMPipeline takes any
        flow = self.config.prediction_type == "flow_prediction"
        pipeline_class = "DDPMPipeline" if flow else "DDIMPipeline"
        save_checkpoint(
            folder, pipeline_class, {"unet": self.ema}, self.names, scheduler=self.scheduler
        )


def make_scheduler(config: DiffusionConfig) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
    """The diffusers scheduler that the checkpoint names: it also adds the noise in training."""
    if config.prediction_type == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=config.num_train_timesteps)
    return DDIMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction_type,
        timestep_spacing="trailing",
        clip_sample=False,
    )

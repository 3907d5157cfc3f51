"""What a training run may be told: one validated model, read from TOML."""

import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from engine.errors import OptionError
from engine.options import Options

Positive = Annotated[int, Field(ge=1)]


class DataConfig(Options):
    """Where the photos are and how they become `[C, resolution, resolution]` in [-1, 1]."""

    path: str = Field(description="a folder of idx .gz files, or of a folder of images a class")
    resolution: int = Field(32, ge=8, le=1024)
    channels: Literal[1, 3] = 3
    labels: tuple[str, ...] = Field((), description="class names, for data that carries none (idx)")
    max_skipped: float = Field(0.01, ge=0, le=1, description="share of unreadable images allowed")


class OptimizerConfig(Options):
    """Adam (Kingma & Ba 2015) with linear warm-up and an optional linear decay to zero."""

    learning_rate: float = Field(1e-3, gt=0, le=1)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.99, ge=0, lt=1)
    warmup_steps: int = Field(200, ge=0)
    decay_steps: int = Field(0, ge=0, description="length of the decay that ends at the last step")
    gradient_clip: float = Field(1.0, gt=0, description="largest global gradient norm")


class TrainConfig(Options):
    """What both kinds of training share."""

    seed: int = Field(0, ge=0, lt=2**32)
    steps: int = Field(10_000, ge=1)
    batch_size: int = Field(64, ge=2)
    precision: Literal["fp32", "bf16"] = "fp32"
    ema_decay: float = Field(0.999, ge=0, lt=1)
    save_every: int = Field(500, ge=1, description="steps between checkpoints")
    sample_every: int = Field(500, ge=1, description="steps between sample grids")
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()


class UNetConfig(Options):
    """The part of diffusers' `UNet2DModel` config that is a matter of size."""

    block_out_channels: tuple[Positive, ...] = (32, 64, 128)
    layers_per_block: int = Field(1, ge=1)
    attention_levels: int = Field(1, ge=0, description="how many of the lowest levels attend")
    attention_head_dim: int = Field(16, ge=1)
    norm_num_groups: int = Field(8, ge=1)


class DiffusionConfig(TrainConfig):
    """A class-conditional diffusion model over pixels."""

    kind: Literal["diffusion"]
    network: UNetConfig = UNetConfig()
    prediction_type: Literal["epsilon", "v_prediction", "flow_prediction"] = "v_prediction"
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    num_train_timesteps: int = Field(1000, ge=10)
    label_dropout: float = Field(0.1, ge=0, lt=1, description="share of rows trained without label")


class GeneratorConfig(Options):
    """Sizes of the generator and of its mirror, the discriminator."""

    latent_size: int = Field(64, ge=1)
    block_out_channels: tuple[Positive, ...] = Field(
        (192, 128, 64, 32), description="from 4x4 upwards, each level twice as large"
    )
    layers_per_block: int = Field(1, ge=1)


class GanConfig(TrainConfig):
    """A class-conditional GAN."""

    kind: Literal["gan"]
    network: GeneratorConfig = GeneratorConfig()
    loss: Literal["relativistic", "non_saturating"] = "relativistic"
    penalty_weight: float = Field(1.0, ge=0, description="gamma of the R1 and R2 penalties")
    penalty_every: int = Field(1, ge=1, description="discriminator steps between penalties")


_KINDS: dict[str, type[DiffusionConfig] | type[GanConfig]] = {
    "diffusion": DiffusionConfig,
    "gan": GanConfig,
}


def read_config(
    path: Path, data_path: str | None = None, steps: int | None = None
) -> DiffusionConfig | GanConfig:
    """Read and validate a TOML file; `data_path` and `steps` replace what it names.

    Raises OptionError for a missing file, bad TOML, an unknown key or a value out of range.
    """
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise OptionError(f"config '{path}' does not exist") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise OptionError(f"config '{path}' is not readable TOML: {error}") from None
    data = values.setdefault("data", {})
    if data_path is not None and isinstance(data, dict):
        data["path"] = data_path
    if steps is not None:
        values["steps"] = steps
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise OptionError(f"{path}: kind must be one of {', '.join(_KINDS)}, got {kind!r}")
    return _KINDS[kind].parse(values, str(path))

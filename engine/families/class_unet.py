"""Class-conditional diffusion over pixels: diffusers' `UNet2DModel` with class embeddings."""

from collections.abc import Mapping

import numpy as np

from engine.errors import ArtifactError
from engine.manifest import Defaults, ImageSpec, ModelSpec, NetworkSpec, TensorSpec
from engine.noise import noise
from engine.request import Request
from engine.row import Row
from engine.samplers import samplers_for, trajectory
from engine.schedules import SchedulerConfig

NETWORK = "unet"
DEFAULT_STEPS = 20
DEFAULT_GUIDANCE_SCALE = 2.0


def describe(
    configs: Mapping[str, dict[str, object]],
    scheduler: dict[str, object],
    labels: tuple[str, ...],
) -> ModelSpec:
    """The model that a checkpoint's `unet/config.json` and `scheduler_config.json` describe.

    With one more class embedding than labels, the last embedding means "no label" and the model
    takes guidance. Raises ArtifactError, OptionError.
    """
    config = configs[NETWORK]
    height, width = _size(config)
    channels = int(config["in_channels"])  # type: ignore[call-overload]
    embeddings = config.get("num_class_embeds")
    if embeddings not in (len(labels), len(labels) + 1):
        raise ArtifactError(
            f"unet/config.json has num_class_embeds {embeddings}, but labels.json names "
            f"{len(labels)} labels; it must have as many, or one more for guidance"
        )
    samplers = samplers_for(SchedulerConfig.parse(scheduler))
    null_label = len(labels) if embeddings == len(labels) + 1 else None
    guidance_scale = 1.0 if null_label is None else DEFAULT_GUIDANCE_SCALE
    pixels = ("batch", channels, height, width)
    network = NetworkSpec(
        inputs=(
            TensorSpec(name="sample", dtype="float32", shape=pixels),
            TensorSpec(name="timestep", dtype="float32", shape=("batch",)),
            TensorSpec(name="label", dtype="int64", shape=("batch",)),
        ),
        outputs=(TensorSpec(name="prediction", dtype="float32", shape=pixels),),
    )
    return ModelSpec(
        family="class_unet",
        labels=labels,
        image=ImageSpec(height=height, width=width, channels=channels),
        networks={NETWORK: network},
        scheduler=scheduler,  # type: ignore[arg-type]
        samplers=samplers,
        null_label=null_label,
        defaults=Defaults(
            num_inference_steps=DEFAULT_STEPS,
            guidance_scale=guidance_scale,
            sampler="dpmpp_2m" if "dpmpp_2m" in samplers else samplers[0],
        ),
    )


def _size(config: Mapping[str, object]) -> tuple[int, int]:
    match config.get("sample_size"):
        case int(size):
            return size, size
        case [int(height), int(width)]:
            return height, width
        case other:
            raise ArtifactError(f"unet/config.json must name its sample_size, got {other!r}")


def prepare(model: ModelSpec, request: Request) -> Row:
    """Start noise of the seed, the label and, with guidance, the null label beside it."""
    assert request.sampler is not None, "resolve the request first"
    assert request.num_inference_steps is not None
    assert request.guidance_scale is not None
    config = SchedulerConfig.parse(model.scheduler or {})
    solver = trajectory(request.sampler, config, request.num_inference_steps)
    image = model.image
    x = noise(request.seed, (image.channels, image.height, image.width))
    indices = [model.labels.index(request.label)]
    if request.guidance_scale != 1 and model.null_label is not None:
        indices.append(model.null_label)
    return Row(
        x * np.float32(solver.init_noise_sigma),
        tuple({"label": np.array(index, np.int64)} for index in indices),
        solver,
        request.guidance_scale,
    )

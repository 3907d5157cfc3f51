"""Diffusion over pixels: diffusers' `UNet2DModel`, with class embeddings or without."""

import numpy as np

from engine.errors import ArtifactError
from engine.families.components import Components
from engine.families.parts import Parts, scaled, tensor
from engine.manifest import Defaults, ImageSpec, ModelSpec, NetworkSpec
from engine.noise import Noise
from engine.request import Resolved
from engine.row import Feed, Row
from engine.samplers import default_sampler, samplers_for, trajectory
from engine.scheduler_config import SchedulerConfig

COMPONENTS: dict[str, tuple[str | None, ...]] = {"unet": ("UNet2DModel",)}
DEFAULT_STEPS = 20
DEFAULT_GUIDANCE_SCALE = 2.0


def describe(parts: Parts) -> ModelSpec:
    """The model that a checkpoint's JSON files describe.

    With one more class embedding than labels, the last embedding means "no label" and the model
    takes guidance. Raises ArtifactError, OptionError.
    """
    parts.require("unet", class_embed_type=(None,))
    labels = _labels(parts)
    classes = parts.configs["unet"].get("num_class_embeds")
    null_label = len(labels) if labels and classes == len(labels) + 1 else None
    height, width = parts.size("unet")
    channels = parts.whole("unet", "in_channels")
    multiple = 2 ** (parts.length("unet", "block_out_channels") - 1)
    size = scaled(multiple, "height"), scaled(multiple, "width")
    inputs = [tensor("sample", channels, *size), tensor("timestep")]
    if labels:
        inputs.append(tensor("label", dtype="int64"))
    network = NetworkSpec(inputs=tuple(inputs), outputs=(tensor("prediction", channels, *size),))
    scheduler = SchedulerConfig.parse(parts.scheduler)
    samplers = samplers_for(scheduler)
    return ModelSpec(
        family="pixel_unet",
        labels=labels,
        image=ImageSpec.model_validate(
            {"height": height, "width": width, "channels": channels, "multiple": multiple}
        ),
        networks={"unet": network},
        scheduler=parts.stored_scheduler(),
        samplers=samplers,
        null_label=null_label,
        defaults=Defaults(
            num_inference_steps=DEFAULT_STEPS,
            guidance_scale=1.0 if null_label is None else DEFAULT_GUIDANCE_SCALE,
            sampler="dpmpp_2m" if "dpmpp_2m" in samplers else default_sampler(scheduler),
        ),
    )


def _labels(parts: Parts) -> tuple[str, ...]:
    """The named classes, numbers where nobody named them, nothing for a model without classes."""
    classes = parts.configs["unet"].get("num_class_embeds")
    if classes is None and not parts.labels:
        return ()
    if not parts.labels:
        return tuple(str(number) for number in range(parts.whole("unet", "num_class_embeds")))
    if classes not in (len(parts.labels), len(parts.labels) + 1):
        raise ArtifactError(
            f"unet/config.json has num_class_embeds {classes}, but labels.json names "
            f"{len(parts.labels)} labels; it must have as many, or one more for guidance"
        )
    return parts.labels


def prepare(components: Components, request: Resolved) -> Row:
    """Start noise of the seed, the label and, with guidance, the null label beside it."""
    model = components.model
    solver = trajectory(request.sampler, components.scheduler, request.num_inference_steps)
    noise = Noise(request.seed)
    x = noise((model.image.channels, request.height, request.width))
    return Row(
        x * np.float32(solver.init_noise_sigma),
        _conditioning(model, request),
        solver,
        request.guidance_scale,
        noise=noise,
    )


def _conditioning(model: ModelSpec, request: Resolved) -> tuple[Feed, ...]:
    if not model.labels:
        return ({},)
    indices = [model.labels.index(request.label)]
    if request.guidance_scale != 1 and model.null_label is not None:
        indices.append(model.null_label)
    return tuple({"label": np.array(index, np.int64)} for index in indices)

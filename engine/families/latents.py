"""Diffusion over the latents of a VAE: what the text-to-image families share."""

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
from pydantic import JsonValue

from engine.errors import ArtifactError
from engine.families import text
from engine.families.components import Array, Components
from engine.families.parts import Parts, scaled, tensor
from engine.images import Picture, resized, to_network_range
from engine.manifest import (
    Defaults,
    Family,
    ImageSpec,
    LatentSpec,
    ModelSpec,
    NetworkSpec,
    split_axis,
)
from engine.noise import Noise
from engine.request import Resolved
from engine.row import Feed, Row
from engine.samplers import default_sampler, samplers_for, trajectory
from engine.scheduler_config import SchedulerConfig

VAES = ("AutoencoderKL", "AutoencoderTiny")
MASK_THRESHOLD = 0.5  # of white; from there on a pixel is painted anew


def describe(parts: Parts) -> tuple[LatentSpec, dict[str, NetworkSpec]]:
    """The latents of a checkpoint's VAE, and its two networks. Raises ArtifactError."""
    config = parts.configs["vae"]
    tiny = config.get("_class_name") == "AutoencoderTiny"
    levels = parts.length("vae", "encoder_block_out_channels" if tiny else "block_out_channels")
    channels, downscale = parts.whole("vae", "latent_channels"), 2 ** (levels - 1)
    parts.require("vae", in_channels=(3,), latents_mean=(None,), latents_std=(None,))
    image = tensor("image", 3, scaled(downscale, "height"), scaled(downscale, "width"))
    latents = tensor("latents", channels, "height", "width")
    moments = tensor("moments", 2 * channels, "height", "width")
    spec = LatentSpec(
        channels=channels,
        downscale=downscale,
        scaling_factor=parts.number("vae", "scaling_factor", 1.0 if tiny else 0.18215),
        shift_factor=parts.number("vae", "shift_factor", 0.0),
    )
    if not spec.scaling_factor:
        raise ArtifactError("vae/config.json: scaling_factor must not be 0")
    encoder = NetworkSpec(inputs=(image,), outputs=(latents if tiny else moments,))
    decoder = NetworkSpec(inputs=(latents,), outputs=(image,))
    return spec, {"vae_encoder": encoder, "vae_decoder": decoder}


def model(
    parts: Parts,
    family: Family,
    encoders: dict[str, NetworkSpec],
    denoiser: tuple[str, NetworkSpec],
    size: tuple[int, int],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    strength: float,
    largest: int | None = None,
    zero_empty_prompt: bool = False,
    scheduler_changes: Mapping[str, JsonValue] | None = None,
) -> ModelSpec:
    """A text-to-image model: what its family found, around the VAE.

    `size` (default) and `largest` (none: no limit) are in latents.

    `scheduler_changes`: keys that diffusers' pipeline of the family overrides.
    """
    space, vae = describe(parts)
    name, network = denoiser
    _, channels, height, _ = network.inputs[0].shape
    if channels != space.channels:
        raise ArtifactError(
            f"the {name} takes {channels} channels, but the VAE has {space.channels} for latents"
        )
    multiple = space.downscale * split_axis(str(height))[0]
    # clip_sample is for pixels: latents are not bounded by 1
    stored = {**parts.stored_scheduler(), **(scheduler_changes or {})}
    if "clip_sample" in stored or not SchedulerConfig.parse(stored).is_flow:
        stored["clip_sample"] = False
    scheduler = SchedulerConfig.parse(stored)
    return ModelSpec(
        family=family,
        image=ImageSpec(
            height=_rounded(size[0] * space.downscale, multiple),
            width=_rounded(size[1] * space.downscale, multiple),
            channels=3,
            multiple=multiple,
            largest=None if largest is None else largest * space.downscale,
        ),
        networks={**encoders, name: network, **vae},
        tokenizers=text.tokenizer_files(parts),
        latents=space,
        scheduler=stored,
        samplers=samplers_for(scheduler),
        zero_empty_prompt=zero_empty_prompt,
        defaults=Defaults(
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            sampler=default_sampler(scheduler),
            strength=strength,
        ),
    )


def _rounded(pixels: int, multiple: int) -> int:
    return max(pixels - pixels % multiple, multiple)


def start(
    components: Components,
    request: Resolved,
    condition: Callable[[str | None], Feed],
    sigmas: Literal["scheduler", "linear"] = "scheduler",
) -> Row:
    """The row of a request: from noise, or from its image and as much noise as asked.

    `condition` gives what one evaluation of the network is fed for a prompt; None is a negative
    prompt that nobody gave. The draws of the request's generator are those of diffusers' pipelines,
    in their order: of the image's latents, of the start noise, of the masked image's latents.
    """
    from_image = request.image is not None and (request.mask is None or request.strength < 1)
    # LCM's own pipeline does all its steps, on another schedule; all others leave out the first
    lcm = request.sampler == "lcm" and components.model.guidance == "embedded"
    solver = trajectory(
        request.sampler,
        components.scheduler,
        request.num_inference_steps,
        image_seq_len=_patches(components, request),
        sigmas=sigmas,
        lcm_strength=request.strength if from_image and lcm else 1.0,
    )
    feeds = [condition(request.prompt)]
    if components.model.guidance == "classifier_free" and request.guidance_scale > 1:
        feeds.append(condition(request.negative_prompt))
    noise = Noise(request.seed)
    shape = _shape(components, request)
    index = 0
    if request.image is not None and from_image:
        index = 0 if lcm else solver.start(request.strength)
        solver = solver.begun_at(index)
        picture = _encode(components, to_network_range(_fitted(request.image, request)), noise)
        x = solver.signal[index] * picture + solver.noise_level[index] * noise(shape)
    else:
        x = noise(shape) * np.float32(solver.init_noise_sigma)
    if request.image is not None and request.mask is not None:
        painting = _inpainting(components, request, request.image, request.mask, noise)
        feeds = [{**feed, **painting} for feed in feeds]
    return Row(x, tuple(feeds), solver, request.guidance_scale, index, noise)


def _patches(components: Components, request: Resolved) -> int:
    """The least blocks of a picture; tokens of a transformer, which dynamic shifting counts."""
    multiple = components.model.image.multiple or 1
    return (request.height // multiple) * (request.width // multiple)


def decode(components: Components, row: Row) -> Array:
    """The picture of a row that is done, [3, H, W] in [-1, 1], not clipped."""
    spec = components.model.latents
    assert spec is not None
    latents = row.x / np.float32(spec.scaling_factor) + np.float32(spec.shift_factor)
    (image,) = components.run_one("vae_decoder", {"latents": latents})
    return image


def _shape(components: Components, request: Resolved) -> tuple[int, int, int]:
    spec = components.model.latents
    assert spec is not None
    return spec.channels, request.height // spec.downscale, request.width // spec.downscale


def _encode(components: Components, image: Array, noise: Noise) -> Array:
    """[C, h, w] latents of a picture [3, H, W] in [-1, 1], drawn where the VAE gives moments."""
    spec = components.model.latents
    assert spec is not None
    (encoded,) = components.run_one("vae_encoder", {"image": image})
    if len(encoded) != spec.channels:
        mean, log_variance = np.split(encoded, 2)
        deviation = np.exp(np.float32(0.5) * np.clip(log_variance, -30, 20))
        encoded = mean + deviation * noise(mean.shape)
    return (encoded - np.float32(spec.shift_factor)) * np.float32(spec.scaling_factor)


def _inpainting(
    components: Components, request: Resolved, image: Picture, mask: Picture, noise: Noise
) -> Feed:
    """What an inpainting network takes: the mask, and the image without what it covers."""
    covered = _binary(_fitted(mask, request))
    visible = to_network_range(_fitted(image, request)) * (1 - covered)
    return {
        "mask": _nearest(covered, _shape(components, request)[1:]),
        "masked_image": _encode(components, visible, noise),
    }


def _fitted(picture: Picture, request: Resolved) -> Picture:
    return resized(picture, request.height, request.width)


def _binary(mask: Picture) -> Array:
    """[1, H, W] of 0 and 1."""
    return (mask[..., 0] >= MASK_THRESHOLD * 255).astype(np.float32)[None]


def _nearest(mask: Array, size: tuple[int, ...]) -> Array:
    """[1, H, W] to [1, h, w], each value from the top left of its cell, as torch's nearest."""
    rows = np.arange(size[0]) * mask.shape[1] // size[0]
    columns = np.arange(size[1]) * mask.shape[2] // size[1]
    return mask[:, rows][:, :, columns]

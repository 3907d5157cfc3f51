"""What a caller may ask: one validated model, its limits, and the defaults of a model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import ConfigDict, Field, ValidationError

from engine.errors import OptionError
from engine.images import Picture
from engine.manifest import Defaults, ModelSpec
from engine.options import Options, describe
from engine.postprocess import OFF, PostProcess

DIFFUSION_ONLY = ("num_inference_steps", "guidance_scale", "sampler")
IMAGE_ONLY = ("image", "mask", "strength")
MAX_SIDE = 8192  # pixels of a picture's height or width


class Request(Options):
    """One picture. `None` means the model's default; `resolve` fills it in."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    label: str | None = Field(None, description="a class name, for a model that has some")
    prompt: str | None = Field(None, description="a text, for a model that takes one")
    negative_prompt: str | None = Field(None, description="what guidance leads away from")
    seed: int = Field(
        0, ge=0, le=2**63 - 1, description="start noise; torch uses its low 32 bits, so do we"
    )
    num_inference_steps: int | None = Field(None, ge=1, le=1000)
    guidance_scale: float | None = Field(
        None, ge=1, le=100, description="classifier-free guidance; 1 is off"
    )
    sampler: str | None = None
    height: int | None = Field(None, ge=1, le=MAX_SIDE)
    width: int | None = Field(None, ge=1, le=MAX_SIDE)
    strength: float | None = Field(
        None, gt=0, le=1, description="share of the steps that an image goes through; 1 is all"
    )
    image: np.ndarray[Any, np.dtype[np.uint8]] | None = Field(
        None, description="uint8 [H, W, 3] to start from"
    )
    mask: np.ndarray[Any, np.dtype[np.uint8]] | None = Field(
        None, description="uint8 [H, W, 1]; white is painted anew"
    )
    postprocess: PostProcess | None = Field(
        None, description="what is done to the finished picture: sharpen=0.5,contrast=1.1"
    )

    @classmethod
    def of(cls, values: Mapping[str, object]) -> "Request":
        """A request as it came over the wire or the command line. Raises OptionError."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise OptionError(describe(cls, error.errors()[0])) from None


@dataclass(frozen=True)
class Resolved:
    """A request with every default of its model filled in; what a model has no use for is empty."""

    label: str
    prompt: str
    negative_prompt: str | None
    seed: int
    num_inference_steps: int
    guidance_scale: float
    sampler: str
    height: int
    width: int
    strength: float
    image: Picture | None
    mask: Picture | None
    postprocess: PostProcess = OFF


def resolve(request: Request, model: ModelSpec, size: tuple[int, int] | None = None) -> Resolved:
    """What a request means for a model; `size` is the only height and width that a build makes.

    Raises OptionError for an unknown label or sampler and for an option the model does not take.
    """
    _check_subject(request, model)
    _check_pictures(request, model)
    height, width = _size(request, model, size)
    _check_upscale(request, height, width)
    defaults = model.defaults or _one_step(request)
    resolved = Resolved(
        label=request.label or "",
        prompt=request.prompt or "",
        negative_prompt=request.negative_prompt,
        seed=request.seed,
        num_inference_steps=request.num_inference_steps or defaults.num_inference_steps,
        guidance_scale=request.guidance_scale or defaults.guidance_scale,
        sampler=request.sampler or defaults.sampler,
        height=height,
        width=width,
        strength=request.strength or defaults.strength or 1.0,
        image=request.image,
        mask=request.mask,
        postprocess=request.postprocess or OFF,
    )
    if model.defaults and resolved.sampler not in model.samplers:
        raise OptionError(
            f"sampler must be one of {', '.join(model.samplers)}, got {resolved.sampler!r}"
        )
    _check_guidance(resolved, model)
    return resolved


def _one_step(request: Request) -> Defaults:
    _refuse(request, DIFFUSION_ONLY, "a GAN takes one step and no {}")
    return Defaults(num_inference_steps=1, guidance_scale=1, sampler="")


def _check_subject(request: Request, model: ModelSpec) -> None:
    """What the picture is of: a label, a prompt, or nothing, as the model takes it."""
    if model.labels and request.label not in model.labels:
        raise OptionError(f"label must be one of {', '.join(model.labels)}, got {request.label!r}")
    if not model.labels:
        _refuse(request, ("label",), "this model takes no {}")
    if not model.tokenizers:
        _refuse(request, ("prompt", "negative_prompt"), "this model takes no {}")
    elif request.prompt is None:
        raise OptionError("prompt is required")


def _check_pictures(request: Request, model: ModelSpec) -> None:
    takes = model.takes_image
    if takes == "no":
        _refuse(request, IMAGE_ONLY, "this model takes no {}")
        return
    if takes == "optional":
        _refuse(request, ("mask",), "this model takes no {} (an inpainting model does)")
    if takes == "with mask" and (request.image is None or request.mask is None):
        raise OptionError("this is an inpainting model: image and mask are required")
    if request.image is None and request.strength is not None:
        raise OptionError(f"strength is for a request with an image, got {request.strength!r}")
    for name, channels in (("image", 3), ("mask", 1)):
        picture = getattr(request, name)
        if picture is not None:
            _check_picture(name, picture, channels)


def _check_picture(name: str, picture: Picture, channels: int) -> None:
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != channels:
        raise OptionError(
            f"{name} must be uint8 [H, W, {channels}], got {picture.dtype} {list(picture.shape)}"
        )
    if not picture.size:
        raise OptionError(f"{name} must not be empty, got {list(picture.shape)}")


def _size(request: Request, model: ModelSpec, only: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width: as asked for, else the image's own, else the model's."""
    multiple = model.image.multiple
    height, width = only or (model.image.height, model.image.width)
    if request.image is not None and multiple and not only:
        height, width = (max(s - s % multiple, multiple) for s in request.image.shape[:2])
    fixed = only is not None or multiple is None
    height = _side("height", request.height, height, None if fixed else multiple)
    width = _side("width", request.width, width, None if fixed else multiple)
    largest = model.image.largest or MAX_SIDE
    for name, value, asked in (("height", height, request.height), ("width", width, request.width)):
        if value > largest:
            own = ", the image's own; give height and width" if asked is None else ""
            raise OptionError(f"{name} must be 1..{largest}, got {value}{own}")
    return height, width


def _check_upscale(request: Request, height: int, width: int) -> None:
    factor = request.postprocess.upscale if request.postprocess else 1
    if factor * max(height, width) > MAX_SIDE:
        raise OptionError(
            f"postprocess.upscale makes sides of at most {MAX_SIDE}, got {factor} times "
            f"{height}x{width}; take {MAX_SIDE // max(height, width)} or less"
        )


def _side(name: str, asked: int | None, default: int, multiple: int | None) -> int:
    if asked is None or asked == default:
        return default
    if multiple is None:
        raise OptionError(f"{name} must be {default}, got {asked}")
    if asked % multiple:
        below = asked - asked % multiple
        nearest = f"{below} and {below + multiple}" if below else f"{multiple}"
        raise OptionError(
            f"{name} must be a multiple of {multiple}, got {asked}; the nearest: {nearest}"
        )
    return asked


def _check_guidance(request: Resolved, model: ModelSpec) -> None:
    kind, scale = model.guidance, request.guidance_scale
    if kind == "none" and scale != 1:
        why = "trained without label dropout" if model.labels else "without labels or prompts"
        raise OptionError(f"guidance_scale must be 1 for a model {why}, got {scale}")
    if request.negative_prompt is None:
        return
    if kind == "embedded":
        raise OptionError(
            "this model has guidance built in and takes no negative_prompt, "
            f"got {request.negative_prompt!r}; leave it out"
        )
    if scale == 1:
        raise OptionError("negative_prompt needs a guidance_scale above 1, got 1")


def _refuse(request: Request, names: tuple[str, ...], sentence: str) -> None:
    for name in names:
        value = getattr(request, name)
        if value is not None:
            got = "one" if isinstance(value, np.ndarray) else repr(value)
            raise OptionError(f"{sentence.format(name)}, got {got}; leave it out")

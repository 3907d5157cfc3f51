"""Post-processing of one picture: which operations, how strong, in which order; off by default."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image
from pydantic import Field, model_serializer, model_validator

from engine import enhance, filters
from engine.ground import white_background
from engine.images import Picture, to_pillow
from engine.options import Options

FORM = "the form is KEY=VALUE,KEY=VALUE, such as sharpen=0.5,contrast=1.1"


class PostProcess(Options):
    """Strengths by operation, in the order in which they apply; a default changes nothing.

    Validates from a mapping or from its own text form, `sharpen=0.5,contrast=1.1`, which is also
    what it serializes to.
    """

    median_px: int = Field(0, ge=0, le=7, description="radius of a median filter; 0 is off")
    mean_px: int = Field(0, ge=0, le=7, description="radius of a mean filter; 0 is off")
    bilateral: float = Field(
        0, ge=0, le=1, description="smoothing that stops at edges (bilateral filter); 0 is off"
    )
    non_local_means: float = Field(
        0, ge=0, le=1, description="averaging of alike patches (non-local means); 0 is off"
    )
    white_balance: float = Field(
        0, ge=0, le=1, description="how far the brightest surface is made neutral; 0 is off"
    )
    contrast: float = Field(1, ge=0, le=3, description="factor around the mean; 1 is off")
    clahe: float = Field(
        0, ge=0, le=1, description="local contrast (adaptive histogram equalization); 0 is off"
    )
    saturation: float = Field(1, ge=0, le=3, description="factor of colour; 0 is gray, 1 is off")
    deblur_px: float = Field(
        0, ge=0, le=3, description="standard deviation of the blur to undo; 0 is off"
    )
    sharpen: float = Field(0, ge=0, le=4, description="amount of an unsharp mask; 0 is off")
    sharpen_edges: float = Field(
        0, ge=0, le=4, description="the same at edges (Sobel) only, flat surfaces stay; 0 is off"
    )
    white_background: float = Field(
        0,
        ge=0,
        le=0.5,
        description="paint the ground pure white; how much of the range it varies by; 0 is off",
    )
    upscale: int = Field(1, ge=1, le=4, description="factor of height and width; 1 is off")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, values: object) -> object:
        match values:
            case str():
                return _parsed(values)
            case PostProcess() | dict():
                return values
            case Mapping():
                return dict(values)
        raise ValueError(FORM)

    @model_serializer
    def _to_text(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return ",".join(f"{name}={value!r}" for name, value in self.given().items())

    def given(self) -> dict[str, float]:
        """The strengths that change something, in the order in which they apply."""
        return {
            name: getattr(self, name)
            for name, field in type(self).model_fields.items()
            if getattr(self, name) != field.default
        }


OFF = PostProcess()


def _parsed(text: str) -> dict[str, object]:
    values: dict[str, object] = {}
    for pair in text.split(",") if text.strip() else ():
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not (key and equals):
            raise ValueError(FORM)
        if key in values:
            raise ValueError(f"'{key}' stands there twice, and once is allowed")
        values[key] = _number(value)
    return values


def _number(text: str) -> object:
    """What the text says as a number, or itself, which no strength accepts."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def upscaled(picture: Picture, factor: int) -> Picture:
    """`[H, W, C]` to `[factor H, factor W, C]`, bicubic; the same array at 1. uint8 only.

    Lanczos would ring: beside a dark product a white ground would not stay white.
    """
    if factor == 1:
        return picture
    height, width, channels = picture.shape
    size = (factor * width, factor * height)
    image = to_pillow(np.ascontiguousarray(picture)).resize(size, Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(factor * height, factor * width, channels)


OPERATIONS: Mapping[str, Callable[[Picture, Any], Picture]] = {
    "median_px": filters.median,
    "mean_px": filters.mean,
    "bilateral": filters.bilateral,
    "non_local_means": filters.non_local_means,
    "white_balance": enhance.white_balance,
    "contrast": enhance.contrast,
    "clahe": enhance.clahe,
    "saturation": enhance.saturation,
    "deblur_px": filters.deblur,
    "sharpen": filters.sharpen,
    "sharpen_edges": filters.sharpen_edges,
    "white_background": white_background,
    "upscale": upscaled,
}


def postprocess(picture: Picture, options: PostProcess) -> Picture:
    """uint8 `[H, W, C]`, C of 1 or 3, through the operations that are on, in the fields' order.

    With all off it is the same array. The result depends on the picture and the options alone.
    """
    for name, strength in options.given().items():
        picture = OPERATIONS[name](picture, strength)
    return picture

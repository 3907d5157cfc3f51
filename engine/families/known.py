"""Which pipelines are known, and the family that each belongs to."""

from typing import Protocol

from engine.families import (
    flux,
    gan,
    pixart,
    pixel_unet,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
)
from engine.families.components import Components
from engine.families.parts import Parts
from engine.manifest import Family, ModelSpec
from engine.request import Resolved
from engine.row import Row


class FamilyModule(Protocol):
    """What a module of this folder that is a family has."""

    COMPONENTS: dict[str, tuple[str | None, ...]]
    """The classes that each component may have; None: it may be missing."""

    def describe(self, parts: Parts) -> ModelSpec:
        """The model that a checkpoint's JSON files describe."""

    def prepare(self, components: Components, request: Resolved) -> Row:
        """The row of a request before its first step."""


FAMILIES: dict[Family, FamilyModule] = {
    "gan": gan,
    "pixel_unet": pixel_unet,
    "stable_diffusion": stable_diffusion,
    "stable_diffusion_xl": stable_diffusion_xl,
    "pixart": pixart,
    "stable_diffusion_3": stable_diffusion_3,
    "flux": flux,
}
PIPELINES: dict[str, Family] = {
    "GanPipeline": "gan",
    "DDPMPipeline": "pixel_unet",
    "DDIMPipeline": "pixel_unet",
    "StableDiffusionPipeline": "stable_diffusion",
    "StableDiffusionImg2ImgPipeline": "stable_diffusion",
    "StableDiffusionInpaintPipeline": "stable_diffusion",
    "LatentConsistencyModelPipeline": "stable_diffusion",
    "LatentConsistencyModelImg2ImgPipeline": "stable_diffusion",
    "StableDiffusionXLPipeline": "stable_diffusion_xl",
    "StableDiffusionXLImg2ImgPipeline": "stable_diffusion_xl",
    "StableDiffusionXLInpaintPipeline": "stable_diffusion_xl",
    "PixArtAlphaPipeline": "pixart",
    "PixArtSigmaPipeline": "pixart",
    "StableDiffusion3Pipeline": "stable_diffusion_3",
    "StableDiffusion3Img2ImgPipeline": "stable_diffusion_3",
    "FluxPipeline": "flux",
    "FluxImg2ImgPipeline": "flux",
}

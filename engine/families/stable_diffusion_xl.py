"""Stable Diffusion XL: two CLIP encoders, and the picture's size as a condition."""

import numpy as np

from engine.families import latents, stable_diffusion, text
from engine.families.components import Components
from engine.families.parts import Parts, tensor
from engine.manifest import ModelSpec
from engine.request import Resolved
from engine.row import Feed, Row

COMPONENTS: dict[str, tuple[str | None, ...]] = {
    "unet": ("UNet2DConditionModel",),
    "vae": latents.VAES,
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer": text.CLIP_TOKENIZERS,
    "tokenizer_2": text.CLIP_TOKENIZERS,
}
HIDDEN = "penultimate_hidden_state"


def describe(parts: Parts) -> ModelSpec:
    """The model that a checkpoint's JSON files describe. Raises ArtifactError, OptionError."""
    parts.require("unet", addition_embed_type=("text_time",))
    encoder = text.clip(parts, "text_encoder", HIDDEN)
    encoder_2 = text.clip(parts, "text_encoder_2", HIDDEN, pooled=True)
    _, length, width = encoder.outputs[0].shape
    _, _, width_2 = encoder_2.outputs[0].shape
    unet = stable_diffusion.describe_unet(
        parts,
        (length, int(width) + int(width_2)),
        tensor("text_embeds", *encoder_2.outputs[1].shape[1:]),
        tensor("time_ids", 6),
    )
    return latents.model(
        parts,
        "stable_diffusion_xl",
        {"text_encoder": encoder, "text_encoder_2": encoder_2},
        ("unet", unet),
        parts.size("unet"),
        num_inference_steps=50,
        guidance_scale=5.0,
        strength=0.9999 if "mask" in unet.input_names else 0.3,
        zero_empty_prompt=parts.index.get("force_zeros_for_empty_prompt", True) is True,
    )


def prepare(components: Components, request: Resolved) -> Row:
    """Encoded texts, the seed's start noise or a noised image, and the sampler's trajectory."""
    size = (request.height, request.width)

    def condition(prompt: str | None) -> Feed:
        first = components.encode_text("text_encoder", prompt or "")
        second = components.encode_text("text_encoder_2", prompt or "")
        states = np.concatenate([first[HIDDEN], second[HIDDEN]], axis=-1)
        used = 0 if prompt is None and components.model.zero_empty_prompt else 1
        return {
            "encoder_hidden_states": states * np.float32(used),
            "text_embeds": second["pooled"] * np.float32(used),
            "time_ids": np.array([*size, 0, 0, *size], np.float32),  # original, crop, target
            **stable_diffusion.embedded_guidance(components, request.guidance_scale),
        }

    return latents.start(components, request, condition)

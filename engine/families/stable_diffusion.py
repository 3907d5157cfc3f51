"""Stable Diffusion 1 and 2, their inpainting models, and LCM: CLIP text, a U-Net over latents."""

import numpy as np

from engine.families import latents, text
from engine.families.components import Array, Components
from engine.families.parts import Parts, scaled, tensor
from engine.manifest import ModelSpec, NetworkSpec, TensorSpec
from engine.request import Resolved
from engine.row import Feed, Row

COMPONENTS: dict[str, tuple[str | None, ...]] = {
    "unet": ("UNet2DConditionModel",),
    "vae": latents.VAES,
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": text.CLIP_TOKENIZERS,
}


def describe(parts: Parts) -> ModelSpec:
    """The model that a checkpoint's JSON files describe. Raises ArtifactError, OptionError."""
    parts.require("unet", addition_embed_type=(None,))
    encoder = text.clip(parts, "text_encoder", "last_hidden_state")
    unet = describe_unet(parts, encoder.outputs[0].shape[1:])
    few_steps = "timestep_cond" in unet.input_names
    return latents.model(
        parts,
        "stable_diffusion",
        {"text_encoder": encoder},
        ("unet", unet),
        parts.size("unet"),
        num_inference_steps=4 if few_steps else 50,
        guidance_scale=8.5 if few_steps else 7.5,
        strength=1.0 if "mask" in unet.input_names else 0.8,
        # as diffusers' StableDiffusionPipeline corrects old configs; LCM's pipeline does not
        scheduler_changes=None if few_steps else {"steps_offset": 1},
    )


def describe_unet(parts: Parts, hidden: tuple[int | str, ...], *added: TensorSpec) -> NetworkSpec:
    """The U-Net of Stable Diffusion 1, 2 and XL; 2 C + 1 input channels are those of inpainting."""
    channels = parts.whole("unet", "out_channels")
    parts.require(
        "unet",
        class_embed_type=(None,),
        num_class_embeds=(None,),
        encoder_hid_dim_type=(None,),
        in_channels=(channels, 2 * channels + 1),
    )
    factor = 2 ** (parts.length("unet", "block_out_channels") - 1)
    size = scaled(factor, "height"), scaled(factor, "width")
    inputs = [
        tensor("sample", channels, *size),
        tensor("timestep"),
        tensor("encoder_hidden_states", *hidden),
    ]
    if parts.whole("unet", "in_channels") != channels:
        inputs += [tensor("mask", 1, *size), tensor("masked_image", channels, *size)]
    if parts.configs["unet"].get("time_cond_proj_dim") is not None:
        inputs.append(tensor("timestep_cond", parts.whole("unet", "time_cond_proj_dim")))
    return NetworkSpec(inputs=(*inputs, *added), outputs=(tensor("prediction", channels, *size),))


def prepare(components: Components, request: Resolved) -> Row:
    """Encoded texts, the seed's start noise or a noised image, and the sampler's trajectory."""

    def condition(prompt: str | None) -> Feed:
        encoded = components.encode_text("text_encoder", prompt or "")
        return {
            "encoder_hidden_states": encoded["last_hidden_state"],
            **embedded_guidance(components, request.guidance_scale),
        }

    return latents.start(components, request, condition)


def embedded_guidance(components: Components, guidance_scale: float) -> Feed:
    """`timestep_cond` [E] of LCM: sines and cosines of 1000 (w - 1).

    Nothing for the other networks. Source: https://arxiv.org/abs/2310.04378, section 4.3.
    """
    unet = components.model.networks["unet"]
    if "timestep_cond" not in unet.input_names:
        return {}
    (_, width) = unet.input("timestep_cond").shape
    half = int(width) // 2
    spacing = np.float32(-np.log(10000.0) / (half - 1))
    angles = np.float32(1000 * (guidance_scale - 1)) * np.exp(
        np.arange(half, dtype=np.float32) * spacing
    )
    embedding: Array = np.concatenate([np.sin(angles), np.cos(angles)])
    return {"timestep_cond": np.pad(embedding, (0, int(width) % 2))}

"""Stable Diffusion 3: two CLIP encoders, T5 where it is there, a transformer, flow matching."""

import numpy as np

from engine.families import latents, text
from engine.families.components import Components
from engine.families.parts import Parts, scaled, tensor
from engine.manifest import ModelSpec, NetworkSpec
from engine.request import Resolved
from engine.row import Feed, Row

COMPONENTS: dict[str, tuple[str | None, ...]] = {
    "transformer": ("SD3Transformer2DModel",),
    "vae": latents.VAES,
    "text_encoder": ("CLIPTextModelWithProjection",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "text_encoder_3": ("T5EncoderModel", None),
    "tokenizer": text.CLIP_TOKENIZERS,
    "tokenizer_2": text.CLIP_TOKENIZERS,
    "tokenizer_3": (*text.T5_TOKENIZERS, None),
}
HIDDEN = "penultimate_hidden_state"
T5_TOKENS = 256


def describe(parts: Parts) -> ModelSpec:
    """The model that a checkpoint's JSON files describe. Raises ArtifactError, OptionError."""
    encoders = {
        name: text.clip(parts, name, HIDDEN, pooled=True)
        for name in ("text_encoder", "text_encoder_2")
    }
    if "text_encoder_3" in parts.configs:
        encoders["text_encoder_3"] = text.t5(parts, "text_encoder_3", T5_TOKENS)
    channels, patch = (parts.whole("transformer", key) for key in ("in_channels", "patch_size"))
    size = scaled(patch, "height"), scaled(patch, "width")
    tokens = int(encoders["text_encoder"].outputs[0].shape[1]) + T5_TOKENS
    width = parts.whole("transformer", "joint_attention_dim")
    transformer = NetworkSpec(
        inputs=(
            tensor("sample", channels, *size),
            tensor("timestep"),
            tensor("encoder_hidden_states", tokens, width),
            tensor("pooled_projections", parts.whole("transformer", "pooled_projection_dim")),
        ),
        outputs=(tensor("prediction", channels, *size),),
    )
    return latents.model(
        parts,
        "stable_diffusion_3",
        encoders,
        ("transformer", transformer),
        parts.size("transformer"),
        num_inference_steps=28,
        guidance_scale=7.0,
        strength=0.6,
        largest=parts.whole("transformer", "pos_embed_max_size") * patch,
    )


def prepare(components: Components, request: Resolved) -> Row:
    """Encoded texts, the seed's start noise or a noised image, and the sampler's trajectory."""

    def condition(prompt: str | None) -> Feed:
        return _condition(components, prompt or "")

    return latents.start(components, request, condition)


def _condition(components: Components, prompt: str) -> Feed:
    """CLIP's states side by side, padded to T5's width, then T5's (zeros where it is missing)."""
    networks = components.model.networks
    first, second = (
        components.encode_text(name, prompt) for name in ("text_encoder", "text_encoder_2")
    )
    _, tokens, width = networks["transformer"].input("encoder_hidden_states").shape
    states = np.zeros((int(tokens), int(width)), np.float32)
    clip = np.concatenate([first[HIDDEN], second[HIDDEN]], axis=-1)
    states[: clip.shape[0], : clip.shape[1]] = clip
    if "text_encoder_3" in networks:
        states[len(clip) :] = components.encode_text("text_encoder_3", prompt)["last_hidden_state"]
    return {
        "encoder_hidden_states": states,
        "pooled_projections": np.concatenate([first["pooled"], second["pooled"]]),
    }

"""Flux: CLIP for the pooled text, T5 for its tokens, a transformer, flow matching."""

import numpy as np

from engine.families import latents, text
from engine.families.components import Components
from engine.families.parts import Parts, tensor
from engine.manifest import ModelSpec, NetworkSpec
from engine.request import Resolved
from engine.row import Feed, Row

COMPONENTS: dict[str, tuple[str | None, ...]] = {
    "transformer": ("FluxTransformer2DModel",),
    "vae": latents.VAES,
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("T5EncoderModel",),
    "tokenizer": text.CLIP_TOKENIZERS,
    "tokenizer_2": text.T5_TOKENIZERS,
}
T5_TOKENS = 512
PATCH = 2  # latents that the transformer takes as one token, along each axis
DEFAULT_LATENTS = 128  # of each side: the config of a Flux transformer names no size


def describe(parts: Parts) -> ModelSpec:
    """The model that a checkpoint's JSON files describe. Raises ArtifactError, OptionError."""
    encoder = text.clip(parts, "text_encoder", hidden="", pooled=True)
    encoder_2 = text.t5(parts, "text_encoder_2", T5_TOKENS)
    channels = parts.whole("transformer", "in_channels") // PATCH**2
    size = f"{PATCH}*height", f"{PATCH}*width"
    inputs = [
        tensor("sample", channels, *size),
        tensor("timestep"),
        tensor("encoder_hidden_states", *encoder_2.outputs[0].shape[1:]),
        tensor("pooled_projections", *encoder.outputs[0].shape[1:]),
    ]
    guided = parts.configs["transformer"].get("guidance_embeds") is True
    if guided:
        inputs.append(tensor("guidance"))
    return latents.model(
        parts,
        "flux",
        {"text_encoder": encoder, "text_encoder_2": encoder_2},
        (
            "transformer",
            NetworkSpec(inputs=tuple(inputs), outputs=(tensor("prediction", channels, *size),)),
        ),
        (DEFAULT_LATENTS, DEFAULT_LATENTS),
        num_inference_steps=28 if guided else 4,
        guidance_scale=3.5 if guided else 1.0,
        strength=0.6,
    )


def prepare(components: Components, request: Resolved) -> Row:
    """Encoded texts, the seed's start noise or a noised image, and the sampler's trajectory.

    `guidance_scale` is an input of a network that was distilled with it; for the others (schnell)
    it is classifier-free guidance, diffusers' `true_cfg_scale`.
    """
    embedded = components.model.guidance == "embedded"
    guidance: Feed = {"guidance": np.array(request.guidance_scale, np.float32)}

    def condition(prompt: str | None) -> Feed:
        long = components.encode_text("text_encoder_2", prompt or "")
        return {
            "encoder_hidden_states": long["last_hidden_state"],
            "pooled_projections": components.encode_text("text_encoder", prompt or "")["pooled"],
            **(guidance if embedded else {}),
        }

    return latents.start(components, request, condition, sigmas="linear")

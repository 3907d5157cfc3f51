"""PixArt alpha and sigma: T5 text, a transformer over latents."""

import numpy as np

from engine.families import latents, text
from engine.families.components import Components
from engine.families.parts import Parts, scaled, tensor
from engine.manifest import ModelSpec, NetworkSpec
from engine.request import Resolved
from engine.row import Feed, Row

COMPONENTS: dict[str, tuple[str | None, ...]] = {
    "transformer": ("PixArtTransformer2DModel", "Transformer2DModel"),  # its older name
    "vae": latents.VAES,
    "text_encoder": ("T5EncoderModel",),
    "tokenizer": text.T5_TOKENIZERS,
}
TOKENS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}


def describe(parts: Parts) -> ModelSpec:
    """The model that a checkpoint's JSON files describe. Raises ArtifactError, OptionError."""
    parts.require("transformer", norm_type=("ada_norm_single", None))
    tokens = TOKENS[str(parts.index["_class_name"])]
    encoder = text.t5(parts, "text_encoder", tokens, masked=True)
    channels, patch = (parts.whole("transformer", key) for key in ("in_channels", "patch_size"))
    size = scaled(patch, "height"), scaled(patch, "width")
    inputs = [
        tensor("sample", channels, *size),
        tensor("timestep"),
        tensor("encoder_hidden_states", *encoder.outputs[0].shape[1:]),
        tensor("encoder_attention_mask", tokens),
    ]
    if _has_size_conditions(parts):
        inputs += [tensor("resolution", 2), tensor("aspect_ratio", 1)]
    transformer = NetworkSpec(
        inputs=tuple(inputs), outputs=(tensor("prediction", channels, *size),)
    )
    return latents.model(
        parts,
        "pixart",
        {"text_encoder": encoder},
        ("transformer", transformer),
        parts.size("transformer"),
        num_inference_steps=20,
        guidance_scale=4.5,
        strength=0.8,
    )


def _has_size_conditions(parts: Parts) -> bool:
    """As the transformer decides where its config does not say: those of 1024 pixels have them."""
    given = parts.configs["transformer"].get("use_additional_conditions")
    return parts.size("transformer") == (128, 128) if given is None else given is True


def prepare(components: Components, request: Resolved) -> Row:
    """Encoded texts, the seed's start noise or a noised image, and the sampler's trajectory.

    Texts become lower case without blanks at their ends, as this model's captions were.
    """
    sized = "resolution" in components.model.networks["transformer"].input_names
    size = {
        "resolution": np.array([request.height, request.width], np.float32),
        "aspect_ratio": np.array([request.height / request.width], np.float32),
    }

    def condition(prompt: str | None) -> Feed:
        encoded = components.encode_text("text_encoder", (prompt or "").lower().strip())
        return {
            "encoder_hidden_states": encoded["last_hidden_state"],
            "encoder_attention_mask": encoded["attention_mask"],
            **(size if sized else {}),
        }

    return latents.start(components, request, condition)

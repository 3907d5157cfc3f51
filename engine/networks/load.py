"""The networks of a checkpoint folder as modules, loaded strictly."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from engine.checkpoint import VAE_NETWORKS, component_class
from engine.errors import ArtifactError
from engine.manifest import NetworkSpec, TypedPrecision
from engine.networks import autoencoders, denoisers, gan, text_encoders
from engine.networks.network import Network
from engine.weights import weight_variant

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

RENAMED = {"Transformer2DModel": "PixArtTransformer2DModel"}  # as older PixArt checkpoints say

# what diffusers raises for a config whose values do not fit each other is not documented
LOAD_ERRORS = (
    SafetensorError, OSError, RuntimeError, TypeError, ValueError, ArithmeticError, LookupError,
)  # fmt: skip


def load_network(
    checkpoint: Path, name: str, spec: NetworkSpec, precision: TypedPrecision = "fp32"
) -> Network:
    """A network of a checkpoint that `read_checkpoint` accepted, ready for inference.

    Raises ArtifactError for weights that are damaged or do not fit the config.
    """
    component = "vae" if name in VAE_NETWORKS else name
    class_name = component_class(checkpoint, component)
    class_name = RENAMED.get(class_name, class_name)
    module = _load_module(checkpoint / component, class_name, DTYPES[precision])
    return _wrapper(name, class_name)(module, spec).eval().requires_grad_(False)


def _wrapper(name: str, class_name: str) -> type[Network]:
    match name, class_name:
        case "vae_encoder", _:
            return autoencoders.Encoder
        case "vae_decoder", _:
            return autoencoders.Decoder
        case _, "CLIPTextModel" | "CLIPTextModelWithProjection":
            return text_encoders.CLIPText
        case _, "T5EncoderModel":
            return text_encoders.T5Text
        case _, "UNet2DModel":
            return denoisers.UNet2D
        case _, "UNet2DConditionModel":
            return denoisers.UNet2DCondition
        case _, "PixArtTransformer2DModel":
            return denoisers.PixArt
        case _, "SD3Transformer2DModel":
            return denoisers.StableDiffusion3
        case _, "FluxTransformer2DModel":
            return denoisers.Flux
        case _, "Generator":
            return denoisers.Generator
    raise ArtifactError(f"{name} of class {class_name} is not known")


def _load_module(folder: Path, class_name: str, dtype: torch.dtype) -> nn.Module:
    """The module itself; every weight must be there, be used and have the config's shape."""
    options: dict[str, object] = {
        "use_safetensors": True,
        "local_files_only": True,
        "output_loading_info": True,
        "variant": weight_variant(folder),
    }
    if hasattr(transformers, class_name):
        # the fused attention of T5 does not export; eager is what diffusers' results agree with
        architecture, dtype_option = getattr(transformers, class_name), "dtype"
        options["attn_implementation"] = "eager"
        options["ignore_mismatched_sizes"] = True  # they are named below instead
    else:
        architecture = (
            gan.Generator if class_name == "Generator" else getattr(diffusers, class_name)
        )
        dtype_option = "torch_dtype"
    try:
        with quiet():
            module, info = architecture.from_pretrained(folder, **options, **{dtype_option: dtype})
    except LOAD_ERRORS as error:
        reason = " ".join(str(error).split("\n\t")[:2])  # torch lists every tensor that differs
        reason = reason.partition(" If you want to")[0]  # advice on arguments that nobody here has
        raise ArtifactError(f"'{folder}' does not load: {reason}") from None
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if found := sorted(_key(entry) for entry in info[problem]):
            what = problem.replace("_keys", "")
            raise ArtifactError(
                f"'{folder}' does not load: {len(found)} {what} weights, the first is {found[0]}"
            )
    assert isinstance(module, nn.Module)
    return module


def _key(entry: str | tuple[str, torch.Size, torch.Size]) -> str:
    """A weight's name; where it is mismatched, with its shape and the config's."""
    if isinstance(entry, str):
        return entry
    name, found, expected = entry
    return f"{name} of shape {list(found)}, which the config says is {list(expected)}"


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and warnings of diffusers and transformers."""
    loggers = (diffusers.utils.logging, transformers.utils.logging)
    levels = [logger.get_verbosity() for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
        logger.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.set_verbosity(level)
            logger.enable_progress_bar()

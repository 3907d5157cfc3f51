"""LoRA weights fused into a checkpoint, as diffusers fuses them."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import diffusers
from safetensors import SafetensorError, safe_open
from torch import nn

from engine.checkpoint import IGNORED, read_checkpoint
from engine.errors import ArtifactError
from engine.manifest import Lora
from engine.networks.load import LOAD_ERRORS, quiet
from engine.weights import weight_variant

# the ends of the names of a layer's two matrices, as peft, diffusers and kohya's trainer write them
_HALVES = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_down.weight", ".lora_up.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
)


@contextmanager
def fused(checkpoint: Path, loras: Sequence[Lora]) -> Iterator[Path]:
    """A checkpoint folder with the weights of `loras` added to those of `checkpoint`.

    It is `checkpoint` itself where there are none, else a temporary folder. Raises ArtifactError
    for weights that are damaged or fit no network of the checkpoint.
    """
    if not loras:
        yield checkpoint
        return
    read_checkpoint(checkpoint)  # our refusals before diffusers' own
    with tempfile.TemporaryDirectory(prefix="vitrine-lora-") as name:
        with quiet():
            pipeline = _load(checkpoint)
            for number, lora in enumerate(loras):
                _fuse(pipeline, lora, f"lora{number}")
            _save(pipeline, Path(name))
        yield Path(name)


def _load(checkpoint: Path) -> diffusers.DiffusionPipeline:
    folders = [path for path in sorted(checkpoint.iterdir()) if (path / "config.json").is_file()]
    variants = {weight_variant(path) for path in folders if path.name not in IGNORED}
    try:
        return diffusers.DiffusionPipeline.from_pretrained(
            checkpoint,
            local_files_only=True,
            use_safetensors=True,
            variant=next(iter(variants - {None}), None),
            safety_checker=None,
        )
    except LOAD_ERRORS as error:
        raise ArtifactError(
            f"'{checkpoint}' does not load as a pipeline: {_brief(error)}"
        ) from None


def _save(pipeline: diffusers.DiffusionPipeline, folder: Path) -> None:
    try:
        pipeline.save_pretrained(folder, safe_serialization=True)
    except SafetensorError as error:  # no space left, say
        raise ArtifactError(f"the fused weights cannot be written to '{folder}': {error}") from None


def _fuse(pipeline: diffusers.DiffusionPipeline, lora: Lora, adapter: str) -> None:
    path = Path(lora.path)
    if not hasattr(pipeline, "load_lora_weights"):
        raise ArtifactError(f"a {type(pipeline).__name__} takes no LoRA weights, got '{path}'")
    try:
        layers = _layers(path)
        pipeline.load_lora_weights(
            path.parent, weight_name=path.name, adapter_name=adapter, use_safetensors=True
        )
        loaded = _loaded(pipeline, adapter)
        if loaded < layers:  # diffusers leaves the rest out
            raise ArtifactError(
                f"'{path}' has LoRA weights for {layers} layers, and the checkpoint has only "
                f"{loaded} of them"
            )
        pipeline.fuse_lora(adapter_names=[adapter], lora_scale=lora.scale)
        pipeline.unload_lora_weights()
    except LOAD_ERRORS as error:
        raise ArtifactError(f"'{path}' does not load as LoRA weights: {_brief(error)}") from None


def _layers(path: Path) -> int:
    """How many layers LoRA weights are for, each with both of its matrices.

    Raises ArtifactError where one is missing: peft would start it anew, from random numbers.
    """
    with safe_open(path, "np") as file:
        names = set(file.keys())
    halves = {name for name in names for half in _HALVES for end in half if name.endswith(end)}
    for name in sorted(halves):
        for down, up in _HALVES:
            for one, other in ((down, up), (up, down)):
                partner = name.removesuffix(one) + other
                if name.endswith(one) and partner not in names:
                    raise ArtifactError(f"'{path}' has {name} without {partner}")
    return len(halves) // 2


def _loaded(pipeline: diffusers.DiffusionPipeline, adapter: str) -> int:
    """How many layers of a pipeline have an adapter of that name."""
    networks = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    layers = (layer for network in networks for layer in network.modules())
    return sum(adapter in getattr(layer, "lora_A", ()) for layer in layers)


def _brief(error: Exception) -> str:
    """The reason in one line; torch lists every tensor, and transformers points to its log."""
    text = " ".join(str(error).split("\n\t")[:2])
    if "ignore_mismatched_sizes" in text:
        return "their shapes do not fit the checkpoint's layers"
    return text

"""The weight files of a component: which there are; safetensors only, whole or in shards."""

from pathlib import Path

from engine.errors import ArtifactError
from engine.json_files import read_json

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def weight_variant(folder: Path) -> str | None:
    """The variant (`fp16`, say) that a component's weights have in their file names, or none."""
    return _weights(folder)[0]


def weight_files(folder: Path) -> tuple[str, ...]:
    """The safetensors files of a component, and their index where there are several.

    Raises ArtifactError where there are none, where there are only pickles, or where a part is
    missing.
    """
    return _weights(folder)[1]


def _weights(folder: Path) -> tuple[str | None, tuple[str, ...]]:
    for variant in (None, "fp16", "bf16"):
        infix = f".{variant}" if variant else ""
        for stem in ("diffusion_pytorch_model", "model"):
            if (folder / f"{stem}{infix}.safetensors").is_file():
                return variant, (f"{stem}{infix}.safetensors",)
            index = folder / f"{stem}.safetensors.index{infix}.json"
            if index.is_file():
                return variant, (index.name, *_shards(index))
    pickles = [path.name for pattern in _PICKLES for path in folder.glob(pattern)]
    if pickles:
        raise ArtifactError(
            f"'{folder / pickles[0]}' is a pickle, which can run code and is refused; "
            "save the checkpoint with safe_serialization=True"
        )
    raise ArtifactError(f"'{folder.parent}' has no weights (*.safetensors) in {folder.name}")


def _shards(index: Path) -> tuple[str, ...]:
    places = read_json(index, index.parent).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ArtifactError(f"'{index}' has no weight_map")
    names = sorted({str(name) for name in places.values()})
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise ArtifactError(f"'{index.parent}' has no {name}, which {index.name} names")
    return tuple(names)

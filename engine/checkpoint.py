"""Checkpoints: folders in the diffusers layout - what is in one, its hash, how one is written."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from engine.errors import ArtifactError
from engine.families import class_unet, gan
from engine.manifest import ModelSpec
from engine.options import describe

if TYPE_CHECKING:
    from diffusers.configuration_utils import ConfigMixin
    from diffusers.models.modeling_utils import ModelMixin

WEIGHTS = "diffusion_pytorch_model.safetensors"
KNOWN_NETWORKS = {"UNet2DModel": class_unet.NETWORK, "Generator": gan.NETWORK}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder that was found whole, and the model that it holds."""

    path: Path
    model: ModelSpec
    files: tuple[str, ...]  # relative, sorted: everything that belongs to the checkpoint

    def sha256(self) -> str:
        """One hash over the names and contents of all files."""
        digest = hashlib.sha256()
        for name in self.files:
            digest.update(f"{name}\0{file_sha256(self.path / name)}\n".encode())
        return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_checkpoint(folder: Path) -> Checkpoint:
    """Look into a checkpoint without loading a weight.

    Raises ArtifactError for a missing or damaged file, a pickle weight file or an architecture
    that is not known; OptionError for a scheduler option that we do not honour.
    """
    if not (folder / "model_index.json").exists() and (folder / "manifest.json").is_file():
        raise ArtifactError(f"'{folder}' is an artifact already; a checkpoint has model_index.json")
    index = read_json(folder / "model_index.json", folder)
    networks = {
        name: str(entry[-1])
        for name, entry in index.items()
        if isinstance(entry, list) and entry and name != "scheduler"
    }
    for name, class_name in networks.items():
        if KNOWN_NETWORKS.get(class_name) != name:
            raise ArtifactError(
                f"checkpoint '{folder}' has {name} of class {class_name}, which is not known; "
                f"known are {', '.join(f'{n} of class {c}' for c, n in KNOWN_NETWORKS.items())}"
            )
    if len(networks) != 1:
        raise ArtifactError(
            f"checkpoint '{folder}' must have one network, got {sorted(networks) or 'none'}"
        )
    (name,) = networks
    configs = {name: read_json(folder / name / "config.json", folder)}
    _require_safetensors(folder, name)
    files = ["model_index.json", "labels.json", f"{name}/config.json", f"{name}/{WEIGHTS}"]
    labels = _read_labels(folder)
    if name == gan.NETWORK:
        with _naming(folder / name / "config.json"):
            model = gan.describe(configs, labels)
        return Checkpoint(folder, model, tuple(sorted(files)))
    scheduler_file = "scheduler/scheduler_config.json"
    scheduler = read_json(folder / scheduler_file, folder)
    with _naming(folder / name / "config.json"):
        model = class_unet.describe(configs, scheduler, labels)
    return Checkpoint(folder, model, tuple(sorted([*files, scheduler_file])))


@contextmanager
def _naming(config: Path) -> Iterator[None]:
    """Raises ArtifactError with the file's name where it lacks a key or has an impossible value."""
    try:
        yield
    except KeyError as error:
        raise ArtifactError(f"'{config}' has no {error.args[0]}") from None
    except ValidationError as error:
        raise ArtifactError(f"'{config}': {describe(ModelSpec, error.errors()[0])}") from None
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"'{config}': {error}") from None


def read_json(path: Path, folder: Path) -> dict[str, object]:
    """A JSON object of a checkpoint or artifact `folder`. Raises ArtifactError."""
    try:
        values = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        missing = path.relative_to(folder)
        what = "does not exist" if not folder.is_dir() else f"has no {missing}"
        raise ArtifactError(f"'{folder}' {what}") from None
    except (ValueError, OSError) as error:
        raise ArtifactError(f"'{path}' is not readable JSON: {error}") from None
    if not isinstance(values, dict):
        raise ArtifactError(f"'{path}' must hold a JSON object, got {type(values).__name__}")
    return values


def _read_labels(folder: Path) -> tuple[str, ...]:
    labels = read_json(folder / "labels.json", folder).get("labels")
    if not isinstance(labels, list) or not labels or not all(isinstance(x, str) for x in labels):
        raise ArtifactError(f"'{folder / 'labels.json'}' must hold a list of class names, labels")
    if len(set(labels)) < len(labels):
        raise ArtifactError(f"'{folder / 'labels.json'}' must not name a label twice, got {labels}")
    return tuple(labels)


def _require_safetensors(folder: Path, network: str) -> None:
    if (folder / network / WEIGHTS).is_file():
        return
    pickles = [path.name for pattern in _PICKLES for path in (folder / network).glob(pattern)]
    if pickles:
        raise ArtifactError(
            f"'{folder / network / pickles[0]}' is a pickle, which can run code and is refused; "
            "save the checkpoint with safe_serialization=True"
        )
    raise ArtifactError(f"'{folder}' has no {network}/{WEIGHTS}")


def save_checkpoint(
    folder: Path,
    pipeline_class: str,
    networks: Mapping[str, "ModelMixin"],
    labels: tuple[str, ...],
    scheduler: "ConfigMixin | None" = None,
) -> None:
    """Write networks, scheduler, labels and `model_index.json`; each file is replaced whole."""
    import diffusers

    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, object] = {
        "_class_name": pipeline_class,
        "_diffusers_version": diffusers.__version__,
    }
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as partial_name:
        partial = Path(partial_name)
        for name, network in networks.items():
            network.save_pretrained(partial / name, safe_serialization=True)
            index[name] = [_library(network), type(network).__name__]
        if scheduler is not None:
            scheduler.save_pretrained(partial / "scheduler")
            index["scheduler"] = [_library(scheduler), type(scheduler).__name__]
        write_json(partial / "labels.json", {"labels": labels})
        write_json(partial / "model_index.json", index)
        for source in sorted(path for path in partial.rglob("*") if path.is_file()):
            target = folder / source.relative_to(partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            source.chmod(0o644)  # safetensors writes 0600
            os.replace(source, target)


def write_json(path: Path, values: Mapping[str, object]) -> None:
    """Write an indented JSON object."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _library(component: object) -> str:
    module = type(component).__module__
    return "diffusers" if module.startswith("diffusers.") else module

"""Checkpoints: folders in the diffusers layout - what is in one, its hash, how one is written."""

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from engine.errors import ArtifactError
from engine.families.known import FAMILIES, PIPELINES, FamilyModule
from engine.families.parts import Parts
from engine.json_files import read_json, write_json
from engine.manifest import ModelSpec
from engine.options import describe
from engine.weights import weight_files

if TYPE_CHECKING:
    from diffusers.configuration_utils import ConfigMixin
    from diffusers.models.modeling_utils import ModelMixin

VAE_NETWORKS = ("vae_encoder", "vae_decoder")  # two networks of one component
# Components that a pipeline may have and that make no difference to the picture.
IGNORED = ("safety_checker", "feature_extractor", "watermark")
_SCHEDULER = "scheduler/scheduler_config.json"
_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))


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
    family = _family(folder, index)
    classes = _components(folder, index, family)
    parts = Parts(
        index=index,
        configs={name: read_json(folder / _config(name), folder) for name in classes},
        scheduler=_read_scheduler(folder, index),
        labels=_read_labels(folder),
    )
    files = {"model_index.json"}
    if parts.labels:
        files.add("labels.json")
    if parts.scheduler:
        files.add(_SCHEDULER)
    for name in classes:
        files |= _files(folder, name)
    with _naming(folder, [_config(name) for name in classes]):
        for name in classes:
            parts.require(name, quantization_config=(None,))
        model: ModelSpec = family.describe(parts)
    return Checkpoint(folder, model, tuple(sorted(files)))


def _family(folder: Path, index: Mapping[str, object]) -> FamilyModule:
    if "_class_name" not in index:
        raise ArtifactError(f"'{folder / 'model_index.json'}' has no _class_name")
    pipeline = str(index["_class_name"])
    if pipeline not in PIPELINES:
        raise ArtifactError(
            f"checkpoint '{folder}' is a {pipeline}, which is not known; "
            f"known are {', '.join(PIPELINES)}"
        )
    return FAMILIES[PIPELINES[pipeline]]


def _components(folder: Path, index: Mapping[str, object], family: FamilyModule) -> dict[str, str]:
    """Class by component, in the family's order; all that it needs and nothing unknown."""
    classes = {
        name: str(entry[-1])
        for name, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and entry[-1] is not None
    }
    known = family.COMPONENTS
    for name, class_name in classes.items():
        if name not in known and name not in (*IGNORED, "scheduler"):
            raise ArtifactError(
                f"checkpoint '{folder}' has {name} of class {class_name}, which a "
                f"{index['_class_name']} has no use for here; known are {', '.join(known)}"
            )
        if name in known and class_name not in known[name]:
            choices = ", ".join(choice for choice in known[name] if choice)
            raise ArtifactError(
                f"checkpoint '{folder}' has {name} of class {class_name}, which is not known; "
                f"known for {name}: {choices}"
            )
    for name in known:
        if name not in classes and None not in known[name]:
            raise ArtifactError(f"checkpoint '{folder}': model_index.json names no {name}")
    return {name: classes[name] for name in known if name in classes}


def component_class(folder: Path, component: str) -> str:
    """The class name of a component of a checkpoint that `read_checkpoint` accepted."""
    entry = read_json(folder / "model_index.json", folder)[component]
    assert isinstance(entry, list)
    return str(entry[-1])


def _config(component: str) -> str:
    is_tokenizer = component.startswith("tokenizer")
    return f"{component}/{'tokenizer_config' if is_tokenizer else 'config'}.json"


def _files(folder: Path, component: str) -> set[str]:
    """Everything of a component that its pictures depend on. Raises ArtifactError."""
    if component.startswith("tokenizer"):
        return {f"{component}/{name}" for name in _tokenizer_files(folder / component)}
    return {
        _config(component),
        *(f"{component}/{name}" for name in weight_files(folder / component)),
    }


def _tokenizer_files(folder: Path) -> set[str]:
    """Its files; transformers would make an empty vocabulary where there is none."""
    names = {path.name for path in folder.iterdir() if path.is_file()}
    if not any(names.issuperset(vocabulary) for vocabulary in _VOCABULARIES):
        choices = ", or ".join(" and ".join(vocabulary) for vocabulary in _VOCABULARIES)
        raise ArtifactError(f"'{folder}' has no vocabulary; it must have {choices}")
    return names


def _read_scheduler(folder: Path, index: Mapping[str, object]) -> dict[str, object]:
    """The scheduler's config, nothing without one; its class is the index's, as for diffusers."""
    match index.get("scheduler"):
        case [_, str(class_name)]:
            return {**read_json(folder / _SCHEDULER, folder), "_class_name": class_name}
    return {}


@contextmanager
def _naming(folder: Path, configs: list[str]) -> Iterator[None]:
    """Raises ArtifactError with the checkpoint's name, and the config's where only one can be it.

    A config may lack a key or have an impossible value.
    """
    where = f"'{folder / configs[0]}'" if len(configs) == 1 else f"checkpoint '{folder}'"
    try:
        yield
    except KeyError as error:
        raise ArtifactError(f"{where} has no {error.args[0]}") from None
    except ArtifactError as error:
        raise ArtifactError(f"checkpoint '{folder}': {error}") from None
    except ValidationError as error:
        raise ArtifactError(f"{where}: {describe(ModelSpec, error.errors()[0])}") from None
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{where}: {error}") from None


def _read_labels(folder: Path) -> tuple[str, ...]:
    """The class names of a checkpoint; nothing without a `labels.json`. Raises ArtifactError."""
    path = folder / "labels.json"
    if not path.exists():
        return ()
    labels = read_json(path, folder).get("labels")
    if not isinstance(labels, list) or not labels or not all(isinstance(x, str) for x in labels):
        raise ArtifactError(f"'{path}' must hold a list of class names, labels")
    if len(set(labels)) < len(labels):
        raise ArtifactError(f"'{path}' must not name a label twice, got {labels}")
    return tuple(labels)


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


def _library(component: object) -> str:
    module = type(component).__module__
    return "diffusers" if module.startswith("diffusers.") else module

"""Artifacts to a Triton model repository: verified, self-contained, written whole or not at all."""

import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from engine.artifact import (
    Artifact,
    is_artifact,
    read_artifact,
    replace_folder,
    write_manifest,
)
from engine.errors import ArtifactError, OptionError, RuntimeUnavailableError
from engine.manifest import Manifest, ModelSpec
from engine.pipeline import DEFAULT_MAX_ROWS

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

CONFIG = "config.pbtxt"
VERSION = "1"
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # goes into URLs and command lines
ARTIFACT = "artifact"

# Rows of one tick, and the rows that take turns in ticks; all others wait in Triton's queue. Every
# row handed in costs Triton about 0.1 ms a tick, so more than the network gains from is a loss.
MAX_ROWS = 2 * DEFAULT_MAX_ROWS
# How long a tick that is not full waits for more rows. Diffusion: for rows on their way back from
# the last tick, or two half-full cohorts alternate.
QUEUE_DELAY_US = 1000
# GAN: for other requests. 32 at once from one client, three times, on two cores: without a delay
# 1.6 to 16 rows a tick, with 2 ms 8 to 16, with 5 ms 16 to 32; a lone request waits so much longer.
GAN_QUEUE_DELAY_US = 2000
# Triton ends a sequence that was silent for so long. Ours are silent during a network call, and
# are ended by us alone: an hour.
MAX_IDLE_US = 3_600_000_000

_MODEL_PY = '''\
"""The model that Triton's python backend loads; all of it is in Vitrine's serving package."""

from serving.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def write_repository(artifacts: Sequence[Path], folder: Path) -> Path:
    """Write `<folder>/<artifact's name>/{config.pbtxt, 1/model.py, 1/artifact/}` for each.

    Every artifact is verified first; an older repository at `folder` is replaced, anything else is
    refused. Raises ArtifactError, OptionError, QualityError, RuntimeUnavailableError.
    """
    verified = [read_artifact(path) for path in artifacts]
    _require_distinct_names(verified)
    for artifact in verified:
        artifact.variant()  # not one that fell short of a check
        _require_servable(artifact)
    with _new_repository(folder) as partial:
        for artifact in verified:
            _write_model(artifact, partial / artifact.name)
    return folder


def repository_models(folder: Path) -> dict[str, ModelSpec]:
    """The models of a repository that `write_repository` wrote. Raises ArtifactError."""
    configs = sorted(folder.glob(f"*/{CONFIG}"))
    if not configs:
        raise ArtifactError(f"'{folder}' has no model of Vitrine; write it with: vitrine serve")
    return {
        path.parent.name: read_artifact(path.parent / VERSION / ARTIFACT).manifest.model
        for path in configs
    }


def _require_distinct_names(artifacts: Sequence[Artifact]) -> None:
    if not artifacts:
        raise OptionError("there must be at least one artifact to serve")
    for artifact in artifacts:
        if not _MODEL_NAME.fullmatch(artifact.name):
            raise OptionError(
                "the folder of an artifact names its model: letters, digits, '.', '_' and '-' "
                f"only, got '{artifact.name}'; rename it"
            )
    (name, count), *_ = Counter(artifact.name for artifact in artifacts).most_common(1)
    if count > 1:
        paths = ", ".join(str(artifact.path) for artifact in artifacts if artifact.name == name)
        raise OptionError(f"artifacts must have different names, got '{name}' twice: {paths}")


def _require_servable(artifact: Artifact) -> None:
    model = artifact.manifest.model
    if model.takes_image == "with mask":
        raise OptionError(
            f"'{artifact.path}' is an inpainting model, and the server takes no pictures yet; "
            "use vitrine generate"
        )
    if model.subject == "none":
        raise OptionError(
            f"'{artifact.path}' has neither labels nor prompts, and a Triton model needs an input; "
            "use vitrine generate"
        )


def _write_model(artifact: Artifact, folder: Path) -> None:
    version = folder / VERSION
    version.mkdir(parents=True)
    (folder / CONFIG).write_text(config_text(artifact.name, artifact.manifest.model), "utf-8")
    (version / "model.py").write_text(_MODEL_PY, "utf-8")
    manifest = _servable(artifact.manifest)
    for name in manifest.files:
        target = version / ARTIFACT / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(artifact.path / name, target)
    write_manifest(version / ARTIFACT, manifest)
    read_artifact(version / ARTIFACT)  # a full disk or a file that changed under the copy


def _servable(manifest: Manifest) -> Manifest:
    """The selected variant alone, with the files that run it, and no path of this machine."""
    selected = manifest.variants[manifest.selected]
    chosen = selected.model_copy(update={"graphs": {}})  # what plans were built from
    if chosen.quantization:
        quantization = chosen.quantization.model_copy(update={"calibration": None})
        chosen = chosen.model_copy(update={"quantization": quantization})
    stems = {PurePosixPath(file).with_suffix("") for file in chosen.networks.values()}
    needed = {*manifest.model.tokenizers.values()}
    if chosen.quality:
        needed.add(chosen.quality.worst_picture)
    files = {
        name: sha256
        for name, sha256 in manifest.files.items()  # with weights that lie beside a graph
        if name in needed or any(_is_beside(name, stem) for stem in stems)
    }
    source = manifest.source.model_copy(update={"path": Path(manifest.source.path).name})
    update = {
        "source": source, "files": files, "selection": None,
        "variants": {manifest.selected: chosen},
    }  # fmt: skip
    return manifest.model_copy(update=update)


def _is_beside(name: str, stem: PurePosixPath) -> bool:
    """Whether a file is `<stem>.*`: a graph, or its weights."""
    path = PurePosixPath(name)
    return path.parent == stem.parent and path.name.startswith(f"{stem.name}.")


def config_text(name: str, model: ModelSpec) -> str:
    """The model's `config.pbtxt`. Raises RuntimeUnavailableError without tritonclient."""
    try:
        from google.protobuf import text_format  # type: ignore[import-untyped]
        from tritonclient.grpc import model_config_pb2
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"{error.name} is not installed; pip install 'vitrine[triton]'"
        ) from None
    config = model_config_pb2.ModelConfig(name=name, backend="python", max_batch_size=MAX_ROWS)
    config.input.add(name=model.subject, data_type=model_config_pb2.TYPE_STRING, dims=[1])
    config.output.add(
        name="image",
        data_type=model_config_pb2.TYPE_UINT8,
        dims=[-1, -1, model.image.channels],  # a request may ask for a size, or to be upscaled
    )
    config.instance_group.add(count=1, kind=model_config_pb2.ModelInstanceGroup.KIND_CPU)
    _add_batching(config, model)
    text: str = text_format.MessageToString(config)
    return text


def _add_batching(config: "ModelConfig", model: ModelSpec) -> None:
    """Step batching where a request takes many steps, dynamic batching where it takes one."""
    if model.defaults is None:
        config.dynamic_batching.max_queue_delay_microseconds = GAN_QUEUE_DELAY_US
        return
    batching = config.sequence_batching
    batching.iterative_sequence = True
    batching.max_sequence_idle_microseconds = MAX_IDLE_US
    batching.oldest.max_candidate_sequences = MAX_ROWS
    batching.oldest.max_queue_delay_microseconds = QUEUE_DELAY_US


@contextmanager
def _new_repository(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends without an error."""
    _require_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as name:
        partial = Path(name) / "new"
        partial.mkdir()
        yield partial
        replace_folder(partial, folder)


def _require_replaceable(folder: Path) -> None:
    """Only an empty folder or one that holds nothing but our models may go."""
    if not folder.exists():
        return
    ours = folder.is_dir() and all(
        (model / CONFIG).is_file() and is_artifact(model / VERSION / ARTIFACT)
        for model in folder.iterdir()
    )
    if not ours:
        raise ArtifactError(
            f"'{folder}' exists and is not a repository of Vitrine; choose another --repository"
        )

"""Checkpoint to artifact: export every network, describe them in a manifest, write it whole."""

from importlib.metadata import version
from pathlib import Path

from engine.artifact import Artifact, hash_files, new_artifact, read_artifact, write_manifest
from engine.checkpoint import read_checkpoint
from engine.manifest import Manifest, Source, Variant
from engine.networks.load import load_network
from export.onnx import export_network

VARIANT = "onnxruntime-fp32"


def export(checkpoint_path: Path, artifact_path: Path) -> Artifact:
    """Write the artifact of a checkpoint, fp32 for ONNX Runtime, and read it back verified.

    Raises ArtifactError, OptionError; an artifact that was there before stays whole.
    """
    import onnxruntime

    checkpoint = read_checkpoint(checkpoint_path)
    source = Source(path=checkpoint_path.as_posix(), sha256=checkpoint.sha256())
    with new_artifact(artifact_path) as folder:
        files = {}
        for name, spec in checkpoint.model.networks.items():
            files[name] = f"{VARIANT}/{name}.onnx"
            export_network(load_network(checkpoint_path / name), spec, folder / files[name])
        variant = Variant(
            runtime="onnxruntime",
            precision="fp32",
            runtime_version=onnxruntime.__version__,
            networks=files,
        )
        manifest = Manifest(
            vitrine_version=version("vitrine"),
            source=source,
            model=checkpoint.model,
            variants={VARIANT: variant},
            selected=VARIANT,
            files=hash_files(folder),
        )
        write_manifest(folder, manifest)
    return read_artifact(artifact_path)

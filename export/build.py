"""Checkpoint to artifact: export every network, describe them in a manifest, write it whole."""

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from engine.artifact import (
    Artifact,
    hash_files,
    is_artifact,
    new_artifact,
    read_artifact,
    recover,
    write_manifest,
)
from engine.checkpoint import VAE_NETWORKS, Checkpoint, file_sha256, read_checkpoint
from engine.console import Progress
from engine.errors import ArtifactError
from engine.json_files import read_json
from engine.manifest import Goal, Lora, Manifest, Selection, Source, TypedPrecision, Variant
from engine.pipeline import checkpoint_tokenizers
from export.files import link_files, size_bytes
from export.finding import Finding
from export.lint import lint
from export.quantize import quantize
from export.report import REPORT
from export.variant import VariantOptions


@dataclass(frozen=True)
class Export:
    """An artifact, the variant that was asked for, and what lint says of its graphs."""

    artifact: Artifact
    variant: str
    unchanged: bool = False
    replaced: tuple[str, ...] = ()  # variants of other weights, which were there and are gone
    findings: tuple[tuple[str, Finding], ...] = ()  # with the network


def export(
    checkpoint_path: Path,
    artifact_path: Path,
    options: VariantOptions | None = None,
    loras: Sequence[tuple[Path, float]] = (),
    progress: Progress = lambda _: None,
) -> Export:
    """Write one variant of a checkpoint into an artifact, and read it back verified.

    Other variants of the same checkpoint stay; those of another one go. Where the variant is there
    already nothing is done. Raises ArtifactError, OptionError; an artifact that was there before
    stays whole.
    """
    options = options or VariantOptions()
    recover(artifact_path)  # before it is asked for its variants
    checkpoint = read_checkpoint(checkpoint_path)
    options.check(checkpoint.model)
    progress("reading the checkpoint")
    source = Source(
        path=checkpoint_path.as_posix(),
        sha256=checkpoint.sha256(),
        loras=tuple(_lora(path, scale) for path, scale in loras),
    )
    found = _readable(artifact_path)
    before = found if found and _is_from(source, found.manifest) else None
    replaced = tuple(found.manifest.variants) if found and not before else ()
    if before and options.is_built(before.manifest.variants.get(options.name)):
        return Export(before, options.name, unchanged=True)
    with new_artifact(artifact_path) as folder:
        if before:
            link_files(before, folder)
            _forget(folder, options.name, before.manifest.variants.get(options.name))
        else:
            _save_tokenizers(checkpoint, folder)
        graphs = _export_graphs(checkpoint, source, options, folder, progress)
        quantization = None
        if options.is_quantized:
            graphs, quantization = quantize(checkpoint, source, options, folder, graphs, progress)
        findings = _lint(graphs, folder, options, progress)
        variant = options.describe(graphs, quantization, size_bytes(folder, graphs))
        variants = {**(before.manifest.variants if before else {}), options.name: variant}
        selected, selection = _selected(before, options.name)
        manifest = Manifest(
            vitrine_version=version("vitrine"),
            source=source,
            model=checkpoint.model,
            variants=variants,
            selected=selected,
            selection=selection,
            files=hash_files(folder),
        )
        write_manifest(folder, manifest)
    made = read_artifact(artifact_path)
    return Export(made, options.name, findings=tuple(findings), replaced=replaced)


def _lora(path: Path, scale: float) -> Lora:
    if not path.is_file():
        raise ArtifactError(f"LoRA weights '{path}' do not exist")
    if path.suffix != ".safetensors":
        raise ArtifactError(f"LoRA weights must be a .safetensors file, got '{path}'")
    values = {"path": path.as_posix(), "sha256": file_sha256(path), "scale": scale}
    return Lora.parse(values, f"LoRA weights '{path}'")


def _readable(artifact_path: Path) -> Artifact | None:
    """The artifact that is there; one that is damaged is made anew."""
    try:
        return read_artifact(artifact_path) if is_artifact(artifact_path) else None
    except ArtifactError:
        return None


def _is_from(source: Source, manifest: Manifest) -> bool:
    """Whether this version of ours made an artifact from the same weights."""
    loras = [[(lora.sha256, lora.scale) for lora in s.loras] for s in (source, manifest.source)]
    same = source.sha256 == manifest.source.sha256 and loras[0] == loras[1]
    return same and manifest.vitrine_version == version("vitrine")


def _selected(before: Artifact | None, made: str) -> tuple[str, Selection | None]:
    """The selected variant when one has been made anew, and how it was chosen.

    What was selected by measurement does not stay so unmeasured: the best accepted one of the same
    picture size is, where there is one.
    """
    if before is None:
        return made, None
    manifest, selection = before.manifest, before.manifest.selection
    if selection is None:
        return manifest.selected, None
    chosen = manifest.selected
    if chosen == made:
        size = manifest.variants[made].size
        costs = {
            name: _cost(variant, selection.goal)
            for name, variant in manifest.variants.items()
            if name != made and variant.accepted and variant.speed and variant.size == size
        }
        chosen = min(costs, key=lambda name: costs[name]) if costs else made
    not_built = {name: why for name, why in selection.not_built.items() if name != made}
    ties = tuple(name for name in selection.within_noise if name not in (made, chosen))
    return chosen, selection.model_copy(update={"not_built": not_built, "within_noise": ties})


def _cost(variant: Variant, goal: Goal) -> float:
    """What a goal makes small."""
    assert variant.speed is not None
    if goal == "size":
        return variant.size_bytes or math.inf
    return variant.speed.latency_ms if goal == "latency" else -variant.speed.images_per_s


def _forget(folder: Path, name: str, variant: Variant | None) -> None:
    """Remove the plans, quantized graphs and evidence of a variant that is made anew."""
    for made in (folder / name, folder / "graphs" / name):
        shutil.rmtree(made, ignore_errors=True)
    for report in REPORT:  # of what the artifact was
        (folder / report).unlink(missing_ok=True)
    if variant and variant.quality:
        (folder / variant.quality.worst_picture).unlink(missing_ok=True)


def _save_tokenizers(checkpoint: Checkpoint, folder: Path) -> None:
    for name, tokenizer in checkpoint_tokenizers(checkpoint.path, checkpoint.model).items():
        path = folder / checkpoint.model.tokenizers[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(path))


def _export_graphs(
    checkpoint: Checkpoint,
    source: Source,
    options: VariantOptions,
    folder: Path,
    progress: Progress,
) -> dict[str, str]:
    """The ONNX file of every network; those that another variant has already are used again."""
    model = checkpoint.model
    precisions = {
        name: _network_precision(checkpoint.path, name, options.graph_precision)
        for name in model.networks
    }
    files = {
        name: options.graph(name, spec, precisions[name]) for name, spec in model.networks.items()
    }
    missing = {name: file for name, file in files.items() if not (folder / file).exists()}
    if not missing:
        return files
    from engine.networks.load import load_network  # torch: an unchanged export does without
    from engine.networks.lora import fused
    from export.onnx import export_network

    with fused(checkpoint.path, source.loras) as path:
        for name, file in missing.items():
            progress(f"exporting {name} in {precisions[name]}")
            network = load_network(path, name, model.networks[name], precisions[name])
            sizes = model.symbols(name, options.size) if options.size else None
            export_network(network, folder / file, sizes)
            del network  # before the next one is loaded
    return files


def _network_precision(checkpoint: Path, name: str, precision: TypedPrecision) -> TypedPrecision:
    """The precision of one network: a VAE that overflows in half precision says so itself."""
    if precision == "fp16" and name in VAE_NETWORKS:
        config = read_json(checkpoint / "vae" / "config.json", checkpoint)
        return "fp32" if config.get("force_upcast") is True else precision
    return precision


def _lint(
    graphs: dict[str, str], folder: Path, options: VariantOptions, progress: Progress
) -> list[tuple[str, Finding]]:
    """What lint says of each graph for the runtime. Raises ArtifactError where one cannot run."""
    progress(f"linting for {options.runtime}")
    findings = [
        (name, finding)
        for name, file in graphs.items()
        if file.endswith(".onnx")  # OpenVINO's own files are its own affair
        for finding in lint(folder / file, options.runtime)
    ]
    for name, finding in findings:
        if finding.severity == "error":
            raise ArtifactError(
                f"{name} cannot run on {options.runtime}: {finding.rule}: {finding.node}: "
                f"{finding.message}; {finding.mend}"
            )
    return findings

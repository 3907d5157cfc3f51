"""The gate: an artifact's pictures against the fp32 torch reference with the same start noise."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.artifact import Artifact, read_artifact, write_manifest
from engine.checkpoint import Checkpoint, file_sha256, read_checkpoint
from engine.errors import ArtifactError, QualityError
from engine.manifest import Floors, Quality, Variant
from engine.networks.lora import fused
from engine.pipeline import Pipeline, open_artifact, open_pipeline
from engine.quality import isr_db, psnr_db, ssim
from engine.request import Request
from export.evidence import Comparison, Image, save_evidence
from export.report import REPORT, renew_report
from export.requests import gate_requests


def check(
    artifact_path: Path,
    checkpoint_path: Path | None = None,
    pictures: int = 32,
    floors: Floors | None = None,
    variant: str | None = None,
) -> Quality:
    """Compare one variant with the checkpoint; record the figures and the worst pictures.

    Raises ArtifactError where the checkpoint is missing or another one, QualityError where a
    picture is broken or under a floor (which the manifest then says too).
    """
    artifact = read_artifact(artifact_path)
    name = variant or artifact.manifest.selected
    runnable, simulated = runnable_variant(artifact, name)
    gate = open_gate(artifact, checkpoint_path, pictures, runnable.variant(name).size)
    after = judge(artifact, name, gate, floors or Floors(), runnable, simulated)
    if artifact.manifest.files.keys() >= set(REPORT):
        renew_report(artifact.path)
    if after.quality is None:
        raise QualityError(f"{name}: {after.reason}")
    if reason := shortfall(after.quality):
        evidence = artifact.path / after.quality.worst_picture
        raise QualityError(
            f"{reason} ({name}, worst seed {after.quality.worst_seed}); see {evidence}"
        )
    return after.quality


@dataclass(frozen=True)
class Gate:
    """The requests that variants are judged by, and their pictures in torch."""

    requests: Sequence[Request]
    references: Sequence[Image]

    def compare(self, pipeline: Pipeline, simulated: bool = False) -> Comparison:
        """Draw every request and close the pipeline.

        Raises QualityError for a broken picture, and where one alone is not what it is in a batch;
        of that a simulation says nothing.
        """
        try:
            results = _pictures(pipeline, self.requests)
            if not simulated:
                _require_same_alone(pipeline, self.requests, results)
        finally:
            pipeline.close()
        pairs = list(zip(self.references, results, strict=True))
        return Comparison(
            self.requests,
            self.references,
            results,
            psnrs_db=[psnr_db(*pair) for pair in pairs],
            ssims=[ssim(*pair) for pair in pairs],
            isrs_db=[isr_db(*pair) for pair in pairs],
        )


def open_gate(
    artifact: Artifact,
    checkpoint_path: Path | None,
    pictures: int,
    size: tuple[int, int] | None = None,
    first_seed: int = 0,
) -> Gate:
    """Draw the reference pictures of seeds from `first_seed`; `size`: of a build that makes one.

    Raises ArtifactError where the checkpoint is missing or another one.
    """
    checkpoint = _source(artifact, checkpoint_path)
    requests = gate_requests(artifact.manifest.model, pictures, size, first_seed)
    with fused(checkpoint.path, artifact.manifest.source.loras) as path:
        pipeline = open_pipeline(path)
        references = _pictures(pipeline, requests)
        pipeline.close()
    return Gate(requests, references)


def runnable_variant(artifact: Artifact, name: str) -> tuple[Artifact, bool]:
    """The artifact with a variant that runs here, and whether that is a simulation.

    A TensorRT variant without plans is simulated: ONNX Runtime computes the same graphs, quantized
    as they are, on the CPU. Raises OptionError for an unknown variant.
    """
    entry = artifact.manifest.variants.get(name)
    if entry is None or entry.networks or not entry.graphs:
        artifact.variant(name)
        return artifact, False
    simulated = entry.model_copy(
        update={"runtime": "onnxruntime", "networks": entry.graphs, "graphs": {}}
    )
    variants = {**artifact.manifest.variants, name: simulated}
    manifest = artifact.manifest.model_copy(update={"variants": variants})
    return Artifact(artifact.path, manifest), True


def judge(
    artifact: Artifact,
    name: str,
    gate: Gate,
    floors: Floors,
    runnable: Artifact,
    simulated: bool = False,
) -> Variant:
    """Compare a variant, and write the verdict, the figures and the evidence into the manifest."""
    try:
        comparison = gate.compare(open_artifact(runnable, name), simulated)
    except QualityError as error:
        return refuse(artifact, name, str(error))
    evidence = save_evidence(artifact.path, name, comparison)
    quality = summarize(comparison, floors, evidence, simulated)
    return _write_verdict(artifact, name, quality, shortfall(quality))


def refuse(artifact: Artifact, name: str, reason: str) -> Variant:
    """Write into the manifest that a variant makes no pictures to judge, and why."""
    return _write_verdict(artifact, name, None, reason)


def summarize(
    comparison: Comparison, floors: Floors, evidence: str, simulated: bool = False
) -> Quality:
    """The least and the mean of every figure."""
    return Quality(
        pictures=len(comparison.results),
        psnr_db_min=min(comparison.psnrs_db),
        psnr_db_mean=float(np.mean(comparison.psnrs_db)),
        ssim_min=min(comparison.ssims),
        ssim_mean=float(np.mean(comparison.ssims)),
        isr_db_min=min(comparison.isrs_db),
        isr_db_mean=float(np.mean(comparison.isrs_db)),
        floors=floors,
        simulated=simulated,
        worst_seed=comparison.requests[comparison.worst[0]].seed,
        worst_picture=evidence,
    )


def shortfall(quality: Quality) -> str:
    """Why a variant is refused, or nothing."""
    floors = quality.floors
    if not quality.psnr_db_min >= floors.psnr_db:
        digits = 1 if quality.psnr_db_min < floors.psnr_db - 0.1 else 4
        return (
            f"PSNR {quality.psnr_db_min:.{digits}f} dB is below the floor {floors.psnr_db:.1f} dB"
        )
    if not quality.ssim_mean >= floors.ssim:
        return f"mean SSIM {quality.ssim_mean:.4f} is below the floor {floors.ssim:.4f}"
    return ""


def _source(artifact: Artifact, given: Path | None) -> Checkpoint:
    source = artifact.manifest.source
    path = given or Path(source.path)
    if not path.is_dir():
        raise ArtifactError(
            f"checkpoint '{path}', which '{artifact.path}' was exported from, does not exist; "
            "name its folder with --checkpoint"
        )
    checkpoint = read_checkpoint(path)
    found = checkpoint.sha256()
    if found != source.sha256:
        raise ArtifactError(
            f"checkpoint '{path}' is not the one that '{artifact.path}' was exported from (sha256 "
            f"{found[:8]}..., expected {source.sha256[:8]}...); name that one with --checkpoint, "
            f"or export again: vitrine export {path} --output {artifact.path}"
        )
    return checkpoint


def _pictures(pipeline: Pipeline, requests: Sequence[Request]) -> list[Image]:
    """Pictures before rounding. Raises QualityError for a broken one."""
    return [pipeline.decode(row) for row in pipeline.run(requests)]


def _require_same_alone(
    pipeline: Pipeline, requests: Sequence[Request], results: Sequence[Image]
) -> None:
    """The same seed is the same picture in any batch. Raises QualityError where it is not."""
    for index in {0, len(requests) - 1}:
        (alone,) = _pictures(pipeline, [requests[index]])
        if not np.array_equal(alone, results[index]):
            raise QualityError(
                f"the picture of seed {requests[index].seed} depends on the batch: alone it "
                f"differs by up to {np.abs(alone - results[index]).max():.1e}"
            )


def _write_verdict(artifact: Artifact, name: str, quality: Quality | None, reason: str) -> Variant:
    """Write the verdict into the manifest as it is now; only then does the older evidence go."""
    manifest = read_artifact(artifact.path).manifest
    before = manifest.variants[name]
    reason = reason or before.no_gain
    after = before.model_copy(update={"quality": quality, "accepted": not reason, "reason": reason})
    files = {n: sha256 for n, sha256 in manifest.files.items() if n not in REPORT}
    old = before.quality.worst_picture if before.quality else None
    if old:
        files.pop(old, None)
    if quality:
        files[quality.worst_picture] = file_sha256(artifact.path / quality.worst_picture)
    variants = {**manifest.variants, name: after}
    update = {"variants": variants, "files": files}
    write_manifest(artifact.path, manifest.model_copy(update=update))
    for path in (*REPORT, *([old] if old else [])):
        if path not in files:
            (artifact.path / path).unlink(missing_ok=True)
    return after

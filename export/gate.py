"""The gate: an artifact's pictures against the fp32 torch reference with the same start noise."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from engine.artifact import Artifact, read_artifact, write_manifest
from engine.checkpoint import Checkpoint, file_sha256, read_checkpoint
from engine.errors import ArtifactError, QualityError
from engine.images import Picture, grid, to_uint8
from engine.manifest import ModelSpec, Quality
from engine.networks.lora import fused
from engine.options import Options
from engine.pipeline import Pipeline, open_pipeline
from engine.quality import psnr_db, ssim
from engine.request import Request

Image = NDArray[np.float32]  # [H, W, C] in [0, 1]


class Floors(Options):
    """The least that a variant must reach."""

    psnr_db: float = Field(35.0, ge=0, description="for the worst picture")
    ssim: float = Field(0.98, ge=-1, description="for the mean")


def check(
    artifact_path: Path,
    checkpoint_path: Path | None = None,
    pictures: int = 32,
    floors: Floors | None = None,
    variant: str | None = None,
) -> Quality:
    """Compare one variant with the checkpoint; record the figures and the worst picture.

    Raises ArtifactError where the checkpoint is missing or another one, QualityError where a
    picture is under a floor (which the manifest then says too).
    """
    floors = floors or Floors()
    artifact = read_artifact(artifact_path)
    name = variant or artifact.manifest.selected
    size = artifact.variant(name).size
    checkpoint = _source(artifact, checkpoint_path)
    requests = gate_requests(artifact.manifest.model, pictures, size)
    with fused(checkpoint.path, artifact.manifest.source.loras) as path:
        references = _pictures(open_pipeline(path), requests, "torch-fp32")
    try:
        results = _pictures(open_pipeline(artifact.path, name), requests, name)
    except QualityError as error:
        _write_verdict(artifact, name, None, str(error))
        raise
    quality = _record(artifact, name, requests, references, results, floors)
    reason = shortfall(quality, floors)
    if reason:
        evidence = artifact.path / quality.worst_picture
        raise QualityError(f"{reason} ({name}, worst seed {quality.worst_seed}); see {evidence}")
    return quality


PROMPTS = (
    "a red leather shoe on a white background",
    "a person wearing a green coat, studio photo",
    "a blue bag",
    "",
)


def gate_requests(
    model: ModelSpec, count: int, size: tuple[int, int] | None = None
) -> list[Request]:
    """Requests over seeds, and with them over labels or prompts, samplers, 4..30 steps, guidance.

    Models that repaint get a picture and a mask made here. `size`: of a build that makes one only.
    """
    return [Request.of(_gate_request(model, seed, size)) for seed in range(count)]


def _gate_request(model: ModelSpec, seed: int, size: tuple[int, int] | None) -> dict[str, object]:
    values: dict[str, object] = {"seed": seed}
    if model.labels:
        values["label"] = model.labels[seed % len(model.labels)]
    if model.tokenizers:
        values["prompt"] = PROMPTS[seed % len(PROMPTS)]
    height, width = size or (model.image.height, model.image.width)
    if model.takes_image == "with mask":
        values["image"] = _gradient(height, width)
        values["mask"] = np.zeros((height, width, 1), np.uint8)
        values["mask"][height // 4 : height // 2, width // 4 :] = 255  # type: ignore[index]
    elif model.takes_image == "optional" and seed % 3 == 2:  # the VAE's encoder is judged too
        values |= {"image": _gradient(height, width), "strength": 0.6}
    if model.defaults is None:
        return values
    guided = (1.0, 2.0, 3.5, 5.0)[seed % 4] if model.guidance != "none" else 1.0
    return {
        **values,
        "num_inference_steps": 4 + 7 * seed % 27,
        "guidance_scale": guided,
        "sampler": model.samplers[seed % len(model.samplers)],
    }


def _gradient(height: int, width: int) -> Picture:
    rows, columns = np.linspace(0, 255, height), np.linspace(0, 255, width)
    red, green = np.meshgrid(rows, columns, indexing="ij")
    picture: Picture = np.stack([red, green, 255 - red], -1).astype(np.uint8)
    return picture


def shortfall(quality: Quality, floors: Floors) -> str:
    """Why a variant is refused, or nothing."""
    if not quality.psnr_db_min >= floors.psnr_db:
        return f"PSNR {quality.psnr_db_min:.1f} dB is below the floor {floors.psnr_db:.1f} dB"
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


def _pictures(pipeline: Pipeline, requests: Sequence[Request], name: str) -> list[Image]:
    """Pictures before rounding. Raises QualityError for NaN or infinity."""
    pictures = []
    for request, row in zip(requests, pipeline.run(requests), strict=True):
        if not np.isfinite(row.x).all():
            raise QualityError(f"{name} makes NaN or infinite pixels for seed {request.seed}")
        pictures.append(pipeline.decode(row))
    pipeline.close()
    return pictures


def _record(
    artifact: Artifact,
    name: str,
    requests: Sequence[Request],
    references: Sequence[Image],
    results: Sequence[Image],
    floors: Floors,
) -> Quality:
    """Measure, save the worst picture as evidence, and write both into the manifest."""
    pairs = list(zip(references, results, strict=True))
    psnrs = [psnr_db(*pair) for pair in pairs]
    ssims = [ssim(*pair) for pair in pairs]
    worst = int(np.argmin(psnrs))
    quality = Quality(
        pictures=len(pairs),
        psnr_db_min=min(psnrs),
        psnr_db_mean=float(np.mean(psnrs)),
        ssim_min=min(ssims),
        ssim_mean=float(np.mean(ssims)),
        worst_seed=requests[worst].seed,
        worst_picture=_save_evidence(
            artifact.path, f"{name}-{requests[worst].seed}", *pairs[worst]
        ),
    )
    _write_verdict(artifact, name, quality, shortfall(quality, floors))
    return quality


def _write_verdict(artifact: Artifact, name: str, quality: Quality | None, reason: str) -> None:
    """Write the verdict into the manifest; only then does the older evidence go."""
    before = artifact.variant(name)
    after = before.model_copy(update={"quality": quality, "accepted": not reason, "reason": reason})
    files = dict(artifact.manifest.files)
    old = before.quality.worst_picture if before.quality else None
    if old:
        files.pop(old, None)
    if quality:
        files[quality.worst_picture] = file_sha256(artifact.path / quality.worst_picture)
    variants = {**artifact.manifest.variants, name: after}
    update = {"variants": variants, "files": files}
    write_manifest(artifact.path, artifact.manifest.model_copy(update=update))
    if old and old not in files:
        (artifact.path / old).unlink(missing_ok=True)


def _save_evidence(folder: Path, name: str, reference: Image, result: Image) -> str:
    """reference | result | their difference, stretched so that its largest value is white.

    The file's name ends with a part of its hash, so that older evidence stays what it is.
    """
    difference = np.abs(reference - result)
    largest = float(difference.max())
    stretched = difference / largest if largest else difference
    panels = [to_uint8(panel) for panel in (reference, result, stretched)]
    scale = max(1, 192 // max(reference.shape[:2]))
    captions = ["reference", "result", f"difference, max {largest:.1e}"]
    (folder / "quality").mkdir(exist_ok=True)
    partial = folder / "quality" / f"{name}.partial.png"
    grid(panels, 3, captions, scale).save(partial)
    path = f"quality/{name}-{file_sha256(partial)[:8]}.png"
    os.replace(partial, folder / path)
    return path

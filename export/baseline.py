"""Regression: an artifact's pictures against those of a baseline that is kept in the repository."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from engine.artifact import Artifact, read_artifact
from engine.errors import ArtifactError, OptionError
from engine.images import resized, to_uint8
from engine.json_files import read_json, write_json
from engine.machine import Machine, this_machine
from engine.manifest import Sha256
from engine.options import Options
from engine.pipeline import open_artifact
from engine.postprocess import PostProcess, postprocess
from engine.quality import psnr_db, ssim
from export.gate import Gate, open_gate, runnable_variant
from export.variant import installed_version

Image = NDArray[np.float32]

TOLERANCE_DB = 0.5
# On another machine kernels add up in another order, and samplers amplify what that changes.
TOLERANCE_ELSEWHERE_DB = 3.0
TOLERANCE_ELSEWHERE_SSIM = 0.01
TOLERANCE_SSIM = 0.002
# Above it two pictures differ by less than a hundredth of a gray level: float32's rounding.
SAME_DB = 90.0
# Every operation, strong enough to be seen; what it makes of the reference pictures is kept.
OPERATIONS = (
    "median_px=1", "mean_px=1", "bilateral=0.5", "non_local_means=0.4", "white_balance=1",
    "contrast=1.5", "clahe=0.5", "saturation=1.5", "deblur_px=1", "sharpen=1", "sharpen_edges=1",
    "white_background=0.1", "upscale=2",
)  # fmt: skip


MeasuredVariant = Annotated[str, Field(pattern=r"^[a-z0-9]+-[a-z0-9]+(-[a-z0-9]+)*$")]


class PictureFigures(Options):
    """One picture of a baseline."""

    psnr_db: float = Field(description="against torch; of an operation: against its own input")
    ssim: float
    sha256: Sha256 = Field(description="of its uint8 pixels")


class Pictures(Options):
    """The pictures of one variant or operation by seed, and what drew them."""

    runtime_version: str
    machine: Machine
    calibration_sha256: Sha256 | None = Field(None, description="of the rows of an int8 variant")
    pictures: dict[int, PictureFigures]

    def must_equal(self, now: "Pictures") -> bool:
        """Whether machine, runtime and calibration are the same, so that the bytes must be."""
        parts = ("machine", "runtime_version", "calibration_sha256")
        return all(getattr(self, part) == getattr(now, part) for part in parts)


class Baseline(Options):
    """What a checkpoint's pictures were when somebody last looked at them."""

    format: Literal[1] = 1
    checkpoint_sha256: Sha256
    variants: dict[MeasuredVariant, Pictures] = Field(min_length=1)
    postprocess: dict[str, Pictures]


@dataclass(frozen=True)
class Moved:
    """One picture that is not what it was."""

    what: str  # variant or operation
    seed: int
    figure: str
    before: str
    now: str


@dataclass(frozen=True)
class Regression:
    """A baseline against now."""

    pictures: int
    moved: tuple[Moved, ...]
    bytes_compared: tuple[str, ...]  # variants and operations whose bytes had to be the same


def read_baseline(path: Path) -> Baseline:
    """Raises ArtifactError where it is missing or not a baseline."""
    if not path.is_file():
        raise ArtifactError(
            f"baseline '{path}' does not exist; write it with: vitrine check ARTIFACT --baseline "
            f"{path} --write-baseline"
        )
    try:
        return Baseline.parse(read_json(path, path.parent), f"baseline '{path}'")
    except OptionError as error:
        raise ArtifactError(str(error)) from None


def write_baseline(
    path: Path, artifact_path: Path, checkpoint: Path | None, pictures: int
) -> Baseline:
    """Draw every variant of an artifact and every operation, and keep what they are now."""
    artifact = read_artifact(artifact_path)
    drawn = _draw(artifact, checkpoint, pictures, list(artifact.manifest.variants), OPERATIONS)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, drawn.model_dump(mode="json"))
    return drawn


def compare(path: Path, artifact_path: Path, checkpoint: Path | None) -> Regression:
    """Every picture of a baseline that fell, or that has other bytes where they must be the same.

    Bytes are compared where machine, runtime and calibration are those of the baseline. Raises
    ArtifactError for a baseline of another checkpoint, OptionError where the artifact lacks one of
    its variants.
    """
    baseline = read_baseline(path)
    artifact = read_artifact(artifact_path)
    source = artifact.manifest.source
    if baseline.checkpoint_sha256 != source.sha256 or source.loras:
        raise ArtifactError(
            f"baseline '{path}' is of another checkpoint (sha256 "
            f"{baseline.checkpoint_sha256[:8]}..., '{artifact_path}' was exported from "
            f"{source.sha256[:8]}...); name its own, or write one: vitrine check {artifact_path} "
            f"--baseline {path} --write-baseline"
        )
    for name in baseline.variants:
        if name not in artifact.manifest.variants:
            runtime, precision, *form = name.split("-")
            weights = " --weights-only" if "weights" in form else ""
            raise OptionError(
                f"baseline '{path}' has {name}, which '{artifact_path}' lacks; export it: vitrine "
                f"export {source.path} --output {artifact_path} --runtime {runtime} "
                f"--precision {precision}{weights}"
            )
    before = {**baseline.variants, **baseline.postprocess}
    count = max(len(entry.pictures) for entry in before.values())
    now = _draw(artifact, checkpoint, count, list(baseline.variants), list(baseline.postprocess))
    drawn = {**now.variants, **now.postprocess}
    same = tuple(name for name in before if before[name].must_equal(drawn[name]))
    moved = tuple(
        each
        for name in before
        for each in _moved(name, before[name], drawn[name], name in baseline.postprocess)
    )
    return Regression(pictures=count, moved=moved, bytes_compared=same)


def _draw(
    artifact: Artifact,
    checkpoint: Path | None,
    pictures: int,
    variants: Sequence[str],
    operations: Sequence[str],
) -> Baseline:
    """What variants and operations make of the gate's requests now."""
    sizes = {artifact.manifest.variants[name].size for name in variants}
    if len(sizes) > 1:
        raise OptionError(
            f"a baseline is of one picture size, and the variants are of several: "
            f"{', '.join(variants)}; give the variants of a fixed size an artifact of their own"
        )
    gate = open_gate(artifact, checkpoint, pictures, next(iter(sizes), None))
    return Baseline(
        checkpoint_sha256=artifact.manifest.source.sha256,
        variants={name: _variant(artifact, name, gate) for name in variants},
        postprocess={text: _operation(text, gate) for text in operations},
    )


def _variant(artifact: Artifact, name: str, gate: Gate) -> Pictures:
    runnable, simulated = runnable_variant(artifact, name)
    drawn = gate.compare(open_artifact(runnable, name), simulated)
    entry, files = runnable.manifest.variants[name], artifact.manifest.files
    figures = _figures(entry.runtime, gate, gate.references, drawn.results)
    if entry.quantization is None or entry.quantization.calibration is None:
        return figures
    rows = files[entry.quantization.calibration]
    return figures.model_copy(update={"calibration_sha256": rows})


def _operation(text: str, gate: Gate) -> Pictures:
    """The reference pictures after one operation, against themselves before it."""
    options = PostProcess.model_validate(text)
    before = [to_uint8(reference) for reference in gate.references]
    after = [postprocess(picture, options) for picture in before]
    fitted = [resized(picture, *before[0].shape[:2]) for picture in after]
    as_float = [[p.astype(np.float32) / np.float32(255) for p in each] for each in (before, fitted)]
    return _figures("opencv-python-headless", gate, *as_float)


def _figures(
    runtime: str, gate: Gate, references: Sequence[Image], results: Sequence[Image]
) -> Pictures:
    return Pictures(
        runtime_version=installed_version(runtime),
        machine=this_machine(),
        pictures={
            request.seed: PictureFigures(
                psnr_db=psnr_db(reference, result),
                ssim=ssim(reference, result),
                sha256=hashlib.sha256(to_uint8(result).tobytes()).hexdigest(),
            )
            for request, reference, result in zip(gate.requests, references, results, strict=True)
        },
    )


def _moved(name: str, before: Pictures, now: Pictures, is_operation: bool) -> Iterator[Moved]:
    """A variant may come closer to torch; an operation is to do what it did."""
    tolerance_db, tolerance_ssim = TOLERANCE_ELSEWHERE_DB, TOLERANCE_ELSEWHERE_SSIM
    if before.must_equal(now):
        tolerance_db, tolerance_ssim = TOLERANCE_DB, TOLERANCE_SSIM
    for seed, old in before.pictures.items():
        new = now.pictures[seed]
        fallen_db = min(old.psnr_db, SAME_DB) - min(new.psnr_db, SAME_DB)
        fallen_ssim = old.ssim - new.ssim
        if is_operation:
            fallen_db, fallen_ssim = abs(fallen_db), abs(fallen_ssim)
        if fallen_db > tolerance_db:
            yield Moved(name, seed, "PSNR dB", f"{old.psnr_db:.2f}", f"{new.psnr_db:.2f}")
        if fallen_ssim > tolerance_ssim:
            yield Moved(name, seed, "SSIM", f"{old.ssim:.4f}", f"{new.ssim:.4f}")
        if before.must_equal(now) and old.sha256 != new.sha256:
            yield Moved(name, seed, "bytes", old.sha256[:8], new.sha256[:8])

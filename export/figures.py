"""What a report says of an artifact: the figures of every candidate, taken from its manifest."""

from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import Field

from engine.machine import Machine
from engine.manifest import (
    Floors,
    Goal,
    Manifest,
    Precision,
    Quality,
    Quantization,
    Runtime,
    Source,
    Speed,
    Variant,
)
from engine.options import Options

Status = Literal["selected", "accepted", "refused", "not checked", "not built"]


class Conditions(Options):
    """What was asked of a candidate while it was timed, and on which machine."""

    batch: int
    num_inference_steps: int
    guidance_scale: float
    machine: Machine


class Candidate(Options):
    """One candidate of the selection: a figure that was not measured is none."""

    variant: str
    runtime: Runtime | None = Field(None, description="none where it could not be built")
    precision: Precision | None = None
    runtime_version: str = ""
    pictures: int | None = Field(None, description="that were compared with the reference")
    simulated: bool = Field(False, description="they are of its graphs on a CPU, not of its plans")
    psnr_db_min: float | None = None
    psnr_db_mean: float | None = None
    ssim_min: float | None = None
    ssim_mean: float | None = None
    isr_db_min: float | None = None
    isr_db_mean: float | None = None
    floors: Floors | None = Field(None, description="that its pictures were held against")
    worst_seed: int | None = None
    worst_picture: str | None = Field(None, description="a file of the artifact")
    latency_ms: float | None = None
    images_per_s: float | None = None
    spread: float | None = Field(None, description="interquartile range over median")
    conditions: Conditions | None = Field(None, description="of latency_ms and images_per_s")
    not_timed: str = Field("", description="why there is no speed")
    size_bytes: int | None = None
    accepted: bool | None = Field(None, description="none until checked")
    reason: str = Field("", description="why it was refused or could not be built")
    quantization: Quantization | None = Field(None, description="with the layers kept back")


class Report(Options):
    """`quality/report.json`: the choice, and every candidate: accepted before refused, fast first.

    Names carry their units; a figure that was not measured is null.
    """

    artifact: str = Field(description="its name")
    vitrine_version: str
    checkpoint: Source = Field(description="path, sha256 and LoRA weights")
    goal: Goal | None = Field(None, description="none where the user chose")
    selected: str
    within_noise: tuple[str, ...] = Field((), description="as fast as the selected one")
    floors: Floors | None = Field(None, description="of the selected one; none: not checked")
    machine: Machine | None = Field(None, description="that timed the selected one")
    candidates: tuple[Candidate, ...]

    @property
    def choice(self) -> Candidate:
        """The selected candidate."""
        return next(each for each in self.candidates if each.variant == self.selected)

    def status(self, candidate: Candidate) -> Status:
        """What became of a candidate, in one word or two."""
        if candidate.runtime is None:
            return "not built"
        if candidate.accepted is False:
            return "refused"
        if candidate.variant == self.selected:
            return "selected"
        return "accepted" if candidate.accepted else "not checked"


def report_of(manifest: Manifest, artifact: str) -> Report:
    """The report of the artifact of that name."""
    selection = manifest.selection
    goal = selection.goal if selection else None
    candidates = [_candidate(name, variant) for name, variant in manifest.variants.items()]
    for name, reason in (selection.not_built if selection else {}).items():
        candidates.append(_not_built(name, reason))
    quality = manifest.variants[manifest.selected].quality
    speed = manifest.variants[manifest.selected].speed
    return Report(
        artifact=artifact,
        vitrine_version=manifest.vitrine_version,
        checkpoint=manifest.source,
        goal=goal,
        selected=manifest.selected,
        within_noise=selection.within_noise if selection else (),
        floors=quality.floors if quality else None,
        machine=speed.machine if speed else None,
        candidates=ordered(candidates, goal),
    )


def ordered(candidates: Sequence[Candidate], goal: Goal | None) -> tuple[Candidate, ...]:
    """Accepted, unchecked, refused, not built; each from fast to slow, then what was not timed."""
    by_latency = goal == "latency"

    def key(candidate: Candidate) -> tuple[bool, int, bool, float]:
        speed = candidate.latency_ms if by_latency else candidate.images_per_s
        rank = {True: 0, None: 1, False: 2}[candidate.accepted]
        cost = (speed or 0.0) if by_latency else -(speed or 0.0)
        return candidate.runtime is None, rank, speed is None, cost

    return tuple(sorted(candidates, key=key))


def better_first(goal: Goal) -> Callable[[Candidate], float]:
    """What a goal sorts by: the less the better; a figure that is missing is the worst."""
    names = {"latency": "latency_ms", "throughput": "images_per_s", "size": "size_bytes"}
    sign = -1.0 if goal == "throughput" else 1.0

    def cost(candidate: Candidate) -> float:
        value = getattr(candidate, names[goal])
        return float("inf") if value is None else sign * float(value)

    return cost


def _candidate(name: str, variant: Variant) -> Candidate:
    return Candidate(
        variant=name,
        runtime=variant.runtime,
        precision=variant.precision,
        runtime_version=variant.runtime_version,
        **_pictures(variant.quality),  # type: ignore[arg-type]
        **_clocks(variant.speed),  # type: ignore[arg-type]
        not_timed=_why_not_timed(variant),
        size_bytes=variant.size_bytes,
        accepted=variant.accepted,
        reason=variant.reason,
        quantization=variant.quantization,
    )


def _not_built(name: str, reason: str) -> Candidate:
    return Candidate(variant=name, not_timed="not built", accepted=False, reason=reason)


def _pictures(quality: Quality | None) -> dict[str, object]:
    names = Quality.model_fields.keys() & Candidate.model_fields.keys()
    return {name: getattr(quality, name) for name in names} if quality else {}


def _clocks(speed: Speed | None) -> dict[str, object]:
    if speed is None:
        return {}
    conditions = Conditions(**{name: getattr(speed, name) for name in Conditions.model_fields})
    names = ("latency_ms", "images_per_s", "spread")
    return {name: getattr(speed, name) for name in names} | {"conditions": conditions}


def _why_not_timed(variant: Variant) -> str:
    if variant.speed:
        return ""
    if variant.target:
        return f"not timed: its plans run on {variant.target.device}"
    if variant.runtime == "tensorrt":
        return "not timed: its plans need a GPU"
    return "not timed: refused" if variant.accepted is False else "not timed"

"""The choice of a variant: every candidate timed in turns, the slow refused, the best one named."""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.artifact import Artifact, hash_files, new_artifact, read_artifact, write_manifest
from engine.console import Progress
from engine.machine import this_machine
from engine.manifest import Goal, Manifest, ModelSpec, Selection, Speed, Variant
from engine.pipeline import Pipeline, open_artifact
from engine.request import IMAGE_ONLY, Request
from export.files import link_files
from export.report import write_report
from export.requests import gate_requests

BATCH = 8
MOST_STEPS = 20
ROUNDS = 7
LEAST_SECONDS = 0.2  # of one reading: short pictures are drawn again and again
SEED = 3_000_000
# Two variants are as fast as each other where one was ahead by less than this in the median round,
# or behind in a quarter of the rounds: which of them is picked would be chance.
NOISE = 1.01


@dataclass(frozen=True)
class Timing:
    """Seconds of one variant, round by round."""

    alone: Sequence[float]
    batches: Sequence[float]


def measure(
    artifact: Artifact,
    names: Sequence[str],
    progress: Progress,
) -> dict[str, Timing]:
    """Draw whole pictures with variants of one size in turns, alone and in a batch of 8.

    Raises as `open_artifact` and `Pipeline.generate`.
    """
    model = artifact.manifest.model
    requests = [
        _timed_request(model, request) for request in gate_requests(model, BATCH, None, SEED)
    ]
    pipelines: dict[str, Pipeline] = {}
    try:
        for name in names:
            pipelines[name] = open_artifact(artifact, name)
        return _rounds(pipelines, requests, progress)
    finally:
        for pipeline in pipelines.values():
            pipeline.close()


def _timed_request(model: ModelSpec, request: Request) -> Request:
    """The model's default sampler and guidance, and one number of steps for all."""
    values = request.model_dump(exclude_none=True)
    if model.takes_image == "optional":  # every request is to take all steps
        values = {name: value for name, value in values.items() if name not in IMAGE_ONLY}
    if model.defaults is not None:
        steps = min(model.defaults.num_inference_steps, MOST_STEPS)
        values |= {"num_inference_steps": steps, "guidance_scale": model.defaults.guidance_scale}
        values["sampler"] = model.defaults.sampler
    return Request.of(values)


def _rounds(
    pipelines: Mapping[str, Pipeline], requests: Sequence[Request], progress: Progress
) -> dict[str, Timing]:
    alone: dict[str, list[float]] = {name: [] for name in pipelines}
    batches: dict[str, list[float]] = {name: [] for name in pipelines}
    for pipeline in pipelines.values():  # compiles for both
        _seconds(pipeline, requests[:1], 1)
        _seconds(pipeline, requests, 1)
    for number in range(1, ROUNDS + 1):
        for name, pipeline in pipelines.items():
            progress(f"timing: round {number} of {ROUNDS}, {name}")
            alone[name].append(_reading(pipeline, requests[:1]))
            batches[name].append(_reading(pipeline, requests))
    return {name: Timing(alone[name], batches[name]) for name in pipelines}


def _reading(pipeline: Pipeline, requests: Sequence[Request]) -> float:
    """Seconds of one batch; of short ones the mean of as many as fill a reading."""
    first = _seconds(pipeline, requests, 1)
    times = math.ceil(LEAST_SECONDS / first) - 1
    return (first + _seconds(pipeline, requests, times)) / (1 + times)


def _seconds(pipeline: Pipeline, requests: Sequence[Request], times: int) -> float:
    started = time.perf_counter()
    for _ in range(times):
        for _ in pipeline.generate(requests, max_rows=BATCH):
            pass
    return time.perf_counter() - started


def speed(timing: Timing, model: ModelSpec) -> Speed:
    """The figures of one variant as a manifest holds them."""
    (request,) = gate_requests(model, 1, None, SEED)
    timed = _timed_request(model, request)
    median = statistics.median(timing.batches)
    low, _, high = statistics.quantiles(timing.batches, n=4)
    return Speed(
        latency_ms=1000 * statistics.median(timing.alone),
        images_per_s=BATCH / median,
        spread=(high - low) / median,
        batch=BATCH,
        num_inference_steps=timed.num_inference_steps or 1,
        guidance_scale=timed.guidance_scale or 1.0,
        machine=this_machine(),
    )


def replaced(name: str, variants: Mapping[str, Variant]) -> list[str]:
    """The variants that one is there to replace: of its runtime, in a higher precision."""
    rank = {"fp32": 0, "fp16": 1, "bf16": 1, "int8": 2, "fp8": 2}
    own = variants[name]
    return [
        other
        for other, variant in variants.items()
        if variant.runtime == own.runtime and rank[variant.precision] < rank[own.precision]
    ]


def no_gain(
    name: str, variants: Mapping[str, Variant], timings: Mapping[str, Timing], goal: Goal
) -> str:
    """Why a variant gains nothing on what it replaces, or nothing; with both figures."""
    rivals = [other for other in replaced(name, variants) if variants[other].accepted]
    own = variants[name]
    if goal == "size":
        sizes = [(size, other) for other in rivals if (size := variants[other].size_bytes)]
        if not sizes or not own.size_bytes or own.size_bytes < min(sizes)[0]:
            return ""
        size, other = min(sizes)
        mib = 2**20
        return (
            f"not smaller than {other}, which it would replace: "
            f"{own.size_bytes / mib:.2f} MiB against {size / mib:.2f}"
        )
    timed = [other for other in rivals if other in timings]
    if name not in timings or not timed:
        return ""
    best = min(timed, key=lambda other: _figure(timings[other], goal))
    own_s, best_s = _figure(timings[name], goal), _figure(timings[best], goal)
    if own_s < best_s and not is_tie(timings[best], timings[name], goal):
        return ""
    beyond = " beyond the noise" if own_s < best_s else ""
    count, what = (1, "alone") if goal == "latency" else (BATCH, f"in a batch of {BATCH}")
    return (
        f"not faster than {best}{beyond}, which it would replace: "
        f"{1000 * own_s / count:.1f} ms a picture {what} against {1000 * best_s / count:.1f} ms"
    )


def choose(
    variants: Mapping[str, Variant], timings: Mapping[str, Timing], goal: Goal
) -> tuple[str | None, tuple[str, ...]]:
    """The best accepted variant for a goal, and the others that are as good within noise.

    Of those that are as fast as each other the one with the better worst picture is taken. None
    where no variant is accepted.
    """
    accepted = [name for name, variant in variants.items() if variant.accepted]
    if goal == "size":
        sizes = {name: variants[name].size_bytes for name in accepted if name in timings}
        runnable = {name: size for name, size in sizes.items() if size}
        if not runnable:
            return None, ()
        least = min(runnable.values())
        equal = [name for name, size in runnable.items() if size == least]
    else:
        timed = [name for name in accepted if name in timings]
        if not timed:
            return None, ()
        fastest = min(timed, key=lambda name: _figure(timings[name], goal))
        equal = [name for name in timed if is_tie(timings[name], timings[fastest], goal)]
    chosen = max(equal, key=lambda name: _worst_db(variants[name]))
    return chosen, tuple(name for name in equal if name != chosen)


def is_tie(slower: Timing, faster: Timing, goal: Goal) -> bool:
    """Whether the rounds, each against each, tell two variants apart."""
    ratios = sorted(
        a / b for a, b in zip(_series(slower, goal), _series(faster, goal), strict=True)
    )
    return bool(statistics.median(ratios) < NOISE or ratios[len(ratios) // 4] <= 1)


def _series(timing: Timing, goal: Goal) -> Sequence[float]:
    return timing.alone if goal == "latency" else timing.batches


def _figure(timing: Timing, goal: Goal) -> float:
    return statistics.median(_series(timing, goal))


def _worst_db(variant: Variant) -> float:
    return variant.quality.psnr_db_min if variant.quality else 0.0


def select(
    artifact_path: Path,
    goal: Goal,
    candidates: Sequence[str],
    not_built: Mapping[str, str],
    progress: Progress,
) -> Artifact:
    """Time the candidates whose pictures are whole, refuse those without a gain, pick the best.

    What was measured and decided goes into the manifest and the report. Where no variant is
    accepted an fp32 one is selected.
    """
    artifact = read_artifact(artifact_path)
    variants = {name: artifact.manifest.variants[name] for name in candidates}
    whole = [name for name, variant in variants.items() if variant.networks and variant.quality]
    timings = measure(artifact, whole, progress) if whole else {}
    for name, variant in variants.items():
        timing = timings.get(name)
        figures = speed(timing, artifact.manifest.model) if timing else None
        variants[name] = variant.model_copy(update={"speed": figures, **_verdict(variant)})
    for name, reason in not_built.items():  # of this time; it may be there from before
        if before := artifact.manifest.variants.get(name):
            refused = {"accepted": False, "reason": reason, "speed": None}
            variants[name] = before.model_copy(update=refused)
    for name in [name for name, variant in variants.items() if variant.accepted]:
        if reason := no_gain(name, variants, timings, goal):
            refused = {"accepted": False, "reason": reason, "no_gain": reason}
            variants[name] = variants[name].model_copy(update=refused)
    chosen, within_noise = choose(variants, timings, goal)
    missing = {name: reason for name, reason in not_built.items() if name not in variants}
    selection = Selection(goal=goal, within_noise=within_noise, not_built=missing)
    kept = next((n for n, v in variants.items() if v.precision == "fp32"), next(iter(variants)))
    update = {
        "variants": {**artifact.manifest.variants, **variants},
        "selected": chosen or kept,
        "selection": selection,
    }
    _write(artifact, artifact.manifest.model_copy(update=update))
    return read_artifact(artifact_path)


def _verdict(variant: Variant) -> dict[str, object]:
    """What its pictures alone say of a variant, without what older clocks said."""
    if not variant.no_gain or variant.reason != variant.no_gain:
        return {"no_gain": ""}
    return {"accepted": True, "reason": "", "no_gain": ""}


def _write(artifact: Artifact, manifest: Manifest) -> None:
    """The artifact with a new manifest and its report."""
    with new_artifact(artifact.path) as folder:
        link_files(artifact, folder)
        write_report(folder, manifest, artifact.name)
        write_manifest(folder, manifest.model_copy(update={"files": hash_files(folder)}))

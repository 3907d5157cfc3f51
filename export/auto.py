"""`vitrine export --auto`: every candidate built, judged by pictures and timed; the best chosen."""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from engine.artifact import Artifact, hash_files, new_artifact, read_artifact, write_manifest
from engine.console import Progress
from engine.errors import ArtifactError, QualityError, RuntimeUnavailableError
from engine.machine import this_machine
from engine.manifest import Floors, Goal, Variant
from engine.networks.lora import fused
from export.build import export
from export.calibrate import batches, load_rows
from export.candidates import AutoOptions, Candidate
from export.files import link_files
from export.gate import Gate, judge, open_gate, refuse, runnable_variant
from export.ledger import Ledger
from export.quantize import kept_precision, open_quantizer, record_calibration
from export.requests import SEARCH_SEED
from export.search import NO_TIME, Found, search
from export.select import select
from export.trials import DenoiserTrials
from export.variant import VariantOptions, installed_version

TRIALS = 4  # trial pictures for each that the gate draws: of several sets one may be lucky
TRIALS_AT_ONCE = 64  # before the next are drawn
PROBES = 6  # calls that a layer's error is measured on


def auto(
    checkpoint: Path,
    artifact_path: Path,
    options: AutoOptions,
    loras: Sequence[tuple[Path, float]],
    progress: Progress,
) -> Artifact:
    """Build, judge, time and choose; the report lies in the artifact's `quality/`.

    Stopped, it goes on with what its searches had measured. Raises QualityError where nothing
    reaches the floors: the artifact then keeps an fp32 variant.
    """
    options.calibration.check()
    candidates = _Candidates(checkpoint, artifact_path, options, loras, progress)
    candidates.build_and_judge()
    artifact = select(artifact_path, options.goal, candidates.built, candidates.not_built, progress)
    shutil.rmtree(candidates.work, ignore_errors=True)
    return _require_accepted(artifact)


def select_anew(
    artifact_path: Path,
    checkpoint: Path | None,
    goal: Goal,
    floors: Floors,
    pictures: int,
    progress: Progress,
) -> Artifact:
    """Judge and time the variants that an artifact has, on this machine, and choose again.

    Variants of another picture size than the selected one's are left alone. Raises as `auto`, and
    ArtifactError where the checkpoint is missing.
    """
    artifact = read_artifact(artifact_path)
    variants = artifact.manifest.variants
    size = variants[artifact.manifest.selected].size
    names = [name for name, variant in variants.items() if variant.size == size]
    progress(f"drawing {pictures} reference pictures in torch")
    gate = open_gate(artifact, checkpoint, pictures, size)
    for name in names:
        _judge(artifact_path, name, gate, floors, progress)
    return _require_accepted(select(artifact_path, goal, names, {}, progress))


def _require_accepted(artifact: Artifact) -> Artifact:
    """Raises QualityError where what was selected is only kept, for want of a better one."""
    chosen = artifact.manifest.variants[artifact.manifest.selected]
    if not chosen.accepted or chosen.speed is None:
        raise QualityError(_nothing_reaches(artifact))
    return artifact


def _judge(
    artifact_path: Path, name: str, gate: Gate, floors: Floors, progress: Progress
) -> Variant:
    """The verdict on a variant; one that its runtime does not load on this machine is refused."""
    progress(f"drawing {len(gate.requests)} pictures with {name}")
    artifact = read_artifact(artifact_path)
    runnable, simulated = runnable_variant(artifact, name)
    try:
        return judge(artifact, name, gate, floors, runnable, simulated)
    except (ArtifactError, RuntimeUnavailableError) as error:
        return refuse(artifact, name, str(error))


def _nothing_reaches(artifact: Artifact) -> str:
    """What was kept, and which candidate came closest."""
    manifest = artifact.manifest
    judged = {name: v.quality for name, v in manifest.variants.items() if v.quality}
    kept = f"{manifest.selected} is kept; see {artifact.path / 'quality' / 'report.html'}"
    if not judged:
        return f"no variant makes whole pictures; {kept}"
    name = max(judged, key=lambda name: judged[name].psnr_db_min)
    closest = judged[name]
    return (
        f"no variant reaches the floors (PSNR {closest.floors.psnr_db:g} dB, mean SSIM "
        f"{closest.floors.ssim:g}); the closest is {name} with {closest.psnr_db_min:.1f} dB and "
        f"{closest.ssim_mean:.4f}; {kept}"
    )


class _Candidates:
    """The variants of one checkpoint, on their way into an artifact."""

    def __init__(
        self,
        checkpoint: Path,
        artifact_path: Path,
        options: AutoOptions,
        loras: Sequence[tuple[Path, float]],
        progress: Progress,
    ) -> None:
        self._checkpoint = checkpoint
        self._path = artifact_path
        self._options = options
        self._loras = loras
        self._progress = progress
        self._size = options.variant(options.candidates[0]).size
        self.work = artifact_path.with_name(f".{artifact_path.name}.search")
        self.built: list[str] = []
        self.not_built: dict[str, str] = {}

    def build_and_judge(self) -> None:
        """Every candidate that can be built here, judged by the same pictures."""
        possible = [each for each in self._options.candidates if self._is_possible(each)]
        plain = [each for each in possible if not each.is_quantized]
        if not plain:
            reasons = "; ".join(dict.fromkeys(self.not_built.values()))
            raise RuntimeUnavailableError(f"no candidate can be built here: {reasons}")
        for candidate in plain:
            with self._listed(candidate):
                self._export(self._options.variant(candidate))
        if not self.built:
            raise ArtifactError("; ".join(dict.fromkeys(self.not_built.values())))
        gate = self._open_gate("reference", self._options.pictures, 0)
        for name in self.built:
            self._judge(name, gate)
        quantized = [each for each in possible if each.is_quantized]
        searched = [each for each in quantized if each.is_searched]
        trial = _TrialGates(self._open_gate, TRIALS * self._options.pictures)
        seconds = 60 * self._options.search_minutes / max(len(searched), 1)
        for candidate in quantized:
            with self._listed(candidate):
                if candidate.is_searched:
                    self._build_searched(candidate, gate, trial, seconds)
                else:
                    self._judge(self._export(self._options.variant(candidate)), gate)

    @contextmanager
    def _listed(self, candidate: Candidate) -> Iterator[None]:
        """A candidate whose graph a runtime or a quantizer cannot take is listed; others go on."""
        try:
            yield
        except (ArtifactError, RuntimeUnavailableError) as error:
            self.not_built[self._options.variant(candidate).name] = str(error)

    def _export(self, options: VariantOptions) -> str:
        self._progress(f"exporting {options.name}")
        export(self._checkpoint, self._path, options, self._loras, self._progress)
        if options.name not in self.built:
            self.built.append(options.name)
        return options.name

    def _judge(self, name: str, gate: Gate) -> Variant:
        return _judge(self._path, name, gate, self._options.floors, self._progress)

    def _build_searched(
        self, candidate: Candidate, gate: Gate, trial: "_TrialGates", seconds: float
    ) -> None:
        """Export the fastest set of layers that holds, and passes the gate too where one does.

        Raises ArtifactError where no set is faster, or none was tried in the time.
        """
        trials, ledger = self._trials(candidate, trial)
        end = time.monotonic() + seconds
        refused: list[tuple[str, ...]] = []
        while True:
            found = search(trials, ledger, end - time.monotonic(), self._progress, refused)
            if refused and not found.holds:
                return  # the one refused last stays, with its figures
            if not found.layers:
                raise ArtifactError(_why_no_layers(found))
            options = self._options.variant(candidate, found.layers, found.kept)
            if self._judge(self._export(options), gate).accepted or not found.holds:
                return
            refused.append(found.layers)

    def _is_possible(self, candidate: Candidate) -> bool:
        try:
            candidate.require_packages()
        except RuntimeUnavailableError as error:
            self.not_built[self._options.variant(candidate).name] = str(error)
            return False
        return True

    def _open_gate(self, which: str, pictures: int, first_seed: int) -> Gate:
        self._progress(f"drawing {pictures} {which} pictures in torch")
        artifact = read_artifact(self._path)
        return open_gate(artifact, self._checkpoint, pictures, self._size, first_seed)

    def _trials(self, candidate: Candidate, gates: "_TrialGates") -> tuple[DenoiserTrials, Ledger]:
        """The layers to try, and what was measured of them so far, in a file beside the artifact.

        Raises ArtifactError where the network is not there in fp32.
        """
        options = self._options.variant(candidate)
        fp32 = self._options.variant(Candidate(candidate.runtime, "fp32")).name
        if fp32 not in self.built:
            raise ArtifactError(f"{fp32}, which it is quantized from, could not be built")
        with fused(self._checkpoint, read_artifact(self._path).manifest.source.loras) as weights:
            artifact = _with_calibration(self._path, weights, options, self._progress)
            model = artifact.manifest.model
            graph = artifact.manifest.variants[fp32].networks[model.denoiser]
            self._progress(f"quantizing {model.denoiser} for {candidate.runtime}")
            quantizer = open_quantizer(weights, options, artifact.path, graph)
        feeds = batches(load_rows(artifact.path / options.calibration_file))[-PROBES:]
        self.work.mkdir(parents=True, exist_ok=True)
        ledger = Ledger(
            self.work / f"{candidate.runtime}.jsonl", self._context(artifact, options, gates.count)
        )
        if ledger.resumed:
            self._progress(f"going on with {ledger.resumed} measurements from before")
        trials = DenoiserTrials(
            quantizer, candidate.runtime, kept_precision(options), artifact, fp32, feeds, gates,
            self._options.floors, self.work / candidate.runtime, artifact.path / graph,
        )  # fmt: skip
        return trials, ledger

    def _context(
        self, artifact: Artifact, options: VariantOptions, trial_pictures: int
    ) -> Mapping[str, object]:
        """What the measurements of a search hold for."""
        return {
            "trial_pictures": trial_pictures,
            "source": artifact.manifest.source.model_dump(mode="json", exclude={"path"}),
            "calibration": artifact.manifest.files[options.calibration_file],
            "threads": os.environ.get("OMP_NUM_THREADS", ""),
            "variant": options.model_dump(mode="json"),
            "kept_precision": kept_precision(options),
            "floors": self._options.floors.model_dump(),
            "machine": this_machine().model_dump(),
            "versions": [
                installed_version(package)
                for package in (options.runtime, "nncf", "torch", "vitrine")
            ],
        }


class _TrialGates:
    """The trial pictures in torch, in parts that are drawn when they are first asked for."""

    def __init__(self, open_gate: Callable[[str, int, int], Gate], count: int) -> None:
        self.count = count
        self._open_gate = open_gate
        self._parts: list[Gate] = []

    def __iter__(self) -> Iterator[Gate]:
        for number, first in enumerate(range(0, self.count, TRIALS_AT_ONCE)):
            if number == len(self._parts):
                pictures = min(TRIALS_AT_ONCE, self.count - first)
                self._parts.append(self._open_gate("trial", pictures, SEARCH_SEED + first))
            yield self._parts[number]


def _why_no_layers(found: Found) -> str:
    if any(layer.reason == NO_TIME for layer in found.kept):
        return "the time of the search was up before a set of layers was tried; raise it"
    return "no set of its layers in int8 makes a network call faster here"


def _with_calibration(
    artifact_path: Path, weights: Path, options: VariantOptions, progress: Progress
) -> Artifact:
    """The artifact with the rows that its ranges are measured on, recorded where they lack."""
    artifact = read_artifact(artifact_path)
    if options.calibration_file in artifact.manifest.files:
        return artifact
    with new_artifact(artifact_path) as folder:
        link_files(artifact, folder)
        record_calibration(weights, options, folder, progress)
        files = {"files": hash_files(folder)}
        write_manifest(folder, artifact.manifest.model_copy(update=files))
    return read_artifact(artifact_path)

"""The layers of a denoiser tried on this machine: quantized one by one and in sets."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.artifact import Artifact
from engine.backends.spec import Backend, open_backend
from engine.errors import QualityError
from engine.manifest import Floors, Runtime, TypedPrecision, Variant
from engine.pipeline import open_artifact
from export.gate import Gate
from export.layer_times import layer_times_ms
from export.quantize import Quantizer
from export.work import layer_macs

Feed = Mapping[str, NDArray[np.generic]]
ROUNDS = 15
MOST_OPEN = 16  # trial files at once
BROKEN_DB = -100.0
DULL_DB = -1.0  # at most, where it is the mean SSIM that is too low


class DenoiserTrials:
    """Trials (export/search.py) of one runtime, in a folder of their own."""

    def __init__(
        self,
        quantizer: Quantizer,
        runtime: Runtime,
        kept_precision: TypedPrecision,
        artifact: Artifact,
        float_variant: str,
        feeds: Sequence[Feed],
        gates: Iterable[Gate],
        floors: Floors,
        folder: Path,
        graph: Path,
    ) -> None:
        """`feeds`: network calls of one size; `gates`: pictures that the final gate does not draw.

        The other networks are those of `float_variant`; `graph` is the denoiser in float.
        """
        self.layers: Sequence[str] = quantizer.layers
        self._quantizer = quantizer
        self._runtime = runtime
        self._kept_precision = kept_precision
        self._artifact = artifact
        self._float = artifact.manifest.variants[float_variant]
        self._feeds = feeds
        self._gates = gates
        self._floors = floors
        self._folder = folder
        self._graph = graph
        self._written = 0
        self._exact = self._outputs([], "fp32")

    def work(self) -> dict[str, float]:
        """Multiply-accumulates of each layer in one call."""
        macs = layer_macs(self._graph, self._feeds[0])
        return {layer: macs.get(layer, 0.0) for layer in self.layers}

    def saved_ms(self) -> dict[str, float]:
        """What int8 saves of each layer's own time in one call."""
        before, after = (self._times_ms(layers) for layers in ([], self.layers))
        return {layer: before.get(layer, 0.0) - after.get(layer, 0.0) for layer in self.layers}

    def error(self, layers: Sequence[str]) -> float:
        """Power of the error with these layers in int8 and the rest in fp32, over the signal's.

        The mean of the rows' own ratios, so that a row whose values are small counts as much.
        """
        outputs = self._outputs(layers, "fp32")
        ratios = [
            np.square(output - exact).sum(axis=axes) / np.square(exact).sum(axis=axes)
            for output, exact in zip(outputs, self._exact, strict=True)
            for axes in [tuple(range(1, exact.ndim))]
        ]
        return float(np.mean(ratios))

    def margin_db(self, layers: Sequence[str]) -> float:
        """How far the worst trial picture is above the floor; mean SSIM counts too.

        No more pictures are drawn once one is below.
        """
        trial = self._trial_artifact(self._write(layers))
        margin_db = math.inf
        for part in self._gates:
            try:
                comparison = part.compare(open_artifact(trial, "trial"))
            except QualityError:
                return BROKEN_DB
            margin_db = min(margin_db, min(comparison.psnrs_db) - self._floors.psnr_db)
            if float(np.mean(comparison.ssims)) < self._floors.ssim:
                margin_db = min(margin_db, DULL_DB)
            if margin_db < 0:
                break
        return margin_db

    def call_ms(self, candidates: Sequence[Sequence[str]]) -> list[float]:
        """The median time of a call of each, in turns."""
        times: list[list[float]] = [[] for _ in candidates]
        with ExitStack() as stack:
            backends = [
                stack.enter_context(closing(self._open(layers, self._kept_precision)))
                for layers in candidates
            ]
            for number in range(1 + ROUNDS):
                for backend, taken in zip(backends, times, strict=True):
                    started = time.perf_counter()
                    backend.run(self._feeds[0])
                    if number:  # the first call compiles
                        taken.append(1000 * (time.perf_counter() - started))
        return [float(np.median(taken)) for taken in times]

    def _times_ms(self, layers: Sequence[str]) -> dict[str, float]:
        return layer_times_ms(
            self._runtime, self._write(layers), self._kept_precision, self._feeds[0]
        )

    def _outputs(
        self, layers: Sequence[str], precision: TypedPrecision
    ) -> list[NDArray[np.float32]]:
        with closing(self._open(layers, precision)) as backend:
            (name,) = (tensor.name for tensor in backend.outputs)
            return [backend.run(feed)[name].astype(np.float32) for feed in self._feeds]

    def _open(self, layers: Sequence[str], precision: TypedPrecision) -> Backend:
        model = self._artifact.manifest.model
        return open_backend(
            self._runtime,
            self._write(layers),
            model.networks[model.denoiser],
            precision=precision,
            provider="cpu",
            usual_sizes=model.axis_sizes(model.denoiser, self._float.size),
        )

    def _write(self, layers: Sequence[str]) -> Path:
        """The network with these layers in int8, in a folder that the last trials' are gone from.

        A file has its own name: OpenVINO maps it, so that one which is open may not be written to.
        """
        self._written += 1
        path = self._folder / f"trial-{self._written}{self._quantizer.suffix}"
        self._quantizer.write(layers, path)
        for old in self._folder.glob("trial-*"):
            number = int(old.name.removeprefix("trial-").split(".")[0])  # weights lie beside some
            if number < self._written - MOST_OPEN:
                old.unlink()
        return path

    def _trial_artifact(self, file: Path) -> Artifact:
        """The artifact with the trial file, which lies outside it, as the denoiser of a variant."""
        model = self._artifact.manifest.model
        networks = {**self._float.networks, model.denoiser: str(file.resolve())}
        trial: Variant = self._float.model_copy(
            update={
                "runtime": self._runtime,
                "precision": self._kept_precision,
                "networks": networks,
            }
        )
        manifest = self._artifact.manifest.model_copy(update={"variants": {"trial": trial}})
        return Artifact(self._artifact.path, manifest)

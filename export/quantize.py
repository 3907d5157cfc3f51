"""The denoiser of a variant in int8 or fp8: calibration, the runtime's quantizer, what was kept."""

import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.checkpoint import Checkpoint
from engine.console import Progress
from engine.manifest import KeptLayer, Quantization, Source, TypedPrecision
from engine.networks.lora import fused
from engine.pipeline import open_pipeline
from export.calibrate import batches, calibrate, load_rows, save_rows
from export.layers import layers as graph_layers
from export.quantize_onnx import write_quantized
from export.ranges import Ranges, measure_ranges
from export.recipes import Recipe, recipe
from export.variant import VariantOptions

Feed = Mapping[str, NDArray[np.generic]]


class Quantizer(Protocol):
    """One network, any of whose layers may be quantized or stay float."""

    suffix: str
    """Of the files that it writes."""
    layers: tuple[str, ...]
    """That may be quantized, in the order of the graph."""
    kept: tuple[KeptLayer, ...]
    """That the runtime's form leaves out."""

    def write(self, layers: Collection[str], path: Path) -> None:
        """Write the network with these layers quantized. Raises OptionError for an unknown one."""


class OnnxQuantizer:
    """A float ONNX graph and the Q/DQ form that a runtime reads."""

    suffix = ".onnx"

    def __init__(self, graph: Path, form: Recipe, ranges: Ranges | None) -> None:
        found = graph_layers(graph, form)
        self.layers, self.kept = found.quantizable, found.kept
        self._graph, self._form, self._ranges = graph, form, ranges

    def write(self, layers: Collection[str], path: Path) -> None:
        """Write an ONNX graph, its weights beside it if they are large."""
        write_quantized(self._graph, path, self._ranges, layers, self._form)


def quantize(
    checkpoint: Checkpoint,
    source: Source,
    options: VariantOptions,
    folder: Path,
    graphs: Mapping[str, str],
    progress: Progress,
) -> tuple[dict[str, str], Quantization]:
    """Quantize the denoiser of an artifact `folder` that holds its float graphs.

    The other networks run a few times a picture at most, and stay as they are. Returns the graphs
    with the quantized one in its place. Raises as `open_quantizer`.
    """
    name = checkpoint.model.denoiser
    with fused(checkpoint.path, source.loras) as path:
        if not options.weights_only:
            record_calibration(path, options, folder, progress)
        progress(f"quantizing {name} for {options.runtime}")
        quantizer = open_quantizer(path, options, folder, graphs[name])
    layers = quantizer.layers if options.layers is None else options.layers
    file = f"{options.quantized_folder}/{name}{quantizer.suffix}"
    quantizer.write(layers, folder / file)
    quantization = Quantization(
        network=name,
        calibration=None if options.weights_only else options.calibration_file,
        weights_only=options.weights_only,
        kept_precision=kept_precision(options),
        layers=layers,
        kept=(*options.kept, *quantizer.kept),
    )
    return {**graphs, name: file}, quantization


def record_calibration(
    checkpoint: Path, options: VariantOptions, folder: Path, progress: Progress
) -> None:
    """Record the rows that are not in the artifact `folder` yet, in torch."""
    file = folder / options.calibration_file
    if file.exists():
        return
    progress("calibrating: pictures in torch")
    pipeline = open_pipeline(checkpoint)
    try:
        save_rows(file, calibrate(pipeline, options.calibration, options.size))
    finally:
        pipeline.close()


def open_quantizer(
    checkpoint: Path, options: VariantOptions, folder: Path, graph: str
) -> Quantizer:
    """The quantizer of a runtime for a float graph of an artifact `folder`.

    Raises RuntimeUnavailableError where what it needs is not installed, ArtifactError where the
    graph or the calibration cannot be used.
    """
    if options.weights_only:
        return OnnxQuantizer(folder / graph, _recipe(options), None)
    feeds = batches(load_rows(folder / options.calibration_file))
    if options.runtime == "openvino":
        from export.quantize_openvino import OpenVINOQuantizer

        return OpenVINOQuantizer(folder / graph, feeds)
    ranges = _ranges(checkpoint, options, folder, graph, feeds)
    return OnnxQuantizer(folder / graph, _recipe(options), ranges)


def _recipe(options: VariantOptions) -> Recipe:
    return recipe(options.runtime, options.precision, options.weights_only)


def _ranges(
    checkpoint: Path, options: VariantOptions, folder: Path, graph: str, feeds: Sequence[Feed]
) -> Ranges:
    """The ranges of the layers in float32, whatever the precision of the graph."""
    if options.graph_precision == "fp32":
        return measure_ranges(folder / graph, feeds)
    from engine.checkpoint import read_checkpoint
    from engine.networks.load import load_network
    from export.onnx import export_network

    model = read_checkpoint(checkpoint).model
    name = model.denoiser
    exported = folder / options.graph(name, model.networks[name], "fp32")
    if exported.exists():  # another variant's
        return measure_ranges(exported, feeds)
    sizes = model.symbols(name, options.size) if options.size else None
    with tempfile.TemporaryDirectory() as temporary:
        exact = Path(temporary) / f"{name}.onnx"
        export_network(load_network(checkpoint, name, model.networks[name], "fp32"), exact, sizes)
        return measure_ranges(exact, feeds)


def kept_precision(options: VariantOptions) -> TypedPrecision:
    """What everything else is computed in: on OpenVINO the fastest that this CPU has."""
    if options.runtime == "openvino":
        from engine.backends.openvino import cpu_has_bf16

        return "bf16" if cpu_has_bf16() else "fp32"
    return options.graph_precision

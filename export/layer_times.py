"""What each layer of a network takes, from the runtime's own profile."""

import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.errors import ArtifactError
from engine.manifest import TypedPrecision

Feed = Mapping[str, NDArray[np.generic]]
RUNS = 5  # the least of them counts: what else the machine does only ever adds
_OPENVINO_SUFFIX = "/WithoutBiases"
# What ONNX Runtime's fusions make of a node's name, or of its output's for NCHWc convolutions.
_RENAMED = re.compile(r"(_token_\d+|/\w+/|_nchwc)?_kernel_time$")


def layer_times_ms(
    runtime: str, path: Path, precision: TypedPrecision, feed: Feed
) -> dict[str, float]:
    """Milliseconds of every node that the profile names, in one call of `feed`.

    A node's time is its kernel's alone: reorders and quantizers around it are nodes of their own.
    Raises ArtifactError where the runtime does not run it.
    """
    try:
        if runtime == "openvino":
            return _openvino(path, precision, feed)
        return _onnxruntime(path, feed)
    except Exception as error:  # every runtime has errors of its own
        raise ArtifactError(f"{runtime} cannot profile '{path.name}': {error}") from error


def _openvino(path: Path, precision: TypedPrecision, feed: Feed) -> dict[str, float]:
    import openvino

    from engine.backends.openvino import compile_options, cpu_has_bf16

    core = openvino.Core()
    model = core.read_model(path)
    model.reshape({name: array.shape for name, array in feed.items()})
    options = {**compile_options(precision, cpu_has_bf16()), "PERF_COUNT": "YES"}
    request = core.compile_model(model, "CPU", options).create_infer_request()
    request.infer(dict(feed))
    runs = []
    for _ in range(RUNS):
        request.infer(dict(feed))
        runs.append(
            (info.node_name.removesuffix(_OPENVINO_SUFFIX), 1000 * info.real_time.total_seconds())
            for info in request.profiling_info
        )
    return _least(runs)


def _onnxruntime(path: Path, feed: Feed) -> dict[str, float]:
    import onnx
    import onnxruntime

    graph = onnx.load(path, load_external_data=False).graph
    layers = {node.output[0]: node.name for node in graph.node}
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        for _ in range(1 + RUNS):
            session.run(None, dict(feed))
        events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    times: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = _RENAMED.sub("", event["name"])
            times.setdefault(layers.get(name, name), []).append(event["dur"] / 1000)
    return {name: min(values) for name, values in times.items()}


def _least(runs: Iterable[Iterable[tuple[str, float]]]) -> dict[str, float]:
    """The least of the runs for each name, where names that come twice in a run are added."""
    least: dict[str, float] = {}
    for run in runs:
        total: dict[str, float] = {}
        for name, milliseconds in run:
            total[name] = total.get(name, 0.0) + milliseconds
        for name, milliseconds in total.items():
            least[name] = min(milliseconds, least.get(name, milliseconds))
    return least

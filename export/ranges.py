"""The ranges of activations, measured by running the float graph."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from engine.errors import ArtifactError, OptionError
from export.layers import weighted_nodes
from export.lint_graph import open_graph

Feed = Mapping[str, NDArray[Any]]
Range = NDArray[np.float32]  # [rows, 2]: the least and the greatest value of each row


@dataclass(frozen=True)
class Ranges:
    """What every layer of a graph reads and returns, by the layer's name.

    Names are those of layers, not of tensors: the fp16 export of a network has its own tensors.
    """

    inputs: Mapping[str, Range]
    outputs: Mapping[str, Range]

    def of_input(self, layer: str) -> tuple[float, float]:
        """Least and greatest value, 0 included. Raises OptionError, ArtifactError."""
        return _span(self.inputs, layer)

    def of_output(self, layer: str) -> tuple[float, float]:
        """Least and greatest value, 0 included. Raises OptionError, ArtifactError."""
        return _span(self.outputs, layer)


def _span(ranges: Mapping[str, Range], layer: str) -> tuple[float, float]:
    """Every row counts: to clip rare extremes is better on average, and ruins the pictures of the
    requests whose extremes they are.
    """
    if layer not in ranges:
        raise OptionError(
            f"the ranges have no layer '{layer}'; measure them on the graph that is quantized"
        )
    low, high = float(ranges[layer][:, 0].min()), float(ranges[layer][:, 1].max())
    if not np.isfinite([low, high]).all() or low == high == 0:
        raise ArtifactError(
            f"the range of layer '{layer}' must be finite and not all zero, got "
            f"{low:.6g}..{high:.6g}; keep it in float, or calibrate with other rows"
        )
    return min(low, 0.0), max(high, 0.0)


def measure_ranges(graph: Path, feeds: Iterable[Feed]) -> Ranges:
    """Run calibration batches through a float32 graph in ONNX Runtime, which reduces every tensor.

    Raises ArtifactError where it is no ONNX model or computes no finite numbers, OptionError
    where there are no batches or the graph is not float32.
    """
    scope = open_graph(graph).main
    nodes = weighted_nodes(scope)
    for node in nodes:
        if scope.dtype(node.input[1]) != TensorProto.FLOAT:
            raise OptionError(
                f"'{graph}': layer '{node.name}' is not float32; measure ranges on the fp32 export"
            )
    names = sorted({name for node in nodes for name in (node.input[0], node.output[0])})
    rows = _measure(graph, names, feeds)
    return Ranges(
        inputs={node.name: rows[node.input[0]] for node in nodes},
        outputs={node.name: rows[node.output[0]] for node in nodes},
    )


def _measure(graph: Path, names: list[str], feeds: Iterable[Feed]) -> dict[str, Range]:
    model = onnx.load(graph, load_external_data=False)
    outputs = [value.name for value in model.graph.output]
    _reduce(model, names)
    session = _session(model, graph.parent)
    batches = []
    for feed in feeds:
        results = session.run(None, dict(feed))
        _check_finite(graph, outputs, results)
        batches.append(np.stack(results[len(outputs) :], axis=-1))  # [rows, 2 * names]
    if not batches:
        raise OptionError("calibration needs at least 1 batch of rows, got 0")
    rows = np.concatenate(batches).astype(np.float32)
    return {name: rows[:, 2 * index : 2 * index + 2] for index, name in enumerate(names)}


def _check_finite(graph: Path, outputs: list[str], results: list[NDArray[Any]]) -> None:
    for name, result in zip(outputs, results, strict=False):
        if not np.isfinite(result).all():
            raise ArtifactError(
                f"'{graph}' computes NaN or infinite values in '{name}' from calibration rows; "
                "calibrate with rows that the network can run"
            )


def _reduce(model: ModelProto, names: list[str]) -> None:
    """Make the extremes of each row of some tensors outputs of the graph."""
    graph, constants = model.graph, {"rows/axis": [1], "rows/rest": [-1]}
    for name, values in constants.items():
        graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [1], values))
    graph.node.extend(
        [
            helper.make_node("Shape", [graph.input[0].name], ["rows/batch"], start=0, end=1),
            helper.make_node("Concat", ["rows/batch", "rows/rest"], ["rows/shape"], axis=0),
        ]
    )
    for name in names:
        rows = f"{name}/rows"  # [B, ..]: a layer may read rows and tokens on one axis
        graph.node.append(helper.make_node("Reshape", [name, "rows/shape"], [rows]))
        for op in ("ReduceMin", "ReduceMax"):
            output = f"{name}/{op}"
            graph.node.append(helper.make_node(op, [rows, "rows/axis"], [output], keepdims=0))
            graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, ["rows"]))


def _session(model: ModelProto, folder: Path) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    key = "session.model_external_initializers_file_folder_path"
    options.add_session_config_entry(key, str(folder))
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )

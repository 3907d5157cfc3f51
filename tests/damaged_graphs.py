"""What tests do to the networks of an artifact, as a bad quantizer or exporter would."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from damage import read_manifest
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, helper, numpy_helper

from engine.artifact import hash_files, write_manifest


def sign(artifact: Path) -> None:
    """Put the hashes of an artifact's files as they are now into its manifest."""
    manifest = read_manifest(artifact)
    write_manifest(artifact, manifest.model_copy(update={"files": hash_files(artifact)}))


def multiply(artifact: Path, graph: str, constant: str, factor: float) -> None:
    """Multiply the one constant whose name ends so, and sign the artifact anew."""

    def change(graph: GraphProto) -> None:
        (tensor,) = (each for each in graph.initializer if each.name.endswith(constant))
        values = numpy_helper.to_array(tensor)
        scaled = values * np.asarray(factor, values.dtype)
        tensor.CopyFrom(numpy_helper.from_array(scaled, tensor.name))

    _edit(artifact, graph, change)


def fill(artifact: Path, graph: str, constant: str, value: float) -> None:
    """The same, with one value everywhere."""

    def change(graph: GraphProto) -> None:
        (tensor,) = (each for each in graph.initializer if each.name.endswith(constant))
        values = np.full_like(numpy_helper.to_array(tensor), value)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    _edit(artifact, graph, change)


def add_to_output(artifact: Path, graph: str, values: NDArray[np.float32]) -> None:
    """Add a constant to what a network returns, and sign the artifact anew."""
    _edit(
        artifact,
        graph,
        lambda graph: _append(
            graph,
            lambda whole, output: [
                _constant("added", values),
                helper.make_node("Add", [whole, "added"], [output]),
            ],
        ),
    )


def add_batch_mean_to_output(artifact: Path, graph: str, factor: float) -> None:
    """Add `factor` times the mean over the rows of a call, and sign the artifact anew."""
    _edit(
        artifact,
        graph,
        lambda graph: _append(
            graph,
            lambda whole, output: [
                _constant("batch_axis", np.array([0])),
                _constant("factor", np.array(factor, np.float32)),
                helper.make_node("ReduceMean", [whole, "batch_axis"], ["batch_mean"], keepdims=1),
                helper.make_node("Mul", ["batch_mean", "factor"], ["added"]),
                helper.make_node("Add", [whole, "added"], [output]),
            ],
        ),
    )


def _edit(artifact: Path, file: str, change: Callable[[GraphProto], None]) -> None:
    model = onnx.load(artifact / file)
    change(model.graph)
    onnx.save(model, artifact / file)
    sign(artifact)


def _append(graph: GraphProto, nodes: Callable[[str, str], list[NodeProto]]) -> None:
    """Nodes between what was the output of a graph and its output."""
    (output,) = (value.name for value in graph.output)
    (producer,) = (node for node in graph.node if output in node.output)
    producer.output[list(producer.output).index(output)] = "whole"
    graph.node.extend(nodes("whole", output))


def _constant(name: str, values: NDArray[np.generic]) -> NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(values))

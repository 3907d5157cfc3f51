"""A float graph with some of its layers in explicit QuantizeLinear / DequantizeLinear form."""

import os
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from engine.errors import ArtifactError, OptionError
from export.lint_graph import WEIGHTED
from export.lint_layers import output_axis
from export.ranges import Ranges
from export.recipes import Recipe
from export.scales import activation_scale, quantize_weight

LARGEST_FILE_BYTES = 1_500_000_000  # protobuf ends at 2 GiB; larger weights lie beside the graph


def write_quantized(
    graph: Path, out: Path, ranges: Ranges | None, layers: Collection[str], recipe: Recipe
) -> None:
    """Write `graph` with these layers quantized, above 1.5 GB with `<out>.data` beside it.

    `ranges` are none where a recipe quantizes weights only. Raises OptionError where a layer is
    not in the graph or has no ranges, ArtifactError where the graph cannot be read or a range is
    of no use; `out` then stays as it was.
    """
    if recipe.activations is not None and ranges is None:
        raise OptionError("ranges are needed to quantize activations; call measure_ranges")
    model = _load(graph)
    rewrite = _Rewrite(model.graph, ranges, recipe)
    for node in _chosen(model.graph, layers):
        rewrite.quantize(node)
    rewrite.finish()
    _save(model, out)


class _Rewrite:
    """The graph while layers are replaced: which tensors have their pair already."""

    def __init__(self, graph: GraphProto, ranges: Ranges | None, recipe: Recipe) -> None:
        self._graph = graph
        self._ranges = ranges
        self._recipe = recipe
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._dequantized: dict[tuple[str, int | None], str] = {}  # by tensor and axis
        self._first: list[NodeProto] = []  # nodes of the new graph that stand before all others
        self._after: dict[str, list[NodeProto]] = {}  # ... and behind the producer of a tensor

    def quantize(self, node: NodeProto) -> None:
        """Put Q/DQ on the weight and, as the recipe wants, on what the layer reads and returns."""
        source, result = node.input[0], node.output[0]
        scale_type = numpy_helper.to_array(self._constants[node.input[1]]).dtype
        node.input[1] = self._weight(node)
        if self._ranges is None or self._recipe.activations is None:
            return
        if (source, None) not in self._dequantized:
            span = self._ranges.of_input(node.name)
            self._pair(source, source, f"{source}/dequantized", span, scale_type)
        node.input[0] = self._dequantized[source, None]
        if self._recipe.outputs:
            node.output[0] = f"{result}/float"
            span = self._ranges.of_output(node.name)
            self._pair(result, node.output[0], result, span, scale_type)

    def _weight(self, node: NodeProto) -> str:
        """The dequantized weight of a layer; layers that share a weight share it."""
        name = node.input[1]
        axis = output_axis(node, len(self._constants[name].dims))
        if (name, axis) not in self._dequantized:
            values = numpy_helper.to_array(self._constants[name])
            stem = name if (name, 1 - axis) not in self._dequantized else f"{name}/{axis}"
            quantized, scale = quantize_weight(values, axis, self._recipe.weights)
            inputs = [
                self._constant(f"{stem}/quantized", quantized),
                self._constant(f"{stem}/scale", scale),
                self._constant(f"{stem}/zero_point", np.zeros(scale.shape, quantized.dtype)),
            ]
            self._first.append(_node("DequantizeLinear", inputs, f"{stem}/dequantized", axis=axis))
            self._dequantized[name, axis] = f"{stem}/dequantized"
        return self._dequantized[name, axis]

    def _pair(
        self, tensor: str, read: str, written: str, span: tuple[float, float], kind: np.dtype[Any]
    ) -> None:
        """Quantize and dequantize a tensor, once for all layers."""
        assert self._recipe.activations is not None
        scale, zero_point = activation_scale(span, self._recipe.activations, kind)
        parameters = [
            self._constant(f"{tensor}/scale", scale),
            self._constant(f"{tensor}/zero_point", zero_point),
        ]
        quantized = f"{tensor}/quantized"
        self._after[read] = [
            _node("QuantizeLinear", [read, *parameters], quantized),
            _node("DequantizeLinear", [quantized, *parameters], written),
        ]
        self._dequantized[tensor, None] = written

    def _constant(self, name: str, values: NDArray[Any]) -> str:
        kind = helper.np_dtype_to_tensor_dtype(values.dtype)
        tensor = helper.make_tensor(name, kind, values.shape, values.tobytes(), raw=True)
        self._graph.initializer.append(tensor)
        return name

    def finish(self) -> None:
        """Put the new nodes in their places, and drop the float weights that nothing reads."""
        nodes = [*self._first]
        for value in self._graph.input:
            nodes.extend(self._after.get(value.name, ()))
        for node in self._graph.node:
            nodes.append(node)
            for name in node.output:
                nodes.extend(self._after.get(name, ()))
        del self._graph.node[:]
        self._graph.node.extend(nodes)
        read = set(_read(self._graph))
        kept = [tensor for tensor in self._graph.initializer if tensor.name in read]
        del self._graph.initializer[:]
        self._graph.initializer.extend(kept)


def _node(op: str, inputs: list[str], output: str, axis: int | None = None) -> NodeProto:
    """A node with the name of its tensor: TensorRT refuses two that are named alike."""
    node = helper.make_node(op, inputs, [output], name=f"{op}:{output}")
    if axis is not None:
        node.attribute.append(helper.make_attribute("axis", axis))
    return node


def _chosen(graph: GraphProto, layers: Collection[str]) -> list[NodeProto]:
    """The nodes of these layers, in the order of the graph."""
    constants = {tensor.name for tensor in graph.initializer}
    weighted = [
        node for node in graph.node if node.op_type in WEIGHTED and node.input[1] in constants
    ]
    unknown = set(layers).difference(node.name for node in weighted)
    if unknown:
        raise OptionError(
            f"layer '{min(unknown)}' is not in the graph, or has no constant weight; it has "
            f"{len(weighted)} layers: {', '.join(node.name for node in weighted[:3])} ..."
        )
    chosen = set(layers)
    return [node for node in weighted if node.name in chosen]


def _read(graph: GraphProto) -> Iterator[str]:
    """Every tensor that something reads, inside the bodies of If, Loop and Scan too."""
    yield from (value.name for value in graph.output)
    for node in graph.node:
        yield from node.input
        for entry in node.attribute:
            for body in (entry.g, *entry.graphs):
                yield from _read(body)


def _load(path: Path) -> ModelProto:
    """A model with its weights, all of them initialisers."""
    try:
        model = onnx.load(path)
    except (OSError, DecodeError, onnx.checker.ValidationError) as error:
        raise ArtifactError(
            f"'{path}' cannot be read: {error}; name an .onnx file, with its data beside it"
        ) from error
    for node in [node for node in model.graph.node if node.op_type == "Constant"]:
        if node.attribute[0].name == "value":
            tensor = model.graph.initializer.add()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
            model.graph.node.remove(node)
    return model


def _save(model: ModelProto, out: Path) -> None:
    """Write beside `out`, then rename: there is never half a graph."""
    size_bytes = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    data = f"{out.name}.data"
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        partial = Path(folder) / out.name
        if size_bytes > LARGEST_FILE_BYTES:
            onnx.save(model, partial, save_as_external_data=True, location=data)
            os.replace(partial.with_name(data), out.with_name(data))
        else:
            onnx.save(model, partial)
            out.with_name(data).unlink(missing_ok=True)
        os.replace(partial, out)

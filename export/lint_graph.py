"""An ONNX graph as the lint reads it: every node, data types where known, constants on demand."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from engine.errors import ArtifactError
from export.finding import label

ONNX_DOMAINS = ("", "ai.onnx")
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
LEAST_INPUTS = {
    "Attention": 1, "Conv": 2, "ConvTranspose": 2, "DequantizeLinear": 2, "Gemm": 2,
    "GroupNormalization": 1, "InstanceNormalization": 1, "LayerNormalization": 1,
    "LogSoftmax": 1, "MatMul": 2, "MatMulNBits": 1, "QuantizeLinear": 2, "Sigmoid": 1,
    "Softmax": 1,
}  # fmt: skip
LARGEST_SHAPE_BYTES = 65536  # no shape, axis or padding that inference reads is larger
WEIGHTED = ("Conv", "ConvTranspose", "MatMul", "Gemm")
Dimension = int | str | None  # a size, a symbolic name, or not known
_KEEPS_CONSTANT = {
    "Cast", "DequantizeLinear", "Identity", "QuantizeLinear", "Reshape", "Squeeze", "Transpose",
    "Unsqueeze",
}  # fmt: skip


@dataclass(eq=False)
class Scope:
    """One graph body, the main one or that of an If, Loop or Scan; names resolve outwards."""

    folder: Path
    parent: "Scope | None" = None
    nodes: list[NodeProto] = field(default_factory=list)
    dtypes: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, tuple[Dimension, ...]] = field(default_factory=dict)
    constants: dict[str, TensorProto] = field(default_factory=dict)
    producers: dict[str, NodeProto] = field(default_factory=dict)
    consumers: dict[str, list[NodeProto]] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)

    def dtype(self, name: str) -> int | None:
        """The TensorProto data type of a tensor; None where it cannot be inferred."""
        if name in self.dtypes:
            return self.dtypes[name]
        return self.parent.dtype(name) if self.parent else None

    def node_dtypes(self, node: NodeProto) -> set[int]:
        """The known data types of what a node reads and writes."""
        found = {self.dtype(name) for name in (*node.input, *node.output) if name}
        return {dtype for dtype in found if dtype is not None}

    def shape(self, name: str) -> tuple[Dimension, ...] | None:
        if name in self.shapes:
            return self.shapes[name]
        return self.parent.shape(name) if self.parent else None

    def producer(self, name: str) -> NodeProto | None:
        if name in self.producers:
            return self.producers[name]
        return self.parent.producer(name) if self.parent else None

    def dequantizer(self, name: str) -> NodeProto | None:
        """The DequantizeLinear that writes a tensor, if one does."""
        node = self.producer(name)
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def constant(self, name: str) -> TensorProto | None:
        if name in self.constants:
            return self.constants[name]
        return self.parent.constant(name) if self.parent else None

    def is_constant(self, name: str) -> bool:
        """Whether a tensor is the same in every run: an initialiser, or made of ones only."""
        if self.constant(name) is not None:
            return True
        node = self.producer(name)
        return (
            node is not None
            and node.op_type in _KEEPS_CONSTANT
            and all(self.is_constant(source) for source in node.input if source)
        )

    def values(self, name: str) -> NDArray[np.float64] | None:
        """The values of a constant as float64, read from its external file if need be.

        Raises ArtifactError where that file is missing or short.
        """
        tensor = self.constant(name)
        if tensor is None:
            return None
        try:
            values = onnx.numpy_helper.to_array(tensor, str(self.folder))
        except (OSError, ValueError, onnx.checker.ValidationError) as error:
            raise ArtifactError(
                f"'{self.folder}': external data of tensor '{name}' cannot be read: {error}; "
                "keep an ONNX file beside its data, or export it again"
            ) from error
        return values.astype(np.float64)


@dataclass(frozen=True)
class Graph:
    """A model's scopes, the main one first; local functions are inlined."""

    opset: int
    ir_version: int
    scopes: tuple[Scope, ...]

    @property
    def main(self) -> Scope:
        return self.scopes[0]

    def nodes(self, *ops: str) -> Iterator[tuple[Scope, NodeProto]]:
        """Every ONNX node of these ops, or every node at all, with the scope it stands in."""
        for scope in self.scopes:
            for node in scope.nodes:
                if not ops or (node.domain in ONNX_DOMAINS and node.op_type in ops):
                    yield scope, node


def open_graph(path: Path) -> Graph:
    """Read a model without its external weights.

    Raises ArtifactError where the file is missing or no ONNX model.
    """
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except OSError as error:
        raise ArtifactError(
            f"'{path}' cannot be read: {error.strerror}; name an .onnx file"
        ) from error
    except DecodeError as error:
        raise ArtifactError(
            f"'{path}' is no ONNX model ({error}); export it again, with external data above 2 GB"
        ) from error
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    opset = opsets.get("", opsets.get("ai.onnx"))
    if opset is None or not model.graph.output:
        raise ArtifactError(
            f"'{path}' is no ONNX model: it has no outputs or no opset; name an .onnx file"
        )
    _drop_weights(model)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=False, data_prop=False)
    scopes = tuple(_scopes(inferred.graph, path.parent))
    graph = Graph(opset=opset, ir_version=model.ir_version, scopes=scopes)
    for _, node in graph.nodes():
        least = LEAST_INPUTS.get(node.op_type, 0)
        if len(node.input) < least:
            raise ArtifactError(
                f"'{path}' is no valid ONNX model: {label(node)} must have at least {least} "
                f"inputs, got {len(node.input)}; export it again"
            )
    return graph


def attribute(node: NodeProto, name: str, default: int) -> int:
    """A whole-number attribute."""
    return next((entry.i for entry in node.attribute if entry.name == name), default)


def _drop_weights(model: ModelProto) -> None:
    """Forget the weights inside the file: inlining and inference would copy them several times."""
    quantizers = (node for node in model.graph.node if node.op_type in QUANTIZERS)
    kept = {name for node in quantizers for name in node.input[1:]}  # scales and zero points
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) > LARGEST_SHAPE_BYTES and tensor.name not in kept:
            tensor.ClearField("raw_data")


def _scopes(graph: GraphProto, folder: Path, parent: Scope | None = None) -> Iterator[Scope]:
    scope = Scope(folder=folder, parent=parent, nodes=list(graph.node))
    for value in (*graph.value_info, *graph.input, *graph.output):
        _describe(scope, value)
    for tensor in graph.initializer:
        _hold(scope, tensor.name, tensor)
    for node in graph.node:
        for name in node.output:
            scope.producers[name] = node
        for name in dict.fromkeys(node.input):
            scope.consumers.setdefault(name, []).append(node)
        if node.op_type == "Constant" and node.attribute[0].type == AttributeProto.TENSOR:
            _hold(scope, node.output[0], node.attribute[0].t)
    scope.inputs = [value.name for value in graph.input if value.name not in scope.constants]
    scope.outputs = [value.name for value in graph.output]
    yield scope
    for node in graph.node:
        for body in _bodies(node):
            yield from _scopes(body, folder, scope)


def _bodies(node: NodeProto) -> Iterator[GraphProto]:
    for entry in node.attribute:
        if entry.type == AttributeProto.GRAPH:
            yield entry.g
        yield from entry.graphs


def _hold(scope: Scope, name: str, tensor: TensorProto) -> None:
    scope.constants[name] = tensor
    scope.dtypes[name] = tensor.data_type
    scope.shapes[name] = tuple(tensor.dims)


def _describe(scope: Scope, value: ValueInfoProto) -> None:
    tensor = value.type.tensor_type
    if tensor.elem_type:
        scope.dtypes[value.name] = tensor.elem_type
    if tensor.HasField("shape"):
        scope.shapes[value.name] = tuple(
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
            for dim in tensor.shape.dim
        )

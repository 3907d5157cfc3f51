"""The form of QuantizeLinear and DequantizeLinear that TensorRT reads."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto

from export.finding import Finding, error, warning
from export.lint_graph import QUANTIZERS, Graph, Scope, attribute

_TYPES = (
    TensorProto.INT8, TensorProto.FLOAT8E4M3FN, TensorProto.INT4, TensorProto.FLOAT4E2M1,
)  # fmt: skip
_REQUANTIZE = (
    "quantize with activation_type=QInt8, weight_type=QInt8, ActivationSymmetric, WeightSymmetric"
)


def quantization_findings(graph: Graph) -> Iterator[Finding]:
    """Types, zero points and scales of every QuantizeLinear and DequantizeLinear."""
    yield from _names(graph)
    for scope, node in graph.nodes(*QUANTIZERS):
        if not _mirrors_its_quantizer(scope, node):
            yield from _pair(scope, node)


def _names(graph: Graph) -> Iterator[Finding]:
    """TensorRT gives a quantize layer its node's name, and refuses one that is taken."""
    seen: set[str] = set()
    for _, node in graph.nodes():
        if node.name in seen and node.op_type in QUANTIZERS:
            yield error(
                "duplicate-name",
                node,
                "an earlier node has the same name: TensorRT refuses the second",
                "give every node its own name, or none",
            )
        if node.name:
            seen.add(node.name)


def _mirrors_its_quantizer(scope: Scope, node: NodeProto) -> bool:
    """Whether a DequantizeLinear repeats the scale and zero point of the Q before it."""
    before = scope.producer(node.input[0])
    return (
        node.op_type == "DequantizeLinear"
        and before is not None
        and before.op_type == "QuantizeLinear"
        and list(before.input[1:]) == list(node.input[1:])
    )


def quantized_type(scope: Scope, node: NodeProto) -> int | None:
    """The integer or float8 type of a Q or DQ node."""
    if len(node.input) > 2 and node.input[2]:
        return scope.dtype(node.input[2])
    if node.op_type == "DequantizeLinear":
        return scope.dtype(node.input[0])
    return attribute(node, "output_dtype", 0) or TensorProto.UINT8  # ONNX's default


def _pair(scope: Scope, node: NodeProto) -> Iterator[Finding]:
    """Type, zero point and scale."""
    kind = quantized_type(scope, node)
    if kind == TensorProto.UINT8:
        yield error(
            "uint8-zero-point", node, "TensorRT reads UINT8 as INT8: wrong numbers", _REQUANTIZE
        )
    elif kind == TensorProto.INT32:
        yield error(
            "int32-bias-qdq",
            node,
            "TensorRT dequantizes no int32: a bias stays float",
            "quantize with QuantizeBias=False",
        )
    elif kind is not None and kind not in _TYPES:
        yield error(
            "quantized-type",
            node,
            "the quantized type must be int8, int4, float8e4m3fn or float4e2m1, "
            f"got {type_name(kind)}",
            _REQUANTIZE,
        )
    elif len(node.input) > 2 and node.input[2]:
        zero_point = scope.values(node.input[2])
        if zero_point is not None and np.any(zero_point != 0):
            yield error(
                "zero-point-not-zero",
                node,
                f"zero points must be 0, got {_example(zero_point[zero_point != 0])}",
                _REQUANTIZE,
            )
    yield from _scale(scope, node)


def _scale(scope: Scope, node: NodeProto) -> Iterator[Finding]:
    scale = scope.values(node.input[1])
    if scale is not None and not np.all(scale > 0):
        yield error(
            "scale-not-positive",
            node,
            f"scales must be positive, got {_example(scale[~(scale > 0)])}",
            "calibrate with data in which no channel is all zero, or leave the layer float",
        )
    yield from scale_type_findings(scope, node)
    if scale is None or scale.size == 1 or scope.is_constant(node.input[0]):
        return
    if node.op_type == "QuantizeLinear" and not attribute(node, "block_size", 0):
        yield warning(
            "activation-axis",
            node,
            f"an activation has one scale in TensorRT's int8 kernels, here {scale.size}",
            "quantize activations per tensor; only weights per channel",
        )


def scale_type_findings(scope: Scope, node: NodeProto) -> Iterator[Finding]:
    """A scale has the data type of what it scales, or the layers behind it change theirs."""
    if node.op_type != "QuantizeLinear":
        return
    data, scale = scope.dtype(node.input[0]), scope.dtype(node.input[1])
    if data is not None and scale is not None and data != scale:
        yield error(
            "scale-dtype",
            node,
            f"a scale must have its tensor's data type, {type_name(data)}, got {type_name(scale)}",
            f"cast the scales to {type_name(data)}, or quantize the float32 export and convert",
        )


def _example(values: NDArray[np.float64]) -> str:
    more = f" and {values.size - 1} more" if values.size > 1 else ""
    return f"{values.flat[0]:.6g}{more}"


def type_name(kind: int) -> str:
    """`FLOAT16` as `float16`; ONNX's FLOAT and DOUBLE by their size."""
    name = str(TensorProto.DataType.Name(kind)).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)

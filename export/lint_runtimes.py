"""What ONNX Runtime and OpenVINO refuse on a CPU, or run slowly.

Each rule was established by loading such a graph in onnxruntime 1.32 and openvino 2026.4.
"""

from collections.abc import Iterator

import onnx
from onnx import NodeProto, TensorProto

from engine.errors import RuntimeUnavailableError
from export.finding import Finding, error, first_of, warning
from export.lint_graph import ONNX_DOMAINS, Graph, Scope
from export.lint_quantization import quantized_type, scale_type_findings

SCALE_MAY_DIFFER_OPSET = 23  # from here on ONNX gives scale and tensor a data type each
# Ops that ONNX Runtime's CPU provider has for bfloat16: moves, and what it decomposes to moves.
BF16_ONNXRUNTIME = {
    "Cast", "Clip", "Concat", "Constant", "Flatten", "Gather", "Identity", "LayerNormalization",
    "Pad", "Reshape", "Shape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
}  # fmt: skip
UNSUPPORTED_OPENVINO = {
    "Bernoulli", "Col2Im", "DeformConv", "Det", "MaxUnpool", "MelWeightMatrix",
}  # fmt: skip
_OWN_DOMAINS = {
    "onnxruntime": (*ONNX_DOMAINS, "ai.onnx.ml", "ai.onnx.training", "com.microsoft"),
    "openvino": (*ONNX_DOMAINS, "com.microsoft", "org.openvinotoolkit"),
}
_CONVOLUTIONS = ("Conv", "ConvTranspose")
_FUSED_INTO_QUANTIZER = ("Clip", "Relu")


def onnxruntime_findings(graph: Graph) -> Iterator[Finding]:
    """Versions, kernels that the CPU provider lacks, and quantization that does not pay."""
    yield from _versions(graph)
    yield from _foreign(graph, "onnxruntime")
    yield from _bfloat16(graph)
    for scope, node in graph.nodes(*_CONVOLUTIONS):
        if TensorProto.DOUBLE in scope.node_dtypes(node):
            yield error(
                "float64",
                node,
                f"ONNX Runtime has no float64 {node.op_type}",
                "export the network in float32",
            )
    yield from _float16(graph)
    if graph.opset < SCALE_MAY_DIFFER_OPSET:
        for scope, node in graph.nodes("QuantizeLinear"):
            yield from scale_type_findings(scope, node)
    yield from _symmetric(graph)
    for scope, node in graph.nodes("Conv"):
        yield from _qlinear_pattern(scope, node)
    yield from _matmul_nbits(graph)


def openvino_findings(graph: Graph) -> Iterator[Finding]:
    """Ops without a conversion, and 16-bit quantization."""
    yield from _foreign(graph, "openvino")
    for _, node in graph.nodes(*UNSUPPORTED_OPENVINO):
        yield error(
            "unsupported-op",
            node,
            f"OpenVINO has no conversion for {node.op_type}",
            "rewrite the module so that it exports without this op, or choose another target",
        )


def _versions(graph: Graph) -> Iterator[Finding]:
    """Ask the installed ONNX Runtime: it does not say which opsets it reads."""
    refusal = _refusal(graph.opset, 8)
    if refusal:
        yield error(
            "opset",
            f"opset {graph.opset}",
            f"the installed ONNX Runtime refuses it: {refusal}",
            "export with opset_version=20, or upgrade onnxruntime",
        )
    refusal = _refusal(20, graph.ir_version)
    if refusal:
        yield error(
            "ir-version",
            f"IR version {graph.ir_version}",
            f"the installed ONNX Runtime refuses it: {refusal}",
            "save the model with an older onnx, or upgrade onnxruntime",
        )


def _refusal(opset: int, ir_version: int) -> str:
    """Why ONNX Runtime does not load one Identity of this version; empty where it does."""
    try:
        import onnxruntime
        from onnxruntime.capi.onnxruntime_pybind11_state import Fail
    except ImportError:
        raise RuntimeUnavailableError(
            "onnxruntime is not installed; pip install 'vitrine[cpu]'"
        ) from None
    onnxruntime.disable_telemetry_events()
    value = [onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["y"])], "probe", value[:1], value[1:]
    )
    model = onnx.helper.make_model(
        graph, ir_version=ir_version, opset_imports=[onnx.helper.make_opsetid("", opset)]
    )
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    except Fail as failure:  # the last sentence says what it supports
        return str(failure).strip(" .\n").rsplit(") ", 1)[-1].rsplit(". ", 1)[-1]
    return ""


def _foreign(graph: Graph, runtime: str) -> Iterator[Finding]:
    for _, node in graph.nodes():
        if node.domain not in _OWN_DOMAINS[runtime]:
            yield error(
                "foreign-domain",
                node,
                f"no op of domain '{node.domain}' is known to this runtime",
                "export with ONNX's own ops",
            )


def _bfloat16(graph: Graph) -> Iterator[Finding]:
    for scope, node in graph.nodes():
        moves = node.op_type in BF16_ONNXRUNTIME and node.domain in ONNX_DOMAINS
        if TensorProto.BFLOAT16 in scope.node_dtypes(node) and not moves:
            yield error(
                "bf16-kernel",
                node,
                f"ONNX Runtime has no bfloat16 {node.op_type} on a CPU",
                "export in float32, or choose OpenVINO with INFERENCE_PRECISION_HINT bf16",
            )


def _float16(graph: Graph) -> Iterator[Finding]:
    half = [
        node
        for scope, node in graph.nodes()
        if TensorProto.FLOAT16 in scope.node_dtypes(node)
        and node.op_type not in ("Cast", "Constant")
    ]
    if half:
        yield warning(
            "fp16-casts",
            first_of(half),
            "ONNX Runtime computes float16 through casts on a CPU: right, but not faster",
            "export the CPU variant in float32",
        )


def _symmetric(graph: Graph) -> Iterator[Finding]:
    """Symmetric S8S8 is what TensorRT needs; x86 has instructions for U8S8."""
    signed = [
        node
        for scope, node in graph.nodes("QuantizeLinear")
        if quantized_type(scope, node) == TensorProto.INT8 and not scope.is_constant(node.input[0])
    ]
    if signed:
        yield warning(
            "s8s8-qdq",
            first_of(signed),
            "activations in int8 run slower than float32 on x86",
            "quantize the CPU variant with activation_type=QUInt8",
        )


def _qlinear_pattern(scope: Scope, node: NodeProto) -> Iterator[Finding]:
    """QLinearConv replaces DQ -> Conv (-> Relu) -> Q, and nothing less."""
    if any(scope.dequantizer(name) is None for name in node.input[:2]):
        return
    readers = scope.consumers.get(node.output[0], [])
    while len(readers) == 1 and readers[0].op_type in _FUSED_INTO_QUANTIZER:
        readers = scope.consumers.get(readers[0].output[0], [])
    if not readers or any(reader.op_type != "QuantizeLinear" for reader in readers):
        yield warning(
            "qlinear-pattern",
            node,
            "a quantized Conv without QuantizeLinear behind it runs in float32",
            "quantize its output too: OpTypesToExcludeOutputQuantization=[]",
        )


def _matmul_nbits(graph: Graph) -> Iterator[Finding]:
    packed = [node for _, node in graph.nodes() if node.op_type == "MatMulNBits"]
    if packed:
        yield warning(
            "matmul-nbits",
            first_of(packed),
            "MatMulNBits saves size, not time",
            "for speed, quantize Linear layers dynamically to int8",
        )

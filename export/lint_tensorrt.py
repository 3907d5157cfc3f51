"""What TensorRT's parser and builder refuse in a graph, quantization apart.

Established with the parser and builder of TensorRT-RTX 1.7.1 unless a rule says otherwise.
"""

from collections.abc import Iterator

import onnx
from onnx import NodeProto, TensorProto

from export.finding import Finding, error, warning
from export.lint_graph import ONNX_DOMAINS, QUANTIZERS, Graph, Scope, attribute

OPSETS = range(18, 23)
BF16_CONV_OPSET = 22
HEAD_SIZES = range(16, 257)
HEAVY = ("Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul")
# Every op of ONNX's own domain, opset 28, that the parser has no importer for.
UNSUPPORTED = {
    "AffineGrid", "Bernoulli", "BitCast", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr",
    "BitwiseXor", "CenterCropPad", "Col2Im", "Compress", "ConcatFromSequence", "ConvInteger",
    "CumProd", "DFT", "DeformConv", "Det", "DynamicQuantizeLinear", "ImageDecoder",
    "MatMulInteger", "MaxRoiPool", "MaxUnpool", "MelWeightMatrix", "Multinomial",
    "NegativeLogLikelihoodLoss", "Optional", "OptionalGetElement", "OptionalHasElement",
    "QLinearConv", "QLinearMatMul", "RegexFullMatch", "SequenceAt", "SequenceConstruct",
    "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength", "SequenceMap",
    "SoftmaxCrossEntropyLoss", "SplitToSequence", "StringConcat", "StringNormalizer",
    "StringSplit", "SwiGLU", "TfIdfVectorizer", "Unique",
}  # fmt: skip
# Ops of ONNX Runtime's own domain that some parsers read all the same.
READ_CONTRIB = {
    "GroupQueryAttention", "MatMulNBits", "MultiHeadAttention", "QMoE",
    "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization",
}  # fmt: skip


def tensorrt_findings(graph: Graph) -> Iterator[Finding]:
    """Opset, ops and data types."""
    if graph.opset not in OPSETS:
        yield warning(
            "opset",
            f"opset {graph.opset}",
            f"opset must be {OPSETS[0]}..{OPSETS[-1]}: torch writes invalid models below, "
            "and Attention ops, which TensorRT seldom builds, above",
            "export with opset_version=20",
        )
    yield from _network_float64(graph.main)
    for scope, node in graph.nodes():
        yield from _op(scope, node)
        yield from _uint8(graph, scope, node)
        if node.domain in ONNX_DOMAINS:
            yield from _attention(scope, node)
            yield from _float64(scope, node)
            yield from _bfloat16(graph, scope, node)


def _op(scope: Scope, node: NodeProto) -> Iterator[Finding]:
    if node.domain in ONNX_DOMAINS:
        if node.op_type in UNSUPPORTED:
            yield _unsupported(node, f"TensorRT's parser has no {node.op_type}")
        return
    known = onnx.defs.has(node.op_type) and node.op_type not in UNSUPPORTED
    if node.domain == "com.microsoft" and not known and node.op_type not in READ_CONTRIB:
        yield _unsupported(node, f"{node.op_type} is an op of ONNX Runtime's own")
    elif node.op_type == "MatMulNBits" and scope.dtype(node.input[0]) == TensorProto.FLOAT:
        yield _unsupported(node, "TensorRT reads MatMulNBits with a float16 input only")
    elif not node.domain.startswith("trt"):
        yield warning(
            "foreign-domain",
            node,
            f"domain '{node.domain}' is not ONNX's: TensorRT takes the node for ONNX's op "
            "of that name, or looks for a plugin",
            "export with ONNX's own ops, before any runtime's graph optimisation",
        )


def _unsupported(node: NodeProto, message: str) -> Finding:
    op = node.op_type
    quantized = op.endswith("Integer") or "Quantize" in op or (op[0] == "Q" and op[1:2].isupper())
    return error(
        "unsupported-op",
        node,
        message,
        "quantize in Q/DQ form (QuantFormat.QDQ)"
        if quantized
        else "rewrite the module so that it exports without this op, or keep it out of the network",
    )


def _attention(scope: Scope, node: NodeProto) -> Iterator[Finding]:
    """The op is imported as not decomposable: it needs a fused kernel, or the build fails."""
    if node.op_type != "Attention":
        return
    wrong = []
    if scope.dtype(node.input[0]) == TensorProto.FLOAT:
        wrong.append("its data type is float32")
    size = _head_size(scope, node)
    if size is not None and size not in HEAD_SIZES:
        wrong.append(f"its head size is {size}")
    if wrong:
        yield error(
            "attention-op",
            node,
            "TensorRT builds Attention in float16 or bfloat16 with a head size of "
            f"{HEAD_SIZES[0]}..{HEAD_SIZES[-1]} only; {' and '.join(wrong)}",
            "export with opset_version=20, which writes MatMul and Softmax",
        )


def _head_size(scope: Scope, node: NodeProto) -> int | None:
    shape = scope.shape(node.input[0])  # [B, heads, S, size] or [B, S, heads * size]
    if not shape or not isinstance(shape[-1], int):
        return None
    return shape[-1] if len(shape) == 4 else shape[-1] // attribute(node, "q_num_heads", 1)


def _network_float64(main: Scope) -> Iterator[Finding]:
    for name in (*main.inputs, *main.outputs):
        if main.dtype(name) == TensorProto.DOUBLE:
            yield warning(
                "float64",
                name,
                "TensorRT binds a float64 input or output as float32",
                "export the network with float32 inputs and outputs",
            )


def _float64(scope: Scope, node: NodeProto) -> Iterator[Finding]:
    if node.op_type in HEAVY and TensorProto.DOUBLE in scope.node_dtypes(node):
        yield warning(
            "float64",
            node,
            "TensorRT computes float64 in float32",
            "cast to float32 before it, or export model.float() or model.half()",
        )


def _uint8(graph: Graph, scope: Scope, node: NodeProto) -> Iterator[Finding]:
    """UINT8 lives at the network's edge only, with a Cast behind or before it."""
    if node.op_type in (*QUANTIZERS, "DynamicQuantizeLinear"):
        return  # the quantization rules judge these
    read = [
        name
        for name in node.input
        if scope.dtype(name) == TensorProto.UINT8 and not scope.is_constant(name)
    ]
    written = [name for name in node.output if scope.dtype(name) == TensorProto.UINT8]
    inner = (read or node.op_type == "Cast") and set(written) - set(graph.main.outputs)
    if inner or (read and node.op_type not in ("Cast", "Identity")):
        yield error(
            "uint8-tensor",
            node,
            "TensorRT has UINT8 as a network input or output only, cast at once",
            "cast to float or int32 right after the input, to UINT8 right before the output",
        )


def _bfloat16(graph: Graph, scope: Scope, node: NodeProto) -> Iterator[Finding]:
    if not node.op_type.startswith("Conv") or TensorProto.BFLOAT16 not in scope.node_dtypes(node):
        return
    if node.op_type == "ConvTranspose":
        yield error(
            "bf16-conv-transpose",
            node,
            "TensorRT builds no bfloat16 ConvTranspose",
            "export the network in float16: model.half()",
        )
    if graph.opset < BF16_CONV_OPSET:
        yield warning(
            "bf16-opset",
            node,
            f"ONNX has no bfloat16 {node.op_type} below opset {BF16_CONV_OPSET}, here "
            f"{graph.opset}: checkers and other runtimes refuse what TensorRT may build",
            f"export with opset_version={BF16_CONV_OPSET}",
        )

"""Quantized layers that TensorRT runs in float or slowly, and how many a graph has."""

from collections.abc import Iterator

from onnx import NodeProto, TensorProto

from export.finding import Finding, error, first_of, warning
from export.lint_graph import QUANTIZERS, WEIGHTED, Dimension, Graph, Scope, attribute
from export.lint_quantization import quantized_type, type_name

LEAST_COVERAGE = 0.5  # what a recipe leaves out (ends, embeddings, shortcuts) is never half
LEAST_CHANNELS = 16  # K and N under which an int8 kernel gains nothing
LONGEST_INT8_ATTENTION = 512
_NORMS = (
    "GroupNormalization", "InstanceNormalization", "LayerNormalization", "LogSoftmax",
    "Sigmoid", "Softmax",
)  # fmt: skip


def layer_findings(graph: Graph) -> Iterator[Finding]:
    """Layers whose Q/DQ gains nothing or costs a fusion, and the share of quantized layers."""
    for scope, node in graph.nodes(*WEIGHTED):
        yield from _layer(scope, node)
    for scope, node in graph.nodes("Concat", *_NORMS):
        yield from _neighbour(scope, node)
    if any(True for _ in graph.nodes(*QUANTIZERS)):
        yield from _group_norms(graph)
        yield from _coverage(graph)


def _layer(scope: Scope, node: NodeProto) -> Iterator[Finding]:
    """The inputs and the output of one Conv, ConvTranspose, MatMul or Gemm."""
    first, second = (scope.dequantizer(name) for name in node.input[:2])
    yield from _bias(scope, node)
    if first is None and second is None:
        return
    if first is None or second is None:
        quantized = node.input[0] if second is None else node.input[1]
        yield warning(
            "partial-quantization",
            node,
            f"only '{quantized}' is quantized: TensorRT runs it in float",
            "quantize both inputs (AddQDQPairToWeight for the weight), or neither",
        )
        return
    yield from _operand_types(scope, node)
    yield from _output(scope, node)
    if scope.is_constant(node.input[1]):
        yield from _weight(scope, node, second)
    else:
        yield from _attention_product(scope, node)


def _bias(scope: Scope, node: NodeProto) -> Iterator[Finding]:
    bias = scope.dequantizer(node.input[2]) if len(node.input) > 2 else None
    if bias is not None and quantized_type(scope, bias) != TensorProto.INT32:
        yield warning(
            "quantized-bias",
            node,
            "a quantized bias loses accuracy and no kernel reads it",
            "quantize with QuantizeBias=False",
        )


def _operand_types(scope: Scope, node: NodeProto) -> Iterator[Finding]:
    types = [scope.dtype(name) for name in node.input[:2]]
    if None not in types and types[0] != types[1]:
        names = " and ".join(type_name(kind) for kind in types if kind is not None)
        yield error(
            "scale-dtype",
            node,
            f"the scales of activation and weight must have one data type, got {names}",
            "give both scales the data type of the network",
        )


def _output(scope: Scope, node: NodeProto) -> Iterator[Finding]:
    """Q/DQ behind a layer is the next layer's input, or it only costs a kernel its fusion."""
    for quantizer in scope.consumers.get(node.output[0], []):
        if quantizer.op_type != "QuantizeLinear":
            continue
        readers = [
            reader
            for dequantizer in scope.consumers.get(quantizer.output[0], [])
            for reader in scope.consumers.get(dequantizer.output[0], [])
        ]
        if not any(reader.op_type in WEIGHTED for reader in readers):
            yield warning(
                "quantized-output",
                node,
                "its output is quantized for no other layer's sake: TensorRT cannot fuse what "
                "follows it",
                "quantize with OpTypesToExcludeOutputQuantization=['Conv', 'ConvTranspose', "
                "'Gemm', 'MatMul']",
            )


def _weight(scope: Scope, node: NodeProto, dequantizer: NodeProto) -> Iterator[Finding]:
    """A scale for each output channel, int8 or fp8, and large enough to gain."""
    if (
        node.op_type == "ConvTranspose"
        and quantized_type(scope, dequantizer) == TensorProto.FLOAT8E4M3FN
    ):
        yield warning(
            "fp8-conv-transpose",
            node,
            "TensorRT has no float8 ConvTranspose: it runs in float",
            "leave it out of the float8 quantization",
        )
    shape, scale = scope.shape(node.input[1]), scope.shape(dequantizer.input[1])
    if shape is None or len(shape) < 2 or scale is None:
        return
    wanted = output_axis(node, len(shape))
    per_tensor = scale in ((), (1,)) and shape[wanted] != 1
    given = None if per_tensor else attribute(dequantizer, "axis", 1) % len(shape)
    if given != wanted and not attribute(dequantizer, "block_size", 0):
        got = "one scale for all channels" if given is None else f"axis {given}"
        yield warning(
            "weight-axis",
            node,
            f"its weight must be quantized per output channel, axis {wanted}, got {got}",
            "quantize with per_channel=True and QDQOpTypePerChannelSupportToAxis="
            "{'Conv': 0, 'ConvTranspose': 1, 'MatMul': 1}",
        )
    channels = [size for size in _channels(node, shape) if isinstance(size, int)]
    if channels and min(channels) < LEAST_CHANNELS:
        yield warning(
            "small-layer",
            node,
            f"{min(channels)} channels are too few for int8 to gain, at least {LEAST_CHANNELS}",
            "leave it out (nodes_to_exclude)",
        )


def output_axis(node: NodeProto, rank: int) -> int:
    """The axis of a layer's weight that its output channels lie on."""
    if node.op_type == "Conv" or (node.op_type == "Gemm" and attribute(node, "transB", 0)):
        return 0
    return rank - 1 if node.op_type == "MatMul" else 1


def _channels(node: NodeProto, shape: tuple[Dimension, ...]) -> tuple[Dimension, Dimension]:
    """K and N: the first two axes of Conv, ConvTranspose and Gemm, the last two of MatMul."""
    return (shape[-2], shape[-1]) if node.op_type == "MatMul" else (shape[0], shape[1])


def _attention_product(scope: Scope, node: NodeProto) -> Iterator[Finding]:
    """Scores [.., S, T] of queries and keys: int8 pays where the sequence is short."""
    shape = scope.shape(node.output[0]) or ()
    lengths = [size for size in shape[-2:] if isinstance(size, int)]
    if node.op_type == "MatMul" and lengths and max(lengths) > LONGEST_INT8_ATTENTION:
        yield warning(
            "long-attention",
            node,
            f"an int8 attention product of {max(lengths)} is slower than float, "
            f"at most {LONGEST_INT8_ATTENTION}",
            "leave attention products out (nodes_to_exclude)",
        )


def _neighbour(scope: Scope, node: NodeProto) -> Iterator[Finding]:
    """Q/DQ where it gains nothing: norms and softmax stay float, a Concat has one scale."""
    sources = [scope.dequantizer(name) for name in node.input]
    if node.op_type in _NORMS:
        if sources[0] is not None and not scope.is_constant(node.input[0]):
            yield warning(
                "quantized-norm",
                node,
                f"{node.op_type} computes in float: its quantized input only loses accuracy",
                "quantize the weighted ops alone: op_types_to_quantize=['Conv', "
                "'ConvTranspose', 'Gemm', 'MatMul']",
            )
        return
    scales = [scope.values(source.input[1]) for source in sources if source is not None]
    known = [float(scale.max()) for scale in scales if scale is not None and scale.size]
    if len(known) == len(node.input) and len(set(known)) > 1:
        yield warning(
            "concat-scale",
            node,
            "the inputs of an int8 Concat must share one scale, "
            f"got {min(known):.6g}..{max(known):.6g}",
            "give them one scale, or leave the Concat float",
        )


def _group_norms(graph: Graph) -> Iterator[Finding]:
    norms = [node for _, node in graph.nodes("GroupNormalization")]
    if norms and graph.opset > 20:
        yield warning(
            "group-normalization",
            first_of(norms),
            "ONNX infers no type behind GroupNormalization: a quantizer skips those layers "
            "silently",
            "export with opset_version=20 before quantizing",
        )


def _coverage(graph: Graph) -> Iterator[Finding]:
    layers = [
        (scope, node)
        for scope, node in graph.nodes(*WEIGHTED)
        if any(scope.is_constant(name) for name in node.input[:2])
    ]
    left = [
        node
        for scope, node in layers
        if any(scope.dequantizer(name) is None for name in node.input[:2])
    ]
    covered = len(layers) - len(left)
    if left and covered < LEAST_COVERAGE * len(layers):
        yield warning(
            "quantization-coverage",
            first_of(left),
            f"{covered} of {len(layers)} layers with weights are quantized, under "
            f"{LEAST_COVERAGE:.0%}: the graph gains little",
            "quantize an opset 18-20 export, and see what the quantizer left out",
        )

"""Every rule of the lint catches a bad graph by name and node; good graphs pass."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper
from onnx.numpy_helper import from_array

from engine.errors import ArtifactError, OptionError
from export.finding import Rule
from export.lint import Finding, Profile, Target, lint
from export.profile import parse_profile

FLOAT, HALF, BFLOAT, DOUBLE, UINT8 = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
    TensorProto.DOUBLE,
    TensorProto.UINT8,
)
NUMPY = {FLOAT: np.float32, HALF: np.float16, DOUBLE: np.float64, BFLOAT: ml_dtypes.bfloat16}
PICTURE = [1, 16, 8, 8]
Value = tuple[str, int, Sequence[int | str] | None]

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def node(op: str, inputs: str, outputs: str, name: str = "", **attributes: object) -> NodeProto:
    name = name or f"{op.lower()}_{outputs}"
    return helper.make_node(op, inputs.split(), outputs.split(), name=name, **attributes)


def model(
    nodes: list[NodeProto],
    inputs: list[Value],
    outputs: list[Value],
    constants: dict[str, object] | None = None,
    opset: int = 20,
    domain: str = "",
    ir_version: int = 10,
) -> ModelProto:
    opsets = [helper.make_opsetid("", opset)]
    if domain:
        opsets.append(helper.make_opsetid(domain, 1))
    tensors = [
        value if isinstance(value, TensorProto) else from_array(np.asarray(value), name)
        for name, value in (constants or {}).items()
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        tensors,
    )
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)


def unary(
    op: str, kind: int = FLOAT, shape: Sequence[int] = PICTURE, **options: object
) -> ModelProto:
    """One node, x -> y."""
    keys = ("opset", "domain", "ir_version")
    attributes = {key: value for key, value in options.items() if key not in keys}
    if options.get("domain"):
        attributes["domain"] = options["domain"]
    settings = {key: options[key] for key in keys if key in options}
    return model([node(op, "x", "y", **attributes)], [("x", kind, shape)], [("y", kind, None)],
                 **settings)  # fmt: skip


def weight(shape: Sequence[int], kind: object = np.float32) -> np.ndarray:
    """Fixed values of either sign, -90..90."""
    return np.random.default_rng(0).integers(-90, 91, shape).astype(kind)


def convolution(kind: int, op: str = "Conv", opset: int = 20) -> ModelProto:
    return model(
        [node(op, "x w", "y", "conv")],
        [("x", kind, PICTURE)],
        [("y", kind, None)],
        {"w": weight((16, 16, 3, 3), NUMPY[kind])},
        opset,
    )


def quantized(
    op: str = "Conv",
    *,
    kind: int = FLOAT,
    scale_kind: int | None = None,
    scale: float = 0.02,
    activation: object = np.int8,
    zero_point: int = 0,
    activation_scales: int = 0,
    weight_axis: int | None = None,
    weight_kind: int | None = None,
    bias: object = None,
    quantize: str = "both",
    channels: int = 16,
    tail: Sequence[NodeProto] = (),
    constants: dict[str, object] | None = None,
    output: str = "y",
    opset: int = 20,
) -> ModelProto:
    """x -> Q -> DQ -> `op` with a dequantized weight: TensorRT's form, but for what is asked."""
    flat = op in ("MatMul", "Gemm")
    scale_type = NUMPY[scale_kind or kind]
    axis = {"Conv": 0}.get(op, 1) if weight_axis is None else weight_axis
    many = (activation_scales,) if activation_scales else ()
    shape = (channels, 16) if flat else (channels, 16, 3, 3)
    shape = (16, channels, 3, 3) if op == "ConvTranspose" else shape
    count = shape[axis]
    values: dict[str, object] = {
        "s": np.full(many, scale, scale_type),
        "z": np.full(many, zero_point, activation),
        "ws": np.full(count, 0.01, NUMPY[kind]),
        "wz": np.zeros(count, np.int8),
        "wq": weight(shape, np.int8),
        "w": weight(shape, NUMPY[kind]),
        "b": np.ones(16, NUMPY[kind]),
        **(constants or {}),
    }
    if weight_kind is not None:
        for name in ("wz", "wq"):
            zeros = np.asarray(values[name])
            values[name] = helper.make_tensor(
                name, weight_kind, zeros.shape, np.zeros(zeros.size, np.float32)
            )
    nodes = []
    if quantize in ("both", "activation"):
        extra = {"axis": 1} if many else {}
        nodes += [node("QuantizeLinear", "x s z", "xq", "q", **extra)]
        nodes += [node("DequantizeLinear", "xq s z", "xd", "dq", **extra)]
    if quantize in ("both", "weight"):
        nodes += [node("DequantizeLinear", "wq ws wz", "wd", "weight_dq", axis=axis)]
    read = f"{'x' if quantize == 'weight' else 'xd'} {'w' if quantize == 'activation' else 'wd'}"
    if bias is not None:
        values |= {"bs": np.full(16, 2e-4, NUMPY[kind]), "bq": np.ones(16, bias)}
        nodes += [node("DequantizeLinear", "bq bs", "bd", "bias_dq", axis=0)]
        read += " bd"
    nodes += [node(op, read, "y", "layer"), *tail]
    used = {name for each in nodes for name in each.input}
    return model(
        nodes,
        [("x", kind, [4, channels if flat else 16] if flat else PICTURE)],
        [(output, kind, None)],
        {name: value for name, value in values.items() if name in used},
        opset,
    )


REQUANTIZED = [node("QuantizeLinear", "y s z", "yq", "q2"), node("DequantizeLinear", "yq s z", "yd",
                                                                 "dq2")]  # fmt: skip


def attention(kind: int, head_size: int) -> ModelProto:
    shape = [1, 4, 32, head_size]
    return model(
        [node("Attention", "q k v", "y")],
        [(name, kind, shape) for name in "qkv"],
        [("y", kind, None)],
        opset=23,
    )


def attention_scores(length: int) -> ModelProto:
    """Queries and keys, each quantized, [1, length, 64]."""
    nodes = []
    for name in "qk":
        nodes += [node("QuantizeLinear", f"{name} s z", f"{name}q")]
        nodes += [node("DequantizeLinear", f"{name}q s z", f"{name}d")]
    nodes += [node("Transpose", "kd", "kt", perm=[0, 2, 1])]
    nodes += [node("QuantizeLinear", "kt s z", "ktq"), node("DequantizeLinear", "ktq s z", "ktd")]
    nodes += [node("MatMul", "qd ktd", "y", "scores")]
    return model(
        nodes,
        [(name, FLOAT, [1, length, 64]) for name in "qk"],
        [("y", FLOAT, None)],
        {"s": np.float32(0.1), "z": np.int8(0)},
    )


def concatenation(second_scale: float) -> ModelProto:
    nodes = []
    for name, scale in (("a", "s"), ("b", "t")):
        nodes += [node("QuantizeLinear", f"{name} {scale} z", f"{name}q")]
        nodes += [node("DequantizeLinear", f"{name}q {scale} z", f"{name}d")]
    nodes += [node("Concat", "ad bd", "y", axis=1)]
    return model(
        nodes,
        [(name, FLOAT, PICTURE) for name in "ab"],
        [("y", FLOAT, None)],
        {"s": np.float32(0.1), "t": np.float32(second_scale), "z": np.int8(0)},
    )


def two_inputs(first: Sequence[int | str], second: Sequence[int | str]) -> ModelProto:
    return model(
        [node("Relu", "sample", "y", "relu"), node("Relu", "other", "v", "relu2")],
        [("sample", FLOAT, first), ("other", FLOAT, second)],
        [("y", FLOAT, first), ("v", FLOAT, second)],
    )


def uint8_inside() -> ModelProto:
    nodes = [node("Cast", "x", "u", "to_uint8", to=UINT8), node("Cast", "u", "y", to=FLOAT)]
    return model(nodes, [("x", FLOAT, PICTURE)], [("y", FLOAT, None)])


def group_norm_network() -> ModelProto:
    norm = node("GroupNormalization", "y g g", "n", "norm", num_groups=4)
    return quantized(opset=21, output="n", constants={"g": np.ones(16, np.float32)}, tail=[norm])


def mostly_float() -> ModelProto:
    more = [node("Conv", "y w", "y1", "left1"), node("Conv", "y1 w", "y2", "left2")]
    return quantized(tail=more, output="y2")


def norm_of_quantized() -> ModelProto:
    nodes = [
        node("QuantizeLinear", "x s z", "xq"),
        node("DequantizeLinear", "xq s z", "xd"),
        node("Softmax", "xd", "y", "softmax"),
    ]
    return model(nodes, [("x", FLOAT, PICTURE)], [("y", FLOAT, None)],
                 {"s": np.float32(0.1), "z": np.int8(0)})  # fmt: skip


def packed_matmul() -> ModelProto:
    packed = node("MatMulNBits", "x w s", "y", "packed", domain="com.microsoft", K=32, N=16,
                  bits=4, block_size=32)  # fmt: skip
    return model(
        [packed],
        [("x", FLOAT, [4, 32])],
        [("y", FLOAT, [4, 16])],
        {"w": np.zeros((16, 1, 16), np.uint8), "s": np.ones(16, np.float32)},
        domain="com.microsoft",
    )


STATIC = ["batch", 4]
PAIR = "sample:1x4..2x4..4x4,other:1x8..2x8..4x8"

# What is bad of each rule: (target, rule, severity, node, graph, profile)
Case = tuple[Target, Rule, str, str, Callable[[], ModelProto], str]
TENSORRT: list[tuple[Rule, str, str, Callable[[], ModelProto]]] = [
    ("opset", "warning", "opset 17", lambda: unary("Relu", opset=17)),
    ("opset", "warning", "opset 23", lambda: unary("Relu", opset=23)),
    ("unsupported-op", "error", "det_y (Det)", lambda: unary("Det", shape=[1, 4, 4])),
    ("foreign-domain", "warning", "gelu_y (Gelu)", lambda: unary("Gelu", domain="com.microsoft")),
    ("attention-op", "error", "attention_y (Attention)", lambda: attention(FLOAT, 64)),
    ("attention-op", "error", "attention_y (Attention)", lambda: attention(HALF, 8)),
    ("attention-op", "error", "attention_y (Attention)", lambda: attention(HALF, 512)),
    ("float64", "warning", "conv (Conv)", lambda: convolution(DOUBLE)),
    ("uint8-tensor", "error", "to_uint8 (Cast)", uint8_inside),
    ("uint8-tensor", "error", "transpose_y (Transpose)", lambda: unary("Transpose", UINT8)),
    ("bf16-opset", "warning", "conv (Conv)", lambda: convolution(BFLOAT)),
    (
        "bf16-conv-transpose",
        "error",
        "conv (ConvTranspose)",
        lambda: convolution(BFLOAT, "ConvTranspose", 22),
    ),
    (
        "uint8-zero-point",
        "error",
        "q (QuantizeLinear)",
        lambda: quantized(activation=np.uint8, zero_point=128),
    ),
    (
        "quantized-type",
        "error",
        "q (QuantizeLinear)",
        lambda: quantized(activation=np.int16, opset=21),
    ),
    ("zero-point-not-zero", "error", "q (QuantizeLinear)", lambda: quantized(zero_point=3)),
    ("scale-not-positive", "error", "q (QuantizeLinear)", lambda: quantized(scale=-0.1)),
    ("scale-not-positive", "error", "q (QuantizeLinear)", lambda: quantized(scale=0.0)),
    ("quantized-type", "error", "weight_dq (DequantizeLinear)",
     lambda: quantized(weight_kind=TensorProto.FLOAT8E5M2)),
    (
        "scale-dtype",
        "error",
        "q (QuantizeLinear)",
        lambda: quantized(kind=HALF, scale_kind=FLOAT),
    ),
    (
        "int32-bias-qdq",
        "error",
        "bias_dq (DequantizeLinear)",
        lambda: quantized(bias=np.int32),
    ),
    (
        "fp8-conv-transpose",
        "warning",
        "layer (ConvTranspose)",
        lambda: quantized("ConvTranspose", weight_kind=TensorProto.FLOAT8E4M3FN),
    ),
    (
        "duplicate-name",
        "error",
        "q (QuantizeLinear)",
        lambda: quantized(tail=[node("QuantizeLinear", "y s z", "y2", "q")], output="y2"),
    ),
    ("quantized-bias", "warning", "layer (Conv)", lambda: quantized(bias=np.int8)),
    ("activation-axis", "warning", "q (QuantizeLinear)", lambda: quantized(activation_scales=16)),
    ("weight-axis", "warning", "layer (Conv)", lambda: quantized(weight_axis=1)),
    ("weight-axis", "warning", "layer (MatMul)", lambda: quantized("MatMul", weight_axis=0)),
    (
        "weight-axis",
        "warning",
        "layer (ConvTranspose)",
        lambda: quantized("ConvTranspose", weight_axis=0),
    ),
    ("partial-quantization", "warning", "layer (Conv)", lambda: quantized(quantize="weight")),
    ("partial-quantization", "warning", "layer (Gemm)",
     lambda: quantized("Gemm", quantize="activation")),
    (
        "quantized-output",
        "warning",
        "layer (Conv)",
        lambda: quantized(tail=[*REQUANTIZED, node("Relu", "yd", "r")], output="r"),
    ),
    ("quantized-norm", "warning", "softmax (Softmax)", norm_of_quantized),
    ("concat-scale", "warning", "concat_y (Concat)", lambda: concatenation(0.2)),
    ("small-layer", "warning", "layer (Conv)", lambda: quantized(channels=3)),
    ("long-attention", "warning", "scores (MatMul)", lambda: attention_scores(1024)),
    ("group-normalization", "warning", "norm (GroupNormalization)", group_norm_network),
    ("quantization-coverage", "warning", "left1 (Conv) and 1 more", mostly_float),
]  # fmt: skip
PROFILES: list[tuple[Rule, str, str, Sequence[int | str], Sequence[int | str], str]] = [
    ("profile-missing-input", "error", "other", STATIC, ["batch", 8], "sample:1x4..2x4..4x4"),
    ("profile-unknown-input", "warning", "others", STATIC, ["batch", 8], PAIR + ",others:1..1..1"),
    ("profile-rank", "error", "sample", ["batch"], ["batch", 8], PAIR),
    ("profile-static-dimension", "error", "other", STATIC, ["batch", 9], PAIR),
    ("profile-static-dimension", "error", "sample", [3, 4], ["batch", 8], PAIR),
    ("shared-dimension", "error", "other", STATIC, ["batch", 8], PAIR.replace("2x8", "3x8")),
    ("shared-dimension", "warning", "other", STATIC, ["batch", 8], PAIR.replace("4x8", "6x8")),
    ("shared-dimension", "error", "other", ["8*height"], ["height"],
     "sample:8..16..32,other:1..3..4"),
    ("derived-dimension", "error", "sample", ["8*height"], ["height"],
     "sample:8..17..32,other:1..2..4"),
]  # fmt: skip
ONNXRUNTIME: list[tuple[Rule, str, str, Callable[[], ModelProto]]] = [
    ("opset", "error", "opset 99", lambda: unary("Relu", opset=99)),
    ("ir-version", "error", "IR version 99", lambda: unary("Relu", ir_version=99)),
    ("foreign-domain", "error", "foo_y (Foo)", lambda: unary("Foo", domain="com.acme")),
    ("bf16-kernel", "error", "conv (Conv)", lambda: convolution(BFLOAT, opset=22)),
    ("bf16-kernel", "error", "relu_y (Relu)", lambda: unary("Relu", BFLOAT, opset=22)),
    ("float64", "error", "conv (Conv)", lambda: convolution(DOUBLE)),
    ("float64", "error", "conv (ConvTranspose)", lambda: convolution(DOUBLE, "ConvTranspose")),
    ("scale-dtype", "error", "q (QuantizeLinear)",
     lambda: quantized(kind=HALF, scale_kind=FLOAT)),
    ("fp16-casts", "warning", "conv (Conv)", lambda: convolution(HALF)),
    ("s8s8-qdq", "warning", "q (QuantizeLinear)", quantized),
    ("qlinear-pattern", "warning", "layer (Conv)", lambda: quantized(activation=np.uint8)),
    ("matmul-nbits", "warning", "packed (MatMulNBits)", packed_matmul),
]  # fmt: skip
OPENVINO: list[tuple[Rule, str, str, Callable[[], ModelProto]]] = [
    ("foreign-domain", "error", "foo_y (Foo)", lambda: unary("Foo", domain="com.acme")),
    ("unsupported-op", "error", "det_y (Det)", lambda: unary("Det", shape=[1, 4, 4])),
]


def findings(
    tmp_path: Path, graph: ModelProto, target: Target, *profiles: Profile
) -> list[Finding]:
    path = tmp_path / "network.onnx"
    path.write_bytes(graph.SerializeToString())
    return lint(path, target, profiles)


def errors(found: list[Finding]) -> list[Finding]:
    return [finding for finding in found if finding.severity == "error"]


# Bad graphs


def test_every_rule_has_a_bad_graph() -> None:
    cases = [*TENSORRT, *PROFILES, *ONNXRUNTIME, *OPENVINO]
    assert {case[0] for case in cases} == set(get_args(Rule))


def assert_caught(found: list[Finding], rule: str, severity: str, name: str) -> None:
    caught = [(each.rule, each.severity, each.node) for each in found]
    assert (rule, severity, name) in caught, caught
    assert all(each.message and each.mend for each in found)


@pytest.mark.parametrize(("rule", "severity", "name", "graph"), TENSORRT)
def test_tensorrt_names_the_rule_and_the_node(
    tmp_path: Path, rule: str, severity: str, name: str, graph: Callable[[], ModelProto]
) -> None:
    assert_caught(findings(tmp_path, graph(), "tensorrt"), rule, severity, name)


@pytest.mark.parametrize(("rule", "severity", "name", "first", "second", "profile"), PROFILES)
def test_a_bad_profile_is_caught_at_its_input(
    tmp_path: Path,
    rule: str,
    severity: str,
    name: str,
    first: Sequence[int | str],
    second: Sequence[int | str],
    profile: str,
) -> None:
    found = findings(tmp_path, two_inputs(first, second), "tensorrt", parse_profile(profile))
    assert_caught(found, rule, severity, name)
    assert {each.rule for each in found} == {rule}


@pytest.mark.parametrize(("rule", "severity", "name", "graph"), ONNXRUNTIME)
def test_what_is_an_error_for_onnxruntime_is_refused_by_it_and_a_warning_loads(
    tmp_path: Path, rule: str, severity: str, name: str, graph: Callable[[], ModelProto]
) -> None:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    assert_caught(findings(tmp_path, graph(), "onnxruntime"), rule, severity, name)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    model_bytes = graph().SerializeToString()
    if severity == "error":
        refusals = (state.Fail, state.InvalidGraph, state.NotImplemented)
        with pytest.raises(refusals):
            onnxruntime.InferenceSession(model_bytes, options, providers=["CPUExecutionProvider"])
    else:
        onnxruntime.InferenceSession(model_bytes, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("rule", "severity", "name", "graph"), OPENVINO)
def test_what_is_an_error_for_openvino_is_refused_by_it(
    tmp_path: Path, rule: str, severity: str, name: str, graph: Callable[[], ModelProto]
) -> None:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    assert_caught(findings(tmp_path, graph(), "openvino"), rule, severity, name)
    with pytest.raises(RuntimeError, match=r"wasn't fully converted"):
        openvino.Core().read_model(graph().SerializeToString())


# Good graphs


@pytest.mark.parametrize("kind", [FLOAT, HALF])
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose", "MatMul", "Gemm"])
def test_the_q_dq_form_of_tensorrt_has_no_finding(tmp_path: Path, op: str, kind: int) -> None:
    assert findings(tmp_path, quantized(op, kind=kind), "tensorrt") == []


def test_a_chain_of_quantized_convolutions_has_no_finding(tmp_path: Path) -> None:
    chain = quantized(tail=[*REQUANTIZED, node("Conv", "yd wd", "y2")], output="y2")
    assert findings(tmp_path, chain, "tensorrt") == []


def test_one_scale_is_one_scale_a_channel_where_there_is_one_channel(tmp_path: Path) -> None:
    found = findings(tmp_path, quantized(channels=1), "tensorrt")
    assert [finding.rule for finding in found] == ["small-layer"]


def test_a_weight_with_one_scale_for_many_channels_is_caught(tmp_path: Path) -> None:
    graph = quantized()
    scales = {"ws": np.float32(0.01), "wz": np.int8(0)}
    for tensor in graph.graph.initializer:
        if tensor.name in scales:
            tensor.CopyFrom(from_array(np.asarray(scales[tensor.name]), tensor.name))
    found = findings(tmp_path, graph, "tensorrt")
    assert [finding.rule for finding in found] == ["weight-axis"]
    assert "one scale for all channels" in found[0].message


@pytest.mark.parametrize("kind", [HALF, BFLOAT])
@pytest.mark.parametrize("head_size", [16, 64, 256])
def test_attention_in_half_precision_is_built(tmp_path: Path, kind: int, head_size: int) -> None:
    found = findings(tmp_path, attention(kind, head_size), "tensorrt")
    assert {finding.rule for finding in found} == {"opset"}


def test_uint8_may_enter_and_leave_a_network(tmp_path: Path) -> None:
    nodes = [
        node("Cast", "x", "f", to=FLOAT),
        node("Relu", "f", "r"),
        node("Cast", "r", "y", to=UINT8),
    ]
    graph = model(nodes, [("x", UINT8, PICTURE)], [("y", UINT8, None)])
    assert findings(tmp_path, graph, "tensorrt") == []


def test_float64_beside_the_heavy_ops_passes_as_in_rotary_embeddings(tmp_path: Path) -> None:
    nodes = [
        node("Cast", "x", "d", to=DOUBLE),
        node("Cos", "d", "c"),
        node("Mul", "c c", "m"),
        node("Cast", "m", "y", to=FLOAT),
    ]
    graph = model(nodes, [("x", FLOAT, PICTURE)], [("y", FLOAT, None)])
    assert findings(tmp_path, graph, "tensorrt") == []


@pytest.mark.parametrize("shapes", [("batch", "batch"), ("8*height", "height"), (None, "n // 2")])
def test_a_profile_that_fits_has_no_finding(tmp_path: Path, shapes: tuple[str, str]) -> None:
    graph = two_inputs([shapes[0], 4], [shapes[1], 8])
    times = 8 if shapes[0] == "8*height" else 1
    text = f"sample:{times}x4..{2 * times}x4..{4 * times}x4,other:1x8..2x8..4x8"
    assert findings(tmp_path, graph, "tensorrt", parse_profile(text)) == []


def test_a_static_input_needs_no_range(tmp_path: Path) -> None:
    graph = two_inputs(["batch", 4], [3, 8])
    assert findings(tmp_path, graph, "tensorrt", parse_profile("sample:1x4..2x4..4x4")) == []


# What torch and ONNX Runtime write


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three convolutions of 16 channels, sixteen at the ends too, from torch at opset 20."""
    return _export(tmp_path_factory.mktemp("exported") / "fp32.onnx", half=False)


def _export(path: Path, half: bool) -> Path:
    import torch

    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(16, 16, 3, padding=1) for _ in range(3)]
    network = torch.nn.Sequential(layers[0], torch.nn.SiLU(), layers[1], torch.nn.SiLU(), layers[2])
    sample = torch.ones(2, 16, 8, 8)
    if half:
        network, sample = network.half(), sample.half()
    program = torch.onnx.export(
        network.eval(),
        (sample,),
        input_names=["sample"],
        output_names=["y"],
        opset_version=20,
        dynamic_shapes=({0: torch.export.Dim("batch", max=64)},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.save(str(path))
    return path


def _quantize(source: Path, path: Path, signed: bool) -> Path:
    """With the settings that give TensorRT's form, or U8S8 with quantized outputs for a CPU."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            sample = np.random.default_rng(0).standard_normal((2, 16, 8, 8), np.float32)
            self.feeds = iter([{"sample": sample}])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    weighted = ["Conv", "ConvTranspose", "Gemm", "MatMul"]
    quantize_static(
        source,
        path,
        Reader(),
        per_channel=True,
        activation_type=QuantType.QInt8 if signed else QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=weighted,
        extra_options={
            "ActivationSymmetric": signed,
            "WeightSymmetric": True,
            "QuantizeBias": not signed,
            "AddQDQPairToWeight": signed,
            "DedicatedQDQPair": False,
            "QDQOpTypePerChannelSupportToAxis": {"Conv": 0, "ConvTranspose": 1},
            "OpTypesToExcludeOutputQuantization": weighted if signed else [],
        },
    )
    return path


@pytest.mark.parametrize("half", [False, True])
def test_a_torch_export_at_opset_20_has_no_finding(tmp_path: Path, half: bool) -> None:
    profile = parse_profile("sample:1x16x8x8..4x16x8x8..8x16x8x8")
    assert lint(_export(tmp_path / "network.onnx", half), "tensorrt", [profile]) == []


def test_a_float32_export_has_no_finding_for_the_cpu_runtimes(exported: Path) -> None:
    assert lint(exported, "onnxruntime") == []
    assert lint(exported, "openvino") == []


def test_quantizing_with_the_settings_for_tensorrt_gives_no_finding(
    exported: Path, tmp_path: Path
) -> None:
    assert lint(_quantize(exported, tmp_path / "int8.onnx", signed=True), "tensorrt") == []


def test_a_u8s8_graph_is_good_for_onnxruntime_and_refused_for_tensorrt(
    exported: Path, tmp_path: Path
) -> None:
    path = _quantize(exported, tmp_path / "int8.onnx", signed=False)
    assert lint(path, "onnxruntime") == []
    assert errors(lint(path, "openvino")) == []
    refused = errors(lint(path, "tensorrt"))
    assert {"uint8-zero-point", "int32-bias-qdq"} <= {finding.rule for finding in refused}


def test_our_exported_networks_pass_for_tensorrt(
    diffusion_artifact: Path, gan_artifact: Path
) -> None:
    for artifact in (diffusion_artifact, gan_artifact):
        networks = list(artifact.rglob("graphs/fp32/*.onnx"))
        assert networks
        assert [lint(network, "tensorrt") for network in networks] == [[] for _ in networks]


def test_a_profile_of_a_plan_is_not_taken_for_an_inputs_name() -> None:
    with pytest.raises(OptionError, match="names no input; write NAME:MIN"):
        parse_profile("1..2..8:32..32..64:32..32..64")


# Where nodes and values hide


def test_a_node_in_a_branch_is_found(tmp_path: Path) -> None:
    def branch(op: str) -> onnx.GraphProto:
        value = helper.make_tensor_value_info(f"{op}_out", FLOAT, None)
        return helper.make_graph([node(op, "x", f"{op}_out", "inner")], op, [], [value])

    either = node("If", "c", "y", then_branch=branch("Det"), else_branch=branch("Identity"))
    graph = model(
        [either], [("x", FLOAT, [4, 4]), ("c", TensorProto.BOOL, [])], [("y", FLOAT, None)]
    )
    assert_caught(findings(tmp_path, graph, "tensorrt"), "unsupported-op", "error", "inner (Det)")


def test_a_branch_sees_the_types_outside_it(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("out", DOUBLE, None)
    body = helper.make_graph([node("MatMul", "x x", "out", "product")], "body", [], [value])
    graph = model(
        [node("If", "c", "y", then_branch=body, else_branch=body)],
        [("x", DOUBLE, [4, 4]), ("c", TensorProto.BOOL, [])],
        [("y", DOUBLE, None)],
    )
    assert_caught(findings(tmp_path, graph, "tensorrt"), "float64", "warning", "product (MatMul)")


def test_a_node_in_a_local_function_is_found(tmp_path: Path) -> None:
    graph = unary("Twice", shape=[1, 4, 4], domain="local")
    opset = [helper.make_opsetid("", 20)]
    function = helper.make_function(
        "local", "Twice", ["a"], ["b"], [node("Det", "a", "b", "inner")], opset
    )
    graph.functions.append(function)
    found = findings(tmp_path, graph, "tensorrt")
    assert [(finding.rule, "Det" in finding.node) for finding in found] == [
        ("unsupported-op", True)
    ]


def test_a_node_without_a_name_is_known_by_its_output(tmp_path: Path) -> None:
    graph = unary("Det", shape=[1, 4, 4])
    graph.graph.node[0].name = ""
    assert errors(findings(tmp_path, graph, "tensorrt"))[0].node == "-> y (Det)"


def test_what_cannot_be_typed_is_not_judged(tmp_path: Path) -> None:
    graph = model(
        [node("Unknown", "x", "u", domain="com.acme"), node("Attention", "u u u", "y")],
        [("x", FLOAT, PICTURE)],
        [("y", FLOAT, None)],
        opset=23,
        domain="com.acme",
    )
    assert errors(findings(tmp_path, graph, "tensorrt")) == []


def external(tmp_path: Path, graph: ModelProto) -> Path:
    path = tmp_path / "network.onnx"
    onnx.save(
        graph, path, save_as_external_data=True, location="network.data", size_threshold=0,
        convert_attribute=False,
    )  # fmt: skip
    return path


def test_zero_points_and_scales_are_read_from_external_data(tmp_path: Path) -> None:
    assert lint(external(tmp_path, quantized()), "tensorrt") == []
    found = lint(external(tmp_path / "..", quantized(zero_point=3)), "tensorrt")
    assert_caught(found, "zero-point-not-zero", "error", "q (QuantizeLinear)")


def test_weights_are_not_read(tmp_path: Path) -> None:
    path = external(tmp_path, convolution(FLOAT))
    (tmp_path / "network.data").unlink()
    assert lint(path, "tensorrt") == []


def test_large_weights_inside_the_file_change_no_finding(tmp_path: Path) -> None:
    graph = quantized("MatMul", channels=8192)  # 128 KiB of int8, over what inference keeps
    assert findings(tmp_path, graph, "tensorrt") == []


def test_missing_external_scales_are_named(tmp_path: Path) -> None:
    path = external(tmp_path, quantized())
    (tmp_path / "network.data").unlink()
    with pytest.raises(ArtifactError, match="external data of tensor 'z' cannot be read"):
        lint(path, "tensorrt")


# Wrong questions


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"none\.onnx' cannot be read: No such file"):
        lint(tmp_path / "none.onnx", "tensorrt")


def test_a_folder_is_no_graph(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be read: Is a directory"):
        lint(tmp_path, "tensorrt")


@pytest.mark.parametrize("content", [b"", b"not a graph at all", bytes(range(256))])
def test_a_file_that_is_no_onnx_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "picture.onnx"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"picture\.onnx' is no ONNX model"):
        lint(path, "tensorrt")


def test_a_node_without_its_inputs_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"conv_y \(Conv\) must have at least 2 inputs, got 1"):
        findings(tmp_path, unary("Conv"), "tensorrt")


def test_profiles_are_for_tensorrt_only(exported: Path) -> None:
    with pytest.raises(OptionError, match="profiles are TensorRT's, and the target is openvino"):
        lint(exported, "openvino", [parse_profile("sample:1..1..1")])


# Profiles


def test_a_profile_is_read_from_its_command_line_form() -> None:
    profile = parse_profile("sample:1x4x64x64..4x4x64x64..8x4x96x96,timestep:1..4..8")
    assert profile.shapes == {
        "sample": ((1, 4, 64, 64), (4, 4, 64, 64), (8, 4, 96, 96)),
        "timestep": ((1,), (4,), (8,)),
    }


def test_a_profile_is_written_as_it_is_read() -> None:
    text = "sample:1x4x64x64..4x4x64x64..8x4x96x96,timestep:1..4..8"
    assert str(parse_profile(text)) == text
    assert str(parse_profile(" a:1..2..3 , b : 4..5..6 ")) == "a:1..2..3,b:4..5..6"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "profile '' names no input; write NAME:MIN"),
        ("1x4..2x4..4x4", "names no input"),
        ("a:1..2..3,", "profile '' names no input"),
        ("a:1..2", "profile of 'a' must have 3 shapes MIN..OPT..MAX, got 2 in '1..2'"),
        ("a:1..2..3..4", "must have 3 shapes MIN..OPT..MAX, got 4"),
        ("a:1..2..", "a shape must be whole numbers joined by x, got ''"),
        ("a:1..2..-3", "a shape must be whole numbers joined by x, got '-3'"),
        ("a:1..two..3", "a shape must be whole numbers joined by x, got 'two'"),
        ("a:1..2..3,a:1..2..3", "profile names input 'a' twice"),
        ("a:1x2..2..3", "min, opt and max must have one rank, got min 1x2, opt 2, max 3"),
        ("a:0..2..3", "dimensions must be at least 1, got min 0"),
        ("a:1x8..2x4..4x8", "min may not exceed opt, got min 1x8 and opt 2x4"),
        ("a:1..4..2", "opt may not exceed max, got opt 4 and max 2"),
    ],
)
def test_a_wrong_profile_says_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_profile(text)
    assert message in str(caught.value)


def test_a_profile_from_a_file_is_checked_too() -> None:
    with pytest.raises(OptionError, match="min may not exceed opt"):
        Profile.parse({"shapes": {"a": [[2], [1], [3]]}})
    with pytest.raises(OptionError, match="at least one input"):
        Profile.parse({"shapes": {}})

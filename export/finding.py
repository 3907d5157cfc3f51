"""What the lint has to say of one node."""

from collections.abc import Sequence
from typing import Literal

from onnx import NodeProto

from engine.options import Options

Severity = Literal["error", "warning"]
Rule = Literal[
    # what the target reads
    "opset",
    "ir-version",
    "unsupported-op",
    "foreign-domain",
    "attention-op",
    # data types
    "float64",
    "uint8-tensor",
    "bf16-opset",
    "bf16-conv-transpose",
    "bf16-kernel",
    "fp16-casts",
    # Q/DQ form
    "duplicate-name",
    "uint8-zero-point",
    "quantized-type",
    "zero-point-not-zero",
    "scale-not-positive",
    "scale-dtype",
    "int32-bias-qdq",
    "fp8-conv-transpose",
    # Q/DQ that runs, slowly or in float
    "quantized-bias",
    "activation-axis",
    "weight-axis",
    "partial-quantization",
    "quantized-output",
    "quantized-norm",
    "concat-scale",
    "small-layer",
    "long-attention",
    "group-normalization",
    "quantization-coverage",
    "s8s8-qdq",
    "qlinear-pattern",
    "matmul-nbits",
    # optimisation profiles
    "profile-missing-input",
    "profile-unknown-input",
    "profile-rank",
    "profile-static-dimension",
    "shared-dimension",
    "derived-dimension",
]


class Finding(Options):
    """One place where a graph breaks a rule of its target.

    `error`: the target refuses it, or computes wrong numbers. `warning`: it runs, but slowly, in
    float, or on some versions only. `node` is a node's name and op, or an input's name.
    """

    rule: Rule
    severity: Severity
    node: str
    message: str
    mend: str


def error(rule: Rule, node: NodeProto | str, message: str, mend: str) -> Finding:
    """The target refuses it, or computes wrong numbers."""
    return Finding(rule=rule, severity="error", node=_name(node), message=message, mend=mend)


def warning(rule: Rule, node: NodeProto | str, message: str, mend: str) -> Finding:
    """It runs, but slowly, in float, or on some versions only."""
    return Finding(rule=rule, severity="warning", node=_name(node), message=message, mend=mend)


def label(node: NodeProto) -> str:
    """A node's name and op; one without a name is known by its first output."""
    name = node.name or next((f"-> {output}" for output in node.output if output), "unnamed")
    return f"{name} ({node.op_type})"


def first_of(nodes: Sequence[NodeProto]) -> str:
    """The first node, and how many more there are."""
    return label(nodes[0]) + (f" and {len(nodes) - 1} more" if len(nodes) > 1 else "")


def _name(node: NodeProto | str) -> str:
    return node if isinstance(node, str) else label(node)

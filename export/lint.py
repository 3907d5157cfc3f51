"""`vitrine lint`: what a target cannot run in an ONNX graph, or runs badly, before a build."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

from engine.errors import OptionError
from export.finding import Finding
from export.lint_graph import Graph, open_graph
from export.lint_layers import layer_findings
from export.lint_profiles import profile_findings
from export.lint_quantization import quantization_findings
from export.lint_runtimes import onnxruntime_findings, openvino_findings
from export.lint_tensorrt import tensorrt_findings
from export.profile import Profile

__all__ = ["TARGETS", "Finding", "Profile", "Target", "lint"]

Target = Literal["tensorrt", "onnxruntime", "openvino"]
TARGETS: tuple[Target, ...] = get_args(Target)


def lint(path: Path, target: Target, profiles: Sequence[Profile] = ()) -> list[Finding]:
    """The findings for one network file, errors first; weights are not read.

    Raises ArtifactError where the file is missing or no ONNX model, OptionError where profiles
    are given for a target that has none, RuntimeUnavailableError where ONNX Runtime is the target
    and is not installed.
    """
    if target not in TARGETS:
        raise OptionError(f"target must be one of {', '.join(TARGETS)}, got '{target}'")
    if profiles and target != "tensorrt":
        raise OptionError(
            f"profiles are TensorRT's, and the target is {target}; leave them out, "
            "or lint for tensorrt"
        )
    findings = _findings(open_graph(path), target, profiles)
    return sorted(findings, key=lambda finding: finding.severity != "error")


def _findings(graph: Graph, target: Target, profiles: Sequence[Profile]) -> Iterator[Finding]:
    match target:
        case "tensorrt":
            yield from tensorrt_findings(graph)
            yield from quantization_findings(graph)
            yield from layer_findings(graph)
            yield from profile_findings(graph, profiles)
        case "onnxruntime":
            yield from onnxruntime_findings(graph)
        case "openvino":
            yield from openvino_findings(graph)

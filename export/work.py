"""The work of each layer of a graph: what int8 could save, whatever a clock says."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from export.lint_graph import WEIGHTED

Feed = Mapping[str, NDArray[np.generic]]
Shape = tuple[int, ...]


def layer_macs(graph: Path, feed: Feed) -> dict[str, float]:
    """Multiply-accumulates of every convolution and product in one call, by the node's name."""
    import onnxruntime

    model = onnx.load(graph, load_external_data=False)
    nodes = [node for node in model.graph.node if node.op_type in WEIGHTED]
    shapes: dict[str, Shape] = {t.name: tuple(t.dims) for t in model.graph.initializer}
    named = {name for node in nodes for name in (*node.input[:2], node.output[0])}
    wanted = sorted(named - shapes.keys())
    for name in wanted:
        output = f"{name}_shape"
        model.graph.node.append(helper.make_node("Shape", [name], [output]))
        model.graph.output.append(helper.make_tensor_value_info(output, TensorProto.INT64, None))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    key = "session.model_external_initializers_file_folder_path"
    options.add_session_config_entry(key, str(graph.parent))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found = session.run([f"{name}_shape" for name in wanted], dict(feed))
    shapes |= {name: tuple(map(int, shape)) for name, shape in zip(wanted, found, strict=True)}
    return {node.name: _macs(node, shapes) for node in nodes}


def _macs(node: NodeProto, shapes: Mapping[str, Shape]) -> float:
    """Outputs times what each sums up; of a transposed convolution inputs times what each gives."""
    first, second = (shapes[name] for name in node.input[:2])
    outputs = math.prod(shapes[node.output[0]])
    match node.op_type:
        case "Conv":  # weight [N, C / groups, ...]
            return float(outputs * math.prod(second[1:]))
        case "ConvTranspose":  # weight [C, N / groups, ...]
            return float(math.prod(first) * math.prod(second[1:]))
        case "Gemm":  # the weight may be transposed
            return float(outputs * math.prod(second) / shapes[node.output[0]][-1])
    return float(outputs * first[-1])

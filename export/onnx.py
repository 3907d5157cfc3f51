"""A network as an ONNX file: dynamic batch and picture size, one timestep per row."""

import ast
import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from engine.backends.spec import concrete_shape
from engine.errors import ArtifactError
from engine.manifest import TensorSpec, split_axis
from engine.networks.network import Network
from export.lint_graph import WEIGHTED as LAYER_OPS

if TYPE_CHECKING:
    import onnx_ir

OPSET = 20  # 18-22 is what every runtime takes; from 21 on quantizers lose the group norms
OPSET_BF16 = 22  # the first with convolutions in bfloat16
_DTYPES = {"float32": torch.float32, "int64": torch.int64}
# of the trace only, the graph takes any: from 64 rows on diffusers upsamples in another branch,
# and torch would trace everything a second time to learn that
_LARGEST = {"batch": 63, "height": 4096, "width": 4096}
# sizes of the trace: all different, and none of them 1, which would be taken for a constant
_TRACED = {"batch": 2, "height": 3, "width": 5}


def export_network(network: Network, path: Path, sizes: Mapping[str, int] | None = None) -> None:
    """Trace a network in its own precision; write `path`, beside it its weights if they are large.

    `sizes` are the values of axes that shall be fixed (`{"height": 8, "width": 8}`).

    Raises ArtifactError where torch cannot export it.
    """
    sizes = sizes or {}
    spec = network.spec
    dims = {axis: torch.export.Dim(axis, min=1, max=largest) for axis, largest in _LARGEST.items()}
    dynamic_shapes = tuple(_dynamic_axes(tensor, dims, sizes) for tensor in spec.inputs)
    try:
        with _quiet(), torch.inference_mode():
            program = torch.onnx.export(
                network.eval(),
                tuple(_example(tensor, {**_TRACED, **sizes}) for tensor in spec.inputs),
                input_names=[tensor.name for tensor in spec.inputs],
                output_names=[tensor.name for tensor in spec.outputs],
                opset_version=OPSET_BF16 if network.dtype == torch.bfloat16 else OPSET,
                dynamo=True,
                dynamic_shapes=(dynamic_shapes,),
                optimize=True,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ArtifactError(f"torch cannot export {path.stem}: {error}") from error
    assert program is not None
    _name_layers(program.model.graph)
    path.parent.mkdir(parents=True, exist_ok=True)
    program.save(str(path))


def _name_layers(graph: "onnx_ir.Graph") -> None:
    """Name the layers after their modules, and forget where on this machine the code lies."""
    taken: Counter[str] = Counter()
    for node in graph:
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        if node.op_type not in LAYER_OPS or len(scopes) < 2:
            continue
        module = scopes[-2].removeprefix("module.") or scopes[-1]
        taken[module] += 1
        node.name = module if taken[module] == 1 else f"{module}_{taken[module]}"


def _dynamic_axes(
    tensor: TensorSpec, dims: Mapping[str, torch.export.Dim], sizes: Mapping[str, int]
) -> dict[int, object]:
    axes: dict[int, object] = {}
    for index, axis in enumerate(tensor.shape):
        if isinstance(axis, str):
            factor, name = split_axis(axis)
            if name not in sizes:
                axes[index] = dims[name] if factor == 1 else factor * dims[name]
    return axes


def _example(tensor: TensorSpec, sizes: Mapping[str, int]) -> torch.Tensor:
    """Any valid value of the shape to trace."""
    return torch.ones(concrete_shape(tensor, sizes), dtype=_DTYPES[tensor.dtype])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter prints and warns about its own internals."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

"""A network as an ONNX file: dynamic batch, one timestep per row."""

import contextlib
import io
import logging
import warnings
from pathlib import Path

import torch
from torch import nn

from engine.errors import ArtifactError
from engine.manifest import NetworkSpec, TensorSpec

OPSET = 20  # 18-22 is what every runtime takes; from 21 on quantizers lose the group norms
_DTYPES = {"float32": torch.float32, "int64": torch.int64}


def export_network(network: nn.Module, spec: NetworkSpec, path: Path) -> None:
    """Trace a module whose `forward` takes the inputs of `spec` in order; write `path`.

    Raises ArtifactError where torch cannot export it.
    """
    axes = {
        axis: torch.export.Dim(axis, min=1, max=4096)
        for tensor in spec.inputs
        for axis in tensor.shape
        if isinstance(axis, str)
    }
    dynamic_shapes = tuple(
        {i: axes[axis] for i, axis in enumerate(tensor.shape) if isinstance(axis, str)}
        for tensor in spec.inputs
    )
    try:
        with _quiet():
            program = torch.onnx.export(
                network.eval(),
                tuple(_example(tensor) for tensor in spec.inputs),
                input_names=[tensor.name for tensor in spec.inputs],
                output_names=[tensor.name for tensor in spec.outputs],
                opset_version=OPSET,
                dynamo=True,
                dynamic_shapes=dynamic_shapes,
                optimize=True,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ArtifactError(f"torch cannot export {path.stem}: {error}") from error
    assert program is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    program.save(str(path))


def _example(tensor: TensorSpec) -> torch.Tensor:
    """Any valid value: two rows, so that a batch of one is not taken for a constant."""
    shape = [2 if isinstance(axis, str) else axis for axis in tensor.shape]
    return torch.ones(shape, dtype=_DTYPES[tensor.dtype])


@contextlib.contextmanager
def _quiet():  # type: ignore[no-untyped-def]
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

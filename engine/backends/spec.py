"""What every backend is, and how one is opened."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from engine.backends.target import PlanTarget
from engine.errors import OptionError, RuntimeUnavailableError
from engine.manifest import NetworkSpec, Runtime, TensorSpec, split_axis

Array = NDArray[np.generic]
Provider = Literal["auto", "cpu", "cuda", "tensorrt"]  # of ONNX Runtime


class Backend(Protocol):
    """One network on one runtime."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Name, dtype and shape (with symbolic axes) of every input."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The same of every output."""

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """One call; the arrays returned may be buffers that the next `run` uses again."""

    def close(self) -> None:
        """Give back memory and device."""


def open_backend(
    runtime: str,
    path: Path,
    spec: NetworkSpec,
    *,
    precision: str = "fp32",
    provider: Provider = "auto",
    target: PlanTarget | None = None,
    usual_sizes: Mapping[str, int] | None = None,
    weights_only: bool = False,
) -> Backend:
    """Load a network: a file of an artifact, or a network's folder in a checkpoint (torch).

    `precision` is that of whatever is not quantized: it chooses OpenVINO's arithmetic and stands in
    messages; every other runtime takes it from the file. `provider` is ONNX Runtime's alone;
    `target` is what a TensorRT plan was built for. `usual_sizes` are the axes beside the batch of
    most calls, for which OpenVINO builds ahead. `weights_only`: nothing but weights is quantized.

    Raises RuntimeUnavailableError where the runtime is not installed or lacks its device,
    ArtifactError where it cannot read the file.
    """
    match runtime:
        case "torch":
            from engine.backends.torch import TorchBackend

            return TorchBackend.load(path, spec)
        case "onnxruntime":
            from engine.backends.onnxruntime import OnnxRuntimeBackend

            return OnnxRuntimeBackend(path, spec, provider, precision, weights_only=weights_only)
        case "openvino":
            from engine.backends.openvino import OpenVINOBackend

            return OpenVINOBackend(path, spec, precision, usual_sizes)
        case "tensorrt":
            from engine.backends.tensorrt import TensorRTBackend

            return TensorRTBackend(path, spec, target)
        case _:
            raise RuntimeUnavailableError(
                f"runtime must be one of {', '.join(get_args(Runtime))}, got {runtime!r}"
            )


def axis_sizes(feed: Mapping[str, Array], inputs: Sequence[TensorSpec]) -> dict[str, int]:
    """What the symbolic axes of `inputs` stand for in a feed, e.g. `{"batch": 4}`.

    Runtimes broadcast, cast and guess where a feed does not fit. Raises OptionError for an input
    that is missing, unknown, of another dtype, or of a shape that contradicts the others.
    """
    names = [tensor.name for tensor in inputs]
    if feed.keys() != set(names):
        raise OptionError(f"the inputs must be {', '.join(names)}, got {', '.join(feed)}")
    sizes: dict[str, int] = {}
    for tensor in inputs:
        array = feed[tensor.name]
        if array.dtype.name != tensor.dtype or not _fits(array.shape, tensor, sizes):
            known = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise OptionError(
                f"input '{tensor.name}' must be {tensor.dtype} {list(tensor.shape)}"
                f"{' at ' + known if known else ''}, got {array.dtype} {list(array.shape)}"
            )
    return sizes


def _fits(shape: tuple[int, ...], tensor: TensorSpec, sizes: dict[str, int]) -> bool:
    """Whether a shape is one of a tensor's; puts the axes met for the first time into `sizes`."""
    if len(shape) != len(tensor.shape):
        return False
    for size, axis in zip(shape, tensor.shape, strict=True):
        factor, name = split_axis(axis) if isinstance(axis, str) else (axis, "")
        known = sizes.setdefault(name, size // factor) if name else 1
        if size != factor * known:
            return False
    return True


def concrete_shape(tensor: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A tensor's shape at given sizes of its symbolic axes. Raises KeyError for an unknown one."""
    return tuple(
        axis if isinstance(axis, int) else split_axis(axis)[0] * sizes[split_axis(axis)[1]]
        for axis in tensor.shape
    )

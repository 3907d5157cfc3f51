"""What every backend is, and how one is opened."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.errors import RuntimeUnavailableError
from engine.manifest import NetworkSpec, TensorSpec

Array = NDArray[np.generic]


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


def open_backend(runtime: str, path: Path, spec: NetworkSpec) -> Backend:
    """Load a network: a file of an artifact, or a network's folder in a checkpoint (torch).

    Raises RuntimeUnavailableError where the runtime is not installed, ArtifactError where it
    cannot read the file.
    """
    match runtime:
        case "torch":
            from engine.backends.torch import TorchBackend

            return TorchBackend.load(path, spec)
        case "onnxruntime":
            from engine.backends.onnxruntime import OnnxRuntimeBackend

            return OnnxRuntimeBackend(path, spec)
        case _:
            raise RuntimeUnavailableError(
                f"runtime must be one of torch, onnxruntime, got {runtime!r}"
            )

"""A network in PyTorch, eager: the reference that every other backend is measured against."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from engine.backends.spec import Array
from engine.errors import RuntimeUnavailableError
from engine.manifest import NetworkSpec, TensorSpec

try:
    import torch
    from torch import nn

    from engine.networks.load import load_network
except ImportError as error:
    raise RuntimeUnavailableError(
        f"a checkpoint runs on torch and diffusers, and {error.name} is not installed; "
        "pip install 'vitrine[export]', or run an artifact instead"
    ) from None


class TorchBackend:
    """A module whose `forward` takes the inputs of `spec` in order and returns its outputs."""

    def __init__(self, module: nn.Module, spec: NetworkSpec) -> None:
        self._module = module
        self._spec = spec

    @classmethod
    def load(cls, path: Path, spec: NetworkSpec) -> "TorchBackend":
        """Load a network of a checkpoint; `path` ends with its name. Raises ArtifactError."""
        return cls(load_network(path.parent, path.name, spec), spec)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._spec.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._spec.outputs

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        values = [
            torch.from_numpy(np.ascontiguousarray(feed[tensor.name]))
            for tensor in self._spec.inputs
        ]
        with torch.inference_mode():
            outputs = self._module(*values)
        return {
            tensor.name: output.numpy()
            for tensor, output in zip(self._spec.outputs, outputs, strict=True)
        }

    def close(self) -> None:
        del self._module

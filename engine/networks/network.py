"""A network as it is exported: named tensors in, float32 out, its own precision inside."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from engine.manifest import NetworkSpec

# numbers that a network embeds (sines of them) and that half precision would round away
KEEP_FLOAT32 = ("timestep", "timestep_cond", "guidance", "time_ids", "resolution", "aspect_ratio")


class Network(nn.Module, ABC):
    """Takes the inputs of `spec` in order and returns its outputs.

    Floating-point inputs are cast to the module's own precision and outputs back to float32 inside
    the graph, so that a caller sees the same tensors whatever the precision.
    """

    module: Any  # diffusers and transformers are untyped

    def __init__(self, module: nn.Module, spec: NetworkSpec) -> None:
        super().__init__()
        self.module = module
        self.spec = spec
        self.dtype: torch.dtype = next(module.parameters()).dtype

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = {
            name: self._cast(name, tensor)
            for name, tensor in zip(self.spec.input_names, tensors, strict=True)
        }
        return tuple(tensor.float() for tensor in self.call(inputs))

    @abstractmethod
    def call(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The outputs of the spec, in its order, in the module's precision."""

    def _cast(self, name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or name in KEEP_FLOAT32:
            return tensor
        return tensor.to(self.dtype)

"""A checkpoint's networks as modules that take our tensors in order and return one tensor."""

from pathlib import Path

from diffusers import UNet2DModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from engine.checkpoint import WEIGHTS, read_json
from engine.errors import ArtifactError
from engine.networks.gan import Generator

# what diffusers raises for a config whose values do not fit each other is not documented
_LOAD_ERRORS = (
    SafetensorError, OSError, RuntimeError, TypeError, ValueError, ArithmeticError, LookupError,
)  # fmt: skip


class ClassUNet(nn.Module):
    """`sample [B, C, H, W]`, `timestep [B]`, `label [B]` -> raw prediction `[B, C, H, W]`."""

    def __init__(self, unet: UNet2DModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        prediction: Tensor = self.unet(sample, timestep, label, return_dict=False)[0]
        return prediction


def load_network(folder: Path) -> nn.Module:
    """Load a network's folder (`config.json` + safetensors), in fp32.

    Raises ArtifactError for weights that are damaged or do not fit the config.
    """
    config = read_json(folder / "config.json", folder)
    architecture = Generator if config.get("_class_name") == "Generator" else UNet2DModel
    try:
        network = architecture.from_config(config)
        with safe_open(folder / WEIGHTS, "pt") as file:
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        network.load_state_dict(weights)
    except _LOAD_ERRORS as error:
        reason = " ".join(str(error).split("\n\t")[:2])  # torch lists every tensor that differs
        raise ArtifactError(f"'{folder}' does not load: {reason}") from None
    return network if architecture is Generator else ClassUNet(network)

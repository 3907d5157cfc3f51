"""What a plan is bound to: a TensorRT version and a GPU, unless it was built to move."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from engine.errors import ArtifactError
from engine.options import Options

HardwareCompatibility = Literal["none", "ampere_plus", "same_compute_capability"]

# A version-compatible plan also runs on the next major version, from these to those only
# (TensorRT support matrix, Engine Portability).
NEXT_MAJOR = {8: 10, 10: 11}


@dataclass(frozen=True)
class Device:
    """A GPU; as a text, what a manifest records: `NVIDIA H200, sm_90`."""

    name: str
    compute_capability: str  # "9.0"

    @property
    def sm(self) -> str:
        """NVIDIA's short name of the compute capability: `sm_90`."""
        return "sm_" + self.compute_capability.replace(".", "")

    def __str__(self) -> str:
        return f"{self.name}, {self.sm}"


class PlanTarget(Options):
    """What a plan was built with and for, as TensorRT and CUDA name it."""

    tensorrt_version: str = Field(pattern=r"^\d+(\.\d+)+")
    gpu: str
    compute_capability: str = Field(pattern=r"^\d+\.\d+$")
    hardware_compatibility: HardwareCompatibility = "none"
    version_compatible: bool = False
    has_weights: bool = Field(True, description="false: stripped, until refit puts them in")

    @property
    def device(self) -> Device:
        return Device(self.gpu, self.compute_capability)


def check_device(
    target: PlanTarget, device: Device, tensorrt_version: str, artifact: Path | str
) -> None:
    """Refuse a plan that this TensorRT or this GPU cannot run, before anything loads it.

    Raises ArtifactError that names both sides and the command that builds the plan anew.
    """
    mend = f"build it for this machine: vitrine plan {artifact}"
    if not _version_fits(target, tensorrt_version):
        wanted = "a later version is" if target.version_compatible else "exactly that version is"
        raise ArtifactError(
            f"the plan of '{artifact}' was built with TensorRT {target.tensorrt_version} and "
            f"{wanted} needed, this machine has {tensorrt_version}; {mend}"
        )
    if not target.has_weights:
        raise ArtifactError(
            f"the plan of '{artifact}' was built without weights (strip_plan); put them in: "
            f"vitrine plan {artifact} --refit"
        )
    if not _device_fits(target, device):
        raise ArtifactError(
            f"the plan of '{artifact}' was built for {_allowed_devices(target)}, this machine has "
            f"{device}; {mend}"
        )


def _version_fits(target: PlanTarget, installed: str) -> bool:
    if installed == target.tensorrt_version:
        return True
    built, here = _numbers(target.tensorrt_version), _numbers(installed)
    if not target.version_compatible:
        return False
    return here > built if here[0] == built[0] else NEXT_MAJOR.get(built[0]) == here[0]


def _device_fits(target: PlanTarget, device: Device) -> bool:
    match target.hardware_compatibility:
        case "ampere_plus":
            return _numbers(device.compute_capability) >= (8, 0)
        case "same_compute_capability":
            return device.compute_capability == target.compute_capability
        case "none":
            return device == target.device


def _allowed_devices(target: PlanTarget) -> str:
    match target.hardware_compatibility:
        case "ampere_plus":
            return "Ampere and newer GPUs (sm_80 and up)"
        case "same_compute_capability":
            return f"GPUs of {target.device.sm}"
        case "none":
            return str(target.device)


def _numbers(version: str) -> tuple[int, ...]:
    """`10.16.1.11` as numbers; a part that is none (`rc1`) ends it."""
    parts = version.split(".")
    end = next((i for i, part in enumerate(parts) if not part.isdigit()), len(parts))
    return tuple(int(part) for part in parts[:end])

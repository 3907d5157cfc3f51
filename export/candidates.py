"""The variants that `vitrine export --auto` tries, and what it is asked for."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from pydantic import Field

from engine.errors import RuntimeUnavailableError
from engine.manifest import Floors, Goal, KeptLayer, Precision
from engine.options import Options
from export.calibrate import CalibrationOptions
from export.variant import VariantOptions

Runtime = Literal["onnxruntime", "openvino", "tensorrt"]
_NEEDED = {"onnxruntime": "cpu", "openvino": "openvino", "nncf": "export"}  # the extra of each


@dataclass(frozen=True)
class Candidate:
    """A variant to be tried."""

    runtime: Runtime
    precision: Precision
    weights_only: bool = False

    @property
    def is_quantized(self) -> bool:
        return self.precision in ("int8", "fp8")

    @property
    def is_searched(self) -> bool:
        """Whether its layers are chosen by measurement: where int8 can be timed here."""
        return self.is_quantized and self.runtime != "tensorrt" and not self.weights_only

    def require_packages(self) -> None:
        """Raises RuntimeUnavailableError where what builds or runs it is not installed.

        TensorRT itself is not needed for the graphs of its variants.
        """
        needed = ["onnxruntime" if self.runtime == "tensorrt" else str(self.runtime)]
        if self.runtime == "openvino" and self.is_searched:
            needed.append("nncf")
        for package in needed:
            if find_spec(package) is None:
                raise RuntimeUnavailableError(
                    f"{package} is not installed; pip install 'vitrine[{_NEEDED[package]}]'"
                )


CANDIDATES = (
    Candidate("onnxruntime", "fp32"),
    Candidate("openvino", "fp32"),
    Candidate("openvino", "bf16"),
    Candidate("tensorrt", "fp16"),
    Candidate("onnxruntime", "int8"),
    Candidate("openvino", "int8"),
    Candidate("tensorrt", "int8"),
    Candidate("tensorrt", "fp8"),
)
SMALL = (Candidate("onnxruntime", "int8", weights_only=True),)


class AutoOptions(Options):
    """What `vitrine export --auto` is asked for."""

    goal: Goal = "throughput"
    floors: Floors = Floors()
    pictures: int = Field(64, ge=1, le=100_000, description="that every candidate is judged by")
    search_minutes: float = Field(10.0, gt=0, description="for the layers of all int8 candidates")
    calibration: CalibrationOptions = CalibrationOptions()
    height: int | None = Field(None, ge=1)
    width: int | None = Field(None, ge=1)

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """In the order in which they are built; weights alone where size is the goal."""
        return CANDIDATES + (SMALL if self.goal == "size" else ())

    def variant(
        self,
        candidate: Candidate,
        layers: tuple[str, ...] | None = None,
        kept: tuple[KeptLayer, ...] = (),
    ) -> VariantOptions:
        """How a candidate is exported, with the layers that a search found. Raises OptionError."""
        return VariantOptions.parse(
            {
                "runtime": candidate.runtime, "precision": candidate.precision,
                "weights_only": candidate.weights_only, "layers": layers,
                "kept": [layer.model_dump() for layer in kept],
                "calibration": self.calibration.model_dump(),
                "height": self.height, "width": self.width,
            }
        )  # fmt: skip

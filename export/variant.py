"""One variant of an artifact: a runtime, a precision, and whether it is for one picture size."""

from importlib.metadata import PackageNotFoundError, version
from typing import Literal, Self

from pydantic import Field, model_validator

from engine.errors import OptionError
from engine.manifest import (
    KeptLayer,
    ModelSpec,
    NetworkSpec,
    Precision,
    Quantization,
    TypedPrecision,
    Variant,
)
from engine.options import Options
from export.calibrate import CalibrationOptions
from export.plan import PlanOptions, Range, default_profile
from export.profile import Profile

DEFAULT_BATCH = (1, 2, 8)  # rows of a network call; a guided request is two


class PlanRanges(Options):
    """What one optimisation profile covers, each (min, opt, max); sizes are in pixels."""

    batch: Range = DEFAULT_BATCH
    height: Range | None = Field(None, description="none: the model's default, no other")
    width: Range | None = None


def parse_ranges(text: str) -> PlanRanges:
    """The ranges of `1..2..8` (batch) or `1..2..8:512..512..768:512..512..768` (and size).

    Raises OptionError that names the wrong part.
    """
    parts = text.split(":")
    if len(parts) not in (1, 3):
        raise OptionError(f"--profile must be BATCH or BATCH:HEIGHT:WIDTH, got {text!r}")
    names = ("batch", "height", "width")
    values = {name: _parse_range(name, part) for name, part in zip(names, parts, strict=False)}
    if values["batch"][0] != 1:
        raise OptionError(
            f"--profile: batch must start at 1, a picture is decoded alone; got {parts[0]!r}"
        )
    return PlanRanges.parse(values, f"--profile {text}")


def _parse_range(name: str, text: str) -> list[int]:
    numbers = text.split("..")
    if len(numbers) != 3 or not all(number.isdecimal() for number in numbers):
        raise OptionError(f"--profile: {name} must be MIN..OPT..MAX, got {text!r}")
    values = [int(number) for number in numbers]
    if not 1 <= values[0] <= values[1] <= values[2]:
        raise OptionError(f"--profile: {name} must be 1 <= MIN <= OPT <= MAX, got {text!r}")
    return values


class PlanBuild(Options):
    """How the plans of a TensorRT variant are built: kept in the manifest."""

    options: PlanOptions = PlanOptions()
    ranges: tuple[PlanRanges, ...] = Field((PlanRanges(),), min_length=1)

    def profiles(
        self, model: ModelSpec, network: str, size: tuple[int, int] | None = None
    ) -> list[Profile]:
        """The optimisation profiles of one network; `size` is the only one of a fixed build.

        Raises OptionError for an impossible size.
        """
        return [self._profile(model, network, ranges, size) for ranges in self.ranges]

    def _profile(
        self, model: ModelSpec, network: str, ranges: PlanRanges, size: tuple[int, int] | None
    ) -> Profile:
        spec = model.networks[network]
        image = model.image
        height, width = size or (image.height, image.width)
        for side in (*(ranges.height or ()), *(ranges.width or ())):
            if size or image.multiple is None:
                what = "build" if size else "model"
                raise OptionError(
                    f"this {what} makes {height}x{width} only: a profile has no size, got {side}"
                )
            if side % image.multiple:
                raise OptionError(
                    f"height and width of a profile must be multiples of {image.multiple}, "
                    f"got {side}"
                )
        heights = ranges.height or (height,) * 3
        widths = ranges.width or (width,) * 3
        sizes = [model.symbols(network, size) for size in zip(heights, widths, strict=True)]
        least, best, most = sizes
        used = {axis for tensor in spec.inputs for axis in tensor.axes()} - {"batch"}
        axes = {axis: (least[axis], best[axis], most[axis]) for axis in used}
        return default_profile(spec, ranges.batch, axes)


class VariantOptions(Options):
    """What `vitrine export` is asked for."""

    runtime: Literal["onnxruntime", "openvino", "tensorrt"] = "onnxruntime"
    precision: Precision = "fp32"
    weights_only: bool = Field(False, description="int8 weights, float arithmetic: smaller")
    layers: tuple[str, ...] | None = Field(
        None,
        description="of the denoiser, to be quantized; none: all that the form takes",
    )
    kept: tuple[KeptLayer, ...] = Field((), description="why other layers are not")
    calibration: CalibrationOptions = CalibrationOptions()
    height: int | None = Field(None, ge=1, description="with width: for this picture size only")
    width: int | None = Field(None, ge=1)
    plan: PlanBuild = PlanBuild()

    @model_validator(mode="after")
    def _can_be_built(self) -> Self:
        if (self.height is None) != (self.width is None):
            raise ValueError("height and width fix a picture size together: give both or none")
        if (self.runtime, self.precision) == ("onnxruntime", "bf16"):
            raise ValueError(
                "onnxruntime computes nothing in bf16 on a CPU: choose precision fp32, fp16 or "
                "int8, or runtime openvino or tensorrt"
            )
        if self.precision == "fp8" and self.runtime != "tensorrt":
            raise ValueError(f"{self.runtime} computes nothing in fp8: choose int8, or tensorrt")
        if self.weights_only and (self.runtime, self.precision) != ("onnxruntime", "int8"):
            raise ValueError(
                "weights only are quantized for onnxruntime, in int8; got "
                f"{self.runtime} {self.precision}"
            )
        return self

    @property
    def size(self) -> tuple[int, int] | None:
        return None if self.height is None or self.width is None else (self.height, self.width)

    @property
    def name(self) -> str:
        """`openvino-int8`; `onnxruntime-int8-weights`; of one size: `openvino-int8-512x768`."""
        form = "-weights" if self.weights_only else ""
        return self._sized(f"{self.runtime}-{self.precision}{form}")

    @property
    def is_quantized(self) -> bool:
        return self.precision in ("int8", "fp8")

    @property
    def graph_precision(self) -> TypedPrecision:
        """Of the float graphs; OpenVINO computes in bfloat16 by a hint, from float32 ones."""
        if self.is_quantized:
            return "fp16" if self.runtime == "tensorrt" else "fp32"
        hinted = self.runtime == "openvino" and self.precision == "bf16"
        return "fp32" if hinted else self.precision  # type: ignore[return-value]

    def graph(self, network: str, spec: NetworkSpec, precision: TypedPrecision) -> str:
        """The file of a float network; variants share it, and one without sizes serves them all."""
        has_size = any(tensor.axes() - {"batch"} for tensor in spec.inputs)
        folder = f"graphs/{precision}"
        return f"{self._sized(folder) if has_size else folder}/{network}.onnx"

    @property
    def calibration_file(self) -> str:
        """Where an artifact keeps the rows: those of one picture size are not those of another."""
        return f"{self._sized(self.calibration.file.removesuffix('.npz'))}.npz"

    @property
    def quantized_folder(self) -> str:
        return f"graphs/{self.name}"

    def check(self, model: ModelSpec) -> None:
        """Raises OptionError for a picture size or profile that the model cannot have."""
        image = model.image
        if self.size and image.multiple is None and self.size != (image.height, image.width):
            raise OptionError(
                f"this model makes {image.height}x{image.width} only, got {self.height}x"
                f"{self.width}; leave height and width out"
            )
        for name, side in zip(("height", "width"), self.size or (), strict=False):
            if side % (image.multiple or 1):
                raise OptionError(f"{name} must be a multiple of {image.multiple}, got {side}")
        if self.is_quantized and not self.weights_only:
            self.calibration.check()
        for network in model.networks:
            self.plan.profiles(model, network, self.size)
        fewest = min(ranges.batch[2] for ranges in self.plan.ranges)
        if fewest < 2 and model.guidance == "classifier_free":
            raise OptionError(f"--profile: batch must reach 2, for a guided step; got {fewest}")

    def _sized(self, name: str) -> str:
        return f"{name}-{self.height}x{self.width}" if self.size else name

    def is_built(self, variant: Variant | None) -> bool:
        """Whether a manifest has this variant, made the same way (its plans may be missing).

        Where no layers are asked for, whichever are quantized are right.
        """
        if variant is None or variant.build != self._build:
            return False
        made = variant.quantization
        if made is None:
            return True
        calibrated = made.calibration in (None, self.calibration_file)
        return calibrated and self.layers in (None, made.layers)

    @property
    def _build(self) -> dict[str, object] | None:
        return self.plan.model_dump(mode="json") if self.runtime == "tensorrt" else None

    def describe(
        self, graphs: dict[str, str], quantization: Quantization | None, size_bytes: int
    ) -> Variant:
        """The manifest's entry: it runs the graphs, or plans that are still to be built."""
        has_plans = self.runtime == "tensorrt"
        return Variant(
            runtime=self.runtime,
            precision=self.precision,
            runtime_version=installed_version(self.runtime),
            size=self.size,
            networks={} if has_plans else graphs,
            graphs=graphs if has_plans else {},
            build=self._build,  # type: ignore[arg-type]
            quantization=quantization,
            size_bytes=size_bytes,
            max_batch=min(r.batch[2] for r in self.plan.ranges) if has_plans else None,
        )


def installed_version(runtime: str) -> str:
    """The version of a runtime's package here; nothing where it is not installed."""
    packages = {"onnxruntime": ("onnxruntime", "onnxruntime-gpu")}.get(runtime, (runtime,))
    for package in packages:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return ""

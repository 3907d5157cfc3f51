"""An ONNX graph as a TensorRT plan for this machine's GPU: options, profiles, build, refit."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from engine.backends.spec import concrete_shape
from engine.backends.target import Device, HardwareCompatibility, PlanTarget
from engine.errors import ArtifactError, OptionError
from engine.manifest import NetworkSpec
from engine.options import Options
from export.builder import Progress, build, refit
from export.profile import Profile
from export.timing_cache import cache_path

Range = tuple[int, int, int]  # min, opt, max


class PlanOptions(Options):
    """How a plan is built; precision is not here, since it stands in the graph."""

    optimization_level: int = Field(3, ge=0, le=5, description="higher: slower build, faster plan")
    workspace_gib: float | None = Field(None, gt=0, description="none: all of the GPU's memory")
    tf32: bool = Field(False, description="fp32 products with 10 bits of mantissa")
    refit: bool = Field(False, description="other weights may be put in later")
    strip_plan: bool = Field(False, description="leave the weights out, for refit to put back")
    weight_streaming: bool = Field(False, description="weights may stay in host memory")
    version_compatible: bool = Field(False, description="later TensorRT versions run it too")
    hardware_compatibility: HardwareCompatibility = "none"

    @model_validator(mode="after")
    def _refit_needs_the_full_runtime(self) -> Self:
        if self.version_compatible and (self.refit or self.strip_plan):
            raise ValueError(
                "a version-compatible plan runs on the lean runtime, which cannot refit; choose "
                "version_compatible, or refit and strip_plan"
            )
        return self


def default_profile(spec: NetworkSpec, batch: Range, axes: Mapping[str, Range]) -> Profile:
    """The ranges of every input, from those of the batch and of the other symbolic axes.

    Raises OptionError for an axis without a range, a range of no axis, or one out of order.
    """
    ranges = {**axes, "batch": batch}
    names = {axis for tensor in spec.inputs for axis in tensor.axes()}
    if unknown := axes.keys() - names:
        raise OptionError(
            f"axis '{min(unknown)}' is not one of the inputs'; allowed: {', '.join(sorted(names))}"
        )
    if missing := names - ranges.keys():
        raise OptionError(f"axis '{min(missing)}' needs a range: min, opt and max")
    for name in names:
        low, usual, high = ranges[name]
        if not 1 <= low <= usual <= high:
            raise OptionError(
                f"the range of axis '{name}' must be 1 <= min <= opt <= max, got {ranges[name]}"
            )
    least, best, most = ({name: ranges[name][which] for name in names} for which in range(3))
    return Profile(
        shapes={
            tensor.name: (
                concrete_shape(tensor, least),
                concrete_shape(tensor, best),
                concrete_shape(tensor, most),
            )
            for tensor in spec.inputs
        }
    )


def build_plan(
    graph: Path,
    plan: Path,
    profiles: Sequence[Profile],
    options: PlanOptions | None = None,
    progress: Progress | None = None,
) -> PlanTarget:
    """Build a plan for the GPU of this machine, with whatever precision the graph has.

    Raises RuntimeUnavailableError without TensorRT or a GPU, OptionError for profiles that do not
    suit the graph, ArtifactError with TensorRT's reason where it cannot build; `plan` then stays
    as it was. What `progress` raises ends the build.
    """
    tensorrt_version, device = installed()
    options = options or PlanOptions()
    if not graph.is_file():
        raise ArtifactError(f"graph '{graph}' does not exist; export the checkpoint again")
    timings = cache_path(tensorrt_version, device)
    build(graph, plan, profiles, options, progress, timings)
    return PlanTarget(
        tensorrt_version=tensorrt_version,
        gpu=device.name,
        compute_capability=device.compute_capability,
        hardware_compatibility=options.hardware_compatibility,
        version_compatible=options.version_compatible,
        has_weights=not options.strip_plan,
    )


def refit_plan(plan: Path, graph: Path, out: Path) -> None:
    """Put a graph's weights into a plan built with `refit` or `strip_plan`; `out` may be `plan`.

    After `strip_plan` alone the weights must be those of the build, which TensorRT cannot check.
    Raises as `build_plan`; `out` then stays as it was.
    """
    installed()
    refit(plan, graph, out)


def installed() -> tuple[str, Device]:
    """TensorRT's version and this machine's GPU. Raises RuntimeUnavailableError."""
    from engine.backends.plan import tensorrt_version

    version = tensorrt_version()
    from engine.backends.cuda import open_device

    return version, open_device()

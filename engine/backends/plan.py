"""A plan as TensorRT loads it: its tensors, its profiles, its weights, and what TensorRT said."""

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from engine.errors import ArtifactError, OptionError, RuntimeUnavailableError
from engine.manifest import NetworkSpec

try:
    import tensorrt as trt
except ModuleNotFoundError:
    raise RuntimeUnavailableError(
        "tensorrt is not installed; pip install 'vitrine[tensorrt]'"
    ) from None
except ImportError as error:
    raise RuntimeUnavailableError(
        f"tensorrt cannot load its libraries: {error}; pip install 'vitrine[tensorrt]'"
    ) from None

Shape = tuple[int, ...]
Ranges = dict[str, tuple[Shape, Shape]]  # what one profile allows: every input's min and max

DTYPES = {
    trt.DataType.FLOAT: "float32",
    trt.DataType.HALF: "float16",
    trt.DataType.INT64: "int64",
    trt.DataType.INT32: "int32",
    trt.DataType.UINT8: "uint8",
    trt.DataType.BOOL: "bool",
}


class Log(trt.ILogger):
    """TensorRT's own errors, for the message of ours."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self._errors: deque[str] = deque(maxlen=4)

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
            self._errors.append(msg.strip())

    def take(self) -> str:
        """The last errors since this was asked."""
        text = " | ".join(self._errors) or "TensorRT gave no reason"
        self._errors.clear()
        return text


def tensorrt_version() -> str:
    """The installed version, e.g. `10.16.1.11`."""
    return trt.__version__


def deserialize(
    path: Path, log: Log, host_code_allowed: bool = False
) -> tuple[trt.Runtime, trt.ICudaEngine]:
    """A plan in memory, with the runtime that must outlive it.

    `host_code_allowed`: a version-compatible plan brings machine code that this process then runs.
    Raises ArtifactError with TensorRT's own reason.
    """
    try:
        plan = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"cannot read the plan '{path}': {error.strerror}") from None
    try:
        runtime = trt.Runtime(log)
    except TypeError:  # what the bindings make of a null pointer
        raise RuntimeUnavailableError(f"TensorRT does not start: {log.take()}") from None
    runtime.engine_host_code_allowed = host_code_allowed
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise ArtifactError(
            f"TensorRT {tensorrt_version()} cannot load the plan '{path}': {log.take()}; build it "
            f"for this machine: vitrine plan {path.parent.parent}"
        )
    return runtime, engine


def check_tensors(engine: trt.ICudaEngine, spec: NetworkSpec, path: Path) -> None:
    """Compare names, direction and dtype with the manifest. Raises ArtifactError."""
    found = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        mode = "input" if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else "output"
        dtype = engine.get_tensor_dtype(name)
        place = "" if engine.get_tensor_location(name) == trt.TensorLocation.DEVICE else " on host"
        found[name] = f"{mode} {DTYPES.get(dtype, dtype.name)}{place}"
    wanted = {tensor.name: f"input {tensor.dtype}" for tensor in spec.inputs}
    wanted |= {tensor.name: f"output {tensor.dtype}" for tensor in spec.outputs}
    if found != wanted:
        raise ArtifactError(
            f"'{path}' has {_listed(found)}, but its manifest says {_listed(wanted)}; "
            f"build it again: vitrine plan {path.parent.parent}"
        )


def set_weight_budget(engine: trt.ICudaEngine, budget_bytes: int | None, path: Path) -> None:
    """Say how many bytes of weights stay on the GPU; must come before any context.

    Raises OptionError for a plan that cannot stream its weights, or a budget that is not taken.
    """
    streamable = engine.streamable_weights_size
    if streamable == 0:
        if budget_bytes is not None:
            raise OptionError(
                f"weight_budget_bytes is {budget_bytes}, but '{path}' was not built with weight "
                "streaming"
            )
        return
    if budget_bytes is None:
        budget_bytes = engine.get_weight_streaming_automatic_budget()
    if not 0 <= budget_bytes <= streamable:
        raise OptionError(f"weight_budget_bytes must be 0..{streamable}, got {budget_bytes}")
    engine.weight_streaming_budget_v2 = budget_bytes


def profile_ranges(engine: trt.ICudaEngine, inputs: Sequence[str]) -> list[Ranges]:
    """What each optimisation profile of a plan allows."""
    profiles = []
    for index in range(engine.num_optimization_profiles):
        ranges = {}
        for name in inputs:
            smallest, _, largest = engine.get_tensor_profile_shape(name, index)
            ranges[name] = (tuple(smallest), tuple(largest))
        profiles.append(ranges)
    return profiles


def fitting_profile(shapes: Mapping[str, Shape], profiles: Sequence[Ranges], path: Path) -> int:
    """The tightest profile that takes these shapes: its kernels were chosen nearest to them.

    Raises OptionError that names the shapes and what every profile allows.
    """
    fitting = [index for index, ranges in enumerate(profiles) if _fits(shapes, ranges)]
    if not fitting:
        allowed = " or ".join(_listed(_range_texts(ranges)) for ranges in profiles)
        given = _listed({name: _shape_text(shape) for name, shape in shapes.items()})
        raise OptionError(
            f"'{path}' takes {allowed}, got {given}; build it with wider ranges: vitrine plan "
            f"{path.parent.parent}"
        )
    return min(fitting, key=lambda index: _volume(profiles[index]))


def _fits(shapes: Mapping[str, Shape], ranges: Ranges) -> bool:
    for name, shape in shapes.items():
        smallest, largest = ranges[name]
        if len(shape) != len(smallest):
            return False
        sizes = zip(smallest, shape, largest, strict=True)
        if not all(low <= size <= high for low, size, high in sizes):
            return False
    return True


def _volume(ranges: Ranges) -> int:
    return sum(int(np.prod(largest, dtype=np.int64)) for _, largest in ranges.values())


def _range_texts(ranges: Ranges) -> dict[str, str]:
    return {
        name: _shape_text(low) if low == high else f"{_shape_text(low)}..{_shape_text(high)}"
        for name, (low, high) in ranges.items()
    }


def _shape_text(shape: Shape) -> str:
    return "x".join(str(size) for size in shape) or "scalar"


def _listed(texts: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {text}" for name, text in sorted(texts.items()))

"""A network on OpenVINO's CPU device: an ONNX file, compiled anew for every input shape."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from engine.backends.spec import Array, axis_sizes, concrete_shape
from engine.errors import ArtifactError, RuntimeUnavailableError
from engine.manifest import NetworkSpec, TensorSpec

if TYPE_CHECKING:
    import openvino

# A compiled shape keeps its own copy of the weights, about 1.5 times their size, and gains
# 1.1-1.6 times the speed for a small U-Net, 1.1 for one of 300 MiB.
STATIC_WEIGHTS_LIMIT_BYTES = 64 * 2**20


class OpenVINOBackend:
    """One compiled model for each of the first input shapes, one dynamic model for the rest.

    OpenVINO plans memory and kernels ahead where shapes are static. Shapes beyond
    `max_static_shapes`, and all shapes of a large network, share one dynamic model: nothing is
    thrown out, so that no traffic can make it compile again and again.
    """

    def __init__(
        self, path: Path, spec: NetworkSpec, precision: str = "fp32", max_static_shapes: int = 8
    ) -> None:
        """Read a file; `precision` bf16 computes in bf16 from fp32 weights.

        Raises RuntimeUnavailableError where OpenVINO is not installed or the CPU lacks bf16,
        ArtifactError for a file that it cannot read or that takes other inputs than `spec`.
        """
        try:
            import openvino
        except ImportError:
            raise RuntimeUnavailableError(
                "openvino is not installed; pip install 'vitrine[openvino]'"
            ) from None
        self._core = openvino.Core()  # sends no telemetry: of OpenVINO only convert_model does
        self._options = compile_options(precision, self._cpu_has_bf16())
        self._path = path
        self._spec = spec
        try:
            self._model = self._core.read_model(path)
        except RuntimeError as error:
            raise ArtifactError(f"openvino cannot load '{path}': {_reason(error)}") from error
        _check_tensors(self._model, spec, path)
        small = _weight_bytes(self._model) <= STATIC_WEIGHTS_LIMIT_BYTES
        self._max_static_shapes = max_static_shapes if small else 0
        self._static: dict[tuple[int, ...], openvino.InferRequest] = {}
        self._dynamic: openvino.InferRequest | None = None

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._spec.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._spec.outputs

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """One call; compiles first where the shape is new. Raises OptionError for a wrong feed."""
        request = self._request(axis_sizes(feed, self._spec.inputs))
        values = request.infer(dict(feed), share_inputs=True, share_outputs=True)
        return {tensor.name: values[tensor.name] for tensor in self._spec.outputs}

    def close(self) -> None:
        self._static.clear()
        del self._dynamic, self._model, self._core

    def _request(self, sizes: Mapping[str, int]) -> "openvino.InferRequest":
        """The request for these sizes of the symbolic axes, kept or made."""
        key = tuple(sizes.values())
        if key in self._static:
            return self._static[key]
        if len(self._static) < self._max_static_shapes:
            model = self._model.clone()  # shares the weights that are not compiled yet
            model.reshape({t.name: concrete_shape(t, sizes) for t in self._spec.inputs})
            self._static[key] = self._compile(model)
            return self._static[key]
        if self._dynamic is None:
            self._dynamic = self._compile(self._model)
        return self._dynamic

    def _compile(self, model: "openvino.Model") -> "openvino.InferRequest":
        try:
            return self._core.compile_model(model, "CPU", self._options).create_infer_request()
        except RuntimeError as error:
            raise ArtifactError(
                f"openvino cannot compile '{self._path}': {_reason(error)}; "
                "run its onnxruntime variant"
            ) from error

    def _cpu_has_bf16(self) -> bool:
        return "BF16" in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def compile_options(precision: str, cpu_has_bf16: bool) -> dict[str, str]:
    """OpenVINO's properties; without a precision hint it takes bf16 wherever the CPU has it.

    Raises RuntimeUnavailableError for bf16 on a CPU without it, where OpenVINO would fall back.
    """
    if precision == "bf16" and not cpu_has_bf16:
        raise RuntimeUnavailableError(
            "openvino-bf16 needs a CPU with bf16 instructions (avx512_bf16 or amx_bf16) and this "
            "one has none; run the fp32 variant"
        )
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
    }


def _check_tensors(model: "openvino.Model", spec: NetworkSpec, path: Path) -> None:
    """Compare names with the manifest. Raises ArtifactError."""
    for what, ports, tensors in (
        ("takes", model.inputs, spec.inputs),
        ("returns", model.outputs, spec.outputs),
    ):
        found = {port.get_any_name() for port in ports}
        wanted = {tensor.name for tensor in tensors}
        if found != wanted:
            raise ArtifactError(
                f"'{path}' {what} {sorted(found)}, but its manifest says {sorted(wanted)}; "
                "export it again"
            )


def _weight_bytes(model: "openvino.Model") -> int:
    constants = (node for node in model.get_ops() if node.get_type_name() == "Constant")
    return sum(node.get_byte_size() for node in constants)


def _reason(error: RuntimeError) -> str:
    """OpenVINO's message without the lines that name its own source files."""
    lines = [line for line in str(error).splitlines() if line and "Exception from" not in line]
    return " ".join(lines)

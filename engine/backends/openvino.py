"""A network on OpenVINO's CPU device: an ONNX file or OpenVINO's own `.xml`, compiled here."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine.backends.spec import Array, axis_sizes, concrete_shape
from engine.errors import ArtifactError, RuntimeUnavailableError
from engine.manifest import NetworkSpec, TensorSpec

if TYPE_CHECKING:
    import openvino

# A compiled shape keeps its own copy of the weights, about 1.5 times their size, and gains
# 1.1-1.6 times the speed for a small U-Net, 1.1 for one of 300 MiB.
STATIC_WEIGHTS_LIMIT_BYTES = 64 * 2**20
LARGEST_BATCH = 32  # a row costs no less in a larger one


class OpenVINOBackend:
    """A network that OpenVINO compiles for static shapes where that is worth it, or for any shape.

    OpenVINO plans memory and kernels ahead where shapes are static. A small network runs pictures
    of the usual size in static batches of powers of two, into which calls are split. Pictures of
    other sizes, and all of a large network, share one dynamic build. Which of the two a picture
    gets does not depend on the traffic: in bf16 and int8 their last bits may differ.
    """

    def __init__(
        self,
        path: Path,
        spec: NetworkSpec,
        precision: str = "fp32",
        usual_sizes: Mapping[str, int] | None = None,
    ) -> None:
        """Read a file; `precision` bf16 computes in bf16 from fp32 weights.

        `usual_sizes`: of the axes beside the batch, for the picture size that most requests have.
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
        self._options = compile_options(precision, cpu_has_bf16())
        self._path = path
        self._spec = spec
        try:
            self._model = self._core.read_model(path)
        except RuntimeError as error:
            raise ArtifactError(f"openvino cannot load '{path}': {_reason(error)}") from error
        _check_tensors(self._model, spec, path)
        self._is_small = _weight_bytes(self._model) <= STATIC_WEIGHTS_LIMIT_BYTES
        self._usual_sizes = dict(usual_sizes or {})
        self._static: dict[int, openvino.InferRequest] = {}  # by batch
        self._dynamic: openvino.InferRequest | None = None

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._spec.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._spec.outputs

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """One call; compiles first where the shape is new. Raises OptionError for a wrong feed."""
        sizes = axis_sizes(feed, self._spec.inputs)
        rows = sizes.pop("batch", None)
        if not rows or not self._is_small or sizes != self._usual_sizes:
            return self._infer(self._dynamic_request(), feed)
        parts: list[dict[str, Array]] = []
        start = 0
        for batch in split_batch(rows):
            part = {name: _rows(array, start, batch) for name, array in feed.items()}
            outputs = self._infer(self._static_request(batch), part)
            if batch == rows:
                return outputs
            parts.append({name: array.copy() for name, array in outputs.items()})
            start += batch
        return {name: np.concatenate([p[name] for p in parts])[:rows] for name in parts[0]}

    def close(self) -> None:
        self._static.clear()
        del self._dynamic, self._model, self._core

    def _infer(
        self, request: "openvino.InferRequest", feed: Mapping[str, Array]
    ) -> dict[str, Array]:
        values = request.infer(dict(feed), share_inputs=True, share_outputs=True)
        return {tensor.name: values[tensor.name] for tensor in self._spec.outputs}

    def _dynamic_request(self) -> "openvino.InferRequest":
        if self._dynamic is None:
            self._dynamic = self._compile(self._model)
        return self._dynamic

    def _static_request(self, batch: int) -> "openvino.InferRequest":
        """The request for a batch of pictures of the usual size, kept or made."""
        if batch not in self._static:
            sizes = {**self._usual_sizes, "batch": batch}
            model = self._model.clone()  # shares the weights that are not compiled yet
            model.reshape({t.name: concrete_shape(t, sizes) for t in self._spec.inputs})
            self._static[batch] = self._compile(model)
        return self._static[batch]

    def _compile(self, model: "openvino.Model") -> "openvino.InferRequest":
        try:
            return self._core.compile_model(model, "CPU", self._options).create_infer_request()
        except RuntimeError as error:
            raise ArtifactError(
                f"openvino cannot compile '{self._path}': {_reason(error)}; "
                "run its onnxruntime variant"
            ) from error


def cpu_has_bf16() -> bool:
    """Whether this CPU computes in bfloat16."""
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def split_batch(rows: int) -> list[int]:
    """Batches of powers of two for so many rows; an odd number over one is one row more.

    Batches under four cost more a row, so 7 rows are 8 and not 4 + 2 + 1.
    """
    rest = rows if rows == 1 else rows + rows % 2
    batches = [LARGEST_BATCH] * (rest // LARGEST_BATCH)
    rest %= LARGEST_BATCH
    return batches + [1 << bit for bit in reversed(range(rest.bit_length())) if rest >> bit & 1]


def _rows(array: Array, start: int, count: int) -> Array:
    """So many rows from `start`; the last one stands in for what is missing."""
    part = array[start : start + count]
    return part if len(part) == count else np.concatenate([part, part[-1:]])


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
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",  # or it quantizes what int8 weights are given
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

"""A network on ONNX Runtime's CPU provider."""

from collections.abc import Mapping
from pathlib import Path

from engine.backends.spec import Array
from engine.errors import ArtifactError, RuntimeUnavailableError
from engine.manifest import NetworkSpec, TensorSpec


class OnnxRuntimeBackend:
    """An ONNX file in an `InferenceSession`."""

    def __init__(self, path: Path, spec: NetworkSpec) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise RuntimeUnavailableError(
                "onnxruntime is not installed; pip install 'vitrine[cpu]'"
            ) from None
        onnxruntime.disable_telemetry_events()
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's own exceptions share no public base
            raise ArtifactError(f"onnxruntime cannot load '{path}': {error}") from error
        self._spec = spec
        self._output_names = [tensor.name for tensor in spec.outputs]
        found = {tensor.name for tensor in self._session.get_inputs()}
        wanted = {tensor.name for tensor in spec.inputs}
        if found != wanted:
            raise ArtifactError(
                f"'{path}' takes {sorted(found)}, but its manifest says {sorted(wanted)}; "
                "export it again"
            )

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._spec.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._spec.outputs

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        values = self._session.run(self._output_names, dict(feed))
        return dict(zip(self._output_names, values, strict=True))

    def close(self) -> None:
        del self._session

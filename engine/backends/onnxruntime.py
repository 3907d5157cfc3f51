"""A network on ONNX Runtime: the CPU, CUDA and TensorRT providers."""

import contextlib
import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine.backends.providers import (
    Profile,
    Resolved,
    available_providers,
    cache_folder,
    check_provider,
    may_capture,
    missing_library,
    provider_options,
    resolve_provider,
)
from engine.backends.spec import Array, Provider, axis_sizes, concrete_shape
from engine.errors import ArtifactError, OptionError, RuntimeUnavailableError
from engine.manifest import NetworkSpec, TensorSpec

if TYPE_CHECKING:
    import onnxruntime

EAGER = -1  # the graph id of a run that neither captures nor replays
_EAGER_RUNS = 2  # memory is allocated in these; a capture may not allocate


class OnnxRuntimeBackend:
    """An ONNX file in an `InferenceSession`; weights kept outside it are found beside it."""

    def __init__(
        self,
        path: Path,
        spec: NetworkSpec,
        provider: Provider = "auto",
        precision: str = "fp32",
        *,
        profile: Profile | None = None,
        cuda_graphs: bool = True,
        max_shapes: int = 16,
        weights_only: bool = False,
    ) -> None:
        """Open a session; `precision` only stands in messages.

        `profile`: shapes that provider tensorrt builds for; without one it builds anew whenever a
        shape leaves what it has seen. `max_shapes`: input shapes that keep their device memory, the
        first ones. `cuda_graphs`: record each of these and replay it; provider tensorrt holds one
        recording, so only where the shape is fixed, by `spec` or by `profile`.
        `weights_only`: nothing but weights is quantized, so they are made float once; otherwise
        products with them take another path for one row than for many, with other last bits.
        Raises RuntimeUnavailableError for a provider that is missing or does not start,
        ArtifactError for a file that does not load or that takes other inputs than `spec`.
        """
        self._provider = resolve_provider(provider, available_providers())
        self._spec = spec
        self._session, self._captures = _open_session(
            path,
            self._provider,
            precision,
            cuda_graphs and may_capture(self._provider, spec, profile),
            profile,
            weights_only,
        )
        self._max_shapes = max_shapes
        self._calls: dict[tuple[int, ...], BoundCall] = {}
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
        """One call. Raises OptionError for a feed that does not fit the inputs."""
        sizes = axis_sizes(feed, self._spec.inputs)
        if self._provider == "cpu":
            values = self._session.run(self._output_names, dict(feed))
            return dict(zip(self._output_names, values, strict=True))
        return self._call(sizes).run(feed)

    def close(self) -> None:
        self._calls.clear()
        del self._session

    def _call(self, sizes: Mapping[str, int]) -> "BoundCall":
        """The buffers of these sizes: kept for the first `max_shapes`, else for one call."""
        key = tuple(sizes.values())
        if key in self._calls:
            return self._calls[key]
        if self._captures and self._provider == "tensorrt" and self._calls:
            raise OptionError(
                f"this session recorded axes of {', '.join(map(str, self._calls))} and runs no "
                f"others, got {dict(sizes)}; open it with cuda_graphs=False"
            )
        if len(self._calls) >= self._max_shapes:
            return BoundCall(self._session, self._spec, sizes)
        graph_id = 1 + len(self._calls) if self._captures else EAGER
        self._calls[key] = BoundCall(self._session, self._spec, sizes, graph_id)
        return self._calls[key]


class BoundCall:
    """Buffers on a device at fixed addresses, for one set of input shapes, and its CUDA graph."""

    def __init__(
        self,
        session: "onnxruntime.InferenceSession",
        spec: NetworkSpec,
        sizes: Mapping[str, int],
        graph_id: int = EAGER,
        device: str = "cuda",
    ) -> None:
        self._session = session
        self._inputs = {t.name: _buffer(t, sizes, device) for t in spec.inputs}
        self._outputs = {t.name: _buffer(t, sizes, device) for t in spec.outputs}
        self._binding = session.io_binding()
        for name, buffer in self._inputs.items():
            self._binding.bind_ortvalue_input(name, buffer)
        for name, buffer in self._outputs.items():
            self._binding.bind_ortvalue_output(name, buffer)
        self._options = _run_options(graph_id)
        self._eager_runs_left = 0 if graph_id == EAGER else _EAGER_RUNS

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        for name, buffer in self._inputs.items():
            buffer.update_inplace(np.ascontiguousarray(feed[name]))
        while self._eager_runs_left:
            self._session.run_with_iobinding(self._binding, _run_options(EAGER))
            self._eager_runs_left -= 1
        self._session.run_with_iobinding(self._binding, self._options)
        return {name: buffer.numpy() for name, buffer in self._outputs.items()}


def _buffer(tensor: TensorSpec, sizes: Mapping[str, int], device: str) -> "onnxruntime.OrtValue":
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_shape_and_type(
        concrete_shape(tensor, sizes), np.dtype(tensor.dtype).type, device, 0
    )


def _run_options(graph_id: int) -> "onnxruntime.RunOptions":
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph_id))
    return options


def _open_session(
    path: Path,
    provider: Resolved,
    precision: str,
    cuda_graphs: bool,
    profile: Profile | None,
    weights_only: bool,
) -> tuple["onnxruntime.InferenceSession", bool]:
    """The session, and whether it records CUDA graphs.

    A graph whose nodes cannot be recorded runs without, and warns. Raises as the constructor.
    """
    import onnxruntime

    cache = None
    if provider != "cpu":
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what is missing; so do we
            onnxruntime.preload_dlls()  # CUDA's libraries where pip put them
    if provider == "tensorrt":
        cache = cache_folder(path, onnxruntime.__version__)
        cache.mkdir(parents=True, exist_ok=True)
    try:
        session = onnxruntime.InferenceSession(
            str(path),
            _session_options(weights_only),
            providers=provider_options(provider, cuda_graphs, profile, cache),
            enable_fallback=0,
        )
    except Exception as error:  # onnxruntime's own exceptions share no public base
        if cuda_graphs and "cannot use the graph capture feature" in str(error):
            warnings.warn(f"'{path}' runs without CUDA graphs: {error}", stacklevel=3)
            return _open_session(path, provider, precision, False, profile, weights_only)
        raise _load_error(error, path, provider, precision) from error
    check_provider(session.get_providers(), provider)
    return session, cuda_graphs


def _session_options(weights_only: bool) -> "onnxruntime.SessionOptions":
    """Idle threads sleep: where other work wants the cores, spinning made calls 1.3-3x slower."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if weights_only:
        options.add_session_config_entry("session.disable_quant_qdq", "1")  # folds what is constant
    return options


def _load_error(error: Exception, path: Path, provider: Resolved, precision: str) -> Exception:
    """What to raise for a session that does not open."""
    kind = type(error).__name__
    if kind == "NotImplemented":
        return RuntimeUnavailableError(
            f"onnxruntime's {provider} provider has no kernels for the {precision} graph '{path}' "
            f"({error}); run it on provider cuda or tensorrt, or run the fp32 variant, or "
            "openvino-bf16 for bf16 on a CPU"
        )
    if provider == "cpu" or kind in ("NoSuchFile", "InvalidProtobuf", "InvalidGraph"):
        return ArtifactError(f"onnxruntime cannot load '{path}': {error}")
    return RuntimeUnavailableError(
        f"onnxruntime's {provider} provider does not start: {missing_library(provider) or error}; "
        "install what it needs, or choose provider cpu"
    )

"""ONNX Runtime's execution providers: which one, its options, and whether it really started."""

import ctypes
import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from engine.backends.spec import Provider
from engine.errors import OptionError, RuntimeUnavailableError
from engine.manifest import NetworkSpec

Resolved = Literal["cpu", "cuda", "tensorrt"]
Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape, Shape]]  # (min, opt, max) by input name

PROVIDER_NAMES: dict[Resolved, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


def resolve_provider(provider: Provider, available: Collection[str]) -> Resolved:
    """`auto` is cuda where this onnxruntime was built with it, else cpu.

    Raises OptionError for an unknown provider, RuntimeUnavailableError for one not built in.
    """
    if provider not in get_args(Provider):
        raise OptionError(
            f"provider must be one of {', '.join(get_args(Provider))}, got {provider!r}"
        )
    if provider == "auto":
        return "cuda" if PROVIDER_NAMES["cuda"] in available else "cpu"
    if PROVIDER_NAMES[provider] not in available:
        raise RuntimeUnavailableError(
            f"this onnxruntime has no {provider} provider; "
            "pip uninstall onnxruntime, then pip install 'vitrine[gpu]'"
        )
    return provider


def may_capture(provider: Resolved, spec: NetworkSpec, profile: Profile | None) -> bool:
    """Whether runs can be recorded as CUDA graphs.

    Provider tensorrt replays its one recording whatever the shapes of a call are, so there the
    shapes must be fixed.
    """
    if provider == "tensorrt":
        pinned = profile is not None and all(low == high for low, _, high in profile.values())
        return pinned or not any(tensor.axes() for tensor in spec.inputs)
    return provider == "cuda"


def provider_options(
    provider: Resolved, cuda_graphs: bool, profile: Profile | None = None, cache: Path | None = None
) -> list[tuple[str, dict[str, str]]]:
    """The providers of a session, first choice first; a later one takes what an earlier cannot.

    `cache`: a folder for TensorRT's built engines and kernel timings; needed for tensorrt only.
    TensorRT is never asked for fp16: precision is in the graph.
    """
    cpu: tuple[str, dict[str, str]] = (PROVIDER_NAMES["cpu"], {})
    cuda = {"device_id": "0", "use_tf32": "0"}  # tf32 would make fp32 a 10-bit mantissa
    match provider:
        case "cpu":
            return [cpu]
        case "cuda":
            graphs = {"enable_cuda_graph": _flag(cuda_graphs)}
            return [(PROVIDER_NAMES["cuda"], cuda | graphs), cpu]
        case "tensorrt":
            assert cache is not None
            tensorrt = {
                "device_id": "0",
                "trt_engine_cache_enable": "1",
                "trt_engine_cache_path": str(cache),
                "trt_timing_cache_enable": "1",
                "trt_timing_cache_path": str(cache.parent),
                "trt_cuda_graph_enable": _flag(cuda_graphs),
                **_profile_options(profile or {}),
            }
            return [(PROVIDER_NAMES["tensorrt"], tensorrt), (PROVIDER_NAMES["cuda"], cuda), cpu]


def _flag(value: bool) -> str:
    return "1" if value else "0"


def _profile_options(profile: Profile) -> dict[str, str]:
    """`trt_profile_min_shapes` and its like as `sample:1x4x8x8,timestep:1`."""
    options = {}
    for index, which in enumerate(("min", "opt", "max") if profile else ()):
        shapes = (f"{name}:{'x'.join(map(str, p[index]))}" for name, p in profile.items())
        options[f"trt_profile_{which}_shapes"] = ",".join(shapes)
    return options


def cache_folder(path: Path, runtime_version: str) -> Path:
    """Where provider tensorrt keeps what it built from a file, under the user's cache folder.

    It names its files after the graph, not its weights, so every state of the file's folder (names,
    sizes, times: weights may lie beside the graph) has a folder of its own.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    files = sorted(file for file in path.resolve().parent.iterdir() if file.is_file())
    state = [path.resolve().as_posix()]
    state += [f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files]
    digest = hashlib.sha256("\n".join(state).encode()).hexdigest()
    return root / "vitrine" / f"onnxruntime-{runtime_version}" / digest[:16]


def available_providers() -> list[str]:
    """What the installed onnxruntime was built with. Raises RuntimeUnavailableError without it."""
    try:
        import onnxruntime
    except ImportError:
        raise RuntimeUnavailableError(
            "onnxruntime is not installed; pip install 'vitrine[cpu]'"
        ) from None
    onnxruntime.disable_telemetry_events()
    return list(onnxruntime.get_available_providers())


def check_provider(active: Sequence[str], provider: Resolved) -> None:
    """Refuse a session that lost its provider: onnxruntime logs that and runs on the CPU."""
    if PROVIDER_NAMES[provider] not in active:
        reason = missing_library(provider) or "its log above says why"
        raise RuntimeUnavailableError(
            f"onnxruntime dropped its {provider} provider: {reason}; install CUDA's and cuDNN's "
            "libraries (pip install 'onnxruntime-gpu[cuda,cudnn]'), or choose provider cpu"
        )


def missing_library(provider: Resolved) -> str:
    """What the dynamic loader says of a provider's library; nothing where it loads."""
    import onnxruntime

    name = f"libonnxruntime_providers_{provider}.so"
    library = Path(onnxruntime.__file__).parent / "capi" / name
    if library.is_file():
        try:
            ctypes.CDLL(str(library))
        except OSError as error:
            return str(error)
    return ""

"""TensorRT's timing cache in the user's cache folder: the second build of a network is quick."""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from engine.backends.target import Device
from engine.errors import OptionError

if TYPE_CHECKING:
    import tensorrt as trt


def cache_path(tensorrt_version: str, device: Device) -> Path:
    """`~/.cache/vitrine/tensorrt/10.16.1.11-sm_90.cache`, or under XDG_CACHE_HOME."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "vitrine" / "tensorrt" / f"{tensorrt_version}-{device.sm}.cache"


def load_cache(config: "trt.IBuilderConfig", path: Path) -> "trt.ITimingCache | None":
    """Give a build the timings of earlier ones, which the caller must hold until it is done.

    A cache that is damaged or of another GPU than its name says counts as empty, and the build
    replaces it. Raises OptionError where it cannot be read or its folder written: better now than
    after the build.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        found = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise _unusable(path, error) from None
    for timings in (found, b""):
        cache = config.create_timing_cache(timings)
        if cache is not None and config.set_timing_cache(cache, False):
            return cache
    return None


def save_cache(config: "trt.IBuilderConfig", path: Path) -> None:
    """Write what the build measured, whole or not at all. Raises OptionError."""
    cache = config.get_timing_cache()
    if cache is None:
        return
    try:
        write_whole(path, memoryview(cache.serialize()))
    except OSError as error:
        raise _unusable(path, error) from None


def _unusable(path: Path, error: OSError) -> OptionError:
    return OptionError(
        f"the timing cache '{path}' cannot be used: {error.strerror}; set XDG_CACHE_HOME to a "
        "folder that can be written"
    )


def write_whole(path: Path, content: memoryview) -> None:
    """Write a file under another name and rename it; a failure leaves what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)

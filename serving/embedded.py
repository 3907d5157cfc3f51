"""What the embedded Triton needs from this machine: its wheel, libraries and free ports."""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.errors import OptionError, RuntimeUnavailableError

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
LIBPYTHON = f"libpython{PYTHON}.so.1.0"
_STUB = "triton_python_backend_stub"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Ports(NamedTuple):
    """The three ports of a server; 0 is not chosen yet."""

    http: int
    grpc: int
    metrics: int


def install(folder: Path) -> Path:
    """Copy Triton's python backend with this Python's stub to `folder`; the server's path.

    In the wheel the stub is neither beside its backend nor executable. Raises
    RuntimeUnavailableError that names what is missing.
    """
    if int(np.__version__.split(".")[0]) >= 2:
        raise RuntimeUnavailableError(
            f"Triton's python backend reads numpy 1 arrays only, got numpy {np.__version__}; "
            "pip install 'numpy<2'"
        )
    triton = _wheel() / "pytriton" / "tritonserver"
    source = triton / "python_backend_stubs" / PYTHON / _STUB
    if not source.is_file():
        raise RuntimeUnavailableError(f"nvidia-pytriton has no stub for Python {PYTHON}")
    shutil.copytree(triton / "backends", folder / "backends")
    stub = shutil.copy(source, folder / "backends" / "python" / _STUB)
    Path(stub).chmod(0o755)
    _link_libpython(folder / "lib")
    for binary in (Path(stub), triton / "bin" / "tritonserver"):
        _require_libraries(binary, environment(folder))
    return triton / "bin" / "tritonserver"


def environment(folder: Path) -> dict[str, str]:
    """The environment of a server installed at `folder`.

    The stub finds its Python packages through the first `python3` on PATH.
    """
    libraries = [str(folder / "lib"), str(_wheel() / "nvidia_pytriton.libs")]
    path = [str(Path(sys.executable).parent)]
    return {
        **os.environ,
        "LD_LIBRARY_PATH": _joined(libraries, os.environ.get("LD_LIBRARY_PATH")),
        "PATH": _joined(path, os.environ.get("PATH")),
        "TMPDIR": str(folder),  # onnxruntime leaves a file there
    }


def _joined(first: list[str], rest: str | None) -> str:
    return os.pathsep.join([*first, rest] if rest else first)


def _wheel() -> Path:
    """The folder that nvidia-pytriton is installed in; pytriton itself is never imported."""
    spec = find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise RuntimeUnavailableError(
            "nvidia-pytriton is not installed; pip install 'vitrine[triton]'"
        )
    return Path(spec.origin).parent.parent


def _link_libpython(folder: Path) -> None:
    """Prefer the running Python's own library; builds of conda and uv have one beside them."""
    folder.mkdir()
    library = Path(sys.base_prefix) / "lib" / LIBPYTHON
    if library.is_file():
        (folder / LIBPYTHON).symlink_to(library)


def _require_libraries(binary: Path, environ: dict[str, str]) -> None:
    """Let the dynamic linker list what it would load, without running the program."""
    listing = subprocess.run(
        [str(binary)],
        env={**environ, "LD_TRACE_LOADED_OBJECTS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    ).stdout
    missing = [line.split()[0] for line in listing.splitlines() if line.endswith("not found")]
    if any(name.startswith("libpython") for name in missing):
        raise RuntimeUnavailableError(
            f"Triton's python backend needs {LIBPYTHON}, which this machine lacks; install it "
            f"(Debian, Ubuntu: apt install libpython{PYTHON}; a Python of uv or conda brings it)"
        )
    if missing:
        raise RuntimeUnavailableError(f"Triton needs {', '.join(missing)}, not on this machine")


def end_with_parent() -> Callable[[], None] | None:
    """For `preexec_fn`: SIGTERM the child when we are killed without a chance to stop it.

    Linux means our thread, not our process, so only for the thread that lives as long.
    """
    if threading.current_thread() is not threading.main_thread():
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM) and None


def reserve_ports(host: str, ports: Ports) -> Ports:
    """The same ports, each 0 replaced by a free one.

    Raises OptionError for one port twice, RuntimeUnavailableError for one that is taken.
    """
    chosen = [port for port in ports if port]
    if len(set(chosen)) < len(chosen):
        raise OptionError(
            f"ports must differ, got http {ports.http}, grpc {ports.grpc}, metrics {ports.metrics}"
        )
    with ExitStack() as held:  # all at once, so that no two zeros become the same port
        return Ports(*(_bind(held, host, name, port) for name, port in ports._asdict().items()))


def _bind(held: ExitStack, host: str, name: str, port: int) -> int:
    listener = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
    try:
        listener.bind((host, port))
    except socket.gaierror:
        raise OptionError(f"host must be an IPv4 address of this machine, got {host!r}") from None
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else "a port must be 0..65535"
        raise RuntimeUnavailableError(
            f"the {name} port {port} on {host} is not free ({reason}); end what holds it or "
            f"choose another: --{name}-port"
        ) from None
    return int(listener.getsockname()[1])

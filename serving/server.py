"""The embedded Triton: the server of the nvidia-pytriton wheel as a child process."""

import json
import os
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Self

from engine.errors import RuntimeUnavailableError
from engine.manifest import ModelSpec
from serving.embedded import Ports, end_with_parent, environment, install, reserve_ports
from serving.metrics import TickCounts, read_tick_counts
from serving.repository import repository_models

_POLL_S = 0.05
_LOG_TAIL_LINES = 15


class Server:
    """Serves a repository while the `with` block runs; on entry every model has made a picture.

    A port of 0 becomes a free one. Entering raises RuntimeUnavailableError where Triton, a
    library or a port is missing or a model does not load, and ArtifactError for a damaged
    repository.
    """

    def __init__(
        self,
        repository: Path,
        host: str = "127.0.0.1",
        http_port: int = 8000,
        grpc_port: int = 8001,
        metrics_port: int = 8002,
        ready_timeout_s: float = 60,
        stop_timeout_s: float = 10,
    ) -> None:
        self._repository, self._host = repository, host
        self._ports = Ports(http_port, grpc_port, metrics_port)
        self._ready_timeout_s, self._stop_timeout_s = ready_timeout_s, stop_timeout_s
        self._models: dict[str, ModelSpec] = {}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models served."""
        return tuple(self._models)

    @property
    def http_url(self) -> str:
        """Base of KServe v2 over HTTP."""
        return f"http://{self._reachable_host}:{self._ports.http}"

    @property
    def grpc_url(self) -> str:
        """`host:port`, as gRPC clients take it."""
        return f"{self._reachable_host}:{self._ports.grpc}"

    @property
    def metrics_url(self) -> str:
        """Triton's Prometheus metrics."""
        return f"http://{self._reachable_host}:{self._ports.metrics}/metrics"

    @property
    def _reachable_host(self) -> str:
        return "127.0.0.1" if self._host == "0.0.0.0" else self._host

    def __enter__(self) -> Self:
        self._models = repository_models(self._repository)
        self._ports = reserve_ports(self._host, self._ports)
        self._folder = tempfile.TemporaryDirectory(prefix="vitrine-triton-")
        try:
            self._start(Path(self._folder.name))
            self._wait_until_ready()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def require_alive(self) -> None:
        """Raises RuntimeUnavailableError with the end of Triton's log when it has died."""
        if self._process is None or self._process.poll() is None:
            return
        raise RuntimeUnavailableError(
            f"Triton ended with code {self._process.returncode}; its log ends:\n{self._log_tail()}"
        )

    def tick_counts(self, model: str) -> TickCounts:
        """Ticks and rows of a model since the start; the first tick is the readiness check's."""
        return read_tick_counts(self.metrics_url, model)

    def rows_per_tick(self, model: str, since: TickCounts | None = None) -> float:
        """Mean rows in a network call, since the start or since an earlier `tick_counts`."""
        return self.tick_counts(model).since(since or TickCounts(0, 0)).rows_per_tick

    def _start(self, folder: Path) -> None:
        binary = install(folder)
        with (folder / "triton.log").open("wb") as log:
            self._process = subprocess.Popen(
                [str(binary), *self._arguments(folder)],
                env=environment(folder),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us; and one group to end stubs with
                preexec_fn=end_with_parent(),
            )

    def _arguments(self, folder: Path) -> list[str]:
        return [
            f"--model-repository={self._repository.resolve()}",
            f"--backend-directory={folder / 'backends'}",
            f"--backend-config=python,shm-region-prefix-name={folder.name}",
            f"--http-address={self._host}",
            f"--http-port={self._ports.http}",
            f"--grpc-address={self._host}",
            f"--grpc-port={self._ports.grpc}",
            f"--metrics-address={self._host}",
            f"--metrics-port={self._ports.metrics}",
            "--allow-gpu-metrics=false",
            "--log-info=false",
            f"--exit-timeout-secs={round(self._stop_timeout_s)}",
        ]

    def _wait_until_ready(self) -> None:
        """Until Triton says so and every model has made a picture: its word alone is too early."""
        deadline = time.monotonic() + self._ready_timeout_s
        while not _answers(f"{self.http_url}/v2/health/ready"):
            self.require_alive()
            if time.monotonic() > deadline:
                raise RuntimeUnavailableError(
                    f"Triton was not ready within {self._ready_timeout_s:g} s; its log ends:\n"
                    f"{self._log_tail()}"
                )
            time.sleep(_POLL_S)
        for name, model in self._models.items():
            self._make_a_picture(name, model, max(deadline - time.monotonic(), 1))

    def _make_a_picture(self, name: str, model: ModelSpec, timeout_s: float) -> None:
        parameters = {"binary_data_output": True, "seed": 0}
        if model.defaults is not None:
            parameters["num_inference_steps"] = 1
        text = model.labels[0] if model.labels else ""
        subject = {"name": model.subject, "datatype": "BYTES", "shape": [1, 1], "data": [text]}
        body = json.dumps({"inputs": [subject], "parameters": parameters}).encode()
        url = f"{self.http_url}/v2/models/{name}/infer"
        try:
            with urllib.request.urlopen(url, body, timeout_s) as reply:
                reply.read()
        except OSError as error:
            detail = error.read().decode() if isinstance(error, urllib.error.HTTPError) else error
            raise RuntimeUnavailableError(
                f"model '{name}' loaded but makes no picture: {detail}; Triton's log ends:\n"
                f"{self._log_tail()}"
            ) from None

    def _log_tail(self) -> str:
        log = Path(self._folder.name) / "triton.log"
        lines = log.read_text("utf-8", "replace").splitlines()
        errors = [line for line in lines if line.startswith("E")]
        return "\n".join((errors or lines)[-_LOG_TAIL_LINES:])

    def _stop(self) -> None:
        """SIGTERM, then SIGKILL for whatever is left of Triton's process group."""
        try:
            if self._process is not None:
                self._process.terminate()
                self._process.wait(self._stop_timeout_s + 5)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if self._process is not None:
                _kill_group(self._process)
            for region in Path("/dev/shm").glob(f"{Path(self._folder.name).name}*"):
                region.unlink(missing_ok=True)  # left where a stub was killed
            self._folder.cleanup()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1):
            return True
    except OSError:
        return False


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()

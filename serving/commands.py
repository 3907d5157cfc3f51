"""`vitrine serve`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.console import AsJson, console, emit

if TYPE_CHECKING:
    from serving.server import Server

app = typer.Typer()


@app.command()
def serve(
    artifacts: Annotated[list[Path], typer.Argument(help="folders that vitrine export wrote")],
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0 is all")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="KServe v2 over HTTP; 0 takes a free one")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="KServe v2 over gRPC; 0 takes a free one")] = 8001,
    metrics_port: Annotated[int, typer.Option(help="Prometheus; 0 takes a free one")] = 8002,
    repository: Annotated[
        Path | None, typer.Option(help="keep the Triton repository here; default: a temporary one")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Serve artifacts with the embedded Triton until Ctrl-C or SIGTERM."""
    import signal
    import tempfile

    from serving.repository import write_repository
    from serving.server import Server

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both end as KeyboardInterrupt
    try:
        with tempfile.TemporaryDirectory(prefix="vitrine-repository-") as temporary:
            folder = write_repository(artifacts, repository or Path(temporary) / "repository")
            with Server(folder, host, http_port, grpc_port, metrics_port) as server:
                _report(server, as_json)
                _watch(server)
    except KeyboardInterrupt:
        console.print("stopped")


def _report(server: "Server", as_json: bool) -> None:
    console.print(
        f"serving {', '.join(server.models)}: HTTP {server.http_url}, gRPC {server.grpc_url}, "
        f"metrics {server.metrics_url}; Ctrl-C stops"
    )
    emit(
        {
            "models": list(server.models),
            "http": server.http_url,
            "grpc": server.grpc_url,
            "metrics": server.metrics_url,
        },
        as_json,
    )


def _watch(server: "Server") -> None:
    import time

    while True:
        server.require_alive()
        time.sleep(0.5)

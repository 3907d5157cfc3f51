"""The whole way, once: export, check, serve, request, compare - with the shipped checkpoints."""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.console import console
from engine.errors import ArtifactError, QualityError
from engine.images import Picture, grid
from engine.json_files import write_json
from engine.machine import this_machine
from engine.manifest import Floors, Quality
from engine.pipeline import open_pipeline
from engine.request import Request
from export.build import export
from export.gate import check
from export.requests import varied_requests
from serving.client import Client
from serving.repository import write_repository
from serving.server import Server

REQUESTS = 32  # a model
PARITY = Floors(psnr_db=60.0, ssim=0.9999)  # fp32 against fp32


@dataclass(frozen=True)
class Served:
    """What one model answered."""

    requests: Sequence[Request]
    pictures: Sequence[Picture]
    latencies_ms: Sequence[float]
    rows_per_tick: float
    byte_identical: int


def run_demo(checkpoints: Path, output: Path) -> dict[str, object]:
    """Run it all, write `gallery.png` and `report.json` to `output`, return the report.

    Raises ArtifactError without checkpoints, QualityError where a picture differs from the one
    made alone or a check falls short.
    """
    started = time.perf_counter()
    sources = sorted(path.parent for path in checkpoints.glob("*/model_index.json"))
    if not sources:
        raise ArtifactError(
            f"'{checkpoints}' has no checkpoints; run the demo in a clone of Vitrine or name the "
            "folder with --checkpoints"
        )
    parity = {source.name: _export_and_check(source, output) for source in sources}
    artifacts = [output / "artifacts" / source.name for source in sources]
    ready_seconds, served = _serve(artifacts, output / "repository")
    report: dict[str, object] = {
        "parity": {name: quality.model_dump() for name, quality in parity.items()},
        "served": {name: _figures(result) for name, result in served.items()},
        "ready_seconds": round(ready_seconds, 1),
        "seconds": round(time.perf_counter() - started, 1),
        "machine": this_machine().model_dump(),
    }
    _save_gallery(output / "gallery.png", served)
    write_json(output / "report.json", report)
    _require_identical(served)
    return report


def _export_and_check(checkpoint: Path, output: Path) -> Quality:
    artifact = output / "artifacts" / checkpoint.name
    console.print(f"export {checkpoint}")
    export(checkpoint, artifact)
    console.print(f"check  {artifact}")
    return check(artifact, checkpoint, REQUESTS, PARITY)


def _serve(artifacts: Sequence[Path], repository: Path) -> tuple[float, dict[str, Served]]:
    """Serve the artifacts and send every model its requests, all at once.

    Also returns the seconds from the start of Triton to its first pictures.
    """
    write_repository(artifacts, repository)
    started = time.perf_counter()
    with Server(repository, http_port=0, grpc_port=0, metrics_port=0) as server:
        ready_seconds = time.perf_counter() - started
        console.print(f"ready  {ready_seconds:.1f} s after the start of Triton")
        with Client(server.grpc_url) as client:
            served = {path.name: _request_all(server, client, path) for path in artifacts}
            return ready_seconds, served


def _request_all(server: Server, client: Client, artifact: Path) -> Served:
    pipeline = open_pipeline(artifact)
    requests = varied_requests(pipeline.model, REQUESTS)
    before = server.tick_counts(artifact.name)
    console.print(f"send   {len(requests)} requests to {artifact.name}")
    pictures, latencies_ms = _send(client, artifact.name, requests)
    counts = server.tick_counts(artifact.name).since(before)
    alone = [next(pipeline.generate([request])) for request in requests]
    pipeline.close()
    identical = sum(map(np.array_equal, pictures, alone))
    return Served(requests, pictures, latencies_ms, counts.rows_per_tick, identical)


def _send(
    client: Client, model: str, requests: Sequence[Request]
) -> tuple[list[Picture], list[float]]:
    """Pictures and latencies of requests that are all in flight together."""
    finished: dict[int, float] = {}

    def submit(index: int, request: Request) -> Future[Picture]:
        future = client.submit(model, **request.model_dump(exclude_none=True))
        future.add_done_callback(lambda _: finished.setdefault(index, time.perf_counter()))
        return future

    started = time.perf_counter()
    futures = [submit(index, request) for index, request in enumerate(requests)]
    pictures = [future.result() for future in futures]
    return pictures, [1000 * (finished[index] - started) for index in range(len(requests))]


def _figures(served: Served) -> dict[str, object]:
    return {
        "requests": len(served.requests),
        "byte_identical": served.byte_identical,
        "rows_per_tick": round(served.rows_per_tick, 2),
        "p50_ms": round(float(np.percentile(served.latencies_ms, 50)), 1),
        "p95_ms": round(float(np.percentile(served.latencies_ms, 95)), 1),
    }


def _require_identical(served: Mapping[str, Served]) -> None:
    for name, result in served.items():
        differing = len(result.requests) - result.byte_identical
        if differing:
            raise QualityError(
                f"{differing} of {len(result.requests)} pictures of {name} differ from those made "
                "alone; see gallery.png beside report.json"
            )


def _save_gallery(path: Path, served: Mapping[str, Served]) -> None:
    """Every served picture with what was asked for, eight a row."""
    pictures = [picture for result in served.values() for picture in result.pictures]
    captions = [_caption(request) for result in served.values() for request in result.requests]
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(pictures, 8, captions, scale=max(1, 96 // pictures[0].shape[0])).save(path)


def _caption(request: Request) -> str:
    if request.sampler is None:
        return f"{request.label}\nGAN, seed {request.seed}"
    steps, scale = request.num_inference_steps, request.guidance_scale
    return f"{request.label}\n{request.sampler}\n{steps} steps, cfg {scale:g}"

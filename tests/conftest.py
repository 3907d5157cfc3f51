"""Tiny models with random weights, and a real server for them: made in code, once a session."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.pipeline import Pipeline, open_pipeline
from serving.client import Client
from serving.repository import write_repository
from serving.server import Server

LABELS = ("bag", "boot", "coat")
RESOLUTION = 16


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that no worker is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def diffusion_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional U-Net with guidance, 16x16, one channel, v-prediction."""
    import torch

    from engine.checkpoint import save_checkpoint
    from engine.training.config import UNetConfig
    from engine.training.diffusion import build_unet

    torch.manual_seed(0)
    config = UNetConfig(block_out_channels=(8, 16), attention_head_dim=8, norm_num_groups=4)
    unet = build_unet(config, channels=1, resolution=RESOLUTION, classes=len(LABELS))
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-diffusion"
    save_checkpoint(folder, "DDIMPipeline", {"unet": unet}, LABELS, scheduler=_scheduler())
    return folder


def _scheduler():
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False
    )


@pytest.fixture(scope="session")
def gan_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional generator, 16x16, one channel."""
    import torch

    from engine.checkpoint import save_checkpoint
    from engine.networks.gan import Generator

    torch.manual_seed(0)
    generator = Generator(
        latent_size=16, num_class_embeds=len(LABELS), out_channels=1, block_out_channels=(16, 8, 8)
    )
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-gan"
    save_checkpoint(folder, "GanPipeline", {"generator": generator}, LABELS)
    return folder


@pytest.fixture(scope="session")
def diffusion_artifact(
    diffusion_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The exported artifact of `diffusion_checkpoint`; read only."""
    return _export(diffusion_checkpoint, tmp_path_factory)


@pytest.fixture(scope="session")
def gan_artifact(gan_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported artifact of `gan_checkpoint`; read only."""
    return _export(gan_checkpoint, tmp_path_factory)


def _export(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from export.build import export

    return export(checkpoint, tmp_path_factory.mktemp("artifacts") / checkpoint.name).artifact.path


@pytest.fixture
def checkpoint(diffusion_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of `diffusion_checkpoint` to damage."""
    return Path(shutil.copytree(diffusion_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def artifact(diffusion_artifact: Path, tmp_path: Path) -> Path:
    """A copy of `diffusion_artifact` to damage or to check, alone in its folder."""
    return Path(shutil.copytree(diffusion_artifact, tmp_path / "artifacts" / "tiny"))


@pytest.fixture(scope="session")
def diffusion(diffusion_artifact: Path) -> Pipeline:
    """`diffusion_artifact` in process; it holds no state of a request."""
    return open_pipeline(diffusion_artifact)


@pytest.fixture(scope="session")
def gan(gan_artifact: Path) -> Pipeline:
    """`gan_artifact` in process."""
    return open_pipeline(gan_artifact)


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """For tiny tensors: on a busy machine a second thread makes torch ten times slower."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def repository(
    diffusion_artifact: Path, gan_artifact: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A Triton repository of both artifacts; read only."""
    folder = tmp_path_factory.mktemp("triton") / "repository"
    return write_repository([diffusion_artifact, gan_artifact], folder)


@pytest.fixture(scope="session")
def server(repository: Path) -> Iterator[Server]:
    """The embedded Triton with models `tiny-diffusion` and `tiny-gan`, on free ports."""
    ports = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
    with Server(repository, **ports, stop_timeout_s=2) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[Client]:
    with Client(server.grpc_url) as connected:
        yield connected

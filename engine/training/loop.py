"""The training loop: batches, progress, TensorBoard, sample grids, checkpoints, resume."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Protocol

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from engine.errors import QualityError
from engine.training.config import DiffusionConfig, GanConfig
from engine.training.data import Dataset, batch_indices, load_dataset, to_network_range
from engine.training.diffusion import DiffusionTrainer
from engine.training.gan import GanTrainer
from engine.training.samples import save_samples
from engine.training.state import load_state, save_state


class Trainer(Protocol):
    """What the loop needs of a kind of training."""

    def modules(self) -> dict[str, nn.Module]: ...
    def optimizers(self) -> dict[str, torch.optim.Optimizer]: ...
    def step(
        self, images: Tensor, labels: Tensor, generator: torch.Generator, step: int
    ) -> dict[str, float]: ...
    def save(self, folder: Path) -> None: ...


def train(config: DiffusionConfig | GanConfig, folder: Path, console: Console) -> int:
    """Train, or go on with a training that was stopped; returns the steps done.

    `folder` becomes the checkpoint; its sub-folder `training/` keeps the state to go on from, the
    sample grids and the TensorBoard log. The first SIGINT or SIGTERM saves and stops.
    Raises OptionError, ArtifactError.
    """
    dataset = load_dataset(config.data)
    report_data(dataset, console)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer: Trainer
    if isinstance(config, DiffusionConfig):
        trainer = DiffusionTrainer(config, dataset.names, device)
    else:
        trainer = GanTrainer(config, dataset.names, device)
    state_path = folder / "training" / "state.safetensors"
    step = load_state(state_path, trainer.modules(), trainer.optimizers(), config)
    if step:
        console.print(f"going on at step {step} of {config.steps}")
    writer = SummaryWriter(str(folder / "training" / "log"), purge_step=step)
    with _progress(console) as bar, _stop_signals() as stopped:
        task = bar.add_task("training", total=config.steps, completed=step)
        stopping = False
        while step < config.steps and not stopping:
            scalars = trainer.step(*_batch(dataset, config, step, device), step)
            step += 1
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)
            if not all(np.isfinite(value) for value in scalars.values()):
                _refuse_divergence(step, scalars)
            label = next(iter(scalars))
            bar.update(task, completed=step, description=f"{label} {scalars[label]:.4f}")
            sampling = step % config.sample_every == 0 or step == config.steps
            stopping = bool(stopped)
            if sampling or stopping or step % config.save_every == 0:
                trainer.save(folder)
                save_state(state_path, trainer.modules(), trainer.optimizers(), config, step)
            if sampling:
                save_samples(folder, step, writer)
    writer.close()
    return step


def report_data(dataset: Dataset, console: Console) -> None:
    """Say how many images there are, and which were skipped."""
    console.print(f"{len(dataset.images)} images in {len(dataset.names)} classes")
    if dataset.skipped:
        listed = ", ".join(dataset.skipped[:5])
        console.print(f"skipped {len(dataset.skipped)} unreadable images: {listed}")


def _batch(
    dataset: Dataset, config: DiffusionConfig | GanConfig, step: int, device: torch.device
) -> tuple[Tensor, Tensor, torch.Generator]:
    """Images, labels and the random generator of one step, all functions of (seed, step)."""
    rows = batch_indices(len(dataset.images), config.batch_size, config.seed, step)
    images = torch.from_numpy(to_network_range(dataset.images[rows])).to(device)
    labels = torch.from_numpy(dataset.labels[rows]).to(device)
    # torch's CPU generator takes the low 32 bits: an odd factor spreads the seeds over them
    generator = torch.Generator().manual_seed((config.seed * 0x9E3779B1 + step) % 2**32)
    return images.to(memory_format=torch.channels_last), labels, generator


def _refuse_divergence(step: int, scalars: dict[str, float]) -> None:
    raise QualityError(
        f"training diverged at step {step} ({scalars}); lower optimizer.learning_rate and train "
        "into another --output"
    )


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that is no longer empty once SIGINT or SIGTERM came; a second one acts at once."""
    received: list[int] = []
    handled = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.getsignal(number) for number in handled}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)
        restore()

    for number in handled:
        signal.signal(number, remember)
    try:
        yield received
    finally:
        restore()

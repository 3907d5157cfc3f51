"""Are the classes recognisable? A classifier trained on real photos judges generated ones.

    python -m benchmarks.class_consistency DATA CHECKPOINT...

DATA is the folder of Fashion-MNIST's idx files. Writes `results/class-consistency.json`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from engine.images import Picture
from engine.json_files import write_json
from engine.machine import this_machine
from engine.pipeline import open_pipeline
from engine.request import Request
from engine.training.config import DataConfig
from engine.training.data import Dataset, batch_indices, load_dataset

RESULT = Path(__file__).parent / "results" / "class-consistency.json"
EPOCHS, BATCH_SIZE, HELD_OUT, PER_LABEL = 3, 128, 5000, 50


def classifier() -> nn.Module:
    """Two convolutions and two linear layers, for `[B, 1, 32, 32]`."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 64, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def to_tensor(pictures: NDArray[np.uint8]) -> torch.Tensor:
    """`[N, C, H, W]` uint8 to float in [0, 1]."""
    return torch.from_numpy(pictures).float() / 255


def train_classifier(dataset: Dataset) -> nn.Module:
    """Train on all but the last `HELD_OUT` photos."""
    torch.manual_seed(0)
    network = classifier()
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    count = len(dataset.images) - HELD_OUT
    for step in range(EPOCHS * (count // BATCH_SIZE)):
        rows = batch_indices(count, BATCH_SIZE, 0, step)
        logits = network(to_tensor(dataset.images[rows]))
        loss = nn.functional.cross_entropy(logits, torch.from_numpy(dataset.labels[rows]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return network.eval()


@torch.inference_mode()
def accuracy(network: nn.Module, pictures: NDArray[np.uint8], labels: NDArray[np.int64]) -> float:
    """Share of pictures `[N, C, H, W]` that the classifier puts into their class."""
    found = torch.cat([network(batch).argmax(1) for batch in torch.split(to_tensor(pictures), 500)])
    return float((found.numpy() == labels).mean())


def generated(checkpoint: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """`PER_LABEL` pictures of every label with the model's default options."""
    pipeline = open_pipeline(checkpoint)
    names = pipeline.model.labels
    labels = np.repeat(np.arange(len(names)), PER_LABEL)
    requests = [Request(label=names[label], seed=seed) for seed, label in enumerate(labels)]
    pictures: Sequence[Picture] = list(pipeline.generate(requests))
    return np.stack(pictures).transpose(0, 3, 1, 2), labels


def main(data: str, *checkpoints: str) -> None:
    """Train, judge, write the result."""
    dataset = load_dataset(DataConfig(path=data, channels=1))
    network = train_classifier(dataset)
    held_out = accuracy(network, dataset.images[-HELD_OUT:], dataset.labels[-HELD_OUT:])
    result: dict[str, object] = {"real photos, held out": held_out}
    for path in map(Path, checkpoints):
        result[path.name] = accuracy(network, *generated(path))
    write_json(
        RESULT,
        {
            "accuracy": result,
            "pictures_per_label": PER_LABEL,
            "machine": this_machine().model_dump(),
        },
    )
    print(result)


if __name__ == "__main__":
    main(*sys.argv[1:])

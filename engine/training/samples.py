"""Sample grids while a training runs, made from the checkpoint that was just written."""

from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from engine.images import grid, to_uint8
from engine.pipeline import open_pipeline
from engine.request import Request

ROWS, MOST_LABELS = 4, 12


def save_samples(folder: Path, step: int, writer: SummaryWriter) -> None:
    """Write `training/samples/<step>.png`: a column a label, a row a seed; and to TensorBoard."""
    pipeline = open_pipeline(folder)
    labels = pipeline.model.labels[:MOST_LABELS]
    requests = [Request(label=label, seed=seed) for seed in range(ROWS) for label in labels]
    pictures = [to_uint8(pipeline.draw(row)) for row in pipeline.run(requests)]  # broken ones too
    pipeline.close()
    captions = [request.label or "" for request in requests]
    sheet = grid(pictures, len(labels), captions, scale=max(1, 64 // pictures[0].shape[0]))
    path = folder / "training" / "samples" / f"{step:07d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    writer.add_image("samples", np.asarray(sheet), step, dataformats="HWC")

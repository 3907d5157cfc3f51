"""Rows through networks: admit a request, tick many rows at once, finish each into a picture."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.artifact import is_artifact, read_artifact
from engine.backends.spec import Backend, open_backend
from engine.checkpoint import read_checkpoint
from engine.errors import ArtifactError, OptionError
from engine.families import class_unet, gan
from engine.images import Picture, from_network_range, to_uint8
from engine.manifest import ModelSpec
from engine.request import Request, resolve
from engine.row import Row, advance, network_inputs

DEFAULT_MAX_ROWS = 16


class Pipeline:
    """A model on a backend. It holds no state of any request: that is in the rows."""

    def __init__(self, model: ModelSpec, network: Backend) -> None:
        self.model = model
        self._network = network
        self._x_name = network.inputs[0].name
        self._output_name = network.outputs[0].name

    def admit(self, request: Request) -> Row:
        """The row of a request, before its first step. Raises OptionError."""
        prepare = class_unet.prepare if self.model.family == "class_unet" else gan.prepare
        return prepare(self.model, resolve(request, self.model))

    def tick(self, rows: Sequence[Row]) -> None:
        """One network call that takes every row one step further."""
        output = self._network.run(network_inputs(rows, self._x_name))
        advance(rows, output[self._output_name].astype(np.float32, copy=False))

    def decode(self, row: Row) -> NDArray[np.float32]:
        """The picture of a row that is done, `[H, W, C]` in [0, 1]."""
        return from_network_range(row.x)

    def finish(self, row: Row) -> Picture:
        """The picture of a row that is done, uint8 `[H, W, C]`."""
        return to_uint8(self.decode(row))

    def run(self, requests: Iterable[Request], max_rows: int = DEFAULT_MAX_ROWS) -> Iterator[Row]:
        """Finished rows in the order of the requests, at most `max_rows` of them in a tick.

        Raises OptionError before any work where one of the requests is not allowed.
        """
        waiting = [self.admit(request) for request in requests]
        for start in range(0, len(waiting), max_rows):
            batch = waiting[start : start + max_rows]
            while running := [row for row in batch if not row.done]:
                self.tick(running)
            yield from batch

    def generate(
        self, requests: Iterable[Request], max_rows: int = DEFAULT_MAX_ROWS
    ) -> Iterator[Picture]:
        """The pictures of `run`, uint8 `[H, W, C]`."""
        return map(self.finish, self.run(requests, max_rows))

    def close(self) -> None:
        """Close the backend."""
        self._network.close()


def open_pipeline(path: Path, variant: str | None = None) -> Pipeline:
    """The pipeline of an artifact (its selected variant) or of a checkpoint (on torch).

    Raises ArtifactError, OptionError, RuntimeUnavailableError.
    """
    if is_artifact(path):
        artifact = read_artifact(path)
        model, chosen = artifact.manifest.model, artifact.variant(variant)
        (name,) = model.networks
        network = open_backend(chosen.runtime, path / chosen.networks[name], model.networks[name])
        return Pipeline(model, network)
    if not (path / "model_index.json").is_file():
        raise ArtifactError(
            f"'{path}' is neither an artifact (manifest.json) nor a checkpoint (model_index.json)"
        )
    if variant is not None:
        raise OptionError(f"a checkpoint has no variants, got {variant!r}; leave it out")
    model = read_checkpoint(path).model
    (name,) = model.networks
    return Pipeline(model, open_backend("torch", path / name, model.networks[name]))

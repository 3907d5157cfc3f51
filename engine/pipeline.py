"""Rows through networks: admit a request, tick many rows at once, finish each into a picture."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.artifact import Artifact, is_artifact, read_artifact
from engine.backends.spec import Backend, Provider, open_backend
from engine.checkpoint import read_checkpoint
from engine.errors import ArtifactError, OptionError, QualityError
from engine.families import latents
from engine.families.components import Components
from engine.families.known import FAMILIES
from engine.images import Picture, from_network_range, to_uint8
from engine.manifest import ModelSpec, NetworkSpec
from engine.postprocess import postprocess
from engine.quality import defect, not_finite
from engine.request import Request, Resolved, resolve
from engine.row import Feed, Row, advance, network_inputs

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DEFAULT_MAX_ROWS = 16
# Memory of a network call grows with its pixels (attention: with their square in a picture). One
# attention of Stable Diffusion 1.5 at 512x512 took 1.0 GiB for a row and 3.1 GiB for two.
PIXELS_A_CALL = 4 * 512 * 512


class Pipeline:
    """A model on its backends. It holds no state of any request: that is in the rows."""

    def __init__(
        self,
        components: Components,
        size: tuple[int, int] | None = None,
        max_batch: int | None = None,
    ) -> None:
        self.model = components.model
        self._components = components
        self._size = size  # the only one that this build makes, or any
        self._max_batch = max_batch  # of a network call, where this build has one
        self._x_name = self.model.networks[self.model.denoiser].inputs[0].name

    def admit(self, request: Request) -> Row:
        """The row of a request, before its first step. Raises OptionError."""
        return self._prepare(resolve(request, self.model, self._size))

    def _prepare(self, request: Resolved) -> Row:
        row = FAMILIES[self.model.family].prepare(self._components, request)
        row.seed, row.postprocess = request.seed, request.postprocess
        return row

    def tick(self, rows: Sequence[Row]) -> None:
        """One step of every row, in as few network calls as sizes and memory allow."""
        for together in self._calls(rows):
            (output,) = self._components.run(self.model.denoiser, self.feed(together))
            advance(together, output)

    def feed(self, rows: Sequence[Row]) -> Feed:
        """What the denoiser is called with for the next step of rows of one picture size."""
        return network_inputs(rows, self._x_name)

    def _calls(self, rows: Sequence[Row]) -> Iterator[list[Row]]:
        """Rows that share a network call: of one picture size, and not too many."""
        for shape in dict.fromkeys(row.x.shape for row in rows):
            limit = self._max_evaluations(shape)
            call: list[Row] = []
            evaluations = 0
            for row in (row for row in rows if row.x.shape == shape):
                if call and evaluations + len(row.conditioning) > limit:
                    yield call
                    call, evaluations = [], 0
                call.append(row)
                evaluations += len(row.conditioning)
            yield call

    def _max_evaluations(self, shape: tuple[int, ...]) -> int:
        """How many rows a network call takes, a guided row twice."""
        downscale = self.model.latents.downscale if self.model.latents else 1
        pixels = math.prod(shape[1:]) * downscale**2
        fitting = max(PIXELS_A_CALL // pixels, 1)
        return fitting if self._max_batch is None else min(fitting, self._max_batch)

    def decode(self, row: Row) -> NDArray[np.float32]:
        """The picture of a row that is done, `[H, W, C]` in [0, 1].

        Raises QualityError where it is broken.
        """
        image = self._image(row)
        _require_whole(row, image)
        return from_network_range(image)

    def draw(self, row: Row) -> NDArray[np.float32]:
        """The same, broken or not: what a model in training makes is to be seen."""
        return from_network_range(self._image(row))

    def _image(self, row: Row) -> NDArray[np.float32]:
        """`[C, H, W]` in [-1, 1], not clipped."""
        return row.x if self.model.latents is None else latents.decode(self._components, row)

    def finish(self, row: Row) -> Picture:
        """The picture of a row that is done, uint8 `[H, W, C]`, post-processed as it asked.

        Raises QualityError as `decode` does.
        """
        return postprocess(to_uint8(self.decode(row)), row.postprocess)

    def run(self, requests: Iterable[Request], max_rows: int = DEFAULT_MAX_ROWS) -> Iterator[Row]:
        """Finished rows in the order of the requests, at most `max_rows` of them in a tick.

        Raises OptionError before any work where one of the requests is not allowed.
        """
        waiting = [resolve(request, self.model, self._size) for request in requests]
        for start in range(0, len(waiting), max_rows):
            batch = [self._prepare(request) for request in waiting[start : start + max_rows]]
            while running := [row for row in batch if not row.done]:
                self.tick(running)
            yield from batch

    def generate(
        self, requests: Iterable[Request], max_rows: int = DEFAULT_MAX_ROWS
    ) -> Iterator[Picture]:
        """The pictures of `run`, uint8 `[H, W, C]`. Raises QualityError at a broken one."""
        return map(self.finish, self.run(requests, max_rows))

    def close(self) -> None:
        """Close the backends."""
        self._components.close()


def _require_whole(row: Row, image: NDArray[np.float32]) -> None:
    """Latents too: a decoder's ReLU may make a number of a NaN. Raises QualityError."""
    found = not_finite(row.x) or defect(image)
    if found is None:
        return
    cause = "its network's numbers are broken"
    if found.name == "saturated" and row.guidance_scale > 1:
        cause += f", or guidance_scale {row.guidance_scale:g} is too much for {row.steps} steps"
    raise QualityError(
        f"the picture of seed {row.seed} is broken ({found.name}): {found.detail}; {cause}"
    )


def open_pipeline(path: Path, variant: str | None = None, provider: Provider = "auto") -> Pipeline:
    """The pipeline of an artifact (its selected variant) or of a checkpoint (on torch).

    Raises ArtifactError, OptionError, RuntimeUnavailableError.
    """
    if is_artifact(path):
        return open_artifact(read_artifact(path), variant, provider)
    if not (path / "model_index.json").is_file():
        raise ArtifactError(
            f"'{path}' is neither an artifact (manifest.json) nor a checkpoint (model_index.json)"
        )
    if variant is not None:
        raise OptionError(f"a checkpoint has no variants, got {variant!r}; leave it out")
    return _open_checkpoint(path)


def open_artifact(
    artifact: Artifact, variant: str | None = None, provider: Provider = "auto"
) -> Pipeline:
    """The pipeline of a variant, by default the selected one. Raises as `open_pipeline`."""
    from tokenizers import Tokenizer

    model, chosen = artifact.manifest.model, artifact.variant(variant)
    precision = chosen.quantization.kept_precision if chosen.quantization else chosen.precision
    tokenizers = {
        name: Tokenizer.from_file(str(artifact.path / file))
        for name, file in model.tokenizers.items()
    }

    def open_network(name: str, spec: NetworkSpec) -> Backend:
        path = artifact.path / chosen.networks[name]
        return open_backend(
            chosen.runtime,
            path,
            spec,
            precision=precision,
            provider=provider,
            target=chosen.target,
            usual_sizes=model.axis_sizes(name, chosen.size),
            weights_only=chosen.quantization is not None and chosen.quantization.weights_only,
        )

    networks = _open_all(model.networks, open_network)
    return Pipeline(Components(model, networks, tokenizers), chosen.size, chosen.max_batch)


def _open_checkpoint(path: Path) -> Pipeline:
    model = read_checkpoint(path).model
    networks = _open_all(
        model.networks, lambda name, spec: open_backend("torch", path / name, spec)
    )
    return Pipeline(Components(model, networks, checkpoint_tokenizers(path, model)))


def checkpoint_tokenizers(path: Path, model: ModelSpec) -> "dict[str, Tokenizer]":
    """The tokenizers of a checkpoint, each as long as its text encoder's input."""
    if not model.tokenizers:
        return {}
    from engine.networks.tokenizers import load_tokenizer

    return {name: load_tokenizer(path / name, model.tokens(name)) for name in model.tokenizers}


def _open_all(
    specs: Mapping[str, NetworkSpec], open_network: Callable[[str, NetworkSpec], Backend]
) -> dict[str, Backend]:
    """Every network; where one does not open, those that did are closed again."""
    networks: dict[str, Backend] = {}
    with ExitStack() as opened:
        for name, spec in specs.items():
            networks[name] = open_network(name, spec)
            opened.callback(networks[name].close)
        opened.pop_all()
    return networks

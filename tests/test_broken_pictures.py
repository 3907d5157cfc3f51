"""Networks broken on purpose: none of their pictures is handed out, no neighbour is lost."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import LABELS
from damage import read_manifest
from numpy.typing import NDArray

from engine.artifact import hash_files, write_manifest
from engine.errors import QualityError, VitrineError
from engine.families.components import Components
from engine.manifest import LatentSpec, NetworkSpec, TensorSpec
from engine.pipeline import Pipeline, open_pipeline
from engine.request import Request
from engine.row import Row
from serving.client import Client
from serving.repository import write_repository
from serving.server import Server

Array = NDArray[np.float32]
BROKEN_LABEL = LABELS[1]
FREE_PORTS = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}


def edited(artifact: Path, folder: Path, **changes: Callable[[Array], Array]) -> Path:
    """A copy of an artifact with changed weights, signed anew; `output__bias` is `output.bias`."""
    copy = Path(shutil.copytree(artifact, folder / artifact.name))
    (path,) = copy.rglob("*.onnx")
    graph = onnx.load(path)
    for name, change in changes.items():
        (tensor,) = (
            tensor
            for tensor in graph.graph.initializer
            if tensor.name.endswith(name.replace("__", "."))
        )
        weights = change(onnx.numpy_helper.to_array(tensor).copy())
        tensor.CopyFrom(onnx.numpy_helper.from_array(weights, tensor.name))
    onnx.save(graph, path)
    write_manifest(copy, read_manifest(copy).model_copy(update={"files": hash_files(copy)}))
    return copy


def without_a_number_for_one_label(embedding: Array) -> Array:
    embedding[LABELS.index(BROKEN_LABEL)] = np.nan
    return embedding


def times(factor: float) -> Callable[[Array], Array]:
    return lambda weights: weights * np.float32(factor)


def all_of(value: float) -> Callable[[Array], Array]:
    return lambda weights: np.full_like(weights, value)


# In process


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"output__bias": all_of(float("nan"))},
            r"seed 7 is broken \(NaN\): 256 of 256 values are NaN or infinite; its network's",
        ),
        (
            {"output__weight": times(0), "output__bias": all_of(-1)},
            r"seed 7 is broken \(black\): its brightest value is 0\.0 of 255, below 16",
        ),
        (
            {"output__weight": times(0), "output__bias": all_of(0.25)},
            r"seed 7 is broken \(constant\): its values deviate by 0\.00 of 255, less than 1",
        ),
        (
            {"output__weight": times(1e4)},
            r"seed 7 is broken \(saturated\): \d+\.\d% of its values are far outside the range",
        ),
    ],
    ids=["NaN", "black", "constant", "saturated"],
)
def test_a_broken_generator_gives_an_error_that_names_the_defect_and_the_seed(
    gan_artifact: Path, tmp_path: Path, changes: dict[str, Callable[[Array], Array]], message: str
) -> None:
    pipeline = open_pipeline(edited(gan_artifact, tmp_path, **changes))
    with pytest.raises(QualityError, match=message) as raised:
        list(pipeline.generate([Request(label="bag", seed=7)]))
    assert raised.value.exit_code == 1


def test_a_broken_picture_can_be_looked_at_but_not_had(gan_artifact: Path, tmp_path: Path) -> None:
    pipeline = open_pipeline(edited(gan_artifact, tmp_path, output__bias=all_of(float("inf"))))
    (row,) = pipeline.run([Request(label="bag")])
    assert pipeline.draw(row).shape == (16, 16, 1)  # to look at, in a training
    for refuse in (pipeline.decode, pipeline.finish):
        with pytest.raises(QualityError, match=r"^the picture of seed 0 is broken \(NaN\)"):
            refuse(row)


def test_too_much_guidance_is_named_where_a_picture_is_saturated(diffusion: Pipeline) -> None:
    row = diffusion.admit(Request(label="bag", guidance_scale=100, num_inference_steps=2))
    row.x = row.x * 100
    with pytest.raises(QualityError, match="or guidance_scale 100 is too much for 2 steps"):
        diffusion.decode(row)


def test_one_label_without_a_number_does_not_touch_its_neighbours_in_a_batch(
    diffusion_artifact: Path, diffusion: Pipeline, tmp_path: Path
) -> None:
    poisoned = open_pipeline(
        edited(diffusion_artifact, tmp_path, class_embedding__weight=without_a_number_for_one_label)
    )
    requests = [Request(label=label, seed=3, num_inference_steps=4) for label in LABELS]
    rows = list(poisoned.run(requests))  # in one network call a step
    for request, row in zip(requests, rows, strict=True):
        if request.label == BROKEN_LABEL:
            with pytest.raises(QualityError, match="NaN"):
                poisoned.finish(row)
        else:
            assert np.array_equal(poisoned.finish(row), next(diffusion.generate([request])))


class HidingDecoder:
    """A decoder that makes a picture of anything, as one with a ReLU that takes NaN for 0."""

    inputs: Sequence[TensorSpec] = ()
    outputs = (TensorSpec(name="image", dtype="float32", shape=("batch", 1, 16, 16)),)

    def run(self, feed: Mapping[str, NDArray[np.generic]]) -> dict[str, Array]:
        return {"image": np.linspace(-1, 1, 256, dtype=np.float32).reshape(1, 1, 16, 16)}

    def close(self) -> None:
        pass


def test_latents_that_are_no_numbers_are_refused_though_their_decoder_hides_it(
    diffusion: Pipeline,
) -> None:
    decoder = HidingDecoder()
    spec = NetworkSpec(inputs=(), outputs=decoder.outputs)
    model = diffusion.model.model_copy(
        update={
            "latents": LatentSpec(channels=1, downscale=1, scaling_factor=1, shift_factor=0),
            "networks": {**diffusion.model.networks, "vae_decoder": spec},
        }
    )
    pipeline = Pipeline(Components(model, {"vae_decoder": decoder}, {}))
    whole, broken = (Row(np.full((1, 16, 16), x, np.float32), ()) for x in (0.5, np.nan))
    assert pipeline.decode(whole).shape == (16, 16, 1)
    with pytest.raises(QualityError, match="256 of 256 values are NaN"):
        pipeline.decode(broken)


# Served


@pytest.fixture(scope="module")
def poisoned_server(
    diffusion_artifact: Path, gan_artifact: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The embedded Triton with both models, which have NaN for one label."""
    folder = tmp_path_factory.mktemp("poisoned")
    artifacts = [
        edited(artifact, folder, class_embedding__weight=without_a_number_for_one_label)
        for artifact in (diffusion_artifact, gan_artifact)
    ]
    with Server(
        write_repository(artifacts, folder / "repository"), **FREE_PORTS, stop_timeout_s=2
    ) as running:
        yield running


@pytest.mark.parametrize("kind", ["diffusion", "gan"])
def test_a_served_picture_that_is_broken_is_an_error_and_its_neighbours_are_whole(
    kind: str, poisoned_server: Server, request: pytest.FixtureRequest
) -> None:
    whole: Pipeline = request.getfixturevalue(kind)
    model = f"tiny-{kind}"
    options = {"num_inference_steps": 6} if kind == "diffusion" else {}
    asked = [Request.of({"label": LABELS[n % 3], "seed": n, **options}) for n in range(24)]
    before = poisoned_server.tick_counts(model)
    with Client(poisoned_server.grpc_url) as client:
        futures = [
            client.submit(model, one.label, seed=one.seed, timeout_s=60, **options) for one in asked
        ]
        for one, future in zip(asked, futures, strict=True):
            if one.label == BROKEN_LABEL:
                with pytest.raises(VitrineError, match=r"is broken \(NaN\): .* NaN or infinite"):
                    future.result()
            else:
                np.testing.assert_array_equal(future.result(), next(whole.generate([one])))
    assert poisoned_server.rows_per_tick(model, before) > 1  # they did share network calls

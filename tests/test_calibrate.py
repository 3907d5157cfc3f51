"""Calibration rows are what the denoiser is called with, from everywhere on its trajectories."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.errors import ArtifactError, OptionError
from engine.families.components import Components
from engine.manifest import ModelSpec
from engine.noise import noise
from engine.pipeline import Pipeline, open_pipeline
from engine.request import Request
from engine.row import Feed
from export.calibrate import CalibrationOptions, batches, calibrate, load_rows, save_rows
from export.quantize import record_calibration
from export.requests import CALIBRATION_SEED, SEARCH_SEED, varied_requests
from export.variant import VariantOptions

ROWS = 256
OPTIONS = CalibrationOptions(rows=ROWS)
GAN_ROWS = 64
LARGEST_GATE = 100_000  # pictures that `vitrine export --auto` may be asked for

pytestmark = pytest.mark.usefixtures("one_torch_thread")


class RecordedComponents(Components):
    """Networks that keep what they are called with."""

    def __init__(self, original: Components) -> None:
        super().__init__(original.model, original._networks, original._tokenizers)
        self.calls: list[Feed] = []

    def run(self, network: str, feed: Feed) -> tuple[NDArray[np.float32], ...]:
        assert network == self.model.denoiser
        self.calls.append({name: array.copy() for name, array in feed.items()})
        return super().run(network, feed)


def calls(pipeline: Pipeline, requests: list[Request]) -> list[Feed]:
    """What the denoiser is really called with while requests are drawn as by any user."""
    recorded = RecordedComponents(pipeline._components)
    for _ in Pipeline(recorded).run(requests):
        pass
    return recorded.calls


def evaluations(feeds: list[Feed]) -> list[bytes]:
    """Every row of some calls, as bytes."""
    return [
        b"".join(feed[name][index].tobytes() for name in sorted(feed))
        for feed in feeds
        for index in range(len(feed["label"]))
    ]


def requests_of(model: ModelSpec, options: CalibrationOptions) -> list[Request]:
    """A request makes four evaluations at least, and 32 of them are drawn at least."""
    steps = 1 if model.defaults is None else 4
    count = max(32, options.rows // steps)
    return varied_requests(model, count, None, CALIBRATION_SEED + 1000 * options.seed)


@pytest.fixture(scope="module")
def rows(diffusion: Pipeline) -> Feed:
    return calibrate(diffusion, OPTIONS)


@pytest.fixture(scope="module")
def requests(diffusion: Pipeline) -> list[Request]:
    return requests_of(diffusion.model, OPTIONS)


@pytest.fixture(scope="module")
def drawn(diffusion: Pipeline, requests: list[Request]) -> list[Feed]:
    return calls(diffusion, requests)


def assert_same(one: Mapping[str, NDArray[np.generic]], two: Feed) -> None:
    assert list(one) == list(two)
    for name, array in one.items():
        assert (array.dtype, array.shape) == (two[name].dtype, two[name].shape)
        assert array.tobytes() == two[name].tobytes()


# What is recorded


def test_rows_have_the_types_and_shapes_of_the_network_s_inputs(
    diffusion: Pipeline, rows: Feed
) -> None:
    inputs = diffusion.model.networks["unet"].inputs
    assert set(rows) == {tensor.name for tensor in inputs}
    for tensor in inputs:
        assert rows[tensor.name].dtype == tensor.dtype
        assert len(rows[tensor.name]) == ROWS
        assert rows[tensor.name].ndim == len(tensor.shape)
    assert rows["sample"].shape == (ROWS, 1, 16, 16)


def test_every_row_is_one_that_the_denoiser_is_called_with(rows: Feed, drawn: list[Feed]) -> None:
    """Once for each time that it is called with it."""
    found, recorded = Counter(evaluations([rows])), Counter(evaluations(drawn))
    assert found.total() == ROWS
    assert found <= recorded


def test_rows_are_a_fair_share_of_all_evaluations(rows: Feed, drawn: list[Feed]) -> None:
    """Without replacement: sigma is at most that of a binomial draw; five of them never happen."""
    everything = {name: np.concatenate([feed[name] for feed in drawn]) for name in rows}
    assert len(everything["label"]) > 4 * ROWS  # there is something to leave out
    shares = {
        "late steps": lambda feed: feed["timestep"] < 500,
        "last steps": lambda feed: feed["timestep"] < 100,
        "unlabelled": lambda feed: feed["label"] == 3,
        "bright": lambda feed: feed["sample"].mean((1, 2, 3)) > 0,
    }
    for name, share in shares.items():
        expected, found = float(share(everything).mean()), float(share(rows).mean())
        sigma = np.sqrt(expected * (1 - expected) / ROWS)
        assert sigma > 0
        assert abs(found - expected) < 5 * sigma, name


def test_rows_come_from_the_first_and_the_last_request(
    diffusion: Pipeline, rows: Feed, requests: list[Request]
) -> None:
    found = set(evaluations([rows]))
    for end in (requests[:16], requests[-16:]):
        assert found & set(evaluations(calls(diffusion, end)))


def test_rows_come_from_many_steps_and_every_label_and_none(
    diffusion: Pipeline, rows: Feed
) -> None:
    null_label = diffusion.model.null_label
    assert null_label == len(diffusion.model.labels) == 3
    assert set(rows["label"].tolist()) == {0, 1, 2, null_label}
    timesteps = rows["timestep"]
    assert len(set(timesteps.tolist())) > ROWS / 4
    occupied, _ = np.histogram(timesteps, bins=10, range=(0, 1000))
    assert occupied.min() > 0


def test_requests_are_guided_and_unguided_by_every_sampler_in_few_and_many_steps(
    diffusion: Pipeline, requests: list[Request], drawn: list[Feed]
) -> None:
    assert {request.guidance_scale for request in requests} == {1.0, 2.0, 3.5, 5.0}
    assert {request.sampler for request in requests} == set(diffusion.model.samplers)
    assert {request.num_inference_steps for request in requests} == set(range(4, 31))
    labelled, null_label = Counter[bytes](), Counter[bytes]()
    for feed in drawn:
        for sample, label in zip(feed["sample"], feed["label"], strict=True):
            (null_label if label == 3 else labelled)[sample.tobytes()] += 1
    assert null_label
    assert null_label < labelled  # a guided step asks twice of the same sample, others once


def test_a_gan_s_rows_are_start_noise_and_every_label(gan: Pipeline) -> None:
    found = calibrate(gan, CalibrationOptions(rows=GAN_ROWS))
    requests = requests_of(gan.model, CalibrationOptions(rows=GAN_ROWS))
    assert Counter(evaluations([found])) == Counter(evaluations(calls(gan, requests)))
    seeds = range(CALIBRATION_SEED, CALIBRATION_SEED + GAN_ROWS)
    expected = np.stack([noise(seed, (16,)) for seed in seeds])
    assert found["latent"].tobytes() == expected.tobytes()
    assert set(found["label"].tolist()) == {0, 1, 2}


def test_calibration_leaves_the_pipeline_as_it_was(diffusion: Pipeline) -> None:
    request = varied_requests(diffusion.model, 1, None, 0)
    (before,) = diffusion.generate(request)
    calibrate(diffusion, CalibrationOptions(rows=32))
    (after,) = diffusion.generate(request)
    np.testing.assert_array_equal(before, after)


# The same again


def test_the_same_options_give_the_same_bytes(
    diffusion: Pipeline, rows: Feed, tmp_path: Path
) -> None:
    again = calibrate(diffusion, CalibrationOptions(rows=ROWS, seed=0))
    assert_same(again, rows)
    save_rows(tmp_path / "one.npz", rows)
    save_rows(tmp_path / "two.npz", again)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


def test_another_seed_draws_other_rows(diffusion: Pipeline) -> None:
    one, two = (
        set(evaluations([calibrate(diffusion, CalibrationOptions(rows=32, seed=seed))]))
        for seed in (0, 1)
    )
    assert not one & two


def test_another_seed_begins_with_other_noise(gan: Pipeline) -> None:
    """A GAN's rows are the start noise of all requests: none is drawn for both seeds."""
    one, two = (
        {latent.tobytes() for latent in calibrate(gan, options)["latent"]}
        for options in (CalibrationOptions(rows=GAN_ROWS, seed=seed) for seed in (0, 1))
    )
    assert len(one) == len(two) == GAN_ROWS
    assert not one & two


def test_each_set_of_options_has_its_own_file() -> None:
    files = {
        CalibrationOptions(rows=rows, seed=seed).file
        for rows in (32, 64, 3264)
        for seed in (0, 1, 64)
    }
    assert len(files) == 9


# Seeds that nothing is judged by


@pytest.mark.parametrize(
    ("model", "rows"), [("diffusion", 32), ("diffusion", 384), ("diffusion", 4000), ("gan", 1000)]
)
def test_no_picture_is_judged_that_calibration_has_seen(
    model: str, rows: int, request: pytest.FixtureRequest
) -> None:
    """At either end of the seeds that are allowed: the gate's begin at 0, the search's above."""
    spec = request.getfixturevalue(model).model
    first, last = (
        [each.seed for each in requests_of(spec, options)]
        for options in (CalibrationOptions(rows=rows), largest_seed(rows))
    )
    assert LARGEST_GATE <= min(first) <= max(last) < SEARCH_SEED


def largest_seed(rows: int) -> CalibrationOptions:
    (limit,) = (
        rule.lt for rule in CalibrationOptions.model_fields["seed"].metadata if hasattr(rule, "lt")
    )
    with pytest.raises(OptionError, match="seed must be"):
        CalibrationOptions.parse({"rows": rows, "seed": limit})
    return CalibrationOptions(rows=rows, seed=limit - 1)


# Too little


@pytest.mark.parametrize("rows", [1, 31])
def test_too_few_rows_are_refused(rows: int, diffusion: Pipeline) -> None:
    with pytest.raises(OptionError) as raised:
        calibrate(diffusion, CalibrationOptions(rows=rows))
    assert str(raised.value) == (
        f"calibration needs at least 32 rows, got {rows}: with fewer one odd row decides a range"
    )


def test_nothing_is_written_of_too_few_rows(diffusion_checkpoint: Path, tmp_path: Path) -> None:
    options = VariantOptions(precision="int8", calibration=CalibrationOptions(rows=31))
    with pytest.raises(OptionError, match="at least 32 rows, got 31"):
        record_calibration(diffusion_checkpoint, options, tmp_path, lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_what_is_recorded_is_not_recorded_again(diffusion_checkpoint: Path, tmp_path: Path) -> None:
    options = VariantOptions(precision="int8", calibration=CalibrationOptions(rows=32))
    said: list[str] = []
    for _ in range(2):
        record_calibration(diffusion_checkpoint, options, tmp_path, said.append)
    assert said == ["calibrating: pictures in torch"]
    pipeline = open_pipeline(diffusion_checkpoint)
    assert_same(
        load_rows(tmp_path / "calibration/32-rows-seed-0.npz"),
        calibrate(pipeline, options.calibration),
    )
    pipeline.close()


# Files


def test_rows_survive_their_file(rows: Feed, tmp_path: Path) -> None:
    save_rows(tmp_path / "new" / "rows.npz", rows)
    assert_same(load_rows(tmp_path / "new" / "rows.npz"), rows)


def pickled(path: Path) -> None:
    np.savez(path, sample=np.array([{"a": 1}], object))


def one_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


DAMAGED = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "no archive": lambda path: path.write_bytes(b"hello"),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-200]),
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a changed value": lambda path: path.write_bytes(
        path.read_bytes()[:2000] + b"\xff" * 8 + path.read_bytes()[2008:]
    ),
    "a pickle": pickled,
    "one array": one_array,
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_named(case: str, rows: Feed, tmp_path: Path) -> None:
    path = tmp_path / "rows.npz"
    save_rows(path, rows)
    DAMAGED[case](path)
    with pytest.raises(ArtifactError, match=rf"calibration '{path}' is not readable: ."):
        load_rows(path)


# Calls


def test_batches_are_calls_of_one_size_in_order(rows: Feed) -> None:
    feeds = batches(rows, 48)
    assert len(feeds) == ROWS // 48 == 5
    for name, array in rows.items():
        joined = np.concatenate([feed[name] for feed in feeds])
        assert joined.tobytes() == array[: 5 * 48].tobytes()
        assert {len(feed[name]) for feed in feeds} == {48}


def test_the_least_calibration_fills_two_calls(diffusion: Pipeline) -> None:
    feeds = batches(calibrate(diffusion, CalibrationOptions(rows=32)))
    assert [len(feed["label"]) for feed in feeds] == [16, 16]

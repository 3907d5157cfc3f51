"""The model behind Triton's python backend, with a fake of the module that Triton gives it."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from conftest import LABELS

from engine.errors import QualityError
from engine.pipeline import open_pipeline
from engine.request import Request
from serving.repository import MAX_ROWS

RESCHEDULE = 2


class FakeError(Exception):
    INVALID_ARG, CANCELLED, INTERNAL = "invalid", "cancelled", "internal"

    def __init__(self, message: str, code: str = INTERNAL) -> None:
        self.message, self.code = message, code


class FakeResponse:
    def __init__(self, tensors: list[object] | None = None, error: object = None) -> None:
        self.tensors, self.error = tensors, error


class FakeFamily:
    COUNTER = "counter"

    def __init__(self, **options: object) -> None:
        self.Metric = lambda labels: SimpleNamespace(increment=lambda by: None)


class FakeRequest:
    """One request of Triton; the same object comes back at every tick."""

    def __init__(self, number: int, label: str, **parameters: object) -> None:
        self.number, self.label, self.parameters_json = number, label, json.dumps(parameters)
        self.cancelled = False
        self.rescheduled = 0

    def correlation_id(self) -> int:
        return self.number

    def inputs(self) -> list[SimpleNamespace]:
        label = np.array([[self.label.encode()]], np.object_)
        return [SimpleNamespace(name=lambda: "label", as_numpy=lambda: label)]

    def parameters(self) -> str:
        return self.parameters_json

    def flags(self) -> int:
        return 0

    def is_cancelled(self) -> bool:
        return self.cancelled

    def set_release_flags(self, flags: int) -> None:
        assert flags == RESCHEDULE
        self.rescheduled += 1


@pytest.fixture
def model(
    diffusion_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[object]:
    fake = ModuleType("triton_python_backend_utils")
    vars(fake).update(
        TritonError=FakeError,
        InferenceResponse=FakeResponse,
        MetricFamily=FakeFamily,
        Tensor=lambda name, array: array,
        TRITONSERVER_REQUEST_RELEASE_RESCHEDULE=RESCHEDULE,
        TRITONSERVER_REQUEST_FLAG_SEQUENCE_END=2,
    )
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.delitem(sys.modules, "serving.triton_model", raising=False)
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "artifact").symlink_to(diffusion_artifact)
    loaded = importlib.import_module("serving.triton_model").TritonPythonModel()
    config = json.dumps({"max_batch_size": MAX_ROWS})
    loaded.initialize(
        {
            "model_repository": str(tmp_path),
            "model_version": "1",
            "model_name": "tiny",
            "model_config": config,
        }
    )
    yield loaded
    loaded.finalize()
    monkeypatch.delitem(sys.modules, "serving.triton_model")


def requests(count: int, steps: int) -> list[FakeRequest]:
    return [
        FakeRequest(number, LABELS[number % 3], seed=number, num_inference_steps=steps)
        for number in range(count)
    ]


def test_a_row_goes_back_to_triton_until_it_is_done(model, diffusion_artifact: Path) -> None:
    (request,) = requests(1, steps=3)
    assert model.execute([request]) == [None]
    assert model.execute([request]) == [None]
    (response,) = model.execute([request])
    expected = next(
        open_pipeline(diffusion_artifact).generate(
            [Request(label=request.label, seed=0, num_inference_steps=3)]
        )
    )
    np.testing.assert_array_equal(response.tensors[0][0], expected)
    assert request.rescheduled == 2
    assert not model._rows


def test_a_failed_network_call_fails_its_rows_and_drops_their_state(model, monkeypatch) -> None:
    rows = requests(3, steps=4)
    unknown = FakeRequest(9, "hat")
    model.execute(rows)

    def out_of_memory(rows: object) -> None:
        raise MemoryError("no memory for 3 rows")

    with monkeypatch.context() as broken:
        broken.setattr(model._pipeline, "tick", out_of_memory)
        responses = model.execute([*rows, unknown])
    for response in responses[:3]:
        assert response.error.message == "the network call failed: no memory for 3 rows"
        assert response.error.code == FakeError.INTERNAL
    assert responses[3].error.code == FakeError.INVALID_ARG
    assert not model._rows
    assert model.execute(requests(2, steps=4)) == [None, None]  # the model goes on


def test_a_picture_that_cannot_be_finished_fails_its_own_request(model, monkeypatch) -> None:
    rows = requests(3, steps=1)
    finish = model._pipeline.finish
    errors = iter([QualityError("the picture is broken (black)"), MemoryError("no memory")])

    def finish_last_only(row: object) -> object:
        for error in errors:
            raise error
        return finish(row)

    with monkeypatch.context() as broken:
        broken.setattr(model._pipeline, "finish", finish_last_only)
        first, second, third = model.execute(rows)
    assert first.error.message == "the picture is broken (black)"
    assert second.error.message == "MemoryError: no memory"
    assert first.error.code == second.error.code == FakeError.INTERNAL
    assert third.error is None
    assert third.tensors[0].shape == (1, 16, 16, 1)
    assert not model._rows


def test_a_cancelled_row_is_answered_and_its_neighbour_goes_on(model) -> None:
    cancelled, _ = rows = requests(2, steps=3)
    model.execute(rows)
    cancelled.cancelled = True
    responses = model.execute(rows)
    assert responses[0].error.code == FakeError.CANCELLED
    assert responses[1] is None
    assert len(model._rows) == 1


def test_rows_that_triton_dropped_silently_do_not_pile_up(model) -> None:
    for request in requests(10 * MAX_ROWS, steps=2):
        model.execute([request])
    assert len(model._rows) == 4 * MAX_ROWS


def test_two_requests_with_one_correlation_id_keep_their_own_rows(
    model, diffusion_artifact: Path
) -> None:
    rows = [FakeRequest(7, "bag", seed=seed, num_inference_steps=2) for seed in (1, 2)]
    model.execute(rows)
    responses = model.execute(rows)
    pipeline = open_pipeline(diffusion_artifact)
    for seed, response in zip((1, 2), responses, strict=True):
        request = Request(label="bag", seed=seed, num_inference_steps=2)
        np.testing.assert_array_equal(response.tensors[0][0], next(pipeline.generate([request])))

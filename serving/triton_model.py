"""The model that Triton's python backend runs: one `execute` is one tick of a pipeline.

Imported by Triton's stub process only. Triton is the scheduler: it hands in the rows of a tick, a
row that is not done goes back to it, and one that is done is answered.
"""

import json
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from engine.errors import OptionError, VitrineError
from engine.pipeline import open_pipeline
from engine.request import Request
from engine.row import Row

TICKS_TOTAL = "vitrine_ticks_total"
ROWS_TOTAL = "vitrine_rows_total"

Outcome = Any  # Row | pb_utils.TritonError, which Triton adds to pb_utils after this import


class TritonPythonModel:
    """A pipeline behind Triton's python backend; its state is the rows between two ticks."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the artifact beside model.py; an error here keeps the model from becoming ready."""
        folder = Path(args["model_repository"]) / args["model_version"]
        self._pipeline = open_pipeline(folder / "artifact")
        self._rows: dict[Hashable, Row] = {}  # not done, by `_key`; the latest ticked are last
        self._max_kept = 4 * int(json.loads(args["model_config"])["max_batch_size"])
        self._ticks = _Counter(TICKS_TOTAL, "network calls", args["model_name"])
        self._rows_ticked = _Counter(ROWS_TOTAL, "rows in network calls", args["model_name"])

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One tick over the rows of `requests`; None for a request that is not done yet."""
        outcomes = [self._take_row(request) for request in requests]
        rows = [outcome for outcome in outcomes if isinstance(outcome, Row)]
        try:
            self._tick(rows)
        except Exception as error:  # whatever a runtime raises, only these rows are lost
            failed = pb_utils.TritonError(f"the network call failed: {error}")
            outcomes = [failed if isinstance(outcome, Row) else outcome for outcome in outcomes]
        responses = [self._respond(*pair) for pair in zip(requests, outcomes, strict=True)]
        self._forget_abandoned()
        return responses

    def finalize(self) -> None:
        """Close the pipeline when the model is unloaded."""
        self._pipeline.close()

    def _take_row(self, request: Any) -> Outcome:
        """The row of a request that was here before, or a new one, or why there is none."""
        row = self._rows.pop(_key(request), None)
        if request.is_cancelled():
            return pb_utils.TritonError("cancelled by the client", pb_utils.TritonError.CANCELLED)
        try:
            return row or self._pipeline.admit(_parse(request))
        except VitrineError as error:
            return pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
        except Exception as error:  # a bug of ours must not fail the neighbours
            return pb_utils.TritonError(f"{type(error).__name__}: {error}")

    def _tick(self, rows: Sequence[Row]) -> None:
        if not rows:
            return
        self._pipeline.tick(rows)
        self._ticks.increment(1)
        self._rows_ticked.increment(len(rows))

    def _forget_abandoned(self) -> None:
        """Drop the rows that were longest without a tick where there are too many.

        Triton mostly drops a cancelled request between two ticks and tells nobody. A row that was
        dropped in error starts anew: the same picture, later.
        """
        while len(self._rows) > self._max_kept:
            del self._rows[next(iter(self._rows))]

    def _respond(self, request: Any, outcome: Outcome) -> Any:
        if not isinstance(outcome, Row):
            return pb_utils.InferenceResponse(error=outcome)
        if outcome.done:
            return self._picture(outcome)
        self._rows[_key(request)] = outcome
        request.set_release_flags(pb_utils.TRITONSERVER_REQUEST_RELEASE_RESCHEDULE)
        return None

    def _picture(self, row: Row) -> Any:
        """The answer to a row that is done. A broken picture fails its own request only."""
        try:
            image = self._pipeline.finish(row)[None]  # [1, H, W, C]
        except VitrineError as error:
            failed = pb_utils.TritonError(str(error), pb_utils.TritonError.INTERNAL)
        except Exception as error:  # whatever a runtime raises must not fail the neighbours
            message = f"{type(error).__name__}: {error}"
            failed = pb_utils.TritonError(message, pb_utils.TritonError.INTERNAL)
        else:
            return pb_utils.InferenceResponse([pb_utils.Tensor("image", image)])
        return pb_utils.InferenceResponse(error=failed)


class _Counter:
    """One counter of Triton's /metrics, labelled with the model."""

    def __init__(self, name: str, description: str, model: str) -> None:
        self._family = pb_utils.MetricFamily(
            name=name, description=description, kind=pb_utils.MetricFamily.COUNTER
        )
        self._metric = self._family.Metric(labels={"model": model})

    def increment(self, by: int) -> None:
        self._metric.increment(by)


def _key(request: Any) -> Hashable:
    """What finds a request's row again at its next tick.

    Triton's correlation ids are not enough: a client may set one, and it may be one that Triton
    gave to another request. With what was asked for in the key, all rows of a key are equal.
    """
    return request.correlation_id(), tuple(_subject(request)[1].flat), request.parameters()


def _subject(request: Any) -> tuple[str, Any]:
    """The one input tensor, by name: `label` or `prompt`, bytes [1, 1]."""
    (tensor,) = request.inputs()
    return tensor.name(), tensor.as_numpy()


def _parse(request: Any) -> Request:
    """The request as a validated model. Raises OptionError."""
    if request.flags() & pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END:
        raise OptionError("a request must not set sequence_end; leave out all sequence options")
    name, subject = _subject(request)
    if subject.shape != (1, 1):
        raise OptionError(
            f"{name} must have shape [1, 1], one request is one picture; "
            f"got {list(subject.shape)}, send one request for each picture"
        )
    parameters = json.loads(request.parameters() or "{}")
    if name in parameters:
        raise OptionError(f"{name} is the input tensor, not a parameter; leave the parameter out")
    for picture in ("image", "mask"):
        if picture in parameters:
            raise OptionError(f"{picture} is not a parameter; the server takes no pictures yet")
    return Request.of({**parameters, name: _text(name, subject[0, 0])})


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise OptionError(f"{name} must be UTF-8 text, got {value!r}") from None

"""The search for the layers that a network gains most from in int8, while its pictures hold."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from engine.manifest import KeptLayer
from export.ledger import Ledger

SHARES = 8  # sets of 8/8, 7/8, ... 1/8 of the useful layers are tried
LEAST_WORK = 0.005  # of the network's: layers with less are not worth a conversion around them
FASTER = 0.99  # of the float call
NO_TIME = "its error was not measured: the time of the search was up"


class Trials(Protocol):
    """A network whose layers can be quantized one by one, measured on this machine."""

    layers: Sequence[str]

    def work(self) -> dict[str, float]:
        """Multiply-accumulates of each layer in one call."""

    def saved_ms(self) -> dict[str, float]:
        """What int8 saves of each layer's own time in one call."""

    def error(self, layers: Sequence[str]) -> float:
        """Power of the error of a call with these in int8, over the power of the output."""

    def margin_db(self, layers: Sequence[str]) -> float:
        """How far the worst of the trial pictures is above its floor; negative: below."""

    def call_ms(self, candidates: Sequence[Sequence[str]]) -> list[float]:
        """What a call of each candidate takes, timed in turns."""


@dataclass(frozen=True)
class Found:
    """The chosen layers in the order of the graph, and why the others are kept."""

    layers: tuple[str, ...]
    kept: tuple[KeptLayer, ...]
    holds: bool  # whether the trial pictures do


def search(
    trials: Trials,
    ledger: Ledger,
    seconds: float,
    progress: Callable[[str], None],
    refused: Collection[tuple[str, ...]] = (),
    clock: Callable[[], float] = time.monotonic,
) -> Found:
    """The fastest set of layers whose trial pictures hold.

    Sets take the layers with most work for their error first: work, which does not depend on the
    clock, so that a second search tries the same sets. Pictures are drawn of those that are
    faster than float, the fastest first, until one holds: more layers in int8 do not always make
    the worst picture worse, so that no set speaks for another. Where none holds, the one that
    comes closest is returned, for the gate to refuse. Sets that it has `refused` already are passed
    over. When the time is up, what was not measured stays float, and pictures are drawn of one set
    still.
    """
    end = clock() + seconds
    saved = _saved(trials, ledger, progress)
    work = trials.work()
    least = LEAST_WORK * sum(work.values())
    useful = [layer for layer in trials.layers if saved[layer] > 0 and work[layer] >= least > 0]
    errors = _errors(trials, useful, ledger, progress, lambda: clock() >= end)
    order = sorted(errors, key=lambda layer: errors[layer] / work[layer])
    margins: dict[tuple[str, ...], float] = {}
    faster = _faster_sets(trials, order, ledger, progress)
    for layers in [layers for layers in faster if layers not in refused]:
        known = ledger.knows(_margin_name(layers))
        if margins and not known and clock() >= end:
            continue
        margins[layers] = _margin_db(trials, layers, ledger, progress)
        if margins[layers] >= 0:
            break
    chosen = max(margins, key=lambda layers: margins[layers], default=())
    kept = _kept(trials, chosen, saved, errors, useful, gains=bool(faster))
    return Found(layers=chosen, kept=tuple(kept), holds=margins.get(chosen, -1.0) >= 0)


def _saved(trials: Trials, ledger: Ledger, progress: Callable[[str], None]) -> dict[str, float]:
    progress("timing every layer in float and in int8")
    return ledger.recall("saved_ms", trials.saved_ms, dict)


def _errors(
    trials: Trials,
    layers: Sequence[str],
    ledger: Ledger,
    progress: Callable[[str], None],
    is_over: Callable[[], bool],
) -> dict[str, float]:
    """The error of each layer alone; those that time is too short for are left out."""
    errors: dict[str, float] = {}
    for number, layer in enumerate(layers, 1):
        name = f"error of {layer}"
        if not ledger.knows(name) and is_over():
            continue
        progress(f"sensitivity of layer {number} of {len(layers)}: {layer}")
        measure = partial(trials.error, [layer])
        errors[layer] = ledger.recall(name, measure, float)
    return errors


def _faster_sets(
    trials: Trials, order: Sequence[str], ledger: Ledger, progress: Callable[[str], None]
) -> list[tuple[str, ...]]:
    """The first layers of the order in sets of several sizes, those that gain, fastest first.

    The profile times kernels alone; what is converted around them shows only in a whole call.
    """
    counts = sorted({len(order) * share // SHARES for share in range(1, SHARES + 1)} - {0})
    sets = [_in_graph_order(trials, order[:count]) for count in counts]
    progress(f"timing {len(sets)} sets of layers")
    name = "call_ms of " + " | ".join(" ".join(layers) for layers in sets)
    float_ms, *set_ms = ledger.recall(name, lambda: trials.call_ms([(), *sets]), list)
    gaining = [pair for pair in zip(set_ms, sets, strict=True) if pair[0] < FASTER * float_ms]
    return [layers for _, layers in sorted(gaining)]


def _margin_db(
    trials: Trials, layers: Sequence[str], ledger: Ledger, progress: Callable[[str], None]
) -> float:
    progress(f"drawing the trial pictures with {len(layers)} layers in int8")
    return ledger.recall(_margin_name(layers), lambda: trials.margin_db(layers), float)


def _margin_name(layers: Sequence[str]) -> str:
    return "margin_db of " + " ".join(layers)


def _kept(
    trials: Trials,
    chosen: Sequence[str],
    saved: Mapping[str, float],
    errors: Mapping[str, float],
    useful: Sequence[str],
    gains: bool,
) -> list[KeptLayer]:
    total = sum(errors[layer] for layer in chosen)
    kept = []
    for layer in trials.layers:
        if layer in chosen:
            continue
        if saved[layer] <= 0:
            reason = "int8 is no faster here"
        elif layer not in useful:
            reason = (
                f"under {LEAST_WORK:.1%} of the network's work, {saved[layer]:.3f} ms of a call"
            )
        elif layer not in errors:
            reason = NO_TIME
        elif not gains:
            reason = "no set of layers made a whole call faster"
        elif not total:
            reason = "with it the pictures fall below the floor"
        else:
            reason = (
                f"its error is {errors[layer] / total:.2g} times that of all quantized layers "
                f"together, for {saved[layer]:.3f} ms of a call"
            )
        kept.append(KeptLayer(name=layer, reason=reason))
    return kept


def _in_graph_order(trials: Trials, layers: Sequence[str]) -> tuple[str, ...]:
    chosen = set(layers)
    return tuple(layer for layer in trials.layers if layer in chosen)

"""The search for layers in int8: what it chooses and draws, and how it goes on when stopped."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest

from export.ledger import Ledger
from export.search import Found, search

FLOAT_MS = 10.0
CONVERSION_MS = 0.1  # between neighbours of which one is in int8
SEEDS = range(40)
CONTEXT = {"floor_db": 35.0}
HOUR_S = 3600.0
NO_FASTER = "int8 is no faster here"
NO_TIME = "its error was not measured: the time of the search was up"


@dataclass
class FakeTrials:
    """A network whose layers are known, in the order of `saved`; every measurement is counted."""

    saved: dict[str, float]
    errors: dict[str, float]
    margin_of: Callable[[Sequence[str]], float]
    ms_of: Callable[[Sequence[str]], float]
    stop_at: int | None = None  # the measurement in which the user stops the search
    measured: list[str] = field(default_factory=list)
    timed: list[tuple[str, ...]] = field(default_factory=list)  # candidates beside float
    drawn: list[tuple[str, ...]] = field(default_factory=list)

    @property
    def layers(self) -> Sequence[str]:
        return list(self.saved)

    def work(self) -> dict[str, float]:
        return {layer: max(saved, 0.1) for layer, saved in self.saved.items()}

    def saved_ms(self) -> dict[str, float]:
        self._count("saved_ms")
        return dict(self.saved)

    def error(self, layers: Sequence[str]) -> float:
        (layer,) = layers
        self._count(f"error of {layer}")
        return self.errors[layer]

    def margin_db(self, layers: Sequence[str]) -> float:
        self._count("margin_db of " + " ".join(layers))
        self.drawn.append(tuple(layers))
        return self.margin_of(layers)

    def call_ms(self, candidates: Sequence[Sequence[str]]) -> list[float]:
        self._count("call_ms")
        assert list(candidates[0]) == []
        self.timed = [tuple(layers) for layers in candidates[1:]]
        return [self.ms_of(layers) for layers in candidates]

    def _count(self, name: str) -> None:
        self.measured.append(name)
        if len(self.measured) == self.stop_at:
            raise KeyboardInterrupt

    @property
    def clock(self) -> Callable[[], float]:
        """A second for every measurement."""
        return lambda: float(len(self.measured))


def network(seed: int, count: int = 20, **more: object) -> FakeTrials:
    """Layers of random gain and error, some without gain; no set's picture follows another's."""
    random = np.random.default_rng(seed)
    names = [f"layer_{index}" for index in range(count)]
    saved = dict(zip(names, random.uniform(-0.1, 0.4, count).tolist(), strict=True))
    errors = dict(zip(names, (10 ** random.uniform(-6, -3, count)).tolist(), strict=True))
    floor_db = random.uniform(27, 65)

    def ms_of(layers: Sequence[str]) -> float:
        inside = [name in layers for name in names]
        borders = sum(a != b for a, b in pairwise(inside))
        return FLOAT_MS - sum(saved[name] for name in layers) + CONVERSION_MS * borders

    def margin_of(layers: Sequence[str]) -> float:
        luck_db = np.random.default_rng(crc32(" ".join(layers).encode())).normal(0, 2)
        power = sum(errors[name] for name in layers)
        return float(-10 * math.log10(power) + luck_db - floor_db)

    return FakeTrials(saved, errors, margin_of, ms_of, **more)  # type: ignore[arg-type]


def even(count: int, margin_of: Callable[[Sequence[str]], float], **more: object) -> FakeTrials:
    """Layers that save 0.5 ms each; each one's error is ten times that of the one before."""
    names = [f"layer_{index}" for index in range(count)]
    saved, errors = dict.fromkeys(names, 0.5), {n: 1e-9 * 10**i for i, n in enumerate(names)}
    made = FakeTrials(saved, errors, margin_of, lambda layers: FLOAT_MS - 0.5 * len(layers))
    for name, value in more.items():
        setattr(made, name, value)
    return made


def run(trials: FakeTrials, folder: Path, seconds: float = HOUR_S) -> Found:
    ledger = Ledger(folder / "ledger.jsonl", CONTEXT)
    return search(trials, ledger, seconds, lambda _: None, clock=trials.clock)


def picked(trials: FakeTrials, tried: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """By brute force: the fastest of the sets that hold, or else the closest one."""
    faster = [layers for layers in tried if trials.ms_of(layers) < 0.99 * FLOAT_MS]
    holding = [layers for layers in faster if trials.margin_of(layers) >= 0]
    if holding:
        return min(holding, key=trials.ms_of)
    return max(faster, key=trials.margin_of, default=())


def require_each_layer_once(found: Found, trials: FakeTrials) -> None:
    names = [*found.layers, *(layer.name for layer in found.kept)]
    assert sorted(names) == sorted(trials.layers)
    assert all(layer.reason for layer in found.kept)


def reasons(found: Found) -> dict[str, str]:
    return {layer.name: layer.reason for layer in found.kept}


# What is chosen


@pytest.mark.parametrize("seed", SEEDS)
def test_the_fastest_set_that_holds_is_chosen(seed: int, tmp_path: Path) -> None:
    trials = network(seed)
    found = run(trials, tmp_path)
    assert found.layers == picked(trials, trials.timed)
    require_each_layer_once(found, trials)


def test_the_random_networks_are_of_every_kind(tmp_path: Path) -> None:
    """Or the test above could pass without looking: each case occurs among its seeds."""
    kinds = set()
    for seed in SEEDS:
        trials = network(seed)
        run(trials, tmp_path / f"{seed}")
        margins = [trials.margin_of(layers) for layers in trials.timed]
        kinds.add("some hold" if max(margins) >= 0 else "none holds")
        kinds.add("in order" if margins == sorted(margins)[::-1] else "a larger set is better")
        fastest = min(trials.timed, key=trials.ms_of)
        kinds.add("largest fastest" if fastest == trials.timed[-1] else "a smaller one is faster")
    assert kinds >= {
        "some hold", "none holds", "a larger set is better", "a smaller one is faster",
    }  # fmt: skip


def test_sets_take_the_layers_that_save_most_for_their_error_first(tmp_path: Path) -> None:
    trials = even(16, lambda layers: 1.0)
    trials.saved = dict(reversed(trials.saved.items()))  # the graph runs the other way
    run(trials, tmp_path)
    names = trials.layers
    assert trials.timed == [tuple(names[-size:]) for size in range(2, 17, 2)]


def test_a_network_of_few_layers_tries_each_size_once(tmp_path: Path) -> None:
    trials = even(3, lambda layers: 1.0)
    run(trials, tmp_path)
    assert [len(layers) for layers in trials.timed] == [1, 2, 3]


def test_a_larger_set_may_hold_where_smaller_ones_do_not(tmp_path: Path) -> None:
    trials = even(8, lambda layers: 1.0 if len(layers) == 6 else -1.0)
    found = run(trials, tmp_path)
    assert len(found.layers) == 6
    assert [len(layers) for layers in trials.drawn] == [8, 7, 6]  # and no slower one


def test_where_none_holds_the_closest_is_returned_alone(tmp_path: Path) -> None:
    trials = even(8, lambda layers: -abs(len(layers) - 3) - 0.5)
    found = run(trials, tmp_path)
    assert len(found.layers) == 3
    require_each_layer_once(found, trials)


def test_sets_that_the_gate_refused_are_passed_over_without_a_new_measurement(
    tmp_path: Path,
) -> None:
    trials = even(8, lambda layers: 1.0 if len(layers) in (6, 3) else -1.0)
    ledger = Ledger(tmp_path / "ledger.jsonl", CONTEXT)
    refused: list[tuple[str, ...]] = []
    sizes = []
    while (found := search(trials, ledger, HOUR_S, lambda _: None, refused)).holds:
        sizes.append(len(found.layers))
        refused.append(found.layers)
    assert sizes == [6, 3]
    assert [len(layers) for layers in trials.drawn] == [8, 7, 6, 5, 4, 3, 2, 1]  # each once


def test_pictures_that_are_exactly_at_the_floor_hold(tmp_path: Path) -> None:
    trials = even(8, lambda layers: 0.0 if len(layers) in (3, 5) else -1e-9)
    found = run(trials, tmp_path)
    assert len(found.layers) == 5


@pytest.mark.parametrize("seed", SEEDS)
def test_a_set_that_is_slower_than_float_is_never_drawn(seed: int, tmp_path: Path) -> None:
    trials = network(seed)
    plain = trials.ms_of
    trials.ms_of = lambda layers: plain(layers) + 2.0 * bool(layers)  # ms to enter int8 at all
    run(trials, tmp_path)
    assert all(trials.ms_of(layers) < 0.99 * FLOAT_MS for layers in trials.drawn)
    slow = [layers for layers in trials.timed if trials.ms_of(layers) >= 0.99 * FLOAT_MS]
    assert slow
    assert not set(slow) & set(trials.drawn)


def test_a_gain_of_less_than_a_hundredth_is_none(tmp_path: Path) -> None:
    trials = even(2, lambda layers: 1.0)
    trials.ms_of = lambda layers: FLOAT_MS * (1.0, 0.9901, 0.9899)[len(layers)]
    found = run(trials, tmp_path)
    assert trials.drawn == [found.layers] == [tuple(trials.layers)]


# What is kept, and why


def test_layers_that_save_nothing_are_kept_without_a_measurement(tmp_path: Path) -> None:
    trials = even(8, lambda layers: 1.0)
    trials.saved |= {"layer_2": 0.0, "layer_5": -0.1}
    found = run(trials, tmp_path)
    assert reasons(found) == {"layer_2": NO_FASTER, "layer_5": NO_FASTER}
    assert not {"error of layer_2", "error of layer_5"} & set(trials.measured)
    assert not any({"layer_2", "layer_5"} & set(layers) for layers in trials.timed)


def test_a_network_without_a_useful_layer_stays_float(tmp_path: Path) -> None:
    trials = even(3, lambda layers: 1.0)
    trials.saved = dict.fromkeys(trials.saved, -0.1)
    found = run(trials, tmp_path)
    assert found.layers == ()
    assert set(reasons(found).values()) == {NO_FASTER}
    assert trials.drawn == []


def test_a_kept_layer_has_its_error_and_its_gain_as_the_reason(tmp_path: Path) -> None:
    trials = even(8, lambda layers: 1.0 if len(layers) <= 6 else -1.0)
    found = run(trials, tmp_path)
    total = sum(trials.errors[name] for name in found.layers)
    assert reasons(found) == {
        name: f"its error is {trials.errors[name] / total:.2g} times that of all quantized layers "
        "together, for 0.500 ms of a call"
        for name in ("layer_6", "layer_7")
    }


def test_layers_that_gain_nothing_in_a_whole_call_are_not_said_to_harm_pictures(
    tmp_path: Path,
) -> None:
    trials = even(8, lambda layers: 1.0)
    trials.ms_of = lambda layers: FLOAT_MS
    found = run(trials, tmp_path)
    assert found.layers == ()
    assert trials.drawn == []
    require_each_layer_once(found, trials)
    assert not any("below the floor" in reason for reason in reasons(found).values())


def test_a_search_says_what_it_measures(tmp_path: Path) -> None:
    said: list[str] = []
    trials = even(2, lambda layers: 1.0)
    search(trials, Ledger(tmp_path / "ledger.jsonl", CONTEXT), HOUR_S, said.append)
    assert said == [
        "timing every layer in float and in int8",
        "sensitivity of layer 1 of 2: layer_0",
        "sensitivity of layer 2 of 2: layer_1",
        "timing 2 sets of layers",
        "drawing the trial pictures with 2 layers in int8",
    ]


# A time budget


@pytest.mark.parametrize("seed", range(5))
def test_a_search_whose_time_is_up_returns_and_keeps_what_it_did_not_measure(
    seed: int, tmp_path: Path
) -> None:
    whole = network(seed)
    run(whole, tmp_path / "whole")
    useful = [name for name in whole.layers if whole.saved[name] > 0]
    for seconds in range(len(whole.measured) + 1):
        trials = network(seed)
        found = run(trials, tmp_path / f"{seconds}", seconds)
        late = set(trials.measured[seconds:]) - {"saved_ms"}
        drawn = {name for name in late if name.startswith("margin_db")}
        assert len(drawn) <= 1  # so that something is there to be chosen
        assert late - drawn <= {"call_ms"}
        without = [name for name in useful if f"error of {name}" not in trials.measured]
        assert [n for n, reason in reasons(found).items() if reason == NO_TIME] == without
        assert found.layers == picked(trials, trials.drawn)
        require_each_layer_once(found, trials)


def test_a_budget_that_is_just_enough_finds_what_no_budget_finds(tmp_path: Path) -> None:
    whole, trials = network(3), network(3)
    expected = run(whole, tmp_path / "whole")
    assert run(trials, tmp_path / "budget", len(whole.measured)) == expected


def test_what_was_measured_counts_when_the_time_is_up(tmp_path: Path) -> None:
    trials = even(8, lambda layers: 1.0 if len(layers) in (6, 3) else -1.0)
    ledger = Ledger(tmp_path / "ledger.jsonl", CONTEXT)
    first = search(trials, ledger, HOUR_S, lambda _: None)
    search(trials, ledger, HOUR_S, lambda _: None, [first.layers])
    measured = list(trials.measured)
    late = search(trials, ledger, -1.0, lambda _: None, [first.layers])
    assert (len(first.layers), len(late.layers), late.holds) == (6, 3, True)
    assert trials.measured == measured


def test_a_search_that_ran_out_of_time_gets_further_when_it_is_run_again(tmp_path: Path) -> None:
    expected = run(network(3), tmp_path / "whole")
    for _ in range(20):
        trials = network(3)
        found = run(trials, tmp_path / "again", 5)
        if not trials.measured:
            break
    assert found == expected


# A search that was stopped


@pytest.mark.parametrize("seed", range(3))
def test_a_stopped_search_goes_on_and_measures_nothing_twice(seed: int, tmp_path: Path) -> None:
    whole = network(seed)
    expected = repr(run(whole, tmp_path / "whole")).encode()
    for number in range(1, len(whole.measured) + 1):
        stopped, resumed = network(seed, stop_at=number), network(seed)
        with pytest.raises(KeyboardInterrupt):
            run(stopped, tmp_path / f"{number}")
        found = run(resumed, tmp_path / f"{number}")
        assert repr(found).encode() == expected
        assert stopped.measured[:-1] + resumed.measured == whole.measured


def test_a_search_that_is_stopped_at_every_second_measurement_ends_alike(tmp_path: Path) -> None:
    whole = network(1)
    expected = repr(run(whole, tmp_path / "whole")).encode()
    measured: list[str] = []
    for _ in whole.measured:
        trials = network(1, stop_at=2)
        try:
            found = run(trials, tmp_path / "stopped")
        except KeyboardInterrupt:
            measured += trials.measured[:-1]
        else:
            measured += trials.measured
            break
    assert repr(found).encode() == expected
    assert measured == whole.measured


def test_a_finished_search_is_repeated_from_its_ledger_alone(tmp_path: Path) -> None:
    whole, again = network(2), network(2)
    expected = run(whole, tmp_path)
    ledger = Ledger(tmp_path / "ledger.jsonl", CONTEXT)
    assert ledger.resumed == len(whole.measured)
    assert search(again, ledger, HOUR_S, lambda _: None) == expected
    assert again.measured == []


@pytest.mark.parametrize("context", [{"floor_db": 36.0}, {}, {"floor_db": 35.0, "cores": 2}])
def test_a_ledger_of_another_context_is_begun_anew(
    context: dict[str, object], tmp_path: Path
) -> None:
    path, whole, other = tmp_path / "ledger.jsonl", network(2), network(2)
    run(whole, tmp_path)
    ledger = Ledger(path, context)
    assert ledger.resumed == 0
    search(other, ledger, HOUR_S, lambda _: None)
    assert other.measured == whole.measured
    assert Ledger(path, context).resumed == len(whole.measured)
    assert Ledger(path, CONTEXT).resumed == 0


def test_the_order_of_a_context_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(path, {"a": 1, "b": [2]}).recall("x", lambda: 1.5, float)
    assert Ledger(path, {"b": [2], "a": 1}).resumed == 1


DAMAGED = {
    "half a line": b'{"name": "error of lay',
    "no value": b'{"name": "error of layer_1"}',
    "no name": b'{"value": 1.0}',
    "a number": b"5",
    "a list": b"[]",
    "null": b"null",
    "a text": b'"saved_ms"',
    "no text": b"\xff\xfe\x00",
    "no line": b"",
}


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.parametrize("last", [True, False], ids=["at the end", "in the middle"])
def test_a_ledger_with_a_damaged_line_is_begun_anew(case: str, last: bool, tmp_path: Path) -> None:
    path, whole, again = tmp_path / "ledger.jsonl", network(2, 6), network(2, 6)
    expected = run(whole, tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[-1 if last else 3] = DAMAGED[case] + b"\n"
    path.write_bytes(b"".join(lines))
    assert Ledger(path, CONTEXT).resumed == 0
    assert run(again, tmp_path) == expected
    assert again.measured == whole.measured
    assert Ledger(path, CONTEXT).resumed == len(whole.measured)


def test_a_ledger_that_was_cut_anywhere_gives_the_same_search(tmp_path: Path) -> None:
    path, whole = tmp_path / "ledger.jsonl", network(2, 6)
    expected = run(whole, tmp_path)
    written = path.read_bytes()
    for length in range(len(written)):
        path.write_bytes(written[:length])
        again = network(2, 6)
        ledger = Ledger(path, CONTEXT)
        assert search(again, ledger, HOUR_S, lambda _: None) == expected
        assert ledger.resumed + len(again.measured) == len(whole.measured)
        assert path.read_bytes() == written  # whole again: it can be gone on with


def test_a_ledger_keeps_every_kind_of_value_to_the_last_bit(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "ledger.jsonl"
    values = {
        "a number": 0.1 + 0.2, "infinity": -math.inf, "numbers": [1e-300, 1 / 3],
        "by name": {"/up/0/Conv": 0.125, "ä\u2028": -1.0},
    }  # fmt: skip
    ledger = Ledger(path, CONTEXT)
    for name, value in values.items():
        assert ledger.recall(name, lambda value=value: value, type(value)) == value
    assert ledger.resumed == 0
    reopened = Ledger(path, CONTEXT)
    assert reopened.resumed == len(values)
    for name, value in values.items():
        assert reopened.recall(name, lambda: pytest.fail("measured twice"), type(value)) == value


def test_a_value_of_another_kind_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(path, CONTEXT).recall("x", lambda: [1.5], list)
    assert Ledger(path, CONTEXT).recall("x", lambda: 2.5, float) == 2.5
    assert Ledger(path, CONTEXT).recall("x", lambda: 3.5, float) == 2.5

"""The choice among variants: what is refused with which figures, which one is picked, and ties."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from engine.artifact import Artifact, read_artifact
from engine.checkpoint import read_checkpoint
from engine.errors import OptionError
from engine.machine import this_machine
from engine.manifest import Floors, Goal, Quality, Variant
from export import select
from export.select import Timing, choose, is_tie, no_gain, replaced, speed

GOALS: tuple[Goal, ...] = ("latency", "throughput", "size")
CLOCKS: tuple[Goal, ...] = ("latency", "throughput")
MIB = 2**20
ROUNDS = 7


def variant(name: str, psnr_db: float = 60.0, mib: float = 10.0, **more: object) -> Variant:
    """One that was judged and accepted, `runtime-precision`."""
    runtime, precision = name.split("-")[:2]
    values: dict[str, object] = {
        "runtime": runtime,
        "precision": precision,
        "runtime_version": "1.0",
        "networks": {"unet": f"graphs/{name}.onnx"},
        "size_bytes": int(mib * MIB),
        "quality": quality(psnr_db),
        "accepted": True,
        **more,
    }
    return Variant(**values)  # type: ignore[arg-type]


def quality(psnr_db: float) -> Quality:
    return Quality(
        pictures=64, psnr_db_min=psnr_db, psnr_db_mean=psnr_db + 3, ssim_min=0.99, ssim_mean=0.995,
        isr_db_min=psnr_db - 6, isr_db_mean=psnr_db - 4, floors=Floors(), worst_seed=17,
        worst_picture="quality/17.png",
    )  # fmt: skip


def variants(*names: str) -> dict[str, Variant]:
    return {name: variant(name) for name in names}


def timing(alone_ms: float, picture_ms: float | None = None) -> Timing:
    """The same in every round; `picture_ms`: of each of the pictures in a batch."""
    batch_s = (alone_ms if picture_ms is None else picture_ms) * select.BATCH / 1000
    return Timing([alone_ms / 1000] * ROUNDS, [batch_s] * ROUNDS)


def refused(variant: Variant) -> Variant:
    return variant.model_copy(update={"accepted": False, "reason": "below its floor"})


# What a variant must gain


def test_an_int8_that_is_slower_than_fp32_is_refused_with_both_figures() -> None:
    made = variants("onnxruntime-fp32", "onnxruntime-int8")
    timings = {"onnxruntime-fp32": timing(40.0, 20.0), "onnxruntime-int8": timing(44.5, 23.2)}
    reason = "not faster than onnxruntime-fp32, which it would replace: "
    assert no_gain("onnxruntime-int8", made, timings, "latency") == (
        f"{reason}44.5 ms a picture alone against 40.0 ms"
    )
    assert no_gain("onnxruntime-int8", made, timings, "throughput") == (
        f"{reason}23.2 ms a picture in a batch of 8 against 20.0 ms"
    )


@pytest.mark.parametrize("goal", CLOCKS)
def test_as_fast_as_what_it_replaces_is_no_gain_and_faster_beyond_the_noise_is(goal: Goal) -> None:
    made = variants("openvino-fp32", "openvino-int8")

    def gain(milliseconds: float) -> str:
        timings = {"openvino-fp32": timing(10.0), "openvino-int8": timing(milliseconds)}
        return no_gain("openvino-int8", made, timings, goal)

    assert gain(10.0).startswith("not faster than openvino-fp32, which")
    assert gain(9.95).startswith("not faster than openvino-fp32 beyond the noise, which")
    assert gain(9.89) == ""


def test_the_goal_says_which_clock_counts() -> None:
    made = variants("openvino-fp32", "openvino-int8")
    timings = {"openvino-fp32": timing(10.0, 5.0), "openvino-int8": timing(11.0, 4.0)}
    assert no_gain("openvino-int8", made, timings, "latency")
    assert not no_gain("openvino-int8", made, timings, "throughput")


@pytest.mark.parametrize("goal", CLOCKS)
def test_int8_must_beat_the_best_float_of_its_own_runtime_alone(goal: Goal) -> None:
    made = variants(
        "onnxruntime-fp32", "openvino-fp32", "openvino-bf16", "openvino-int8", "tensorrt-fp16"
    )
    timings = {
        "onnxruntime-fp32": timing(5.0), "openvino-fp32": timing(20.0),
        "openvino-bf16": timing(10.0), "openvino-int8": timing(12.0), "tensorrt-fp16": timing(1.0),
    }  # fmt: skip
    assert no_gain("openvino-int8", made, timings, goal).startswith("not faster than openvino-bf16")
    made["openvino-bf16"] = refused(made["openvino-bf16"])  # then it replaces fp32
    assert no_gain("openvino-int8", made, timings, goal) == ""


def test_each_precision_replaces_the_higher_ones_of_its_runtime() -> None:
    made = variants(
        "openvino-fp32", "openvino-fp16", "openvino-bf16", "openvino-int8", "onnxruntime-fp32",
        "tensorrt-fp16", "tensorrt-int8", "tensorrt-fp8",
    )  # fmt: skip
    assert replaced("openvino-int8", made) == ["openvino-fp32", "openvino-fp16", "openvino-bf16"]
    assert replaced("openvino-bf16", made) == replaced("openvino-fp16", made) == ["openvino-fp32"]
    assert replaced("openvino-fp32", made) == replaced("onnxruntime-fp32", made) == []
    assert replaced("tensorrt-int8", made) == replaced("tensorrt-fp8", made) == ["tensorrt-fp16"]


@pytest.mark.parametrize("goal", GOALS)
def test_what_replaces_nothing_is_never_refused(goal: Goal) -> None:
    made = variants("openvino-fp32", "onnxruntime-fp32")
    timings = {"openvino-fp32": timing(99.0), "onnxruntime-fp32": timing(1.0)}
    assert no_gain("openvino-fp32", made, timings, goal) == ""


@pytest.mark.parametrize("missing", ["tensorrt-fp16", "tensorrt-int8"])
@pytest.mark.parametrize("goal", CLOCKS)
def test_clocks_refuse_nothing_that_they_did_not_measure(goal: Goal, missing: str) -> None:
    made = variants("tensorrt-fp16", "tensorrt-int8")
    timings = {"tensorrt-fp16": timing(1.0), "tensorrt-int8": timing(2.0)}
    del timings[missing]
    assert no_gain("tensorrt-int8", made, timings, goal) == ""


@pytest.mark.parametrize(("mib", "gains"), [(2.5, True), (10.0, False), (10.25, False)])
def test_for_size_a_variant_must_be_smaller_whatever_its_speed(mib: float, gains: bool) -> None:
    made = {
        "openvino-fp32": variant("openvino-fp32", mib=20.0),
        "openvino-bf16": variant("openvino-bf16", mib=10.0),
        "openvino-int8-weights": variant("openvino-int8-weights", mib=mib),
        "onnxruntime-fp32": variant("onnxruntime-fp32", mib=1.0),
    }
    timings = {name: timing(10.0 + number) for number, name in enumerate(made)}
    reason = f"not smaller than openvino-bf16, which it would replace: {mib:.2f} MiB against 10.00"
    assert no_gain("openvino-int8-weights", made, timings, "size") == ("" if gains else reason)


def test_a_size_that_nobody_knows_is_not_the_least() -> None:
    made = {
        "openvino-fp32": variant("openvino-fp32", mib=20.0),
        "onnxruntime-fp32": variant("onnxruntime-fp32").model_copy(update={"size_bytes": None}),
    }
    timings = {name: timing(10.0) for name in made}
    assert choose(made, timings, "size") == ("openvino-fp32", ())


# What is as fast


@pytest.mark.parametrize(
    ("ratios", "tie"),
    [
        ([1.0] * 7, True),
        ([1.009] * 7, True),
        ([1.011] * 7, False),
        ([1.05] * 6 + [0.95], False),  # once may be chance
        ([1.05] * 5 + [0.95] * 2, True),  # behind in a quarter of the rounds
        ([1.05] * 5 + [1.0] * 2, True),
        ([1.002] * 4 + [2.0] * 3, True),  # what disturbed some rounds says nothing
    ],
)
@pytest.mark.parametrize("goal", CLOCKS)
def test_a_tie_is_a_median_within_noise_or_rounds_that_disagree(
    ratios: Sequence[float], tie: bool, goal: Goal
) -> None:
    random = np.random.default_rng(0)
    fast = random.uniform(0.5, 2.0, ROUNDS)  # the machine, which slows both of a round alike
    slow = [a * b for a, b in zip(fast, random.permutation(ratios), strict=True)]
    other = random.uniform(0.1, 9.0, (2, ROUNDS)).tolist()  # of the other goal: no matter
    pairs = [(slow, other[0]), (fast.tolist(), other[1])]
    timings = [Timing(*(pair if goal == "latency" else pair[::-1])) for pair in pairs]
    assert is_tie(timings[0], timings[1], goal) is tie


# Which is picked


@pytest.mark.parametrize(
    ("goal", "best"),
    [
        ("latency", "onnxruntime-int8"),
        ("throughput", "openvino-bf16"),
        ("size", "openvino-int8"),
    ],
)
def test_each_goal_picks_its_own_best(goal: Goal, best: str) -> None:
    made = {
        "openvino-fp32": variant("openvino-fp32", 130.0),
        "openvino-bf16": variant("openvino-bf16"),
        "openvino-int8": variant("openvino-int8", mib=2.5),
        "onnxruntime-int8": variant("onnxruntime-int8", mib=2.6),
    }
    timings = {
        "openvino-fp32": timing(30.0, 20.0), "openvino-bf16": timing(14.0, 8.0),
        "openvino-int8": timing(15.0, 9.0), "onnxruntime-int8": timing(12.0, 10.0),
    }  # fmt: skip
    assert choose(made, timings, goal) == (best, ())


@pytest.mark.parametrize("goal", CLOCKS)
def test_of_ties_the_better_worst_picture_is_taken_and_the_others_are_named(goal: Goal) -> None:
    made = {
        "openvino-int8": variant("openvino-int8", 36.0),
        "openvino-bf16": variant("openvino-bf16", 52.0),
        "onnxruntime-int8": variant("onnxruntime-int8", 41.0),
        "openvino-fp32": variant("openvino-fp32", 130.0),
    }
    timings = {
        "openvino-int8": timing(10.0), "openvino-bf16": timing(10.09),
        "onnxruntime-int8": timing(10.05), "openvino-fp32": timing(10.2),
    }  # fmt: skip
    chosen, within_noise = choose(made, timings, goal)
    assert chosen == "openvino-bf16"
    assert within_noise == ("openvino-int8", "onnxruntime-int8")


def test_of_the_same_size_the_better_worst_picture_is_taken() -> None:
    made = {
        "openvino-int8": variant("openvino-int8", 36.0, 2.5),
        "onnxruntime-int8": variant("onnxruntime-int8", 41.0, 2.5),
        "openvino-fp32": variant("openvino-fp32", 130.0, 10.0),
    }
    timings = dict.fromkeys(made, timing(10.0))
    assert choose(made, timings, "size") == ("onnxruntime-int8", ("openvino-int8",))


@pytest.mark.parametrize("goal", GOALS)
def test_only_what_was_accepted_is_chosen_or_named(goal: Goal) -> None:
    made = {
        "openvino-fp32": variant("openvino-fp32"),
        "openvino-bf16": variant("openvino-bf16", mib=5.0),
        "openvino-int8": refused(variant("openvino-int8", mib=2.5)),
        "onnxruntime-int8": variant("onnxruntime-int8", mib=2.5, accepted=None),  # not checked
    }
    timings = {
        "openvino-fp32": timing(20.0), "openvino-bf16": timing(10.0),
        "openvino-int8": timing(10.0), "onnxruntime-int8": timing(5.0),
    }  # fmt: skip
    assert choose(made, timings, goal) == ("openvino-bf16", ())


@pytest.mark.parametrize("goal", GOALS)
def test_what_was_not_timed_is_never_chosen(goal: Goal) -> None:
    """A TensorRT variant whose plans are not built was judged by a simulation, if at all."""
    made = {
        "openvino-fp32": variant("openvino-fp32"),
        "tensorrt-int8": variant("tensorrt-int8", 90.0, 1.0),
    }
    assert choose(made, {"openvino-fp32": timing(20.0)}, goal) == ("openvino-fp32", ())


@pytest.mark.parametrize("goal", GOALS)
def test_where_nothing_is_accepted_nothing_is_chosen(goal: Goal) -> None:
    made = {name: refused(variant(name)) for name in ("openvino-fp32", "openvino-int8")}
    assert choose(made, dict.fromkeys(made, timing(10.0)), goal) == (None, ())
    accepted = variants("tensorrt-fp16")
    assert choose(accepted, {}, goal) == (None, ())


# The same selection twice

SPREAD = 0.002  # of a reading: two ratios of readings are then off by less than NOISE


def readings(true_s: Mapping[str, float], random: np.random.Generator) -> dict[str, Timing]:
    """One run of the clocks: rounds are slow or fast for all alike, a reading a little more."""
    rounds = random.uniform(1.0, 1.5, (2, ROUNDS))
    return {
        name: Timing(*(rounds * seconds * random.uniform(1 - SPREAD, 1 + SPREAD, (2, ROUNDS))))
        for name, seconds in true_s.items()
    }


@pytest.mark.parametrize("goal", CLOCKS)
def test_two_selections_choose_the_same_or_one_names_the_choice_of_the_other(goal: Goal) -> None:
    """For two candidates, at any distance: a reading's error is a fifth of what a tie allows."""
    different = 0
    for seed in range(500):
        random = np.random.default_rng(seed)
        true_s = {
            "openvino-int8": 1.0,
            "onnxruntime-int8": 1.0 + random.uniform(-0.02, 0.02),
        }
        made = {name: variant(name, random.uniform(35, 60)) for name in true_s}
        (one, ties), (two, other_ties) = (
            choose(made, readings(true_s, random), goal) for _ in range(2)
        )
        different += one != two
        assert one == two or two in ties or one in other_ties
    assert different  # or the seeds would prove nothing


# The clocks


@pytest.fixture
def two_of_one(diffusion_artifact: Path) -> Artifact:
    """The tiny artifact with its variant under two names."""
    artifact = read_artifact(diffusion_artifact)
    only = artifact.variant()
    both = artifact.manifest.model_copy(update={"variants": {"first": only, "second": only}})
    return Artifact(artifact.path, both)


@pytest.mark.usefixtures("one_torch_thread")
def test_every_variant_is_timed_in_every_round_alone_and_in_a_batch(
    two_of_one: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "LEAST_SECONDS", 0.001)
    said: list[str] = []
    timings = select.measure(two_of_one, ["first", "second"], said.append)
    assert list(timings) == ["first", "second"]
    for timed in timings.values():
        assert len(timed.alone) == len(timed.batches) == select.ROUNDS
        assert all(seconds > 0 for seconds in (*timed.alone, *timed.batches))
    assert said == [  # in turns
        f"timing: round {number} of {select.ROUNDS}, {name}"
        for number in range(1, select.ROUNDS + 1)
        for name in ("first", "second")
    ]


def test_a_variant_that_the_artifact_lacks_is_not_timed(two_of_one: Artifact) -> None:
    with pytest.raises(OptionError, match="variant must be one of first, second, got 'third'"):
        select.measure(two_of_one, ["first", "third"], lambda _: None)


def test_figures_are_the_medians_and_their_spread(
    diffusion_checkpoint: Path, gan_checkpoint: Path
) -> None:
    random = np.random.default_rng(0)
    alone, batches = random.uniform(1.0, 2.0, (2, ROUNDS))
    models = [read_checkpoint(path).model for path in (diffusion_checkpoint, gan_checkpoint)]
    diffusion, gan = (speed(Timing(alone.tolist(), batches.tolist()), model) for model in models)
    low, high = np.quantile(batches, [0.25, 0.75], method="weibull")
    for figures in (diffusion, gan):
        assert figures.latency_ms == pytest.approx(1000 * np.median(alone))
        assert figures.images_per_s == pytest.approx(8 / np.median(batches))
        assert figures.spread == pytest.approx((high - low) / np.median(batches))
        assert figures.batch == 8
        assert figures.machine == this_machine()
    defaults = models[0].defaults
    assert defaults is not None
    assert diffusion.num_inference_steps == min(defaults.num_inference_steps, 20)
    assert diffusion.guidance_scale == defaults.guidance_scale
    assert (gan.num_inference_steps, gan.guidance_scale) == (1, 1.0)

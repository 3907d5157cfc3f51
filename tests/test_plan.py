"""Plans: what they are built from, which machine takes them, and how they run.

A fake TensorRT and a fake CUDA stand in where only calls and bookkeeping are at stake; the tests
marked `tensorrt` build and run real plans where there is a GPU.
"""

import importlib.util
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from tensorrt_stub import fake_tensorrt
from tensorrt_stub.fake_cudart import Fake

from engine.backends import cuda
from engine.backends.target import Device, PlanTarget, check_device
from engine.errors import ArtifactError, OptionError, RuntimeUnavailableError, VitrineError
from engine.manifest import NetworkSpec, TensorSpec
from export.plan import PlanOptions, build_plan, default_profile, installed, refit_plan
from export.profile import Profile
from export.timing_cache import cache_path

H200 = Device("NVIDIA H200", "9.0")
H100 = Device("NVIDIA H100", "9.0")
L4 = Device("NVIDIA L4", "8.9")
T4 = Device("Tesla T4", "7.5")
BUILT = PlanTarget(tensorrt_version="10.16.1.11", gpu="NVIDIA H200", compute_capability="9.0")

SPEC = NetworkSpec(
    inputs=(
        TensorSpec(name="x", dtype="float32", shape=("batch", 3)),
        TensorSpec(name="n", dtype="int64", shape=("batch",)),
    ),
    outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 3)),),
)
SMALL = default_profile(SPEC, (1, 2, 4), {})
LARGE = default_profile(SPEC, (3, 16, 32), {})


# Options and profiles


def test_an_fp32_plan_computes_in_fp32_unless_told() -> None:
    assert not PlanOptions().tf32


@pytest.mark.parametrize("level", [-1, 6])
def test_the_optimization_level_is_0_to_5(level: int) -> None:
    with pytest.raises(OptionError, match=rf"optimization_level must be 0\.\.5, got {level}"):
        PlanOptions.parse({"optimization_level": level})


@pytest.mark.parametrize("option", ["refit", "strip_plan"])
def test_a_version_compatible_plan_cannot_be_refitted(option: str) -> None:
    with pytest.raises(OptionError, match="lean runtime, which cannot refit"):
        PlanOptions.parse({"version_compatible": True, option: True})


def test_every_axis_takes_its_range_into_every_input() -> None:
    spec = NetworkSpec(
        inputs=(
            TensorSpec(name="sample", dtype="float32", shape=("batch", 4, "height", "width")),
            TensorSpec(name="image", dtype="float32", shape=("batch", 3, "8*height", "8*width")),
            TensorSpec(name="timestep", dtype="float32", shape=("batch",)),
        ),
        outputs=(TensorSpec(name="out", dtype="float32", shape=("batch", 4, "height", "width")),),
    )
    profile = default_profile(spec, (1, 4, 8), {"height": (32, 64, 96), "width": (64, 64, 64)})
    assert profile.shapes == {
        "sample": ((1, 4, 32, 64), (4, 4, 64, 64), (8, 4, 96, 64)),
        "image": ((1, 3, 256, 512), (4, 3, 512, 512), (8, 3, 768, 512)),
        "timestep": ((1,), (4,), (8,)),
    }


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({}, "axis 'height' needs a range"),
        ({"height": (1, 2, 3), "depth": (1, 1, 1)}, "axis 'depth' .* allowed: batch, height"),
        ({"height": (4, 2, 8)}, r"axis 'height' must be 1 <= min <= opt <= max, got \(4, 2, 8\)"),
        ({"height": (0, 2, 8)}, "axis 'height' must be 1 <= min"),
    ],
)
def test_a_range_is_of_an_axis_and_in_order(
    axes: dict[str, tuple[int, int, int]], message: str
) -> None:
    sample = TensorSpec(name="sample", dtype="float32", shape=("batch", "height"))
    with pytest.raises(OptionError, match=message):
        default_profile(NetworkSpec(inputs=(sample,), outputs=(sample,)), (1, 1, 1), axes)


# Which machine takes a plan


@pytest.mark.parametrize(
    ("changes", "device", "version"),
    [
        ({}, H200, "10.16.1.11"),
        ({"hardware_compatibility": "same_compute_capability"}, H100, "10.16.1.11"),
        ({"hardware_compatibility": "ampere_plus"}, L4, "10.16.1.11"),
        ({"version_compatible": True}, H200, "10.16.2.1"),
        ({"version_compatible": True}, H200, "11.4.0.106"),
        ({"tensorrt_version": "11.0.0.1", "version_compatible": True}, H200, "11.4.0.106"),
    ],
)
def test_a_plan_runs_where_it_was_built_for(
    changes: dict[str, object], device: Device, version: str
) -> None:
    target = PlanTarget.parse({**BUILT.model_dump(), **changes})
    check_device(target, device, version, "artifacts/shoes")


@pytest.mark.parametrize(
    ("changes", "device", "version", "message"),
    [
        ({}, H100, "10.16.1.11", "for NVIDIA H200, sm_90, this machine has NVIDIA H100, sm_90"),
        ({}, H200, "11.4.0.106", r"10\.16\.1\.11 and exactly .* this machine has 11\.4\.0\.106"),
        (
            {"hardware_compatibility": "same_compute_capability"}, L4, "10.16.1.11",
            "for GPUs of sm_90, this machine has NVIDIA L4, sm_89",
        ),
        ({"hardware_compatibility": "ampere_plus"}, T4, "10.16.1.11", "sm_80 and up.*Tesla T4"),
        ({"version_compatible": True}, H200, "10.9.0.34", "a later version is needed"),
        ({"version_compatible": True}, H200, "12.0.0.1", "a later version is needed"),
        (
            {"tensorrt_version": "11.4.0.106", "version_compatible": True}, H200, "10.16.1.11",
            "a later version is needed",
        ),
    ],
)  # fmt: skip
def test_a_plan_is_refused_elsewhere_with_the_command_that_builds_it(
    changes: dict[str, object], device: Device, version: str, message: str
) -> None:
    target = PlanTarget.parse({**BUILT.model_dump(), **changes})
    with pytest.raises(
        ArtifactError, match=message + ".*; build it .*: vitrine plan artifacts/shoes$"
    ):
        check_device(target, device, version, "artifacts/shoes")


def test_a_manifest_can_hold_the_target() -> None:
    assert PlanTarget.parse(json.loads(BUILT.model_dump_json())) == BUILT
    with pytest.raises(ValidationError):
        PlanTarget(tensorrt_version="latest", gpu="NVIDIA H200", compute_capability="9.0")


# The timing cache's place


def test_the_timing_cache_is_one_a_version_and_architecture(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    expected = tmp_path / "vitrine" / "tensorrt" / "10.16.1.11-sm_90.cache"
    assert cache_path("10.16.1.11", H200) == expected
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_path("10.16.1.11", H200).relative_to(tmp_path / ".cache")


# Building, with the fakes


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Fake]:
    """A machine with TensorRT 10.16 and an H200, both fakes."""
    ours = ("engine.backends.plan", "engine.backends.tensorrt")
    before = {name: sys.modules.pop(name, None) for name in ours}
    fake = Fake()
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt)  # type: ignore[arg-type]
    monkeypatch.setattr(cuda, "cudart", fake)
    monkeypatch.setattr(fake_tensorrt.ICudaEngine, "cudart", fake, raising=False)
    monkeypatch.setattr(fake_tensorrt.Builder, "configs", [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield fake
    for name, module in before.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    path = tmp_path / "unet.onnx"
    path.write_bytes(b"a good graph")
    return path


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    return tmp_path / "shoes" / "tensorrt-fp16" / "unet.plan"


def test_a_plan_says_what_it_is_bound_to(machine: Fake, graph: Path, plan: Path) -> None:
    options = PlanOptions(hardware_compatibility="ampere_plus", version_compatible=True)
    target = build_plan(graph, plan, [SMALL], options)
    assert target == BUILT.model_copy(
        update={"hardware_compatibility": "ampere_plus", "version_compatible": True}
    )
    assert plan.is_file()


def test_options_become_flags(machine: Fake, graph: Path, plan: Path) -> None:
    flag = fake_tensorrt.BuilderFlag
    build_plan(graph, plan, [SMALL])
    build_plan(graph, plan, [SMALL], PlanOptions(strip_plan=True, workspace_gib=0.5))
    build_plan(graph, plan, [SMALL], PlanOptions(strip_plan=True, refit=True, tf32=True))
    plain, stripped, refittable = fake_tensorrt.Builder.configs
    assert plain.flags == set()
    assert plain.pools == {}
    assert stripped.flags == {flag.STRIP_PLAN, flag.REFIT_IDENTICAL}
    assert stripped.pools == {fake_tensorrt.MemoryPoolType.WORKSPACE: 2**29}
    assert refittable.flags == {flag.STRIP_PLAN, flag.REFIT, flag.TF32}


def test_progress_counts_the_steps_of_every_phase(machine: Fake, graph: Path, plan: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    build_plan(graph, plan, [SMALL], progress=lambda *step: seen.append(step))
    assert seen == [("Building", done, 2) for done in (0, 1, 2, 2)]


def interrupt(phase: str, done: int, steps: int) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_ends_a_build(machine: Fake, graph: Path, plan: Path) -> None:
    # TensorRT's bindings print what a callback raises and go on, so it must not be raised there.
    seen: list[int] = []

    def press(phase: str, done: int, steps: int) -> None:
        seen.append(done)
        signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        build_plan(graph, plan, [SMALL], progress=press)
    assert seen == [0]
    assert not plan.exists()
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("older", [b"", b"an older plan"])
@pytest.mark.parametrize(
    ("content", "profiles", "progress", "error", "message"),
    [
        (b"bad", [SMALL], None, ArtifactError, "cannot read .*unet.onnx.*Unique 'node_7': unsupp"),
        (b"a good graph", [], None, ArtifactError, "cannot build .*: no optimization profile has"),
        (b"a good graph", [SMALL], interrupt, KeyboardInterrupt, None),
        (
            b"a good graph", [Profile(shapes={"x": ((1, 3),) * 3})], None, OptionError,
            "must name the inputs n, x, got x",
        ),
        (
            b"a good graph", [Profile(shapes={"x": ((1, 4),) * 3, "n": ((1,),) * 3})], None,
            OptionError, "input 'x' is -1x3 in the graph.* got a profile of 1x4, 1x4, 1x4",
        ),
    ],
)  # fmt: skip
def test_a_failed_build_leaves_what_was_there(
    machine: Fake,
    graph: Path,
    plan: Path,
    older: bytes,
    content: bytes,
    profiles: list[Profile],
    progress: Callable[[str, int, int], None] | None,
    error: type[BaseException],
    message: str | None,
) -> None:
    graph.write_bytes(content)
    plan.parent.mkdir(parents=True)
    if older:
        plan.write_bytes(older)
    with pytest.raises(error, match=message):
        build_plan(graph, plan, profiles, progress=progress)
    assert [path.read_bytes() for path in plan.parent.iterdir()] == ([older] if older else [])


def test_a_plan_that_cannot_be_written_leaves_nothing(
    machine: Fake, graph: Path, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*paths: Path) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ArtifactError, match=r"cannot write the plan .*: No space left"):
        build_plan(graph, plan, [SMALL])
    assert list(plan.parent.iterdir()) == []


@pytest.mark.parametrize("damage", [None, b"no timings at all", b"timings of another GPU"])
def test_timings_are_kept_and_bad_ones_replaced(
    machine: Fake, graph: Path, plan: Path, damage: bytes | None
) -> None:
    cache = cache_path("10.16.1.11", H200)
    build_plan(graph, plan, [SMALL])
    first = cache.read_bytes()
    if damage is not None:
        cache.write_bytes(damage)
    build_plan(graph, plan, [SMALL])
    assert cache.read_bytes() == (first if damage else first + b"+")
    assert list(cache.parent.iterdir()) == [cache]


def test_a_cache_folder_that_cannot_be_is_told_before_the_build(
    machine: Fake, graph: Path, plan: Path, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_bytes(b"a file in the way")
    with pytest.raises(OptionError, match=r"timing cache .*; set XDG_CACHE_HOME"):
        build_plan(graph, plan, [SMALL])
    assert not plan.exists()


def test_a_build_without_a_gpu_says_so(machine: Fake, graph: Path, plan: Path) -> None:
    machine.devices = 0
    with pytest.raises(RuntimeUnavailableError, match="NVIDIA GPU: cudaErrorNoDevice"):
        build_plan(graph, plan, [SMALL])
    assert not plan.parent.exists()


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is here")
def test_a_build_without_tensorrt_says_what_to_install(graph: Path, plan: Path) -> None:
    message = r"^tensorrt is not installed; pip install 'vitrine\[tensorrt\]'$"
    with pytest.raises(RuntimeUnavailableError, match=message):
        build_plan(graph, plan, [SMALL])
    with pytest.raises(RuntimeUnavailableError, match=message):
        refit_plan(plan, graph, plan)


def test_refit_puts_other_weights_in_and_can_again(
    machine: Fake, graph: Path, plan: Path, tmp_path: Path
) -> None:
    build_plan(graph, plan, [SMALL], PlanOptions(refit=True))
    for weights in ("weights of another LoRA", "weights of a third"):
        graph.write_text(weights)
        refit_plan(plan, graph, plan)
        assert json.loads(plan.read_text())["weights"] == weights


@pytest.mark.parametrize(
    ("options", "weights", "message"),
    [
        (PlanOptions(), "weights", "was built without refit and strip_plan"),
        (PlanOptions(refit=True), "no graph", "does not fit the plan .*Unique 'node_7'"),
        (PlanOptions(refit=True), "weights without a bias", "lacks conv.bias, which .* needs"),
    ],
)
def test_a_failed_refit_leaves_the_plan_as_it_was(
    machine: Fake, graph: Path, plan: Path, options: PlanOptions, weights: str, message: str
) -> None:
    build_plan(graph, plan, [SMALL], options)
    before = plan.read_bytes()
    graph.write_text(weights)
    with pytest.raises(ArtifactError, match=message):
        refit_plan(plan, graph, plan)
    assert plan.read_bytes() == before
    assert list(plan.parent.iterdir()) == [plan]


# Running, with the fakes


def feed(batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "x": random.standard_normal((batch, 3), np.float32),
        "n": random.integers(-9, 9, batch, np.int64),
    }


def expected(given: dict[str, np.ndarray]) -> np.ndarray:
    return (2 * given["x"] + given["n"][:, None]).astype(np.float32)


def open_plan(graph: Path, plan: Path, profiles: list[Profile], **options: object):
    from engine.backends.tensorrt import TensorRTBackend

    target = build_plan(graph, plan, profiles)
    return TensorRTBackend(plan, SPEC, target, **options)


def test_the_second_call_at_a_shape_is_captured_and_the_rest_replay_it(
    machine: Fake, graph: Path, plan: Path
) -> None:
    backend = open_plan(graph, plan, [SMALL])
    for seed in range(4):
        given = feed(2, seed)
        np.testing.assert_array_equal(backend.run(given)["y"], expected(given))
    assert machine.ran == ["eager", "capture", "replay", "replay", "replay"]


def test_shapes_that_take_turns_keep_their_own_graphs(
    machine: Fake, graph: Path, plan: Path
) -> None:
    backend = open_plan(graph, plan, [SMALL, LARGE])
    for seed, batch in enumerate((1, 20, 1, 20, 4, 1, 20)):
        given = feed(batch, seed)
        np.testing.assert_array_equal(backend.run(given)["y"], expected(given))
    assert machine.ran == ["eager"] * 2 + ["capture", "replay"] * 2 + ["eager"] + ["replay"] * 2


def test_the_least_recently_used_shape_goes_first(machine: Fake, graph: Path, plan: Path) -> None:
    backend = open_plan(graph, plan, [SMALL], max_shapes=2)
    for batch in (1, 1, 2, 2, 1, 3):  # 2 was used longest ago when 3 comes
        backend.run(feed(batch))
    assert len(machine.graphs) == 1
    machine.ran.clear()
    backend.run(feed(1))
    backend.run(feed(2))
    assert machine.ran == ["replay", "eager"]


def test_graphs_have_an_off_switch(machine: Fake, graph: Path, plan: Path) -> None:
    backend = open_plan(graph, plan, [SMALL], cuda_graphs=False)
    for _ in range(3):
        backend.run(feed(2))
    assert machine.ran == ["eager"] * 3


def test_what_a_call_returned_outlives_the_next_and_the_backend(
    machine: Fake, graph: Path, plan: Path
) -> None:
    backend = open_plan(graph, plan, [SMALL])
    first = backend.run(feed(2, 0))["y"]
    backend.run(feed(2, 1))
    backend.close()
    np.testing.assert_array_equal(first, expected(feed(2, 0)))


def test_close_gives_everything_back(machine: Fake, graph: Path, plan: Path) -> None:
    backend = open_plan(graph, plan, [SMALL, LARGE])
    for batch in (1, 1, 20, 20):
        backend.run(feed(batch))
    assert machine.memory
    backend.close()
    assert not machine.memory
    assert not machine.handles


def test_a_plan_too_large_for_the_gpu_gives_back_what_it_took(
    machine: Fake, graph: Path, plan: Path
) -> None:
    huge = default_profile(SPEC, (1, 1, 2**27), {})
    with pytest.raises(RuntimeUnavailableError, match=r"allocating 1536\.0 MiB on the GPU.*Memory"):
        open_plan(graph, plan, [huge])
    assert not machine.memory
    assert not machine.handles


def test_memory_is_taken_once_for_the_largest_shapes(
    machine: Fake, graph: Path, plan: Path
) -> None:
    backend = open_plan(graph, plan, [SMALL, LARGE])
    taken = set(machine.memory)
    backend.run(feed(32))
    assert set(machine.memory) == taken
    # x and y: 32 rows of 3 floats, n: 32 int64, each on GPU and host; 64 bytes for activations
    assert sum(map(len, machine.memory.values())) == 2 * (2 * 32 * 3 * 4 + 32 * 8) + 64


def test_the_tightest_profile_that_fits_is_chosen(machine: Fake) -> None:
    from engine.backends.plan import fitting_profile

    profiles = [
        {"x": ((1, 4, 8), (8, 4, 64))},
        {"x": ((1, 4, 8), (2, 4, 64))},
        {"x": ((4, 4, 8), (8, 4, 8))},
    ]
    chosen = [
        fitting_profile({"x": shape}, profiles, Path("unet.plan"))
        for shape in ((1, 4, 8), (2, 4, 64), (3, 4, 64), (4, 4, 8), (8, 4, 9))
    ]
    assert chosen == [1, 1, 0, 2, 0]


def test_no_profile_for_a_shape_says_what_each_allows(
    machine: Fake, graph: Path, plan: Path
) -> None:
    backend = open_plan(graph, plan, [SMALL, LARGE])
    message = (
        r"takes n 1\.\.4, x 1x3\.\.4x3 or n 3\.\.32, x 3x3\.\.32x3, got n 40, x 40x3; build it "
        rf"with wider ranges: vitrine plan {plan.parent.parent}$"
    )
    with pytest.raises(OptionError, match=message):
        backend.run(feed(40))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"x": np.zeros((1, 3), np.float32)}, "input 'n' of 'unet.plan' is missing, got x"),
        ({"x": np.zeros((1, 3)), "n": np.zeros(1, np.int64)}, "'x' must be float32, got float64"),
        ({"x": np.zeros((1, 3), np.float32), "n": np.zeros(2, np.int64)}, "together: x .*, n "),
        ({"x": np.zeros(3, np.float32), "n": np.zeros(1, np.int64)}, "got n 1, x 3;"),
    ],
)
def test_a_wrong_input_is_named_and_the_next_call_is_right(
    machine: Fake, graph: Path, plan: Path, given: dict[str, np.ndarray], message: str
) -> None:
    backend = open_plan(graph, plan, [SMALL])
    with pytest.raises(OptionError, match=message):
        backend.run(given)
    np.testing.assert_array_equal(backend.run(feed(2))["y"], expected(feed(2)))


def test_arrays_need_not_be_contiguous(machine: Fake, graph: Path, plan: Path) -> None:
    given = feed(4)
    given["x"] = np.asfortranarray(given["x"])
    result = open_plan(graph, plan, [SMALL]).run(given)["y"]
    np.testing.assert_array_equal(result, expected(given))


def test_a_plan_that_does_not_load_says_why_in_tensorrts_words(machine: Fake, plan: Path) -> None:
    from engine.backends.tensorrt import TensorRTBackend

    plan.parent.mkdir(parents=True)
    plan.write_bytes(b"not a plan")
    message = r"10\.16\.1\.11 cannot load .*unet\.plan': the magic tag does not match; build it"
    with pytest.raises(ArtifactError, match=message):
        TensorRTBackend(plan, SPEC, BUILT)


def test_a_plan_of_another_machine_is_refused_before_it_loads(machine: Fake, plan: Path) -> None:
    from engine.backends.tensorrt import TensorRTBackend

    target = BUILT.model_copy(update={"gpu": "NVIDIA L4", "compute_capability": "8.9"})
    with pytest.raises(ArtifactError, match=f"NVIDIA L4, sm_89.*plan {plan.parent.parent}$"):
        TensorRTBackend(plan, SPEC, target)


def test_host_code_runs_from_version_compatible_plans_only(
    machine: Fake, graph: Path, plan: Path
) -> None:
    from engine.backends.tensorrt import TensorRTBackend

    target = build_plan(graph, plan, [SMALL])
    portable = target.model_copy(update={"version_compatible": True})
    allowed = [
        TensorRTBackend(plan, SPEC, which)._runtime.engine_host_code_allowed
        for which in (None, target, portable)
    ]
    assert allowed == [False, False, True]


def test_a_plan_that_is_not_its_manifests_is_refused(
    machine: Fake, graph: Path, plan: Path
) -> None:
    from engine.backends.tensorrt import TensorRTBackend

    build_plan(graph, plan, [SMALL])
    x, _ = SPEC.inputs
    spec = NetworkSpec(inputs=(x,), outputs=SPEC.outputs)
    with pytest.raises(
        ArtifactError, match=r"has n input int64, x .* manifest says x input float32, y"
    ):
        TensorRTBackend(plan, spec)


@pytest.mark.parametrize(("asked", "budget"), [(None, 500), (0, 0), (1000, 1000)])
def test_streamed_weights_get_their_budget_before_any_context(
    machine: Fake, plan: Path, asked: int | None, budget: int
) -> None:
    backend = streamed(plan, weight_budget_bytes=asked)
    assert backend._engine.weight_streaming_budget_v2 == budget


def test_a_budget_is_within_the_weights_and_for_plans_that_stream(
    machine: Fake, graph: Path, plan: Path
) -> None:
    with pytest.raises(OptionError, match=r"weight_budget_bytes must be 0\.\.1000, got 1001"):
        streamed(plan, weight_budget_bytes=1001)
    with pytest.raises(OptionError, match="was not built with weight streaming"):
        open_plan(graph, plan, [SMALL], weight_budget_bytes=7)


def streamed(plan: Path, **options: object):
    from engine.backends.tensorrt import TensorRTBackend

    plan.parent.mkdir(parents=True, exist_ok=True)
    plan.write_text(json.dumps({"profiles": [SMALL.shapes], "streamable": 1000}))
    return TensorRTBackend(plan, SPEC, **options)


# With TensorRT and a GPU


def _reason_to_skip() -> str:
    try:
        installed()
    except VitrineError as error:
        return str(error)
    return ""


SKIP = _reason_to_skip()
on_a_gpu = pytest.mark.skipif(bool(SKIP), reason=SKIP)
IMAGE = NetworkSpec(
    inputs=(
        TensorSpec(name="image", dtype="float32", shape=("batch", 3, "height", "width")),
        TensorSpec(name="label", dtype="int64", shape=("batch",)),
    ),
    outputs=(TensorSpec(name="out", dtype="float32", shape=("batch", 8, "height", "width")),),
)
SIZES = {"height": (8, 16, 32), "width": (8, 16, 32)}


@pytest.fixture(scope="module")
def conv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A convolution plus an embedding of the label, as an ONNX graph."""
    return write_conv(tmp_path_factory.mktemp("conv") / "conv.onnx", seed=0)


def write_conv(path: Path, seed: int) -> Path:
    import torch
    from torch import nn

    from export.onnx import export_network

    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)
            self.embedding = nn.Embedding(4, 8)

        def forward(self, image, label):
            return torch.relu(self.conv(image)) + self.embedding(label)[:, :, None, None]

    torch.manual_seed(seed)
    export_network(Conv(), IMAGE, path)
    return path


def picture(batch: int, height: int, width: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "image": random.standard_normal((batch, 3, height, width), np.float32),
        "label": random.integers(0, 4, batch, np.int64),
    }


def in_onnxruntime(graph: Path, given: dict[str, np.ndarray]) -> np.ndarray:
    from engine.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(graph, IMAGE).run(given)["out"]


# 27 products of a 3x3 convolution over 3 channels, summed in another order in fp32: the error is
# under 27 * 2^-24 * sum |w x|, and with |w| <= 1/sqrt(27) and |x| < 6 that sum is under 32.
TOLERANCE = 27 * 2.0**-24 * 32


@pytest.mark.tensorrt
@on_a_gpu
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_a_plan_answers_as_onnxruntime_eager_captured_and_replayed(
    conv: Path, tmp_path: Path, cuda_graphs: bool
) -> None:
    from engine.backends.tensorrt import TensorRTBackend

    small = default_profile(IMAGE, (1, 1, 2), {"height": (8, 8, 8), "width": (8, 8, 8)})
    large = default_profile(IMAGE, (1, 4, 8), SIZES)
    plan = tmp_path / "conv.plan"
    target = build_plan(conv, plan, [small, large])
    backend = TensorRTBackend(plan, IMAGE, target, cuda_graphs=cuda_graphs, max_shapes=2)
    shapes = [(2, 8, 8)] * 3 + [(8, 32, 32)] * 3 + [(3, 16, 24), (2, 8, 8), (8, 32, 32)] * 2
    for seed, shape in enumerate(shapes):
        given = picture(*shape, seed=seed)
        result = backend.run(given)["out"]
        np.testing.assert_allclose(result, in_onnxruntime(conv, given), rtol=0, atol=TOLERANCE)
    with pytest.raises(OptionError, match=r"image 1x3x8x8\.\.2x3x8x8.* or "):
        backend.run(picture(9, 8, 8))
    backend.close()


@pytest.mark.tensorrt
@on_a_gpu
def test_a_stripped_plan_gets_its_weights_back(conv: Path, tmp_path: Path) -> None:
    from engine.backends.tensorrt import TensorRTBackend

    plan, whole = tmp_path / "stripped.plan", tmp_path / "whole.plan"
    profile = default_profile(IMAGE, (1, 4, 8), SIZES)
    build_plan(conv, plan, [profile], PlanOptions(strip_plan=True))
    refit_plan(plan, conv, whole)
    given = picture(4, 16, 16)
    result = TensorRTBackend(whole, IMAGE).run(given)["out"]
    np.testing.assert_allclose(result, in_onnxruntime(conv, given), rtol=0, atol=TOLERANCE)


@pytest.mark.tensorrt
@on_a_gpu
def test_a_refitted_plan_has_the_other_graphs_weights(conv: Path, tmp_path: Path) -> None:
    from engine.backends.tensorrt import TensorRTBackend

    other = write_conv(tmp_path / "other.onnx", seed=1)
    plan = tmp_path / "conv.plan"
    profile = default_profile(IMAGE, (1, 4, 8), SIZES)
    build_plan(conv, plan, [profile], PlanOptions(refit=True))
    refit_plan(plan, other, plan)
    given = picture(4, 16, 16)
    result = TensorRTBackend(plan, IMAGE).run(given)["out"]
    np.testing.assert_allclose(result, in_onnxruntime(other, given), rtol=0, atol=TOLERANCE)


@pytest.mark.tensorrt
@on_a_gpu
@pytest.mark.parametrize(
    "options",
    [
        PlanOptions(version_compatible=True),
        PlanOptions(hardware_compatibility="same_compute_capability"),
        PlanOptions(weight_streaming=True),
    ],
)
def test_plans_that_move_or_stream_answer_the_same(
    conv: Path, tmp_path: Path, options: PlanOptions
) -> None:
    from engine.backends.tensorrt import TensorRTBackend

    plan = tmp_path / "conv.plan"
    target = build_plan(conv, plan, [default_profile(IMAGE, (1, 4, 8), SIZES)], options)
    given = picture(4, 16, 16)
    result = TensorRTBackend(plan, IMAGE, target).run(given)["out"]
    np.testing.assert_allclose(result, in_onnxruntime(conv, given), rtol=0, atol=TOLERANCE)


@pytest.mark.tensorrt
@on_a_gpu
def test_a_real_failure_brings_tensorrts_own_words(tmp_path: Path) -> None:
    graph, plan = tmp_path / "bad.onnx", tmp_path / "bad.plan"
    graph.write_bytes(b"not a graph")
    with pytest.raises(ArtifactError, match=r"(?i)parse"):
        build_plan(graph, plan, [SMALL])
    assert not plan.exists()

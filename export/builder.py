"""TensorRT's builder, driven: parse, configure, build, in this order and from one function."""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from engine.errors import ArtifactError, OptionError, RuntimeUnavailableError
from export.profile import Profile, Shape, shape_text
from export.timing_cache import load_cache, save_cache, write_whole

if TYPE_CHECKING:
    import tensorrt as trt

    from engine.backends.plan import Log
    from export.plan import PlanOptions

Progress = Callable[[str, int, int], None]  # phase, steps done, steps


def build(
    graph: Path,
    plan: Path,
    profiles: Sequence[Profile],
    options: "PlanOptions",
    progress: Progress | None,
    timings: Path,
) -> None:
    """Build and write a plan, and then the timings. Raises as `export.plan.build_plan`."""
    import tensorrt as trt

    from engine.backends.plan import Log

    log = Log()

    try:
        builder = trt.Builder(log)
    except TypeError:  # what the bindings make of a null pointer
        raise RuntimeUnavailableError(f"TensorRT does not start: {log.take()}") from None
    # TensorRT 11 has no other networks; before, this is what makes precision the graph's.
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log)  # owns the weights: it must live until they are built
    if not parser.parse_from_file(str(graph)):
        raise ArtifactError(f"TensorRT cannot read '{graph}': {parser_errors(parser, log)}")
    config = configure(builder, options)
    for profile in profiles:
        add_profile(builder, network, config, profile, log)
    cache = load_cache(config, timings)
    report = Report(progress)
    config.progress_monitor = monitor = progress_monitor(report)
    with interruptible(report):
        built = builder.build_serialized_network(network, config)
    del cache, monitor, parser  # TensorRT holds no reference of its own
    if report.error is not None:
        raise report.error
    if built is None:
        raise ArtifactError(f"TensorRT cannot build '{graph}': {log.take()}")
    write_plan(plan, built)
    save_cache(config, timings)


def refit(plan: Path, graph: Path, out: Path) -> None:
    """Load a plan, put a graph's weights in, write it. Raises as `export.plan.refit_plan`."""
    import tensorrt as trt

    from engine.backends.plan import Log, deserialize

    log = Log()
    _runtime, engine = deserialize(plan, log)
    if not engine.refittable:
        raise ArtifactError(f"'{plan}' was built without refit and strip_plan; build it with one")
    refitter = trt.Refitter(engine, log)
    parser = trt.OnnxParserRefitter(refitter, log)  # owns the weights: see build()
    if not parser.refit_from_file(str(graph)):
        raise ArtifactError(
            f"'{graph}' does not fit the plan '{plan}': {parser_errors(parser, log)}"
        )
    if missing := refitter.get_missing_weights():
        raise ArtifactError(f"'{graph}' lacks {', '.join(missing)}, which '{plan}' needs")
    if not refitter.refit_cuda_engine():
        raise ArtifactError(f"TensorRT cannot refit '{plan}': {log.take()}")
    del parser  # see build()
    config = engine.create_serialization_config()
    config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
    refitted = engine.serialize_with_config(config)
    if refitted is None:
        raise ArtifactError(f"TensorRT cannot serialize '{plan}' refitted: {log.take()}")
    write_plan(out, refitted)


def write_plan(path: Path, plan: "trt.IHostMemory") -> None:
    """Write a plan whole or not at all. Raises ArtifactError."""
    try:
        write_whole(path, memoryview(plan))
    except OSError as error:
        raise ArtifactError(f"cannot write the plan '{path}': {error.strerror}") from None


def configure(builder: "trt.Builder", options: "PlanOptions") -> "trt.IBuilderConfig":
    """The options in TensorRT's words."""
    import tensorrt as trt

    levels = {
        "none": trt.HardwareCompatibilityLevel.NONE,
        "ampere_plus": trt.HardwareCompatibilityLevel.AMPERE_PLUS,
        "same_compute_capability": trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY,
    }
    flags = {
        trt.BuilderFlag.TF32: options.tf32,  # on where nobody says
        trt.BuilderFlag.REFIT: options.refit,
        trt.BuilderFlag.STRIP_PLAN: options.strip_plan,
        # The weights that come back are the same ones, unless refit asks for more.
        trt.BuilderFlag.REFIT_IDENTICAL: options.strip_plan and not options.refit,
        trt.BuilderFlag.WEIGHT_STREAMING: options.weight_streaming,
        trt.BuilderFlag.VERSION_COMPATIBLE: options.version_compatible,
    }
    config = builder.create_builder_config()
    config.builder_optimization_level = options.optimization_level
    config.hardware_compatibility_level = levels[options.hardware_compatibility]
    for flag, wanted in flags.items():
        if wanted:
            config.set_flag(flag)
        else:
            config.clear_flag(flag)
    if options.workspace_gib is not None:
        nbytes = int(options.workspace_gib * 2**30)
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, nbytes)
    return config


def add_profile(
    builder: "trt.Builder",
    network: "trt.INetworkDefinition",
    config: "trt.IBuilderConfig",
    profile: Profile,
    log: "Log",
) -> None:
    """One optimisation profile. Raises OptionError where it does not suit the graph's inputs."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    shapes = {tensor.name: tuple(tensor.shape) for tensor in inputs}
    if profile.shapes.keys() != shapes.keys():
        raise OptionError(
            f"a profile must name the inputs {', '.join(sorted(shapes))}, got "
            f"{', '.join(sorted(profile.shapes))}"
        )
    ranges = builder.create_optimization_profile()
    for name, bounds in profile.shapes.items():
        if not all(_fits(shapes[name], bound) for bound in bounds):
            raise OptionError(
                f"input '{name}' is {shape_text(shapes[name])} in the graph, where -1 is any size, "
                f"got a profile of {', '.join(shape_text(bound) for bound in bounds)}"
            )
        ranges.set_shape(name, *bounds)
    if config.add_optimization_profile(ranges) < 0:
        raise OptionError(f"TensorRT refuses the profile {profile.shapes}: {log.take()}")


def _fits(declared: Shape, shape: Shape) -> bool:
    pairs = zip(declared, shape, strict=False)
    return len(declared) == len(shape) and all(size in (-1, given) for size, given in pairs)


class Report:
    """Hands progress on, and keeps what that raised: the bindings print it and go on."""

    def __init__(self, progress: Progress | None) -> None:
        self.error: BaseException | None = None
        self._progress = progress
        self._steps: dict[str, int] = {}

    def start(self, phase: str, steps: int) -> None:
        self._steps[phase] = steps
        self.step(phase, 0)

    def finish(self, phase: str) -> None:
        self.step(phase, self._steps[phase])

    def step(self, phase: str, done: int) -> bool:
        """Whether the build shall go on."""
        if self._progress is not None and self.error is None:
            try:
                self._progress(phase, done, self._steps[phase])
            except BaseException as error:  # build() raises it again
                self.error = error
        return self.error is None


@contextmanager
def interruptible(report: Report) -> Iterator[None]:
    """Let Ctrl-C end the build at its next step; raised within a callback it would be lost."""
    if threading.current_thread() is not threading.main_thread():
        yield  # which gets no signals
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        report.error = KeyboardInterrupt()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def progress_monitor(report: Report) -> "trt.IProgressMonitor":
    """TensorRT's callbacks, ending in a report."""
    import tensorrt as trt

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            report.start(phase_name, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            report.finish(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return report.step(phase_name, step + 1)

    return Monitor()


def parser_errors(parser: "trt.OnnxParser | trt.OnnxParserRefitter", log: "Log") -> str:
    """What the ONNX parser says, with the node; else what it logged."""
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    texts = [
        f"{error.node_operator()} '{error.node_name()}': {error.desc()}"
        if error.node_operator()
        else error.desc()
        for error in errors
    ]
    return " | ".join(texts) or log.take()

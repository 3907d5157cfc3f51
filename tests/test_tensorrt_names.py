"""Every name of TensorRT and CUDA that our code uses is in every version that we support.

How the check is whole: mypy, in `make lint`, reads `tests/tensorrt_stub` in place of the two
packages, so our code can use only what is declared there; the tests here compare each declaration
with NVIDIA's bindings, which import without a GPU against an empty stub of TensorRT's libraries.
"""

import ast
import ctypes
import inspect
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from cuda.bindings import runtime as cudart
from tensorrt_stub import fake_cudart, fake_tensorrt
from tensorrt_stub.declared import Name, declared, missing

ROOT = Path(__file__).parent.parent
STUBS = ROOT / "tests" / "tensorrt_stub"
TENSORRT = declared(STUBS / "tensorrt" / "__init__.pyi")
CUDA = declared(STUBS / "cuda" / "bindings" / "runtime.pyi")
PACKAGES = ("engine", "export", "serving", "benchmarks")


@pytest.fixture(scope="session", params=["10", "11"])
def bindings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tensorrt_bindings` of a major version, and `libs` for it to link with."""
    wheels = sorted((Path(sys.prefix) / "tensorrt").glob(f"{request.param}.*"))
    if not wheels:
        pytest.skip(f"no TensorRT {request.param} bindings in {sys.prefix}/tensorrt; make test")
    if not shutil.which("gcc"):
        pytest.skip("gcc, which makes the empty TensorRT library, is not installed")
    folder = tmp_path_factory.mktemp(f"tensorrt-{request.param}")
    (folder / "tensorrt_bindings").symlink_to(wheels[-1] / "tensorrt_bindings")
    (folder / "tensorrt.py").write_text(
        "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"
    )
    build_empty_libraries(wheels[-1] / "tensorrt_bindings" / "tensorrt.so", folder / "libs")
    return folder


def build_empty_libraries(module: Path, folder: Path) -> None:
    """Libraries with the names that a module needs, whose functions all return a null pointer."""
    dynamic = run("readelf", "--dynamic", "--wide", str(module))
    needed = [line.split("[")[1].split("]")[0] for line in dynamic.splitlines() if "NEEDED" in line]
    undefined = run("nm", "--dynamic", "--undefined-only", str(module)).splitlines()
    symbols = [line.split()[-1] for line in undefined if line.split()[0] == "U"]
    here = ctypes.CDLL(None)  # what Python and the C library bring
    absent = [symbol for symbol in symbols if "@" not in symbol and not hasattr(here, symbol)]
    folder.mkdir()
    source = folder / "empty.c"
    source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in absent))
    for library in (name for name in needed if name.startswith("libnv")):
        flags = ["-shared", "-fPIC", f"-Wl,-soname,{library}"]
        run("gcc", *flags, "-o", str(folder / library), str(source))


def run(*command: str, given: str = "", folder: Path | None = None) -> str:
    """What a command prints; with `folder`, where TensorRT's bindings are those in it."""
    environment = dict(os.environ)
    if folder is not None:
        environment["PYTHONPATH"] = os.pathsep.join((str(folder), str(ROOT)))
        environment["LD_LIBRARY_PATH"] = str(folder / "libs")
    done = subprocess.run(command, input=given, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def missing_in(bindings: Path, names: list[Name]) -> list[str]:
    probe = str(STUBS / "declared.py")
    answer = run(sys.executable, probe, "tensorrt", given=json.dumps(names), folder=bindings)
    return json.loads(answer)


# What is declared exists


def test_every_declared_name_is_in_tensorrt(bindings: Path) -> None:
    assert len(TENSORRT) > 100
    assert missing_in(bindings, TENSORRT) == []


def test_every_declared_name_is_in_cuda() -> None:
    assert len(CUDA) > 30
    assert missing(cudart, CUDA) == []


def test_a_name_gone_in_11_is_reported_for_11(bindings: Path) -> None:
    gone = [
        Name("BuilderFlag.FP16", "value"),
        Name("IInt8EntropyCalibrator2", "class"),
        Name("IBuilderConfig.int8_calibrator", "settable"),
        Name("ICudaEngine.device_memory_size", "property"),
        Name("OnnxParser.supports_model", "call", ["model"]),
    ]
    expected = [f"{name.path} is missing" for name in gone]
    assert missing_in(bindings, gone) == (expected if "tensorrt-11" in bindings.name else [])


def test_a_name_in_another_form_is_reported(bindings: Path) -> None:
    wrong = [
        Name("IBuilderConfig.set_flag", "call", ["flags"]),  # is `flag`
        Name("IBuilderConfig.set_timing_cache", "call", ["cache"]),  # needs `ignore_mismatch`
        Name("ICudaEngine.num_io_tensors", "settable"),
        Name("ParserError.desc", "property"),
    ]
    found = missing_in(bindings, wrong)
    assert [problem.partition(":")[0] for problem in found] == [
        "IBuilderConfig.set_flag does not take (flags)",
        "IBuilderConfig.set_timing_cache does not take (cache)",
        "ICudaEngine.num_io_tensors cannot be set",
        "ParserError.desc is a method",
    ]
    assert missing(cudart, [Name("cudaMalloc", "call", ["size", "flags"])])
    assert missing(cudart, [Name("cudaMemcpyKind.cudaMemcpySideways", "value")])


# What is used is declared


def users() -> list[Path]:
    """Our files that import TensorRT or CUDA, or what holds their objects."""
    wrappers = ("engine.backends.plan", "engine.backends.tensorrt", "engine.backends.cuda")
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return [path for path in files if imported(path) & {"tensorrt", "cuda", *wrappers}]


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names | {name.partition(".")[0] for name in names}


def test_mypy_reads_the_declarations_in_place_of_the_packages() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["mypy"]
    assert config["strict"] is True
    assert config["mypy_path"] == STUBS.relative_to(ROOT).as_posix()
    relaxed = {name for override in config["overrides"] for name in override["module"]}
    assert not [name for name in relaxed if name.startswith(("tensorrt", "cuda"))]


def test_nothing_hides_a_call_from_mypy() -> None:
    files = users()
    assert {"cuda.py", "plan.py", "tensorrt.py", "builder.py"} <= {path.name for path in files}
    for path in files:
        text = path.read_text("utf-8")
        names = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
        dodges = {"Any", "cast", "getattr", "setattr", "hasattr", "vars", "eval", "__import__"}
        assert not names & dodges, path
        assert not imported(path) & {"importlib", "operator"}, path
        assert "type: ignore" not in text, path


def test_a_call_that_is_not_declared_does_not_pass_mypy(tmp_path: Path) -> None:
    sample = tmp_path / "sample.py"
    sample.write_text(
        "import tensorrt as trt\n"
        "from cuda.bindings import runtime as cudart\n"
        "def build(config: trt.IBuilderConfig, engine: trt.ICudaEngine) -> None:\n"
        "    config.set_flag(trt.BuilderFlag.TF32)\n"
        "    config.set_flag(trt.BuilderFlag.FP16)\n"
        "    config.int8_calibrator = None\n"
        "    print(engine.device_memory_size, engine.device_memory_size_v2)\n"
        "    trt.init_libnvinfer_plugins(None, '')\n"
        "    status, address = cudart.cudaMallocManaged(1)\n"
    )
    command = (sys.executable, "-m", "mypy", "--strict", "--config-file=", "--no-error-summary")
    cache = f"--cache-dir={tmp_path / 'cache'}"
    environment = {**os.environ, "MYPYPATH": str(STUBS)}
    done = subprocess.run(
        (*command, cache, str(sample)), capture_output=True, text=True, env=environment
    )
    lines = [line for line in done.stdout.splitlines() if "attr-defined" in line]
    assert [int(line.split(":")[1]) for line in lines] == [5, 6, 7, 8, 9]
    assert all(f'has no attribute "{name}"' in line for name, line in zip(GONE, lines, strict=True))


GONE = (
    "FP16", "int8_calibrator", "device_memory_size", "init_libnvinfer_plugins", "cudaMallocManaged",
)  # fmt: skip


@pytest.mark.parametrize(
    ("fake", "names"), [(fake_tensorrt, TENSORRT), (fake_cudart.Fake, CUDA)], ids=["trt", "cuda"]
)
def test_the_fakes_have_declared_names_only(fake: ModuleType | type, names: list[Name]) -> None:
    calls = {name.path: name.arguments for name in names if name.kind == "call"}
    found = list(functions(fake))
    assert len(found) > 15
    for path, function in found:
        arguments = [name for name in inspect.signature(function).parameters if name != "self"]
        assert calls.get(path) == arguments, path


def functions(owner: ModuleType | type, prefix: str = "") -> list[tuple[str, object]]:
    """Public functions of a fake, and those of its classes that stand for TensorRT's."""
    found = []
    for name, value in vars(owner).items():
        private = name.startswith("_") or name in ("enqueue", "view")
        if inspect.isfunction(value) and not private:
            found.append((prefix + name, value))
        if inspect.isclass(value) and value.__module__ == fake_tensorrt.__name__:
            found += functions(value, f"{prefix}{name}.")
    return found


# What is declared behaves as our code believes, as far as the bindings go without a GPU

ON_THE_BINDINGS = """
import tensorrt as trt
from engine.backends.plan import DTYPES, Log, tensorrt_version
from engine.errors import RuntimeUnavailableError
from export.builder import Report, build, configure, progress_monitor
from export.plan import PlanOptions

assert "float32 float16 int64 int32 uint8 bool".split() == list(DTYPES.values())
assert tensorrt_version() == trt.__version__

log = Log()
for severity in ("WARNING", "ERROR", "INTERNAL_ERROR"):
    log.log(getattr(trt.ILogger.Severity, severity), severity)
assert log.take() == "ERROR | INTERNAL_ERROR", "errors only"
assert log.take() == "TensorRT gave no reason", "once"

seen = []
report = Report(lambda *step: seen.append(step))
monitor = progress_monitor(report)
assert isinstance(monitor, trt.IProgressMonitor)
monitor.phase_start("Building", None, 2)
assert monitor.step_complete("Building", 0)
monitor.phase_finish("Building")
assert seen == [("Building", 0, 2), ("Building", 1, 2), ("Building", 2, 2)]
assert 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) > 0

class Builder:
    def create_builder_config(self):
        self.flags, self.off = set(), set()
        self.set_flag, self.clear_flag = self.flags.add, self.off.add
        return self

config = configure(Builder(), PlanOptions(strip_plan=True, hardware_compatibility="ampere_plus"))
assert config.flags == {trt.BuilderFlag.STRIP_PLAN, trt.BuilderFlag.REFIT_IDENTICAL}
assert trt.BuilderFlag.TF32 in config.off
assert config.hardware_compatibility_level == trt.HardwareCompatibilityLevel.AMPERE_PLUS

from pathlib import Path
try:
    build(Path("graph.onnx"), Path("graph.plan"), [], PlanOptions(), None, Path("timings"))
except RuntimeUnavailableError as error:
    assert "TensorRT does not start" in str(error)
else:
    raise AssertionError("a library of null pointers built a plan")
import engine.backends.tensorrt
print("done")
"""


def test_our_classes_stand_on_the_real_bindings(bindings: Path) -> None:
    assert run(sys.executable, "-c", ON_THE_BINDINGS, folder=bindings).endswith("done\n")

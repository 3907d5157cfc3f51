# ruff: noqa: A002  (the names are NVIDIA's)
"""A TensorRT that knows one network: `y [batch, 3] = 2 x [batch, 3] + n [batch]`.

Plans are JSON. It keeps the rules that Vitrine must keep (shapes before addresses, memory that is
there, one set of shapes a context once a graph holds it) and refuses where TensorRT would.
Its names and arguments are those of TensorRT (test_tensorrt_names.py compares them).
"""

import ctypes
import json
from enum import Enum
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tensorrt_stub.fake_cudart import Fake

DataType = Enum("DataType", "FLOAT HALF INT64 INT32 UINT8 BOOL")
TensorIOMode = Enum("TensorIOMode", "INPUT OUTPUT")
TensorLocation = Enum("TensorLocation", "DEVICE HOST")
BuilderFlag = Enum(
    "BuilderFlag", "REFIT REFIT_IDENTICAL STRIP_PLAN VERSION_COMPATIBLE WEIGHT_STREAMING TF32"
)
HardwareCompatibilityLevel = Enum(
    "HardwareCompatibilityLevel", "NONE AMPERE_PLUS SAME_COMPUTE_CAPABILITY"
)
MemoryPoolType = Enum("MemoryPoolType", "WORKSPACE")
ExecutionContextAllocationStrategy = Enum("ExecutionContextAllocationStrategy", "USER_MANAGED")
SerializationFlag = Enum("SerializationFlag", "EXCLUDE_WEIGHTS INCLUDE_REFIT")


class NetworkDefinitionCreationFlag(Enum):
    STRONGLY_TYPED = 0

    def __int__(self):
        return self.value


INPUTS = {"x": (-1, 3), "n": (-1,)}
TYPES = {"x": DataType.FLOAT, "n": DataType.INT64, "y": DataType.FLOAT}


class ILogger:
    Severity = Enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")


class IProgressMonitor:
    pass


class ITimingCache:
    def __init__(self, timings):
        self.timings = timings

    def serialize(self):
        return self.timings


class IOptimizationProfile:
    def __init__(self):
        self.shapes = {}

    def set_shape(self, input, min, opt, max):
        self.shapes[input] = (min, opt, max)


class IBuilderConfig:
    def __init__(self):
        self.flags = {BuilderFlag.TF32}
        self.pools = {}
        self.profiles = []
        self.cache = None

    def set_flag(self, flag):
        self.flags.add(flag)

    def clear_flag(self, flag):
        self.flags.discard(flag)

    def set_memory_pool_limit(self, pool, pool_size):
        self.pools[pool] = pool_size

    def add_optimization_profile(self, profile):
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache):
        known = serialized_timing_cache in (b"",) or serialized_timing_cache[:7] == b"timings"
        return ITimingCache(serialized_timing_cache) if known else None

    def set_timing_cache(self, cache, ignore_mismatch):
        if cache.timings == b"timings of another GPU":
            return False
        self.cache = cache
        return True

    def get_timing_cache(self):
        return self.cache


class INetworkDefinition:
    num_inputs = len(INPUTS)

    def get_input(self, index):
        name = list(INPUTS)[index]
        return SimpleNamespace(name=name, shape=INPUTS[name])


class Builder:
    configs: list[IBuilderConfig] = []  # noqa: RUF012 (the tests look into it and empty it)

    def __init__(self, logger):
        self.logger = logger

    def create_network(self, flags=0):
        return INetworkDefinition()

    def create_builder_config(self):
        self.configs.append(IBuilderConfig())
        return self.configs[-1]

    def create_optimization_profile(self):
        return IOptimizationProfile()

    def build_serialized_network(self, network, config):
        monitor = config.progress_monitor
        monitor.phase_start("Building", None, 2)
        for step in range(2):
            if not monitor.step_complete("Building", step):
                return None
        monitor.phase_finish("Building")
        if not config.profiles:
            self.logger.log(ILogger.Severity.ERROR, "no optimization profile has been defined")
            return None
        config.cache.timings = b"timings" + config.cache.timings[7:] + b"+"
        refit = {BuilderFlag.REFIT, BuilderFlag.REFIT_IDENTICAL} & config.flags
        shapes = [profile.shapes for profile in config.profiles]
        plan = {"profiles": shapes, "refittable": bool(refit)}
        return json.dumps(plan).encode()


class OnnxParser:
    num_errors = 1

    def __init__(self, network, logger):
        self.model = ""

    def get_error(self, index):
        return SimpleNamespace(
            desc=lambda: "unsupported", node_name=lambda: "node_7", node_operator=lambda: "Unique"
        )

    def parse_from_file(self, model):
        return Path(model).read_bytes() == b"a good graph"


class Runtime:
    def __init__(self, logger):
        self.logger = logger

    def deserialize_cuda_engine(self, serialized_engine):
        try:
            plan = json.loads(serialized_engine)
        except ValueError:
            self.logger.log(ILogger.Severity.WARNING, "a warning")
            self.logger.log(ILogger.Severity.ERROR, "the magic tag does not match")
            return None
        return ICudaEngine(plan)


class ICudaEngine:
    num_io_tensors = 3
    device_memory_size_v2 = 64
    cudart: Fake

    def __init__(self, plan):
        self.profiles = plan["profiles"]
        self.num_optimization_profiles = len(self.profiles)
        self.streamable_weights_size = plan.get("streamable", 0)
        self.refittable = plan.get("refittable", False)
        self.weights = plan.get("weights", "those of the build")
        self.contexts = 0
        self._budget = 0

    @property
    def weight_streaming_budget_v2(self):
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget):
        assert self.contexts == 0, "the budget is set before any context"
        self._budget = budget

    def get_weight_streaming_automatic_budget(self):
        return self.streamable_weights_size // 2

    def get_tensor_name(self, index):
        return list(TYPES)[index]

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name in INPUTS else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return TYPES[name]

    def get_tensor_location(self, name):
        return TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name, profile_index):
        return self.profiles[profile_index][name]

    def create_serialization_config(self):
        return ISerializationConfig()

    def serialize_with_config(self, arg0, /):
        kept = SerializationFlag.INCLUDE_REFIT in arg0.flags
        plan = {"profiles": self.profiles, "refittable": kept, "weights": self.weights}
        return json.dumps(plan).encode()

    def create_execution_context(self, strategy):
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        self.contexts += 1
        return IExecutionContext(self)


class ISerializationConfig:
    def __init__(self):
        self.flags = {SerializationFlag.EXCLUDE_WEIGHTS}

    def set_flag(self, flag):
        self.flags.add(flag)
        return True

    def clear_flag(self, flag):
        self.flags.discard(flag)
        return True


class Refitter:
    def __init__(self, engine, logger):
        self.engine = engine
        self.given = None

    def get_missing_weights(self):
        return ["conv.bias"] if self.given == "weights without a bias" else []

    def refit_cuda_engine(self):
        self.engine.weights = self.given
        return True


class OnnxParserRefitter(OnnxParser):
    def __init__(self, refitter, logger):
        self.refitter = refitter

    def refit_from_file(self, model):
        self.refitter.given = Path(model).read_text()
        return self.refitter.given.startswith("weights")


class IExecutionContext:
    def __init__(self, engine):
        self.engine = engine
        self.profile = None
        self.shapes = {}
        self.addresses = {}
        self.memory = 0
        self.runs = 0

    def set_optimization_profile_async(self, profile_index, stream_handle):
        self.profile = self.engine.profiles[profile_index]
        return True

    def set_input_shape(self, name, shape):
        assert self.runs == 0, "a context that ran stays as it is"
        low, _, high = self.profile[name]
        if not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            return False
        self.shapes[name] = shape
        return True

    def infer_shapes(self):
        if {"x", "n"} <= self.shapes.keys() and self.shapes["x"][0] != self.shapes["n"][0]:
            raise RuntimeError("batches differ")
        return [name for name in INPUTS if name not in self.shapes]

    def get_tensor_shape(self, name):
        return self.shapes["x"] if name == "y" else self.shapes[name]

    def get_max_output_size(self, name):
        return int(np.prod(self.profile["x"][2])) * 4

    def set_tensor_address(self, name, memory):
        self.addresses[name] = memory
        return True

    def set_device_memory(self, memory, size):
        self.memory = self.engine.cudart.view(memory, self.engine.device_memory_size_v2)

    def execute_async_v3(self, stream_handle):
        if self.addresses.keys() != TYPES.keys() or not self.memory:
            return False
        self.runs += 1
        shapes, addresses = dict(self.shapes), dict(self.addresses)

        def kernel() -> None:
            x = self._array(addresses["x"], shapes["x"], np.float32)
            n = self._array(addresses["n"], shapes["n"], np.int64)
            self._array(addresses["y"], shapes["x"], np.float32)[:] = 2 * x + n[:, None]

        self.engine.cudart.enqueue(kernel)
        return True

    def _array(self, address, shape, dtype):
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        assert self.engine.cudart.view(address, nbytes), "memory that is not there"
        buffer = (ctypes.c_byte * nbytes).from_address(address)
        return np.frombuffer(buffer, dtype).reshape(shape)


__version__ = "10.16.1.11"

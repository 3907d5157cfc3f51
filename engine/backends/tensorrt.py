"""A network on TensorRT: a plan, its device memory, and a CUDA graph for every input shape."""

from collections import OrderedDict
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine.backends import cuda
from engine.backends.plan import (
    Log,
    Shape,
    check_tensors,
    deserialize,
    fitting_profile,
    profile_ranges,
    set_weight_budget,
    tensorrt_version,
)
from engine.backends.spec import Array
from engine.backends.target import PlanTarget, check_device
from engine.errors import ArtifactError, OptionError, RuntimeUnavailableError
from engine.manifest import NetworkSpec, TensorSpec

if TYPE_CHECKING:
    import tensorrt as trt


class TensorRTBackend:
    """A plan on one GPU.

    Memory is taken once, for the largest shapes of all profiles; contexts share it, since they
    run one after another on one stream.
    """

    def __init__(
        self,
        path: Path,
        spec: NetworkSpec,
        target: PlanTarget | None = None,
        *,
        cuda_graphs: bool = True,
        max_shapes: int = 16,
        weight_budget_bytes: int | None = None,
        device: int = 0,
    ) -> None:
        """Load a plan; `target` is what its manifest says of it.

        `max_shapes`: input shapes whose contexts and graphs are kept, least recently used out.
        `weight_budget_bytes`: for a plan built with weight streaming; default: TensorRT's choice.
        Raises RuntimeUnavailableError without TensorRT or a GPU, ArtifactError for a plan that
        does not load here.
        """
        if max_shapes < 1:
            raise OptionError(f"max_shapes must be at least 1, got {max_shapes}")
        here = cuda.open_device(device)
        if target is not None:
            check_device(target, here, tensorrt_version(), path.parent.parent)
        self._path = path
        self._spec = spec
        self._cuda_graphs = cuda_graphs
        self._max_shapes = max_shapes
        self._calls: OrderedDict[tuple[Shape, ...], _Call] = OrderedDict()
        self._log = Log()
        self._runtime, self._engine = deserialize(
            path, self._log, target is not None and target.version_compatible
        )
        check_tensors(self._engine, spec, path)
        set_weight_budget(self._engine, weight_budget_bytes, path)
        self._profiles = profile_ranges(self._engine, [t.name for t in spec.inputs])
        with ExitStack() as resources:
            self._stream = cuda.Stream()
            resources.callback(self._stream.close)
            self._scratch = cuda.DeviceMemory(self._engine.device_memory_size_v2)
            resources.callback(self._scratch.close)
            self._memory: dict[str, cuda.StagedMemory] = {}
            for name, nbytes in self._largest_sizes().items():
                self._memory[name] = cuda.StagedMemory(nbytes)
                resources.callback(self._memory[name].close)
            self._resources = resources.pop_all()

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._spec.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._spec.outputs

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """One call: the first at a shape is eager, the second is captured, the rest replay it.

        Raises OptionError for an input of another dtype or of a shape that no profile takes.
        """
        arrays = {tensor.name: self._array(feed, tensor) for tensor in self._spec.inputs}
        call = self._call({name: array.shape for name, array in arrays.items()})
        for name, array in arrays.items():
            self._memory[name].upload(array, self._stream)
        call.launch(self._stream, self._cuda_graphs)
        for tensor in self._spec.outputs:
            nbytes = cuda.byte_size(call.outputs[tensor.name], tensor.dtype)
            self._memory[tensor.name].download(nbytes, self._stream)
        self._stream.synchronize()
        return {
            tensor.name: self._memory[tensor.name].array(call.outputs[tensor.name], tensor.dtype)
            for tensor in self._spec.outputs
        }

    def close(self) -> None:
        while self._calls:
            self._calls.popitem()[1].close()
        self._resources.close()
        del self._engine, self._runtime  # an engine goes before its runtime

    def _array(self, feed: Mapping[str, Array], tensor: TensorSpec) -> Array:
        if tensor.name not in feed:
            raise OptionError(
                f"input '{tensor.name}' of '{self._path.name}' is missing, got {', '.join(feed)}"
            )
        array = feed[tensor.name]
        if array.dtype != tensor.dtype:
            raise OptionError(f"input '{tensor.name}' must be {tensor.dtype}, got {array.dtype}")
        return np.ascontiguousarray(array).reshape(array.shape)  # a scalar stays one

    def _call(self, shapes: Mapping[str, Shape]) -> "_Call":
        """The context for these input shapes, kept or made."""
        key = tuple(shapes.values())
        if key in self._calls:
            self._calls.move_to_end(key)
            return self._calls[key]
        profile = fitting_profile(shapes, self._profiles, self._path)
        context = self._context(profile, shapes)
        if len(self._calls) == self._max_shapes:
            self._calls.popitem(last=False)[1].close()
        outputs = {
            tensor.name: tuple(context.get_tensor_shape(tensor.name))
            for tensor in self._spec.outputs
        }
        for name, memory in self._memory.items():
            self._done(context.set_tensor_address(name, memory.device.address), f"binding {name}")
        context.set_device_memory(self._scratch.address, self._scratch.nbytes)
        self._calls[key] = _Call(context, outputs, self._path, self._log)
        return self._calls[key]

    def _context(self, profile: int, shapes: Mapping[str, Shape]) -> "trt.IExecutionContext":
        """A context at one profile and one set of input shapes, without memory yet."""
        import tensorrt as trt

        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy)
        if context is None:
            raise RuntimeUnavailableError(
                f"TensorRT cannot make a context for '{self._path}': {self._log.take()}"
            )
        switched = context.set_optimization_profile_async(profile, int(self._stream.handle))
        self._done(switched, f"choosing profile {profile}")
        self._stream.synchronize()
        for name, shape in shapes.items():
            self._done(context.set_input_shape(name, shape), f"setting {name} to {shape}")
        try:
            unknown = context.infer_shapes()
        except RuntimeError:
            given = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise OptionError(
                f"'{self._path}' takes no inputs of these shapes together: {given}: "
                f"{self._log.take()}"
            ) from None
        self._done(not unknown, f"working out shapes, which lacks {', '.join(unknown)}")
        return context

    def _largest_sizes(self) -> dict[str, int]:
        """Bytes that every input and output can take in any profile."""
        sizes: dict[str, int] = {}
        for index, ranges in enumerate(self._profiles):
            shapes = {name: largest for name, (_, largest) in ranges.items()}
            context = self._context(index, shapes)
            found = {t.name: cuda.byte_size(shapes[t.name], t.dtype) for t in self._spec.inputs}
            for tensor in self._spec.outputs:
                nbytes = context.get_max_output_size(tensor.name)
                self._done(nbytes >= 0, f"bounding the size of {tensor.name}")
                found[tensor.name] = nbytes
            sizes = {name: max(size, sizes.get(name, 0)) for name, size in found.items()}
        return sizes

    def _done(self, succeeded: bool, what: str) -> None:
        if not succeeded:
            raise ArtifactError(f"TensorRT failed at {what} ('{self._path}'): {self._log.take()}")


class _Call:
    """A context that stays at one set of input shapes, and the graph captured from it.

    One context a graph, since a graph stays valid only while its context is left as it was
    (TensorRT documentation, CUDA Graphs).
    """

    def __init__(
        self, context: "trt.IExecutionContext", outputs: dict[str, Shape], path: Path, log: Log
    ) -> None:
        self.outputs = outputs
        self._context = context
        self._path = path
        self._log = log
        self._warm = False
        self._graph: cuda.Graph | None = None

    def launch(self, stream: cuda.Stream, cuda_graphs: bool) -> None:
        """Put the network on the stream: eagerly first, as TensorRT finishes its set-up then."""
        if cuda_graphs and self._warm and self._graph is None:
            self._graph = cuda.Graph(stream, lambda: self._enqueue(stream))
        if self._graph is not None:
            self._graph.launch(stream)
            return
        self._enqueue(stream)
        self._warm = True

    def _enqueue(self, stream: cuda.Stream) -> None:
        if not self._context.execute_async_v3(int(stream.handle)):
            raise RuntimeUnavailableError(f"TensorRT cannot run '{self._path}': {self._log.take()}")

    def close(self) -> None:
        if self._graph is not None:
            self._graph.close()
        del self._context

"""Device memory, streams and captured graphs, through NVIDIA's CUDA runtime bindings."""

import ctypes
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from engine.backends.target import Device
from engine.errors import RuntimeUnavailableError

try:
    from cuda.bindings import runtime as cudart
except ImportError as error:
    raise RuntimeUnavailableError(
        f"cuda-python is not installed ({error}); pip install 'vitrine[tensorrt]'"
    ) from None

Array = NDArray[np.generic]


def open_device(index: int = 0) -> Device:
    """Make a GPU the calling thread's device, and say which it is.

    Raises RuntimeUnavailableError where there is none.
    """
    status, count = cudart.cudaGetDeviceCount()
    if status != cudart.cudaError_t.cudaSuccess or count == 0:
        raise RuntimeUnavailableError(f"TensorRT needs an NVIDIA GPU: {_text(status)}")
    if not 0 <= index < count:
        raise RuntimeUnavailableError(f"device must be 0..{count - 1}, got {index}")
    (status,) = cudart.cudaSetDevice(index)
    _check(status, f"opening GPU {index}")
    status, properties = cudart.cudaGetDeviceProperties(index)
    _check(status, f"asking for the properties of GPU {index}")
    name = properties.name.decode().rstrip("\0")
    return Device(name, f"{properties.major}.{properties.minor}")


def device_name(index: int = 0) -> str:
    """A GPU as a manifest records it, e.g. `NVIDIA H200, sm_90`. Raises as `open_device`."""
    return str(open_device(index))


class Stream:
    """A stream of its own: CUDA cannot capture the default one."""

    def __init__(self) -> None:
        status, self.handle = cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking)
        _check(status, "creating a stream")

    def synchronize(self) -> None:
        (status,) = cudart.cudaStreamSynchronize(self.handle)
        _check(status, "running the network")

    def close(self) -> None:
        cudart.cudaStreamDestroy(self.handle)


class DeviceMemory:
    """Bytes on the GPU."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = max(1, nbytes)  # cudaMalloc of nothing gives no address
        status, self.address = cudart.cudaMalloc(self.nbytes)
        _check(status, f"allocating {self.nbytes / 2**20:.1f} MiB on the GPU")

    def close(self) -> None:
        cudart.cudaFree(self.address)


class StagedMemory:
    """Bytes on the GPU with as many pinned ones on the host, through which copies go."""

    def __init__(self, nbytes: int) -> None:
        self.device = DeviceMemory(nbytes)
        status, self._host = cudart.cudaHostAlloc(self.device.nbytes, cudart.cudaHostAllocDefault)
        if status != cudart.cudaError_t.cudaSuccess:
            self.device.close()
        _check(status, f"pinning {self.device.nbytes / 2**20:.1f} MiB on the host")
        buffer = (ctypes.c_byte * self.device.nbytes).from_address(self._host)
        self._bytes = np.frombuffer(memoryview(buffer), np.uint8)

    def upload(self, array: Array, stream: Stream) -> None:
        """Start the copy of a C-contiguous array to the GPU."""
        self._bytes[: array.nbytes] = array.reshape(-1).view(np.uint8)
        (status,) = cudart.cudaMemcpyAsync(
            self.device.address,
            self._host,
            array.nbytes,
            cudart.cudaMemcpyKind.cudaMemcpyHostToDevice,
            stream.handle,
        )
        _check(status, "copying to the GPU")

    def download(self, nbytes: int, stream: Stream) -> None:
        """Start the copy of the first bytes from the GPU."""
        (status,) = cudart.cudaMemcpyAsync(
            self._host,
            self.device.address,
            nbytes,
            cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost,
            stream.handle,
        )
        _check(status, "copying from the GPU")

    def array(self, shape: tuple[int, ...], dtype: str) -> Array:
        """What the last finished download brought, as an array of its own."""
        nbytes = byte_size(shape, dtype)
        copied: Array = self._bytes[:nbytes].copy().view(dtype)
        return copied.reshape(shape)

    def close(self) -> None:
        self.device.close()
        cudart.cudaFreeHost(self._host)


class Graph:
    """The kernels that `enqueue` puts on a stream, recorded once and launched as one."""

    def __init__(self, stream: Stream, enqueue: Callable[[], None]) -> None:
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        (status,) = cudart.cudaStreamBeginCapture(stream.handle, mode)
        _check(status, "starting a graph capture")
        try:
            enqueue()
        finally:  # a stream left capturing could run nothing else
            status, graph = cudart.cudaStreamEndCapture(stream.handle)
        _check(status, "capturing a graph")
        status, self._executable = cudart.cudaGraphInstantiate(graph, 0)
        cudart.cudaGraphDestroy(graph)
        _check(status, "instantiating a graph")

    def launch(self, stream: Stream) -> None:
        (status,) = cudart.cudaGraphLaunch(self._executable, stream.handle)
        _check(status, "launching a graph")

    def close(self) -> None:
        cudart.cudaGraphExecDestroy(self._executable)


def byte_size(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of a dense array."""
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


def _check(status: cudart.cudaError_t, what: str) -> None:
    if status != cudart.cudaError_t.cudaSuccess:
        raise RuntimeUnavailableError(f"CUDA failed at {what}: {_text(status)}")


def _text(status: cudart.cudaError_t) -> str:
    if status == cudart.cudaError_t.cudaSuccess:
        return "no device found"
    _, text = cudart.cudaGetErrorString(status)
    return f"{text.decode()} ({status.name})"

# ruff: noqa: N801, N802, N803, N815, N816  (the names are NVIDIA's)
"""A CUDA runtime whose device is host memory: enough to see copies, leaks, captures and replays.

Its names and arguments are those of cuda.bindings.runtime (test_tensorrt_names.py compares them).
"""

import ctypes
from collections.abc import Callable
from enum import IntEnum


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorNoDevice = 100


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class cudaStreamCaptureMode(IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


class cudaDeviceProp:
    name = b"NVIDIA H200"
    major = 9
    minor = 0


cudaStreamNonBlocking = 1
cudaHostAllocDefault = 0

_OK = cudaError_t.cudaSuccess
_BAD = cudaError_t.cudaErrorInvalidValue


class Fake:
    """One machine: what is allocated on it and what ran."""

    def __init__(self) -> None:
        self.devices = 1
        self.memory: dict[int, ctypes.Array] = {}  # address -> bytes, of device and pinned host
        self.handles: set[int] = set()  # streams and executable graphs that are open
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.capturing: list[Callable[[], None]] | None = None
        self.ran: list[str] = []  # "eager", "capture" or "replay", a kernel launch
        self.cudaError_t = cudaError_t
        self.cudaMemcpyKind = cudaMemcpyKind
        self.cudaStreamCaptureMode = cudaStreamCaptureMode
        self.cudaStreamNonBlocking = cudaStreamNonBlocking
        self.cudaHostAllocDefault = cudaHostAllocDefault

    def enqueue(self, kernel: Callable[[], None]) -> None:
        """Run a kernel, or record it."""
        if self.capturing is None:
            self.ran.append("eager")
            kernel()
        else:
            self.ran.append("capture")
            self.capturing.append(kernel)

    def view(self, address: int, nbytes: int) -> int:
        """The address, if that many bytes are allocated there; else 0."""
        return address if nbytes <= len(self.memory.get(address, ())) else 0

    def _open(self) -> int:
        self.handles.add(handle := max(self.handles, default=0) + 1)
        return handle

    def _close(self, handle: int) -> tuple[cudaError_t]:
        self.handles.remove(handle)
        return (_OK,)

    def _allocate(self, nbytes: int) -> tuple[cudaError_t, int | None]:
        if nbytes > 2**30:
            return cudaError_t.cudaErrorMemoryAllocation, None
        buffer = (ctypes.c_byte * nbytes)()
        self.memory[ctypes.addressof(buffer)] = buffer
        return _OK, ctypes.addressof(buffer)

    def cudaGetErrorString(self, error):
        return _OK, error.name.encode()

    def cudaGetDeviceCount(self):
        return (_OK, self.devices) if self.devices else (cudaError_t.cudaErrorNoDevice, None)

    def cudaSetDevice(self, device):
        return (_OK,)

    def cudaGetDeviceProperties(self, device):
        return _OK, cudaDeviceProp()

    def cudaStreamCreateWithFlags(self, flags):
        return _OK, self._open()

    def cudaStreamSynchronize(self, stream):
        return (_OK if stream in self.handles and self.capturing is None else _BAD,)

    def cudaStreamDestroy(self, stream):
        return self._close(stream)

    def cudaMalloc(self, size):
        return self._allocate(size)

    def cudaFree(self, devPtr):
        del self.memory[devPtr]
        return (_OK,)

    def cudaHostAlloc(self, size, flags):
        return self._allocate(size)

    def cudaFreeHost(self, ptr):
        del self.memory[ptr]
        return (_OK,)

    def cudaMemcpyAsync(self, dst, src, count, kind, stream):
        if not (self.view(dst, count) and self.view(src, count)):
            return (_BAD,)
        ctypes.memmove(dst, src, count)
        return (_OK,)

    def cudaStreamBeginCapture(self, stream, mode):
        self.capturing = []
        return (_OK,)

    def cudaStreamEndCapture(self, stream):
        graph, self.capturing = self.capturing, None
        return (_OK, graph) if graph else (_BAD, None)

    def cudaGraphInstantiate(self, graph, flags):
        handle = self._open()
        self.graphs[handle] = list(graph)
        return _OK, handle

    def cudaGraphDestroy(self, graph):
        graph.clear()
        return (_OK,)

    def cudaGraphLaunch(self, graphExec, stream):
        for kernel in self.graphs[graphExec]:
            self.ran.append("replay")
            kernel()
        return (_OK,)

    def cudaGraphExecDestroy(self, graphExec):
        del self.graphs[graphExec]
        return self._close(graphExec)

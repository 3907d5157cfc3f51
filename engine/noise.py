"""Seeded start noise, equal to torch's CPU generator without importing torch."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.errors import OptionError

MAX_SEED = 2**63 - 1
_BLOCK = 16  # torch fills normals in blocks of 16, and takes another path below 16 elements


class Noise:
    """The normal draws of one generator: each call goes on where the last one stopped.

    `Noise(seed)(shape)` equals `torch.randn(shape, generator=g)` within 1e-6, call after call,
    where `g` is `torch.Generator("cpu").manual_seed(seed)`. Of `seed` only the low 32 bits count,
    as in torch.

    Raises:
        OptionError: `seed` is not in 0..2**63-1.

    Source: `normal_fill` and `normal_distribution` in ATen (native/cpu/DistributionTemplates.h,
    core/DistributionsHelper.h).
    """

    def __init__(self, seed: int) -> None:
        if not 0 <= seed <= MAX_SEED:
            raise OptionError(f"seed must be 0..{MAX_SEED}, got {seed}")
        self._generator = np.random.RandomState(seed & 0xFFFFFFFF)  # MT19937, seeded as in torch
        self._spare = np.empty(0)  # at most one normal, drawn but not yet given out

    def __call__(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """Standard normal noise of `shape`, the same in any batch, process and machine."""
        size = math.prod(shape)
        values = _normals(self._generator, size) if size >= _BLOCK else self._few_normals(size)
        return values.reshape(shape)

    def _few_normals(self, size: int) -> NDArray[np.float32]:
        """`size` < 16 normals: torch draws pairs, and keeps an odd one for its next few."""
        missing = max(size - len(self._spare), 0)
        drawn = np.append(self._spare, _normal_pairs(self._generator, (missing + 1) // 2))
        self._spare = drawn[size:]
        return drawn[:size].astype(np.float32)


def noise(seed: int, shape: Sequence[int]) -> NDArray[np.float32]:
    """The first draw of `Noise(seed)`: the start noise of a request."""
    return Noise(seed)(shape)


def _normals(generator: np.random.RandomState, size: int) -> NDArray[np.float32]:
    """`size` >= 16 normals: all uniforms first, then Box-Muller in blocks of 16."""
    whole = size - size % _BLOCK
    uniforms = _uniforms24(generator, size)
    values = np.empty(size, np.float32)
    values[:whole] = _box_muller(uniforms[:whole])
    if whole < size:  # the last 16 are drawn anew and overlap the block before
        values[-_BLOCK:] = _box_muller(_uniforms24(generator, _BLOCK))
    return values


def _box_muller(uniforms: NDArray[np.float32]) -> NDArray[np.float32]:
    """Normals from [16 n] uniforms: of each 16, eight radii and eight angles."""
    blocks = uniforms.reshape(-1, 2, _BLOCK // 2)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - blocks[:, 0]))
    theta = np.float32(2 * math.pi) * blocks[:, 1]  # rounded to float32, as in torch
    normals: NDArray[np.float32] = np.stack([radius * np.cos(theta), radius * np.sin(theta)], 1)
    return normals.ravel()


def _normal_pairs(generator: np.random.RandomState, count: int) -> NDArray[np.float64]:
    """2 `count` normals, two from each pair of 53-bit uniforms."""
    pairs = _uniforms53(generator, 2 * count).reshape(-1, 2)
    theta = 2 * math.pi * pairs[:, 0]
    radius = np.sqrt(-2 * np.log1p(-pairs[:, 1]))
    normals: NDArray[np.float64] = np.stack([radius * np.cos(theta), radius * np.sin(theta)], 1)
    return normals.ravel()


def _words(generator: np.random.RandomState, size: int) -> NDArray[np.uint32]:
    return generator.randint(0, 2**32, size=size, dtype=np.uint32)


def _uniforms24(generator: np.random.RandomState, size: int) -> NDArray[np.float32]:
    """[0, 1) in steps of 2**-24: the low 24 bits of one word each."""
    bits = _words(generator, size) & np.uint32(2**24 - 1)
    return bits.astype(np.float32) * np.float32(2**-24)


def _uniforms53(generator: np.random.RandomState, size: int) -> NDArray[np.float64]:
    """[0, 1) in steps of 2**-53: the low 53 bits of two words each, the high word first."""
    words = _words(generator, 2 * size).astype(np.uint64).reshape(-1, 2)
    bits = (words[:, 0] << np.uint64(32) | words[:, 1]) & np.uint64(2**53 - 1)
    return bits.astype(np.float64) * 2.0**-53

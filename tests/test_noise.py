"""Seeded start noise is torch's, without torch."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from engine.errors import OptionError
from engine.noise import noise

SEEDS = (0, 1, 2**32 - 1, 2**32 + 5, 2**63 - 1)
SHAPES = (*[(size,) for size in range(18)], (), (31,), (100,), (2, 2, 2), (3, 64, 64), (1_000_003,))

# Measured 5e-7 at a million elements: both sides round log, cos and sin to float32 on their own.
BOUND = 1e-6


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_noise_equals_torch_randn(seed: int, shape: tuple[int, ...]) -> None:
    expected = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).numpy()
    ours = noise(seed, shape)
    assert ours.shape == shape
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected, rtol=0, atol=BOUND)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others() -> None:
    assert noise(7, (3, 8, 8)).tobytes() == noise(7, (3, 8, 8)).tobytes()
    assert noise(7, (3, 8, 8)).tobytes() != noise(8, (3, 8, 8)).tobytes()


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_out_of_range_is_an_option_error(seed: int) -> None:
    with pytest.raises(OptionError, match=rf"seed must be 0\.\.9223372036854775807, got {seed}"):
        noise(seed, (4,))


def test_importing_noise_and_samplers_does_not_import_torch() -> None:
    code = "import sys, engine.noise, engine.samplers; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

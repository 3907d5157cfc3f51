"""Seeded start noise is torch's, without torch."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from engine.errors import OptionError
from engine.noise import Noise, noise

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


def test_successive_draws_go_on_as_torch_does() -> None:
    assert_draws_equal_torch([(4, 64, 64), (16,), (17,), (4, 9, 9), (4,), (2, 3, 8), (14,), (31,)])


def test_successive_draws_go_on_from_half_a_pair_as_torch_does() -> None:
    # below 16 an odd size leaves half a pair, which torch gives out in the next draw below 16
    assert_draws_equal_torch([(3,), (5,), (64,), (1,), (0,), (1,), (17,), (2,), (15,), (4,), (16,)])


def assert_draws_equal_torch(shapes: list[tuple[int, ...]]) -> None:
    for seed in SEEDS:
        generator, ours = torch.Generator("cpu").manual_seed(seed), Noise(seed)
        for shape in shapes:
            expected = torch.randn(shape, generator=generator).numpy()
            np.testing.assert_allclose(ours(shape), expected, rtol=0, atol=BOUND)


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

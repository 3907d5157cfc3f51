"""The two measures against their formulas, written out here."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.quality import IDENTICAL_DB, psnr_db, ssim

Image = NDArray[np.float32]


def picture(seed: int, channels: int = 3, size: int = 24) -> Image:
    return np.random.default_rng(seed).random((size, size, channels), dtype=np.float32)


def test_psnr_of_identical_pictures_is_200_and_their_ssim_1() -> None:
    same = picture(0)
    assert psnr_db(same, same.copy()) == IDENTICAL_DB == 200.0
    assert ssim(same, same.copy()) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("error", "decibels"), [(0.1, 20.0), (0.01, 40.0), (0.001, 60.0)])
def test_psnr_is_ten_log10_of_one_over_the_mean_squared_error(
    error: float, decibels: float
) -> None:
    grey = np.full((8, 8, 1), 0.5, np.float32)
    # 0.5 + error rounds by at most 2^-25: relative 3e-5 of 0.001, which is 3e-4 dB
    assert psnr_db(grey, grey + np.float32(error)) == pytest.approx(decibels, abs=5e-4)


def test_psnr_of_noise_is_the_formula() -> None:
    reference, image = picture(1), picture(2)
    difference = reference.astype(np.float64) - image.astype(np.float64)
    expected = -10 * math.log10(float(np.mean(difference**2)))
    assert psnr_db(reference, image) == pytest.approx(expected, abs=1e-4)  # float32 sums


def test_psnr_of_black_against_white_is_zero() -> None:
    black = np.zeros((8, 8, 3), np.float32)
    assert psnr_db(black, black + 1) == 0.0


def test_psnr_never_exceeds_the_cap() -> None:
    reference = np.zeros((8, 8, 1), np.float32)
    image = reference.copy()
    image[0, 0, 0] = 1e-18  # PSNR about 378 dB
    assert psnr_db(reference, image) == IDENTICAL_DB


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_is_the_formula_of_wang_2004(channels: int) -> None:
    reference = picture(3, channels)
    image = np.clip(reference + 0.1 * picture(4, channels), 0, 1)
    expected = np.mean([_ssim_by_hand(reference[..., c], image[..., c]) for c in range(channels)])
    assert ssim(reference, image) == pytest.approx(expected, abs=1e-5)


def _ssim_by_hand(x: NDArray[np.float32], y: NDArray[np.float32]) -> float:
    """Eq. 13 of the paper: an 11 x 11 Gaussian of sigma 1.5, K1 = 0.01, K2 = 0.03, L = 1."""
    offsets = np.arange(-5, 6)
    gaussian = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(gaussian, gaussian) / gaussian.sum() ** 2

    def mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
        views = np.lib.stride_tricks.sliding_window_view(values, (11, 11))
        return np.einsum("ijkl,kl->ij", views, window)

    x64, y64 = x.astype(np.float64), y.astype(np.float64)
    mu_x, mu_y = mean(x64), mean(y64)
    var_x, var_y = mean(x64**2) - mu_x**2, mean(y64**2) - mu_y**2
    covariance = mean(x64 * y64) - mu_x * mu_y
    c1, c2 = 0.01**2, 0.03**2
    numerator = (2 * mu_x * mu_y + c1) * (2 * covariance + c2)
    return float(np.mean(numerator / ((mu_x**2 + mu_y**2 + c1) * (var_x + var_y + c2))))


def test_ssim_of_a_picture_and_its_negative_is_negative() -> None:
    reference = picture(5, channels=1)
    assert ssim(reference, 1 - reference) < -0.5

"""The measures against their formulas, written out here, and pictures that are none."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.quality import IDENTICAL_DB, DefectName, defect, isr_db, psnr_db, ssim

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


# Signal to residual


@pytest.mark.parametrize(("factor", "decibels"), [(0.9, 20.0), (0.99, 40.0), (2.0, 0.0)])
def test_isr_of_a_picture_that_is_scaled_is_that_of_the_factor(
    factor: float, decibels: float
) -> None:
    reference = picture(6)
    # a residual of (1 - factor) * reference; float32 rounds it by 2^-25 of 0.01, 3e-5 dB
    image = (reference * np.float32(factor)).astype(np.float32)
    assert isr_db(reference, image) == pytest.approx(decibels, abs=1e-3)


def test_isr_is_the_formula_and_not_symmetric() -> None:
    reference, image = picture(7), picture(8) / 2
    residual = math.fsum(
        (float(r) - float(i)) ** 2 for r, i in zip(reference.flat, image.flat, strict=True)
    )
    for signal in (reference, image):
        expected = 10 * math.log10(math.fsum(float(s) ** 2 for s in signal.flat) / residual)
        other = image if signal is reference else reference
        assert isr_db(signal, other) == pytest.approx(expected, abs=1e-9)  # float64 sums
    assert abs(isr_db(reference, image) - isr_db(image, reference)) > 1


def test_isr_is_psnr_plus_the_mean_square_of_the_reference() -> None:
    """scikit-image's PSNR has a signal of 1 in the place of the reference's mean square."""
    reference, image = picture(9), picture(10)
    mean_square = float(np.mean(np.square(reference, dtype=np.float64)))
    expected = psnr_db(reference, image) + 10 * math.log10(mean_square)
    assert isr_db(reference, image) == pytest.approx(expected, abs=1e-4)  # float32 sums of PSNR


def test_isr_of_identical_pictures_is_200_and_black_has_no_signal() -> None:
    black, same = np.zeros((8, 8, 3), np.float32), picture(11, size=8)
    assert isr_db(same, same.copy()) == IDENTICAL_DB
    assert isr_db(black, black.copy()) == IDENTICAL_DB
    assert isr_db(black, same) == -IDENTICAL_DB
    assert isr_db(same, black) == 0.0


def test_isr_never_leaves_200_and_keeps_nan() -> None:
    white = np.ones((8, 8, 1), np.float32)
    faint = np.zeros((8, 8, 1), np.float32)
    faint[0, 0, 0] = 1e-20
    assert isr_db(faint, white) == -IDENTICAL_DB  # about -418 dB
    assert math.isnan(isr_db(white, white * np.float32("nan")))


# Broken pictures


def on(background: float, value: float, share: float, channels: int = 1, size: int = 64) -> Image:
    """A square of `share` of the pixels on a background, `[C, H, W]` in [-1, 1]."""
    x = np.full((channels, size, size), background, np.float32)
    side = round(size * math.sqrt(share))
    x[:, :side, :side] = value
    return x


def ring(size: int, radius: float, value: float, background: float = 1.0) -> Image:
    """A ring two pixels wide, smooth at its edges, `[3, H, W]` in [-1, 1]."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    cover = np.clip(1.5 - np.abs(np.hypot(x, y) - radius), 0, 1)
    one = background + cover * (value - background)
    return np.stack([one, one, one]).astype(np.float32)


def disc(size: int, radius: float, value: float, background: float = 1.0) -> Image:
    """A flat disc, smooth at its edge, `[1, H, W]` in [-1, 1]."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    cover = np.clip(radius + 0.5 - np.hypot(x, y), 0, 1)
    return (background + cover * (value - background)).astype(np.float32)[None]


def grain(seed: int, deviation: float, shape: tuple[int, ...] = (3, 64, 64)) -> Image:
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return values * np.float32(deviation)


def with_one(x: Image, value: float) -> Image:
    x.flat[x.size // 2] = value
    return x


WHOLE = {
    "gray on black, 93 % of it 0": on(-1, 0.2, 0.07),
    "gray on white, 95 % of it 255": on(1, 0.2, 0.05),
    "a pale product on white": on(1, 0.7, 0.05, channels=3),
    "a gray speck of 0.3 % on white": on(1, 0, 0.003, size=128),
    "a thin gray ring on pure white": ring(512, 60, -0.2),
    "a thin black ring on pure white": ring(512, 40, -1),
    "a flat black disc of 8 % on pure white": disc(512, 80, -1),
    "a bright ring on pure black": ring(512, 40, 1, background=-1),
    "a dark product on black, brightest 30": on(-1, 30 / 127.5 - 1, 0.3),
    "red on red: one channel is enough": np.stack([on(1, 0.8, 0.2)[0], *on(-1, -1, 1, 2)]),
    "white that a network overshoots by 10 %": on(1.1, -0.2, 0.1) + grain(0, 0.02, (1, 64, 64)),
    "guidance 10 in one step: 61 % far outside": on(0.3, 5, 0.61),
    "noise": grain(1, 1),
}  # fmt: skip

BROKEN: dict[str, tuple[DefectName, Image]] = {
    "one NaN": ("NaN", with_one(grain(2, 0.3), float("nan"))),
    "one infinity": ("NaN", with_one(grain(3, 0.3), float("-inf"))),
    "NaN only": ("NaN", np.full((1, 8, 8), np.nan, np.float32)),
    "black": ("black", on(-1, -1, 1, channels=3)),
    "far below black": ("black", grain(4, 1) - 50),
    "black with faint noise": ("black", grain(5, 0.01) - 1),
    "gray": ("constant", on(0, 0, 1)),
    "white": ("constant", on(1, 1, 1, channels=3)),
    "far above white": ("constant", grain(6, 1) + 50),
    "one colour": ("constant", np.stack([on(value, value, 1)[0] for value in (-0.9, 0.1, 0.8)])),
    "gray with faint noise": ("constant", grain(7, 0.005)),
    "gray with one hot pixel": ("constant", with_one(on(0, 0, 1, size=256), 1)),
    "values of hundreds": ("saturated", grain(8, 200)),
    "black and white only": ("saturated", np.sign(grain(9, 1))),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_picture_has_no_defect(name: str) -> None:
    assert defect(WHOLE[name]) is None


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_picture_has_the_defect_by_name(name: str) -> None:
    expected, x = BROKEN[name]
    found = defect(x)
    assert found is not None
    assert found.name == expected


def test_a_defect_says_by_which_figure() -> None:
    details = [found.detail for _, x in BROKEN.values() if (found := defect(x))]
    assert details[0] == "1 of 12288 values are NaN or infinite"
    assert "its brightest value is 0.0 of 255, below 16" in details
    assert "its values deviate by 0.00 of 255, less than 1" in details
    assert any(detail.endswith("of its values are far outside the range") for detail in details)

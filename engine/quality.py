"""How close a picture is to its reference, and whether it is a picture at all."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]  # [H, W, C] in [0, 1]
IDENTICAL_DB = 200.0  # what PSNR and ISR are capped at, since JSON has no infinity

# What a picture is measured against, and what whole ones have, the worst of each: 75,444 photos and
# renderings of products (Fashion-MNIST on black, clothing and shoe photos, studio photos on white),
# 400 pictures of the GAN of this repository, and 600 of its diffusion model over all samplers,
# 1..30 steps and guidance 1..10.
BLACK_LEVEL = 16.0  # of 255; the brightest value of each of them is 131 or more
CONSTANT_LEVELS = 1.0  # of 255, standard deviation; 11.6 or more, 7 for gray on 0.3 % of white
FAR_OUTSIDE = 1.5  # of a range that ends at 1: clipped by a quarter of the range
# Of values that far outside: 0.61 or less. 0.90 for the same with guidance up to 100, which is what
# was asked for; 0.989 or more in the GAN with its last layer x 64.
SATURATED_SHARE = 0.98
# A network that is bounded, or sampled with clip_sample, saturates without leaving the range: both
# ends, and nothing between. A flat disc that covers 5 % of 512x512 has 0.16 % of its pixels on its
# rim; whole pictures have 6.7 % or more between the ends.
BETWEEN_SHARE = 0.001
END_SHARE = 0.05

DefectName = Literal["NaN", "black", "constant", "saturated"]


@dataclass(frozen=True)
class Defect:
    """What is broken in a picture: the name of it, and the figure that says so."""

    name: DefectName
    detail: str


def psnr_db(reference: Image, image: Image) -> float:
    """Peak signal-to-noise ratio in dB for a peak of 1, at most 200 (scikit-image's)."""
    from skimage.metrics import peak_signal_noise_ratio

    if np.array_equal(reference, image):
        return IDENTICAL_DB
    return min(float(peak_signal_noise_ratio(reference, image, data_range=1.0)), IDENTICAL_DB)


def isr_db(reference: Image, image: Image) -> float:
    """Image signal-to-residual ratio in dB: 10 log10(sum ref^2 / sum (ref - img)^2).

    Within -200..200: 200 where the two are identical, also where both are black; -200 where only
    the reference is black, which has no signal. A black picture has 0 dB. NaN where a pixel is NaN.
    """
    if np.array_equal(reference, image):
        return IDENTICAL_DB
    signal = np.square(reference, dtype=np.float64).sum()
    residual = np.square(np.subtract(reference, image, dtype=np.float64)).sum()
    if not signal and residual > 0:
        return -IDENTICAL_DB
    return float(np.clip(10 * np.log10(signal / residual), -IDENTICAL_DB, IDENTICAL_DB))


def ssim(reference: Image, image: Image) -> float:
    """Structural similarity of Wang et al. 2004: Gaussian window of sigma 1.5 (scikit-image's)."""
    from skimage.metrics import structural_similarity

    return float(
        structural_similarity(
            reference.astype(np.float64),
            image.astype(np.float64),
            data_range=1.0,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )


def defect(x: NDArray[np.float32]) -> Defect | None:
    """What is broken in `[C, H, W]` as a network gave it: in [-1, 1], not clipped yet.

    None for a picture, however little is on it: a ring on pure white, a bag on pure black.
    """
    return not_finite(x) or _black(x) or _constant(x) or _saturated(x)


def not_finite(x: NDArray[np.float32]) -> Defect | None:
    """NaN or infinity anywhere in a picture or its latents, of any shape."""
    broken = x.size - int(np.isfinite(x).sum())
    if not broken:
        return None
    return Defect("NaN", f"{broken} of {x.size} values are NaN or infinite")


def _black(x: NDArray[np.float32]) -> Defect | None:
    brightest = float(np.clip((x.max() + 1) / 2, 0, 1)) * 255
    if brightest >= BLACK_LEVEL:
        return None
    return Defect("black", f"its brightest value is {brightest:.1f} of 255, below {BLACK_LEVEL:g}")


def _constant(x: NDArray[np.float32]) -> Defect | None:
    """One colour: hardly any deviation within each channel."""
    deviation = float(x.clip(-1, 1).std(axis=(1, 2)).max()) / 2 * 255
    if deviation >= CONSTANT_LEVELS:
        return None
    found = f"its values deviate by {deviation:.2f} of 255, less than {CONSTANT_LEVELS:g}"
    return Defect("constant", found)


def _saturated(x: NDArray[np.float32]) -> Defect | None:
    far = float((np.abs(x) > FAR_OUTSIDE).mean())
    if far > SATURATED_SHARE:
        return Defect("saturated", f"{far:.1%} of its values are far outside the range")
    low, high = float((x <= -1).mean()), float((x >= 1).mean())
    if min(low, high) > END_SHARE and 1 - low - high < BETWEEN_SHARE:
        return Defect("saturated", f"{low:.1%} of its values are 0, {high:.1%} are 255")
    return None

"""How close a picture is to its reference."""

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]  # [H, W, C] in [0, 1]
IDENTICAL_DB = 200.0  # what PSNR is capped at, since JSON has no infinity


def psnr_db(reference: Image, image: Image) -> float:
    """Peak signal-to-noise ratio in dB for a peak of 1, at most 200 (scikit-image's)."""
    from skimage.metrics import peak_signal_noise_ratio

    if np.array_equal(reference, image):
        return IDENTICAL_DB
    return min(float(peak_signal_noise_ratio(reference, image, data_range=1.0)), IDENTICAL_DB)


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

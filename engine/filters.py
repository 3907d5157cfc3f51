"""Denoising and sharpening: pure functions of a picture and a strength, each off at 0.

A picture is `[H, W, C]`, C of 1 or 3, uint8 or, where a function says so, float32 in [0, 1]; the
result has its dtype and shape, and is the same array where the strength is 0.
"""

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.images import Picture

Float = NDArray[np.float32]
Image = TypeVar("Image", Picture, Float)

SIGMA_PX = 1.0  # of the unsharp mask
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
BILATERAL_RANGE = 64 / 255  # standard deviation of colour at strength 1
BILATERAL_SIGMA_PX = 3.0
NON_LOCAL_MEANS_H = 24  # gray levels at strength 1
PATCH_PX, SEARCH_PX = 7, 21  # of non-local means: Buades et al. 2011, IPOL
DEBLUR_STEPS = 15
EDGE = 0.2  # slope per pixel, of the range, from which an edge is sharpened in full
_TINY = np.float32(1e-6)


def as_float(picture: Image) -> Float:
    """The picture as C-ordered float32 in [0, 1]."""
    if picture.dtype == np.uint8:
        return np.ascontiguousarray(picture, np.float32) / np.float32(255)
    return np.ascontiguousarray(picture, np.float32)


def as_like(image: Float, picture: Image) -> Image:
    """float32, of any range, clipped to [0, 1] and in the dtype and shape of `picture`."""
    values = image.reshape(picture.shape).clip(np.float32(0), np.float32(1))
    if picture.dtype == np.uint8:
        values = np.rint(values * np.float32(255))
    return values.astype(picture.dtype)


def luma(image: Float) -> Float:
    """`[H, W, C]` to `[H, W]`: gray as it is, RGB by BT.601."""
    if image.shape[2] == 1:
        return image[..., 0]
    red, green, blue = (image[..., c] * np.float32(weight) for c, weight in enumerate(LUMA))
    gray: Float = red + green + blue
    return gray


def median(picture: Picture, radius_px: int) -> Picture:
    """The median of each square of 2 radius + 1 pixels; removes specks. uint8 only."""
    if radius_px == 0:
        return picture
    import cv2

    return _reshaped(cv2.medianBlur(np.ascontiguousarray(picture), 2 * radius_px + 1), picture)


def mean(picture: Image, radius_px: int) -> Image:
    """The mean of each square of 2 radius + 1 pixels. uint8 or float32."""
    if radius_px == 0:
        return picture
    import cv2

    side = 2 * radius_px + 1
    return as_like(_array(cv2.blur(as_float(picture), (side, side))), picture)


def bilateral(picture: Picture, strength: float) -> Picture:
    """Means over pixels that are near in place and colour, so edges stay. uint8 only.

    Tomasi and Manduchi 1998; strength 1 averages over colours about 64 gray levels apart.
    """
    if strength == 0:
        return picture
    import cv2

    sigma = 255 * BILATERAL_RANGE * strength
    image = np.ascontiguousarray(picture)
    filtered = cv2.bilateralFilter(image, -1, sigma, BILATERAL_SIGMA_PX)
    return _reshaped(filtered, picture)


def non_local_means(picture: Picture, strength: float) -> Picture:
    """Means over pixels whose surroundings look alike: Buades, Coll and Morel 2011. uint8 only.

    Strength 1 is h = 24 gray levels; about 0.4 takes away noise of 10 gray levels.
    """
    if strength == 0:
        return picture
    import cv2

    filtered = cv2.fastNlMeansDenoising(
        np.ascontiguousarray(picture),
        h=NON_LOCAL_MEANS_H * strength,
        templateWindowSize=PATCH_PX,
        searchWindowSize=SEARCH_PX,
    )
    return _reshaped(filtered, picture)


def deblur(picture: Image, sigma_px: float) -> Image:
    """Undo a Gaussian blur of that standard deviation. uint8 or float32.

    Richardson 1972 and Lucy 1974: 15 times x <- x * G(y / G(x)), G the (symmetric) blur.
    """
    if sigma_px == 0:
        return picture
    blurred = as_float(picture)
    estimate = np.full_like(blurred, 0.5)
    for _ in range(DEBLUR_STEPS):
        ratio = blurred / np.maximum(gaussian(estimate, sigma_px), _TINY)
        estimate = estimate * gaussian(ratio, sigma_px)
    return as_like(estimate, picture)


def sharpen(picture: Image, amount: float, sigma_px: float = SIGMA_PX) -> Image:
    """Unsharp mask: x + amount * (x - G(x)), G a Gaussian blur. uint8 or float32."""
    if amount == 0:
        return picture
    image = as_float(picture)
    detail = image - gaussian(image, sigma_px)
    return as_like(image + np.float32(amount) * detail, picture)


def sharpen_edges(picture: Image, amount: float, sigma_px: float = SIGMA_PX) -> Image:
    """An unsharp mask weighted by the squared Sobel slope of the luma. uint8 or float32.

    The weight is 1 from a slope of 0.2 of the range a pixel: noise on flat surfaces stays as it is.
    """
    if amount == 0:
        return picture
    image = as_float(picture)
    weight = np.minimum(_slope(luma(image)) / np.float32(EDGE), np.float32(1)) ** 2
    detail = image - gaussian(image, sigma_px)
    return as_like(image + np.float32(amount) * weight[..., None] * detail, picture)


def gaussian(image: Float, sigma_px: float) -> Float:
    """A Gaussian blur, `[H, W, C]` or `[H, W]`, mirrored at the border, up to 4 deviations."""
    import cv2

    side = 2 * round(4 * sigma_px) + 1
    return _array(cv2.GaussianBlur(image, (side, side), sigma_px)).reshape(image.shape)


def _slope(gray: Float) -> Float:
    """How much of the range the picture rises in a pixel, by Sobel: a step of 1 is 0.5."""
    import cv2

    x = _array(cv2.Sobel(gray, cv2.CV_32F, 1, 0, scale=1 / 8))
    y = _array(cv2.Sobel(gray, cv2.CV_32F, 0, 1, scale=1 / 8))
    return np.sqrt(x * x + y * y)


def _array(result: Any) -> Float:
    return np.asarray(result, np.float32)


def _reshaped(result: Any, picture: Picture) -> Picture:
    """OpenCV drops the axis of a single channel."""
    return np.asarray(result, np.uint8).reshape(picture.shape)

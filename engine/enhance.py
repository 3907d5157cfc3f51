"""Enhancement: white balance, contrast and colour, as pure functions with a strength.

A picture is `[H, W, C]`, C of 1 or 3, uint8 or, where a function says so, float32 in [0, 1]; the
result has its dtype and shape, and is the same array where the strength is neutral.
"""

import numpy as np

from engine.filters import Image, as_float, as_like, gaussian, luma
from engine.images import Picture

WHITE_SHARE = 0.05  # of the pixels: the brightest ones are taken to be neutral
SMOOTH_PX = 2.0  # standard deviation of the blur in which they are looked for
MAX_GAIN = 2.0  # of a channel
CLIP_LIMIT = 2.0  # of a histogram bin, against an even histogram: Zuiderveld 1994
TILES, MIN_TILE_PX = 8, 16


def white_balance(picture: Image, strength: float) -> Image:
    """Gains a channel that make the brightest twentieth of the picture gray. uint8 or float32.

    The product keeps its colour, which gray-world would pull to gray: what is brightest is mostly
    the ground. A gray picture has no colour to balance and stays.
    """
    if strength == 0 or picture.shape[2] == 1:
        return picture
    image = as_float(picture)
    smooth = gaussian(image, SMOOTH_PX)  # or noise would choose the brightest
    gray = luma(smooth)
    bright = smooth[gray >= np.quantile(gray, 1 - WHITE_SHARE)]  # [N, 3]
    means = bright.mean(axis=0, dtype=np.float64)
    target = float(luma(means[None, None].astype(np.float32))[0, 0])
    gains = np.clip(target / np.maximum(means, 1 / 255), 1 / MAX_GAIN, MAX_GAIN)
    return as_like(image * (1 + strength * (gains - 1)).astype(np.float32), picture)


def contrast(picture: Image, factor: float) -> Image:
    """m + factor * (x - m), m the mean luma, as Pillow's. 1 is neutral. uint8 or float32."""
    if factor == 1:
        return picture
    image = as_float(picture)
    mean = np.float32(luma(image).mean(dtype=np.float64))
    return as_like(mean + np.float32(factor) * (image - mean), picture)


def saturation(picture: Image, factor: float) -> Image:
    """y + factor * (x - y), y the luma, as Pillow's. 1 is neutral. uint8 or float32.

    A gray picture stays.
    """
    if factor == 1 or picture.shape[2] == 1:
        return picture
    image = as_float(picture)
    gray = luma(image)[..., None]
    return as_like(gray + np.float32(factor) * (image - gray), picture)


def clahe(picture: Picture, strength: float) -> Picture:
    """Contrast-limited adaptive histogram equalization of the luma. uint8 only.

    Zuiderveld 1994, in tiles of 16 pixels or more; all channels of a pixel move alike, so that
    hues stay, and `strength` is how far.
    """
    if strength == 0:
        return picture
    import cv2

    height, width = picture.shape[:2]
    tiles = [min(max(side // MIN_TILE_PX, 1), TILES) for side in (width, height)]
    image = as_float(picture)
    gray = luma(image)
    levels = np.rint(gray * np.float32(255)).astype(np.uint8)
    equalized = cv2.createCLAHE(CLIP_LIMIT, tiles).apply(levels)
    change = (equalized.astype(np.float32) - levels) / np.float32(255)
    return as_like(image + np.float32(strength) * change[..., None], picture)

"""The ground that a product lies on, found from the border inwards and painted white."""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.filters import Float, as_float, as_like, gaussian, median
from engine.images import Picture

RIM_SIGMA_PX = 1.0  # how soft the rim of a product becomes
LEAST_BORDER = 0.5  # the share of the border that must be ground
SPECK = 0.005  # the share of the picture under which something on the ground is no product
FITS = 4  # of the ground's light, each to what the one before took for ground

Mask = NDArray[np.bool_]
Scalar = TypeVar("Scalar", bound=np.generic)


def white_background(picture: Picture, tolerance: float) -> Picture:
    """Paint the ground 255, soften the product's rim, leave the product. uint8 `[H, W, C]` only.

    For a product on a plain ground, whose light may fall off evenly: the ground is what is joined
    to the border and within `tolerance` (a share of the range, in every channel) of a plane that
    is fitted to the border. A picture of which less than half the border is such a ground has no
    plain one and stays, as does every picture at 0.
    """
    if tolerance == 0:
        return picture
    smooth = as_float(median(picture, 1))
    colour = _light(smooth, tolerance)
    near = np.abs(smooth - colour).max(axis=2) <= tolerance
    if _border(near).mean() < LEAST_BORDER:
        return picture
    ground = _without_specks(_joined_to_border(near))
    softness = gaussian(ground.astype(np.float32), RIM_SIGMA_PX)[..., None]
    image = as_float(picture)
    lit = image / np.maximum(colour, np.float32(0.5))  # as if the ground were white
    whitened = as_like(image + softness * (lit - image), picture)
    whitened[ground] = 255
    return whitened


def _light(image: Float, tolerance: float) -> Float:
    """The ground's colour at every pixel: a plane a channel, fitted to the border's ground."""
    height, width = image.shape[:2]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    plane = np.stack((np.ones_like(x), x, y), axis=2)  # [H, W, 3]
    points, colours = _border(plane), _border(image).astype(np.float64)
    fitted = np.broadcast_to(np.median(colours, axis=0), colours.shape)
    for _ in range(FITS):
        near = np.abs(colours - fitted).max(axis=1) <= tolerance
        a, b = points[near], colours[near]
        normal, right = np.einsum("ni,nj->ij", a, a), np.einsum("ni,nc->ic", a, b)
        factors = np.linalg.lstsq(normal, right, rcond=1e-9)[0]
        fitted = np.einsum("ni,ic->nc", points, factors)
    light: Float = np.einsum("hwi,ic->hwc", plane, factors).clip(0, 1).astype(np.float32)
    return light


def _border(array: NDArray[Scalar]) -> NDArray[Scalar]:
    """The outermost pixels, `[N, ...]`."""
    return np.concatenate((array[0], array[-1], array[1:-1, 0], array[1:-1, -1]))


def _joined_to_border(mask: Mask) -> Mask:
    """The parts of a mask that reach the border over neighbours at their sides."""
    labels = _parts(mask, 4)
    return mask & np.isin(labels, _border(labels))


def _without_specks(ground: Mask) -> Mask:
    """The ground together with what is too small on it to be a product."""
    labels = _parts(~ground, 8)
    areas = np.bincount(labels.ravel())
    return ground | (areas < SPECK * ground.size)[labels]


def _parts(mask: Mask, connectivity: int) -> NDArray[np.int32]:
    """The number of the part of a mask that each pixel is in, 0 outside."""
    import cv2

    labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=connectivity)[1]
    return np.asarray(labels, np.int32)

"""Scales, zero points and quantized values."""

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from export.recipes import ActivationType, WeightType

_LARGEST = {"int8": 127.0, "float8e4m3fn": 448.0}  # -128 is left out: the range is symmetric


def quantize_weight(
    values: NDArray[Any], axis: int, kind: WeightType
) -> tuple[NDArray[Any], NDArray[Any]]:
    """A weight as int8 or float8, and its scale [output channels] in the weight's own type."""
    exact = values.astype(np.float32)
    others = tuple(index for index in range(values.ndim) if index != axis)
    scale = _scale(np.abs(exact).max(axis=others), _LARGEST[kind], values.dtype)
    shape = [-1 if index == axis else 1 for index in range(values.ndim)]
    scaled = exact / scale.astype(np.float32).reshape(shape)
    scaled = np.clip(scaled, -_LARGEST[kind], _LARGEST[kind])
    if kind == "int8":
        return np.rint(scaled).astype(np.int8), scale
    return scaled.astype(ml_dtypes.float8_e4m3fn), scale


def activation_scale(
    span: tuple[float, float], kind: ActivationType, dtype: np.dtype[Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Scale and zero point, of no axes, for values of `span`, which has 0 in it."""
    least, greatest = span
    if kind == "uint8":
        scale = _scale(np.asarray(greatest - least), 255.0, dtype)
        zero_point = np.clip(np.rint(-least / scale.astype(np.float32)), 0, 255)
        return scale, zero_point.astype(np.uint8)
    scale = _scale(np.asarray(max(-least, greatest)), _LARGEST[kind], dtype)
    zero = np.int8 if kind == "int8" else ml_dtypes.float8_e4m3fn
    return scale, np.zeros((), zero)


def _scale(span: NDArray[Any], steps: float, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Span / steps; 1 where a channel is all zero, and never so small that `dtype` rounds it."""
    smallest = float(ml_dtypes.finfo(dtype).smallest_normal)  # type: ignore[no-untyped-call]
    scale = np.where(span > 0, np.maximum(span / steps, smallest), 1.0)
    return np.asarray(scale.astype(dtype))

"""A TensorRT optimisation profile: the least, the usual and the greatest shape of every input."""

import re

from pydantic import field_validator

from engine.errors import OptionError
from engine.options import Options

Shape = tuple[int, ...]
FORM = "NAME:MIN..OPT..MAX[,NAME:MIN..OPT..MAX], e.g. sample:1x4x64x64..4x4x64x64..8x4x96x96"
_RANGE = ("min", "opt", "max")
_NAME = re.compile(r"[A-Za-z_][\w./-]*")
_SHAPE = re.compile(r"\d+(x\d+)*")


class Profile(Options):
    """Shapes as (min, opt, max) by input name.

    Raises OptionError where ranks differ, a dimension is under 1, or min <= opt <= max fails.
    """

    shapes: dict[str, tuple[Shape, Shape, Shape]]

    @field_validator("shapes")
    @classmethod
    def _in_order(
        cls, shapes: dict[str, tuple[Shape, Shape, Shape]]
    ) -> dict[str, tuple[Shape, Shape, Shape]]:
        if not shapes:
            raise OptionError(f"a profile must name at least one input; write {FORM}")
        for name, ranges in shapes.items():
            _check(name, ranges)
        return shapes

    def __str__(self) -> str:
        return ",".join(
            f"{name}:{'..'.join(shape_text(shape) for shape in ranges)}"
            for name, ranges in self.shapes.items()
        )


def parse_profile(text: str) -> Profile:
    """The profile of `sample:1x4x64x64..4x4x64x64..8x4x96x96,timestep:1..4..8`.

    Raises OptionError that names the wrong part.
    """
    shapes: dict[str, tuple[Shape, Shape, Shape]] = {}
    for part in text.split(","):
        name, _, ranges = (piece.strip() for piece in part.rpartition(":"))
        if not _NAME.fullmatch(name):
            raise OptionError(f"profile '{part}' names no input; write {FORM}")
        if name in shapes:
            raise OptionError(f"profile names input '{name}' twice; give each input once")
        bounds = ranges.split("..")
        if len(bounds) != len(_RANGE):
            raise OptionError(
                f"profile of '{name}' must have 3 shapes MIN..OPT..MAX, got {len(bounds)} "
                f"in '{ranges}'; write {FORM}"
            )
        least, usual, greatest = (_parse_shape(name, bound.strip()) for bound in bounds)
        shapes[name] = (least, usual, greatest)
    return Profile(shapes=shapes)


def shape_text(shape: Shape) -> str:
    """`(1, 4, 64, 64)` as `1x4x64x64`."""
    return "x".join(str(value) for value in shape)


def _parse_shape(name: str, text: str) -> Shape:
    if not _SHAPE.fullmatch(text):
        raise OptionError(
            f"profile of '{name}': a shape must be whole numbers joined by x, got '{text}'; "
            f"write {FORM}"
        )
    return tuple(int(value) for value in text.split("x"))


def _check(name: str, ranges: tuple[Shape, Shape, Shape]) -> None:
    texts = dict(zip(_RANGE, map(shape_text, ranges), strict=True))
    if len({len(shape) for shape in ranges}) > 1:
        got = ", ".join(f"{which} {text}" for which, text in texts.items())
        raise OptionError(f"profile of '{name}': min, opt and max must have one rank, got {got}")
    for which, shape in zip(_RANGE, ranges, strict=True):
        if any(value < 1 for value in shape):
            raise OptionError(
                f"profile of '{name}': dimensions must be at least 1, got {which} {texts[which]}"
            )
    for low, high in (("min", "opt"), ("opt", "max")):
        pairs = zip(ranges[_RANGE.index(low)], ranges[_RANGE.index(high)], strict=True)
        if any(lower > upper for lower, upper in pairs):
            raise OptionError(
                f"profile of '{name}': {low} may not exceed {high}, "
                f"got {low} {texts[low]} and {high} {texts[high]}"
            )

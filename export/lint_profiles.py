"""Optimisation profiles against the inputs of a graph, as TensorRT's builder checks them."""

import re
from collections.abc import Iterator, Sequence

from export.finding import Finding, error, warning
from export.lint_graph import Dimension, Graph, Scope
from export.profile import Profile, Shape, shape_text

_WHICH = ("min", "opt", "max")
_FACTOR = re.compile(r"(\d+)\s*\*\s*([A-Za-z_]\w*)")  # what torch.onnx.export writes for 8 * dim
_NAME = re.compile(r"[A-Za-z_]\w*")


def profile_findings(graph: Graph, profiles: Sequence[Profile]) -> Iterator[Finding]:
    """Inputs, static dimensions, and dimensions that share a symbolic name."""
    for profile in profiles:
        yield from _inputs(graph.main, profile)
        fitting = {
            name: ranges
            for name, ranges in profile.shapes.items()
            if name in graph.main.inputs
            and len(graph.main.shape(name) or ranges[0]) == len(ranges[0])
        }
        for name, ranges in fitting.items():
            yield from _static(name, graph.main.shape(name) or (), ranges)
        for which, position in zip(_WHICH, range(3), strict=True):
            shapes = {name: ranges[position] for name, ranges in fitting.items()}
            yield from _symbols(graph.main, which, shapes)


def _inputs(main: Scope, profile: Profile) -> Iterator[Finding]:
    for name in main.inputs:
        shape = main.shape(name)
        if shape is None:
            continue
        if name not in profile.shapes and not all(isinstance(size, int) for size in shape):
            yield error(
                "profile-missing-input",
                name,
                f"its shape {_text(shape)} is dynamic and the profile has no range for it",
                f"add {name}:MIN..OPT..MAX to the profile",
            )
        given = profile.shapes.get(name)
        if given and len(given[0]) != len(shape):
            yield error(
                "profile-rank",
                name,
                f"the profile must have rank {len(shape)} as {_text(shape)}, "
                f"got {shape_text(given[0])}",
                f"write {len(shape)} values for each of MIN..OPT..MAX",
            )
    for name in profile.shapes:
        if name not in main.inputs:
            yield warning(
                "profile-unknown-input",
                name,
                f"the graph's inputs are {', '.join(main.inputs)}; TensorRT ignores the range",
                "remove it, or spell the name as the graph does",
            )


def _static(
    name: str, shape: Sequence[Dimension], ranges: tuple[Shape, Shape, Shape]
) -> Iterator[Finding]:
    for axis, size in enumerate(shape):
        given = sorted({values[axis] for values in ranges})
        if isinstance(size, int) and given != [size]:
            yield error(
                "profile-static-dimension",
                name,
                f"axis {axis} is {size} in the graph, got {'..'.join(map(str, given))}",
                f"write {size} in MIN, OPT and MAX, or export the axis as dynamic",
            )


def _symbols(main: Scope, which: str, shapes: dict[str, Shape]) -> Iterator[Finding]:
    """Equal names have equal values; `8*height` is divisible by 8 and agrees with `height`.

    Unequal opt fails the build; of unequal min or max TensorRT keeps the narrower range.
    """
    first: dict[str, tuple[int, str]] = {}
    for name, values in shapes.items():
        for axis, (size, value) in enumerate(zip(main.shape(name) or (), values, strict=False)):
            symbol, factor = _symbol(size)
            if not symbol:
                continue
            if value % factor:
                yield error(
                    "derived-dimension",
                    name,
                    f"axis {axis} is {size}: {which} must be divisible by {factor}, got {value}",
                    f"choose a multiple of {factor}, e.g. {max(factor, value // factor * factor)}",
                )
                continue
            place = f"{name} axis {axis} ({size})"
            known, other = first.setdefault(symbol, (value // factor, place))
            if known != value // factor:
                say = error if which == "opt" else warning
                yield say(
                    "shared-dimension",
                    name,
                    f"{symbol} must have one value in a profile's {which}, got {known} from "
                    f"{other} and {value // factor} from {place}",
                    "give dimensions of one name equal values, or export them as two Dims",
                )


def _symbol(size: Dimension) -> tuple[str, int]:
    """The free name in a dimension and its factor; no name for what is no plain multiple."""
    if not isinstance(size, str):
        return "", 1
    multiple = _FACTOR.fullmatch(size)
    if multiple:
        return multiple[2], int(multiple[1])
    return (size, 1) if _NAME.fullmatch(size) else ("", 1)


def _text(shape: Sequence[Dimension]) -> str:
    return "x".join("?" if size is None else str(size) for size in shape)

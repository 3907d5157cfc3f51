"""The quality-against-speed plot: where points, ticks and labels stand, in pixels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import asinh, floor, log10
from typing import Literal

from export.figures import Candidate, Report, Status

WIDTH, HEIGHT = 900, 460
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 26, 56  # margins
LANE = 130  # width of the place for what was not timed
MARKER = 8  # half of a marker's side
LETTER, LINE = 7.2, 15  # a label's widths and height, for 12 px letters

Anchor = Literal["start", "middle", "end"]
Scale = Callable[[float], float]


@dataclass(frozen=True)
class Box:
    """A rectangle."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: "Box") -> bool:
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom

    def inside(self, other: "Box") -> bool:
        across = self.left >= other.left and self.right <= other.right
        return across and self.top >= other.top and self.bottom <= other.bottom


@dataclass(frozen=True)
class Label:
    """A text beside its point, with a line to it where it is far."""

    x: float
    y: float  # of the middle of the line
    anchor: Anchor
    box: Box
    far: bool


@dataclass(frozen=True)
class Point:
    """One candidate."""

    x: float
    y: float
    name: str
    status: Status
    label: Label


@dataclass(frozen=True)
class Tick:
    """A value on an axis, or a floor."""

    at: float
    text: str


@dataclass(frozen=True)
class Scatter:
    """Everything that the picture shows; the template draws it."""

    x_title: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    floors: list[Tick]
    points: list[Point]
    lane: float | None  # where the place for untimed candidates starts

    width, height, left, right = WIDTH, HEIGHT, LEFT, WIDTH - RIGHT
    top, bottom = TOP, HEIGHT - BOTTOM

    @property
    def statuses(self) -> set[Status]:
        """Those that the legend explains."""
        return {point.status for point in self.points}


def scatter(report: Report) -> Scatter | None:
    """The plot of all candidates whose pictures were measured; none where there are none."""
    shown = [each for each in report.candidates if each.psnr_db_min is not None]
    if not shown:
        return None
    timed = [each for each in shown if each.latency_ms is not None]
    lane = None if len(timed) == len(shown) else WIDTH - RIGHT - LANE if timed else LEFT
    floors = {each.floors.psnr_db for each in shown if each.floors}
    y = _y_scale([each.psnr_db_min or 0.0 for each in shown], floors)
    speeds = [_speed(each, report) for each in timed]
    low, high = _log_domain(speeds) if timed else (1.0, 10.0)
    x = _log_scale(low, high, LEFT, WIDTH - RIGHT if lane is None else lane)
    middle = ((lane or 0) + WIDTH - RIGHT) / 2
    spots = [
        (x(_speed(each, report)) if each in timed else middle, y(each.psnr_db_min or 0.0))
        for each in shown
    ]
    lines = [Tick(y(value), f"floor {value:g} dB") for value in sorted(floors)]
    return Scatter(
        x_title=_x_title(report),
        x_ticks=[Tick(x(value), f"{value:g}") for value in log_ticks(low, high)] if timed else [],
        y_ticks=_y_ticks(y),
        floors=lines,
        points=_points(report, shown, spots, lines),
        lane=lane,
    )


def _speed(candidate: Candidate, report: Report) -> float:
    value = candidate.latency_ms if report.goal == "latency" else candidate.images_per_s
    return value or 0.0


def _x_title(report: Report) -> str:
    if report.goal == "latency":
        return "milliseconds for a picture alone (left is faster)"
    return "images per second (right is faster)"


def _log_domain(values: Sequence[float]) -> tuple[float, float]:
    """A margin around the values, and at least a factor of three so that ticks fit."""
    low, high = min(values) / 1.15, max(values) * 1.15
    widen = max(1.0, (3 * low / high) ** 0.5)
    return low / widen, high * widen


def _log_scale(low: float, high: float, start: float, end: float) -> Scale:
    return lambda value: start + (end - start) * log10(value / low) / log10(high / low)


def log_ticks(low: float, high: float) -> list[float]:
    """Round values from low to high: the coarsest steps of a decade that give at least four."""
    decades = range(floor(log10(low)), floor(log10(high)) + 1)
    ticks: list[float] = []
    for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8), [n / 2 for n in range(2, 20)]):
        values = [step * 10.0**decade for decade in decades for step in steps]
        ticks = [value for value in values if low <= value <= high]
        if len(ticks) >= 4:
            break
    return ticks


def _y_scale(values: Sequence[float], floors: set[float]) -> Scale:
    """asinh of the distance from the floor: linear within about 10 dB of it, logarithmic beyond."""
    centre = min(floors, default=min(values))

    def bent(value: float) -> float:
        return asinh((value - centre) / 10)

    low, high = (bent(end([*values, *floors])) for end in (min, max))
    margin = 0.08 * (high - low) or 1.0
    top, bottom = high + margin, low - margin
    return lambda value: TOP + (HEIGHT - BOTTOM - TOP) * (top - bent(value)) / (top - bottom)


def _y_ticks(y: Scale) -> list[Tick]:
    """Round values in dB that are inside the frame and not on top of each other."""
    ticks: list[Tick] = []
    for value in (*range(0, 60, 5), 60, 70, 80, 100, 120, 150, 200):
        at = y(value)
        if TOP <= at <= HEIGHT - BOTTOM and (not ticks or ticks[-1].at - at >= 18):
            ticks.append(Tick(at, str(value)))
    return ticks


def _points(
    report: Report,
    shown: Sequence[Candidate],
    spots: Sequence[tuple[float, float]],
    floors: Sequence[Tick],
) -> list[Point]:
    """Points with labels that cover neither a marker nor each other; the selected one's first."""
    taken = [Box(x - MARKER, y - MARKER, x + MARKER, y + MARKER) for x, y in spots]
    for line in floors:  # its text is at the left end, above it
        taken.append(Box(LEFT, line.at - LINE - 2, LEFT + LETTER * len(line.text), line.at))
        taken.append(Box(LEFT, line.at - 1, WIDTH - RIGHT, line.at + 1))
    points = []
    order = sorted(zip(shown, spots, strict=True), key=lambda p: p[0].variant != report.selected)
    for candidate, (x, y) in order:
        label = place(x, y, candidate.variant, taken)
        taken.append(label.box)
        points.append(Point(x, y, candidate.variant, report.status(candidate), label))
    return points


def place(x: float, y: float, text: str, taken: Sequence[Box]) -> Label:
    """The nearest free place for a point's label: inside the frame, over nothing that is taken."""
    frame = Box(LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)

    def cost(label: Label) -> tuple[bool, int, float]:
        covered = sum(label.box.overlaps(box) for box in taken)
        beside = {"start": 0.0, "end": 1.0, "middle": 2.0}[label.anchor]
        return not label.box.inside(frame), covered, abs(label.y - y) + beside

    return min(_places(x, y, LETTER * len(text)), key=cost)


def _places(x: float, y: float, width: float) -> list[Label]:
    places = []
    for offset in range(-HEIGHT, HEIGHT, 4):
        for anchor, left in _sides(x, width).items():
            if anchor == "middle" and abs(offset) < MARKER + LINE / 2:
                continue
            at = y + offset
            box = Box(left, at - LINE / 2, left + width, at + LINE / 2)
            start = {"start": left, "middle": x, "end": left + width}[anchor]
            places.append(Label(start, at, anchor, box, abs(offset) > LINE))
    return places


def _sides(x: float, width: float) -> dict[Anchor, float]:
    """The left end of a label right of a point, left of it, or around it."""
    gap = MARKER + 3
    return {"start": x + gap, "end": x - gap - width, "middle": x - width / 2}

"""Ticks and rows of a served model, from Triton's Prometheus metrics."""

import re
import urllib.request
from typing import NamedTuple

from engine.errors import RuntimeUnavailableError

_COUNTER = re.compile(r'^vitrine_(ticks|rows)_total\{model="(.*)"\} (\S+)$', re.MULTILINE)


class TickCounts(NamedTuple):
    """Network calls and the rows in them."""

    ticks: int
    rows: int

    @property
    def rows_per_tick(self) -> float:
        """Mean batch of a network call; 0 before the first."""
        return self.rows / self.ticks if self.ticks else 0.0

    def since(self, earlier: "TickCounts") -> "TickCounts":
        """What was counted after `earlier`."""
        return TickCounts(self.ticks - earlier.ticks, self.rows - earlier.rows)


def read_tick_counts(url: str, model: str, timeout_s: float = 5) -> TickCounts:
    """Counts of a model since its server started. Raises RuntimeUnavailableError."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as reply:
            text = reply.read().decode()
    except OSError as error:
        raise RuntimeUnavailableError(f"no metrics at {url} ({error}); is it served?") from None
    counts = {
        counter: int(float(value))
        for counter, name, value in _COUNTER.findall(text)
        if name == model
    }
    if not counts:
        raise RuntimeUnavailableError(f"{url} counts no ticks of a model '{model}'")
    return TickCounts(counts["ticks"], counts["rows"])

"""What a long search has measured so far, on disk, so that it can be stopped and gone on with."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

Value = TypeVar("Value", float, list[float], dict[str, float])


class Ledger:
    """Measurements by name in a file of JSON lines; the first line says what they hold for."""

    def __init__(self, path: Path, context: Mapping[str, object]) -> None:
        """Open a ledger; one of another context, or one that is damaged, is begun anew."""
        self._path = path
        self._values: dict[str, object] = {}
        first = json.dumps({"context": context}, sort_keys=True)
        try:
            text = path.read_text("utf-8")
            head, *lines = text.splitlines()
            if head != first or not text.endswith("\n"):
                raise ValueError("of another search, or cut off")
            for line in lines:
                entry = json.loads(line)
                self._values[entry["name"]] = entry["value"]
        except (OSError, ValueError, KeyError, TypeError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(first + "\n", "utf-8")
            self._values = {}
        self.resumed = len(self._values)

    def knows(self, name: str) -> bool:
        """Whether it was measured."""
        return name in self._values

    def recall(self, name: str, measure: Callable[[], Value], kind: type[Value]) -> Value:
        """What was measured under this name, here or before the search was stopped."""
        value = self._values.get(name)
        if isinstance(value, kind):
            return value
        measured = measure()
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, "value": measured}) + "\n")
        self._values[name] = measured
        return measured

"""The hardware that figures were taken on."""

import os
import platform
from pathlib import Path

from engine.options import Options


class Machine(Options):
    """What a speed depends on first, and the last bits of a picture."""

    processor: str
    cores: int | None


def this_machine() -> Machine:
    """The processor as the system names it, with family and model, and the cores that it has."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    found: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    name = found.get("model name") or platform.processor()
    if "cpu family" in found:
        name += f" (family {found['cpu family']}, model {found['model']})"
    return Machine(processor=name, cores=os.cpu_count())

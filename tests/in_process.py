"""The command `vitrine` in this process, whose modules are loaded already."""

import io
import signal
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple

import pytest

import vitrine


class Done(NamedTuple):
    """How a command ended and what it said; lines of `said` are joined."""

    code: int
    out: str
    said: str


def run(*arguments: object) -> Done:
    """Run `vitrine ARGUMENTS` to its end."""
    out, error = io.StringIO(), io.StringIO()
    on_terminate = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(error):
        patch.setattr("sys.argv", ["vitrine", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            vitrine.main()
    signal.signal(signal.SIGTERM, on_terminate)
    code = left.value.code
    assert code is None or isinstance(code, int)
    return Done(code or 0, out.getvalue(), " ".join(error.getvalue().split()))

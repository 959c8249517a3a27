"""Commands in the test's own process: to start Python and torch for each would take most of the time."""

from __future__ import annotations

import sys

import pytest

from thrifty.cli import main


def error_of(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Exit status and the message of a command that fails, which must be one line and the only thing it says."""
    monkeypatch.setattr(sys, "argv", ["thrifty", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return int(str(stop.value.code)), err

"""Ctrl-C as a request that is met between two steps, where the run's state is whole."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


class Interrupt:
    """Inside the block the first SIGINT sets `asked`; the second raises KeyboardInterrupt at once.

    Where SIGINT is not Python's own (ignored in a background job, taken by an application), and outside the main
    thread, it is left alone.
    """

    def __init__(self) -> None:
        self.asked = False
        self.installed = False

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self) -> Interrupt:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            try:
                signal.signal(signal.SIGINT, self._note)
            except ValueError:  # only the main thread may
                return self
            self.installed = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)

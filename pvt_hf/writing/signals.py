"""Signals that ask a program to end. It ends where it is, with an exception that clears what is half-written, or, where
that would lose work, it sees to it itself that it ends soon."""

import os
import signal
import threading
import time
from typing import Any, Self

# By which schedulers ask a program to end. Windows has the first only.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
# A launcher passes on what it gets, and a scheduler sends it to all processes: within so many seconds it is one signal.
_ONE_SIGNAL = 1.0


class Ended(BaseException):
    """A signal asked the program to end.

    Args:
        number: Of the signal.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class EndSignals:
    """While it lasts, the first of some signals raises [`Ended`] in the main thread, or is noted; another, a second or
    more later, kills the program.

    A signal for which the program has a handler of its own is left to that.

    Args:
        *numbers: Of the signals.
        postpone: Whether the first one is only noted, for a program that looks at `received` (default: `False`).

    Attributes:
        received: The number of the first one, `None` before.
    """

    def __init__(self, *numbers: int, postpone: bool = False):
        self.numbers, self.postpone = numbers, postpone
        self.received: int | None = None
        self._time = 0.0
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self.received = None
        if threading.current_thread() is not threading.main_thread():  # where signals arrive
            return self
        for number in self.numbers:
            handler = signal.getsignal(number)
            outer = getattr(handler, "__self__", None)
            if is_ours := isinstance(outer, EndSignals):
                self.received, self._time = outer.received, outer._time  # what it noted is still to be done
            if is_ours or handler in (signal.SIG_DFL, signal.SIG_IGN):
                self._former[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: Any) -> None:
        while self._former:
            signal.signal(*self._former.popitem())

    def _receive(self, number: int, _: Any) -> None:
        if self.received is None:
            self.received, self._time = number, time.monotonic()
            if not self.postpone:
                raise Ended(number)
        elif time.monotonic() - self._time > _ONE_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def ignore_signals(*numbers: int) -> None:
    """For a process whose parent decides when it ends.

    Args:
        *numbers: Of the signals.
    """
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)

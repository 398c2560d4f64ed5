"""How a command ends that writes something whole: with one line for an error, and with nothing half-written."""

import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from transformers.utils.logging import get_verbosity, set_verbosity, set_verbosity_error

from ..writing.signals import Ended, EndSignals
from ..writing.text import escape_control


def run_to_end(run: Callable[[], int], subject: str, expected: tuple[type[Exception], ...], debug: bool = False) -> int:
    """Runs a program.

    Args:
        run: Returns its exit code.
        subject: What it works on, for messages.
        expected: Errors whose messages say all.
        debug: Whether the traceback of an error is shown too (default: `False`).

    Returns:
        The exit code: that of `run`; 1 for an error, which is printed in a line; 130 or 143 if it was interrupted
        (Ctrl-C) or ended (SIGTERM).
    """
    try:
        with EndSignals(signal.SIGTERM):
            return run()
    except (KeyboardInterrupt, Ended) as reason:
        print_error(f"{subject}: interrupted; nothing half-written is left")
        return 128 + (reason.number if isinstance(reason, Ended) else signal.SIGINT)
    except Exception as error:
        if debug:
            traceback.print_exc()
        print_error(describe_error(error, subject, expected))
        return 1


def describe_error(error: Exception, subject: str, expected: tuple[type[Exception], ...]) -> str:
    """What went wrong, for the one who started the program.

    Args:
        error: Of any kind.
        subject: What the program worked on.
        expected: Errors whose messages say all.
    """
    if isinstance(error, expected):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return f"{subject}: {type(error).__name__}: {error} (no error that was thought of; --debug shows where)"


def print_error(message: str) -> None:
    """Prints an error in a line.

    Args:
        message: With names of a user's file in it.
    """
    print(f"error: {escape_control(' '.join(message.split()))}", file=sys.stderr)


def print_line(text: str) -> None:
    """Prints what may have names of a user's file in it.

    Args:
        text: In one line.
    """
    print(escape_control(text))


@contextmanager
def hide_reports() -> Iterator[None]:
    """While it lasts, transformers prints no tables of tensors that do not fit: the error names them in its line."""
    verbosity = get_verbosity()
    set_verbosity_error()
    try:
        yield
    finally:
        set_verbosity(verbosity)

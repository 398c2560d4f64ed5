"""Signals that ask a program to end: once where it is or where it looks, twice at once."""

import os
import signal
import time
from contextlib import suppress

import pytest

from pvt_hf.writing import signals
from pvt_hf.writing.signals import Ended, EndSignals

ASKED = (signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def handlers():
    """Those of this process, which stay."""
    former = [signal.signal(number, signal.SIG_DFL) for number in ASKED]
    yield
    assert [signal.getsignal(number) for number in ASKED] == [signal.SIG_DFL] * 2
    for number, handler in zip(ASKED, former, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ASKED)
def test_a_signal_ends_a_program_where_it_is(number):
    with pytest.raises(Ended) as ended, EndSignals(*ASKED):
        signal.raise_signal(number)
    assert ended.value.number == number and not isinstance(ended.value, Exception)


def test_a_postponed_signal_is_noted_and_one_that_follows_at_once_is_the_same():
    with EndSignals(*ASKED, postpone=True) as asked:
        assert asked.received is None
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)  # from the launcher, which got one too
        assert asked.received == signal.SIGUSR1
    with asked:
        assert asked.received is None


def test_what_is_inside_has_the_signal():
    with pytest.raises(Ended), EndSignals(*ASKED):
        with EndSignals(*ASKED, postpone=True) as inner:
            signal.raise_signal(signal.SIGTERM)
        assert inner.received
        signal.raise_signal(signal.SIGTERM)


def test_what_was_noted_before_is_not_forgotten_inside():
    with EndSignals(*ASKED, postpone=True):
        signal.raise_signal(signal.SIGUSR1)
        with EndSignals(*ASKED, postpone=True) as inner:
            assert inner.received == signal.SIGUSR1


@pytest.mark.parametrize("postpone", [True, False])
def test_another_signal_kills(postpone, monkeypatch):
    monkeypatch.setattr(signals, "_ONE_SIGNAL", 0.01)
    if not (child := os.fork()):
        with EndSignals(*ASKED, postpone=postpone):
            with suppress(Ended):
                signal.raise_signal(signal.SIGUSR1)
            time.sleep(0.05)
            signal.raise_signal(signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_a_handler_of_the_program_stays():
    seen = []
    signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    with EndSignals(*ASKED):
        signal.raise_signal(signal.SIGTERM)
    assert seen == [1]
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

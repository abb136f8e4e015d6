"""SIGINT and SIGTERM in this process: recorded, raised, and handled as before afterwards."""

import os
import signal
from contextlib import suppress

import pytest

from fastiat.system.signals import (
    SignalInterrupt,
    Signals,
    check_interrupts,
    remembering_interrupts,
)

BOTH = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(autouse=True)
def earlier():
    """Handlers that raise `EarlierError` stand for those of the caller; the real ones come back."""
    before = {number: signal.signal(number, _raise_earlier) for number in BOTH}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class EarlierError(Exception):
    pass


def _raise_earlier(*_: object) -> None:
    raise EarlierError


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", BOTH)
def test_the_first_signal_is_recorded_and_a_second_one_gets_the_earlier_handler(number):
    with Signals() as signals:
        assert signals.received == 0
        send(number)
        assert signals.received == number
        with pytest.raises(EarlierError):
            send(number)
    with pytest.raises(EarlierError):
        send(number)


@pytest.mark.parametrize("number", BOTH)
def test_at_once_raises_what_no_except_exception_catches(number):
    with (
        pytest.raises(SignalInterrupt) as raised,
        Signals() as signals,
        suppress(Exception),
        signals.at_once(),
    ):
        send(number)
    assert raised.value.signum == number
    with pytest.raises(SignalInterrupt), Signals() as signals:
        send(number)
        with signals.at_once():
            pytest.fail("a signal that has come already ends the block before it begins")


@pytest.mark.parametrize("number", BOTH)
def test_under_torchrun_a_second_signal_is_recorded_until_a_block_ends_well(number):
    with Signals(second_ends=False) as signals:
        send(number)
        send(number)
    assert signals.received == number
    with pytest.raises(EarlierError):
        send(number)
    with suppress(ValueError), Signals(second_ends=False) as signals:
        raise ValueError
    send(number)  # torchrun's, while this rank prints its message
    assert signals.received == number


def test_an_interrupt_that_is_swallowed_is_raised_in_place_of_the_error_that_follows():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt), remembering_interrupts():
        with suppress(KeyboardInterrupt):
            send(signal.SIGINT)
        raise ImportError("NumPy is half imported")
    with pytest.raises(KeyboardInterrupt):
        check_interrupts()
    with pytest.raises(ImportError), remembering_interrupts():
        raise ImportError("for another reason")
    check_interrupts()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_interrupt_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with remembering_interrupts():
        send(signal.SIGINT)
    check_interrupts()

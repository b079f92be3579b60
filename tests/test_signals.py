"""One stop may be two signals; what comes later is another one."""

import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest

from smolvlm_jax import signals


def _send(number: int, times: int = 1) -> None:
    for _ in range(times):
        os.kill(os.getpid(), number)
        time.sleep(0.001)


@pytest.mark.thorough
def test_what_follows_within_half_a_second_is_the_same_stop():
    came, told = [], threading.Semaphore(0)

    def watch(its):
        while (number := its.next()) is not None:
            came.append(number)
            time.sleep(0.6 if len(came) == 1 else 0)  # an answer that takes long
            told.release()

    with signals.answered(watch):
        _send(signal.SIGTERM, times=3)
        assert told.acquire(timeout=10)
        _send(signal.SIGINT)
        time.sleep(0.7)
        assert came == [signal.SIGTERM]
        _send(signal.SIGINT)
        assert told.acquire(timeout=10) and came == [signal.SIGTERM, signal.SIGINT]


def test_the_same_stop_leaves_the_wait_for_another_as_long_as_it_was():
    waited = []

    def watch(its):
        its.next()
        begun = time.monotonic()
        with pytest.raises(TimeoutError):
            its.next(0.3)
        waited.append(time.monotonic() - begun)

    with signals.answered(watch):
        _send(signal.SIGTERM, times=3)
        deadline = time.monotonic() + 10
        while not waited and time.monotonic() < deadline:
            time.sleep(0.01)
    assert waited and waited[0] >= 0.3


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_stop_is_raised_once_so_that_cleaning_up_is_not_cut_short(monkeypatch, number, kind):
    now = [100.0]
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: now[0]))
    before, cleaned = signal.getsignal(number), False
    with signals.raised():
        with pytest.raises(kind) as stop:
            try:
                _send(number)
            finally:
                _send(number, times=3)
                cleaned = True
        assert cleaned and getattr(stop.value, "code", 143) == 143
        now[0] += 0.6
        with pytest.raises(kind):
            _send(number)
    assert signal.getsignal(number) is before

"""Python's collector is told to look less often only for a while."""

import gc
import threading

import pytest

from smolvlm_jax import load
from smolvlm_jax.garbage import rare_collections


@pytest.fixture(autouse=True)
def thresholds():
    before = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    yield
    gc.set_threshold(*before)


def test_thresholds_come_back_when_the_last_block_ends():
    inside, leave = threading.Event(), threading.Event()

    def other():
        with rare_collections():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with rare_collections(), rare_collections():
        thread.start()
        inside.wait()
        assert gc.get_threshold()[0] > 700
    assert gc.get_threshold()[0] > 700, "the other thread has not ended its block"
    leave.set()
    thread.join()
    assert gc.get_threshold() == (700, 10, 10)


def test_they_come_back_after_an_error_and_after_load():
    with pytest.raises(ValueError, match="no"), rare_collections():
        raise ValueError("no")
    assert gc.get_threshold() == (700, 10, 10)
    load("tiny")
    assert gc.get_threshold() == (700, 10, 10)


@pytest.mark.parametrize("chosen", [(0, 0, 0), (100_000, 50, 50)])
def test_a_process_that_collects_rarely_or_never_is_left_alone(chosen):
    gc.set_threshold(*chosen)
    before = gc.get_threshold()
    with rare_collections():
        assert gc.get_threshold() == before
    assert gc.get_threshold() == before


def test_what_is_chosen_meanwhile_stays():
    with rare_collections():
        gc.set_threshold(1234, 10, 10)
    assert gc.get_threshold()[0] == 1234

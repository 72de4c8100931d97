"""Requests on their way: answers in order, the first error, and a process that ends without them."""

import subprocess
import sys
import threading
import time

import pytest

from oprd_tune.rollout.vllm.in_flight import InFlight

REQUESTS = [([number], {}) for number in range(20)]


def test_answers_come_in_the_order_of_requests_and_not_too_many_at_once():
    lock, running, most, advanced = threading.Lock(), 0, 0, []

    def ask(place, tokens, parameters):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01 * (tokens[0] % 3))
        with lock:
            running -= 1
        return place, tokens[0]

    in_flight = InFlight(ask, REQUESTS, at_once=4)
    assert in_flight.answers(lambda: advanced.append(1)) == [(number, number) for number in range(20)]
    assert len(advanced) == len(in_flight) == 20
    assert 1 < most <= 4


def test_the_first_error_is_raised_and_no_more_is_asked():
    asked = []

    def ask(place, *_):
        asked.append(place)
        if place == 3:
            raise ValueError("three")
        time.sleep(0.01)
        return place

    with pytest.raises(ValueError, match="three"):
        InFlight(ask, REQUESTS, at_once=2).answers()
    time.sleep(0.05)
    assert len(asked) < 8


def test_the_process_may_end_before_its_requests():
    code = "import time; from oprd_tune.rollout.vllm.in_flight import InFlight\n"
    code += "InFlight(lambda *_: time.sleep(60), [([1], {})], 1)"
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert time.monotonic() - started < 30

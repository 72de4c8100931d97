"""Requests that are on their way to servers, while this process does something else."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

from oprd_tune.rollout.vllm.client import Answer

Request = tuple[list[int], dict[str, Any]]


class InFlight:
    """Sends requests from threads as soon as it is made. The threads do not keep the process alive.

    Args:
        ask: sends one request, given its place and what `Sampling.requests` made, and returns the answer.
        requests: all requests, in order.
        at_once: the most requests without an answer.
    """

    def __init__(self, ask: Callable[..., Answer], requests: Sequence[Request], at_once: int) -> None:
        self._ask, self._waiting, self._count = ask, deque(enumerate(requests)), len(requests)
        self._done: SimpleQueue[tuple[int, Answer | Exception]] = SimpleQueue()
        for _ in range(min(self._count, at_once)):
            threading.Thread(target=self._work, daemon=True).start()

    def __len__(self) -> int:
        return self._count

    def answers(self, advance: Callable[[], object] = int) -> list[Answer]:
        """Wait for all answers, in the order of the requests. `advance` is called at each.

        The first request that fails raises its error here, and no other one is sent any more.
        """
        found: dict[int, Answer] = {}
        while len(found) < self._count:
            place, answer = self._done.get()
            if isinstance(answer, Exception):
                raise answer
            found[place] = answer
            advance()
        return [found[place] for place in range(self._count)]

    def stop(self) -> None:
        """Send no request that has not been sent yet."""
        self._waiting.clear()

    def _work(self) -> None:
        while True:
            try:
                place, request = self._waiting.popleft()
            except IndexError:
                return
            try:
                answer: Answer | Exception = self._ask(place, *request)
            except Exception as error:
                answer = error
                self.stop()
            self._done.put((place, answer))

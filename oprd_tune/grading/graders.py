"""Two graders: one compares texts, the other compares mathematical values (`\\boxed{1/2}` equals `0.5`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from oprd_tune.errors import ConfigError
from oprd_tune.grading import answers
from oprd_tune.workers import ProcessPool, process_pool

WORKER = Path(process_pool.__file__).with_name("verdict_worker.py")
_MOST_WORKERS = 8


def exact_match(response: str, answer: str) -> bool:
    """True if response and answer are the same text, apart from white space at both ends."""
    return response.strip() == answer.strip()


class MathAnswer:
    """Grades mathematical answers by math-verify, in processes of its own. No response can stop or break the run.

    The reference is the text after `####`, as in GSM8K, or else the whole answer; within it, the last `\\boxed{…}` if
    there is one. Of a response, the last `\\boxed{…}` counts, else the text after its last `####`, else the last
    `answer is …` or number in its last 2,000 characters, as math-verify finds it. Words and the letters of a choice are
    compared as texts, and everything else by value: fractions, decimals, percentages, sets, intervals, matrices, terms.
    Units and currencies do not count.

    A comparison that exceeds the time limit, or ends its process, counts as wrong, and is counted in `undecided`.
    Workers start with the first comparison, one set in each process of a distributed run, and last until it ends.

    Args:
        seconds: the time limit of one comparison.
        workers: the number of processes; None takes a share of the cores among the ranks of this node, at most 8.
        megabytes: the memory of each worker, where the system can limit it.

    Raises:
        ConfigError: if a limit is not positive.
    """

    def __init__(self, *, seconds: float = 5.0, workers: int | None = None, megabytes: int = 1024) -> None:
        workers = _usual_workers() if workers is None else workers
        for name, value in (("seconds", seconds), ("workers", workers), ("megabytes", megabytes)):
            if not value > 0:
                raise ConfigError(f"grader.{name} is {value}; give a positive number")
        self._seconds = seconds
        self._pool = ProcessPool(WORKER, seconds=seconds, workers=workers, megabytes=megabytes)

    def __call__(self, response: str, answer: str, /) -> bool:
        """Whether a response is right. See `grade`, which is quicker for many."""
        return self.grade([(response, answer)])[0]

    def grade(self, pairs: Sequence[tuple[str, str]], /) -> list[bool]:
        """Whether each response is right, for pairs (response, answer). The workers share the pairs.

        Raises:
            ImportError: without the `eval` extra.
            ChildProcessError: if the workers cannot start.
        """
        if find_spec("math_verify") is None:
            raise ImportError("grading mathematical answers takes math-verify: pip install 'oprd-tune[eval]'")
        questions = [_question(str(response), str(answer)) for response, answer in pairs]
        open_ones = [question for question in questions if not isinstance(question, bool)]
        late, died = self._pool.late, self._pool.died
        try:
            found = iter(self._pool.run(open_ones))
        except ChildProcessError as error:
            raise ChildProcessError(f"{error}; pip install 'oprd-tune[eval]' installs what grading takes") from error
        verdicts = [question if isinstance(question, bool) else bool(next(found)) for question in questions]
        late, died = self._pool.late - late, self._pool.died - died
        if late or died:
            print(
                f"grading: {late + died} of {len(pairs)} answers count as wrong without a verdict: {late} took longer "
                f"than {self._seconds:g} s, {died} ended their process"
            )
        return verdicts

    @property
    def undecided(self) -> int:
        """How many comparisons so far exceeded the time limit or ended their process."""
        return self._pool.late + self._pool.died

    def close(self) -> None:
        """End the workers now. A later call starts new ones."""
        self._pool.close()


def _question(response: str, answer: str) -> bool | tuple[str, str, bool]:
    """A verdict, or what a worker has to decide: response, reference, and whether the response is an answer alone."""
    reference = answers.reference_text(answer)
    stated = answers.stated_answer(response)
    tail = answers.last_part(response)
    said = answers.phrase_after_answer(tail) or tail.strip() if stated is None else stated
    verdict = answers.compare_words(said, reference)
    if verdict is not None:
        return verdict
    if not reference or len(reference) > answers.LONGEST_ANSWER:
        return False
    return (tail if stated is None else answers.tidy(said), answers.tidy(reference), stated is not None)


def _usual_workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1), _MOST_WORKERS)


math_answer = MathAnswer()

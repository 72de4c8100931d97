"""No response stops the grader of mathematics, and its verdicts are those that a person would give."""

import importlib.util
import os
import random
import threading
import time

import pytest

from oprd_tune.errors import ConfigError
from oprd_tune.evaluation.task_accuracy import TaskAccuracy
from oprd_tune.grading import MathAnswer, answers, exact_match, graders, math_answer
from oprd_tune.protocols import BatchGrader
from tests.grading.cases import HOSTILE, KILLER, PLAIN


@pytest.fixture(scope="module")
def grader():
    found = MathAnswer(seconds=20, workers=2)  # generous: other tests run beside this one
    yield found
    found.close()


@pytest.fixture(scope="module")
def impatient():
    found = MathAnswer(seconds=0.5, workers=2)
    yield found
    found.close()


def test_there_are_many_cases():
    assert len(PLAIN) + len(HOSTILE) > 250
    assert len({(response, reference) for response, reference, _ in PLAIN}) == len(PLAIN)


def test_verdicts(grader):
    found = grader.grade([(response, reference) for response, reference, _ in PLAIN])
    wrong = [case for case, verdict in zip(PLAIN, found, strict=True) if verdict != case[2]]
    assert wrong == []
    assert grader.undecided == 0


def test_hostile_texts_get_a_verdict_in_time(impatient, capsys):
    started = time.monotonic()
    found = impatient.grade([(response, reference) for response, reference, _ in HOSTILE])
    assert found == [verdict for *_, verdict in HOSTILE]
    assert 5 < impatient.undecided < len(HOSTILE)
    # Two workers: each job takes at most half a second, and a replacement's start.
    assert time.monotonic() - started < len(HOSTILE) / 2 * 4
    assert f"grading: {impatient.undecided} of {len(HOSTILE)} answers count as wrong" in capsys.readouterr().out
    assert impatient(r"\boxed{\frac{1}{2}}", "0.5")  # a replaced worker works


def test_one_verdict_takes_no_longer_than_its_limit(impatient):
    impatient(r"\boxed{\frac{1}{2}}", "0.5")  # a worker is there
    before, started = impatient.undecided, time.monotonic()
    assert impatient(KILLER, "42") is False
    assert 0.4 < time.monotonic() - started < 3
    assert impatient.undecided == before + 1


def test_references_that_equal_the_response_need_no_worker():
    grader = MathAnswer()
    assert grader(KILLER, KILLER)
    assert grader("#### Monday", "monday")
    assert grader._pool.pids == []


@pytest.mark.parametrize("response", ["\\boxed{" * 15000, "x" * 99_990 + "\\boxed{7}", "####\n" * 20000, "1, " * 33000])
def test_long_responses_are_read_quickly(response):
    started = time.process_time()
    for _ in range(10):
        answers.stated_answer(response)
        answers.phrase_after_answer(answers.last_part(response))
    assert time.process_time() - started < 2


def test_the_batch_equals_single_verdicts(grader):
    pairs = [(response, reference) for response, reference, _ in PLAIN[::20]]
    assert grader.grade(pairs) == [grader(*pair) for pair in pairs]
    assert grader.grade([]) == []


def test_threads_share_the_workers(grader):
    verdicts = {}

    def grade(i):
        verdicts[i] = grader.grade([(f"\\boxed{{\\frac{{{i}}}{{2}}}}", str(j / 2)) for j in range(4)])

    threads = [threading.Thread(target=grade, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == {i: [i == j for j in range(4)] for i in range(4)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_workers_of_its_own(grader):
    grader(r"\boxed{\frac{1}{2}}", "0.5")
    mine = grader._pool.pids
    child = os.fork()
    if child == 0:
        right = grader(r"\boxed{\frac{3}{2}}", "1.5") and not set(grader._pool.pids) & set(mine)
        grader.close()
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert grader(r"\boxed{\frac{1}{2}}", "0.5")
    assert grader._pool.pids == mine


def test_without_math_verify_the_extra_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(graders, "find_spec", lambda name: None if name == "math_verify" else find(name))
    with pytest.raises(ImportError, match=r"pip install 'oprd-tune\[eval\]'"):
        math_answer("1", "1")
    with pytest.raises(ConfigError, match=r"task_accuracy.grader: .*pip install 'oprd-tune\[eval\]'"):
        TaskAccuracy(None, None, grader="oprd_tune.grading.math_answer", max_new_tokens=1)


def test_workers_that_cannot_start_are_found_at_construction(tmp_path):
    grader = MathAnswer()
    grader._pool._program = tmp_path / "worker.py"
    grader._pool._program.write_text("raise SystemExit(7)")
    message = r"task_accuracy.grader: worker.py does not start: exit 7; pip install 'oprd-tune\[eval\]'"
    with pytest.raises(ConfigError, match=message):
        TaskAccuracy(None, None, grader=grader, max_new_tokens=1)


PIECES = [
    "\\boxed{",
    "\\boxed ",
    "}",
    "{",
    "####",
    "\n",
    "$",
    "answer is ",
    "答案是",
    "。",
    "1,000",
    "\\text{",
    " ",
    ".",
]
PIECES += [
    "7",
    "-",
    "x",
    "\\",
    "\x00",
    "\ud800",
    "Monday",
    "(C)",
    "percent",
    "\\frac",
    "1e5",
    "*",
    ":",
    "\\,",
    "\u0660",
]


def test_no_text_breaks_what_reads_it():
    rng = random.Random(0)
    for _ in range(3000):
        response, answer = ("".join(rng.choices(PIECES, k=rng.randint(0, 30))) for _ in range(2))
        found = graders._question(response, answer)
        assert isinstance(found, bool) or max(map(len, found[:2])) < 4000


@pytest.mark.parametrize(("name", "value"), [("seconds", 0), ("workers", 0), ("megabytes", -1)])
def test_limits_are_positive(name, value):
    with pytest.raises(ConfigError, match=f"grader.{name} is {value}; give a positive number"):
        MathAnswer(**{name: value})


def test_ranks_of_a_node_share_its_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(16), raising=False)
    found = {}
    for ranks in ("1", "4", "64"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        found[ranks] = graders._usual_workers()
    assert found == {"1": 8, "4": 4, "64": 1}


def test_only_the_grader_of_mathematics_takes_batches():
    assert isinstance(math_answer, BatchGrader)
    assert not isinstance(exact_match, BatchGrader)

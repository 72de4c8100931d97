import json
import math

import pytest

from oprd_tune.errors import ConfigError
from oprd_tune.metrics.step_log import FILE, StepLog, read_log


def write(folder, steps, *, first_step=0, loss=0.5):
    log = StepLog(folder, first_step=first_step)
    for step in steps:
        log.add(step, {"loss/total": loss}, seconds=step / 2, tokens=10 * step)


def test_a_line_can_be_read_as_soon_as_it_is_written(tmp_path):
    assert read_log(tmp_path) is None
    log = StepLog(tmp_path, first_step=0)
    log.add(0, {"eval/accuracy": 0.25}, seconds=0.0, tokens=0)
    assert read_log(tmp_path) == [{"step": 0, "seconds": 0.0, "tokens": 0, "eval/accuracy": 0.25}]
    log.add(1, {"loss/total": math.nan, "time/step": 1 / 3}, seconds=1 / 3, tokens=7)
    third = 0.33333333
    assert read_log(tmp_path)[1] == {"step": 1, "seconds": third, "tokens": 7, "loss/total": None, "time/step": third}
    assert all(json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / FILE).read_text().splitlines())


def test_steps_that_are_done_again_are_there_once(tmp_path):
    write(tmp_path, (0, 1, 2, 3, 4))
    write(tmp_path, (3, 4, 5), first_step=3, loss=0.25)
    lines = read_log(tmp_path)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert [line["loss/total"] for line in lines] == [0.5, 0.5, 0.5, 0.25, 0.25, 0.25]
    write(tmp_path, (0,))  # a run that starts anew
    assert [line["step"] for line in read_log(tmp_path)] == [0]
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_an_evaluation_that_a_run_does_not_know_goes_and_its_step_stays(tmp_path):
    for evaluated in ({0, 2}, {0}):  # killed after it had caught up on the evaluation of step 2, and again
        log = StepLog(tmp_path, first_step=3 if read_log(tmp_path) else 0, evaluated=evaluated)
        for step in (0, 1, 2) if evaluated == {0, 2} else ():
            log.add(step, {"loss/total": 0.5, "eval/mine": 1.0}, seconds=1.0, tokens=10)
        log.add(2, {"eval/accuracy": 0.5}, seconds=1.0, tokens=10)
    assert [(line["step"], "loss/total" in line) for line in read_log(tmp_path)] == [
        *((0, True), (1, True), (2, True), (2, False))
    ]


def test_a_line_that_is_being_written_is_left_out_and_a_damaged_one_is_told(tmp_path):
    write(tmp_path, (0, 1))
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 2, "sec')
    assert [line["step"] for line in read_log(tmp_path)] == [0, 1]
    with (tmp_path / FILE).open("a") as file:
        file.write("\n")
    write(tmp_path, (), first_step=9)  # a resumption removes it
    write(tmp_path, (2,), first_step=2)
    assert [line["step"] for line in read_log(tmp_path)] == [0, 1, 2]
    (tmp_path / FILE).write_text('{"a": 1}\n' + (tmp_path / FILE).read_text())
    with pytest.raises(ConfigError, match=f"{tmp_path.name}: line 1 of metrics.jsonl is damaged"):
        read_log(tmp_path)

import json
import math
from dataclasses import replace

import pytest
import torch

from oprd_tune.metrics import TensorBoardLogger
from oprd_tune.metrics.history import History
from oprd_tune.metrics.names import METRICS, is_described
from oprd_tune.metrics.step import Metrics, StepResult, rollout_metrics, speed_metrics
from oprd_tune.metrics.tensorboard import GLANCE
from oprd_tune.ranks import Ranks
from oprd_tune.types import LogprobGap, Reading
from tests.losses.test_composite import rollout


def test_sums_are_divided_once():
    metrics = Metrics()
    metrics.add("rollout/entropy", torch.tensor(3.0), 2)
    metrics.add("rollout/entropy", torch.tensor(5.0), 6)
    metrics.add("positions/cosine_quarter_2", torch.tensor(0.0), 0)
    metrics.set("optimizer/lr", 0.5)
    assert metrics.reduce(Ranks()) == {"rollout/entropy": 1.0, "optimizer/lr": 0.5}
    assert metrics.reduce(Ranks()) == {"rollout/entropy": 1.0, "optimizer/lr": 0.5}
    assert Metrics().reduce(Ranks()) == {}


def test_any_name_may_be_logged_and_sums_and_counts_may_be_tensors_or_numbers():
    metrics = Metrics()
    for total, count in ((1.5, torch.tensor(2)), (torch.tensor(2, dtype=torch.int32), 1.0), (0.5, 1)):
        metrics.add("my/own mean, of ‖x‖", total, count)
    metrics.set("", 1)
    assert metrics.reduce(Ranks()) == {"my/own mean, of ‖x‖": 1.0, "": 1}


def test_tokens_add_up_in_fp64_without_their_graph():
    metrics, value_T = Metrics(), torch.full((3,), 0.1, dtype=torch.bfloat16, requires_grad=True)
    metrics.add_each("a", 1e8 + torch.arange(2, dtype=torch.float32))
    metrics.add_each("a", value_T * 2)
    metrics.add_each("a", torch.zeros(0))
    metrics.add("b", value_T.sum(), 3)
    assert metrics.reduce(Ranks())["a"] == pytest.approx((2e8 + 3 * 0.2001953125) / 5, rel=1e-15)
    assert not any(total.requires_grad for total in metrics._sums.values())


def test_merging_adds_sums_and_takes_over_values():
    one, other = Metrics(), Metrics()
    one.add("a", 1.0, 1)
    one.set("c", 1.0)
    other.add("a", 5.0, 2)
    other.add("b", 3.0, 2)
    other.set("c", 2.0)
    one.merge(other)
    one.merge(other, lambda name: f"twice/{name}")
    twice = {"twice/a": 2.5, "twice/b": 1.5, "twice/c": 2.0}
    assert one.reduce(Ranks()) == {"a": 2.0, "b": 1.5, "c": 2.0, **twice}
    assert other.reduce(Ranks()) == {"a": 2.5, "b": 1.5, "c": 2.0}
    one.merge(other, lambda name: "a")
    assert one.reduce(Ranks())["a"] == 2.0  # the value is what counts
    assert StepResult(None, rollout()).metrics is not StepResult(None, rollout()).metrics


def test_every_metric_is_described_once():
    assert len({m.name for m in METRICS}) == len(METRICS)


def test_history_computes_the_gap():
    history = History(teacher_accuracy=0.9)
    assert history.gap_closed(0.5) is None
    history.evaluations = [{"step": 0, "accuracy": 0.4, "perplexity": None}]
    assert math.isclose(history.gap_closed(0.65), 0.5)
    assert history.gap_closed(None) is None
    history.teacher_accuracy = 0.4
    assert history.gap_closed(0.5) is None


def test_the_best_is_the_first_most_accurate_or_else_the_least_perplexed():
    history = History()
    assert history.best is None
    history.evaluations = [{"step": i, "accuracy": None, "perplexity": p} for i, p in enumerate((9.0, 3.0, 5.0))]
    assert history.best["step"] == 1
    for evaluation, accuracy in zip(history.evaluations, (0.5, 0.1, 0.5), strict=True):
        evaluation["accuracy"] = accuracy
    assert history.best["step"] == 0


def test_a_rollout_tells_of_itself():
    told = rollout_metrics(rollout()).reduce(Ranks())
    names = {"rollout/response_tokens", "rollout/truncated_share", "rollout/entropy", "rollout/distinct_4grams"}
    assert told.keys() == names
    assert told["rollout/distinct_4grams"] == 1
    assert (told["rollout/response_tokens"], told["rollout/truncated_share"]) == (4, 0)
    assert told["rollout/entropy"] == pytest.approx(-rollout().sampler_logprobs_BS.sum().item() / 8)
    column_BS = torch.full((2, 9), -1)
    column_BS[0, 2:5] = column_BS[1, 4] = 1  # of these, three are response tokens
    reading = Reading(torch.zeros(2, 4, dtype=torch.long), torch.tensor([4, 4]), column_BS)
    read = replace(rollout(), reading=reading, truncated_B=torch.tensor([True, False]))
    told = rollout_metrics(read).reduce(Ranks())
    assert (told["rollout/matched_share"], told["rollout/truncated_share"]) == (3 / 8, 0.5)
    same = replace(rollout(), tokens_BS=torch.zeros(2, 9, dtype=torch.long))  # 3 equal 4-grams, and too few tokens
    assert rollout_metrics(same).reduce(Ranks())["rollout/distinct_4grams"] == pytest.approx(1 / 3)


def test_seconds_are_told_with_the_speeds_that_follow():
    told = speed_metrics({"rollout": 2.0, "student": 5.0, "sync": 1.0}, sampled=40, read=100).reduce(Ranks())
    assert told == {
        "time/rollout": 2.0,
        "time/student": 5.0,
        "time/sync": 1.0,
        "time/step": 8.0,
        "speed/rollout": 20.0,
        "speed/student": 20.0,
        "speed/step": 5.0,
    }


def test_a_rollout_tells_its_gap_where_one_was_measured():
    assert not [name for name in rollout_metrics(rollout()).reduce(Ranks()) if "gap" in name]
    gap = LogprobGap(mean=0.25, largest=0.5, tokens=7, seconds=3.0)
    metrics = rollout_metrics(replace(rollout(), logprob_gap=gap)).reduce(Ranks())
    assert (metrics["rollout/logprob_gap"], metrics["rollout/logprob_gap_max"]) == (0.25, 0.5)
    assert metrics["rollout/proof_seconds"] == 3.0


def test_history_keeps_the_largest_gap_and_takes_it_through_checkpoints():
    history = History()
    history.add_logprob_gap({"loss/total": 1.0})
    assert history.max_logprob_gap is None
    for gap, largest in ((0.0, 0.0), (0.5, 0.5), (0.25, 0.5), (0.75, 0.75)):
        history.add_logprob_gap({"rollout/logprob_gap_max": gap, "rollout/logprob_gap": 9.0})
        assert history.max_logprob_gap == largest
    resumed = History()
    resumed.load_state_dict(json.loads(json.dumps(history.state_dict())))
    assert resumed.max_logprob_gap == 0.75


def test_history_thins_out_its_heatmap():
    history = History()
    for step in range(1000):
        history.add_cosines(step, {"layers/cosine_01": 0.1, "layers/cosine_02": 0.2, "loss/total": 1.0})
    assert len(history.cosines) <= 256
    assert history.cosines[999] == [0.1, 0.2]
    assert history.layers == [1, 2]
    resumed = History()
    resumed.load_state_dict(history.state_dict())
    for drawn in (history, resumed):
        assert [label.get_text() for label in drawn.cosine_figure().axes[0].get_yticklabels()] == ["1", "2"]


def read_scalars(folder, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    return {e.step: events_value(e) for e in events.Tensors(name)}


def events_value(event):
    from tensorboard.util.tensor_util import make_ndarray

    return float(make_ndarray(event.tensor_proto))


def test_a_resumed_curve_goes_on_where_the_checkpoint_was(tmp_path):
    first = TensorBoardLogger(str(tmp_path))
    for step in (1, 2, 3, 4):
        first.log("loss/total", step, step)
    first.close()
    second = TensorBoardLogger(str(tmp_path))
    second.resume_at(3)
    for step in (3, 4, 5):
        second.log_dict({"loss/total": 10 * step}, step)
    second.log_text("rollout/samples", "text", 5)
    second.close()
    assert read_scalars(tmp_path, "loss/total") == {1: 1, 2: 2, 3: 30, 4: 40, 5: 50}


def test_maps_are_means_cell_by_cell_over_microbatches_and_ranks():
    one, other = Metrics(), Metrics()
    one.add_map("a", torch.tensor([[1.0, 0.0]]), torch.tensor([[2, 0]]))
    other.add_map("a", torch.tensor([[4.0, 0.0]]), torch.tensor([[3, 0]]))
    other.note("n", "second")
    one.note("n", "first")
    one.merge(other)
    ((mean, empty),) = one.reduce_maps(Ranks())["a"]
    assert mean == 1.0
    assert math.isnan(empty)
    assert one.notes == {"n": ["first", "second"]}
    assert Metrics().reduce_maps(Ranks()) == {}


def test_the_charts_that_matter_come_first_and_the_teacher_is_a_line_in_them(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(str(tmp_path))
    logger.log_dict({"eval/accuracy": 0.5, "eval/teacher_accuracy": 0.9, "layers/mse_01": 1.0}, step=3)
    logger.close()
    found = {}
    for folder in ("", "teacher"):
        events = EventAccumulator(str(tmp_path / folder))
        events.Reload()
        for tag in events.Tags()["tensors"]:
            (event,) = events.Tensors(tag)
            found[folder, tag] = (event.step, round(events_value(event), 6))
    assert found == {
        ("", "eval/accuracy"): (3, 0.5),
        ("", "at_a_glance/accuracy"): (3, 0.5),
        ("", "layers/mse_01"): (3, 1.0),
        ("teacher", "eval/accuracy"): (3, 0.9),
        ("teacher", "at_a_glance/accuracy"): (3, 0.9),
    }
    assert min(tag.partition("/")[0] for _, tag in found) == "at_a_glance"


def test_all_charts_of_the_glance_are_described_metrics():
    assert all(is_described(name) for name in GLANCE)


def test_a_map_is_drawn_without_gaps_and_without_changing_it():
    nan = math.nan
    values = [[0.5, nan, 1.0, nan], [0.25, nan, 0.75, nan]]
    history = History(layers=[2, 4])
    drawn = history.map_figure("layers/cosine_by_position", values)
    assert drawn.axes[0].images[0].get_array().tolist() == [[0.5, 0.5, 1.0, 1.0], [0.25, 0.25, 0.75, 0.75]]
    assert [label.get_text() for label in drawn.axes[0].get_yticklabels()] == ["2", "4"]
    assert math.isnan(values[0][1])
    other = history.map_figure("my/map", [[1.0, 2.0, 3.0]])
    assert other.axes[0].get_ylabel() == ""
    assert other.axes[1].get_ylabel() == "my/map"

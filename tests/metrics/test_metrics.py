import json
import math
from dataclasses import replace

import pytest
import torch
from oprd_tune.metrics.buffer import MetricBuffer

from oprd_tune.metrics import TensorBoardLogger
from oprd_tune.metrics.history import History
from oprd_tune.metrics.names import METRICS, check_names
from oprd_tune.ranks import Ranks
from oprd_tune.types import LogprobGap
from tests.losses.test_composite import rollout


def test_buffer_divides_sums_once_and_empties():
    buffer = MetricBuffer()
    buffer.add("rollout/entropy", torch.tensor(3.0), 2)
    buffer.add("rollout/entropy", torch.tensor(5.0), 6)
    buffer.add("positions/cosine_quarter_2", torch.tensor(0.0), 0)
    buffer.set("optimizer/lr", 0.5)
    assert buffer.finish(Ranks()) == {"rollout/entropy": 1.0, "optimizer/lr": 0.5}
    assert buffer.finish(Ranks()) == {}


def test_a_metric_that_is_not_described_cannot_be_logged():
    check_names(["layers/mse_07", "time/rollout", "positions/cosine_quarter_4"])
    check_names(["loss/opd", "token/kl", "token/opd/kl"])
    with pytest.raises(KeyError, match="loss/of/kl"):
        check_names(["loss/of/kl"])
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


def test_a_rollout_tells_its_gap_where_one_was_measured():
    buffer = MetricBuffer()
    buffer.add_rollout(rollout())
    assert not [name for name in buffer.finish(Ranks()) if "gap" in name]
    gap = LogprobGap(mean=0.25, largest=0.5, tokens=7, seconds=3.0)
    buffer.add_rollout(replace(rollout(), logprob_gap=gap))
    metrics = buffer.finish(Ranks())
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
    assert history.cosine_figure([1, 2]).axes


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

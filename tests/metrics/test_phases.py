"""How long phases take, on a CPU and on a GPU's own clock."""

import time

import pytest
import torch

from oprd_tune.metrics.phases import PhaseTimer


def test_time_is_summed_by_phase_until_it_is_taken():
    phase = PhaseTimer(torch.device("cpu"))
    for seconds in (0.02, 0.03):
        with phase("teacher"):
            time.sleep(seconds)
        with phase("student"):
            pass
    with pytest.raises(ValueError, match="no"), phase("optimizer"):
        raise ValueError("no")
    taken = phase.take()
    assert list(taken) == ["teacher", "student"]
    assert taken["teacher"] == pytest.approx(0.05, abs=0.04)
    assert 0 <= taken["student"] < 0.02
    assert phase.take() == {}


def test_on_cuda_no_phase_waits_for_its_kernels(monkeypatch):
    """CUDA's events are replaced, since there is no GPU here: one that is recorded notes the next full second."""
    clock, waits = iter(range(100)), []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.at = next(clock)

        def elapsed_time(self, end):
            assert waits
            return 1000.0 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    phase = PhaseTimer(torch.device("cuda"))
    for _ in range(3):
        with phase("teacher"):
            pass
        with phase("student"):
            next(clock)
    assert waits == []
    assert phase.take() == {"teacher": 3.0, "student": 6.0}
    assert waits == [torch.device("cuda")]

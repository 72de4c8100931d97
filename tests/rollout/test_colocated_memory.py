"""The order in which a colocated engine gives memory back. vLLM is a stand-in: what it models exists on GPUs only."""

import pytest
import torch
import torch.distributed as dist

from oprd_tune.rollout import VLLMColocated


class StandIn:
    """vLLM's engine and its allocator, which cannot unmap what is not mapped."""

    PARTS = frozenset(("weights", "kv_cache"))

    def __init__(self, room=True):
        self.room, self.mapped, self.said = room, set(self.PARTS), []
        self.llm_engine = self.engine_core = self

    def sleep(self, level):
        assert level == 2
        self.mapped.clear()

    def wake_up(self, tags):
        if not self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if tags is None:
            self.mapped |= self.PARTS
        elif not self.mapped & set(tags):  # vLLM leaves all as it is if one of them is awake
            self.mapped |= set(tags)

    def shutdown(self):
        self.said += ["shut down"] + ["CUDA Error: invalid argument"] * (self.mapped != self.PARTS)
        dist.destroy_process_group()


@pytest.fixture
def engine():
    engine = VLLMColocated()
    engine._on_cuda, engine._llm = True, StandIn()
    return engine


@pytest.mark.parametrize("moment", ["asleep", "half awake", "awake"])
def test_an_engine_is_wholly_awake_when_it_ends(engine, moment, process_group):
    llm = engine._llm
    engine._sleep()
    if moment != "asleep":
        engine._wake("weights")
    if moment == "awake":
        engine._wake("kv_cache")
    engine.close()
    assert llm.said == ["shut down"]
    assert dist.is_initialized()  # vLLM ends every group, but this one is the run's


def test_an_engine_that_finds_no_memory_to_wake_ends_all_the_same(engine, process_group):
    llm = engine._llm
    engine._sleep()
    llm.room = False
    engine.close()
    assert llm.said[0] == "shut down"
    assert not hasattr(engine, "_llm")

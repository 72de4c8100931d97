"""Decoding as a GPU does it: steps of fixed shapes that are captured and repeated, and few waits for results.

What needs no GPU runs on a CPU. A tape stands in for a CUDA graph there: it repeats operations on the same tensors,
without the Python code that they came from.
"""

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only
from torchtune import training
from torchtune.models.qwen2 import qwen2
from torchtune.modules import TransformerSelfAttentionLayer

from oprd_tune.modeling.sharding import Sharding, gathered
from oprd_tune.ranks import Ranks
from oprd_tune.rollout.native.caches import SteadyCache
from oprd_tune.rollout.native.decoding import incremental_decoding, unwrapped
from oprd_tune.rollout.native.pace import IMMEDIATE, CapturedStep, Pace, pace_for
from oprd_tune.rollout.native.sampler import Sampler
from tests import conftest
from tests.rollout.test_native import make_prompts, request

LONG = 300  # the cache grows on the way
STEADY = Pace(check_every=16, rows_leave_at=0.5, steady=True)


def make_model():
    return conftest.make_model(build=lambda **shape: qwen2(**{**shape, "max_seq_len": 2048}))


def sample(pace, model=None, *, temperature=1.0, lengths=(5, 2, 7, 1, 3), **asked):
    asked = {"max_new_tokens": LONG, "samples_per_prompt": 3, "top_k_ids": 2, **asked}
    sampler = Sampler(model or make_model(), request(**asked), temperature=temperature, pace=pace)
    return sampler.sample(make_prompts(lengths), stream=5)


def assert_same(found, wanted):
    assert torch.equal(found.tokens_BS, wanted.tokens_BS)
    assert torch.equal(found.response_mask_BS, wanted.response_mask_BS)
    assert torch.equal(found.truncated_B, wanted.truncated_B)
    assert torch.equal(found.sampler_top_ids_BSK, wanted.sampler_top_ids_BSK)
    for name in ("sampler_logprobs_BS", "sampler_top_mass_BS"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize("lengths", [(5, 2, 7, 1, 3), (4, 4, 4, 4, 4)])  # with padding, and without
@pytest.mark.parametrize("check_every", [1, 16, 1000])
@pytest.mark.parametrize("steady", [True, False])
def test_any_pace_samples_the_same(check_every, steady, temperature, lengths):
    pace = Pace(check_every=check_every, rows_leave_at=0.5, steady=steady)
    found, wanted = (sample(p, temperature=temperature, lengths=lengths) for p in (pace, IMMEDIATE))
    assert_same(found, wanted)
    lengths_of_responses = wanted.response_mask_BS.sum(1)
    assert temperature == 0 or lengths_of_responses.min() < 16 < lengths_of_responses.max()


class Waits(TorchDispatchMode):
    """Counts operations whose results the host reads, so that a GPU's queue runs empty."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "is_nonzero", "unique")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func.overloadpacket.__name__.startswith("index") and any(
            index is not None and index.dtype == torch.bool for index in (args[1] if isinstance(args[1], list) else ())
        )
        self.count += by_mask or any(name in func.overloadpacket.__name__ for name in self.NAMES)
        return func(*args, **(kwargs or {}))


def waits(pace, new_tokens):
    with Waits() as found:
        sample(pace, max_new_tokens=new_tokens, stop_tokens=[-1])
    return found.count


def test_the_host_waits_once_every_sixteen_tokens():
    for more in (1, 16, 160):
        assert waits(STEADY, 49 + more) - waits(STEADY, 49) == more // 16
    assert waits(IMMEDIATE, 49 + 16) - waits(IMMEDIATE, 49) == 16


def test_beside_a_captured_step_two_numbers_are_set():
    outside = []

    class Outside(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            outside.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    def captured(step):
        def run():
            with _disable_current_modes():
                step()

        return run

    counts = {}
    for tokens in (50, 61):  # no look at what has ended, and no new room, between the two
        outside.clear()
        with Outside():
            sample(replace(STEADY, repeatable=captured), max_new_tokens=tokens, stop_tokens=[-1])
        counts[tokens] = Counter(outside)
    assert counts[61] - counts[50] == {"aten::fill_": 2 * 11}


class Tape(TorchDispatchMode):
    """Records operations without an effect that lasts, and plays them again."""

    def __init__(self):
        super().__init__()
        self.played = 0
        self._calls, self._made, self._before = [], {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tree_map_only(torch.Tensor, self._remember, (args, kwargs))
        results = func(*args, **kwargs)
        self._calls.append((func, args, kwargs, results))
        tree_map_only(torch.Tensor, lambda t: self._made.setdefault(id(t), t), results)
        return results

    def _remember(self, tensor):
        if id(tensor) not in self._made and id(tensor) not in self._before:
            self._before[id(tensor)] = (tensor, tensor.clone())

    def undo(self):
        for tensor, value in self._before.values():
            tensor.copy_(value)

    def replay(self):
        self.played += 1
        made = {}
        for func, args, kwargs, results in self._calls:
            args, kwargs = tree_map_only(torch.Tensor, lambda t: made.get(id(t), t), (args, kwargs))
            new = func(*args, **kwargs)
            for old, one in zip(*(r if isinstance(r, (tuple, list)) else (r,) for r in (results, new)), strict=True):
                if isinstance(old, torch.Tensor) and id(old) in self._made:
                    made[id(old)] = one


class Stream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def tapes(monkeypatch):
    """CUDA's functions for graphs, over tapes on a CPU; lists the tapes."""
    tapes = []

    def new_tape():
        tapes.append(Tape())
        return tapes[-1]

    @contextmanager
    def capture(tape, *, stream, capture_error_mode):
        with tape:
            yield
        tape.undo()

    @contextmanager
    def on(stream):
        yield

    for name, stand_in in {"CUDAGraph": new_tape, "graph": capture, "stream": on}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Stream)
    return tapes


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_a_captured_step_does_all_that_the_step_does(temperature, tapes):
    captured = replace(STEADY, repeatable=CapturedStep)
    found, wanted = (sample(pace, temperature=temperature, stop_tokens=[1, 4]) for pace in (captured, STEADY))
    assert_same(found, wanted)
    assert torch.equal(found.sampler_logprobs_BS, wanted.sampler_logprobs_BS)
    assert len(tapes) >= (2 if temperature else 1)  # another one after rows have left
    assert all(tape.played > 5 for tape in tapes[:-1])


def test_captures_are_few_and_steps_are_mostly_played(tapes):
    sample(replace(STEADY, repeatable=CapturedStep), max_new_tokens=1000, stop_tokens=[-1])
    assert len(tapes) <= 8
    assert sum(tape.played for tape in tapes) >= 999 - 8


def test_what_cannot_be_captured_says_how_to_go_on_without(tapes, monkeypatch):
    @contextmanager
    def refuse(graph, **_):
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    step = CapturedStep(lambda: None)
    step()
    with pytest.raises(RuntimeError, match="not permitted .*; OPRD_TUNE_NO_CUDA_GRAPHS=1 decodes without"):
        step()


def test_a_steady_caches_tensors_stay_until_room_is_made():
    model, visible = make_model(), torch.tensor([[False, True, True], [True, True, True]])
    with torch.no_grad(), incremental_decoding(model, visible, LONG, steady=True) as cache:
        assert isinstance(cache, SteadyCache)
        model(torch.ones(2, 3, dtype=torch.long), mask=cache.mask(3), input_pos=torch.arange(3).expand(2, 3))
        cache.advance(3)
        places, made = set(), 0
        for column in range(3, 3 + LONG):
            made += cache.make_room()
            assert cache.mask(1).sum((1, 2, 3)).tolist() == [column, column + 1]
            model(torch.ones(2, 1, dtype=torch.long), mask=cache.mask(1), input_pos=torch.full((2, 1), column))
            cache.advance(1)
            places.add(cache._keys_values[0][0].data_ptr())
    assert len(places) == made + 1 <= 4


def test_other_devices_than_cuda_have_results_at_once(monkeypatch):
    model = make_model()
    assert pace_for(model, torch.device("cpu")) is IMMEDIATE
    cuda = torch.device("cuda", 0)
    assert pace_for(model, cuda).repeatable is not CapturedStep  # its weights are elsewhere
    with monkeypatch.context() as patch:
        patch.setattr(model, "parameters", lambda: iter(()))
        assert pace_for(model, cuda) == replace(STEADY, repeatable=CapturedStep)
        patch.setenv("OPRD_TUNE_NO_CUDA_GRAPHS", "1")
        assert pace_for(model, cuda) == STEADY


def test_fsdp_and_checkpointing_stay_out_of_steps(process_group):
    plain, model = make_model(), make_model()
    training.set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
    sharding = Sharding(Ranks())
    for layer in model.layers:
        sharding.block(layer)
    sharding.rest(model)
    calls = []
    for layer in model.layers:
        state = layer._get_fsdp_state()
        state._fsdp_param_group.pre_forward = lambda *args, kept=state._fsdp_param_group.pre_forward: (
            calls.append(None) or kept(*args)
        )
    found = [sample(pace, model) for pace in (STEADY, IMMEDIATE)]
    assert len(calls) == 2 * len(model.layers)  # once over the prompts of each rollout
    assert_same(found[0], found[1])
    assert_same(found[1], sample(IMMEDIATE, plain))
    with gathered(model), unwrapped(model):
        model(torch.tensor([[2, 3]]))
    assert len(calls) == 2 * len(model.layers)
    with gathered(model):
        model(torch.tensor([[2, 3]]))
    assert len(calls) == 3 * len(model.layers)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_on_a_gpu_graphs_sample_what_steps_without_them_do(temperature):
    model = make_model().cuda()
    found, wanted = (sample(pace, model, temperature=temperature) for pace in (None, STEADY))
    assert pace_for(model, torch.device("cuda", 0)).repeatable is CapturedStep
    assert torch.equal(found.tokens_BS, wanted.tokens_BS)
    assert torch.equal(found.sampler_logprobs_BS, wanted.sampler_logprobs_BS)

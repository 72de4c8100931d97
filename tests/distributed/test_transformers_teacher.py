"""A teacher that transformers loads, sharded over two ranks."""

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from oprd_tune.modeling.heads import LMHead
from oprd_tune.modeling.sharding import gathered
from oprd_tune.ranks import Ranks
from oprd_tune.rollout.native.sampler import Sampler
from oprd_tune.teacher import FrozenTeacher, TeacherPlan, transformers_files
from oprd_tune.types import LayerPair, Prompts, SamplingRequest
from tests.distributed.spawn import run_ranks
from tests.teacher.test_transformers_model import LAYERS, REAL, TEXTS, TOKENS, assert_close, load, states, wanted_states
from tests.teacher.transformers_models import DEPTH, save_model

INT8 = "int8_weight_only"
REQUEST = SamplingRequest(
    stop_tokens=frozenset(range(20)),
    pad_id=0,
    max_prompt_tokens=11,
    max_new_tokens=5,
    samples_per_prompt=1,
    seed=0,
)
PROMPTS = Prompts(tuple(tuple(t.tolist()) for t in TEXTS), (0, 1, 2), (None, None, None))


def check(rank, folder, wanted, sampled):
    def sharded(top=None, quantization=None):
        plan = TeacherPlan("sharded", quantization, Ranks(rank, 2))
        files = transformers_files(str(folder), "")
        texts = [text.tolist() for text in TEXTS]
        return plan.load(lambda: None, files, dtype=torch.float32, top=top, prompts=texts)

    teacher, _ = sharded()
    assert all(isinstance(block, FSDPModule) for block in teacher.layers)
    assert all(isinstance(parameter, DTensor) for parameter in teacher.layers.parameters())
    assert not isinstance(LMHead(teacher).weight_VD, DTensor)
    assert_close(states(teacher), wanted)
    assert torch.equal(Sampler(teacher, REQUEST).sample(PROMPTS).tokens_BS, sampled)
    with gathered(teacher):
        assert_close(states(teacher), wanted)
    everywhere = torch.arange(TOKENS.numel())
    frozen = FrozenTeacher(teacher, [LayerPair(layer, layer) for layer in LAYERS[:2]], final=True)
    targets = frozen.targets(TOKENS, everywhere, everywhere)
    assert_close([*targets.states.values(), targets.final_TC], wanted)
    cut, _ = sharded(top=2)
    assert len(cut.layers) == 2 < DEPTH
    assert_close(states(cut, [1, 2]), wanted[:2])
    quantised, errors = sharded(quantization=INT8)
    real = REAL.flatten()
    pairs = [(q[real], exact[real]) for q, exact in zip(states(quantised), wanted, strict=True)]
    by_hand = {n: ((q - exact).norm() / exact.norm()).item() for n, (q, exact) in enumerate(pairs, 1)}
    assert errors == pytest.approx(by_hand, rel=1e-3)
    assert all(0 < error < 0.2 for error in errors.values())


def check_all(rank, cases):
    for case in cases:
        check(rank, *case)


def test_two_ranks_give_the_whole_teachers_states(tmp_path):
    cases = []
    for family in ("gemma3", "qwen3_moe"):
        theirs = save_model(tmp_path / family, family)
        sampled = Sampler(load(tmp_path / family)[0], REQUEST).sample(PROMPTS).tokens_BS
        cases.append((tmp_path / family, wanted_states(theirs), sampled))
    run_ranks(check_all, 2, tmp_path / "ranks", cases)

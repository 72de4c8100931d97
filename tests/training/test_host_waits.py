"""Nothing within an update reads a tensor on the host, which would then wait for the GPU and leave it without work."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from oprd_tune.losses import BridgedMSE, Composite, HiddenStateLoss, HiddenStateMSE
from oprd_tune.losses.composite import as_composite
from oprd_tune.modeling.heads import Heads, LMHead
from oprd_tune.modeling.taps import layer_taps
from oprd_tune.modeling.weights import build_on_meta
from oprd_tune.selection import ResponseTokens, Selection
from oprd_tune.teacher import FrozenTeacher
from oprd_tune.training.gradients import backward
from oprd_tune.types import LayerPair
from tests.conftest import DEPTH, ENDED, SMALL, VOCAB, WIDTH, load_config, make_model, recipe_class
from tests.host_waits import noted_host_waits
from tests.losses.token_losses import LOSSES
from tests.modeling.bridges import make_bridge

PAIRS = [LayerPair(1, 2), LayerPair(2, 2), LayerPair(DEPTH, DEPTH)]


def huber(student_TD, teacher_TD):
    return F.huber_loss(student_TD, teacher_TD, reduction="none").mean(-1)


HIDDEN = {
    "none": HiddenStateMSE,
    "l2": partial(HiddenStateMSE, "l2"),
    "a function": partial(HiddenStateLoss, huber),
    "bridge, l2": BridgedMSE,
    "bridge, variance": partial(BridgedMSE, "variance"),
}


@pytest.fixture
def meta():
    with torch.device("meta"):
        yield


def update(loss, bridge=None):
    """Two microbatches of a composite, as the recipes do it, on tensors without data. Reading one on the host fails."""
    student, teacher = (build_on_meta(make_model) for _ in range(2))
    heads = Heads(LMHead(student), LMHead(teacher), VOCAB)
    frozen = FrozenTeacher(teacher, PAIRS, final=True, bridge=bridge)
    tokens_BS, index_T = torch.zeros(2, 9, dtype=torch.long), torch.zeros(12, dtype=torch.long)
    selection = Selection(index_T, index_T, index_T)
    tokens = ResponseTokens(index_T, index_T, index_T.float(), torch.zeros(12, 3, dtype=torch.long), index_T.float())
    count_P = torch.ones(len(loss.parts))
    with noted_host_waits() as found:
        for _ in range(2):
            targets = frozen.targets(tokens_BS, index_T, index_T)
            stream = loss.stream(targets, tokens, selection, heads=heads, pairs=PAIRS, bridge=bridge)
            with layer_taps(student, stream.layers, stream):
                sum_P = student(tokens_BS)
            backward(sum_P, count_P)
    return found


@pytest.mark.parametrize("name", HIDDEN)
def test_a_loss_on_hidden_states_never_waits(name, meta):
    bridge = None
    if name.startswith("bridge"):
        with torch.device("cpu"):
            bridge = make_bridge(PAIRS, WIDTH, WIDTH, rank=3)
        for own in bridge._layers.values():
            for field, value in vars(own).items():
                object.__setattr__(own, field, value.to("meta"))
    assert update(as_composite(HIDDEN[name]()), bridge) == []


@pytest.mark.parametrize("name", sorted(name for name in LOSSES if not name.startswith("top-k ") or "detached" in name))
def test_a_token_loss_never_waits(name, meta):
    make, _ = LOSSES[name]
    assert update(Composite({"opd": make(chunk_tokens=5), "oprd": HiddenStateMSE()})) == []


@pytest.mark.parametrize(
    ("recipe", "config"),
    [
        ("oprd_distributed", "tiny/oprd"),
        ("oprd_distributed", "tiny/cross_tokenizer"),
        ("opd_topk_distributed", "tiny/oprd_plus_opd"),
        ("opd_topk_distributed", "tiny/opd_topk"),
    ],
)
def test_a_step_waits_for_nothing_between_its_first_microbatch_and_the_optimizer(recipe, config, tmp_path):
    """Top-k counts the rows of the head that it reaches, twice in each backward pass; docs/objectives.md says so."""
    changes = {"tokens_per_micro_batch": 40, "diagnostics_every_n_steps": "null", "max_steps": 2}
    if config == "tiny/cross_tokenizer":
        changes |= {"bridge.prompts": 16, "bridge.held_out_prompts": 4}
    cfg = load_config(config, output_dir=tmp_path / "out", **{**SMALL, **changes})
    run = recipe_class(recipe)(cfg)
    run.setup()
    teacher = run.teachers[0].teacher
    targets, update, waits, passes = teacher.targets, run.student.update, [], []

    def first_targets(*args, **kwargs):
        if not passes:
            scope = noted_host_waits()
            waits.append((scope, scope.__enter__()))
        passes.append(args)
        return targets(*args, **kwargs)

    def last_update(*args, **kwargs):
        waits[-1][0].__exit__(None, None, None)
        assert len(passes) > 1
        passes.clear()
        return update(*args, **kwargs)

    teacher.targets, run.student.update = first_targets, last_update
    assert run.train() in ENDED
    assert len(waits) == 2
    for _, found in waits:
        known = [wait for wait in found if "heads.py" in wait and config == "tiny/opd_topk"]
        assert [wait for wait in found if wait not in known] == []

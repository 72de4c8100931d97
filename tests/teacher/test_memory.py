"""What a teacher takes on a rank's device: each part once, whole or a rank's share of it."""

import pytest
import torch

from oprd_tune.modeling.weights import build_on_meta
from oprd_tune.ranks import Ranks
from oprd_tune.teacher import TeacherPlan
from oprd_tune.teacher.quantize import quantized_bytes
from oprd_tune.tiny import checkpointer, tiny_qwen2
from tests.conftest import make_model
from tests.teacher.test_quantize import held_bytes, linears

DEPTH, INT8 = 4, "int8_weight_only"
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
each_tying = pytest.mark.parametrize("tied", [True, False])


def predict(model, placement="replicated", quantization=None, ranks=1, *, top=DEPTH, keeps_head=True, dtype):
    plan = TeacherPlan(placement, quantization, Ranks(0, ranks))
    return plan.memory_bytes(model, top=top, keeps_head=keeps_head, dtype=dtype)


def held(*modules, dtype):
    """Bytes of parameters in a dtype, and of buffers in their own."""
    parameters = {id(p): p.numel() for module in modules for p in module.parameters()}
    return sum(parameters.values()) * dtype.itemsize + sum(b.nbytes for module in modules for b in module.buffers())


@each_dtype
@each_tying
def test_each_part_counts_once(tied, dtype):
    model = make_model(DEPTH, tied=tied)
    whole, norm = held(model, dtype=dtype), held(model.norm, dtype=dtype)
    head = 0 if tied else held(model.output, dtype=dtype)
    block = sum(p.numel() for p in model.layers[0].parameters()) * dtype.itemsize
    assert predict(model, dtype=dtype) == whole - norm  # too small to count
    assert predict(model, keeps_head=False, dtype=dtype) == whole - norm - head
    for top in (1, 2, 3):
        assert predict(model, top=top, dtype=dtype) == whole - norm - (DEPTH - top) * block
        assert predict(model, "offloaded", top=top, dtype=dtype) == whole - norm - (DEPTH - 1) * block


@each_dtype
@each_tying
@pytest.mark.parametrize("keeps_head", [True, False])
def test_ranks_share_what_is_sharded(keeps_head, tied, dtype):
    """Each has two blocks whole at a time, and the head, with the embedding if they are one; the rest it shares."""
    model = make_model(DEPTH, tied=tied)
    block = sum(p.numel() for p in model.layers[0].parameters()) * dtype.itemsize
    buffers, embedding = sum(b.nbytes for b in model.buffers()), model.tok_embeddings.weight.numel() * dtype.itemsize
    whole = embedding if tied or keeps_head else 0  # an untied head is as large as the embedding
    for ranks, top in ((2, DEPTH), (4, DEPTH), (4, 2)):
        shared = top * block + (0 if tied else embedding)
        got = predict(model, "sharded", None, ranks, top=top, keeps_head=keeps_head, dtype=dtype)
        assert got == shared // ranks + 2 * block + whole + buffers
    alone = predict(model, "sharded", keeps_head=keeps_head, dtype=dtype)
    assert alone == predict(model, keeps_head=keeps_head, dtype=dtype)


@each_dtype
@pytest.mark.parametrize("quantization", [None, INT8])
@pytest.mark.parametrize("top", [2, DEPTH])
def test_it_is_what_a_loaded_teacher_holds(top, quantization, dtype, tmp_path):
    model, plan = build_on_meta(tiny_qwen2), TeacherPlan("replicated", quantization, Ranks())
    files = checkpointer("teacher", str(tmp_path))
    teacher, _ = plan.load(tiny_qwen2, files, dtype=dtype, top=top, prompts=[[3, 4]])
    parts = [p for name, p in teacher.named_parameters() if not name.startswith("norm.")]
    holds = sum(map(held_bytes, parts)) + sum(b.nbytes for b in teacher.buffers())
    rows = sum(linear.out_features for linear in linears(teacher.layers))
    predicted = predict(model, quantization=quantization, top=top, dtype=dtype)
    assert holds <= predicted <= holds + (10 * rows if quantization else 0)


def test_fewer_bits_take_less_wherever_the_teacher_is():
    model = build_on_meta(tiny_qwen2)
    for placement, ranks in (("replicated", 1), ("sharded", 1), ("sharded", 4)):
        plain, quantised = (predict(model, placement, q, ranks, dtype=torch.float32) for q in (None, INT8))
        assert quantised < plain / 2
    one, four = (predict(model, "sharded", INT8, ranks, dtype=torch.float32) for ranks in (1, 4))
    block = quantized_bytes(model.layers[0], INT8, torch.float32)
    assert one - four == DEPTH * block - (DEPTH * block // 4 + 2 * block)

"""What an engine is sent is what transformers reads from the student's export."""

import json
import weakref
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torchtune import training
from torchtune.models.qwen2 import lora_qwen2
from torchtune.models.qwen2._convert_weights import qwen2_tune_to_hf
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.modules.tied_linear import TiedLinear
from torchtune.training import FullModelHFCheckpointer
from transformers import Qwen2Config, Qwen2ForCausalLM

from oprd_tune.modeling.adapters import start_adapters
from oprd_tune.rollout.vllm.policy_weights import PolicyWeights
from oprd_tune.run.export import export_model
from tests.conftest import DEPTH, VOCAB, WIDTH, make_model
from tests.modeling.test_adapters import randomised
from tests.rollout.test_native import policy

KINDS = ("plain", "lora", "dora")
LINEARS = ["q_proj", "k_proj", "v_proj", "output_proj"]
each_tying = pytest.mark.parametrize("tied", [True, False])
each_kind = pytest.mark.parametrize("kind", KINDS)


def make_student(kind, tied, depth=DEPTH):
    """A random student, with adapters as training might leave them."""
    if kind == "plain":
        return make_model(depth, tied=tied)
    arguments = {"lora_attn_modules": LINEARS, "apply_lora_to_mlp": True, "lora_rank": 2, "lora_alpha": 6.0}
    model = make_model(depth, tied=tied, build=lora_qwen2, use_dora=kind == "dora", **arguments)
    start_adapters(model, device=torch.device("cpu"), dtype=torch.float32)
    return randomised(model)


def open_files(folder, tied, depth=DEPTH, model_type="QWEN2"):
    """Makes checkpointers of a Hugging Face folder with other weights than the student's."""
    folder.mkdir(parents=True)
    weights = qwen2_tune_to_hf(make_model(depth, tied=tied, seed=9).state_dict())
    save_file({name: w.clone() for name, w in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": VOCAB, "hidden_size": WIDTH}
    config |= {"intermediate_size": 24, "num_hidden_layers": depth, "num_attention_heads": 4, "num_key_value_heads": 2}
    config |= {"max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "hidden_act": "silu"}
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied, "torch_dtype": "float32"}))
    return partial(FullModelHFCheckpointer, str(folder), ["model.safetensors"], model_type)


def policy_weights(model, folder, *, dtype=torch.float32, vocabulary=VOCAB, ranks=None, **kwargs):
    files = open_files(folder / "files", isinstance(model.output, TiedLinear), **kwargs)(str(folder / "exports"))
    return PolicyWeights(policy(model, files=files, dtype=dtype, vocabulary=vocabulary, ranks=ranks))


def sent(weights):
    """All parts in one; no name may come twice."""
    named = [item for part in weights.parts() for item in part.items()]
    assert len(dict(named)) == len(named)
    return dict(named)


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype
        assert torch.equal(got[name], value), name


@each_tying
@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_names_and_values_are_those_of_the_export_in_transformers(kind, tied, dtype, tmp_path):
    model = make_student(kind, tied)
    files = open_files(tmp_path / "base", tied)
    folder = export_model(model.state_dict(), model, files, tmp_path / "final", dtype=dtype)
    want = Qwen2ForCausalLM.from_pretrained(folder, dtype=dtype).state_dict()
    assert_equal(sent(policy_weights(model, tmp_path, dtype=dtype)), want)


@each_tying
@each_kind
@torch.no_grad()
def test_with_its_config_they_make_a_model_that_gives_the_students_logits(kind, tied, tmp_path):
    """Fewer blocks than the files, and fewer tokens."""
    model, vocabulary = make_student(kind, tied, depth=2), VOCAB - 4
    weights = policy_weights(model, tmp_path, vocabulary=vocabulary)
    loaded = Qwen2ForCausalLM(Qwen2Config(**weights.config)).eval()
    loaded.load_state_dict(sent(weights))
    assert loaded.lm_head.weight.data_ptr() != loaded.model.embed_tokens.weight.data_ptr()
    tokens = torch.randint(0, vocabulary, (2, 9))
    torch.testing.assert_close(loaded(tokens).logits, model(tokens)[..., :vocabulary], rtol=1e-4, atol=5e-5)
    assert weights.config == json.loads(json.dumps(weights.config))
    assert (weights.config["vocab_size"], weights.config["torch_dtype"]) == (vocabulary, "float32")


@each_tying
@each_kind
def test_shapes_are_told_in_the_order_of_the_parts(kind, tied, tmp_path):
    """vLLM's NCCL transfer lays its buffers out by the one and fills them by the other."""
    weights = policy_weights(make_student(kind, tied), tmp_path, vocabulary=7)
    shapes = weights.shapes()
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (7, WIDTH)
    assert list(shapes.items()) == [(name, tuple(w.shape)) for name, w in sent(weights).items()]


@each_kind
def test_a_vocabulary_cuts_embedding_and_head_alone(kind, tmp_path):
    model = make_student(kind, tied=False)
    whole, cut = (
        sent(policy_weights(model, tmp_path / str(size), vocabulary=size, dtype=torch.bfloat16)) for size in (VOCAB, 7)
    )
    by_token = {"model.embed_tokens.weight", "lm_head.weight"}
    assert_equal(cut, {name: w[:7] if name in by_token else w for name, w in whole.items()})


@each_kind
def test_parts_follow_the_student_and_leave_it_alone(kind, tmp_path):
    model = make_student(kind, tied=True)
    weights = policy_weights(model, tmp_path, dtype=torch.bfloat16)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    first = sent(weights)
    assert_equal(model.state_dict(), before)
    with torch.no_grad():
        for parameter in model.parameters():
            if kind == "plain" or parameter.requires_grad:
                parameter.mul_(1.5)
    assert all(not torch.equal(value, first[name]) for name, value in sent(weights).items())


@each_kind
def test_activation_checkpointing_changes_nothing(kind, tmp_path):
    plain, wrapped = make_student(kind, tied=True), make_student(kind, tied=True)
    training.set_activation_checkpointing(wrapped, auto_wrap_policy={TransformerSelfAttentionLayer})
    one, other = policy_weights(plain, tmp_path / "plain"), policy_weights(wrapped, tmp_path / "wrapped")
    assert_equal(sent(other), sent(one))
    assert list(other.shapes().items()) == list(one.shapes().items())


@each_kind
def test_no_part_outlives_the_one_after_it(kind, tmp_path):
    weights = policy_weights(make_student(kind, tied=False), tmp_path, dtype=torch.bfloat16)
    parts, alive, sizes = weights.parts(), [], []
    while (part := next(parts, None)) is not None:
        alive = [*alive, *(weakref.ref(w) for w in part.values())]
        sizes.append(len(part))
        assert sum(w() is not None for w in alive) == len(part)
        del part
    assert sizes == [1, *[12] * DEPTH, 2]

"""Each number of `config.json` that changes outputs is compared with the model; none that differs is silent."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchtune.models.gemma2 import gemma2
from torchtune.models.llama3_1 import llama3_1
from torchtune.models.llama3_2 import llama3_2
from torchtune.models.qwen2 import qwen2
from torchtune.training import FullModelHFCheckpointer
from transformers import Gemma2Config, Gemma2ForCausalLM

from oprd_tune.errors import ConfigError
from oprd_tune.modeling import decoder, hugging_face_checkpointer
from oprd_tune.modeling.families.llama import llama
from oprd_tune.modeling.weights import build_on_meta, check_weights, load_decoder
from tests.modeling.test_families import CPU, LLAMA3, TOKENS, assert_close, files_of, rope, write_reference

BUILDER = {"vocab_size": 61, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32}
BUILDER |= {"intermediate_dim": 48, "max_seq_len": 64, "norm_eps": 1e-5, "rope_base": 500_000}


def check(folder, build=None):
    build = build or (lambda: decoder(str(folder)))
    check_weights("checkpointer", files_of(folder), build_on_meta(build))


def change(folder, **config):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


@pytest.fixture
def llama_folder(tmp_path):
    write_reference(tmp_path / "model", "Llama 3")
    return tmp_path / "model"


def test_the_folder_itself_passes(llama_folder):
    check(llama_folder)
    check(llama_folder, lambda: llama(**BUILDER))


# What a hand-written builder may get wrong without changing a shape, and what may even change one.
WRONG = {
    "rope_theta": ({"rope_base": 10_000}, "rope_theta is 500000.0 in config.json and 10000 in the model"),
    "rope_scaling": (
        {"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_type"}},
        "rope_scaling is None in config.json and .*'llama3'.* in the model",
    ),
    "rms_norm_eps": ({"norm_eps": 1e-2}, "rms_norm_eps is 1e-05 in config.json and 0.01 in the model"),
    "num_hidden_layers": ({"num_layers": 2}, "num_hidden_layers is 3 in config.json and 2 in the model"),
    "num_attention_heads": ({"num_heads": 8}, "num_attention_heads is 4 in config.json and 8 in the model"),
    "num_key_value_heads": ({"num_kv_heads": 4}, "num_key_value_heads is 2 in config.json and 4 in the model"),
    "head_dim": ({"head_dim": 16}, "head_dim is 8 in config.json and 16 in the model"),
    "hidden_size": ({"embed_dim": 64}, "hidden_size is 32 in config.json and 64 in the model"),
    "intermediate_size": ({"intermediate_dim": 50}, "intermediate_size is 48 in config.json and 50 in the model"),
    "vocab_size": ({"vocab_size": 62}, "vocab_size is 61 in config.json and 62 in the model"),
    "tie_word_embeddings": (
        {"tie_word_embeddings": True},
        "tie_word_embeddings is False in config.json and True in the model",
    ),
}


@pytest.mark.parametrize("field", WRONG)
def test_a_builder_with_another_number_is_an_error(field, llama_folder):
    arguments, message = WRONG[field]
    with pytest.raises(ConfigError, match=f"^checkpointer: .*{message}.* oprd_tune.modeling.decoder builds it"):
        check(llama_folder, lambda: llama(**{**BUILDER, **arguments}))


# What config.json may ask for and no builder here does.
ASKED = {
    "attention_bias": ({"attention_bias": True}, "attention_bias is True in config.json and False in the model"),
    "mlp_bias": ({"mlp_bias": True}, "mlp_bias is True in config.json and False in the model"),
    "hidden_act": ({"hidden_act": "gelu"}, "hidden_act is gelu in config.json and silu in the model"),
    "sliding_window": ({"sliding_window": 16}, "sliding_window is 16 in config.json and None in the model"),
    "scaled by another rule": (
        {"rope_parameters": rope(5e5, **{"rope_type": "linear", "factor": 2.0})},
        "rope_scaling is .*'linear'.* in config.json and None in the model",
    ),
    "scaled in the old spelling": (
        {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_scaling is .*'linear'.* in config.json and None in the model",
    ),
    "partial_rotary_factor of scaled rotations": (
        {"rope_parameters": rope(5e5, **LLAMA3, partial_rotary_factor=0.5)},
        "rope_scaling is .*'partial_rotary_factor': 0.5",
    ),
    "final_logit_softcapping": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0 in config.json"),
    "attn_logit_softcapping": ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0 in config.json"),
    "logits_scaling": ({"logits_scaling": 8.0}, "logits_scaling is 8.0 in config.json"),
    "partial_rotary_factor": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5 in config.json"),
}


@pytest.mark.parametrize("field", ASKED)
def test_a_config_that_asks_for_more_is_an_error(field, llama_folder):
    numbers, message = ASKED[field]
    change(llama_folder, **numbers)
    with pytest.raises(ConfigError, match=f"checkpointer: .*{message}.* No builder here can do that"):
        check(llama_folder)


@pytest.mark.parametrize("name", ["Qwen2", "Mistral"])
def test_a_sliding_window_counts_where_layers_have_one(name, tmp_path):
    write_reference(tmp_path / "model", name)
    check(tmp_path / "model")
    if name == "Qwen2":  # has a number for a window that it does not use
        change(tmp_path / "model", sliding_window=16, use_sliding_window=False, layer_types=None)
        check(tmp_path / "model")
        change(tmp_path / "model", use_sliding_window=True, max_window_layers=1)
    else:
        change(tmp_path / "model", sliding_window=16)
    with pytest.raises(ConfigError, match="sliding_window is 16 in config.json and None in the model"):
        check(tmp_path / "model")


def test_a_block_that_differs_is_seen(llama_folder):
    def build():
        model = llama(**BUILDER)
        model.layers[1].mlp_norm.eps = 1e-3
        return model

    with pytest.raises(ConfigError, match=r"rms_norm_eps is 1e-05 in config.json and \[1e-05, 0.001\] in the model"):
        check(llama_folder, build)


@torch.no_grad()
@pytest.mark.parametrize("name", ["Llama 3.1", "Llama 3.2"])
def test_torchtunes_own_builders_work_where_the_numbers_are_theirs(name, tmp_path):
    scaling = {**LLAMA3, "original_max_position_embeddings": 8192, "factor": 8.0 if name == "Llama 3.1" else 32.0}
    reference = write_reference(tmp_path / "model", name, rope_parameters=rope(5e5, **scaling), head_dim=None)
    build = {"Llama 3.1": llama3_1, "Llama 3.2": llama3_2}[name]
    numbers = BUILDER | ({"norm_eps": 1e-6} if name == "Llama 3.2" else {})
    files = FullModelHFCheckpointer(
        str(tmp_path / "model"),
        ["model.safetensors"],
        "LLAMA3_2" if name == "Llama 3.2" else "LLAMA3",
        str(tmp_path / "out"),
    )
    check_weights("checkpointer", files, build_on_meta(lambda: build(**numbers)))
    model = load_decoder(lambda: build(**numbers), files, dtype=torch.float32, device=CPU)
    assert_close(model(TOKENS), reference(TOKENS).logits)
    with pytest.raises(
        ConfigError, match="rope_scaling is .*'factor': .* in config.json and .*'factor': 4.* in the model"
    ):
        check_weights("checkpointer", files, build_on_meta(lambda: build(**numbers, scale_factor=4)))


def test_an_architecture_without_a_test_is_refused_by_name(tmp_path):
    shape = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    Gemma2ForCausalLM(Gemma2Config(**shape, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="model_type gemma2; .* equal outputs for llama, mistral, qwen2, qwen3 alone"):
        hugging_face_checkpointer(str(tmp_path), str(tmp_path / "out"))
    files = FullModelHFCheckpointer(str(tmp_path), ["model.safetensors"], "GEMMA2", str(tmp_path.parent / "out"))
    numbers = {"vocab_size": 61, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "embed_dim": 32}
    model = build_on_meta(lambda: gemma2(**numbers, intermediate_dim=48, max_seq_len=64))
    with pytest.raises(ConfigError, match="^teacher_checkpointer: config.json says model_type gemma2"):
        check_weights("teacher_checkpointer", files, model)


def test_a_llama_folder_is_not_taken_for_qwen(llama_folder, tmp_path):
    files = FullModelHFCheckpointer(str(llama_folder), ["model.safetensors"], "QWEN2", str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="checkpointer.model_type is QWEN2, but config.json says llama: LLAMA3"):
        check_weights("checkpointer", files, build_on_meta(lambda: qwen2(**BUILDER)))


def test_a_stored_head_that_is_not_the_embedding_is_an_error(tmp_path):
    write_reference(folder := tmp_path / "model", "SmolLM2")
    weights = load_file(file := folder / "model.safetensors")
    same = {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file(same, file, metadata={"format": "pt"})
    check(folder)
    save_file({**same, "lm_head.weight": same["lm_head.weight"] * 2}, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="says tie_word_embeddings true, but lm_head.weight is stored and differs"):
        check(folder)


def test_files_that_lack_a_head_or_have_further_blocks_are_told_with_the_likely_reason(tmp_path):
    write_reference(folder := tmp_path / "model", "SmolLM2")
    change(folder, tie_word_embeddings=False)
    with pytest.raises(ConfigError, match=r"lack output.weight. A model without a head of its own .* says tie_word"):
        check(folder)
    change(folder, tie_word_embeddings=True, num_hidden_layers=2)
    with pytest.raises(ConfigError, match=r"have unknown layers.2.* num_hidden_layers may be too small"):
        check(folder)


@pytest.mark.parametrize("length", [0, 999_999_999])
def test_a_context_that_no_memory_holds_is_refused(length, llama_folder):
    with pytest.raises(ConfigError, match=f"max_seq_len is {length}; it must be a whole number"):
        decoder(str(llama_folder), max_seq_len=length)

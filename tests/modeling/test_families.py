"""Every student family against transformers: from `config.json` alone to states, logits, exports and adapters."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torchtune.modules.peft import set_trainable_params
from torchtune.training import MODEL_KEY
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from oprd_tune.errors import ConfigError
from oprd_tune.modeling import decoder, hugging_face_checkpointer
from oprd_tune.modeling.adapters import adapter_names
from oprd_tune.modeling.families import FAMILIES
from oprd_tune.modeling.taps import layer_taps
from oprd_tune.modeling.weights import build_on_meta, check_weights, load_decoder, load_weights
from oprd_tune.run.export import export_model
from tests.modeling.test_adapters import randomised

CPU = torch.device("cpu")
VOCAB, DEPTH = 61, 3
TOKENS = torch.randint(0, VOCAB, (2, 37), generator=torch.Generator().manual_seed(4))
SHAPE = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": DEPTH}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


def rope(theta, **scaling):
    return {"rope_type": "default", "rope_theta": theta, **scaling}


# The scaled context is so short that the tokens above reach each of the three kinds of frequencies.
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
STUDENTS = {
    "Qwen2": (Qwen2ForCausalLM, Qwen2Config, {"rope_parameters": rope(1e6), "tie_word_embeddings": True}),
    "R1-Distill-Qwen": (Qwen2ForCausalLM, Qwen2Config, {"rope_parameters": rope(1e4), "rms_norm_eps": 1e-5}),
    "Qwen3": (
        Qwen3ForCausalLM,
        Qwen3Config,
        {"rope_parameters": rope(1e6), "head_dim": 16, "tie_word_embeddings": True},
    ),
    "Llama 3": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": rope(5e5), "rms_norm_eps": 1e-5}),
    "Llama 3.1": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": rope(5e5, **LLAMA3), "rms_norm_eps": 1e-5}),
    "Llama 3.2": (
        LlamaForCausalLM,
        LlamaConfig,
        {"rope_parameters": rope(5e5, **{**LLAMA3, "factor": 32.0}), "tie_word_embeddings": True, "head_dim": 16},
    ),
    "SmolLM2": (
        LlamaForCausalLM,
        LlamaConfig,
        {"rope_parameters": rope(1e5), "tie_word_embeddings": True, "num_attention_heads": 8, "rms_norm_eps": 1e-5},
    ),
    "Mistral": (MistralForCausalLM, MistralConfig, {"rope_parameters": rope(1e6), "sliding_window": None}),
}
each_student = pytest.mark.parametrize("name", STUDENTS)


def write_reference(folder, name, **changes):
    """A random model of transformers with norms and biases that matter, and its folder."""
    model_class, config_class, numbers = STUDENTS[name]
    torch.manual_seed(3)
    reference = model_class(config_class(**{**SHAPE, **numbers, **changes})).float().eval()
    with torch.no_grad():
        for key, parameter in reference.named_parameters():
            if "norm" in key:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            elif key.endswith("bias"):
                parameter.normal_(0, 0.3)
            else:
                parameter.mul_(5)
    reference.save_pretrained(folder)
    return reference


def files_of(folder):
    return hugging_face_checkpointer(str(folder), str(folder.parent / "out"))


def load(folder, **options):
    """As a run does it."""
    files = files_of(folder)

    def build():
        return decoder(str(folder), **options)

    check_weights("checkpointer", files, build_on_meta(build))
    return load_decoder(build, files, dtype=torch.float32, device=CPU)


def states(model):
    """Every layer's states, the top one's after the final norm."""
    found = []
    with layer_taps(model, range(1, DEPTH + 1), lambda _, state_BSD: found.append(state_BSD) or state_BSD):
        model(TOKENS)
    return found


def assert_close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def perplexity(model):
    logits = model(TOKENS)
    logits = getattr(logits, "logits", logits)
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).exp()


@each_student
@torch.no_grad()
def test_states_and_logits_are_those_of_transformers(name, tmp_path):
    reference = write_reference(tmp_path / "model", name)
    wanted = reference(TOKENS, output_hidden_states=True)
    model = load(tmp_path / "model")
    for state, want in zip(states(model), wanted.hidden_states[1:], strict=True):
        assert_close(state, want)
    assert_close(model(TOKENS), wanted.logits)


@each_student
@torch.no_grad()
def test_an_export_has_the_same_perplexity_in_transformers(name, tmp_path):
    reference = write_reference(tmp_path / "model", name)
    model = load(tmp_path / "model")

    def make_checkpointer(output_dir):
        return hugging_face_checkpointer(str(tmp_path / "model"), output_dir)

    export_model(model.state_dict(), model, make_checkpointer, tmp_path / "final", dtype=torch.float32)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float32).eval()
    assert exported.config.dtype == torch.float32
    torch.testing.assert_close(perplexity(exported), perplexity(reference), rtol=0, atol=0)
    torch.testing.assert_close(perplexity(model), perplexity(reference), rtol=1e-5, atol=0)


def test_an_export_states_its_dtype(tmp_path):
    write_reference(tmp_path / "model", "Llama 3")
    model = load(tmp_path / "model")

    def make_checkpointer(output_dir):
        return hugging_face_checkpointer(str(tmp_path / "model"), output_dir)

    export_model(model.state_dict(), model, make_checkpointer, tmp_path / "final", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "final" / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("use_dora", [False, True])
@each_student
@torch.no_grad()
def test_adapters_train_merge_and_export(name, use_dora, tmp_path):
    """The merged export computes in transformers what the model with adapters computes here."""
    write_reference(tmp_path / "model", name)
    files = files_of(tmp_path / "model")
    model = build_on_meta(lambda: decoder(str(tmp_path / "model"), lora={"rank": 4, "use_dora": use_dora}))
    check_weights("checkpointer", files, model)
    set_trainable_params(model, adapter_names(model))
    load_weights(model, files, dtype=torch.float32, device=CPU)
    randomised(model)
    wanted = model.eval()(TOKENS)

    def make_checkpointer(output_dir):
        return hugging_face_checkpointer(str(tmp_path / "model"), output_dir)

    export_model(model.state_dict(), model, make_checkpointer, tmp_path / "final", dtype=torch.float32)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float32).eval()
    torch.testing.assert_close(exported(TOKENS).logits, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(with_peft(tmp_path), wanted, rtol=1e-4, atol=1e-4)


def with_peft(folder):
    """Logits of the base model in transformers, with the exported adapters added by PEFT's formulas.

    LoRA is W + α/r · B A. DoRA also scales each row to the length in its magnitude vector.
    """
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    config = json.loads((folder / "final" / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == (str(folder / "model"), "CAUSAL_LM")
    adapters = load_file(folder / "final" / "adapter" / "adapter_model.safetensors")
    for key, b in adapters.items():
        if "lora_B" in key:
            name = key.removeprefix("base_model.model.").replace(".lora_B.weight", ".weight")
            change = config["lora_alpha"] / config["r"] * b @ adapters[key.replace("lora_B", "lora_A")]
            weight = base.get_parameter(name)
            weight.add_(change)
            magnitude = adapters.get(key.replace(".lora_B.weight", ".lora_magnitude_vector"))
            if magnitude is not None:
                weight.mul_((magnitude / weight.norm(dim=1))[:, None])
    return base(TOKENS).logits


def test_each_family_is_tested():
    assert {config(**SHAPE).model_type for _, config, _ in STUDENTS.values()} == set(FAMILIES)


@each_student
def test_conversion_there_and_back_changes_no_bit(name, tmp_path):
    write_reference(tmp_path / "model", name)
    stored, files = load_file(tmp_path / "model" / "model.safetensors"), files_of(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    family = FAMILIES[config["model_type"]]
    ours = family.to_tune(stored, config)
    assert ours.keys() == build_on_meta(lambda: decoder(str(tmp_path / "model"))).state_dict().keys()
    assert ours.keys() == files.load_checkpoint()[MODEL_KEY].keys()
    back = family.to_hf(ours, config)
    assert back.keys() == stored.keys()
    assert all(torch.equal(back[key], stored[key]) for key in stored)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"attn_modules": ["qproj"]}, "lora.attn_modules is .'qproj'.; give a list of q_proj, k_proj"),
        ({"attn_modules": "q_proj"}, "lora.attn_modules is 'q_proj'; give a list"),
        ({"attn_modules": [], "apply_to_mlp": False}, "at least one of them, or apply_to_mlp"),
        ({"rank": 0}, "lora.rank is 0; it must be a whole number"),
        ({"use_dora": "yes"}, "lora.use_dora is 'yes'; give true or false"),
        ({"ranks": 8}, "unknown config key 'lora.ranks'; did you mean 'rank'"),
        (8, "lora is 8; give a section"),
    ],
)
def test_adapters_that_would_not_be_what_was_asked_for_are_an_error(lora, message, tmp_path):
    write_reference(tmp_path / "model", "Qwen2")
    with pytest.raises(ConfigError, match=message):
        decoder(str(tmp_path / "model"), lora=lora)

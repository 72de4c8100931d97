"""LoRA and DoRA: they start as the model that they adapt, and merge into what they have become."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torchtune.models.qwen2 import lora_qwen2

from oprd_tune.config import OPRDSettings
from oprd_tune.errors import ConfigError
from oprd_tune.modeling.adapters import (
    adapter_names,
    check_adapters,
    merge_adapters,
    merged_while_gathered,
    start_adapters,
)
from oprd_tune.modeling.freezing import freeze
from oprd_tune.modeling.sharding import Sharding, gathered
from oprd_tune.modeling.taps import collect_states
from oprd_tune.modeling.weights import build_on_meta, load_decoder, load_weights
from oprd_tune.ranks import Ranks
from oprd_tune.run.export import export_model
from oprd_tune.tiny import checkpointer, lora_tiny_qwen2, tiny_qwen2
from oprd_tune.training.student import load_student
from tests.conftest import make_model

CPU = torch.device("cpu")
DEPTH, RANK, ALPHA = 4, 4, 12.0
TOKENS = torch.randint(0, 16, (2, 9), generator=torch.Generator().manual_seed(1))
ADAPTERS = {
    "lora": partial(lora_tiny_qwen2, lora_rank=RANK, lora_alpha=ALPHA),
    "dora": partial(lora_tiny_qwen2, lora_rank=RANK, lora_alpha=ALPHA, use_dora=True),
}
NAMES_IN_HF = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
}
each_kind = pytest.mark.parametrize("kind", ADAPTERS)


@pytest.fixture
def files(tmp_path):
    return checkpointer("student", str(tmp_path / "files"))


def load(files, kind, *, sharding=None, **settings):
    settings = OPRDSettings("out", max_steps=1, max_prompt_tokens=1, max_new_tokens=1, **{"dtype": "fp32", **settings})
    return load_student(ADAPTERS[kind], files, settings, top=DEPTH, trains_head=False, device=CPU, sharding=sharding)


def load_base(files):
    return load_decoder(tiny_qwen2, files, dtype=torch.float32, device=CPU)


def adapters_of(model):
    return {name: parameter for name, parameter in model.named_parameters() if name in adapter_names(model)}


@torch.no_grad()
def randomised(model):
    """With adapters as training might leave them: the same for every model of these names."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in sorted(adapters_of(model).items()):
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        noise = torch.randn(local.shape, generator=generator)
        local.copy_(local * (1 + 0.2 * noise) if "magnitude" in name else 0.05 * noise)
    return model


def assert_close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=5e-5)


@each_kind
def test_fresh_adapters_change_no_output(files, kind):
    want = load_base(files)(TOKENS)
    adapted = load(files, kind)
    assert len(adapters_of(adapted)) == DEPTH * 7 * (3 if kind == "dora" else 2)
    assert torch.equal(adapted(TOKENS), want)
    assert (randomised(adapted)(TOKENS) - want).abs().max() > 0.1


@each_kind
def test_only_adapters_train(files, kind, capsys):
    model = load(files, kind)
    assert "everything but the adapters" in capsys.readouterr().out
    model(TOKENS).sum().backward()
    for name, parameter in model.named_parameters():
        is_adapter = name in adapter_names(model)
        assert parameter.requires_grad == is_adapter
        assert (parameter.grad is not None) == is_adapter


@each_kind
def test_adapters_have_the_masters_dtype_over_a_bf16_base(files, kind):
    model = build_on_meta(ADAPTERS[kind])
    freeze(model, top=DEPTH, trains_head=False, freeze_embedding=False)
    load_weights(model, files, dtype=torch.bfloat16, device=CPU, trained_dtype=torch.float32)
    for loaded in (model, load(files, kind, dtype="bf16", master_dtype="fp32")):
        assert adapters_of(loaded)
        for name, parameter in loaded.named_parameters():
            assert parameter.dtype == (torch.float32 if name in adapter_names(loaded) else torch.bfloat16)


@each_kind
def test_the_start_depends_on_the_seed_alone(files, kind):
    first = adapters_of(load(files, kind, seed=5))
    torch.manual_seed(77)
    before = torch.get_rng_state()
    second, other = adapters_of(load(files, kind, seed=5)), adapters_of(load(files, kind, seed=6))
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in first.items():
        assert torch.equal(second[name], value)
        assert torch.equal(other[name], value) == ("lora_a" not in name)
        assert (value.count_nonzero() == 0) == ("lora_b" in name)


@each_kind
@torch.no_grad()
def test_merged_weights_give_the_adapted_outputs(kind):
    model = make_model(
        build=lora_qwen2,
        tied=False,
        lora_attn_modules=["q_proj", "k_proj", "output_proj"],
        apply_lora_to_mlp=True,
        lora_rank=2,
        lora_alpha=6.0,
        use_dora=kind == "dora",
    )
    start_adapters(model, device=CPU, dtype=torch.float32)
    state = randomised(model).state_dict()
    kept = {name: value.clone() for name, value in state.items()}
    plain = make_model(tied=False, seed=1)
    plain.load_state_dict(merge_adapters(state, model))
    assert_close(plain(TOKENS), model(TOKENS))
    assert state.keys() == kept.keys()
    assert all(torch.equal(state[name], kept[name]) for name in kept)


def test_a_model_without_adapters_keeps_its_state_dict(model):
    state = model.state_dict()
    assert merge_adapters(state, model) is state


@pytest.fixture
def exported(files, kind, tmp_path):
    """An adapted student, and the folder that it was written to."""
    model = randomised(load(files, kind))
    make_checkpointer = partial(checkpointer, "student")
    return model, export_model(model.state_dict(), model, make_checkpointer, tmp_path / "final", dtype=torch.float32)


def written(folder, name):
    (file,) = folder.rglob(name)
    return file


@each_kind
@torch.no_grad()
def test_an_export_gives_the_adapted_logits_in_transformers(exported):
    from transformers import AutoModelForCausalLM

    model, folder = exported
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert_close(loaded(TOKENS).logits, model(TOKENS))


@each_kind
def test_base_and_peft_weights_make_the_merged_weights(exported, files, kind):
    model, folder = exported
    own, merged = model.state_dict(), load_file(written(folder, "model-*.safetensors"))
    peft, base = load_file(written(folder, "adapter_model.safetensors")), load_file(files._checkpoint_paths[0])
    assert len(peft) == len(adapters_of(model))
    for layer in range(DEPTH):
        for tune, hf in NAMES_IN_HF.items():
            key = f"model.layers.{layer}.{hf}"
            a, b = (peft[f"base_model.model.{key}.{name}.weight"] for name in ("lora_A", "lora_B"))
            assert torch.equal(b, own[f"layers.{layer}.{tune}.lora_b.weight"])
            want = base[f"{key}.weight"] + ALPHA / RANK * b @ a
            if kind == "dora":
                want *= (peft[f"base_model.model.{key}.lora_magnitude_vector"] / want.norm(dim=1)).unsqueeze(1)
            torch.testing.assert_close(merged[f"{key}.weight"], want, rtol=1e-5, atol=1e-6)


@each_kind
def test_an_export_describes_its_adapters(exported, kind):
    model, folder = exported
    described = json.loads(written(folder, "adapter_config.json").read_text())
    assert (described["r"], described["lora_alpha"], described["peft_type"]) == (RANK, ALPHA, "LORA")
    assert described["use_dora"] == (kind == "dora")
    linears = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(described["target_modules"]) == linears
    saved = torch.load(written(folder, "adapter_model.pt"), weights_only=True)
    assert saved.keys() == adapters_of(model).keys()
    assert all(torch.equal(saved[name], value) for name, value in adapters_of(model).items())
    assert not any("lora" in name or "magnitude" in name for name in load_file(written(folder, "model-*.safetensors")))


@each_kind
def test_transformers_with_peft_finds_no_adapters_to_add_to_merged_weights(exported):
    """Where PEFT is installed, `from_pretrained` also applies the adapters that lie beside the weights."""
    assert not (exported[1] / "adapter_config.json").exists()


@each_kind
@torch.no_grad()
def test_a_gathered_model_runs_with_its_adapters_merged(files, kind, process_group):
    whole, model = randomised(load(files, kind)), randomised(load(files, kind, sharding=Sharding(Ranks())))
    linears = [module for module in model.modules() if hasattr(module, "adapter_params")]
    shards = {name: parameter.to_local().clone() for name, parameter in model.named_parameters()}

    def assert_unchanged():
        assert not any(linear.disabled for linear in linears)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.to_local(), shards[name]), name
        (got,), (want,) = (collect_states(m, TOKENS, [(DEPTH, torch.arange(18), None)]) for m in (model, whole))
        assert torch.equal(got, want)

    assert len(linears) == DEPTH * 7
    with gathered(model), merged_while_gathered(model):
        assert all(linear.disabled for linear in linears)
        assert_close(model(TOKENS), whole(TOKENS))
    assert_unchanged()

    with pytest.raises(RuntimeError, match="stop"), gathered(model), merged_while_gathered(model):
        raise RuntimeError("stop")
    assert_unchanged()


@each_kind
@torch.no_grad()
def test_a_model_that_is_not_sharded_keeps_its_adapters_apart(files, kind):
    model = randomised(load(files, kind))
    want = model(TOKENS)
    with gathered(model), merged_while_gathered(model):
        assert torch.equal(model(TOKENS), want)


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_quantised_base_is_refused(use_dora):
    def build(**kwargs):
        shape = {"vocab_size": 16, "num_layers": 1, "num_heads": 4, "num_kv_heads": 4, "embed_dim": 128}
        shape |= {"intermediate_dim": 64, "max_seq_len": 8, "lora_rank": 2, "lora_alpha": 4.0, "use_dora": use_dora}
        return build_on_meta(partial(lora_qwen2, ["q_proj"], **shape, **kwargs))

    check_adapters("model", build())
    with pytest.raises(ConfigError, match=r"^model\.quantize_base is not supported; leave it out"):
        check_adapters("model", build(quantize_base=True))

"""Qwen3 against transformers: states, logits, folders both ways; and everywhere else that a model goes."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchtune import training
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.modules.peft import set_trainable_params
from torchtune.training import MODEL_KEY, FullModelHFCheckpointer
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from oprd_tune import modeling
from oprd_tune.config import Component
from oprd_tune.errors import ConfigError
from oprd_tune.modeling import hugging_face_checkpointer
from oprd_tune.modeling.adapters import adapter_names, start_adapters
from oprd_tune.modeling.families.qwen3 import lora_qwen3, qwen3, qwen3_hf_to_tune, qwen3_tune_to_hf
from oprd_tune.modeling.sharding import Sharding
from oprd_tune.modeling.taps import layer_taps
from oprd_tune.modeling.weights import build_on_meta, check_weights, load_decoder, load_weights, open_checkpointer
from oprd_tune.protocols import Policy
from oprd_tune.ranks import Ranks
from oprd_tune.rollout.native.decoding import incremental_decoding
from oprd_tune.rollout.vllm.policy_weights import PolicyWeights
from oprd_tune.run.export import export_model
from oprd_tune.teacher import load_teacher
from oprd_tune.teacher.quantize import Int8Linear
from tests.distributed.spawn import run_ranks
from tests.modeling.test_adapters import randomised

CPU = torch.device("cpu")
VOCAB, WIDTH, DEPTH = 61, 40, 3
SHAPE = {"vocab_size": VOCAB, "num_layers": DEPTH, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
SHAPE |= {"embed_dim": WIDTH, "intermediate_dim": 48, "max_seq_len": 64, "rope_base": 10_000.0}
TOKENS = torch.randint(0, VOCAB, (2, 11), generator=torch.Generator().manual_seed(4))
HF = {"vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": DEPTH}
HF |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64}
LINEARS = ["q_proj", "k_proj", "v_proj", "output_proj"]
each_tying = pytest.mark.parametrize("tied", [True, False])


def write_reference(folder, tied, **config):
    """A random model of transformers, with norms that matter, and its folder."""
    torch.manual_seed(tied)
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    reference = Qwen3ForCausalLM(Qwen3Config(**{**HF, "rope_parameters": rope, "tie_word_embeddings": tied, **config}))
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.mul_(torch.rand_like(parameter) + 0.5) if "norm" in name else parameter.mul_(5)
    reference.float().eval().save_pretrained(folder)
    return reference


def open_files(folder, **kwargs):
    return hugging_face_checkpointer(str(folder), str(folder.parent / "out"), model_type="QWEN3", **kwargs)


def load(folder, tied):
    """As a run does it."""
    build, files = partial(qwen3, **SHAPE, tie_word_embeddings=tied), open_files(folder)
    check_weights("checkpointer", files, build_on_meta(build))
    return load_decoder(build, files, dtype=torch.float32, device=CPU)


def states(model, tokens=TOKENS):
    """Every layer's states, the top one's after the final norm."""
    found = []
    with layer_taps(model, range(1, DEPTH + 1), lambda _, state_BSD: found.append(state_BSD) or state_BSD):
        model(tokens)
    return found


def assert_close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.fixture
def reference(tied, tmp_path):
    return write_reference(tmp_path / "model", tied)


@each_tying
@torch.no_grad()
def test_states_and_logits_are_those_of_transformers(reference, tied, tmp_path):
    wanted = reference(TOKENS, output_hidden_states=True)
    model = load(tmp_path / "model", tied)
    for state, want in zip(states(model), wanted.hidden_states[1:], strict=True):
        assert_close(state, want)
    assert_close(model(TOKENS), wanted.logits)


@each_tying
def test_conversion_there_and_back_changes_no_bit(reference, tied, tmp_path):
    theirs = load_file(tmp_path / "model" / "model.safetensors")
    ours = qwen3_hf_to_tune(theirs, tie_word_embeddings=tied)
    assert ours.keys() == build_on_meta(partial(qwen3, **SHAPE, tie_word_embeddings=tied)).state_dict().keys()
    back = qwen3_tune_to_hf(ours)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)
    assert ("output.weight" in ours) == (not tied)


def split(folder):
    """The folder's weights in two files; a tied head, as some folders have it, alone in the second one."""
    weights = load_file(file := folder / "model.safetensors")
    file.unlink()
    parts = [{k: v for k, v in weights.items() if k != "lm_head.weight"}]
    parts.append({"lm_head.weight": weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).clone()})
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name, metadata={"format": "pt"})
    weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(("tied", "files"), [(True, 2), (False, 1)])
@torch.no_grad()
def test_an_export_is_a_whole_folder_for_transformers(reference, tied, files, tmp_path):
    if files == 2:
        split(tmp_path / "model")
    model = load(tmp_path / "model", tied)
    for parameter in model.parameters():
        parameter.mul_(1.1)
    make_files = partial(hugging_face_checkpointer, str(tmp_path / "model"), model_type="QWEN3")
    folder = export_model(model.state_dict(), model, make_files, tmp_path / "final", dtype=torch.float32)
    again, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert type(again) is Qwen3ForCausalLM
    assert not any(report.values())
    assert_close(again.eval()(TOKENS).logits, model(TOKENS))
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == {key for file in folder.glob("*.safetensors") for key in load_file(file)}
    assert torch.equal(load(folder, tied)(TOKENS), model(TOKENS))


@each_tying
@torch.no_grad()
def test_decoding_with_a_cache_gives_the_logits_of_a_full_forward(reference, tied, tmp_path):
    model, prompt = load(tmp_path / "model", tied), 4
    visible = torch.ones(2, prompt, dtype=torch.bool)
    visible[1, :2] = False  # a shorter prompt, padded on the left
    rows = [model(TOKENS[:1]), model(TOKENS[1:, 2:])]
    with incremental_decoding(model, visible, TOKENS.shape[1]) as cache:
        positions = (visible.cumsum(1) - 1).clamp(min=0)
        got = [model(TOKENS[:, :prompt], mask=cache.mask(prompt), input_pos=positions)]
        cache.advance(prompt)
        for column in range(prompt, TOKENS.shape[1]):
            positions = torch.tensor([[column], [column - 2]])
            got.append(model(TOKENS[:, column : column + 1], mask=cache.mask(1), input_pos=positions))
            cache.advance(1)
    logits = torch.cat(got, 1)
    assert_close(logits[0], rows[0][0, prompt - 1 :])
    assert_close(logits[1], rows[1][0, prompt - 3 :])


def test_recomputed_blocks_have_the_same_states_and_gradients(tmp_path):
    write_reference(tmp_path / "model", True)
    plain, recomputed = (load(tmp_path / "model", True) for _ in range(2))
    training.set_activation_checkpointing(recomputed, auto_wrap_policy={TransformerSelfAttentionLayer})
    for model in (plain, recomputed):
        torch.stack([state.square().mean() for state in states(model)]).sum().backward()
    for one, other in zip(plain.parameters(), recomputed.parameters(), strict=True):
        assert one.grad.abs().max() > 0
        assert torch.equal(one.grad, other.grad)


@each_tying
@torch.no_grad()
def test_what_vllm_gets_makes_the_students_model(reference, tied, tmp_path):
    """From fewer blocks and tokens than the folder has."""
    model = load(tmp_path / "model", tied)
    model.layers = model.layers[:2]
    weights = PolicyWeights(policy(model, tmp_path / "model", 50, Ranks()))
    sent = {name: value for part in weights.parts() for name, value in part.items()}
    assert {name: tuple(value.shape) for name, value in sent.items()} == weights.shapes()
    engine = Qwen3ForCausalLM(Qwen3Config(**weights.config)).eval()
    engine.load_state_dict(sent)
    assert_close(engine(TOKENS % 50).logits, model(TOKENS % 50)[..., :50])


def policy(model, folder, vocabulary, ranks):
    return Policy(model, open_files(folder), torch.float32, vocabulary, ranks, folder.parent)


def load_quantised(folder, sharding=None):
    build = partial(qwen3, **SHAPE, tie_word_embeddings=True)
    arguments = {"dtype": torch.float32, "device": CPU, "quantization": "int8_weight_only"}
    return load_teacher(build, open_files(folder), prompts=[TOKENS[0].tolist()], sharding=sharding, **arguments)


def test_a_teacher_in_int8_is_close(tmp_path):
    reference = write_reference(tmp_path / "model", True)
    teacher, errors = load_quantised(tmp_path / "model")
    linears = [m for block in teacher.layers for m in block.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == DEPTH * 7
    assert all(type(linear.weight) is not nn.Parameter for linear in linears)
    assert all(0 < error < 0.05 for error in errors.values())
    with torch.no_grad():
        got, want = teacher(TOKENS), reference(TOKENS).logits
    assert 0 < (got - want).norm() / want.norm() < 0.05


def on_two_ranks(rank, folder):
    ranks = Ranks(rank, 2)
    whole, model = (load(folder / "model", True) for _ in range(2))
    training.set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
    sharding = Sharding(ranks)
    for block in model.layers:
        sharding.block(block)
    sharding.rest(model)
    own = TOKENS.roll(rank, 0)
    assert all(map(torch.equal, states(model, own), states(whole, own)))
    sent, wanted = (
        {name: value for part in weights.parts() for name, value in part.items()}
        for weights in (PolicyWeights(policy(m, folder / "model", VOCAB, ranks)) for m in (model, whole))
    )
    assert sent.keys() == wanted.keys()
    assert all(torch.equal(sent[name], wanted[name]) for name in wanted)
    teacher, errors = load_quantised(folder / "model", sharding)
    assert sum(isinstance(module, Int8Linear) for module in teacher.modules()) == DEPTH * 7
    assert all(0 < error < 0.05 for error in errors.values())
    with torch.no_grad():
        got, want = (torch.cat(states(m, own)) for m in (teacher, whole))
    assert 0 < (got - want).norm() / want.norm() < 0.05


def test_sharded_over_two_ranks_it_is_the_same_model(tmp_path):
    write_reference(tmp_path / "model", True)
    run_ranks(on_two_ranks, 2, tmp_path / "ranks", tmp_path)


@pytest.mark.parametrize("use_dora", [False, True])
@each_tying
@torch.no_grad()
def test_adapters_start_as_nothing_and_are_exported_merged_and_apart(reference, tied, use_dora, tmp_path):
    arguments = {"lora_attn_modules": LINEARS, "apply_lora_to_mlp": True, "lora_rank": 2, "lora_alpha": 6.0}
    build = partial(lora_qwen3, **arguments, use_dora=use_dora, **SHAPE, tie_word_embeddings=tied)
    model, files = build_on_meta(build), open_files(tmp_path / "model")
    check_weights("checkpointer", files, model)
    set_trainable_params(model, adapter_names(model))
    load_weights(model, files, dtype=torch.float32, device=CPU)
    assert len(adapter_names(model)) == DEPTH * 7 * (3 if use_dora else 2)
    assert_close(model(TOKENS), reference(TOKENS).logits)

    start_adapters(model, device=CPU, dtype=torch.float32)
    logits = randomised(model)(TOKENS)
    assert (logits - reference(TOKENS).logits).abs().max() > 0.1
    make_files = partial(hugging_face_checkpointer, str(tmp_path / "model"), model_type="QWEN3")
    folder = export_model(model.state_dict(), model, make_files, tmp_path / "final", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.testing.assert_close(merged(TOKENS).logits, logits, rtol=1e-4, atol=5e-5)
    peft = load_file(folder / "adapter" / "adapter_model.safetensors")
    b = peft["base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"]
    assert torch.equal(b, model.state_dict()["layers.1.attn.k_proj.linear.lora_b.weight"])
    assert len(peft) == len(adapter_names(model))
    described = json.loads((folder / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert set(described) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("modules", [["q_norm"], []])
def test_adapters_of_nothing_are_an_error(modules):
    with pytest.raises(ConfigError, match="lora_attn_modules is .* allowed are q_proj, k_proj"):
        lora_qwen3(modules, **SHAPE)


def change(folder, **config):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def edit(folder, changes):
    """Change weights by name; None removes one."""
    weights = {**load_file(folder / "model.safetensors"), **changes}
    kept = {k: v for k, v in weights.items() if v is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


NORM, BIAS = "model.layers.1.self_attn.k_norm.weight", "model.layers.0.self_attn.q_proj.bias"
MISTAKES = {
    "missing": (lambda f: edit(f, {NORM: None}), "their files lack layers.1.attn.k_proj.norm.scale"),
    "misshapen": (lambda f: edit(f, {NORM: torch.ones(8)}), r"other shapes of layers.1.attn.k_proj.norm.scale \(8,\)"),
    "biases": (lambda f: edit(f, {BIAS: torch.ones(64)}), "is not of the architecture Qwen3: .*q_proj.bias"),
    "another architecture": (
        lambda f: change(f, model_type="qwen2"),
        "model_type is QWEN3, but config.json says qwen2",
    ),
    "a head": (
        lambda f: change(f, tie_word_embeddings=False),
        "tie_word_embeddings is False in config.json and True in the model",
    ),
    "rotations": (
        lambda f: change(f, rope_parameters={"rope_theta": 5e6}),
        r"rope_theta is 5000000.0 in config.json and 10000.0 in the model",
    ),
    "scaled rotations": (
        lambda f: change(f, rope_parameters={"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0}),
        "rope_scaling is .*'yarn'.* in config.json and None in the model",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_weights_that_do_not_fit_are_explained(mistake, tmp_path):
    make, message = MISTAKES[mistake]
    write_reference(tmp_path / "model", True)
    make(tmp_path / "model")
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "model", True)


def test_a_folder_of_qwen3_is_not_taken_for_another(tmp_path):
    write_reference(tmp_path / "model", True)
    folder, out = str(tmp_path / "model"), str(tmp_path / "out")
    for kind in ("QWEN2", "LLAMA3"):
        with pytest.raises(ConfigError, match=f"model_type is {kind}, but config.json says qwen3; leave it out"):
            hugging_face_checkpointer(folder, out, model_type=kind)
        files = FullModelHFCheckpointer(folder, ["model.safetensors"], kind, out)
        model = build_on_meta(partial(qwen3, **SHAPE, tie_word_embeddings=True))
        with pytest.raises(ConfigError, match=f"checkpointer.model_type is {kind}, but config.json says qwen3: QWEN3"):
            check_weights("checkpointer", files, model)
    with pytest.raises(ConfigError, match="model_type is QWEN4; leave it out, or give one of .*QWEN2, QWEN3"):
        hugging_face_checkpointer(folder, out, model_type="QWEN4")
    section = {"_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_dir": folder}
    section |= {"checkpoint_files": ["model.safetensors"], "model_type": "QWEN3"}
    with pytest.raises(ConfigError, match="'QWEN3' is not known to torchtune's checkpointer; use oprd_tune.modeling"):
        open_checkpointer(Component.find("x", section), out)


def test_torchtunes_own_qwen2_is_left_as_it_was(tmp_path):
    write_reference(tmp_path / "model", True)
    assert len(open_files(tmp_path / "model").load_checkpoint()[MODEL_KEY]) == 11 * DEPTH + 2
    files = FullModelHFCheckpointer(str(tmp_path / "model"), ["model.safetensors"], "QWEN2", str(tmp_path / "out"))
    with pytest.raises(Exception, match="unexpected key"):
        files.load_checkpoint()


# Layers, heads, width, inner width, tied, and the parameters that the model cards count.
SIZES = {
    "0_6b": (28, 16, 1024, 3072, True, 596_049_920),
    "1_7b": (28, 16, 2048, 6144, True, 1_720_574_976),
    "4b": (36, 32, 2560, 9728, True, 4_022_468_096),
    "8b": (36, 32, 4096, 12_288, False, 8_190_735_360),
    "14b": (40, 40, 5120, 17_408, False, 14_768_307_200),
    "32b": (64, 64, 5120, 25_600, False, 32_762_123_264),
}


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_those_of_transformers(size):
    layers, heads, width, inner, tied, parameters = SIZES[size]
    model = build_on_meta(getattr(modeling, f"qwen3_{size}"))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert len(model.layers) == layers
    assert (model.max_seq_len, model.layers[0].attn.pos_embeddings.base, model.norm.eps) == (40_960, 1e6, 1e-6)
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_attention_heads": heads, "num_key_value_heads": 8}
    with torch.device("meta"):
        reference = Qwen3ForCausalLM(Qwen3Config(**sizes, num_hidden_layers=1, tie_word_embeddings=tied))
    theirs = {name: value for name, value in reference.state_dict().items() if not (tied and name == "lm_head.weight")}
    model.layers = model.layers[:1]
    ours = qwen3_tune_to_hf(model.state_dict())
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}
    adapted = build_on_meta(partial(getattr(modeling, f"lora_qwen3_{size}"), ["q_proj"], max_seq_len=512))
    assert len(adapted.layers) == layers
    assert len(adapter_names(adapted)) == 2 * layers
    assert adapted.max_seq_len == 512

"""Pruned folders against transformers' own models with the same parts taken out or silenced."""

import gc
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from oprd_tune.errors import ConfigError
from oprd_tune.modeling.folders import read_config
from oprd_tune.pruning.cutting import Kept, cut_weights
from oprd_tune.pruning.importance import largest, least_changing, measure_blocks, measure_width, perplexity
from oprd_tune.pruning.pruner import prune
from oprd_tune.pruning.request import Request, check_request, read_source
from tests.conftest import run_recipe
from tests.modeling.test_families import SHAPE, STUDENTS, TOKENS, assert_close, load, write_reference
from tests.modeling.test_families import perplexity as perplexity_of_all

FAMILIES = ("Qwen2", "R1-Distill-Qwen", "Qwen3", "Llama 3.1", "SmolLM2", "Mistral")
each_family = pytest.mark.parametrize("name", FAMILIES)
CPU, DEPTH = torch.device("cpu"), 4
ROWS = TOKENS.tolist()
FREE_HEADS = ("Qwen3", "Llama 3.1", "SmolLM2", "Mistral")  # the others need width = heads x head size


@pytest.fixture(scope="module", autouse=True)
def _quick_collections():
    """torchtune collects garbage whenever it has read a folder, and looks at every object of transformers each time."""
    gc.freeze()
    yield
    gc.unfreeze()


def make(folder, name):
    return write_reference(folder, name, num_hidden_layers=DEPTH)


def pruned(folder, out, **request):
    """Prune as the command does it; returns what came of it, and the new model in transformers and here."""
    source, wanted = read_source(folder), Request(**request)
    check_request(wanted, source)
    found = prune(source, wanted, ROWS, out, dtype=torch.float32, device=CPU)
    return found, AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval(), load(out)


def without(reference, dropped):
    reference.model.layers = nn.ModuleList(
        block for number, block in enumerate(reference.model.layers, 1) if number not in dropped
    )
    reference.config.num_hidden_layers = len(reference.model.layers)
    for place, block in enumerate(reference.model.layers):
        block.self_attn.layer_idx = place
    return reference


def query_columns(groups, config):
    """The columns of the output projection that belong to groups of heads."""
    size = (config.num_attention_heads // config.num_key_value_heads) * head_dim(config)
    return (groups[:, None] * size + torch.arange(size)).flatten()


def head_dim(config):
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def silence_others(weight, kept, dimension):
    gone = torch.ones(weight.shape[dimension], dtype=torch.bool)
    gone[kept] = False
    weight.index_fill_(dimension, gone.nonzero()[:, 0], 0)


@each_family
@torch.no_grad()
def test_dropped_blocks_are_gone_and_nothing_else_changes(name, tmp_path):
    reference = without(make(tmp_path / "model", name), (2, 4))
    found, theirs, ours = pruned(tmp_path / "model", tmp_path / "small", drop_blocks=(2, 4))
    assert (found.kept.blocks, found.dropped_blocks, found.layer_pairs) == ([1, 3], [2, 4], [[1, 1], [2, 3]])
    wanted = reference(TOKENS, use_cache=False).logits
    assert_close(theirs(TOKENS).logits, wanted)
    assert_close(ours(TOKENS), wanted)
    assert found.perplexity[1] == pytest.approx(perplexity_of_all(theirs).item(), rel=1e-4)
    assert found.parameters[1] == sum(p.numel() for p in theirs.parameters())


@each_family
@torch.no_grad()
def test_keeping_all_of_the_width_changes_nothing(name, tmp_path):
    reference = make(tmp_path / "model", name)
    heads = reference.config.num_attention_heads
    found, theirs, _ = pruned(tmp_path / "model", tmp_path / "small", width=32, heads=heads, feed_forward=48)
    assert torch.equal(theirs(TOKENS).logits, reference(TOKENS).logits)
    assert found.parameters[0] == found.parameters[1]
    assert found.perplexity[0] == found.perplexity[1] == pytest.approx(perplexity_of_all(reference).item(), rel=1e-4)


@each_family
@torch.no_grad()
def test_units_that_go_were_as_good_as_silent(name, tmp_path):
    reference = make(tmp_path / "model", name)
    found, theirs, ours = pruned(tmp_path / "model", tmp_path / "small", feed_forward=20)
    for block, units in zip(reference.model.layers, found.kept.units, strict=True):
        silence_others(block.mlp.down_proj.weight, units, 1)
    assert_close(theirs(TOKENS).logits, reference(TOKENS).logits)
    assert_close(ours(TOKENS), reference(TOKENS).logits)
    assert theirs.config.intermediate_size == 20


@pytest.mark.parametrize("name", FREE_HEADS)
@torch.no_grad()
def test_heads_that_go_were_as_good_as_silent(name, tmp_path):
    reference = make(tmp_path / "model", name)
    ratio = reference.config.num_attention_heads // reference.config.num_key_value_heads
    found, theirs, ours = pruned(tmp_path / "model", tmp_path / "small", heads=ratio)
    for block, groups in zip(reference.model.layers, found.kept.groups, strict=True):
        silence_others(block.self_attn.o_proj.weight, query_columns(groups, reference.config), 1)
    assert_close(theirs(TOKENS).logits, reference(TOKENS).logits)
    assert_close(ours(TOKENS), reference(TOKENS).logits)
    assert (theirs.config.num_attention_heads, theirs.config.num_key_value_heads) == (ratio, 1)
    assert theirs.config.head_dim == head_dim(reference.config)


@each_family
@torch.no_grad()
def test_channels_that_go_were_as_good_as_silent(name, tmp_path):
    """Norms divide by the mean square over fewer channels, which a scale of the silenced model makes up for."""
    reference = make(tmp_path / "model", name)
    ratio = reference.config.num_attention_heads // reference.config.num_key_value_heads
    request = {"width": 24} if name in FREE_HEADS else {"width": 16, "heads": ratio}
    found, theirs, ours = pruned(tmp_path / "model", tmp_path / "small", **request)
    assert_close(ours(TOKENS), theirs(TOKENS).logits)
    channels, share = found.kept.channels, request["width"] / 32
    silence_others(reference.model.embed_tokens.weight, channels, 1)
    norms = [reference.model.norm]
    for place, block in enumerate(reference.model.layers):
        norms += [block.input_layernorm, block.post_attention_layernorm]
        if found.kept.groups is not None:
            columns = query_columns(found.kept.groups[place], reference.config)
            silence_others(block.self_attn.o_proj.weight, columns, 1)
        for projection in (block.self_attn.o_proj, block.mlp.down_proj):
            silence_others(projection.weight, channels, 0)
    for norm in norms:
        norm.weight.mul_(share**0.5)
        norm.variance_epsilon *= share
    torch.testing.assert_close(theirs(TOKENS).logits, reference(TOKENS).logits, rtol=1e-4, atol=1e-4)


@each_family
@torch.no_grad()
def test_depth_and_width_combine(name, tmp_path):
    reference = make(tmp_path / "model", name)
    ratio = reference.config.num_attention_heads // reference.config.num_key_value_heads
    width = 16 if name in ("Qwen2", "R1-Distill-Qwen") else 24
    request = {"blocks": 3, "width": width, "heads": ratio, "feed_forward": 31}
    found, theirs, ours = pruned(tmp_path / "model", tmp_path / "small", **request)
    assert_close(ours(TOKENS), theirs(TOKENS).logits)
    assert found.perplexity[1] == pytest.approx(perplexity(ours, ROWS))
    record = json.loads((tmp_path / "small" / "pruned.json").read_text())
    assert record["blocks_kept"] == found.kept.blocks
    assert len(record["channels_kept"]) == width
    assert [len(units) for units in record["units_kept"]] == [31] * 3
    assert record["sizes_after"]["feed_forward"] == 31
    config = read_config(tmp_path / "small")
    assert len(config.get("layer_types") or range(3)) == 3
    assert config["dtype"] == "float32"


def test_every_family_is_pruned():
    tested = {STUDENTS[name][1](**SHAPE).model_type for name in FAMILIES}
    assert tested == {config(**SHAPE).model_type for _, config, _ in STUDENTS.values()}


@torch.no_grad()
def test_the_block_that_does_nothing_is_dropped(tmp_path):
    reference = make(tmp_path / "model", "Llama 3.1")
    silent = reference.model.layers[2]
    silent.self_attn.o_proj.weight.zero_()
    silent.mlp.down_proj.weight.zero_()
    reference.save_pretrained(tmp_path / "model")
    found, theirs, _ = pruned(tmp_path / "model", tmp_path / "small", blocks=3)
    assert found.dropped_blocks == [3]
    assert found.block_changes[2] == pytest.approx(0, abs=1e-6)
    assert_close(theirs(TOKENS).logits, reference(TOKENS).logits)
    assert found.perplexity[1] == pytest.approx(found.perplexity[0], rel=1e-5)


def test_the_first_and_the_last_block_stay():
    assert least_changing([0.0, 0.3, 0.2, 0.1, 0.0], 2) == [3, 4]
    assert least_changing([0.0, 0.0], 0) == []


@torch.no_grad()
def test_measures_are_those_of_the_formulas(tmp_path):
    reference = make(tmp_path / "model", "Qwen3")
    model = load(tmp_path / "model")
    inputs = {}

    def keep(name):
        return lambda module, given: inputs.update({name: given[0].double()})

    block = reference.model.layers[1]
    block.self_attn.o_proj.register_forward_pre_hook(keep("heads"))
    block.mlp.down_proj.register_forward_pre_hook(keep("units"))
    states = reference(TOKENS, output_hidden_states=True).hidden_states
    found = measure_width(model, ROWS)
    tokens, size = TOKENS.numel(), head_dim(reference.config)
    units = inputs["units"].flatten(0, 1).pow(2).sum(0) * block.mlp.down_proj.weight.double().pow(2).sum(0)
    torch.testing.assert_close(found.units[1] * tokens, units, rtol=1e-4, atol=0)
    weight = block.self_attn.o_proj.weight.double()
    by_head = [
        (inputs["heads"][..., part] @ weight[:, part].T).pow(2).sum()
        for part in (slice(h * size, (h + 1) * size) for h in range(4))
    ]
    groups = torch.stack([by_head[0] + by_head[1], by_head[2] + by_head[3]])
    torch.testing.assert_close(found.groups[1] * tokens, groups, rtol=1e-4, atol=0)
    _, changes = measure_blocks(model, ROWS)
    cosine = torch.cosine_similarity(states[1], states[2], dim=-1).mean()
    assert changes[1] == pytest.approx(1 - cosine.item(), abs=1e-5)


@torch.no_grad()
def test_a_channel_that_every_norm_silences_goes_first(tmp_path):
    reference = make(tmp_path / "model", "Mistral")
    for key, parameter in reference.named_parameters():
        if "norm" in key:
            parameter[5] = 0
    reference.save_pretrained(tmp_path / "model")
    found, _, _ = pruned(tmp_path / "model", tmp_path / "small", width=28, heads=4)
    assert 5 not in found.kept.channels.tolist()


@torch.no_grad()
def test_perplexity_is_of_the_tokens_from_a_start_on(tmp_path):
    reference = make(tmp_path / "model", "Qwen2")
    model = load(tmp_path / "model")
    logprobs = reference(TOKENS).logits[:, :-1].log_softmax(-1).gather(-1, TOKENS[:, 1:, None])[..., 0]
    wanted = torch.cat([logprobs[0, 29:], logprobs[1, 9:]]).mean().neg().exp()
    assert perplexity(model, ROWS, [30, 10]) == pytest.approx(wanted.item(), rel=1e-4)


def test_largest_are_in_order_and_ties_are_decided():
    assert largest(torch.tensor([1.0, 3.0, 2.0, 3.0, 1.0]), 3).tolist() == [1, 2, 3]
    assert largest(torch.zeros(5), 2).tolist() == [0, 1]


def test_an_unknown_parameter_is_never_left_uncut(tmp_path):
    make(tmp_path / "model", "Qwen2")
    sizes = read_source(tmp_path / "model").sizes
    with pytest.raises(KeyError):
        cut_weights({"model.layers.0.mlp.router.weight": torch.zeros(2, 2)}, Kept([1]), sizes)


def test_nothing_but_the_stated_files_is_in_the_folder(tmp_path):
    make(tmp_path / "model", "Qwen2")
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE"):
        (tmp_path / "model" / name).write_text(name)
    for name in ("pytorch_model.bin", "modeling.py", "params.json", "model.safetensors.index.json"):
        (tmp_path / "model" / name).write_text('{"weight_map": {}}')
    pruned(tmp_path / "model", tmp_path / "parent" / "small", drop_blocks=(2,))
    names = {path.name for path in (tmp_path / "parent" / "small").iterdir()}
    own = {"config.json", "generation_config.json", "model.safetensors", "pruned.json"}
    assert names == own | {"tokenizer.json", "chat_template.jinja", "LICENSE"}
    assert not any(path.name.startswith(".") for path in (tmp_path / "parent").iterdir())


def test_weights_are_written_in_the_dtype_of_the_computation(tmp_path):
    make(tmp_path / "model", "Llama 3.1")
    source = read_source(tmp_path / "model")
    prune(source, Request(blocks=3), ROWS, tmp_path / "small", dtype=torch.bfloat16, device=CPU)
    assert {w.dtype for w in load_file(tmp_path / "small" / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype="auto").dtype == torch.bfloat16


def test_tokens_that_the_model_does_not_know_are_said(tmp_path):
    make(tmp_path / "model", "Llama 3.1")
    source = read_source(tmp_path / "model")
    for rows, said in (([[1, 61]], "knows 61"), ([[1] * 65], "reads at most 64")):
        with pytest.raises(ConfigError, match=said):
            prune(source, Request(blocks=3), rows, tmp_path / "small", dtype=torch.float32, device=CPU)


def test_a_pruned_student_heals(tmp_path):
    from oprd_tune.modeling.folders import find_folder

    source = read_source(find_folder("student", "tiny/teacher"))
    rows = [[3, 4, 5, 6, 7, 8, 9], [9, 3, 5, 2, 7]]
    found = prune(source, Request(drop_blocks=(3,)), rows, tmp_path / "small", dtype=torch.float32, device=CPU)
    overrides = {"student": str(tmp_path / "small"), "layer_pairs": found.layer_pairs, "max_steps": 3}
    run_recipe("oprd_distributed", "tiny/oprd", tmp_path / "run", **overrides)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 3

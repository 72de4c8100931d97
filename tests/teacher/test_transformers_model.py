"""Teachers that transformers loads: their states are transformers' own, however they are cut, placed or quantised."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchtune.models.qwen2 import qwen2

from oprd_tune.errors import ConfigError
from oprd_tune.modeling.families.qwen3 import qwen3
from oprd_tune.modeling.heads import LMHead
from oprd_tune.modeling.taps import collect_states
from oprd_tune.modeling.weights import build_on_meta, check_weights, hugging_face_checkpointer, load_decoder, width_of
from oprd_tune.ranks import Ranks
from oprd_tune.rollout.native.pace import Pace
from oprd_tune.rollout.native.sampler import Sampler
from oprd_tune.teacher import FrozenTeacher, TeacherPlan, load_teacher, transformers_files, transformers_teacher
from oprd_tune.teacher.transformers_files import _cut
from oprd_tune.torchtune_compat import folder_of, weight_files_of
from oprd_tune.types import LayerPair, Prompts, SamplingRequest
from tests.teacher.test_quantize import held_bytes
from tests.teacher.transformers_models import DEPTH, FAMILIES, VOCAB, save_model

CPU, INT8 = torch.device("cpu"), "int8_weight_only"
LAYERS = list(range(1, DEPTH + 1))
LENGTHS = [11, 5, 8]
TEXTS = [torch.randint(2, VOCAB, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
TOKENS = nn.utils.rnn.pad_sequence(TEXTS, batch_first=True)
REAL = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
REQUEST = SamplingRequest(
    stop_tokens=frozenset(range(1, 20)),
    pad_id=0,
    max_prompt_tokens=11,
    max_new_tokens=9,
    samples_per_prompt=1,
    seed=0,
)
PROMPTS = Prompts(tuple(tuple(t.tolist()) for t in TEXTS), (0, 1, 2), (None, None, None))
SCALED = {"gemma2": "final_logit_softcapping=30.0", "granite": "logits_scaling=8.0"}
each_family = pytest.mark.parametrize("family", FAMILIES)
some_families = pytest.mark.parametrize("family", ["qwen3_moe", "gemma3", "phi4_mini", "gpt_oss", "bloom"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Makes a family's folder once; gives it with transformers' own model."""
    made = {}

    def get(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = folder, save_model(folder, family)
        return made[family]

    return get


def load(folder, *, dtype=torch.float32, **placing):
    files = transformers_files(str(folder), "")
    return load_teacher(lambda: None, files, dtype=dtype, device=CPU, **placing)


def plan(placement="replicated", quantization=None, ranks=1):
    return TeacherPlan(placement, quantization, Ranks(0, ranks))


def states(model, layers=LAYERS, tokens=TOKENS):
    everywhere = torch.arange(tokens.numel())
    return collect_states(model, tokens, [(layer, everywhere, None) for layer in layers])


@torch.no_grad()
def wanted_states(model, tokens=TOKENS):
    """transformers' own: the raw output of each block but the last, and the last one's after the norm."""
    found = model(tokens, output_hidden_states=True, use_cache=False).hidden_states[1:]
    return [state.flatten(0, 1) for state in found]


def assert_close(got, want, tolerance=1e-5):
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@each_family
def test_every_layers_states_are_transformers_own(family, saved):
    folder, theirs = saved(family)
    teacher, errors = load(folder)
    assert errors == {}
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    want = wanted_states(theirs)
    assert_close(states(teacher), want)
    assert_close(states(teacher, [1, 3]), [want[0], want[2]])
    torch.testing.assert_close(teacher(TOKENS), theirs(TOKENS).logits, rtol=1e-5, atol=1e-5)


@each_family
def test_a_teacher_is_read_up_to_the_layer_that_is_needed(family, saved):
    folder, theirs = saved(family)
    want = wanted_states(theirs)
    teacher, _ = load(folder, top=2)
    assert len(teacher.layers) == 2
    assert isinstance(teacher.norm, nn.Identity)
    assert isinstance(teacher.output, nn.Identity)
    assert_close(states(teacher, [1, 2]), want[:2])
    assert_close(states(load(folder, top=DEPTH)[0]), want)
    whole, _ = load(folder)
    frozen = FrozenTeacher(whole, [LayerPair(1, 1), LayerPair(2, 2)])
    index_T = torch.tensor([0, 4, 13])
    got = frozen.targets(TOKENS, index_T).states
    assert_close([got[1], got[2]], [state[index_T] for state in want[:2]])
    assert len(whole.layers) == 2


@each_family
def test_a_padded_row_has_the_states_of_the_row_alone(family, saved):
    teacher, _ = load(saved(family)[0])
    padded = [state.view(*TOKENS.shape, -1)[REAL] for state in states(teacher)]
    alone = [torch.cat(layer) for layer in zip(*(states(teacher, tokens=t[None]) for t in TEXTS), strict=True)]
    assert_close(padded, alone)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_torchtunes_teacher_of_the_same_folder_agrees(family, saved, tmp_path):
    folder, theirs = saved(family)
    config = theirs.config
    shape = {
        "vocab_size": VOCAB,
        "num_layers": DEPTH,
        "num_heads": 4,
        "num_kv_heads": 2,
        "embed_dim": 32,
        "intermediate_dim": 48,
        "max_seq_len": 64,
        "norm_eps": config.rms_norm_eps,
        "rope_base": config.rope_parameters["rope_theta"],
        "tie_word_embeddings": config.tie_word_embeddings,
    }

    def build():
        return qwen3(head_dim=8, **shape) if family == "qwen3" else qwen2(**shape)

    files = hugging_face_checkpointer(str(folder), str(tmp_path), model_type=family.upper())
    ours = load_decoder(build, files, dtype=torch.float32, device=CPU)
    teacher, _ = load(folder)
    assert_close(states(teacher), states(ours))
    torch.testing.assert_close(teacher(TOKENS), ours(TOKENS), rtol=1e-5, atol=1e-5)
    assert (width_of(teacher), teacher.max_seq_len) == (width_of(ours), ours.max_seq_len)


@each_family
def test_on_meta_it_has_the_shapes_of_the_loaded_teacher(family, saved):
    folder, _ = saved(family)
    meta, (teacher, _) = build_on_meta(lambda: transformers_teacher(str(folder))), load(folder)
    assert all(parameter.is_meta for parameter in meta.parameters())
    assert {n: p.shape for n, p in meta.named_parameters()} == {n: p.shape for n, p in teacher.named_parameters()}
    files = transformers_files(str(folder), "")
    check_weights("teacher_checkpointer", files, meta)
    assert folder_of(files) == folder
    assert [path.name for path in weight_files_of(files)] == ["model.safetensors"]
    assert (len(meta.layers), width_of(meta), meta.max_seq_len) == (DEPTH, 32, 64)


@pytest.mark.parametrize(
    ("family", "quantization"),
    [*((family, None) for family in FAMILIES), ("qwen3_moe", INT8), ("gemma3", INT8), ("phi4_mini", INT8)],
)
def test_memory_is_what_a_loaded_teacher_holds(family, quantization, saved):
    dtype = torch.bfloat16
    folder, _ = saved(family)
    meta = transformers_teacher(str(folder))
    for top in (2, None):
        teacher, _ = load(folder, dtype=dtype, top=top, quantization=quantization, prompts=[[3, 4]])
        norm = sum(map(held_bytes, teacher.norm.parameters()))
        holds = sum(map(held_bytes, teacher.parameters())) - norm + sum(b.nbytes for b in teacher.buffers())
        rows = sum(m.out_features for m in teacher.layers.modules() if isinstance(m, nn.Linear))
        predicted = plan(quantization=quantization).memory_bytes(
            meta, top=top or DEPTH, keeps_head=top is None, dtype=dtype
        )
        assert holds <= predicted <= holds + (10 * rows if quantization else 2)  # a buffer may be in fp32


@some_families
def test_an_offloaded_teacher_gives_the_same_states(family, saved):
    folder, theirs = saved(family)
    teacher, _ = load(folder, offloaded=True)
    assert all(block._forward_pre_hooks for block in teacher.layers)
    assert_close(states(teacher), wanted_states(theirs))


@some_families
@pytest.mark.parametrize("top", [2, None])
def test_an_int8_teachers_error_is_that_of_its_states(family, top, saved):
    folder, _ = saved(family)
    prompts = [text.tolist() for text in TEXTS]
    teacher, errors = load(folder, top=top, quantization=INT8, prompts=prompts)
    exact, _ = load(folder, top=top)
    layers = LAYERS[:top]
    got, want = ([state[REAL.flatten()] for state in states(model, layers)] for model in (teacher, exact))
    by_hand = {n: ((q - r).norm() / r.norm()).item() for n, (q, r) in enumerate(zip(got, want, strict=True), 1)}
    assert list(errors) == layers
    assert all(0 < error < 0.2 for error in errors.values())
    assert errors == pytest.approx(by_hand, rel=1e-3)


@each_family
def test_a_head_is_a_matrix_or_refused_by_name(family, saved):
    folder, theirs = saved(family)
    for model in (transformers_teacher(str(folder)), load(folder)[0]):
        if family in SCALED:
            with pytest.raises(ConfigError, match=f"^teacher_model: .*{SCALED[family]}"):
                LMHead(model, "teacher_model")
        else:
            assert LMHead(model).weight_VD.shape == (VOCAB, 32)
    if family not in SCALED:
        assert torch.equal(LMHead(load(folder)[0]).weight_VD, theirs.get_output_embeddings().weight)


@pytest.mark.parametrize("family", SCALED)
def test_a_head_that_scales_without_saying_so_is_found_when_it_is_loaded(family, saved, monkeypatch):
    folder, _ = saved(family)
    monkeypatch.setattr("oprd_tune.teacher.transformers_head._LOGIT_FIELDS", ())
    LMHead(transformers_teacher(str(folder)))
    with pytest.raises(ConfigError, match="that transformers changes afterwards"):
        LMHead(load(folder)[0])


@each_family
def test_it_samples_as_its_whole_forward_pass_says(family, saved):
    """Greedy answers to prompts of unlike lengths, which end at different times."""
    folder, theirs = saved(family)
    teacher, _ = load(folder)
    rollout = Sampler(teacher, REQUEST, temperature=0).sample(PROMPTS)
    pace = Pace(check_every=3, rows_leave_at=0.5, steady=True, repeatable=lambda step: pytest.fail("its shapes change"))
    late = Sampler(teacher, REQUEST, temperature=0, pace=pace).sample(PROMPTS)
    assert torch.equal(late.tokens_BS, rollout.tokens_BS)
    assert len(set(rollout.lengths_B.tolist())) > 1
    with torch.no_grad():
        logits = theirs(rollout.tokens_BS).logits
    for row, (text, length) in enumerate(zip(TEXTS, rollout.lengths_B.tolist(), strict=True)):
        answer = slice(len(text), length)
        before = slice(len(text) - 1, length - 1)
        assert torch.equal(rollout.tokens_BS[row, answer], logits[row, before].argmax(-1))
        want = logits[row, before].log_softmax(-1).amax(-1)
        torch.testing.assert_close(rollout.sampler_logprobs_BS[row, answer], want, rtol=1e-4, atol=1e-4)
    assert_close(states(teacher), wanted_states(theirs))


@each_family
def test_a_cut_config_is_one_that_transformers_accepts(family, saved):
    theirs = saved(family)[1].config
    config = _cut(theirs, 2)
    config.validate()
    assert (config.num_hidden_layers, theirs.num_hidden_layers) == (2, DEPTH)
    assert len(getattr(config, "layer_types", None) or [1, 2]) == 2


def test_a_cache_that_cannot_drop_rows_is_refused(saved):
    teacher, _ = load(saved("qwen2")[0])

    class Wrong(nn.Module):
        config, forward = teacher.config, lambda self, **_: (torch.zeros(3, 1, 32),)

    teacher.frame = Wrong()
    with pytest.raises(ConfigError, match="no key-value cache that can drop rows.*; give evaluate_teacher: false"):
        Sampler(teacher, REQUEST).sample(PROMPTS)


def changed(folder, tmp_path, weights=None, **config):
    """A copy of a folder with another config or other weights."""
    copy = tmp_path / "changed"
    copy.mkdir()
    (copy / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))
    save_file(weights or load_file(folder / "model.safetensors"), copy / "model.safetensors", {"format": "pt"})
    return copy


def test_code_of_a_folders_own_is_never_run(saved, tmp_path):
    own = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    folder = changed(saved("qwen2")[0], tmp_path, model_type="mine", auto_map=own)
    (folder / "mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ConfigError, match=f"^{folder} needs code of its own .auto_map in config.json., which is never"):
        transformers_teacher(str(folder))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "nobody_knows"}, "transformers cannot load it as a causal language model"),
        ({"model_type": "t5"}, "transformers cannot load it as a causal language model"),
        (
            {"use_bidirectional_attention": True, "sliding_window": 4, "model_type": "gemma3_text"},
            "use_bidirectional_attention is set",
        ),
        ({"num_kv_shared_layers": 1}, "num_kv_shared_layers is 1 in config.json"),
    ],
)
def test_other_models_are_refused_before_weights_are_read(config, message, saved, tmp_path):
    with pytest.raises(ConfigError, match=message):
        transformers_teacher(str(changed(saved("qwen2")[0], tmp_path, **config)))


def test_files_that_do_not_fit_are_refused_before_they_are_loaded(saved, tmp_path):
    folder, _ = saved("qwen3")
    weights = load_file(folder / "model.safetensors")
    deeper = changed(folder, tmp_path, num_hidden_layers=4, layer_types=["full_attention"] * 4)
    with pytest.raises(ConfigError, match="^there: .* 4 blocks, .* no weight of block 3"):
        check_weights("there", transformers_files(str(deeper), ""), transformers_teacher(str(deeper)))
    (tmp_path / "other").mkdir()
    wider = changed(folder, tmp_path / "other", intermediate_size=64)
    with pytest.raises(ConfigError, match=r"^there: .*gate_proj.weight is \(48, 32\), but \(64, 32\)"):
        check_weights("there", transformers_files(str(wider), ""), transformers_teacher(str(wider)))
    (tmp_path / "less").mkdir()
    name = "model.layers.1.self_attn.q_norm.weight"
    less = changed(folder, tmp_path / "less", {key: value for key, value in weights.items() if key != name})
    with pytest.raises(ConfigError, match=f"lacks 1 weights .* such as {name}; they would be random"):
        load(less)
    with pytest.raises(ConfigError, match="^there reads .* but teacher_model is another model"):
        check_weights("there", transformers_files(str(less), ""), transformers_teacher(str(folder)))
    torchtunes = hugging_face_checkpointer(str(folder), str(tmp_path / "out"), model_type="QWEN3")
    with pytest.raises(ConfigError, match="^there opens torchtune's .* give there: ._component_: .*transformers_files"):
        check_weights("there", torchtunes, transformers_teacher(str(folder)))
    with open(less / "model.safetensors", "r+b") as file:
        file.truncate(5_000)
    with pytest.raises(ConfigError, match="^there: .* is damaged or incomplete"):
        check_weights("there", transformers_files(str(less), ""), transformers_teacher(str(less)))
    (less / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="lacks model.safetensors; `tune download org/name --output-dir"):
        transformers_files(str(less), "", hub_name="org/name")


def test_a_quantised_checkpoint_is_counted_as_stored_and_combined_with_nothing(saved, tmp_path):
    folder, _ = saved("qwen2")
    halves = {key: value.to(torch.bfloat16) for key, value in load_file(folder / "model.safetensors").items()}
    folder = changed(folder, tmp_path, halves, quantization_config={"quant_method": "fp8"})
    meta = transformers_teacher(str(folder))
    block = sum(value.nbytes for key, value in halves.items() if ".layers.0." in key)
    assert meta.published_block_bytes == [block] * DEPTH
    size = {"top": 2, "keeps_head": False, "dtype": torch.float32}
    assert plan().memory_bytes(meta, **size) < plan().memory_bytes(transformers_teacher(str(saved("qwen2")[0])), **size)
    for other, message in (
        (
            plan(quantization=INT8),
            "teacher_quantization is int8_weight_only, but .* is quantised already; leave it out",
        ),
        (plan("offloaded"), "teacher_placement is offloaded, .* give replicated"),
        (plan("sharded", None, 2), "teacher_placement is sharded, .* give replicated"),
    ):
        with pytest.raises(ConfigError, match=message):
            other.memory_bytes(meta, **size)


def test_weights_that_are_not_the_decoders_are_named(saved, tmp_path, capsys):
    folder, _ = saved("qwen3")
    weights = load_file(folder / "model.safetensors")
    more = changed(folder, tmp_path, weights | {"model.layers.1.self_attn.sinks": torch.ones(4)})
    load(more, top=2)
    assert "1 weights are not the decoder's and not used: model.layers.1.self_attn.sinks" in capsys.readouterr().out
    load(folder, top=2)  # whose block 2 is not read on purpose
    assert capsys.readouterr().out == ""


def test_positions_that_depend_on_the_batch_are_told(saved, capsys):
    for family, told in (("phi4_mini", True), ("llama", False)):
        folder, _ = saved(family)
        check_weights("there", transformers_files(str(folder), ""), transformers_teacher(str(folder)))
        out = capsys.readouterr().out
        assert ("scaled by longrope, so where the longest row of a batch has more than 32 tokens" in out) == told


def mxfp4(folder, tmp_path, **config):
    """A folder of gpt-oss whose experts are packed four bits a number, as the published ones are."""
    weights = {k: v for k, v in load_file(folder / "model.safetensors").items() if not k.endswith("_proj")}
    generator = torch.Generator().manual_seed(0)
    for layer in range(DEPTH):
        for name, (rows, columns) in {"gate_up_proj": (128, 32), "down_proj": (32, 64)}.items():
            packed = torch.randint(0, 256, (4, rows, columns // 32, 16), dtype=torch.uint8, generator=generator)
            weights[f"model.layers.{layer}.mlp.experts.{name}_blocks"] = packed
            weights[f"model.layers.{layer}.mlp.experts.{name}_scales"] = torch.full(packed.shape[:3], 124).byte()
    keep = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    stored = {"quant_method": "mxfp4", "modules_to_not_convert": keep, **config}
    return changed(folder, tmp_path, weights, quantization_config=stored)


def test_a_quantised_checkpoint_may_be_restored_to_plain_weights(tmp_path, capsys):
    theirs = save_model(tmp_path / "plain", "gpt_oss", intermediate_size=64)
    folder = mxfp4(tmp_path / "plain", tmp_path, dequantize=True)
    teacher, errors = load(folder, quantization=INT8, prompts=[[3, 4, 5]])
    assert list(errors) == LAYERS
    teacher, _ = load(folder, top=2)
    with torch.no_grad():
        restored = type(theirs).from_pretrained(folder, dtype=torch.float32).eval()
        assert_close(states(teacher, [1, 2]), wanted_states(restored)[:2])
        assert not torch.allclose(wanted_states(restored)[0], wanted_states(theirs)[0])
    meta = transformers_teacher(str(folder))
    check_weights("there", transformers_files(str(folder), ""), meta)
    assert meta.published_block_bytes is None


def test_transformers_restores_plain_weights_only_if_asked(tmp_path):
    save_model(tmp_path / "plain", "gpt_oss", intermediate_size=64)
    folder = mxfp4(tmp_path / "plain", tmp_path)
    assert transformers_teacher(str(folder)).published_block_bytes is not None
    with pytest.raises(ConfigError, match="only as plain weights here|requires Accelerate"):
        load(folder)


def test_of_a_model_that_sees_its_text_decoder_is_taken(saved, tmp_path):
    from transformers import AutoModelForCausalLM, Gemma3Config

    text = saved("gemma3")[1].config
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": DEPTH, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    ids = {"image_token_index": 60, "boi_token_index": 59, "eoi_token_index": 58}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **ids)
    theirs = AutoModelForCausalLM.from_config(config).float().eval()
    theirs.save_pretrained(tmp_path)
    want, (whole, _), (cut, _) = wanted_states(theirs), load(tmp_path), load(tmp_path, top=2)
    assert_close(states(whole), want)
    torch.testing.assert_close(whole(TOKENS), theirs(TOKENS).logits, rtol=1e-5, atol=1e-5)
    assert_close(states(cut, [1, 2]), want[:2])
    meta = transformers_teacher(str(tmp_path))
    check_weights("there", transformers_files(str(tmp_path), ""), meta)
    text_alone = transformers_teacher(str(saved("gemma3")[0]))
    assert sum(p.numel() for p in whole.parameters()) == sum(p.numel() for p in text_alone.parameters())
    assert plan().memory_bytes(meta, top=2, keeps_head=False, dtype=torch.float32) == plan().memory_bytes(
        text_alone, top=2, keeps_head=False, dtype=torch.float32
    )


def test_a_block_without_a_linear_layer_is_not_quantised_in_name_alone(saved):
    meta = transformers_teacher(str(saved("gpt2")[0]))
    with pytest.raises(ConfigError, match="a block of the teacher, GPT2Block, has no linear layer; leave it out"):
        plan(quantization=INT8).memory_bytes(meta, top=2, keeps_head=False, dtype=torch.float32)

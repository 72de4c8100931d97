"""Students in Hugging Face folders, in the shapes that vLLM's kernels take."""

import json

import torch
from torchtune.models.qwen2 import qwen2
from torchtune.training import FullModelHFCheckpointer

from oprd_tune.config import OPRDSettings
from oprd_tune.modeling import decoder, hugging_face_checkpointer
from oprd_tune.modeling.families.qwen3 import qwen3
from oprd_tune.modeling.sharding import Sharding
from oprd_tune.modeling.weights import load_decoder
from oprd_tune.protocols import Policy
from oprd_tune.ranks import Ranks
from oprd_tune.rollout.native.sampler import Sampler
from oprd_tune.tiny import checkpointer, lora_tiny_qwen2, tiny_qwen2
from oprd_tune.tiny.model import _SHAPE, MAX_SEQ_LEN, hugging_face_config
from oprd_tune.training.student import load_student
from oprd_tune.types import Prompts, SamplingRequest
from tests.modeling.test_families import write_reference

SAMPLING = {"stop_tokens": [1], "pad_id": 0, "max_prompt_tokens": 16, "max_new_tokens": 8}
PROMPTS = Prompts(((3, 4, 12, 5, 6, 13), (5, 12, 6, 13), (9, 9, 9, 12, 2, 13), (7, 13)), (0, 1, 2, 3), (None,) * 4)
# One pattern for each group of parameters; a head that is tied is the embedding.
GROUPS = ("tok_embeddings", "q_proj.weight", "q_proj.bias", "k_proj.bias", "v_proj.bias", "output_proj", "sa_norm")
GROUPS += ("mlp_norm", "mlp.w1", "mlp.w2", "mlp.w3", "norm.scale")


def untied_qwen2():
    return qwen2(max_seq_len=MAX_SEQ_LEN, **{**_SHAPE, "tie_word_embeddings": False})


def make_qwen3(folder):
    """Heads that are not a part of the width, and norms of queries and keys that matter."""
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "tie_word_embeddings": True}
    config |= {"vocab_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config |= {"head_dim": 64, "hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": MAX_SEQ_LEN}
    config |= {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "hidden_act": "silu", "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").touch()
    torch.manual_seed(5)
    shape = {"vocab_size": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "embed_dim": 128}
    shape |= {"intermediate_dim": 256, "max_seq_len": MAX_SEQ_LEN, "rope_base": 10_000.0, "tie_word_embeddings": True}
    model = qwen3(**shape)
    model.tok_embeddings.weight.data.mul_(0.1)  # or the tied head would be sure of every token
    move(model, "proj", by=0.3)
    return model, hugging_face_checkpointer(str(folder), str(folder.parent / "out"), model_type="QWEN3")


def write_for_vllm(folder, name):
    """One of the students of `test_families` in a shape that vLLM's kernels take."""
    shape = {"vocab_size": 16, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "max_position_embeddings": MAX_SEQ_LEN}
    shape |= {} if name == "Qwen2" else {"head_dim": 64}
    write_reference(folder, name, **shape, pad_token_id=0, eos_token_id=1, bos_token_id=None)


def make_llama(folder, kind):
    """From transformers' own folder: Llama 3.2 has scaled rotations, Mistral a head of its own."""
    write_for_vllm(folder, {"llama": "Llama 3.2", "mistral": "Mistral"}[kind])
    files = hugging_face_checkpointer(str(folder), str(folder.parent / "out"))
    model = load_decoder(lambda: decoder(str(folder)), files, dtype=torch.float32, device=torch.device("cpu"))
    model.tok_embeddings.weight.data.mul_(0.1)
    return model, files


def make_student(kind, folder, ranks=None):
    """A student as engines get it, of one of the kinds below; spread over all ranks if there are several."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks = ranks or Ranks()
    files, dtype, cpu = checkpointer("student", str(folder)), torch.float32, torch.device("cpu")
    if kind == "untied":
        config = hugging_face_config(tiny_qwen2()) | {"tie_word_embeddings": False}
        (folder / "config.json").write_text(json.dumps(config))
        torch.manual_seed(5)
        (folder / "model.safetensors").touch()
        files = FullModelHFCheckpointer(str(folder), ["model.safetensors"], "QWEN2", str(folder.parent / "out"))
        model = untied_qwen2()
    elif kind == "qwen3":
        model, files = make_qwen3(folder)
    elif kind in ("llama", "mistral"):
        model, files = make_llama(folder, kind)
    elif kind == "tied" and ranks.world_size == 1:
        model = load_decoder(tiny_qwen2, files, dtype=dtype, device=cpu)
    else:
        build = tiny_qwen2 if kind == "tied" else lambda: lora_tiny_qwen2(use_dora=kind == "dora")
        sizes = {"max_steps": 1, "max_prompt_tokens": 1, "max_new_tokens": 1}
        settings = OPRDSettings(output_dir="out", dtype="fp32", seed=3, activation_checkpointing=True, **sizes)
        sharding = Sharding(ranks, compute_dtype=dtype) if ranks.world_size > 1 else None
        model = load_student(build, files, settings, top=4, trains_head=False, device=cpu, sharding=sharding)
    move(model, "lora_b", by=0.05)  # adapters that do something
    return Policy(model, files, dtype, 16, ranks, folder)


@torch.no_grad()
def move(model, group, *, by=0.1):
    """Change the parameters whose names contain `group`; returns how many."""
    generator = torch.Generator().manual_seed(1)
    changed = [p for name, p in model.named_parameters() if group in name]
    for parameter in changed:
        own = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        own.add_(torch.randn(own.shape, generator=generator).to(own.dtype) * by)
    return len(changed)


def request(**kwargs):
    return SamplingRequest(**{**SAMPLING, **kwargs})


def native(model, *, temperature=1.0, **kwargs):
    return Sampler(model, request(**kwargs), temperature=temperature)


def started(engine, policy, **kwargs):
    engine.start(policy, request(vocabulary=16, **kwargs))
    return engine

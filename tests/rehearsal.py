"""Large configs on a small machine: true widths, heads and vocabularies, two blocks, random weights.

    python -m tests.rehearsal CONFIG FOLDER [KEY=VALUE …]

writes both models' folders, runs the config's recipe for two steps with nothing but paths, depth and sizes overridden,
and prints what it took as JSON.
"""

import json
import sys
import threading
import time
from pathlib import Path

import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torchtune import config
from torchtune.config._utils import _get_component_from_path
from torchtune.models.qwen2._convert_weights import qwen2_tune_to_hf
from torchtune.modules.tied_linear import TiedLinear

from oprd_tune.modeling.adapters import adapter_names
from oprd_tune.modeling.families.qwen3 import qwen3_tune_to_hf
from oprd_tune.modeling.weights import build_on_meta
from oprd_tune.tiny.model import write_tokenizer
from tests.conftest import load_config, recipe_class

BLOCKS = 2
SIZES = {
    "max_steps": 2,
    "prompts_per_step": 2,
    "samples_per_prompt": 2,
    "max_prompt_tokens": 32,
    "max_new_tokens": 32,
    "tokens_per_micro_batch": 256,
    "eval_dataset": "null",
    "task_accuracy": "null",
}


def shallow(builder, **kwargs):
    """A builder's model, cut to two blocks."""
    model = _get_component_from_path(builder)(**kwargs)
    model.layers = model.layers[:BLOCKS]
    return model


def shallow_overrides(cfg, name):
    """What makes a config's builder shallow."""
    node = cfg[name]
    if "num_layers" in node:
        return {f"{name}.num_layers": BLOCKS}
    return {f"{name}._component_": "tests.rehearsal.shallow", f"{name}.builder": node._component_}


def write_model(folder, build, *, seed, files=2):
    """A Hugging Face folder of random bf16 weights, in several files."""
    folder.mkdir(parents=True)
    model = build_on_meta(build)
    adapters = adapter_names(model)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, parameter in model.named_parameters():
        if name not in adapters:
            value = torch.empty(parameter.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            weights[name] = value + 1 if name.endswith("scale") else value
    is_qwen3 = hasattr(model.layers[0].attn.q_proj, "norm")
    to_hf = qwen3_tune_to_hf if is_qwen3 else qwen2_tune_to_hf
    converted = {key: value.contiguous() for key, value in to_hf(weights).items()}
    names = sorted(converted)
    weight_map = {}
    for i in range(files):
        file = f"model-{i + 1:05}-of-{files:05}.safetensors"
        own = names[i::files]
        save_file({name: converted[name] for name in own}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    attention, embedding = model.layers[0].attn, model.tok_embeddings
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["Qwen3ForCausalLM" if is_qwen3 else "Qwen2ForCausalLM"],
                "model_type": "qwen3" if is_qwen3 else "qwen2",
                "head_dim": attention.head_dim,
                "vocab_size": embedding.num_embeddings,
                "hidden_size": embedding.embedding_dim,
                "intermediate_size": model.layers[0].mlp.w1.weight.shape[0],
                "num_hidden_layers": len(model.layers),
                "num_attention_heads": attention.num_heads,
                "num_key_value_heads": attention.num_kv_heads,
                "tie_word_embeddings": isinstance(model.output, TiedLinear),
            }
        )
    )
    write_tokenizer(folder)


def prepare(name, folder, overrides):
    """The config of a rehearsal; its models are written if they are not there yet."""
    cfg = load_config(name)
    words = {**SIZES, "device": "cpu", "output_dir": folder / "out", "num_threads": 2}
    for model, files in (("model", "checkpointer"), ("teacher_model", "teacher_checkpointer")):
        words |= {**shallow_overrides(cfg, model), f"{files}.checkpoint_dir": folder / model}
    prompts = folder / "prompts.jsonl"
    words |= {
        "tokenizer.path": folder / "teacher_model",
        "dataset.source": prompts,
        "dataset.subset": "null",
        "dataset.prompt_template": "'{prompt}'",
        "dataset.prompt_column": "question",
    }
    if "chat_template_kwargs" in cfg.tokenizer:
        words["tokenizer.chat_template_kwargs"] = "null"
    if "bridge" in cfg:
        words |= {"bridge.prompts": 4, "bridge.held_out_prompts": 2}
    cfg = OmegaConf.merge(cfg, OmegaConf.from_dotlist([f"{k}={v}" for k, v in words.items()] + overrides))
    for seed, model in enumerate(("model", "teacher_model")):
        if not (folder / model).exists():
            write_model(folder / model, lambda node=cfg[model]: config.instantiate(node), seed=seed)
    rows = [{"question": f"{i}+{i}=" * 3, "answer": str(2 * i)} for i in range(100, 140)]
    if not prompts.exists():
        prompts.write_text("\n".join(map(json.dumps, rows)))
    return cfg


def anonymous_bytes():
    """Memory that this process has allocated, without the files that it has mapped."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise AssertionError("RssAnon is not in /proc/self/status")


class PeakMemory:
    """Watches this process's allocated memory from a thread."""

    def __init__(self):
        self.start = self.peak = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self):
        while not self._done.is_set():
            self.peak = max(self.peak, anonymous_bytes())
            time.sleep(0.002)

    def stop(self):
        self._done.set()
        self._thread.join()
        return self.peak - self.start


def rehearse(cfg):
    """Run a recipe; returns its loss, the memory that it took until its first checkpoint, and what was predicted."""
    make_recipe = recipe_class(cfg.recipe)
    predicted = []
    names = make_recipe.setup.__globals__
    preflight = names["preflight"]
    names["preflight"] = lambda *args, **kwargs: predicted.append(preflight(*args, **kwargs))
    recipe = make_recipe(cfg)
    memory = PeakMemory()
    recipe.setup()
    save, peak = recipe.run._save, []

    def measure_and_save():
        peak.append(memory.stop())
        save()

    recipe.run._save = measure_and_save
    status = recipe.train()
    logged = recipe.run.journal.logged
    return {
        "status": status,
        "loss": logged["loss/total"],
        "grad_norm": logged["optimizer/grad_norm"],
        "measured_bytes": peak[0],
        "predicted_bytes": predicted[0].peak,
    }


def main():
    name, folder, *overrides = sys.argv[1:]
    result = rehearse(prepare(name, Path(folder), overrides))
    print(json.dumps(result))


if __name__ == "__main__":
    main()

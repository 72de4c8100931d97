"""Large configs on a small machine: true widths, heads and vocabularies, two blocks, random weights.

    python -m tests.rehearsal CONFIG FOLDER [KEY=VALUE …]

writes both models' folders, runs the config's recipe for two steps with nothing but names, depth and sizes overridden,
and prints what it took as JSON.
"""

import json
import sys
import threading
import time
from functools import partial
from pathlib import Path

from omegaconf import OmegaConf
from torchtune.models import qwen2_5
from torchtune.models.qwen2 import qwen2

from benchmarks.random_models import write_model
from oprd_tune import modeling
from oprd_tune.modeling.families.llama import llama
from oprd_tune.ranks import leave_ranks
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
    "eval": "null",
    "rollout": "native",
}


R1_DISTILL_1_5B = {"vocab_size": 151_936, "num_layers": 28, "num_heads": 12, "num_kv_heads": 2, "embed_dim": 1536}
R1_DISTILL_1_5B |= {"intermediate_dim": 8960, "max_seq_len": 131_072, "norm_eps": 1e-6, "rope_base": 1e4}
SMOLLM2 = {"vocab_size": 49_152, "num_heads": 9, "num_kv_heads": 3, "embed_dim": 576, "intermediate_dim": 1536}
SMOLLM2 |= {"max_seq_len": 8192, "norm_eps": 1e-5, "rope_base": 1e5, "tie_word_embeddings": True}
SMOLLM2_NARROW = {"num_heads": 3, "num_kv_heads": 1, "head_dim": 64, "embed_dim": 288}
# The shapes of the shipped configs' models, by the names that the configs give.
SHAPES = {
    "Qwen/Qwen2.5-0.5B": qwen2_5.qwen2_5_0_5b,
    "Qwen/Qwen2.5-0.5B-Instruct": qwen2_5.qwen2_5_0_5b,
    "Qwen/Qwen2.5-1.5B": qwen2_5.qwen2_5_1_5b_base,
    "Qwen/Qwen2.5-1.5B-Instruct": qwen2_5.qwen2_5_1_5b_instruct,
    "Qwen/Qwen2.5-7B": qwen2_5.qwen2_5_7b_base,
    "Qwen/Qwen2.5-7B-Instruct": qwen2_5.qwen2_5_7b_instruct,
    "Qwen/Qwen2.5-14B-Instruct": qwen2_5.qwen2_5_14b_instruct,
    "Qwen/Qwen3-1.7B-Base": modeling.qwen3_1_7b,
    "Qwen/Qwen3-4B": modeling.qwen3_4b,
    "outputs/qwen2_5_7b_to_1_5b/final": qwen2_5.qwen2_5_1_5b_base,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": partial(qwen2, **R1_DISTILL_1_5B),
    "hbx/JustRL-DeepSeek-1.5B": partial(qwen2, **R1_DISTILL_1_5B),
    "HuggingFaceTB/SmolLM2-135M-Instruct": partial(llama, num_layers=30, **SMOLLM2),
    "/tmp/SmolLM2-135M-Instruct-24-blocks": partial(llama, num_layers=24, **SMOLLM2),
    "/tmp/SmolLM2-135M-Instruct-288-channels": partial(llama, num_layers=30, **SMOLLM2 | SMOLLM2_NARROW),
}


def with_folders(cfg, folder):
    """The config with folders without weights, but with config.json and tokenizer, in place of its models' names."""
    for model in ("student",) if "teachers" in cfg else ("student", "teacher"):
        if cfg[model] == "outputs/tiny_bridge/final":
            cfg[model] = "tiny/student"
        if cfg[model] != "student" and not cfg[model].startswith("tiny/"):
            write_model(folder / model, SHAPES[cfg[model]])
            cfg[model] = str(folder / model)
    return cfg


def prepare(name, folder, overrides):
    """The config of a rehearsal; its models are written if they are not there yet."""
    cfg = load_config(name)
    words = {**SIZES, "device": "cpu", "output_dir": folder / "out", "num_threads": 2}
    for seed, model in enumerate(("student", "teacher")):
        words[model] = folder / model
        if not (folder / model).exists():
            write_model(folder / model, SHAPES[cfg[model]], blocks=BLOCKS, seed=seed, files=2)
    prompts = folder / "prompts.jsonl"
    words |= {
        "dataset.source": prompts,
        "dataset.subset": "null",
        "dataset.prompt_template": "'{prompt}'",
        "dataset.prompt_column": "question",
    }
    if "tokenizer" in cfg:
        words["tokenizer.chat_template_kwargs"] = "null"
    if "bridge" in cfg:
        words |= {"bridge.prompts": 4, "bridge.held_out_prompts": 2}
    rows = [{"question": f"{i}+{i}=" * 3, "answer": str(2 * i)} for i in range(100, 140)]
    if not prompts.exists():
        prompts.write_text("\n".join(map(json.dumps, rows)))
    return OmegaConf.merge(cfg, OmegaConf.from_dotlist([f"{k}={v}" for k, v in words.items()] + overrides))


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
    leave_ranks(together=True)


if __name__ == "__main__":
    main()

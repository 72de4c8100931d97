"""The short runs of the embedded models that gpu_check.py starts: every recipe and option once."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oprd_tune.registry import config_files, recipe_files, recipe_named_in

STEPS = 3
SHORT = (f"max_steps={STEPS}", "prompts_per_step=16", "dataset.count=512", "eval_dataset.count=64", "device={device}")
SHORT_EVAL = ("benchmarks.addition.count=32", "problems_per_batch=32", "device={device}")
ON_ITS_OWN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1")
NOT_MEASURED = ("eval_dataset=null", "task_accuracy=null", "reference_perplexity=null")  # or torchrun fails at status 3
BF16, MASTER, RECOMPUTED = "dtype=bf16", "master_dtype=fp32", "activation_checkpointing=true"
BRIDGE = ("bridge.prompts=64", "bridge.held_out_prompts=16")
REWARDED = (
    *("loss._component_=oprd_tune.losses.Composite", "loss.parts.opd._component_=oprd_tune.losses.FullReverseKL"),
    *("loss.parts.reward._component_=oprd_tune.losses.TaskReward", "samples_per_prompt=4", "reference_share=0.25"),
    *("loss.parts.reward.grader=oprd_tune.grading.exact_match", "average_over=responses"),
    "loss.parts.sft._component_=oprd_tune.losses.ReferenceCrossEntropy",
)
OFFLOADED = ("teacher_placement=offloaded", "evaluate_teacher=false")


@dataclass(frozen=True)
class Case:
    """A run.

    Attributes:
        config: its config.
        words: overrides of it.
        launcher: words between Python and the recipe's file.
        needs_gpu: whether a CPU cannot do it.
        quick: whether it is among the few that a CPU does.
    """

    name: str
    config: str
    words: tuple[str, ...] = ()
    launcher: tuple[str, ...] = ()
    needs_gpu: bool = False
    quick: bool = False


CASES = (  # those that compile first, because they take longest
    Case("compile", "tiny/oprd", (BF16, "compile=true")),
    Case("compile and checkpointing", "tiny/oprd", (BF16, "compile=true", RECOMPUTED)),
    Case("compile, top-4", "tiny/opd_topk", (BF16, "compile=true")),
    Case("OPRD, fp32", "tiny/oprd", quick=True),
    Case("OPRD, bf16", "tiny/oprd", (BF16,)),
    Case("OPRD, bf16, checkpointing", "tiny/oprd", (BF16, RECOMPUTED)),
    Case("OPRD, bf16 and fp32 master", "tiny/oprd", (BF16, MASTER)),
    Case("OPRD, CPU offload", "tiny/oprd", (BF16, MASTER, "fsdp_cpu_offload=true"), needs_gpu=True),
    Case("OPRD, torchrun", "tiny/oprd", NOT_MEASURED, launcher=ON_ITS_OWN),
    Case("OPRD, LoRA", "tiny/oprd", (BF16, "lora.rank=8")),
    Case("OPRD, DoRA", "tiny/oprd", (BF16, "lora.rank=8", "lora.use_dora=true")),
    Case("teacher replicated", "tiny/oprd", (BF16, "teacher_placement=replicated")),
    Case("teacher sharded", "tiny/oprd", (BF16, "teacher_placement=sharded")),
    Case("teacher offloaded", "tiny/oprd", (BF16, *OFFLOADED)),
    Case("teacher int8_weight_only", "tiny/oprd", (BF16, "teacher_quantization=int8_weight_only")),
    Case("teacher int8_dynamic", "tiny/oprd", (BF16, "teacher_quantization=int8_dynamic")),
    Case("teacher float8_weight_only", "tiny/oprd", (BF16, "teacher_quantization=float8_weight_only")),
    Case("teacher int4_weight_only", "tiny/oprd", (BF16, "teacher_quantization=int4_weight_only"), needs_gpu=True),
    Case("bridge, fp32", "tiny/bridge", BRIDGE),
    Case("bridge, bf16", "tiny/bridge", (BF16, MASTER, *BRIDGE)),
    Case("bridge, other tokenizer", "tiny/cross_tokenizer", BRIDGE),
    Case("full KL, fp32", "tiny/opd_full"),
    Case("full KL, bf16", "tiny/opd_full", (BF16,)),
    Case("top-4, fp32", "tiny/opd_topk", quick=True),
    Case("top-4, bf16, checkpointing", "tiny/opd_topk", (BF16, MASTER, RECOMPUTED)),
    Case("top-4, torchrun", "tiny/opd_topk", NOT_MEASURED, launcher=ON_ITS_OWN),
    Case("top-4, teacher offloaded", "tiny/opd_topk", (BF16, *OFFLOADED)),
    Case("sampled token, fp32", "tiny/opd_sampled"),
    Case("sampled token, bf16", "tiny/opd_sampled", (BF16,)),
    Case("vOPD, fp32", "tiny/vopd"),
    Case("vOPD, bf16", "tiny/vopd", (BF16,)),
    Case("OPRD + full KL", "tiny/oprd_plus_opd", (BF16, MASTER)),
    Case("bridge + full KL", "tiny/bridge_plus_opd", (BF16, MASTER, *BRIDGE)),
    Case("bridge, then full KL", "tiny/bridge_then_opd", ("student=tiny/student",)),
    Case("two teachers", "tiny/two_teachers", (BF16, MASTER)),
    Case("taught by itself", "tiny/self_distillation", (BF16, MASTER)),
    Case("taught by itself, live", "tiny/self_distillation", (BF16, MASTER, RECOMPUTED, "teacher_weights=live")),
    Case("taught by itself, average", "tiny/self_distillation", (BF16, MASTER, "teacher_weights.ema=0.9")),
    Case("full KL + reward + answers", "tiny/opd_full", (BF16, MASTER, *REWARDED)),
    Case("math_eval, fp32", "tiny/eval", quick=True),
    Case("math_eval, bf16", "tiny/eval", (BF16,)),
)


def command_of(case: Case, folder: Path, device: str, words: tuple[str, ...] = ()) -> list[str]:
    """The command of a case's run in `folder`, with `words` after its own."""
    config = config_files()[case.config]
    recipe = str(recipe_named_in(config))
    short = SHORT_EVAL if recipe == "math_eval" else SHORT
    own = [word.format(device=device) for word in short] + [*case.words, *words, f"output_dir={folder}"]
    return [sys.executable, *case.launcher, str(recipe_files()[recipe]), "--config", str(config), *own]


def logged(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run's steps, without those of its evaluations."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [row for row in rows if "loss/total" in row]


def environment(device: str) -> dict[str, str]:
    """One GPU, few threads, and on a CPU no compiler of C++."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    here = {"CUDA_VISIBLE_DEVICES": first} if device == "cuda" else {"TORCH_COMPILE_BACKEND": "aot_eager"}
    return {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "2", "TOKENIZERS_PARALLELISM": "false", **here}

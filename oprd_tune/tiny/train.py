"""Train the tiny models on addition, and one on reversing digits.

    python -m oprd_tune.tiny.train pair OUTPUT_FOLDER
    python -m oprd_tune.tiny.train wide_teacher OUTPUT_FOLDER
    python -m oprd_tune.tiny.train teens_teacher OUTPUT_FOLDER
    python -m oprd_tune.tiny.train hinted OUTPUT_FOLDER
    python -m oprd_tune.tiny.train reversing_teacher OUTPUT_FOLDER

`pair` writes two checkpoints of one run. The student is the first model whose held-out accuracy, sampled at temperature
1, reaches STUDENT_ACCURACY. The teacher is the model at the end. `hinted` learns from prompts half of which begin with
the answer, and ends where `pair` takes its student: it can use a hint, and adds as badly without one.
`reversing_teacher` starts from the shipped student, and forgets how to add. The other runs write only the last model.
All but `pair` write bf16. A checkpoint is a Hugging Face folder, and `provenance.json` records the run.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import OneCycleLR
from torchtune.modules import TransformerDecoder
from tqdm import trange

from oprd_tune.data.tokenizer import HuggingFaceTokenizer
from oprd_tune.tiny.model import (
    SYMBOLS,
    TEENS_SYMBOLS,
    checkpointer,
    hugging_face_config,
    tiny_qwen2,
    wide_tiny_qwen2,
    write_tokenizer,
)
from oprd_tune.tiny.task import as_addition, as_reversal, sample_numbers, sample_problems
from oprd_tune.torchtune_compat import qwen2_tune_to_hf

STUDENT_ACCURACY = 0.38
EVALUATE_EVERY = 25
_IGNORE = -100


@dataclass(frozen=True)
class Run:
    """The hyperparameters of a training run."""

    seed: int = 0
    steps: int = 2000
    batch: int = 256
    learning_rate: float = 1.5e-3
    warmup_steps: int = 100
    hinted_share: float = 0.0
    start: str | None = None
    task: str = "addition"


MODELS: dict[str, tuple[Callable[[], TransformerDecoder], list[str], Run]] = {
    "pair": (tiny_qwen2, SYMBOLS, Run()),
    "wide_teacher": (wide_tiny_qwen2, SYMBOLS, Run(seed=1, steps=1500)),
    "hinted": (tiny_qwen2, SYMBOLS, Run(seed=3, hinted_share=0.5)),
    "reversing_teacher": (tiny_qwen2, SYMBOLS, Run(seed=4, steps=1000, start="student", task="reversal")),
    "teens_teacher": (partial(wide_tiny_qwen2, len(TEENS_SYMBOLS)), TEENS_SYMBOLS, Run(seed=2, steps=1500)),
}


def sample_rows(run: Run, count: int, split: str) -> list[dict[str, str]]:
    """Problems of a run's task as rows of prompt and answer."""
    if run.task == "reversal":
        return [as_reversal(number) for number in sample_numbers(count, split=split, seed=run.seed)]
    return [as_addition(a, b) for a, b in sample_problems(count, split=split, seed=run.seed)]


def encode_batch(
    problems: list[dict[str, str]], tokenizer: HuggingFaceTokenizer, hinted_share: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded inputs [B, S] and next-token labels [B, S]. Only the answer and its EOS have labels.

    The first of the prompts, that share of them, begin with the answer, as in `357 12+345=`.
    """
    rows, labels = [], []
    for i, problem in enumerate(problems):
        hint = f"{problem['answer']} " if i < hinted_share * len(problems) else ""
        prompt = tokenizer.encode(hint + problem["prompt"])
        answer = tokenizer.encode(problem["answer"], add_eos=True)
        rows.append(torch.tensor(prompt + answer[:-1]))
        labels.append(torch.tensor([_IGNORE] * (len(prompt) - 1) + answer))
    inputs = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_id)
    return inputs, pad_sequence(labels, batch_first=True, padding_value=_IGNORE)


@torch.no_grad()
def sampled_accuracy(model: TransformerDecoder, tokens: torch.Tensor, labels: torch.Tensor) -> float:
    """The mean probability of the right answer at temperature 1: the product of its tokens' probabilities."""
    logprobs = -F.cross_entropy(model(tokens).transpose(1, 2), labels, ignore_index=_IGNORE, reduction="none")
    return logprobs.sum(1).exp().mean().item()


def write_checkpoint(model: TransformerDecoder, folder: Path, symbols: list[str], dtype: torch.dtype) -> None:
    """Write `model` as a Hugging Face folder: weights, config and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = hugging_face_config(model)
    heads = {"num_heads": config["num_attention_heads"], "num_kv_heads": config["num_key_value_heads"]}
    weights = qwen2_tune_to_hf(model.state_dict(), dim=config["hidden_size"], **heads)
    tensors = {name: weight.to(dtype).clone().contiguous() for name, weight in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    write_tokenizer(folder, symbols)


def initialise(model: TransformerDecoder) -> None:
    """Draw the matrices of a new model."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.02 if "tok_embeddings" in name else parameter.shape[1] ** -0.5)


def train(name: str, output: Path) -> dict[str, Any]:
    """Train a model and write its checkpoints. Returns the content of `provenance.json`."""
    build, symbols, run = MODELS[name]
    torch.manual_seed(run.seed)
    torch.set_num_threads(1)
    output.mkdir(parents=True, exist_ok=True)
    write_tokenizer(output, symbols)
    tokenizer = HuggingFaceTokenizer(str(output))
    model = build()
    if run.start is None:
        initialise(model)
    else:
        model.load_state_dict(checkpointer(run.start, str(output)).load_checkpoint()["model"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    warmup = run.warmup_steps / run.steps
    schedule = OneCycleLR(optimizer, run.learning_rate, total_steps=run.steps, pct_start=warmup, final_div_factor=1000)
    problems = sample_rows(run, 2000, "held_out")
    held_out, hinted = encode_batch(problems, tokenizer), encode_batch(problems, tokenizer, 1.0)
    stream = sample_rows(run, run.steps * run.batch, "train")
    record: dict[str, Any] = asdict(run)
    started = time.perf_counter()
    for step in (bar := trange(run.steps, mininterval=5)):
        batch = stream[step * run.batch : (step + 1) * run.batch]
        tokens, labels = encode_batch(batch, tokenizer, run.hinted_share)
        loss = F.cross_entropy(model(tokens).transpose(1, 2), labels, ignore_index=_IGNORE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if (step + 1) % EVALUATE_EVERY:
            continue
        accuracy = sampled_accuracy(model, *held_out)
        bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{accuracy:.4f}")
        if name == "pair" and "student_step" not in record and accuracy >= STUDENT_ACCURACY:
            record |= {"student_step": step + 1, "student_accuracy": round(accuracy, 4)}
            write_checkpoint(model, output / "student", symbols, torch.float32)
        if name == "hinted" and accuracy >= STUDENT_ACCURACY:
            record |= {"steps": step + 1, "hinted_accuracy": round(sampled_accuracy(model, *hinted), 4)}
            break
    if name == "pair":
        write_checkpoint(model, output / "teacher", symbols, torch.float32)
    else:
        write_checkpoint(model, output, symbols, torch.bfloat16)
    record["accuracy" if name == "hinted" else "teacher_accuracy"] = round(sampled_accuracy(model, *held_out), 4)
    record |= {"minutes": round((time.perf_counter() - started) / 60, 1), "torch": torch.__version__}
    (output / "provenance.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in MODELS:
        sys.exit(__doc__)
    print(train(sys.argv[1], Path(sys.argv[2])))

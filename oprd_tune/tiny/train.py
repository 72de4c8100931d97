"""Train the tiny teacher on addition and keep an earlier checkpoint of the same run as the student.

    python -m oprd_tune.tiny.train OUTPUT_FOLDER

The student is the first checkpoint whose held-out accuracy, by sampling at temperature 1, reaches STUDENT_ACCURACY;
the teacher is the end of the run. Both are written as Hugging Face folders beside a `provenance.json`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from torchtune.models.qwen2._convert_weights import qwen2_tune_to_hf
from torchtune.modules import TransformerDecoder
from tqdm import trange

from oprd_tune.tiny.model import SYMBOLS, hugging_face_config, tiny_qwen2, write_tokenizer
from oprd_tune.tiny.task import sample_problems

SEED = 0
STEPS = 2000
BATCH = 256
LEARNING_RATE = 1.5e-3
WARMUP_STEPS = 100
STUDENT_ACCURACY = 0.38
EVALUATE_EVERY = 25
_PAD, _EOS = SYMBOLS.index("<pad>"), SYMBOLS.index("<eos>")
_IGNORE = -100


def encode_batch(problems: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded inputs [B, S] and next-token labels [B, S] that score the answer and its EOS only."""
    rows, labels = [], []
    for a, b in problems:
        prompt = [SYMBOLS.index(c) for c in f"{a}+{b}="]
        answer = [SYMBOLS.index(c) for c in str(a + b)] + [_EOS]
        rows.append(prompt + answer[:-1])
        labels.append([_IGNORE] * (len(prompt) - 1) + answer)
    width = max(map(len, rows))
    return (
        torch.tensor([r + [_PAD] * (width - len(r)) for r in rows]),
        torch.tensor([r + [_IGNORE] * (width - len(r)) for r in labels]),
    )


@torch.no_grad()
def sampled_accuracy(model: TransformerDecoder, problems: list[tuple[int, int]]) -> float:
    """Probability that an answer sampled at temperature 1 is right: the product of its tokens' probabilities."""
    tokens, labels = encode_batch(problems)
    logprobs = -F.cross_entropy(model(tokens).transpose(1, 2), labels, ignore_index=_IGNORE, reduction="none")
    return logprobs.sum(1).exp().mean().item()


def write_checkpoint(model: TransformerDecoder, folder: Path) -> None:
    """Write `model` as a Hugging Face folder: weights, config and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.clone().contiguous() for k, v in qwen2_tune_to_hf(model.state_dict()).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hugging_face_config(), indent=1) + "\n")
    write_tokenizer(folder)


def train(output: Path) -> dict[str, Any]:
    """Run the whole training; returns what goes into `provenance.json`."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    model = tiny_qwen2()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.02 if "tok_embeddings" in name else parameter.shape[1] ** -0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=WARMUP_STEPS / STEPS, final_div_factor=1000
    )
    held_out = sample_problems(2000, split="held_out", seed=SEED)
    stream = sample_problems(STEPS * BATCH, split="train", seed=SEED)
    record: dict[str, Any] = {"seed": SEED, "steps": STEPS, "batch": BATCH, "learning_rate": LEARNING_RATE}
    started = time.perf_counter()
    for step in (bar := trange(STEPS, mininterval=5)):
        tokens, labels = encode_batch(stream[step * BATCH : (step + 1) * BATCH])
        loss = F.cross_entropy(model(tokens).transpose(1, 2), labels, ignore_index=_IGNORE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if (step + 1) % EVALUATE_EVERY:
            continue
        accuracy = sampled_accuracy(model, held_out)
        bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{accuracy:.4f}")
        if "student_step" not in record and accuracy >= STUDENT_ACCURACY:
            record |= {"student_step": step + 1, "student_accuracy": round(accuracy, 4)}
            write_checkpoint(model, output / "student")
    write_checkpoint(model, output / "teacher")
    record |= {"teacher_accuracy": round(sampled_accuracy(model, held_out), 4)}
    record |= {"minutes": round((time.perf_counter() - started) / 60, 1), "torch": torch.__version__}
    (output / "provenance.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(train(Path(sys.argv[1])))

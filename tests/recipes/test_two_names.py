"""First configs of one's own: two folders, a file of prompts, at most 25 keys."""

import json

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from oprd_tune.run.launcher import run_recipe as launch
from oprd_tune.tiny.model import MAX_SEQ_LEN, SYMBOLS, TEENS_SYMBOLS, write_tokenizer
from tests.conftest import ENDED, recipe_class, weights
from tests.teacher.transformers_models import FAMILIES, save_model

BRIDGED = """
recipe: oprd_distributed
output_dir: {out}
student: {student}
teacher: {teacher}
dtype: fp32
dataset:
  source: {prompts}
  answer_column: answer
  prompt_template: "{{prompt}}"
loss:
  _component_: oprd_tune.losses.BridgedMSE
  normalisation: variance
bridge:
  rank: 8
  prompts: 32
  held_out_prompts: 8
min_matched_share: 0.2  # what a random student writes is cut differently
optimizer:
  lr: 1.0e-3
max_steps: 3
prompts_per_step: 4
max_prompt_tokens: 16
max_new_tokens: 8
"""
FULL_KL = """
recipe: opd_topk_distributed
output_dir: {out}
student: {student}
teacher: {teacher}
dtype: fp32
dataset:
  source: {prompts}
  prompt_template: "{{prompt}}"
loss:
  _component_: oprd_tune.losses.FullReverseKL
optimizer:
  lr: 1.0e-3
max_steps: 3
prompts_per_step: 4
max_prompt_tokens: 16
max_new_tokens: 8
"""
LLAMA_3_2 = {"rope_parameters": {**FAMILIES["llama"][1]["rope_parameters"], "factor": 32.0}}


def leaves(node):
    return sum(leaves(value) for value in node.values()) if isinstance(node, dict) else 1


@pytest.mark.parametrize(
    ("text", "family", "symbols"), [(BRIDGED, "gemma3", TEENS_SYMBOLS), (FULL_KL, "llama", SYMBOLS)]
)
def test_a_llama_learns_from_two_names(text, family, symbols, tmp_path, capsys):
    """Over a bridge from a Gemma 3 that reads other tokens, and by full KL from a Llama."""
    folders = {name: tmp_path / name for name in ("student", "teacher")}
    save_model(folders["student"], "llama", **LLAMA_3_2, vocab_size=len(SYMBOLS), max_position_embeddings=MAX_SEQ_LEN)
    numbers = {"vocab_size": len(symbols), "max_position_embeddings": MAX_SEQ_LEN, "hidden_size": 48}
    save_model(folders["teacher"], family, seed=1, **numbers)
    write_tokenizer(folders["student"])
    write_tokenizer(folders["teacher"], symbols)
    rows = [{"prompt": f"{a}+{a + 7}=", "answer": str(2 * a + 7)} for a in range(10, 60)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    filled = text.format(out=tmp_path / "out", prompts=tmp_path / "prompts.jsonl", **folders)
    cfg = OmegaConf.create(filled)
    assert leaves(OmegaConf.to_container(cfg)) <= 25
    assert launch(recipe_class(cfg.recipe), cfg) in ENDED
    assert ("loaded by transformers" in capsys.readouterr().out) == (family == "gemma3")
    before, after = weights(folders["student"]), weights(tmp_path / "out" / "final")
    assert before.keys() == after.keys()
    assert sum(not torch.equal(before[name], after[name]) for name in before) > len(before) // 2
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final")
    assert student.config.rope_parameters["factor"] == 32.0

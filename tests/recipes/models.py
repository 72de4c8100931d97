"""Components for configs in tests: models that do not fit, and checkpoint folders in a bad state."""

import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torchtune.models.qwen2 import qwen2
from torchtune.models.qwen2._convert_weights import qwen2_tune_to_hf
from torchtune.training import FullModelHFCheckpointer

from oprd_tune.tiny import checkpointer, tokenizer
from oprd_tune.tiny.model import _SHAPE, MAX_SEQ_LEN


def wider_tiny_qwen2():
    return qwen2(max_seq_len=MAX_SEQ_LEN, **{**_SHAPE, "embed_dim": 256})


def deeper_tiny_qwen2():
    return qwen2(max_seq_len=MAX_SEQ_LEN, **{**_SHAPE, "num_layers": 5})


def _open(folder, output_dir):
    return FullModelHFCheckpointer(str(folder), ["model.safetensors"], "QWEN2", output_dir)


def _copy(name):
    source = Path(checkpointer("student", os.environ["TEST_FOLDER"])._checkpoint_dir)
    return Path(shutil.copytree(source, Path(os.environ["TEST_FOLDER"]) / name))


def deeper_checkpointer(name, output_dir):
    """Random weights for `deeper_tiny_qwen2`, below the folder `name`."""
    source = Path(checkpointer("teacher", output_dir)._checkpoint_dir)
    folder = Path(name) / "deeper"
    shutil.copytree(source, folder, dirs_exist_ok=True)
    weights = {k: v.contiguous() for k, v in qwen2_tune_to_hf(deeper_tiny_qwen2().state_dict()).items()}
    save_file(weights, folder / "model.safetensors")
    return _open(folder, output_dir)


def missing_checkpointer(name, output_dir):
    return _open(Path(os.environ["TEST_FOLDER"]) / "nowhere", output_dir)


def damaged_checkpointer(name, output_dir):
    folder = _copy("damaged")
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(100_000)
    return _open(folder, output_dir)


def foreign_checkpointer(name, output_dir):
    folder = _copy("foreign")
    small = qwen2(max_seq_len=MAX_SEQ_LEN, **{**_SHAPE, "num_layers": 3})
    save_file(
        {k: v.contiguous() for k, v in qwen2_tune_to_hf(small.state_dict()).items()}, folder / "model.safetensors"
    )
    return _open(folder, output_dir)


def qwen3_checkpointer(name, output_dir):
    folder = _copy("qwen3")
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"model.layers.0.self_attn.q_norm.weight": torch.ones(32)}, folder / "model.safetensors")
    return _open(folder, output_dir)


def foreign_tokenizer():
    foreign = tokenizer()
    foreign.pad_id = 99
    return foreign

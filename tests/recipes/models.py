"""Components for configs in tests: models that do not fit, and checkpoint folders in a bad state."""

import json
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
    _change_config(folder, num_hidden_layers=5)
    return _open(folder, output_dir)


def missing_checkpointer(output_dir):
    return _open(Path(os.environ["TEST_FOLDER"]) / "nowhere", output_dir)


def damaged_checkpointer(output_dir):
    folder = _copy("damaged")
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(100_000)
    return _open(folder, output_dir)


def foreign_checkpointer(output_dir):
    folder = _copy("foreign")
    small = qwen2(max_seq_len=MAX_SEQ_LEN, **{**_SHAPE, "num_layers": 3})
    save_file(
        {k: v.contiguous() for k, v in qwen2_tune_to_hf(small.state_dict()).items()}, folder / "model.safetensors"
    )
    return _open(folder, output_dir)


def qwen3_checkpointer(output_dir):
    folder = _copy("qwen3")
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"model.layers.0.self_attn.q_norm.weight": torch.ones(32)}, folder / "model.safetensors")
    return _open(folder, output_dir)


def foreign_tokenizer():
    foreign = tokenizer()
    foreign.pad_id = 99
    return foreign


def padded_tiny_qwen2(vocab_size):
    """The tiny model with padding rows beyond its 16 tokens."""
    return qwen2(max_seq_len=MAX_SEQ_LEN, **{**_SHAPE, "vocab_size": vocab_size})


def _variant(name, output_dir, suffix):
    """A shipped checkpoint's folder copied once, and whether it was just made; weights in use are mapped, not read."""
    source = Path(checkpointer(name, output_dir)._checkpoint_dir)
    folder = Path(os.environ["TEST_FOLDER"]) / f"{name}_{suffix}"
    new = not folder.exists()
    return (Path(shutil.copytree(source, folder)) if new else folder), new


def padded_checkpointer(name, vocab_size, output_dir):
    """A shipped checkpoint, padded with rows that would win every softmax if they were compared."""
    folder, new = _variant(name, output_dir, vocab_size)
    if new:
        weights = load_file(checkpoint_file := folder / "model.safetensors")
        embedding = weights["model.embed_tokens.weight"].clone()
        rows = embedding.new_full((vocab_size - len(embedding), embedding.shape[1]), 5.0)
        weights = {k: v.clone() for k, v in weights.items()}
        save_file(weights | {"model.embed_tokens.weight": torch.cat([embedding, rows])}, checkpoint_file)
        _change_config(folder, vocab_size=vocab_size)
    return _open(folder, output_dir)


def wider_checkpointer(output_dir):
    """Random weights for `wider_tiny_qwen2`."""
    folder, new = _variant("teacher", output_dir, "wider")
    if new:
        torch.manual_seed(0)
        weights = qwen2_tune_to_hf(wider_tiny_qwen2().state_dict(), num_heads=4, num_kv_heads=2, dim=256)
        save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors")
        _change_config(folder, hidden_size=256)
    return _open(folder, output_dir)


def _change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def untied_tiny_qwen2():
    return qwen2(max_seq_len=MAX_SEQ_LEN, **{**_SHAPE, "tie_word_embeddings": False})


def untied_checkpointer(output_dir):
    """A shipped checkpoint with its head as a matrix of its own."""
    folder, new = _variant("student", output_dir, "untied")
    if new:
        weights = {k: v.clone() for k, v in load_file(folder / "model.safetensors").items()}
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, folder / "model.safetensors")
        _change_config(folder, tie_word_embeddings=False)
    return _open(folder, output_dir)


def other_tokens_checkpointer(output_dir):
    """A shipped checkpoint whose tokenizer has two tokens in each other's place."""
    folder = _copy("other_tokens")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["+"], vocabulary["="] = vocabulary["="], vocabulary["+"]
    path.write_text(json.dumps(content))
    return _open(folder, output_dir)


def biased_tiny_qwen2():
    """A model whose LM head is more than a matrix."""
    model = untied_tiny_qwen2()
    model.output = torch.nn.Linear(128, 16, bias=True)
    return model

"""Against Hugging Face, on weights that went through torchtune's conversion."""

import pytest
import torch
from torchtune.models.qwen2 import qwen2
from transformers import Qwen2Config, Qwen2ForCausalLM

from oprd_tune.config import Component
from oprd_tune.losses import HiddenStateMSE
from oprd_tune.losses.masking import select_states
from oprd_tune.modeling.taps import collect_states, layer_taps
from oprd_tune.modeling.weights import check_weights, load_decoder, open_checkpointer
from oprd_tune.teacher import FrozenTeacher
from oprd_tune.types import LayerPair

SHAPE = {"vocab_size": 61, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32, "intermediate_dim": 48}
LENGTHS = [9, 4, 7]
PROMPT = 2


def hugging_face(folder, tied, seed):
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        rope_theta=10_000.0,
        tie_word_embeddings=tied,
    )
    model = Qwen2ForCausalLM(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start out trivial
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


def torchtune_model(folder, tied):
    def build():
        return qwen2(**SHAPE, max_seq_len=64, norm_eps=1e-6, rope_base=10_000.0, tie_word_embeddings=tied)

    section = {"_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_dir": str(folder)}
    section |= {"checkpoint_files": ["model.safetensors"], "model_type": "QWEN2"}
    files = open_checkpointer(Component.find("checkpointer", section), str(folder.parent / "out"))
    check_weights("checkpointer", files, build())
    return load_decoder(build, files, dtype=torch.float32, device=torch.device("cpu"))


def rows():
    """Right-padded tokens as a recipe has them, and left-padded ones as Hugging Face generates from."""
    generator = torch.Generator().manual_seed(5)
    texts = [torch.randint(1, 61, (n,), generator=generator) for n in LENGTHS]
    width = max(LENGTHS)
    right = torch.stack([torch.cat([t, torch.zeros(width - len(t), dtype=torch.long)]) for t in texts])
    left = torch.stack([torch.cat([torch.zeros(width - len(t), dtype=torch.long), t]) for t in texts])
    left_mask = torch.stack([torch.arange(width) >= width - len(t) for t in texts])
    return right, left, left_mask


@torch.no_grad()
def hugging_face_states(model, left, left_mask):
    """Per layer, the states of each row's real tokens."""
    positions = (left_mask.cumsum(1) - 1).clamp(min=0)
    output = model(left, attention_mask=left_mask.long(), position_ids=positions, output_hidden_states=True)
    return [state[left_mask] for state in output.hidden_states[1:]]


@pytest.mark.parametrize("tied", [True, False])
def test_states_and_loss_are_those_of_hugging_face(tmp_path, tied):
    students_hf, teacher_hf = (hugging_face(tmp_path / name, tied, seed) for seed, name in enumerate(("s", "t")))
    student, teacher = (torchtune_model(tmp_path / name, tied) for name in ("s", "t"))
    right, left, left_mask = rows()
    real = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    index_T = real.flatten().nonzero(as_tuple=True)[0]
    for ours, theirs in ((student, students_hf), (teacher, teacher_hf)):
        states = collect_states(ours, right, [(layer, index_T, None) for layer in (1, 2, 3)])
        for state, wanted in zip(states, hugging_face_states(theirs, left, left_mask), strict=True):
            torch.testing.assert_close(state, wanted, rtol=1e-4, atol=2e-5)

    # Eq. 6 over the response tokens, with the states that predict them.
    response = real & (torch.arange(max(LENGTHS)) >= PROMPT)
    h, g = (hugging_face_states(m, left, left_mask) for m in (students_hf, teacher_hf))
    keep = torch.cat([torch.arange(n) for n in LENGTHS])
    predicting = (keep >= PROMPT - 1) & (
        keep < torch.repeat_interleave(torch.tensor(LENGTHS), torch.tensor(LENGTHS)) - 1
    )
    wanted = sum(((a - b)[predicting] ** 2).mean(-1).mean() for a, b in zip(h, g, strict=True)) / 3

    selection = select_states(response)
    pairs = [LayerPair(layer, layer) for layer in (1, 2, 3)]
    targets = FrozenTeacher(teacher, pairs).targets(right, selection.index_T)
    stream = HiddenStateMSE().stream(pairs, targets.states, selection)
    with layer_taps(student, [1, 2, 3], stream):
        total = student(right)
    torch.testing.assert_close(total / len(selection), wanted, rtol=1e-4, atol=0)

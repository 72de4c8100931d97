"""The tiny models' architectures (Qwen2, 0.8M and 2.7M parameters), their checkpoints and their tokenizers."""

from __future__ import annotations

import json
from pathlib import Path

from torchtune.models.qwen2 import lora_qwen2, qwen2
from torchtune.modules import TransformerDecoder
from torchtune.training import FullModelHFCheckpointer

from oprd_tune.data.tokenizer import HuggingFaceTokenizer

SYMBOLS = ["<pad>", "<eos>", *"0123456789+=", " ", "\n"]
TEENS_SYMBOLS = [*SYMBOLS, *map(str, range(10, 20))]
MAX_SEQ_LEN = 128
_FOLDER = Path(__file__).parent
_SHAPE = {
    "vocab_size": len(SYMBOLS),
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 128,
    "intermediate_dim": 384,
    "norm_eps": 1e-6,
    "rope_base": 10_000.0,
    "tie_word_embeddings": True,
}
_WIDE_SHAPE = _SHAPE | {"num_layers": 6, "num_heads": 6, "embed_dim": 192, "intermediate_dim": 576}


def tiny_qwen2() -> TransformerDecoder:
    """Build the tiny model: 4 blocks, width 128, 4 heads over 2 key-value heads, 16 characters, tied embeddings."""
    return qwen2(max_seq_len=MAX_SEQ_LEN, **_SHAPE)


def wide_tiny_qwen2(vocab_size: int = len(SYMBOLS)) -> TransformerDecoder:
    """Build the wide teachers' model: 6 blocks, width 192, 6 heads over 2 key-value heads, tied embeddings.

    `vocab_size` is 16 for the teacher that reads characters, and 26 for the one with tokens for 10 to 19 as well.
    """
    return qwen2(max_seq_len=MAX_SEQ_LEN, **_WIDE_SHAPE | {"vocab_size": vocab_size})


def lora_tiny_qwen2(
    lora_rank: int = 8, lora_alpha: float = 16.0, lora_dropout: float = 0.0, use_dora: bool = False
) -> TransformerDecoder:
    """Build the tiny model with LoRA or DoRA adapters on all linear layers of its blocks."""
    return lora_qwen2(
        ["q_proj", "k_proj", "v_proj", "output_proj"],
        apply_lora_to_mlp=True,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        use_dora=use_dora,
        max_seq_len=MAX_SEQ_LEN,
        **_SHAPE,
    )


def checkpointer(name: str, output_dir: str) -> FullModelHFCheckpointer:
    """Open one of the shipped checkpoints with torchtune's Hugging Face checkpointer.

    Args:
        name: `student`; `teacher`, which is the student after more training; `wide_teacher`, which is larger and has
            another seed; `teens_teacher`, which is wide too and has its own tokenizer; or `hinted`, which adds as badly
            as `student`, and well if it reads the answer first.

    Raises:
        ValueError: if no such checkpoint is shipped.
    """
    shipped = sorted(p.parent.name for p in _FOLDER.glob("*/config.json"))
    if name not in shipped:
        raise ValueError(f"no tiny checkpoint {name!r}; shipped are {shipped}")
    return FullModelHFCheckpointer(
        checkpoint_dir=str(_FOLDER / name),
        checkpoint_files=["model.safetensors"],
        model_type="QWEN2",
        output_dir=output_dir,
    )


def tokenizer(name: str = "student") -> HuggingFaceTokenizer:
    """The tokenizer of a shipped checkpoint. Tokens are characters; `teens_teacher` has 10 to 19 as tokens too."""
    return HuggingFaceTokenizer(str(_FOLDER / name))


def hugging_face_config(model: TransformerDecoder) -> dict[str, object]:
    """The `config.json` of a tiny model, as transformers and vLLM read it."""
    shape = _SHAPE if len(model.layers) == _SHAPE["num_layers"] else _WIDE_SHAPE
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": model.tok_embeddings.num_embeddings,
        "hidden_size": shape["embed_dim"],
        "intermediate_size": shape["intermediate_dim"],
        "num_hidden_layers": shape["num_layers"],
        "num_attention_heads": shape["num_heads"],
        "num_key_value_heads": shape["num_kv_heads"],
        "max_position_embeddings": MAX_SEQ_LEN,
        "rms_norm_eps": shape["norm_eps"],
        "rope_theta": shape["rope_base"],
        "hidden_act": "silu",
        "tie_word_embeddings": shape["tie_word_embeddings"],
        "use_sliding_window": False,
        "torch_dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": SYMBOLS.index("<eos>"),
        "pad_token_id": SYMBOLS.index("<pad>"),
    }


def write_tokenizer(folder: Path, symbols: list[str] = SYMBOLS) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` for these symbols. Longer symbols are matched first."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}, unk_token="<pad>"))
    pattern = r"[\s\S]" if symbols == SYMBOLS else r"1\d|[\s\S]"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in ("<pad>", "<eos>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<pad>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special, "model_max_length": MAX_SEQ_LEN}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")

"""Small model folders with tokenizers of every kind that the tests need."""

import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = [
    "The cat sat on the mat, 12345 times.",
    "user assistant system tool",
    "a 1000 b 22 c 333",
    "{'name': 'cat'}",
] * 3
SPECIAL = ["<eos>", "<pad>", "<|start|>", "<|end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def byte_level(size=330, digits=r"\p{N}{1,3}"):
    """A byte-level tokenizer that splits numbers as `digits` says."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(rf"{digits}| ?\p{{L}}+|\s+|."), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return tokenizer


def write_json(path, content):
    path.write_text(json.dumps(content))


def write_folder(folder, config=None, /, *, tokenizer=None, **files):
    """Write `tokenizer.json`, `tokenizer_config.json` and further JSON files; None leaves a file out."""
    folder.mkdir(exist_ok=True)
    (tokenizer or byte_level()).save(str(folder / "tokenizer.json"))
    default = {"eos_token": "<eos>", "pad_token": "<pad>", "chat_template": TEMPLATE}
    contents = {"tokenizer_config": default if config is None else config, **files}
    for name, content in contents.items():
        if content is not None:
            write_json(folder / f"{name}.json", content)
    return folder

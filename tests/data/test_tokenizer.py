"""Tokenizers and chat templates of model folders are those of transformers, with the ids of `tokenizer.json`."""

import json
import socket

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torchtune.data import Message

from oprd_tune.data import HuggingFaceTokenizer, PromptDataset
from oprd_tune.data.tokenizer_files import conventions, load_tokenizer, tokens_by_id
from oprd_tune.errors import ConfigError

from .folders import SPECIAL, TEMPLATE, byte_level, write_folder, write_json

CHAT = [
    {"role": "system", "content": "Say <b> & 'ü'."},
    {"role": "user", "content": " 12345 cats\n\n"},
    {"role": "assistant", "content": "The mat."},
    {"role": "user", "content": "<|end|> 1000?"},
]


def of_transformers(folder):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    has_file = (folder / "tokenizer.json").is_file()
    return (PreTrainedTokenizerFast if has_file else AutoTokenizer).from_pretrained(str(folder))


# ---- ids ----


@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", "NoSuchTokenizer"])
def test_ids_are_those_of_the_folders_own_file(tmp_path, name):
    folder = write_folder(tmp_path, {"eos_token": "<eos>", "tokenizer_class": name})
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ours = HuggingFaceTokenizer(str(folder))
    for text in ("12345 cats", " The  cat\n\n", "<|start|>user ü 物理", ""):
        assert ours.encode(text) == own.encode(text).ids
        assert ours.decode(ours.encode(text), skip_special_tokens=False) == text
    assert ours.special_tokens == {text: own.token_to_id(text) for text in SPECIAL}


def test_the_models_own_class_would_change_the_ids(tmp_path):
    """Otherwise the test above shows nothing."""
    from transformers import AutoTokenizer

    folder = write_folder(tmp_path, {"eos_token": "<eos>", "tokenizer_class": "Qwen2Tokenizer"})
    wrong = AutoTokenizer.from_pretrained(str(folder)).encode("12345", add_special_tokens=False)
    assert wrong != Tokenizer.from_file(str(folder / "tokenizer.json")).encode("12345").ids


def test_truncation_and_padding_of_the_file_are_not_for_us(tmp_path):
    tokenizer = byte_level()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    ours = HuggingFaceTokenizer(str(write_folder(tmp_path, tokenizer=tokenizer)))
    assert len(ours.encode_batch(["The cat sat on the mat"])[0]) == len(ours.encode("The cat sat on the mat")) > 3
    assert len(ours.encode("a")) == 1


def test_tokens_that_the_config_declares_complete_the_file(tmp_path):
    size = byte_level().get_vocab_size()
    declared = {str(size): {"content": "<|new|>", "special": True}}
    config = {"eos_token": "<|new|>", "added_tokens_decoder": declared}
    ours = HuggingFaceTokenizer(str(write_folder(tmp_path, config)))
    assert ours.encode("a<|new|>")[1:] == [size] == [ours.eos_id]


@pytest.mark.parametrize("said", [{"<|end|>": 3}, {"<|new|>": 9999}])
def test_files_that_contradict_each_other_are_an_error(tmp_path, said):
    config = {"eos_token": "<eos>", "added_tokens_decoder": {str(i): {"content": t} for t, i in said.items()}}
    with pytest.raises(ConfigError, match=r"contradict each other: token '<\|\w+\|>' is \d+ by tokenizer.json, but"):
        HuggingFaceTokenizer(str(write_folder(tmp_path, config)))


def test_a_vocabulary_without_tokenizer_json_loads(tmp_path):
    tokenizer = byte_level()
    folder = write_folder(tmp_path, {"eos_token": "<eos>", "tokenizer_class": "GPT2Tokenizer"}, tokenizer=tokenizer)
    model = json.loads(tokenizer.to_str())["model"]
    (folder / "tokenizer.json").unlink()
    write_json(folder / "vocab.json", model["vocab"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
    ours = HuggingFaceTokenizer(str(folder))
    assert ours.encode(" The cat") == tokenizer.encode(" The cat").ids
    assert tokens_by_id(folder) is conventions(folder) is None
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})
    assert of_transformers(folder).eos_token == "<|endoftext|>"  # by default, and in no file
    with pytest.raises(ConfigError, match="names an eos_token"):
        HuggingFaceTokenizer(str(folder))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "has no tokenizer.json, and transformers makes no tokenizer of its other files"),
        ({"tokenizer_class": "Qwen2Tokenizer"}, "has no tokenizer.json, and no vocabulary"),
        ({"auto_map": {"AutoTokenizer": ["code.Mine", None]}}, "custom code which must be executed"),
    ],
)
def test_a_folder_without_a_tokenizer_is_explained(tmp_path, config, message):
    (tmp_path / "code.py").write_text("raise SystemExit('a folder must not run its code')\n")
    if config is not None:
        write_json(tmp_path / "tokenizer_config.json", config)
    with pytest.raises(ConfigError, match=message):
        HuggingFaceTokenizer(str(tmp_path))


def test_broken_files_and_missing_folders_are_explained(tmp_path):
    with pytest.raises(ConfigError, match="there is no folder"):
        HuggingFaceTokenizer(str(tmp_path / "nothing"))
    folder = write_folder(tmp_path / "one")
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match="generation_config.json is not JSON"):
        HuggingFaceTokenizer(str(folder))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be read"):
        HuggingFaceTokenizer(str(folder))


# ---- special tokens ----


EOS, PAD, START, END = (byte_level().token_to_id(text) for text in SPECIAL)


@pytest.mark.parametrize(
    ("config", "files", "stops"),
    [
        ({"eos_token": "<eos>"}, {}, [EOS]),
        ({"eos_token": "<eos>"}, {"generation_config": {"eos_token_id": None}}, [EOS]),
        ({"eos_token": "<eos>"}, {"generation_config": {"eos_token_id": 0}}, [EOS, 0]),
        ({"eos_token": {"__type": "AddedToken", "content": "<eos>"}}, {}, [EOS]),
        ({}, {"special_tokens_map": {"eos_token": "<|end|>"}}, [END]),
        (None, {"special_tokens_map": {"eos_token": {"content": "<|end|>"}}}, [END]),
        ({"added_tokens_decoder": {}}, {"special_tokens_map": {"eos_token": {"content": "<|end|>"}}}, [END]),
        ({}, {"generation_config": {"eos_token_id": END}}, [END]),
        ({}, {"generation_config": {"eos_token_id": [END, EOS]}}, [END, EOS]),
        ({"eos_token": "<eos>"}, {"generation_config": {"eos_token_id": [END, EOS]}}, [EOS, END]),
        (
            {"eos_token": "<eos>", "added_tokens_decoder": {str(EOS): {"content": "<eos>", "special": True}}},
            {"special_tokens_map": {"eos_token": "<|end|>"}, "generation_config": {"eos_token_id": PAD}},
            [EOS, END, PAD],
        ),
        ({}, {"config": {"eos_token_id": END}}, [END]),
        ({"eos_token": "<eos>"}, {"config": {"eos_token_id": [END, EOS]}}, [EOS, END]),
        ({"eos_token": "<nowhere>"}, {"generation_config": {"eos_token_id": END}}, [END]),
    ],
)
def test_eos_is_found_in_each_file(tmp_path, config, files, stops):
    folder = write_folder(tmp_path, {} if config is None else config, **files)
    if config is None:
        (folder / "tokenizer_config.json").unlink()
    ours = HuggingFaceTokenizer(str(folder))
    assert ours.eos_id == ours.pad_id == stops[0]
    assert ours.stop_tokens == sorted(stops)


def test_files_that_contradict_each_other_about_the_end_are_named(tmp_path, capsys):
    files = {"config": {"eos_token_id": END}, "generation_config": {"eos_token_id": [PAD]}}
    newline = byte_level().token_to_id("Ċ")
    ours = HuggingFaceTokenizer(str(write_folder(tmp_path, {"eos_token": "Ċ"}, **files)))
    assert ours.stop_tokens == sorted([newline, END, PAD])
    assert ours.eos_id == newline
    told = capsys.readouterr().out
    assert f"tokenizer_config.json {newline} ('Ċ'); generation_config.json {PAD} ('<pad>'); config.json {END}" in told
    files = {"config": {"eos_token_id": EOS}, "generation_config": {"eos_token_id": [END, EOS]}}
    HuggingFaceTokenizer(str(write_folder(tmp_path, {"eos_token": "<eos>"}, **files)))
    assert capsys.readouterr().out == ""


def test_a_token_that_a_plain_template_leaves_out_is_named(tmp_path, capsys):
    tokenizer = byte_level()
    tokenizer.post_processor = TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", START)])
    ours = HuggingFaceTokenizer(str(write_folder(tmp_path / "begins", tokenizer=tokenizer)))
    rows = [{"prompt": "a"}]
    assert PromptDataset(rows, ours, prompt_template="{prompt}")[0][0] == tuple(ours.encode("a"))
    assert (
        "prompts begin without <|start|>, which this tokenizer's folder puts before a text" in capsys.readouterr().out
    )
    with_start = PromptDataset(rows, ours, prompt_template="<|start|>{prompt}")
    assert with_start[0][0] == (START, *ours.encode("a"))
    PromptDataset(rows, ours)  # the chat template decides
    plain = HuggingFaceTokenizer(str(write_folder(tmp_path / "plain")))
    PromptDataset(rows, plain, prompt_template="{prompt}")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("config", [{}, {"eos_token": None}, {"eos_token": "<nowhere>"}])
def test_a_folder_without_eos_is_an_error(tmp_path, config):
    with pytest.raises(ConfigError, match="names an eos_token that the tokenizer has"):
        HuggingFaceTokenizer(str(write_folder(tmp_path, config)))


def test_a_padding_token_that_the_model_does_not_know_is_not_invented(tmp_path):
    size = byte_level().get_vocab_size()
    declared = {str(size): {"content": "<|new|>", "special": True}}
    config = {"eos_token": "<eos>", "pad_token": "[PAD]", "added_tokens_decoder": declared}
    assert of_transformers(write_folder(tmp_path, config)).encode("[PAD]") == [size + 1]
    ours = HuggingFaceTokenizer(str(tmp_path))
    assert ours.pad_id == EOS
    assert ours.encode("[PAD]<|new|>") == [*byte_level().encode("[PAD]").ids, size]
    assert len(ours.token_bytes.pieces) == size + 1
    assert ours.special_tokens == {**{text: byte_level().token_to_id(text) for text in SPECIAL}, "<|new|>": size}
    assert ours.decode([size, START]) == ""


def test_the_other_named_tokens(tmp_path):
    config = {"eos_token": "<eos>", "pad_token": "<pad>", "bos_token": "<|start|>"}
    ours = HuggingFaceTokenizer(str(write_folder(tmp_path, config)))
    assert (ours.bos_id, ours.pad_id, ours.eos_id) == (START, PAD, EOS)
    assert ours.encode("a", add_bos=True, add_eos=True) == [START, *ours.encode("a"), EOS]
    assert conventions(tmp_path) == {"EOS": "<eos>", "padding": "<pad>", "chat template": None}
    tokens, special = tokens_by_id(tmp_path)
    assert (tokens[EOS], special) == ("<eos>", {EOS, PAD, START, END})


# ---- chat templates ----

FEATURES = {
    "plain": TEMPLATE,
    "tojson": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}"
    "{{ messages | tojson(ensure_ascii=true, separators=(',', ':'), sort_keys=true) }}",
    "date": "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}" + TEMPLATE,
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}"
    "{% if loop.index0 == 2 %}{% break %}{% endif %}{% endfor %}",
    "special tokens": "{{ bos_token }}{% if unk_token is defined %}!{% endif %}"
    "{{ messages[0]['content'] + eos_token }}",
    "tools": "{% if tools %}tools{% else %}{{ messages[-1].content | trim }}{% endif %}{{ documents is none }}",
    "blocks": "{%- for m in messages %}\n    {%- if m.role == 'user' %}\n  {{ m.content }}\n    {% endif %}\n"
    "{% endfor %}\n",
    "namespace": "{% set n = namespace(i=0) %}{% for m in messages[::-1] %}{% set n.i = n.i + 1 %}{% endfor %}"
    "{{ n.i }}",
}


@pytest.mark.parametrize("name", FEATURES)
def test_templates_render_as_in_transformers(tmp_path, name):
    folder = write_folder(tmp_path, {"eos_token": "<eos>", "bos_token": "<|start|>", "chat_template": FEATURES[name]})
    reference, ours = of_transformers(folder), HuggingFaceTokenizer(str(folder), chat_template_kwargs={})
    chats = [CHAT, CHAT[:2], CHAT[1:2]]
    wanted = [reference.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]
    assert ours.tokenize_chats(chats) == wanted
    assert all(wanted)
    for chat, ids in zip(chats, wanted, strict=True):
        messages = [Message(role=m["role"], content=m["content"]) for m in chat]
        assert ours.tokenize_messages([*messages, Message(role="assistant", content="")])[0] == ids
    whole = reference.apply_chat_template(CHAT[:3], return_dict=False)
    assert ours.tokenize_messages([Message(**m) for m in CHAT[:3]])[0] == whole


@pytest.mark.parametrize("named", ["default", "other"])
def test_the_default_of_several_templates_is_taken(tmp_path, named):
    folder = write_folder(tmp_path, {"eos_token": "<eos>"})
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    (folder / "additional_chat_templates" / f"{named}.jinja").write_text("{{ messages[0].content }}")
    ours = HuggingFaceTokenizer(str(folder))
    assert ours.chat_template == ("{{ messages[0].content }}" if named == "default" else None)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "rejects this conversation: roles must alternate"),
        ("{{ messages[0].nothing.more }}", "rejects this conversation"),
        ("{{ 1 + messages[0].content }}", "rejects this conversation: unsupported operand"),
        ("{% if %}", "rejects this conversation"),
    ],
)
def test_what_a_template_rejects_is_an_error(tmp_path, template, message):
    ours = HuggingFaceTokenizer(str(write_folder(tmp_path, {"eos_token": "<eos>", "chat_template": template})))
    with pytest.raises(ConfigError, match=message):
        ours.tokenize_chats([CHAT])


def test_variables_are_those_that_transformers_does_not_give(tmp_path):
    template = "{% generation %}{{ tools }}{{ strftime_now('%Y') }}{{ sep_token }}{{ mine }}{% endgeneration %}"
    folder = write_folder(tmp_path, {"eos_token": "<eos>", "chat_template": template})
    HuggingFaceTokenizer(str(folder), chat_template_kwargs={"mine": 1})
    for name in ("tools", "sep_token", "strftime_now", "messages"):
        with pytest.raises(ConfigError, match=f"no variable {name}; it has mine"):
            HuggingFaceTokenizer(str(folder), chat_template_kwargs={name: 1})


# ---- loading ----


def test_a_folder_is_loaded_once_until_it_changes(tmp_path, monkeypatch):
    from transformers import PreTrainedTokenizerFast

    loads, load = [], PreTrainedTokenizerFast.from_pretrained
    monkeypatch.setattr(
        PreTrainedTokenizerFast, "from_pretrained", lambda *args, **kw: (loads.append(args), load(*args, **kw))[1]
    )
    folder = write_folder(tmp_path / "one")
    HuggingFaceTokenizer(str(folder))
    HuggingFaceTokenizer(str(tmp_path / "one" / ".." / "one"), chat_template_kwargs={})
    tokens_by_id(folder)
    conventions(folder)
    assert len(loads) == 1
    write_json(folder / "generation_config.json", {"eos_token_id": PAD})
    assert HuggingFaceTokenizer(str(folder)).stop_tokens == [EOS, PAD]
    assert len(loads) == 2


def test_loading_is_quiet_and_asks_no_network(tmp_path, monkeypatch):
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    def load(*args, **kwargs):
        logging.get_logger("transformers.advice").warning("you should")
        logging.get_logger("transformers.advice").error("broken")
        return of_file(*args, **kwargs)

    said = []
    monkeypatch.setattr("logging.Logger.callHandlers", lambda self, record: said.append(record.getMessage()))
    asked, of_file = [], PreTrainedTokenizerFast.from_pretrained
    monkeypatch.setattr(PreTrainedTokenizerFast, "from_pretrained", load)
    monkeypatch.setattr(socket.socket, "connect", lambda *args: asked.append(args))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: asked.append(args) or [])
    before = logging.get_verbosity()
    folder = write_folder(tmp_path, {"eos_token": "<eos>", "tokenizer_class": "NoSuchTokenizer", "auto_map": {}})
    load_tokenizer(folder)
    assert logging.get_verbosity() == before
    assert (asked, said) == ([], ["broken"])

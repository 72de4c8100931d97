"""The command `prune`: what it prints, writes and refuses."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from oprd_tune.data import HuggingFaceTokenizer
from oprd_tune.pruning.prune_command import main
from oprd_tune.pruning.sample_texts import SENTENCES, built_in_texts, texts_of_file
from tests.modeling.test_families import write_reference

TINY = "tiny/teacher"  # Qwen2: 4 blocks, 4 heads of 32 in 2 groups


@pytest.fixture
def sums(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text('{"question": "12+34=", "answer": "46"}\n{"question": "7+5=", "answer": "12"}\n')
    return path


def refused(capsys, *words):
    """The one line that a mistake leaves on stderr."""
    capsys.readouterr()
    try:
        status = main(list(map(str, words)))
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


def test_says_what_was_kept_and_what_it_costs(tmp_path, capsys, sums):
    out = tmp_path / "small"
    assert main([TINY, str(out), "--drop-blocks", "2", "--texts", str(sums), "--answer-column", "answer"]) == 0
    said = capsys.readouterr().out
    record = json.loads((out / "pruned.json").read_text())
    assert "kept 1, 3-4; dropped 2" in said
    assert "to heal it: teacher=tiny/teacher 'layer_pairs=[[1,1],[2,3],[3,4]]'" in said
    assert f"2: {record['block_changes'][1]:.3f}" in said
    assert f"{record['parameters_before']:,} before, {record['parameters_after']:,} after" in said
    assert f"{record['perplexity_before']:.4g} before, {record['perplexity_after']:.4g} after, of the answers" in said
    assert 1 < record["perplexity_before"] < 1.1 < record["perplexity_after"]  # it was trained on answers alone
    assert (record["source"], record["tokens"]) == (TINY, 16)  # "12+34=46" and "7+5=12", each with EOS
    assert (out / "tokenizer.json").is_file()
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 3


def test_narrow_and_shallow_at_once(tmp_path, capsys, sums):
    out = tmp_path / "small"
    words = f"--blocks 3 --width 64 --heads 2 --feed-forward 100 --dtype bf16 --device cpu --first 1 --texts {sums}"
    assert main([TINY, str(out), *words.split()]) == 0
    said = capsys.readouterr().out
    assert "width         kept 64 of 128 channels" in said
    assert "heads         kept 2 of 4" in said
    assert "feed-forward  kept 100 of 384" in said
    assert "layer_pairs" not in said  # states of another width need a bridge
    assert "1 texts of column 'question'" in said
    config = json.loads((out / "config.json").read_text())
    assert (config["torch_dtype"], config["head_dim"], config["num_key_value_heads"]) == ("bfloat16", 32, 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "nothing to prune: give --drop-blocks or"),
        ("--block 3", "unrecognized arguments: --block 3"),
        ("--drop-blocks 2,x", "'2,x' is no list of numbers such as 19,21,23"),
        ("--drop-blocks 5", "--drop-blocks names 5, but the model's blocks are 1 to 4"),
        ("--drop-blocks 0", "names 0"),
        ("--drop-blocks 2,2", "names a block twice"),
        ("--drop-blocks 1,2,3,4", "names all 4 blocks; leave at least one"),
        ("--drop-blocks 2 --blocks 3", "give one of them"),
        ("--blocks 1", "--blocks is 1; give 2 to 4"),
        ("--blocks 5", "--blocks is 5; give 2 to 4"),
        ("--width 0 --heads 2", "--width is 0; the model has 128, so give 1 to 128"),
        ("--feed-forward 385", "--feed-forward is 385; the model has 384"),
        ("--heads 3 --width 96", "2 query heads share one of keys and values; give a multiple of 2, up to 4"),
        ("--heads 2", "allowed are --heads 2 --width 64, --heads 4 --width 128"),
        ("--width 70", "allowed are --heads 2 --width 64, --heads 4 --width 128"),
        ("--blocks 3", "cannot write the built-in English texts; give --texts FILE"),
        ("--blocks 3 --column text", "--column is about a file of texts; give --texts FILE too"),
        ("--blocks 3 --first 2", "--first is about a file of texts; give --texts FILE too"),
        ("--blocks 3 --first 0", "--first is 0; give 1 or more"),
        ("--blocks 3 --max-tokens 129", "--max-tokens is 129; give 2 to 128"),
        ("--blocks 3 --texts nowhere.jsonl", "--texts nowhere.jsonl is no file that ends in .json"),
        ("--blocks 3 --device quantum", "--device quantum cannot be used"),
        ("--blocks 3 --dtype int8", "invalid choice"),
    ],
)
def test_mistakes_take_one_line(tmp_path, capsys, words, said):
    assert said in refused(capsys, TINY, tmp_path / "small", *words.split())
    assert not (tmp_path / "small").exists()


def test_mistakes_in_texts_take_one_line(tmp_path, capsys, sums):
    words = (TINY, tmp_path / "small", "--blocks", 3, "--texts", sums)
    assert "has no column 'nope'; it has question, answer" in refused(capsys, *words, "--column", "nope")
    assert "has no chat template" in refused(capsys, *words, "--template", "chat")
    assert "must contain {prompt}" in refused(capsys, *words, "--template", "x")
    sums.write_text('{"other": "1+1="}\n')
    assert "name one of ['other'] by --column" in refused(capsys, *words)
    sums.write_text('{"prompt": "1"}\n')
    assert "column 'prompt' has no text of two tokens" in refused(capsys, *words)


def test_folders_that_cannot_be_used_are_refused(tmp_path, capsys):
    out, three = tmp_path / "small", ("--blocks", 3)
    assert "there is no folder nowhere" in refused(capsys, "nowhere", out, *three)
    assert "exists already" in refused(capsys, TINY, tmp_path, *three)
    write_reference(tmp_path / "model", "Mistral")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for changes, said in (
        ({"model_type": "gpt2"}, "says model_type gpt2; tests show equal outputs for llama, mistral, qwen2, qwen3"),
        ({"sliding_window": 8}, "no builder here can do this: sliding_window is 8 in config.json and None"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised (awq)"),
    ):
        (tmp_path / "model" / "config.json").write_text(json.dumps(config | changes))
        assert said in refused(capsys, tmp_path / "model", out, *three)
    assert not out.exists()


def test_widths_that_transformers_refuses_are_refused_first(tmp_path, capsys):
    write_reference(tmp_path / "model", "SmolLM2")  # width 32, 8 heads
    said = refused(capsys, tmp_path / "model", tmp_path / "small", "--width", 28)
    assert "28 is no multiple of 8; near it are --width 24 and 32, or give other --heads" in said


def byte_level(folder, context=4096):
    """A small Llama whose tokens are bytes, with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*alphabet, "<eos>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    shape = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": context}
    LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True)).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    turns = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    template = turns + "{% if add_generation_prompt %}>{% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_without_a_file_texts_of_ours_are_read_and_this_is_said(tmp_path, capsys):
    folder = byte_level(tmp_path / "model", context=64)
    assert main([str(folder), str(tmp_path / "small"), "--blocks", "2"]) == 0
    origin = f"{len(SENTENCES)} built-in English texts of ours"
    assert f"measured on {origin}, {64 * len(SENTENCES)} tokens" in capsys.readouterr().out
    whole = built_in_texts(folder, max_tokens=4096)
    assert HuggingFaceTokenizer(str(folder)).decode(whole.rows[0]) == SENTENCES[0]


def test_texts_are_read_like_prompts(tmp_path):
    folder = byte_level(tmp_path / "model")
    decode = HuggingFaceTokenizer(str(folder)).decode
    path = tmp_path / "texts.json"

    def read(rows, **given):
        path.write_text(json.dumps(rows))
        texts = texts_of_file(path, folder, **{"max_tokens": 4096, **given})
        return [decode(row, skip_special_tokens=False) for row in texts.rows]

    path.write_text(json.dumps([{"question": "abc", "answer": "de"}, {"question": "a" * 9, "answer": "b"}]))
    cut = texts_of_file(path, folder, answer_column="answer", max_tokens=5)
    assert ([len(row) for row in cut.rows], cut.starts, cut.scored) == ([5], [3], "answers")
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert read([{"text": "ab"}, {"text": "cd"}]) == ["ab", "cd"]
    assert read([{"text": "ab"}, {"text": "cd"}], first=1) == ["ab"]
    assert read([{"text": "abcdef"}], max_tokens=3) == ["abc"]
    assert read([{"question": "ab", "answer": "c"}], answer_column="answer") == ["abc<eos>"]
    assert read([{"x": {"y": "ab"}}], column="x.y", template="<{prompt}>") == ["<ab>"]
    assert read([{"prompt": "ab"}], template="chat") == ["[user]ab>"]
    assert read([{"messages": chat}]) == ["[user]a>b<eos>"]

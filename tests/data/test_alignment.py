import json
import random
from functools import cache

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from oprd_tune.data import HuggingFaceTokenizer, Reader
from oprd_tune.data.token_bytes import token_bytes
from oprd_tune.errors import ConfigError
from oprd_tune.types import Reading, Rollout

LINES = [
    "The cat sat on the mat, and the other cat sat there too.\n",
    "def add(a, b):\n    return a + b\n\n    # done\n",
    "  two  spaces   three    four\n\n\nlines\tand tabs \r\n",
    "物理学家发现了新的粒子。数学很有意思，物理也很有意思。",
    "café naïve über Ünïcödé élève déjà señor Å",
    "e\u0301le\u0300ve n\u0303 o\u0302\u0323 ki\u0301 한국어 ㄱㅏ \u1112\u1161\u11ab",
    "🎉🎊 👩‍👩‍👧‍👦 🇫🇷 👍🏽 ∑ x² ≤ ∞ 😀😁",
]
CHARACTERS = sorted({c for line in LINES for c in line} | {"<", ">", "|", "_", "▁", "ß", "𝔘", "\xa0", "\u212b", "က"})
FRAGMENTS = [*CHARACTERS, *LINES, " ", "  ", "\n", " the", " cat", "<think>", "</think>", "▁", "<0x41>", "<|start|>"]
SPECIAL = ["<pad>", "<eos>", "<|start|>"]
ADDED = ["<think>", "</think>"]


class Kind:
    """A tokenizer, and written out for it: what a token says, and which space in front of a text is not of the text."""

    def __init__(self, tokenizer, say, drops=False, adds=lambda text: False):
        tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
        tokenizer.add_tokens([AddedToken(s, special=False, normalized=False) for s in ADDED])
        self.raw, self.drops, self.adds = tokenizer, drops, adds
        self.size = tokenizer.get_vocab_size()
        special = {tokenizer.token_to_id(s) for s in SPECIAL}
        texts = {i: t for t, i in tokenizer.get_vocab().items() if i not in special}
        self.says = {i: t.encode() if t in ADDED else say(t) for i, t in texts.items()}

    def wrapped(self, folder, **config):
        self.raw.save(str(folder / "tokenizer.json"))
        config = {"eos_token": "<eos>", "pad_token": "<pad>"} | config
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return HuggingFaceTokenizer(str(folder))


@cache
def letters():
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found = {chr(byte): byte for byte in range(0xC0, 0x100)}
    for character in map(chr, [*range(0x800), *range(0x800, 0xD800, 0x40), *range(0x10000, 0x110000, 0x1000)]):
        found.update(zip(level.pre_tokenize_str(character)[0][0], character.encode(), strict=True))
    assert sorted(found.values()) == list(range(256))
    return found


def byte_level(size, normalizer=None, prefix=False):
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=size > 350)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(LINES * 3, trainer)
    return Kind(
        tokenizer,
        lambda token: bytes(letters()[c] for c in token),
        adds=lambda text: prefix and text != "" and not text.startswith((" ", *SPECIAL, *ADDED)),
    )


def says_piece(token):
    if len(token) == 6 and token.startswith("<0x"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def sentence_piece(size, *, prefix, split):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    if split:
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=size, limit_alphabet=60, show_progress=False)
    tokenizer.train_from_iterator(LINES * 3, trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "", *trained["vocab"]]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    merges = [tuple(merge) for merge in trained["merges"]]
    tokenizer.model = models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing("<unk> $A", special_tokens=[("<unk>", 0)])
    adds = (lambda text: text != "" and not text.startswith((*SPECIAL, *ADDED))) if prefix else lambda text: False
    return Kind(tokenizer, says_piece, drops=prefix, adds=adds)


def metaspace():
    pieces = [(c.replace(" ", "▁"), -5.0) for c in CHARACTERS if c != "က" and c != " "]
    pieces += [("▁the", -3.0), ("▁", -4.0), ("at", -4.0), ("▁c", -4.0), ("物理", -3.0), ("▁ca", -3.5), ("\n\n", -3.0)]
    tokenizer = Tokenizer(models.Unigram([("<pad>", 0.0), *dict(pieces).items()], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    adds = lambda text: not text.startswith((" ", "▁", *SPECIAL, *ADDED))  # noqa: E731
    return Kind(tokenizer, lambda token: token.replace("▁", " ").encode(), drops=True, adds=adds)


def words():
    vocab = {c: i for i, c in enumerate(["<pad>", "", *(c for c in CHARACTERS if c != "ß")])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return Kind(tokenizer, str.encode)


MAKERS = {
    "bytes": lambda: byte_level(262),
    "byte level": lambda: byte_level(700),
    "byte level, NFC": lambda: byte_level(420, normalizers.NFC()),
    "byte level, NFKC": lambda: byte_level(300, normalizers.NFKC()),
    "byte level, prefix": lambda: byte_level(330, prefix=True),
    "llama": lambda: sentence_piece(500, prefix=True, split=False),
    "gemma": lambda: sentence_piece(420, prefix=False, split=True),
    "metaspace": metaspace,
    "words": words,
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Each kind beside the tokenizer that the library makes of it."""
    made = {name: make() for name, make in MAKERS.items()}
    return {name: (kind, kind.wrapped(tmp_path_factory.mktemp("tokenizer"))) for name, kind in made.items()}


def rollout_of(rows, pad=0):
    """A rollout of (prompt tokens, response tokens)."""
    lengths = torch.tensor([len(p) + len(r) for p, r in rows])
    tokens_BS = torch.full((len(rows), int(lengths.max()) + 1), pad)
    mask_BS = torch.zeros(tokens_BS.shape, dtype=torch.bool)
    for row, (prompt, response) in enumerate(rows):
        tokens_BS[row, : lengths[row]] = torch.tensor([*prompt, *response])
        mask_BS[row, len(prompt) : lengths[row]] = True
    no_B = torch.zeros(len(rows), dtype=torch.bool)
    return Rollout(tokens_BS, mask_BS, torch.zeros(tokens_BS.shape), lengths, no_B, torch.arange(len(rows)), 0)


def states(kind, tokens):
    """What has been read before each token and after it, until one that says nothing."""
    read = [b""]
    for token in tokens:
        if token not in kind.says:
            break
        read.append(read[-1] + kind.says[token])
    return read


def without_space(read):
    return [state.removeprefix(b" ") for state in read]


def reference(student, teacher, response):
    """From the definition: the teacher's response tokens, and for the prompt's last column and each response token the
    teacher's place (0 is its prompt's last column), or -1."""
    eos = student.raw.token_to_id("<eos>")
    ended = bool(response) and response[-1] == eos
    body = response[:-1] if ended else response
    mine = states(student, body)
    whole = len(mine) == len(body) + 1
    if student.drops and mine[-1].startswith(b" "):
        mine = without_space(mine)
    text = mine[-1]
    while True:
        try:
            text.decode()
            break
        except UnicodeDecodeError:
            text, whole = text[:-1], False
    tokens = teacher.raw.encode(text.decode(), add_special_tokens=False).ids
    theirs = states(teacher, tokens)
    understood = len(theirs) == len(tokens) + 1
    if teacher.adds(text.decode()):
        theirs = without_space(theirs)
    places = []
    for column, state in enumerate(mine):
        same = [place for place, other in enumerate(theirs) if other == state]
        is_last = state not in mine[column + 1 :]
        is_text = text.startswith(state)
        places.append(same[-1] if same and is_last and is_text else -1)
    places += [-1] * (len(response) + 1 - len(places))
    if ended and whole:
        tokens = [*tokens, teacher.raw.token_to_id("<eos>")]
        if understood and theirs[-1] == text:
            places[-1] = len(tokens)
    return tokens, places


def expected(student, teacher, rollout, rows, teacher_prompts):
    column_BS = torch.full(rollout.tokens_BS.shape, -1)
    tokens = []
    for row, (prompt, response) in enumerate(rows):
        theirs, places = reference(student, teacher, list(response))
        tokens.append([*teacher_prompts[row], *theirs])
        before = len(teacher_prompts[row]) - 1
        for i, place in enumerate(places):
            column_BS[row, len(prompt) - 1 + i] = before + place if place >= 0 else -1
    return tokens, column_BS


def check(kinds, student, teacher, responses, seed=0):
    rng = random.Random(seed)
    (own, own_wrapped), (other, other_wrapped) = kinds[student], kinds[teacher]
    rows = [([rng.randrange(own.size) for _ in range(rng.randint(1, 4))], response) for response in responses]
    teacher_prompts = [[rng.randrange(other.size) for _ in range(rng.randint(1, 5))] for _ in rows]
    rollout = rollout_of(rows)
    reading = Reader(own_wrapped, other_wrapped).read(rollout, teacher_prompts)
    tokens, column_BS = expected(own, other, rollout, rows, teacher_prompts)
    assert reading.lengths_B.tolist() == [len(t) for t in tokens]
    width = max(map(len, tokens))
    assert reading.tokens_BU.tolist() == [t + [other_wrapped.pad_id] * (width - len(t)) for t in tokens]
    assert reading.column_BS.tolist() == column_BS.tolist()
    return reading


def random_text(rng):
    return "".join(rng.choice(FRAGMENTS) for _ in range(rng.randint(0, 8)))


def random_response(rng, kind):
    """Encoded text, cut anywhere or ended, sometimes with a stray token in it; or any tokens at all."""
    eos = kind.raw.token_to_id("<eos>")
    if rng.random() < 0.25:
        ids = [i for i in (rng.randrange(kind.size + 2) for _ in range(rng.randint(0, 6))) if i != eos]
    else:
        ids = [i for i in kind.raw.encode(random_text(rng), add_special_tokens=False).ids if i != eos]
        ids = ids[: rng.randint(0, len(ids))] if rng.random() < 0.4 else ids
        if rng.random() < 0.3:
            stray = rng.choice([i for i in range(kind.size) if i != eos])
            ids.insert(rng.randint(0, len(ids)), stray)
    return [*ids, eos] if rng.random() < 0.6 else ids


@pytest.mark.parametrize("teacher", MAKERS)
@pytest.mark.parametrize("student", MAKERS)
def test_states_meet_where_both_have_read_the_same(kinds, student, teacher):
    rng = random.Random(f"{student} reads as {teacher}")
    reading = check(kinds, student, teacher, [random_response(rng, kinds[student][0]) for _ in range(60)])
    assert (reading.column_BS >= 0).sum() > 60


@pytest.mark.parametrize("name", MAKERS)
def test_a_teacher_with_the_same_tokenizer_meets_every_state(kinds, name):
    kind, tokenizer = kinds[name]
    changed = {"byte level, NFC": LINES[5], "metaspace": LINES[2]}  # what does not survive encoding and decoding
    texts = [*(line for line in LINES if line != changed.get(name)), "", "the cat"]
    ids = [[*kind.raw.encode(text, add_special_tokens=False).ids, tokenizer.eos_id] for text in texts]
    rows = [([5, 6], response) for response in ids]
    reading = Reader(tokenizer, tokenizer).read(rollout_of(rows), [[5, 6]] * len(rows))
    for row, response in enumerate(ids):
        length = len(response) + 2
        # A first token that is only the space in front of the text has read as little as the prompt: it meets instead.
        reads_nothing = kind.drops and kind.says.get(response[0]) == b" "
        wanted = [-1, -1 if reads_nothing else 1, *range(2, length)]
        assert reading.column_BS[row, :length].tolist() == wanted
        assert (reading.column_BS[row, length:] == -1).all()
        assert reading.tokens_BU[row, :length].tolist() == [5, 6, *response]


def ids_of(kind, *tokens):
    """Ids of tokens by their bytes or their text."""
    by_bytes = {said: i for i, said in sorted(kind.says.items())}
    return [kind.raw.token_to_id(t) if isinstance(t, str) else by_bytes[t] for t in tokens]


def places(kinds, student, teacher, response):
    """Teacher's places of the prompt's last column and of each response token, and how many tokens it reads."""
    own, other = kinds[student][1], kinds[teacher][1]
    reading = Reader(own, other).read(rollout_of([([2, 2, 2], response)]), [[3, 3]])
    column = reading.column_BS[0]
    assert column[:2].tolist() == [-1, -1]
    assert column[-1] == -1  # padding
    return [c - 1 if c >= 0 else -1 for c in column[2:-1].tolist()], reading.tokens_BU[0, 2:].tolist()


def test_characters_split_over_tokens_meet_at_their_end(kinds):
    byte = kinds["bytes"][0]
    response = [*ids_of(byte, b"a", b"\xc3", b"\xa9"), *ids_of(byte, b"b", "<eos>")]
    found, tokens = places(kinds, "bytes", "words", response)
    assert tokens == ids_of(kinds["words"][0], b"a", "é".encode(), b"b", "<eos>")
    assert found == [0, 1, -1, 2, 3, 4]


def test_an_empty_response_is_read_as_its_end(kinds):
    for teacher in MAKERS:
        eos = kinds[teacher][1].eos_id
        assert places(kinds, "bytes", teacher, ids_of(kinds["bytes"][0], "<eos>")) == ([0, 1], [eos])


def test_a_cut_response_has_no_end_and_no_half_characters(kinds):
    byte = kinds["bytes"][0]
    found, tokens = places(kinds, "bytes", "words", ids_of(byte, b"a", b"\xe7", b"\x89"))
    assert (found, tokens) == ([0, 1, -1, -1], ids_of(kinds["words"][0], b"a"))


@pytest.mark.parametrize("stray", [b"\xff", "<|start|>", "<pad>"])
def test_nothing_meets_from_what_is_not_text_on(kinds, stray):
    byte = kinds["bytes"][0]
    response = ids_of(byte, b"a", b"t", stray, b"a", "<eos>")
    found, tokens = places(kinds, "bytes", "words", response)
    assert (found, tokens) == ([0, 1, 2, -1, -1, -1], ids_of(kinds["words"][0], b"a", b"t"))


def test_an_id_beyond_the_tokenizer_says_nothing(kinds):
    byte, wrapped = kinds["bytes"]
    response = [*ids_of(byte, b"a"), byte.size + 7, *ids_of(byte, b"a")]
    assert places(kinds, "bytes", "words", response)[0] == [0, 1, -1, -1]
    assert wrapped.token_bytes[byte.size + 7] is None
    assert wrapped.token_bytes[-1] is None
    assert wrapped.token_bytes[wrapped.eos_id] is None
    assert wrapped.token_bytes[ids_of(byte, b"a")[0]] == b"a"


def test_an_added_token_that_is_not_special_is_text(kinds):
    byte = kinds["bytes"][0]
    response = ids_of(byte, "<think>", b"a", "</think>", "<eos>")
    found, tokens = places(kinds, "bytes", "llama", response)
    assert tokens[0] == ids_of(kinds["llama"][0], "<think>")[0]
    assert found[:2] == [0, 1]
    found, tokens = places(kinds, "bytes", "gemma", response)
    assert (found, tokens) == ([0, 1, 2, 3, 4], ids_of(kinds["gemma"][0], "<think>", b"a", "</think>", "<eos>"))


def test_a_special_token_spelled_in_plain_ones_ends_what_the_teacher_agrees_with(kinds):
    byte = kinds["bytes"][0]
    response = ids_of(byte, b"a", *(bytes([b]) for b in b"<eos>"), b"b", "<eos>")
    found, tokens = places(kinds, "bytes", "words", response)
    assert tokens == ids_of(kinds["words"][0], b"a", "<eos>", b"b", "<eos>")
    assert found == [0, 1, *[-1] * 7]


def test_what_the_teacher_does_not_know_ends_what_it_agrees_with(kinds):
    byte = kinds["bytes"][0]
    response = ids_of(byte, b"a", b"\xc3", b"\x9f", b"a", "<eos>")
    found, tokens = places(kinds, "bytes", "words", response)
    assert tokens == ids_of(kinds["words"][0], b"a", "<pad>", b"a", "<eos>")
    assert found == [0, 1, -1, -1, -1, -1]


def test_a_normaliser_that_changes_the_text_ends_the_agreement(kinds):
    word = kinds["words"][0]
    response = ids_of(word, b"a", b"e", "\u0301".encode(), b"b", "<eos>")
    found, tokens = places(kinds, "words", "byte level, NFC", response)
    assert b"".join(kinds["byte level, NFC"][0].says[t] for t in tokens[:-1]) == "aéb".encode()
    assert found == [0, 1, -1, -1, -1, -1]


def test_a_space_that_the_text_has_otherwise_is_none_that_was_added(kinds):
    response = ids_of(kinds["words"][0], "\xa0".encode(), b"x", "<eos>")
    found, tokens = places(kinds, "words", "byte level, NFKC", response)
    assert tokens == ids_of(kinds["byte level, NFKC"][0], b" ", b"x", "<eos>")
    assert found == [0, -1, -1, -1]


def test_the_last_of_several_tokens_that_end_together_meets(kinds):
    word = kinds["words"][0]
    response = ids_of(word, b"", b"a", b"", b"", b"b", b"", "<eos>")
    found, _ = places(kinds, "words", "bytes", response)
    assert found == [-1, 0, -1, -1, 1, -1, 2, 3]


def test_the_space_in_front_that_a_tokenizer_adds_is_no_text(kinds):
    byte, llama = kinds["bytes"][0], kinds["llama"][0]
    found, tokens = places(kinds, "bytes", "llama", ids_of(byte, b"\n", b"a", "<eos>"))
    assert tokens == [llama.raw.token_to_id(t) for t in ("▁", "\n", "a", "<eos>")]
    assert found == [1, 2, 3, 4]  # behind its space, the teacher has read as much as at its prompt's end: nothing
    found, tokens = places(kinds, "llama", "words", [llama.raw.token_to_id(t) for t in ("▁", "a", "▁", "a", "<eos>")])
    assert tokens == ids_of(kinds["words"][0], b"a", b" ", b"a", "<eos>")
    assert found == [-1, 0, 1, 2, 3, 4]
    spaced = ids_of(kinds["words"][0], b" ", b"\n", "<eos>")
    found, tokens = places(kinds, "words", "llama", spaced)
    assert tokens == [llama.raw.token_to_id(t) for t in ("▁▁", "\n", "<eos>")]
    assert found == [0, 1, 2, 3]  # of its two spaces one is text


@pytest.mark.parametrize("name", MAKERS)
def test_tokens_say_what_decoding_says(kinds, name):
    kind, tokenizer = kinds[name]
    rng = random.Random(name)
    for _ in range(300):
        ids = [rng.choice(list(kind.says)) for _ in range(rng.randint(1, 12))]
        if "llama" in name or "gemma" in name:
            ids = [i for i in ids if len(kind.says[i]) != 1 or kind.says[i] < b"\x80"]  # it replaces each stray byte
        says = b"".join(tokenizer.token_bytes[i] for i in ids)
        says = says.removeprefix(b" ") if tokenizer.token_bytes.decoding_drops_space else says
        assert says.decode(errors="replace") == tokenizer.decode(ids)


def test_a_token_that_is_spelled_like_another_kinds_says_its_own_text():
    letter_like = Tokenizer(models.WordLevel({"Ġé": 0, "Ġ —": 1}, unk_token="Ġé"))
    letter_like.decoder = decoders.ByteLevel()
    letter_like.add_tokens([AddedToken("é", special=False)])
    assert token_bytes(letter_like).pieces == (b" \xe9", "Ġ —".encode(), "é".encode())
    plain = Tokenizer(models.WordLevel({"<0x41>": 0, "▁": 1}, unk_token="▁"))
    plain.decoder = decoders.Fuse()
    assert token_bytes(plain).pieces == (b"<0x41>", "▁".encode())
    plain.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    assert token_bytes(plain).pieces == (b"A", "▁".encode())


def test_rows_of_a_reading_are_trimmed_to_what_is_left():
    tokens_BU, column_BS = torch.arange(15).view(3, 5), torch.arange(12).view(3, 4)
    reading = Reading(tokens_BU, torch.tensor([5, 2, 3]), column_BS).rows(torch.tensor([2, 1]), 3)
    assert reading.tokens_BU.tolist() == [[10, 11, 12], [5, 6, 7]]
    assert reading.lengths_B.tolist() == [3, 2]
    assert reading.column_BS.tolist() == [[8, 9, 10], [4, 5, 6]]


def test_a_masked_response_meets_nothing_but_at_its_prompt(kinds):
    """As a truncated one is when it is not to be learnt from."""
    byte, wrapped = kinds["bytes"]
    rollout = rollout_of([([2, 2], ids_of(byte, b"a", b"b")), ([2, 2], ids_of(byte, b"a", "<eos>"))])
    rollout.response_mask_BS[0] = False
    reading = Reader(wrapped, wrapped).read(rollout, [[3], [3]])
    assert reading.column_BS[1].tolist() == [-1, 0, 1, 2, -1]
    assert (reading.column_BS[0] >= 0).sum() == 1
    assert reading.lengths_B.tolist() == [1, 3]


def test_mistakes_are_explained(kinds):
    byte, wrapped = kinds["bytes"]
    with pytest.raises(ConfigError, match="the teacher's tokenizer is a dict; .*HuggingFaceTokenizer"):
        Reader(wrapped, {})
    with pytest.raises(ConfigError, match="the student's tokenizer is a dict"):
        Reader({}, wrapped)
    rollout = rollout_of([([2], ids_of(byte, b"a"))])
    for prompts in ([], [[]]):
        with pytest.raises(ValueError, match="need as many prompts"):
            Reader(wrapped, wrapped).read(rollout, prompts)
    with pytest.raises(ValueError, match="row 0 has no prompt"):
        Reader(wrapped, wrapped).read(rollout_of([([], ids_of(byte, b"a"))]), [[1]])


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.WordPiece(),
        decoders.Sequence([decoders.Replace(Regex("a+"), " "), decoders.Fuse()]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 2, 0)]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 1)]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip("_", 1, 0)]),
        decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.Fuse()]),
        decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)]),
    ],
)
def test_a_tokenizer_whose_tokens_are_no_bytes_is_refused(decoder):
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    if decoder is not None:
        tokenizer.decoder = decoder
    with pytest.raises(ConfigError, match="supported are byte-level BPE .* SentencePiece style .* and plain tokens"):
        token_bytes(tokenizer)


CHAT = (
    "{% for m in messages %}<think>{{ m.content }}{{ eos_token if m.role == 'user' else '<|start|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<think>{% endif %}"
)


def test_a_turn_ends_as_the_chat_template_ends_it(tmp_path, kinds):
    kind, _ = kinds["bytes"]
    start = kind.raw.token_to_id("<|start|>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [start]}))
    chats = kind.wrapped(tmp_path, chat_template=CHAT)
    assert chats.stop_tokens == sorted([chats.eos_id, start])
    assert chats.end_of_turn == start
    reading = Reader(kinds["bytes"][1], chats).read(rollout_of([([2], ids_of(kind, b"a", "<eos>"))]), [[3]])
    assert reading.tokens_BU[0].tolist() == [3, *ids_of(kind, b"a"), start]
    stopped = Reader(chats, chats).read(rollout_of([([2], [*ids_of(kind, b"a"), start])]), [[3]])
    assert stopped.column_BS[0].tolist() == [0, 1, 2, -1]
    for template in (None, "{{ raise_exception('no') }}", CHAT.replace("<|start|>", "")):
        assert kind.wrapped(tmp_path, chat_template=template).end_of_turn == chats.eos_id
    (tmp_path / "generation_config.json").unlink()
    assert kind.wrapped(tmp_path, chat_template=CHAT).end_of_turn == chats.eos_id

"""The bytes that each token of a `tokenizers` vocabulary stands for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from oprd_tune.errors import ConfigError

_SUPPORTED = (
    "byte-level BPE (decoder ByteLevel), SentencePiece style (decoder Metaspace, or Replace of strings, ByteFallback, "
    "Fuse and Strip of a leading space, in this order) and plain tokens (decoder Fuse)"
)
_BYTE_LEVEL = re.compile(r"ByteLevel( Fuse)?")
_PIECES = re.compile(r"Metaspace( Fuse)?|(Replace )*(ByteFallback )?Fuse( Strip)?")
_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class TokenBytes:
    """The bytes of a vocabulary of V ids, and how the tokenizer treats a space at the start of a text.

    Attributes:
        pieces: the bytes of each id; empty for an id that stands for no text.
        sizes_V1: the number of bytes of each id, [V + 1]; -1 for special tokens and for ids without a token. The last
            entry, -1 too, serves all ids beyond the vocabulary.
        decoding_drops_space: whether decoding drops a space at the start of a text.
        no_space_before: encoding puts a space in front of a text unless the text starts with one of these; None if
            encoding never does.
    """

    pieces: tuple[bytes, ...]
    sizes_V1: NDArray[np.int64]
    decoding_drops_space: bool
    no_space_before: tuple[bytes, ...] | None

    def __getitem__(self, token: int) -> bytes | None:
        """The bytes of one id; None for a special token and for an id without a token."""
        if not 0 <= token < len(self.pieces) or self.sizes_V1[token] < 0:
            return None
        return self.pieces[token]

    def read(self, tokens_T: NDArray[np.int64]) -> tuple[bytes, NDArray[np.int64]]:
        """The bytes of all tokens before the first one without bytes (see `sizes_V1`), and the size of each token."""
        ids_T = np.minimum(tokens_T, len(self.pieces))
        sizes_T = self.sizes_V1[ids_T]
        unreadable = np.flatnonzero(sizes_T < 0)
        readable = int(unreadable[0]) if len(unreadable) else len(ids_T)
        return b"".join([self.pieces[i] for i in ids_T[:readable].tolist()]), sizes_T[:readable]

    def space_added(self, encoded: bytes, text: bytes) -> int:
        """How many bytes (0 or 1) at the start of an encoded text are a space that encoding has added."""
        adds = self.no_space_before is not None and not text.startswith(self.no_space_before)
        return int(adds and encoded.startswith(b" "))


def token_bytes(tokenizer: Tokenizer) -> TokenBytes:
    """Work out from a tokenizer's definition which bytes each token stands for.

    An added token that is not special stands for its own text. Raises ConfigError if decoding does more than join the
    bytes of the tokens, apart from a space at the start of the text.
    """
    definition = json.loads(tokenizer.to_str())
    steps = _steps(definition["decoder"], "decoders")
    names = " ".join(step["type"] for step in steps)
    if _BYTE_LEVEL.fullmatch(names):
        say: Callable[[str], bytes] = _from_alphabet
    elif _PIECES.fullmatch(names) and all(map(_is_plain, steps)):
        say = _from_pieces(steps)
    else:
        raise ConfigError(
            f"a tokenizer whose decoder is {json.dumps(definition['decoder'])} does not say which bytes each token "
            f"stands for, so a teacher cannot be aligned with it; supported are {_SUPPORTED}"
        )
    own, added = tokenizer.get_vocab(with_added_tokens=False), tokenizer.get_added_tokens_decoder()
    texts: dict[int, bytes | None] = {i: say(token) for token, i in own.items()}
    for i, token in added.items():
        if token.special:
            texts[i] = None
        elif i not in texts:
            texts[i] = token.content.encode() if say is _from_alphabet else say(token.content)
    size = max(texts, default=-1) + 1
    pieces = [texts.get(i) for i in range(size)]
    return TokenBytes(
        pieces=tuple(piece or b"" for piece in pieces),
        sizes_V1=np.array([-1 if piece is None else len(piece) for piece in pieces] + [-1]),
        decoding_drops_space=any(map(_drops_space, steps)),
        no_space_before=_no_space_before(definition),
    )


def _steps(definition: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a component, with nested sequences flattened."""
    if definition is None:
        return []
    if definition["type"] != "Sequence":
        return [definition]
    return [step for part in definition[key] for step in _steps(part, key)]


def _is_plain(step: dict[str, Any]) -> bool:
    """Whether a decoding step treats a token the same at every place, except for one space at the start of the text."""
    if step["type"] == "Replace":
        return "String" in step["pattern"]
    return step["type"] != "Strip" or (step["content"] == " " and step["start"] <= 1 and step["stop"] == 0)


def _drops_space(step: dict[str, Any]) -> bool:
    if step["type"] == "Metaspace":
        return step["prepend_scheme"] != "never"
    return step["type"] == "Strip" and step["start"] == 1


def _no_space_before(definition: dict[str, Any]) -> tuple[bytes, ...] | None:
    if any(step["type"] == "Prepend" for step in _steps(definition["normalizer"], "normalizers")):
        return ()
    for step in _steps(definition["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Metaspace" and step["prepend_scheme"] != "never":
            return (b" ", step["replacement"].encode())
        if step["type"] == "ByteLevel" and step["add_prefix_space"]:
            return (b" ",)
    return None


def _alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: a printable byte is its own letter, the others get the letters from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_LETTER = _alphabet()


def _from_alphabet(token: str) -> bytes:
    """The bytes of a token's letters. As in the library, a token with any other letter stands for its own text."""
    try:
        return bytes([_BYTE_OF_LETTER[letter] for letter in token])
    except KeyError:
        return token.encode()


def _from_pieces(steps: Sequence[dict[str, Any]]) -> Callable[[str], bytes]:
    replaced = [(step["pattern"]["String"], step["content"]) for step in steps if step["type"] == "Replace"]
    replaced += [(step["replacement"], " ") for step in steps if step["type"] == "Metaspace"]
    has_fallback = any(step["type"] == "ByteFallback" for step in steps)

    def say(token: str) -> bytes:
        for old, new in replaced:
            token = token.replace(old, new)
        byte = _FALLBACK.fullmatch(token) if has_fallback else None
        return bytes([int(byte[1], 16)]) if byte else token.encode()

    return say

"""Loads the tokenizers of model folders through transformers. A folder is loaded once, until its files change."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from oprd_tune.errors import ConfigError

TOKENIZER = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


@dataclass(frozen=True)
class TokenizerFiles:
    """What a model folder says about its tokenizer. Whoever loads it shares it, so nobody changes it.

    Attributes:
        tokenizer: encodes and decodes; without truncation and padding.
        chat_template: the source of the chat template; None if the folder has none.
        special_texts: the texts of the special tokens by their names, such as `eos_token`, as chat templates read them.
        eos, bos, pad: ids of the named tokens; None for one that is not named.
        stops: every id that ends a response, by any file of the folder, ascending.
        contradiction: a sentence if files name ends of a response that have no token in common.
    """

    tokenizer: Tokenizer
    chat_template: str | None
    special_texts: Mapping[str, Any]
    eos: int | None
    bos: int | None
    pad: int | None
    stops: tuple[int, ...]
    contradiction: str | None


def load_tokenizer(folder: Path) -> TokenizerFiles:
    """Load the tokenizer of a model folder, and keep it. A folder whose files have changed is loaded again.

    `tokenizer.json` decides the ids. The model's own class in transformers would rebuild parts of it, such as the
    pattern that splits words, so it is asked only if there is no such file. Added tokens that `tokenizer_config.json`
    declares with an id complete the file. Code that a folder brings along never runs, and nothing is downloaded.

    EOS is the one of `tokenizer_config.json`; else of `special_tokens_map.json`; else the first in
    `generation_config.json`; else in `config.json`.

    Raises:
        ConfigError: if there is no tokenizer, or its files contradict each other.
    """
    folder = folder.expanduser().resolve()
    if not folder.is_dir():
        raise ConfigError(f"tokenizer.path: there is no folder {folder}; give a Hugging Face model folder")
    paths = [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]
    files = sorted(path for path in paths if path.suffix not in _WEIGHTS and path.is_file())
    return _load(folder, tuple((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in files))


@lru_cache(maxsize=4)  # student, teacher, and one more pair
def _load(folder: Path, state: tuple[tuple[str, int, int], ...]) -> TokenizerFiles:
    loaded = _from_transformers(folder)
    tokenizer = _without_invented_tokens(folder, loaded.backend_tokenizer)
    tokenizer.no_truncation()  # the folder may ask for both, for its own training
    tokenizer.no_padding()

    # transformers reads the second file only if the first is an old one, and gives some classes tokens that none names.
    sources = {name: _read(folder / name) for name in (_CONFIG, "special_tokens_map.json")}

    def named(name: str) -> dict[str, int]:
        tokens = {file: source.get(name) for file, source in sources.items()}
        texts = {file: token["content"] if isinstance(token, dict) else token for file, token in tokens.items()}
        found = {file: tokenizer.token_to_id(text) for file, text in texts.items() if text is not None}
        return {file: i for file, i in found.items() if i is not None}

    files = {file: [i] for file, i in named("eos_token").items()}
    files |= {
        name: _ids(_read(folder / name).get("eos_token_id")) for name in ("generation_config.json", "config.json")
    }
    files = {name: ids for name, ids in files.items() if ids}
    stops = [i for ids in files.values() for i in ids]
    template = loaded.chat_template
    return TokenizerFiles(
        tokenizer=tokenizer,
        chat_template=template.get("default") if isinstance(template, dict) else template,
        special_texts=dict(loaded.special_tokens_map),
        eos=stops[0] if stops else None,
        bos=next(iter(named("bos_token").values()), None),
        pad=next(iter(named("pad_token").values()), None),
        stops=tuple(sorted(set(stops))),
        contradiction=_contradiction(folder, tokenizer, files),
    )


def _ids(said: object) -> list[int]:
    """What a file says as `eos_token_id`: an id, several or none."""
    found = said if isinstance(said, list) else [said]
    return [i for i in found if isinstance(i, int)]


def _contradiction(folder: Path, tokenizer: Tokenizer, files: Mapping[str, list[int]]) -> str | None:
    """A sentence if two files of a folder name ends of a response that have no token in common."""
    if all(set(one) & set(other) for one in files.values() for other in files.values()):
        return None
    said = "; ".join(
        f"{name} {', '.join(f'{i} ({tokenizer.id_to_token(i)!r})' for i in dict.fromkeys(ids))}"
        for name, ids in files.items()
    )
    return (
        f"warning: the files in {folder} name different tokens that end a response: {said}. Each of them ends one "
        "here; correct the file that is wrong"
    )


def _from_transformers(folder: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    loader = PreTrainedTokenizerFast if (folder / TOKENIZER).is_file() else AutoTokenizer
    try:
        with _quiet():
            loaded = loader.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises many kinds
        if loader is AutoTokenizer:
            raise ConfigError(
                f"tokenizer.path: {folder} has no {TOKENIZER}, and transformers makes no tokenizer of its other files "
                f"({' '.join(str(error).split())}); give a Hugging Face model folder that has one. Code in a folder "
                "never runs here"
            ) from error
        raise ConfigError(f"tokenizer.path: the tokenizer in {folder} cannot be read: {error}") from error
    # Where a file is missing, the library may fill a tokenizer with special tokens alone, or run it in Python.
    tokens = set()
    if getattr(loaded, "is_fast", False):
        tokens = set(loaded.backend_tokenizer.get_vocab(with_added_tokens=False))
    if tokens <= set(loaded.all_special_tokens):
        raise ConfigError(
            f"tokenizer.path: {folder} has no {TOKENIZER}, and no vocabulary that transformers makes one of; give a "
            "Hugging Face model folder that has it"
        )
    return loaded


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's advice off the terminal. What matters here is checked here."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _without_invented_tokens(folder: Path, tokenizer: Tokenizer) -> Tokenizer:
    """Take out the tokens that no file gives an id. transformers invents one for each that a file names, such as a
    `pad_token`, and the model does not know it.

    Raises ConfigError if two files give a token different ids.
    """
    path = folder / TOKENIZER
    if not path.is_file():
        return tokenizer
    own = {token["content"] for token in _read(path)["added_tokens"]}
    declared = _read(folder / _CONFIG).get("added_tokens_decoder") or {}
    said = {token["content"]: int(i) for i, token in declared.items()} | _read(folder / "added_tokens.json")
    for text, i in said.items():
        if (found := tokenizer.token_to_id(text)) != i:
            raise ConfigError(
                f"the files in {folder} contradict each other: token {text!r} is {found} by {TOKENIZER}, but {i} by "
                "tokenizer_config.json or added_tokens.json. The model knows one of the two; correct the other file"
            )
    added = [token for _, token in sorted(tokenizer.get_added_tokens_decoder().items())]
    known = [t for t in added if t.content in own | said.keys() or tokenizer.model.token_to_id(t.content) is not None]
    if known == added:
        return tokenizer
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_tokens(known)
    return tokenizer


def _read(path: Path) -> dict[str, Any]:
    """A JSON file; nothing if there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}; copy it again") from error


def tokens_by_id(folder: Path) -> tuple[dict[int, str], set[int]] | None:
    """The tokens of a model folder's `tokenizer.json`, and its special ids; None without such a file."""
    if not (folder / TOKENIZER).is_file():
        return None
    tokenizer = load_tokenizer(folder).tokenizer
    tokens = {i: token for token, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    return tokens, set(tokenizer.get_added_tokens_decoder())


def conventions(folder: Path) -> dict[str, str | None] | None:
    """A model folder's EOS token, padding token and chat template; None without `tokenizer.json`."""
    if not (folder / TOKENIZER).is_file():
        return None
    files = load_tokenizer(folder)
    eos, pad = (None if i is None else files.tokenizer.id_to_token(i) for i in (files.eos, files.pad))
    return {"EOS": eos, "padding": pad, "chat template": files.chat_template}

"""The tokenizer of a Hugging Face model folder, with the interface that torchtune's components expect."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from torchtune.data import Message

from oprd_tune.data.token_bytes import TokenBytes, token_bytes
from oprd_tune.errors import ConfigError

_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class HuggingFaceTokenizer:
    """Reads `tokenizer.json`, `tokenizer_config.json` and, if there is one, the chat template.

    It works for every model folder, whatever its pre-tokenization. For Qwen2.5, torchtune's `Qwen2_5Tokenizer` works
    as well. Only the chat template adds special tokens; `encode` does not.

    Args:
        max_seq_len: not used for truncation; the data set drops prompts that are too long.
        chat_template_kwargs: values for the chat template's own variables, such as Qwen3's `enable_thinking`.

    Attributes:
        pad_id: the id that fills rows; the EOS id if the folder names no pad token.
        stop_tokens: every id that ends a response: EOS, and those in `generation_config.json`.

    Raises:
        ConfigError: if a file is missing, no EOS token is named, or the chat template lacks a given variable.
    """

    def __init__(
        self, path: str, max_seq_len: int | None = None, chat_template_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        folder = Path(path)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if not (folder / name).is_file():
                raise ConfigError(f"tokenizer.path: {folder} has no {name}; give a Hugging Face model folder")
        self.max_seq_len = max_seq_len
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_truncation()  # the folder may ask for both, for its own training
        self._tokenizer.no_padding()
        self._config: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text())
        eos_id = self._special_id("eos_token")
        if eos_id is None:
            raise ConfigError(f"{folder}/tokenizer_config.json names no eos_token, so no response could ever end")
        pad_id = self._special_id("pad_token")
        self.eos_id: int = eos_id
        self.bos_id: int | None = self._special_id("bos_token")
        self.pad_id: int = eos_id if pad_id is None else pad_id
        self.special_tokens = {t.content: i for i, t in self._tokenizer.get_added_tokens_decoder().items()}
        self.stop_tokens = sorted({eos_id, *_generation_stops(folder)})
        self.chat_template: str | None = self._read_chat_template(folder)
        self._template_variables = {} if chat_template_kwargs is None else self._variables(chat_template_kwargs)

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """Token ids of `text`. Special tokens that are spelt out in the text are recognised."""
        bos = [self.bos_id] if add_bos and self.bos_id is not None else []
        eos = [self.eos_id] if add_eos else []
        return [*bos, *self._tokenizer.encode(text, add_special_tokens=False).ids, *eos]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts, the same as from `encode`, computed on all cores."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    @cached_property
    def token_bytes(self) -> TokenBytes:
        """The bytes of each token. Raises ConfigError if the folder's definition does not tell them."""
        return token_bytes(self._tokenizer)

    @cached_property
    def end_of_turn(self) -> int:
        """The stop token that the chat template puts after an answer; EOS if there is no template or no such token.

        The folder's `eos_token` may be a different one, which ends a document.
        """
        question, answers = Message(role="user", content="1"), ("", "2")
        try:
            asked, answered = (
                self.tokenize_messages([question, Message(role="assistant", content=answer)])[0] for answer in answers
            )
        except ConfigError:
            return self.eos_id
        same = [one == other for one, other in zip(asked, answered, strict=False)]
        behind = answered[[*same, False].index(False) :]
        return next((token for token in behind if token in self.stop_tokens), self.eos_id)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def tokenize_messages(self, messages: list[Message], *, add_eos: bool = False) -> tuple[list[int], list[bool]]:
        """Render the folder's chat template and tokenize it.

        If the last message is an empty one of the assistant's, only its header is rendered, so that a response can
        follow. Like torchtune, this returns the ids and which of them are masked. All are: prompts are not trained on.

        Raises:
            ConfigError: if the folder has no chat template, or the template rejects the messages.
        """
        if self.chat_template is None:
            raise ConfigError(
                "this tokenizer has no chat template; give dataset.prompt_template, a plain one such as '{prompt}\\n'"
            )
        turns = [{"role": m.role, "content": m.text_content} for m in messages]
        asks = bool(turns) and turns[-1] == {"role": "assistant", "content": ""}
        text = self._render(turns[:-1] if asks else turns, add_generation_prompt=asks)
        ids = self.encode(text, add_eos=add_eos)
        return ids, [True] * len(ids)

    def _render(self, turns: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        special = {key: _special_text(self._config, key) or "" for key in _SPECIAL_TOKENS}
        variables = {**special, **self._template_variables, "messages": turns}
        try:
            template = _environment().from_string(self.chat_template or "")
            return template.render(variables, add_generation_prompt=add_generation_prompt)
        except TemplateError as error:
            raise ConfigError(f"the chat template rejects this conversation: {error}") from error

    def _variables(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Check that the chat template reads each given variable, and copy them."""
        where = "tokenizer.chat_template_kwargs"
        if not isinstance(given, Mapping):
            raise ConfigError(f"{where} is {given!r}; give variables and values, such as {{enable_thinking: false}}")
        if self.chat_template is None:
            raise ConfigError(f"{where} is given, but the folder has no chat template; leave it out")
        environment = _environment()
        try:
            read = find_undeclared_variables(environment.parse(self.chat_template))
        except TemplateError as error:
            raise ConfigError(f"the chat template cannot be read: {error}") from error
        own = read - {"messages", "add_generation_prompt", *_SPECIAL_TOKENS, *environment.globals}
        if unknown := sorted(set(given) - own):
            known = ", ".join(sorted(own)) or "none"
            raise ConfigError(f"{where}: the chat template has no variable {', '.join(unknown)}; it has {known}")
        return dict(given)

    def _read_chat_template(self, folder: Path) -> str | None:
        own_file = folder / "chat_template.jinja"
        if own_file.is_file():
            return own_file.read_text()
        template = self._config.get("chat_template")
        if isinstance(template, list):  # several templates with names
            template = next((t["template"] for t in template if t["name"] == "default"), None)
        return template

    def _special_id(self, key: str) -> int | None:
        text = _special_text(self._config, key)
        return None if text is None else self._tokenizer.token_to_id(text)


def tokens_by_id(folder: Path) -> tuple[dict[int, str], set[int]] | None:
    """The tokens of a model folder's `tokenizer.json`, and its special ids; None without such a file."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    tokenizer = Tokenizer.from_file(str(path))
    tokens = {i: token for token, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    return tokens, set(tokenizer.get_added_tokens_decoder())


def conventions(folder: Path) -> dict[str, str | None] | None:
    """A model folder's EOS token, padding token and chat template; None without a `tokenizer_config.json`."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return None
    config = json.loads(path.read_text())
    template = folder / "chat_template.jinja"
    chat = template.read_text() if template.is_file() else config.get("chat_template")
    return {
        "EOS": _special_text(config, "eos_token"),
        "padding": _special_text(config, "pad_token"),
        "chat template": None if chat is None else str(chat),
    }


def _special_text(config: Mapping[str, Any], key: str) -> str | None:
    token = config.get(key)
    return token["content"] if isinstance(token, dict) else token


def _generation_stops(folder: Path) -> list[int]:
    path = folder / "generation_config.json"
    stops = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
    return stops if isinstance(stops, list) else [] if stops is None else [stops]


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment that chat templates are rendered in, with the same settings as in transformers."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = _raise_template_error
    return environment


def _raise_template_error(message: str) -> NoReturn:
    raise TemplateError(message)

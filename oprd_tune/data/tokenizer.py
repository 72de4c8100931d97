"""The tokenizer of a Hugging Face model folder, with the interface that torchtune's components expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateError
from jinja2.meta import find_undeclared_variables
from torchtune.data import Message

from oprd_tune.data.rendering import render
from oprd_tune.data.token_bytes import TokenBytes, token_bytes
from oprd_tune.data.tokenizer_files import load_tokenizer
from oprd_tune.errors import ConfigError

# What transformers gives to a chat template. The rest is its own variables.
_GIVEN = {"messages", "add_generation_prompt", "tools", "documents"}
_GIVEN |= {f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}


class HuggingFaceTokenizer:
    """The tokenizer and the chat template of a model folder, as transformers loads and renders them.

    It works for every model folder. `tokenizer.json` decides the ids, if there is one; `load_tokenizer` says more. Only
    the chat template adds special tokens; `encode` does not.

    Args:
        max_seq_len: not used for truncation; the data set drops prompts that are too long.
        chat_template_kwargs: values for the chat template's own variables, such as Qwen3's `enable_thinking`.

    Attributes:
        pad_id: the id that fills rows; the EOS id if the folder names no pad token.
        stop_tokens: every id that ends a response: the EOS of each file that names one.

    Raises:
        ConfigError: if the folder has no tokenizer, names no EOS token, or its chat template lacks a given variable.
    """

    def __init__(
        self, path: str, max_seq_len: int | None = None, chat_template_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        files = load_tokenizer(Path(path))
        if files.eos is None:
            raise ConfigError(
                f"no file in {path} names an eos_token that the tokenizer has, so no response could ever end; name it "
                "in tokenizer_config.json, or its id in generation_config.json"
            )
        if files.contradiction is not None:
            print(files.contradiction)
        self.max_seq_len = max_seq_len
        self._folder, self._tokenizer = path, files.tokenizer
        self.eos_id: int = files.eos
        self.bos_id: int | None = files.bos
        self.pad_id: int = files.eos if files.pad is None else files.pad
        self.special_tokens = {t.content: i for i, t in self._tokenizer.get_added_tokens_decoder().items()}
        self.stop_tokens = list(files.stops)
        self.chat_template = files.chat_template
        self._special_texts = files.special_texts
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
    def prepended(self) -> str | None:
        """The token, such as BOS, that the folder's own tokenizer puts before a text, and `encode` does not."""
        own, whole = (self._tokenizer.encode("1", add_special_tokens=added) for added in (False, True))
        return whole.tokens[0] if whole.ids[:1] != own.ids[:1] else None

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

    def tokenize_chats(self, chats: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[int]]:
        """The ids of several chats, each followed by the assistant's header, so that a response can follow.

        A message is a mapping with `role`, `content` and whatever else the chat template reads.

        Raises:
            ConfigError: if the folder has no chat template, or `render` raises it.
        """
        return self.encode_batch(self._render(chats, add_generation_prompt=True))

    def tokenize_messages(self, messages: list[Message], *, add_eos: bool = False) -> tuple[list[int], list[bool]]:
        """Render the folder's chat template and tokenize it, like torchtune's tokenizers.

        If the last message is an empty one of the assistant's, only its header is rendered, so that a response can
        follow. This returns the ids and which of them are masked. All are: prompts are not trained on.

        Raises:
            ConfigError: if the folder has no chat template, or `render` raises it.
        """
        turns = [{"role": m.role, "content": m.text_content} for m in messages]
        asks = bool(turns) and turns[-1] == {"role": "assistant", "content": ""}
        (text,) = self._render([turns[:-1] if asks else turns], add_generation_prompt=asks)
        ids = self.encode(text, add_eos=add_eos)
        return ids, [True] * len(ids)

    def _render(self, chats: Sequence[Sequence[Mapping[str, Any]]], *, add_generation_prompt: bool) -> list[str]:
        if self.chat_template is None:
            raise ConfigError(
                f"{self._folder} has no chat template. For prompts of plain text, give dataset.prompt_template, such "
                "as '{prompt}\\n'; else `tokenizer: FOLDER`, of a model with the same tokens and a chat template"
            )
        variables = {**self._special_texts, **self._template_variables}
        return render(self.chat_template, chats, add_generation_prompt=add_generation_prompt, **variables)

    def _variables(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Check that the chat template reads each given variable, and copy them."""
        where = "chat_template_kwargs"
        if not isinstance(given, Mapping):
            raise ConfigError(f"{where} is {given!r}; give variables and values, such as {{enable_thinking: false}}")
        if self.chat_template is None:
            raise ConfigError(f"{where} is given, but the folder has no chat template; leave it out")
        try:
            environment = _environment()
            read = find_undeclared_variables(environment.parse(self.chat_template))
        except (TemplateError, RecursionError) as error:
            raise ConfigError(f"the chat template cannot be read: {error}") from error
        own = read - _GIVEN - set(self._special_texts) - set(environment.globals)
        if unknown := sorted(set(given) - own):
            known = ", ".join(sorted(own)) or "none"
            raise ConfigError(f"{where}: the chat template has no variable {', '.join(unknown)}; it has {known}")
        return dict(given)


def _environment() -> Environment:
    """What transformers renders a chat template in: its tags, filters and functions. It offers no public way there."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template("").environment  # to compile a stranger's template here would run parts of it

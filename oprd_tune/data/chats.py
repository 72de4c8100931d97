"""Prompts as texts or as chat messages, and reference answers as texts, from the values that data sets hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from oprd_tune.data.sources import WrittenNumber
from oprd_tune.errors import ConfigError

Messages = list[dict[str, Any]]
Prompt = str | Messages | None
_EXACT = 2**53  # below, each whole number is a float of its own


def as_prompt(value: Any, where: str) -> Prompt:
    """A prompt as a text, or as chat messages whose contents are texts; None if there is none.

    A list of messages `{role, content}` ends with one of the user's or of a tool's. A content may be a list of parts
    `{type: text, text}`, which are joined. What else a message holds stays for the chat template, except for fields
    that are None: a table gives each row the fields of all rows.

    Args:
        where: the place of the value, for errors.

    Raises:
        ConfigError: if the value is neither of these.
    """
    if value is None or isinstance(value, str):
        return value
    messages = _as_messages(value, where)
    if messages and messages[-1]["role"] == "assistant":
        raise ConfigError(
            f"{where} ends with a message of the assistant's, so nothing is asked; take it out, or name the column "
            "`messages`: there, a last message of the assistant's is the reference answer"
        )
    if messages and messages[-1]["role"] not in ("user", "tool"):
        raise ConfigError(
            f"{where} ends with a message of {messages[-1]['role']!r}; the last one is of `user` or `tool`"
        )
    return messages or None


def as_conversation(value: Any, where: str) -> tuple[Prompt, str | None]:
    """A whole conversation as its prompt and the reference answer: the last message if it is the assistant's.

    Raises:
        ConfigError: if the value is no list of chat messages.
    """
    if value is None or isinstance(value, str):
        return value, None
    messages = _as_messages(value, where)
    if messages and messages[-1]["role"] == "assistant":
        return as_prompt(messages[:-1], f"{where}, without its last message,"), messages[-1]["content"]
    return as_prompt(messages, where), None


def as_answer(value: Any, where: str) -> str | None:
    """A reference answer as text; None if it is not known.

    A number from JSON keeps its written form. Another source may have stored whole numbers as floats, as tables do for
    a column with gaps, so 18.0 becomes `18`; other floats take the shortest form, and NaN is None. `1.50` thus becomes
    `1.5`: to keep it, store it as text. A truth value becomes `true` or `false`.

    Raises:
        ConfigError: if the value is of another type.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | WrittenNumber):
        return str(value)
    if isinstance(value, float):
        if value != value:
            return None
        return str(int(value)) if value.is_integer() and abs(value) < _EXACT else repr(value)
    instead = "Store it as text"
    if isinstance(value, Mapping) and value:
        instead += f", or name a field of it by a dot, as in `COLUMN.{next(iter(value))}`"
    raise ConfigError(f"{where} is {_kind(value)}; allowed are text, numbers, true and false. {instead}")


def with_system(prompt: str | Messages, system_prompt: str | None, where: str) -> Messages:
    """A prompt as chat messages, after a system message if one is given.

    Raises:
        ConfigError: if the messages have a system message already.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if system_prompt is None:
        return messages
    if any(message["role"] in ("system", "developer") for message in messages):
        raise ConfigError(f"{where} has a system message of its own; leave out dataset.system_prompt")
    return [{"role": "system", "content": system_prompt}, *messages]


def is_empty(prompt: str | Messages) -> bool:
    """Whether a prompt asks nothing: no text, or an empty last message."""
    return not prompt or (not isinstance(prompt, str) and not prompt[-1]["content"])


def _as_messages(value: Any, where: str) -> Messages:
    is_list = isinstance(value, Sequence) and not isinstance(value, bytes)
    if not is_list or not all(isinstance(turn, Mapping) and isinstance(turn.get("role"), str) for turn in value):
        raise ConfigError(f"{where} is {_kind(value)}; allowed are text, and a list of chat messages {{role, content}}")
    messages = []
    for turn in value:
        message = {key: _without_none(field) for key, field in turn.items() if field is not None}
        if "content" not in message and len(message) == 1:
            raise ConfigError(f"{where} has a message of {message['role']!r} without content; give it a text")
        messages.append({**message, "content": _text(message.get("content", ""), where)})
    return messages


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = repr(part["type"]) if isinstance(part, Mapping) and "type" in part else _kind(part)
            raise ConfigError(f"{where} has a message with content {kind}; allowed are text and parts of type 'text'")
    return "".join(part["text"] for part in parts)


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(field) for key, field in value.items() if field is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _kind(value: Any) -> str:
    """The type of a value in words, for an error."""
    if isinstance(value, Mapping):
        return f"a struct with the fields {', '.join(map(str, value))}"
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return f"a list of {_kind(value[0])}" if value else "an empty list"
    return f"{type(value).__name__} {value!r}"

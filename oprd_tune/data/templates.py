"""What a teacher's prompt is made of: a text or chat messages, with the columns of a row in their places."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from oprd_tune.data.chats import Messages, Prompt, as_answer, is_empty
from oprd_tune.errors import ConfigError

Template = str | Sequence[Mapping[str, Any]]
PROMPT, ANSWER = "prompt", "answer"
_KEY = "dataset.teacher_prompt_template"
_NAME = re.compile(r"[^\W\d][\w.]*")
_PLACE = re.compile(r"\{(\{[^{}\n]+\})\}|\{([^{}\n]+)\}")  # `{{name}}` stands for `{name}` itself
_LOOKS_MEANT = re.compile(r"(?<!\w)\{[^\W\d][\w .-]*\}")  # not the braces of \boxed{the result}


class TeacherTemplate:
    """A template with `{prompt}`, `{answer}` and any other column of the data set, each in braces.

    Args:
        template: a plain text, or a list of chat messages with `role` and `content`.
        known: columns of the data set. Of them alone the name may have blanks and signs, as in `{Correct Answer}`.

    Attributes:
        columns: the names in braces, without `prompt`.
        untouched: what is in braces as a column would be, but is none, and stays as it is.

    Raises:
        ConfigError: if the template is neither, or lacks `{prompt}` and any column that may stand for it.
    """

    def __init__(self, template: Template, known: Collection[str] = ()) -> None:
        if not isinstance(template, str):
            fit = isinstance(template, Sequence) and template and all(map(_is_message, template))
            if not fit:
                raise ConfigError(
                    f"{_KEY} is {template!r}; give a text, `chat`, or a list of messages, each with `role` and "
                    "`content`"
                )
        self._template, self._known = template, frozenset(known)
        texts = [template] if isinstance(template, str) else [message["content"] for message in template]
        names = dict.fromkeys(name for text in texts for _, name in _PLACE.findall(text) if self._is_place(name))
        if not {*names} - {ANSWER}:
            raise ConfigError(
                f"{_KEY} is {template!r}; it must contain {{{PROMPT}}} or a column that holds the whole prompt, or "
                "be `chat`"
            )
        self._keeps_prompt = PROMPT in names
        self.columns = [name for name in names if name != PROMPT]
        meant = [found for text in texts for found in _LOOKS_MEANT.findall(text)]
        self.untouched = [found for found in meant if not self._is_place(found[1:-1])]

    @property
    def is_chat(self) -> bool:
        """Whether a chat template has to write the result."""
        return not isinstance(self._template, str)

    def fill_all(
        self, prompts: Sequence[Prompt], answers: Sequence[str | None], rows: Sequence[Mapping[str, Any]]
    ) -> list[Prompt]:
        """The teacher's prompts, texts or chat messages, as the template is; None for an empty prompt.

        Of a prompt that is chat messages, `{prompt}` is the content of the last, and those before it come first.

        Args:
            answers: the reference answers.
            rows: the rows of the data set, which have the other `columns`.

        Raises:
            ConfigError: if a value is missing or no text, or if a plain template gets chat messages.
        """
        found: list[Prompt] = []
        for number, (prompt, answer, row) in enumerate(zip(prompts, answers, rows, strict=True)):
            if prompt is None or is_empty(prompt):
                found.append(None)
                continue
            values = {name: as_answer(row.get(name), f"{name} of row {number}") for name in self.columns}
            found.append(self._fill(prompt, values | {ANSWER: answer}, f"row {number}"))
        return found

    def _fill(self, prompt: str | Messages, values: Mapping[str, str | None], where: str) -> Prompt:
        if missing := [name for name in self.columns if values[name] is None]:
            answer = "; {answer} is the reference answer, from dataset.answer_column" if ANSWER in missing else ""
            raise ConfigError(
                f"{where} has no {', '.join(missing)}, which {_KEY} uses{answer}; take such rows out, or the name out "
                "of the template"
            )
        before: Messages = []
        if not isinstance(prompt, str):
            if isinstance(self._template, str) and self._keeps_prompt:
                raise ConfigError(
                    f"the prompt of {where} is a list of chat messages, and only a chat template says how to write "
                    f"their roles; give `chat` as {_KEY}, or a list of messages"
                )
            *before, last = prompt
            before = before if self._keeps_prompt else []
            prompt = str(last["content"])
        texts = {**values, PROMPT: prompt}

        def filled(text: str) -> str:
            return _PLACE.sub(put, text)

        def put(found: re.Match[str]) -> str:
            if found[1]:
                return found[1] if self._is_place(found[1][1:-1]) else found[0]
            return str(texts[found[2]]) if self._is_place(found[2]) else found[0]

        if isinstance(self._template, str):
            return filled(self._template)
        return [*before, *({**message, "content": filled(message["content"])} for message in self._template)]

    def _is_place(self, name: str) -> bool:
        return name in self._known or _NAME.fullmatch(name) is not None


def _is_message(value: object) -> bool:
    return isinstance(value, Mapping) and {"role", "content"} <= value.keys() and isinstance(value["content"], str)

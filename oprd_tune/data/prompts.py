"""Prompts with reference answers, and their tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from typing import Any

from torchtune.data import Message

from oprd_tune.data.chats import Messages, Prompt, as_answer, as_prompt, is_empty, with_system
from oprd_tune.data.templates import TeacherTemplate
from oprd_tune.data.unwritable import tell_of_unwritable
from oprd_tune.errors import ConfigError
from oprd_tune.metrics.progress import LateBar
from oprd_tune.protocols import Tokenizer

PLACEHOLDER = "{prompt}"
CHAT = "chat"
_AT_ONCE = 1000


class PromptDataset:
    """Tokenized prompts and their reference answers.

    Args:
        rows: mappings with `prompt` and `answer`, such as a list of dicts or a `Dataset`. A prompt is a text or a list
            of chat messages, see `as_prompt`; an answer is None, or missing, if it is not known.
        max_prompt_tokens: the most tokens that a prompt may have for the student; None sets no limit. Longer prompts
            and empty ones are dropped.
        prompt_template: a plain text around `{prompt}`; None uses the tokenizer's chat template, as messages need it.
        system_prompt: a system message for the chat template, if messages do not have one.
        teacher_tokenizer: the tokenizer of a teacher that reads the prompts in other tokens; None if it reads these.
        teacher_prompt_template: what the teacher reads instead: a text, or a list of chat messages, around `{prompt}`,
            with `{answer}` and any other column of the rows, see `TeacherTemplate`; or `chat`, its chat template alone.
            None: a teacher with a tokenizer of its own reads the student's plain text if there is one, otherwise its
            own chat template; any other reads what the student reads.

    Attributes:
        kept: the indices of the rows whose prompts are used.
        dropped: how many prompts were empty or too long.
        counts: how many prompts are used, were dropped and why, and how many of those used have no reference answer.
        largest_token: the largest token id in any prompt.
        largest_teacher_token: the same in the teacher's tokens; None without `teacher_tokenizer`.
        longest_teacher_prompt: the most tokens in a prompt that the teacher reads; None if it reads the student's.

    Raises:
        ConfigError: if a value is of another type, a template lacks its placeholder, messages or a system prompt have
            no chat template, there are two system messages, or no prompt is left.
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        tokenizer: Tokenizer,
        *,
        max_prompt_tokens: int | None = None,
        prompt_template: str | None = None,
        system_prompt: str | None = None,
        teacher_tokenizer: Tokenizer | None = None,
        teacher_prompt_template: str | list[Any] | None = None,
    ) -> None:
        if prompt_template is not None and PLACEHOLDER not in prompt_template:
            raise ConfigError(f"dataset.prompt_template is {prompt_template!r}; it must contain {PLACEHOLDER}")
        rows = list(rows)
        given, by_chat = teacher_prompt_template, prompt_template is None
        template = None if given in (None, CHAT) else TeacherTemplate(given, {key for row in rows for key in row})
        if template is not None and template.untouched:
            print(f"teacher_prompt_template: {', '.join(template.untouched)} is no column, and stays as it is")
        teacher_by_chat = by_chat if given is None else template is None or template.is_chat
        reads_own = teacher_tokenizer is not None or given is not None
        if system_prompt is not None and not by_chat and not (reads_own and teacher_by_chat):
            raise ConfigError("dataset.system_prompt belongs to a chat template; write it into prompt_template instead")
        self._tokenizer, self._system_prompt = tokenizer, system_prompt
        self._teacher_tokenizer = (teacher_tokenizer or tokenizer) if reads_own else None
        _tell_of_beginning(tokenizer, prompt_template)
        prompts = [as_prompt(row["prompt"], _row(i)) for i, row in enumerate(rows)]
        answers = [as_answer(row.get("answer"), f"the answer of row {i}") for i, row in enumerate(rows)]
        own = prompts if prompt_template is None else _filled(prompt_template, prompts)
        tokens = {"tokens": self._tokenize(own, tokenizer, "prompts", chat=by_chat)}
        if self._teacher_tokenizer is not None:
            if isinstance(text := given or prompt_template, str) and not teacher_by_chat:
                _tell_of_beginning(self._teacher_tokenizer, text)
            asked = own if given is None else prompts if template is None else template.fill_all(prompts, answers, rows)
            tokens["teacher_tokens"] = self._tokenize(
                asked, self._teacher_tokenizer, "prompts, as the teacher reads them,", chat=teacher_by_chat
            )
        longest = max_prompt_tokens or max(map(len, tokens["tokens"]), default=0)
        fits = [0 < len(own) <= longest for own in tokens["tokens"]]
        self.kept = kept = [i for i, fit in enumerate(fits) if fit and all(read[i] for read in tokens.values())]
        self.dropped = len(rows) - len(kept)
        empty = sum(any(not read[i] for read in tokens.values()) for i in range(len(rows)))
        unanswered = sum(answers[i] is None for i in kept)
        why = {"empty": empty, "too_long": self.dropped - empty}
        self.counts = {"used": len(kept), "dropped": self.dropped, **why, "unanswered": unanswered}
        if not kept:
            reason = f"all {len(rows)} prompts are empty or longer than max_prompt_tokens {max_prompt_tokens}"
            reason = reason if rows else "it has no rows"
            raise ConfigError(f"the data set is empty after filtering: {reason}")
        self._answers = [answers[i] for i in kept]
        self._tokens = [tokens["tokens"][i] for i in kept]
        self._teacher_tokens = [tokens["teacher_tokens"][i] for i in kept] if reads_own else None
        self.largest_token = max(map(max, self._tokens))
        self.largest_teacher_token = max(map(max, self._teacher_tokens)) if self._teacher_tokens else None
        self.longest_teacher_prompt = max(map(len, self._teacher_tokens)) if self._teacher_tokens else None

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> tuple[tuple[int, ...], str | None]:
        """Prompt tokens and reference answer."""
        return tuple(self._tokens[index]), self._answers[index]

    def teacher_prompt(self, index: int) -> tuple[int, ...] | None:
        """The prompt in the teacher's tokens; None if the teacher reads the student's tokens."""
        return None if self._teacher_tokens is None else tuple(self._teacher_tokens[index])

    def as_teacher_reads(self) -> PromptDataset:
        """The same prompts and answers in the teacher's tokens; this data set if it reads the student's tokens."""
        if self._teacher_tokens is None or self._teacher_tokenizer is None:
            return self
        view = copy(self)
        view._tokens, view._tokenizer = self._teacher_tokens, self._teacher_tokenizer
        return view

    @property
    def has_answers(self) -> bool:
        """Whether every prompt has a reference answer."""
        return all(answer is not None for answer in self._answers)

    def answer_tokens(self, index: int) -> tuple[int, ...]:
        """The tokens of the reference answer, and EOS."""
        answer = self._answers[index]
        if answer is None:
            raise ConfigError("this data set has no reference answers; give dataset.answer_column")
        return (*self._tokenizer.encode(answer, add_bos=False, add_eos=False), self._tokenizer.eos_id)

    def _tokenize(self, prompts: Sequence[Prompt], tokenizer: Tokenizer, what: str, *, chat: bool) -> list[list[int]]:
        """The tokens of each prompt, by the chat template or as the text that it is; none for an empty one."""
        asked = [(i, prompt) for i, prompt in enumerate(prompts) if prompt is not None and not is_empty(prompt)]
        tokens: list[list[int]] = [[] for _ in prompts]
        with LateBar(desc="Tokenizing prompts", total=len(asked), unit="prompt") as bar:
            for start in range(0, len(asked), _AT_ONCE):
                part = asked[start : start + _AT_ONCE]
                if chat:
                    chats = [with_system(prompt, self._system_prompt, _row(i)) for i, prompt in part]
                    read = _tokenize_chats(tokenizer, chats)
                else:
                    read = _encode(tokenizer, [str(prompt) for _, prompt in part])
                for (i, _), found in zip(part, read, strict=True):
                    tokens[i] = found
                bar.update(len(part))
        tell_of_unwritable([prompt for _, prompt in asked], [tokens[i] for i, _ in asked], tokenizer, what)
        return tokens


def _row(index: int) -> str:
    return f"the prompt of row {index}"


def _filled(template: str, prompts: Sequence[Prompt]) -> list[Prompt]:
    """A plain template around each prompt; None for an empty one."""
    found: list[Prompt] = []
    for i, prompt in enumerate(prompts):
        if prompt is not None and not isinstance(prompt, str):
            raise ConfigError(
                f"{_row(i)} is a list of chat messages, and only a chat template says how to write their roles; leave "
                "out dataset.prompt_template, or give prompts of plain text"
            )
        found.append(template.replace(PLACEHOLDER, prompt) if prompt else None)
    return found


def _tell_of_beginning(tokenizer: Tokenizer, template: str | None) -> None:
    """Say so if a plain template leaves out the token with which the tokenizer's folder begins each text."""
    begins = getattr(tokenizer, "prepended", None)
    if begins is not None and template is not None and not template.startswith(begins):
        print(
            f"prompt_template: prompts begin without {begins}, which this tokenizer's folder puts before a text; only "
            f"what the template says is added. To have it, write it there: {begins + template!r}"
        )


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of several texts; at once if the tokenizer can do that, as ours can."""
    at_once = getattr(tokenizer, "encode_batch", None)
    return at_once(texts) if at_once else [tokenizer.encode(text, add_bos=False, add_eos=False) for text in texts]


def _tokenize_chats(tokenizer: Tokenizer, chats: Sequence[Messages]) -> list[list[int]]:
    """The tokens of several chats; at once if the tokenizer can do that, as ours can."""
    if at_once := getattr(tokenizer, "tokenize_chats", None):
        return at_once(chats)
    if further := {key for chat in chats for message in chat for key in message} - {"role", "content"}:
        raise ConfigError(
            f"chat messages have the fields {sorted(further)}, which {type(tokenizer).__name__} does not read; leave "
            "them out, or give oprd_tune.data.HuggingFaceTokenizer as tokenizer"
        )
    header = Message(role="assistant", content="")
    turns = ([Message(role=m["role"], content=m["content"]) for m in chat] for chat in chats)
    return [tokenizer.tokenize_messages([*chat, header], add_eos=False)[0] for chat in turns]

"""The texts on which a model is measured before it is pruned, as tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oprd_tune.data import HuggingFaceTokenizer, prompt_dataset
from oprd_tune.data.prompt_sources import PROMPT_COLUMNS
from oprd_tune.data.prompts import CHAT, PLACEHOLDER
from oprd_tune.data.sources import SUFFIXES, read_columns
from oprd_tune.errors import ConfigError

_COLUMNS = (*PROMPT_COLUMNS, "text")
SENTENCES = (
    "The old lighthouse had stood on the cliff for two hundred years, and on clear nights its beam could still be "
    "seen from the fishing villages on the other side of the bay. The keeper's daughter counted the ships as they "
    "passed.",
    "Water boils at a lower temperature on a mountain than at the sea, because the air presses less on its "
    "surface. That is why potatoes take longer to cook in a hut high above the valley.",
    "Anna buys three boxes of pencils with twelve pencils each and gives seven pencils to her brother. She had 3 "
    "* 12 = 36 pencils, and 36 - 7 = 29 pencils are left. The answer is 29.",
    "To make a simple soup, cut two onions and a carrot into small pieces and fry them in a little oil. Add a "
    "litre of water, some salt and a handful of lentils, and let everything cook slowly for half an hour.",
    "A list in Python keeps its elements in order, and a set keeps each of them only once. So `len(set(words))` "
    "is the number of different words, and `sorted(set(words))` puts them into alphabetical order.",
    "The committee met on Tuesday to discuss the new bridge. Its members agreed that the river should be crossed "
    "further north, but they could not agree on who would pay for it, and the meeting ended without a decision.",
    "When the bell rang, the children ran out into the snow. Nobody had expected it so early in the year, and the "
    "teacher let them stay outside until their gloves were wet and their faces were red.",
    "If a train leaves at nine o'clock and travels at eighty kilometres an hour, it has gone two hundred "
    "kilometres after two and a half hours. It therefore arrives at half past eleven.",
    "Bees tell each other where flowers are by dancing. The direction of the dance shows the way with respect to "
    "the sun, and its length shows how far they have to fly.",
    '"I don\'t think that we should sell the house," said Martin. "Our grandmother was born in it." His sister '
    'looked at the broken roof and sighed. "Then you will have to learn how to repair it."',
    "The heart pumps blood through the body in two circles. In the smaller one the blood takes up oxygen in the "
    "lungs; in the larger one it carries the oxygen to the muscles, to the brain and to all other organs.",
    "After the war many people moved from the country to the towns, where factories needed workers. The towns "
    "grew so quickly that there were not enough schools, and lessons were given in the morning and again in the "
    "afternoon.",
)


@dataclass(frozen=True)
class Texts:
    """Texts as tokens.

    Attributes:
        rows: the tokens of each text, two or more.
        starts: for each row, the place of the first token that counts for the perplexity: the first of the answer if
            there is one, else the second of the row.
        origin: a few words on where the texts come from.
    """

    rows: Sequence[Sequence[int]]
    starts: Sequence[int]
    origin: str

    @property
    def scored(self) -> str:
        """What the perplexity is of: `texts`, or `answers` if there are some."""
        return "answers" if max(self.starts) > 1 else "texts"

    @property
    def tokens(self) -> int:
        """The number of tokens in all rows."""
        return sum(map(len, self.rows))


def built_in_texts(folder: Path, *, max_tokens: int) -> Texts:
    """A handful of English paragraphs of our own, in the tokens of a model folder.

    Raises:
        ConfigError: if the folder has no tokenizer, or if its tokenizer cannot read English.
    """
    tokenizer = HuggingFaceTokenizer(str(folder))
    rows = tokenizer.encode_batch(SENTENCES)
    if any(_letters(tokenizer.decode(row)) != _letters(text) for row, text in zip(rows, SENTENCES, strict=True)):
        raise ConfigError(f"the tokenizer of {folder} cannot write the built-in English texts; give --texts FILE")
    return Texts([row[:max_tokens] for row in rows], [1] * len(rows), f"{len(rows)} built-in English texts of ours")


def texts_of_file(
    path: Path,
    folder: Path,
    *,
    column: str | None = None,
    answer_column: str | None = None,
    template: str | None = None,
    first: int | None = None,
    max_tokens: int,
) -> Texts:
    """Texts from a file, read as prompts of a config are, in the tokens of a model folder.

    Where there are reference answers, a text is a prompt with its answer.

    Args:
        path: a file that ends in one of `SUFFIXES`.
        column: the column of texts or chat messages; None takes the first of the usual names that is there.
        template: a text around `{prompt}`, or `chat` for the folder's chat template. None takes the chat template for
            chat messages, and texts as they are.
        first: use only so many rows, from the start.
        max_tokens: texts are cut at that length.

    Raises:
        ConfigError: if the file cannot be read, lacks the column or holds other types in it, or if no text is left.
    """
    if path.suffix not in SUFFIXES or not path.is_file():
        raise ConfigError(f"--texts {path} is no file that ends in {', '.join(SUFFIXES)}")
    columns = read_columns(str(path), "train", None)
    name = column or next((name for name in _COLUMNS if name in columns), None)
    if name is None:
        raise ConfigError(
            f"{path} has none of the columns {', '.join(_COLUMNS)}; name one of {list(columns)} by --column"
        )
    if template not in (None, CHAT) and PLACEHOLDER not in template:
        raise ConfigError(f"--template is {template!r}; it must contain {PLACEHOLDER}, or be `{CHAT}`")
    if template is None:
        template = CHAT if _holds_messages(columns, name) else PLACEHOLDER
    tokenizer: Any = HuggingFaceTokenizer(str(folder))
    if template == CHAT and tokenizer.chat_template is None:
        raise ConfigError(f"{folder} has no chat template; give texts without roles, and no --template chat")
    prompts = prompt_dataset(
        tokenizer,
        source=str(path),
        prompt_column=name,
        answer_column=answer_column,
        first=first,
        prompt_template=None if template == CHAT else template,
    )
    rows, starts = [], []
    for i in range(len(prompts)):
        prompt, answer = prompts[i]
        row = prompt if answer is None else (*prompt, *prompts.answer_tokens(i))
        start = 1 if answer is None else len(prompt)
        if start < len(row[:max_tokens]):
            rows.append(row[:max_tokens])
            starts.append(start)
    if not rows:
        raise ConfigError(
            f"--texts {path}: column {name!r} has no text of two tokens, or no answer begins before --max-tokens"
        )
    return Texts(rows, starts, f"{len(rows)} texts of column {name!r} in {path}")


def _holds_messages(columns: Mapping[str, Sequence[Any]], name: str) -> bool:
    return name in columns and any(isinstance(value, list) for value in columns[name])


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, text)).lower()

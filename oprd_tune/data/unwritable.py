"""Characters of prompts that a tokenizer has no tokens for, so that no model ever reads them."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from random import Random

from oprd_tune.data.chats import Prompt
from oprd_tune.protocols import Tokenizer

_LOOKED_AT, _SHOWN = 200, 5


def tell_of_unwritable(
    prompts: Sequence[Prompt], tokens: Sequence[Sequence[int]], tokenizer: Tokenizer, what: str
) -> None:
    """Print how many of up to 200 prompts, chosen at random, have characters that their tokens do not say.

    Args:
        what: the prompts' name, such as `prompts`.
    """
    chosen = Random(0).sample(range(len(prompts)), min(len(prompts), _LOOKED_AT))
    special = getattr(tokenizer, "special_tokens", {})
    lost = []
    for i in chosen:
        text = _text_of(prompts[i])
        spelt_out = [name for name in special if str(name) in text]
        lost.append(missing(text, " ".join([tokenizer.decode(list(tokens[i])), *map(str, spelt_out)])))
    found = Counter(character for characters in lost for character in characters)
    if found:
        shown = " ".join(character for character, _ in found.most_common(_SHOWN))
        print(
            f"dataset: {sum(map(bool, lost))} of {len(lost)} {what} have characters that the tokenizer cannot write, "
            f"so the model does not read them: {shown} (give others, or a model that knows these characters)"
        )


def missing(text: str, decoded: str) -> set[str]:
    """The visible characters of a text that its decoded tokens lack. Case and compatible forms are all the same."""
    kept = set(_plain(decoded))
    return {character for character in text if character.isprintable() and not set(_plain(character)) <= kept}


def _plain(text: str) -> str:
    return "".join(unicodedata.normalize("NFKD", text).casefold().split())


def _text_of(prompt: Prompt) -> str:
    if prompt is None or isinstance(prompt, str):
        return prompt or ""
    content = prompt[-1].get("content")  # a chat template may leave out what was thought in earlier turns
    return content if isinstance(content, str) else ""

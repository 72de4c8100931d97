"""Finds the answer in a text, and compares answers that are words. Nothing here does mathematics, or takes long."""

from __future__ import annotations

import re

# No reference answer is as long. What is longer is no answer, and is not handed to math-verify.
LONGEST_ANSWER = 2000
# Without a marked answer, it stands in the last sentences. math-verify's patterns take time quadratic in the length.
LAST_PART = 2000
_MOST_TRIES = 20  # marks to look at from the end, so that a text of nothing but marks is quick too

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])")
_HEADING = re.compile(
    r"(?:step|part|case|solution|problem|question|explanation|conclusion|summary)\b|.*:$", re.I | re.S
)
_ANSWER_IS = re.compile(r"answer\s*(?:is|:|=)+\s*", re.I)
_LETTER = re.compile(r"\(?([A-J])\)?(?=$|[.:)]|\s*[.:])")
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[^\W\d_]+(?:[\s'-]+[^\W\d_]+)*")
_NUMBER = r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_AMOUNT = re.compile(rf"({_NUMBER})((?:\s+[a-zA-Z]+)+)")
# After a number, these are no unit.
_NO_UNITS = frozenset(
    (
        *(
            "pi",
            "sqrt",
            "sin",
            "cos",
            "tan",
            "log",
            "ln",
            "exp",
            "theta",
            "alpha",
            "beta",
            "infinity",
            "mod",
            "percent",
        ),
        *("dozen", "hundred", "thousand", "million", "billion", "trillion"),
    )
)
_SHORT_WORDS = frozenset(("yes", "no", "odd", "all", "any", "one", "two", "six", "ten", "red"))


def reference_text(answer: str) -> str:
    """The reference in a data set's answer: after the last `####` if there is one, in its last box if there is one."""
    text = answer.rsplit("####", 1)[-1]
    box = _last_box(text)
    return (text if box is None else box).strip()


def stated_answer(response: str) -> str | None:
    """The answer that a response marks: in its last `\\boxed{…}` that is closed, else after its last `####`.

    An empty box, as in a quoted instruction, does not count, and neither does `####` before a heading such as `Step 2`.
    None if nothing is marked.
    """
    box = _last_box(response)
    return _after_hashes(response) if box is None else box


def last_part(response: str) -> str:
    """The end of a response in a form in which math-verify finds numbers, such as that in `答案是42。`."""
    text = response[-LAST_PART:]
    text = re.sub("答案", " answer ", text)
    text = re.sub("[是为為]", " is ", text)
    text = text.translate({ord("。"): ". ", ord("，"): ", ", ord("："): ": ", ord("、"): ", ", ord("．"): "."})
    return re.sub(r"(?<=[\u3040-\u30ff\u4e00-\u9fff])(?=[\d$\\-])", " ", text)


def phrase_after_answer(text: str) -> str:
    """What follows the last `answer is` up to the end of the sentence; nothing if there is none."""
    found = list(_ANSWER_IS.finditer(text))
    return re.split(r"[.。]?(?:\n|$)|[.。](?=\s)", text[found[-1].end() :], maxsplit=1)[0] if found else ""


def tidy(text: str) -> str:
    """An answer as math-verify reads it best: no currency, no unit in words, no spaces in a number."""
    text = " ".join(text.replace("\\$", "").replace("$", "").replace("\x00", "").split())
    text = re.sub(r"^\\\((.*)\\\)$|^\\\[(.*)\\\]$", lambda m: m[1] or m[2] or "", text).strip("*").rstrip(".。 ")
    text = re.sub(r"[€£¥₹]", "", text).replace("\u2212", "-").strip()  # a minus sign that is no hyphen
    text = re.sub(r"(?<=\d)(?:\\[,!;]| )(?=\d{3}(?!\d))", "", text)
    text = re.sub(rf"^({_NUMBER})[eE]([-+]?\d+)$", r"\1 \\times 10^{\2}", text)
    text = re.sub(r"^([-+]?\d+) (\d+)/(\d+)$", r"\1\\frac{\2}{\3}", text)
    text = re.sub(r"(?<=\d) ?percent$", r"\\%", text)
    if re.fullmatch(r"\d+(?: \d+)+", text):
        text = text.replace(" ", ", ")  # math-verify would add them, as in a mixed number
    amount = _AMOUNT.fullmatch(text)
    if amount and not _NO_UNITS & set(amount[2].lower().split()) and len(amount[2]) > 3:
        text = amount[1]
    return text


def compare_words(response: str, reference: str) -> bool | None:
    """Whether two answers are equal as texts; None if mathematics has to decide.

    A choice such as `(B)` equals `B` and `B. 42`. Words are compared without regard to case, and never by mathematics,
    which would take them for products of letters.
    """
    if reference and _plain(response) == _plain(reference):
        return True
    choice = _LETTER.fullmatch(_plain(reference).rstrip("."))
    if choice:
        chosen = _LETTER.match(_plain(response))
        return True if chosen and chosen[1] == choice[1] else None
    if _is_words(reference):
        return _plain(response).casefold() == _plain(reference).casefold()
    return None


def _plain(text: str) -> str:
    text = _WRAPPED.sub(r"\1", text.replace("$", ""))
    text = re.sub(r"\\[,!; ]|~", " ", text)
    return " ".join(text.split()).strip("*").rstrip(".。").strip()


def _is_words(text: str) -> bool:
    plain = _plain(text)
    if not _WORDS.fullmatch(plain):
        return False
    words = plain.casefold().split()
    return ("\\text" in text and len(plain) > 1) or any(len(w) > 3 or w in _SHORT_WORDS for w in words)


def _last_box(text: str) -> str | None:
    """The content of the last box that is closed and not empty; None if there is none."""
    end = len(text)
    for _ in range(_MOST_TRIES):
        end = max(text.rfind("\\boxed", 0, end), text.rfind("\\fbox", 0, end))
        if end < 0:
            return None
        start = _BOX.match(text, end)
        content = "" if start is None else _content(text[start.end() : start.end() + LONGEST_ANSWER + 2].lstrip())
        if content.strip():
            return content.strip()
    return None


def _content(text: str) -> str:
    """The content of the braces that a text starts with; without braces, the rest of the formula."""
    if not text.startswith("{"):
        return re.split(r"[$\n]|\.\s|\.$", text, maxsplit=1)[0] if text[:1].isalnum() or text[:1] in "\\-" else ""
    depth, escaped = 0, False
    for place, sign in enumerate(text):
        if escaped:
            escaped = False
        elif sign == "\\":
            escaped = True
        elif sign in "{}":
            depth += 1 if sign == "{" else -1
            if depth == 0:
                return text[1:place]
    return ""


def _after_hashes(text: str) -> str | None:
    end = len(text)
    for _ in range(_MOST_TRIES):
        end = text.rfind("####", 0, end)
        if end < 0:
            return None
        lines = text[end + 4 : end + 4 + LONGEST_ANSWER].strip().splitlines()
        line = _ANSWER_IS.sub("", lines[0].strip("*# ")) if lines else ""
        if line and not _HEADING.match(line) and re.search(r"\w", line):
            return line
    return None

"""Two graders: one compares texts, the other compares mathematical values (`\\boxed{1/2}` equals `0.5`)."""


def exact_match(response: str, answer: str) -> bool:
    """True if response and answer are the same text, apart from white space at both ends."""
    return response.strip() == answer.strip()


def math_answer(response: str, answer: str) -> bool:
    """True if the last mathematical expression of the response equals the reference, as math-verify judges.

    The reference is the text after `####`, as in GSM8K, or else the whole answer. Raises ImportError without the `eval`
    extra.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError("grading mathematical answers takes math-verify: pip install 'oprd-tune[eval]'") from error
    reference = answer.rsplit("####", 1)[-1].strip()
    return bool(verify(parse(f"${reference}$"), parse(response)))

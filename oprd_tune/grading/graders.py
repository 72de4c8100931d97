"""Graders: to the letter, and mathematically by math-verify (`\\boxed{1/2}` equals `0.5`)."""


def exact_match(response: str, answer: str) -> bool:
    """True if response and answer are the same text, white space at both ends aside."""
    return response.strip() == answer.strip()


def math_answer(response: str, answer: str) -> bool:
    """True if the last mathematical expression of the response equals the reference's.

    In a reference, what stands after `####` counts (GSM8K), or else the whole text.

    Raises:
        ImportError: without the `eval` extra.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError("grading mathematical answers takes math-verify: pip install 'oprd-tune[eval]'") from error
    reference = answer.rsplit("####", 1)[-1].strip()
    return bool(verify(parse(f"${reference}$"), parse(response)))

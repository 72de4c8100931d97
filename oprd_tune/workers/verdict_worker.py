"""The program of a grading process: it compares two mathematical texts by math-verify, one pair after the other."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from serving import serve


def comparer() -> Callable[[Any], bool]:
    """The job of grading: `[response, reference, stated]` → whether both are equal, as math-verify judges.

    `stated` says that the response is the answer itself; otherwise math-verify looks for one in it.
    """
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)  # it warns that its own time limit is off: ours replaces it

    def compare(job: Any) -> bool:
        response, reference, stated = job
        try:
            gold = parse(f"${reference}$", parsing_timeout=None)
            found = parse(f"${response}$" if stated else response, parsing_timeout=None)
            return bool(verify(gold, found, timeout_seconds=None))
        except Exception:
            return False

    for response, stated in (("\\frac{1}{2}", True), ("The answer is 1/2.", False)):
        compare([response, "0.5", stated])  # the first comparisons fill the caches of the parser
    return compare


if __name__ == "__main__":
    serve(comparer)

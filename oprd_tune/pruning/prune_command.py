"""Make a smaller student from a trained model, as a Hugging Face folder.

    python -m oprd_tune prune HuggingFaceTB/SmolLM2-135M-Instruct OUT --drop-blocks 19,21,23,25,27,28
    python -m oprd_tune prune FOLDER OUT --blocks 24 --texts texts.jsonl
    python -m oprd_tune prune FOLDER OUT --width 1024 --heads 16 --feed-forward 3072

What matters is measured on texts: those of --texts, or a few English ones of ours. docs/prune.md says how.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from oprd_tune.errors import ConfigError


class _Parser(argparse.ArgumentParser):
    """A parser whose mistakes take one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help lists what is allowed\n")


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit status: 2 for a mistake, which is said in one line."""
    args = _parser().parse_args(words)
    logging.getLogger("torchao").setLevel(logging.ERROR)  # its remark on C++ extensions would precede each message
    from oprd_tune.pruning.prune_run import run

    try:
        run(args)
    except (ConfigError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m oprd_tune prune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="FOLDER_OR_HUB_NAME", help="the model; its folder stays as it is")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write; must not exist")
    depth = parser.add_argument_group("depth, one of")
    depth.add_argument("--drop-blocks", metavar="I,J,…", type=_numbers, default=(), help="drop these, counted from 1")
    depth.add_argument("--blocks", metavar="N", type=int, help="keep N: those that change the states most")
    width = parser.add_argument_group("width")
    width.add_argument("--width", metavar="D", type=int, help="keep D channels of the hidden states")
    width.add_argument("--heads", metavar="H", type=int, help="keep H query heads of each block, in whole groups")
    width.add_argument("--feed-forward", metavar="F", type=int, help="keep F inner units of each feed-forward layer")
    texts = parser.add_argument_group("texts to measure on")
    texts.add_argument("--texts", metavar="FILE", type=Path, help=".json, .jsonl, .csv or .parquet (texts of ours)")
    texts.add_argument("--column", metavar="NAME", help="its column of texts or chat messages (the first usual name)")
    texts.add_argument("--answer-column", metavar="NAME", help="a column of answers, which follow the texts")
    texts.add_argument("--template", metavar="TEXT", help="a text around {prompt}, or `chat`")
    texts.add_argument("--first", metavar="N", type=int, help="read N of its texts (64)")
    texts.add_argument("--max-tokens", metavar="N", type=int, help="cut texts after N tokens (512)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="to compute and to write in (the model's own)")
    parser.add_argument("--device", metavar="NAME", help="where to compute (a GPU if there is one)")
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 19,21,23") from None

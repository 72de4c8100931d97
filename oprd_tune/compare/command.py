"""Several runs in one picture and one table.

    python -m oprd_tune compare outputs/a outputs/b outputs/b_seed1
    python -m oprd_tune compare outputs/lr_* --against seconds --out outputs/lr

RUN is the `output_dir` of a run that has finished, was stopped or still goes. Runs that differ in nothing but their
seed are one group: the table shows mean, smallest and largest. Prints the table, and writes compare.md, compare.json
and compare.png.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from oprd_tune.compare.comparison import NOTE, as_data, as_markdown, differences, for_terminal, remarks, results
from oprd_tune.compare.past_run import read_runs
from oprd_tune.compare.picture import AXES, draw
from oprd_tune.compare.seed_groups import group_by_seed
from oprd_tune.errors import ConfigError


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit status: 2 if a folder is none of a run's."""
    parser = argparse.ArgumentParser(
        prog="python -m oprd_tune compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="the output_dir of a run")
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=Path("compare"), help="where to write (compare)")
    parser.add_argument("--against", choices=list(AXES), default="steps", help="the picture's horizontal axis (steps)")
    args = parser.parse_args(words)
    try:
        compare(args.runs, args.out, against=args.against)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def compare(folders: Sequence[Path], out: Path, *, against: str = "steps") -> None:
    """Read runs, print their table, and write it with the picture and the numbers into the folder `out`.

    Raises:
        ConfigError: if a folder is none of a run's, or damaged, or if `out` cannot be written.
    """
    groups = group_by_seed(read_runs(folders))
    width = shutil.get_terminal_size((100, 24)).columns
    print(f"\n{for_terminal(results(groups), width)}\n\n{textwrap.fill(NOTE, width)}")
    if len(groups) > 1:
        print(f"\nDifferences in their configs:\n\n{for_terminal(differences(groups), width)}")
    if said := remarks([run for group in groups for run in group.runs]):
        print("\n" + "\n".join(f"! {sentence}" for sentence in said))
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "compare.md").write_text(as_markdown(groups, "compare.png"))
        (out / "compare.json").write_text(json.dumps(as_data(groups), indent=1, default=str) + "\n")
        draw(groups, against=against).savefig(out / "compare.png", dpi=100, pil_kwargs={"optimize": True})
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error}") from error
    print(f"\nwrote {out / 'compare.md'}, compare.json and compare.png")

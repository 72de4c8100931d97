"""One student, two teachers: one can add, the other reverses digits; and the same with half of the prompts exchanged.

    python benchmarks/two_teachers.py --jobs 2 --steps 150      all of it; about ten minutes on two cores

The student of `tiny/two_teachers` adds badly and cannot reverse digits. Where routing is shuffled, each teacher reads
half of its own prompts and half of the other's. Rates, seeds and processes are as in objectives.py. Accuracy is that
over both tasks; the table by task follows.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

from objectives import Case, compare

BOTH = (
    *("teachers.addition=tiny/teacher", "teachers.reversal=tiny/reversing_teacher", "~teacher"),
    *("dataset._component_=oprd_tune.tiny.two_tasks", "eval_dataset._component_=oprd_tune.tiny.two_tasks"),
)
SHUFFLED = "dataset.shuffled=true"
CASES = {
    "hidden states": Case("tiny/two_teachers", (3e-3, 6e-3, 1.2e-2)),
    "hidden states, shuffled": Case("tiny/two_teachers", (3e-3, 6e-3, 1.2e-2), (SHUFFLED,)),
    "full KL": Case("tiny/opd_full", (3e-4, 1e-3, 3e-3), BOTH),
    "full KL, shuffled": Case("tiny/opd_full", (3e-4, 1e-3, 3e-3), (*BOTH, SHUFFLED)),
}


def by_task(found: dict[str, Any], *_: Any) -> str:
    """The student's accuracy by task, the mean over seeds."""
    lines = ["", "By task, the mean over seeds:", "", "| objective | task | before | after | teacher |"]
    lines.append("|---|---|---|---|---|")
    for name, one in found.items():
        tables = [run["by_teacher"] for run in one["runs"]]
        for task in tables[0]:
            means = [fmean(table[task][when] for table in tables) for when in ("before", "after", "teacher")]
            lines.append("| {} | {} | {:.3f} | {:.3f} | {:.3f} |".format(name, task, *means))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    compare(
        CASES,
        name="two_teachers",
        title="# One student, two teachers",
        description=__doc__,
        seeds=(1, 2, 3),
        more=by_task,
    )

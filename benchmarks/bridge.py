"""What a bridge adds on the embedded models, whose teacher is wider, deeper and of another seed than the student.

    python benchmarks/bridge.py --jobs 2

Each case sees the same prompts and steps; its learning rate is the best of its own grid on seed 0, and what is
reported are other seeds at that rate. There are two controls. `held near its start` is the bridge's own penalty with
the student's first states in the teacher's place: it can steady the student but tell it nothing. `misaligned` lets the
states of the teacher with another tokenizer be met one token late. Writes a table, the numbers and a plot to
benchmarks/results/.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from objectives import SEEDS, Case, compare

WIDE = ("teacher=tiny/wide_teacher",)
HELD = Path(__file__).parent / "held_near_start.py"
MISALIGNED = ("reader._component_=misaligned.LateReader",)
PAPER = ("bridge.basis=pca", "bridge.rank=8", "bridge.intercept=false", "loss.normalisation=l2")
BRIDGE = Case("tiny/bridge", (5e-3,))
CASES = {
    "full KL": Case("tiny/opd_full", (4e-4, 8e-4, 1.5e-3), WIDE),
    "top-4": Case("tiny/opd_topk", (6e-4, 1e-3), WIDE),
    "bridge": Case("tiny/bridge", (2e-3, 5e-3, 8e-3)),
    "bridge as in the paper": Case("tiny/bridge", (1e-3, 3e-3), PAPER),
    "bridge, then full KL": Case("tiny/bridge_then_opd", (2e-4, 4e-4), first=BRIDGE),
    "full KL + bridge": Case("tiny/bridge_plus_opd", (2e-3, 5e-3, 8e-3)),
    "full KL, held near its start": Case("tiny/bridge_plus_opd", (1e-3, 5e-3), recipe=HELD),
    "full KL, held lightly": Case("tiny/bridge_plus_opd", (5e-4, 1e-3), ("loss.weights.bridge=3",), recipe=HELD),
    "bridge, other tokenizer": Case("tiny/cross_tokenizer", (3e-4, 1e-3)),
    "bridge, other tokenizer, misaligned": Case("tiny/cross_tokenizer", (3e-4, 1e-3), MISALIGNED),
}

if __name__ == "__main__":
    compare(
        {name: replace(case, overrides=(*case.overrides, "evaluate_every_n_steps=50")) for name, case in CASES.items()},
        name="bridge",
        title="# A bridge from a wider, deeper teacher of another seed, on the embedded models",
        description=__doc__,
        seeds=SEEDS,
    )

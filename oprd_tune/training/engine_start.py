"""Start the engine that samples the student's responses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from oprd_tune.config import OPRDSettings
from oprd_tune.preflight.data import RunData
from oprd_tune.preflight.pair import ModelPairs
from oprd_tune.protocols import Policy, RolloutEngine
from oprd_tune.training.student import Student

_SCRATCH = "sampler"  # within the run's folder; a server starts from it and writes its log there


def start_engine(
    engine: RolloutEngine,
    student: Student,
    pairs: ModelPairs,
    data: RunData,
    settings: OPRDSettings,
    top_k_ids: int = 0,
) -> None:
    """Start a constructed and checked engine: give it the student, and say what to sample.

    See `SamplingRequest` for `top_k_ids`.
    """
    policy = Policy(
        model=student.model,
        files=pairs.student_files,
        dtype=settings.torch_dtype,
        vocabulary=pairs.vocabulary,
        ranks=data.ranks,
        folder=Path(settings.output_dir) / _SCRATCH,
    )
    request = replace(data.request, top_k_ids=top_k_ids)
    engine.start(policy, request, *([] if data.benchmarks is None else [data.benchmarks.request]))

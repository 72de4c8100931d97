"""The student meets the engine that samples its responses."""

from __future__ import annotations

from pathlib import Path

from oprd_tune.config import OPRDSettings
from oprd_tune.preflight.data import RunData
from oprd_tune.preflight.pair import ModelPair
from oprd_tune.protocols import Policy, RolloutEngine
from oprd_tune.training.student import Student
from oprd_tune.types import SamplingRequest

_SCRATCH = "sampler"  # what servers start from and log, within the run's folder


def start_engine(
    engine: RolloutEngine, student: Student, pair: ModelPair, data: RunData, settings: OPRDSettings, top_k_ids: int = 0
) -> None:
    """Give an engine the student, and say what to sample.

    Args:
        engine: constructed and checked.
        student: as it trains.
        pair: the models' files and the tokens that both know.
        data: its tokenizer ends responses.
        settings: how many samples, how long, and the seed.
        top_k_ids: see `SamplingRequest`.
    """
    s = settings
    policy = Policy(
        model=student.model,
        files=pair.student_files,
        dtype=s.torch_dtype,
        vocabulary=pair.vocabulary,
        ranks=data.ranks,
        folder=Path(s.output_dir) / _SCRATCH,
    )
    request = SamplingRequest(
        stop_tokens=data.tokenizer.stop_tokens,
        pad_id=data.tokenizer.pad_id,
        max_prompt_tokens=s.max_prompt_tokens,
        max_new_tokens=s.max_new_tokens,
        samples_per_prompt=s.samples_per_prompt,
        seed=s.seed,
        vocabulary=pair.vocabulary,
        top_k_ids=top_k_ids,
    )
    engine.start(policy, request)

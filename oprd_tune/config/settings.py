"""The scalars of a config, typed and checked. docs/configuration.md explains each one, in this order."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch

from oprd_tune.config.checks import check_seed, check_share, check_whole
from oprd_tune.errors import ConfigError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_MOST_THREADS = 4096  # the system refuses more at some point, and that ends the process without a message
# Marks a field that may change when a run resumes. Such a field decides where the run ends, what it logs, where things
# are kept or how work is divided. Every other field decides what is computed, and must stay the same.
FREE_ON_RESUME = {"free_on_resume": True}


def free(default: Any) -> Any:
    """A field that has a default, and whose value may change when a run resumes."""
    return field(default=default, metadata=FREE_ON_RESUME)


def free_fields(kind: type) -> set[str]:
    """The fields of a dataclass that may change when a run resumes."""
    return {f.name for f in fields(kind) if f.metadata.get("free_on_resume")}


@dataclass(frozen=True)
class OPRDSettings:
    """The scalars of the two training recipes.

    For more scalars in a recipe of your own, derive a frozen dataclass, and give each new field a default.
    """

    output_dir: str = field(metadata=FREE_ON_RESUME)
    max_steps: int = field(metadata=FREE_ON_RESUME)
    max_prompt_tokens: int
    max_new_tokens: int
    seed: int = 0
    resume: bool = free(False)
    device: str | None = None
    dtype: str = "bf16"
    master_dtype: str | None = None
    num_threads: int | None = free(None)
    prompts_per_step: int = 8
    samples_per_prompt: int = 2
    truncated_responses: str = "keep"
    reference_share: float | list[float] = 0.0
    tokens_per_micro_batch: int = free(16384)
    layers: str | list[int] = "all"
    layer_pairs: list[list[int]] | None = None
    positions: str = "last_k"
    positions_k: int = 2000
    anchor: str = "predict"
    average_over: str = "tokens"
    freeze_embedding: bool = False
    clip_grad_norm: float | None = 1.0
    max_nonfinite_steps: int = 3
    activation_checkpointing: bool | int = free(False)
    compile: bool = False
    fsdp_reshard_after_forward: bool = free(True)
    fsdp_cpu_offload: bool = free(False)
    sync_every_micro_batch: bool = free(False)
    teacher_placement: str = free("replicated")
    teacher_quantization: str | None = None
    teacher_weights: str | dict[str, float] = "initial"
    evaluate_teacher: bool = free(True)
    min_matched_share: float = free(0.5)
    preflight: bool | str = free(True)
    evaluate_every_n_steps: int = 50
    checkpoint_every_n_steps: int = free(50)
    keep_checkpoints: int = free(2)
    log_every_n_steps: int = free(1)
    log_samples_every_n_steps: int = free(50)
    diagnostics_every_n_steps: int | None = free(10)
    diagnostics_tokens: int = free(256)
    diagnostics_k: int = free(16)

    def __post_init__(self) -> None:
        for name in (
            *("max_steps", "max_prompt_tokens", "max_new_tokens", "prompts_per_step", "samples_per_prompt"),
            *("tokens_per_micro_batch", "positions_k", "evaluate_every_n_steps", "checkpoint_every_n_steps"),
            *("keep_checkpoints", "log_every_n_steps", "log_samples_every_n_steps", "max_nonfinite_steps"),
            *("diagnostics_tokens", "diagnostics_k"),
        ):
            check_whole(name, getattr(self, name))
        if self.diagnostics_every_n_steps is not None:
            check_whole("diagnostics_every_n_steps", self.diagnostics_every_n_steps)
        for name, allowed in {
            "dtype": tuple(DTYPES),
            "master_dtype": (None, "fp32"),
            "truncated_responses": ("keep", "mask", "drop"),
            "preflight": (True, False, "only"),
        }.items():
            if getattr(self, name) not in allowed:
                *first, last = ("null" if word is None else str(word).lower() for word in allowed)
                raise ConfigError(f"{name} is {getattr(self, name)!r}; allowed are {', '.join(first)} and {last}")
        if self.clip_grad_norm is not None and not self.clip_grad_norm > 0:
            raise ConfigError(f"clip_grad_norm is {self.clip_grad_norm}; give a positive number, or null for none")
        check_machine(self.output_dir, self.num_threads, self.seed)
        if self.activation_checkpointing < 0:
            raise ConfigError(
                f"activation_checkpointing is {self.activation_checkpointing}; allowed are true, false, and n for "
                "every n-th block"
            )
        check_share("min_matched_share", self.min_matched_share)
        self._check_reference_share()
        self._check_teacher_weights()

    def _check_teacher_weights(self) -> None:
        given = self.teacher_weights
        if given not in ("initial", "live") and [*given] != ["ema"]:
            raise ConfigError(f"teacher_weights is {given!r}; allowed are initial, live and `ema: 0.99`")
        if isinstance(given, dict):
            check_share("teacher_weights.ema", given["ema"])

    def _check_reference_share(self) -> None:
        given = self.reference_share
        shares = given[:2] if isinstance(given, list) else [given]
        for share in shares:
            check_share("reference_share", share)
        if isinstance(given, list) and (len(given) not in (2, 3) or any(n < 1 or n % 1 for n in given[2:])):
            raise ConfigError(f"reference_share is {given}; give a share, or [from, to], or [from, to, steps]")

    @property
    def takes_references(self) -> bool:
        """Whether reference answers stand in the place of some samples."""
        return any(self.reference_share[:2]) if isinstance(self.reference_share, list) else self.reference_share > 0

    @property
    def samples_nothing(self) -> bool:
        """Whether reference answers stand in the place of all samples, in each step."""
        given = self.reference_share
        return given[:2] == [1, 1] if isinstance(given, list) else given == 1

    @property
    def teacher_decay(self) -> float | None:
        """How much of its weights a teacher keeps that is the student's moving average; None for any other teacher."""
        return self.teacher_weights["ema"] if isinstance(self.teacher_weights, dict) else None

    @property
    def teacher_is_student(self) -> bool:
        """Whether the student's present weights teach, so that there is no second model."""
        return self.teacher_weights == "live"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The precision in which both models compute."""
        return DTYPES[self.dtype]

    @property
    def torch_master_dtype(self) -> torch.dtype:
        """The precision in which trained parameters and the optimizer's state are kept."""
        return DTYPES[self.master_dtype or self.dtype]


@dataclass(frozen=True)
class EvalSettings:
    """The scalars of `math_eval`."""

    output_dir: str = field(metadata=FREE_ON_RESUME)
    models: dict[str, str] = field(metadata=FREE_ON_RESUME)
    grader: str
    max_new_tokens: int
    profile: str | None = free(None)  # its values are written out where the config is expanded
    samples_per_problem: int = 16
    problems_per_batch: int = free(8)
    seed: int = 0
    device: str | None = None
    dtype: str = "bf16"
    num_threads: int | None = free(None)
    chat_template_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "samples_per_problem", "problems_per_batch"):
            check_whole(name, getattr(self, name))
        check_machine(self.output_dir, self.num_threads, self.seed)
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}; allowed are {' and '.join(DTYPES)}")
        if not self.models:
            raise ConfigError("models is empty; name at least one, such as `student: outputs/mine/final`")
        for name in self.models:
            if not name.replace("_", "").replace("-", "").isalnum():
                raise ConfigError(f"models has the name {name!r}; allowed are letters, digits, _ and -")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The precision in which models compute."""
        return DTYPES[self.dtype]


def check_machine(output_dir: str, num_threads: int | None, seed: int) -> None:
    """Raise ConfigError for a folder, a number of threads or a seed that no run can have."""
    if not output_dir.strip() or "\0" in output_dir:
        raise ConfigError(f"output_dir is {output_dir!r}; give the path of a folder for this run")
    if num_threads is not None:
        check_whole("num_threads", num_threads, at_most=_MOST_THREADS)
    check_seed("seed", seed)

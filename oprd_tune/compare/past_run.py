"""A run as its folder tells it: finished, stopped or still going."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from oprd_tune.compare.short_settings import short_settings
from oprd_tune.errors import ConfigError
from oprd_tune.metrics.step_log import FILE, read_log

LAST = 10  # logged steps whose mean stands for the end of a run, where a metric is noisy
BENCHMARK = re.compile(r"eval/(\w+)/avg_at_k")
KL = r"token/(\w+/)?kl|diagnostics/kl"
_GIB = 2**30


@dataclass(frozen=True)
class PastRun:
    """What a run's folder holds.

    Attributes:
        folder: the folder as it was given.
        name: a short name, unique among the runs that are compared.
        settings: the config as short, flat keys.
        seed: the run's seed.
        lines: the content of `metrics.jsonl`; see `StepLog`.
        summary: the content of `summary.json`; None while the run has not finished.
    """

    folder: Path
    name: str
    settings: Mapping[str, Any]
    seed: int | None
    lines: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any] | None

    @property
    def step(self) -> int:
        """The number of steps that are logged."""
        return max((line["step"] for line in self.lines), default=0)

    @property
    def benchmarks(self) -> list[str]:
        """The names of the benchmarks that the student has answered, in the order of the log."""
        found = (BENCHMARK.fullmatch(name) for line in self.lines for name in line)
        return list(dict.fromkeys(match[1] for match in found if match))

    @property
    def remarks(self) -> list[str]:
        """What the run itself said at its end."""
        return list((self.summary or {}).get("remarks") or [])

    def curve(self, pattern: str) -> dict[int, tuple[float, float]]:
        """By step, the seconds in the training loop and the value of the first metric whose whole name matches."""
        names = sorted({name for line in self.lines for name in line if re.fullmatch(pattern, name)}, key=_by(pattern))
        for name in names:
            found = {line["step"]: (line["seconds"], line[name]) for line in self.lines if line.get(name) is not None}
            if found:
                return found
        return {}

    def values(self) -> dict[str, float | None]:
        """The numbers of the table, by key. Accuracies are fractions. None stands for what was not measured."""
        accuracy, perplexity = self._evaluated("eval/accuracy"), self._evaluated("eval/perplexity")
        teachers = self._series("eval/teacher_accuracy")
        teacher = teachers[-1] if teachers else None
        before, after = accuracy
        gap = None
        if before is not None and after is not None and teacher is not None and teacher != before:
            gap = (after - before) / (teacher - before)
        answered: dict[str, float | None] = {}
        for name in self.benchmarks:
            answered[f"{name}_avg_at_k_before"], answered[f"{name}_avg_at_k_after"] = self._evaluated(
                f"eval/{name}/avg_at_k"
            )
            answered[f"{name}_avg_at_k_teacher"] = next(iter(self._series(f"eval/{name}/teacher_avg_at_k")), None)
        last = self.lines[-1] if self.lines else {"seconds": None, "tokens": None}
        seconds, tokens = last["seconds"], last["tokens"]
        return {
            "accuracy_before": before,
            "accuracy_after": after,
            "accuracy_best": max(self._series("eval/accuracy"), default=None),
            "accuracy_teacher": teacher,
            "gap_closed": gap,
            "perplexity_before": perplexity[0],
            "perplexity_after": perplexity[1],
            "loss": self._latest("loss/total"),
            "kl": self._latest(KL),
            "response_tokens": _mean(self._series("rollout/response_tokens")),
            "tokens_per_second": tokens / seconds if tokens and seconds else None,
            "seconds": seconds or None,
            "peak_gib": max(self._series("memory/peak"), default=None),
            "skipped_steps": max(self._series("optimizer/skipped_steps"), default=None),
            "steps": self.step,
            **answered,
        }

    def _series(self, pattern: str) -> list[float]:
        return [value for _, value in self.curve(pattern).values()]

    def _latest(self, pattern: str) -> float | None:
        """The mean over the last steps, or the last value if it is older."""
        found = self.curve(pattern)
        recent = [value for step, (_, value) in found.items() if step > self.step - LAST]
        return _mean(recent or [value for _, value in found.values()][-1:])

    def _evaluated(self, name: str) -> tuple[float | None, float | None]:
        """Before training, and last; the latter is None until a second evaluation."""
        found = [value for _, value in self.curve(name).values()]
        return (found[0] if found else None), (found[-1] if len(found) > 1 else None)


def read_runs(folders: Sequence[Path]) -> list[PastRun]:
    """Read the folders of runs. A folder that is given twice is read once.

    Raises:
        ConfigError: if a folder is none of a run's, or damaged. The message names it.
    """
    unique = list({folder.resolve(): folder for folder in folders}.items())
    names = _short_names([resolved for resolved, _ in unique])
    return [_read(folder, name) for (_, folder), name in zip(unique, names, strict=True)]


def run_of_summary(name: str, summary: Mapping[str, Any]) -> PastRun:
    """A finished run of which no more is left than its `summary.json`: evaluations and totals."""
    return PastRun(Path(), name, {}, summary["seed"], _lines_of(summary), summary)


def _read(folder: Path, name: str) -> PastRun:
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; give the output_dir of a run")
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder} is no run's folder: it has no config.yaml; give the output_dir of a run")
    try:
        config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    except Exception as error:  # whatever the YAML reader raises
        raise ConfigError(f"{folder}: config.yaml cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(config, dict) or "recipe" not in config:
        raise ConfigError(f"{folder}: config.yaml is none of a run's: it names no recipe")
    if "models" in config:
        raise ConfigError(f"{folder} holds an evaluation, which compares its models itself: see its comparison.md")
    summary = _read_summary(folder)
    lines = read_log(folder)
    if lines is None:
        if summary is None:
            raise ConfigError(f"{folder} has neither {FILE} nor summary.json: its run has not begun to train")
        lines = _lines_of(summary)
    elif summary is not None and summary["steps"] < max((line["step"] for line in lines), default=0):
        summary = None  # the run was resumed since, and goes on
    settings = short_settings(config)
    return PastRun(folder, name, settings, config.get("seed", 0), lines, summary)


def _read_summary(folder: Path) -> dict[str, Any] | None:
    if not (folder / "summary.json").exists():
        return None
    try:
        summary = json.loads((folder / "summary.json").read_text())
        return summary | {"steps": int(summary["steps"]), "evaluations": list(summary["evaluations"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder}: summary.json is damaged or none of a run's ({error})") from error


def _lines_of(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of a run without `metrics.jsonl`: its evaluations and totals."""
    lines: list[dict[str, Any]] = [
        {
            "step": evaluation["step"],
            "seconds": evaluation.get("seconds", 0.0),
            "tokens": 0,
            "eval/accuracy": evaluation["accuracy"],
            "eval/perplexity": evaluation["perplexity"],
            "eval/teacher_accuracy": summary["teacher"],
            **{
                f"eval/{name}/avg_at_k": one["avg_at_k"]["value"]
                for name, one in evaluation.get("benchmarks", {}).items()
            },
        }
        for evaluation in summary["evaluations"]
    ]
    peak = summary.get("peak_memory_bytes")
    total = {"step": summary["steps"], "seconds": summary["seconds"], "tokens": summary["response_tokens"]}
    return [*lines, total | {"memory/peak": peak and peak / _GIB, "optimizer/skipped_steps": summary["skipped_steps"]}]


def _short_names(folders: Sequence[Path]) -> list[str]:
    """As few of the last parts of each path as tell all of them apart."""
    for parts in range(1, 100):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def _by(pattern: str) -> Any:
    """Sorts names by which alternative of a pattern they match."""
    choices = pattern.split("|")
    return lambda name: next((i for i, choice in enumerate(choices) if re.fullmatch(choice, name)), len(choices))


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None

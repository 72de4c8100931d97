"""The folder of an evaluation.

OUTPUT_DIR/config.yaml      the config, overrides included
OUTPUT_DIR/samples.jsonl    every sample with its verdict
OUTPUT_DIR/run.lock         names the process that evaluates here
OUTPUT_DIR/summary.json, comparison.md, comparison.png, tensorboard/
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oprd_tune.errors import ConfigError
from oprd_tune.evaluation.outcome import as_figure, as_markdown, flat, outcome_of
from oprd_tune.evaluation.samples import Sample, SampleFile
from oprd_tune.ranks import Ranks
from oprd_tune.run.folder_lock import FolderLock
from oprd_tune.run.records import read_config, write_config

# These may change when an evaluation goes on: further models, and what concerns speed alone.
_FREE = ("output_dir", "models", "problems_per_batch", "num_threads", "metric_logger", "profile")


def _place(sample: Sample) -> tuple[str, str, int, int]:
    return sample.model, sample.benchmark, sample.problem, sample.number


class EvalFolder:
    """Keeps the samples of an evaluation, so that nothing is sampled twice. The first rank writes.

    Args:
        record: the config as plain values.

    Raises:
        ConfigError: if the folder cannot be used, if another process runs there, or if it holds the samples of another
            evaluation.
    """

    def __init__(self, output_dir: str, record: Mapping[str, Any], ranks: Ranks) -> None:
        self.path, self._ranks = Path(output_dir), ranks
        self._file, self._lock = SampleFile(self.path / "samples.jsonl"), FolderLock(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"output_dir {self.path} cannot be used: {error}") from error
        if (self.path / "checkpoints").exists():
            raise ConfigError(f"output_dir {self.path} holds a training run; give another folder")
        if refused := ranks.collect(self._refusal())[0]:
            raise ConfigError(refused)
        if (self.path / "config.yaml").is_file():
            self._check_same(read_config(self.path), record)
        self.samples = ranks.collect(self._file.read() if ranks.first else [])[0]
        ranks.wait()
        if ranks.first:
            write_config(record, self.path)

    def _refusal(self) -> str | None:
        """Why this evaluation may not use the folder, as the first rank finds it. It keeps others out from now on."""
        try:
            return self._lock.refusal() if self._ranks.first else None
        except OSError as error:
            return f"output_dir {self.path} cannot be used: {error}"

    def _check_same(self, saved: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        models, before = record["models"], saved.get("models", {})
        changed = [f"models.{name}" for name in models if before.get(name, models[name]) != models[name]]
        keys = sorted((saved.keys() | record.keys()) - set(_FREE))
        changed += [key for key in keys if saved.get(key) != record.get(key)]
        if changed:
            raise ConfigError(
                f"output_dir {self.path} holds samples of another evaluation: {', '.join(changed)} differ. Give "
                "another folder; only models may be added"
            )

    def missing(self, model: str, benchmark: str, problems: int, k: int) -> list[int]:
        """The problems of a benchmark for which a model has fewer than k samples yet."""
        counts: dict[int, int] = defaultdict(int)
        for sample in self.samples:
            counts[sample.problem] += sample.model == model and sample.benchmark == benchmark
        return [problem for problem in range(problems) if counts[problem] < k]

    def add(self, samples: Sequence[Sample]) -> None:
        """Keep the samples of whole problems. Every rank gives its own.

        A kill in the middle of a write leaves a problem with some of its samples. It is sampled again, and those that
        are there already stay as they are.
        """
        known = {_place(sample) for sample in self.samples}
        found = [sample for own in self._ranks.collect(list(samples)) for sample in own if _place(sample) not in known]
        self.samples += found
        if self._ranks.first:
            self._file.append(found)

    def report(self, names: Sequence[str], logger: Any) -> None:
        """Write summary, table and picture of the named models, print the table, log the numbers, and leave the folder.

        Others may then use it.
        """
        order = {name: place for place, name in enumerate(names)}
        own = sorted((s for s in self.samples if s.model in order), key=lambda s: order[s.model])
        outcome = outcome_of(own)
        numbers = flat(outcome)
        (self.path / "summary.json").write_text(json.dumps({**numbers, "benchmarks": outcome}, indent=1) + "\n")
        table = as_markdown(outcome)
        (self.path / "comparison.md").write_text(table + "\n")
        as_figure(outcome).savefig(self.path / "comparison.png", dpi=150)
        logger.log_dict({f"math_eval/{name}": value for name, value in numbers.items()}, step=0)
        logger.close()
        print(f"\n{table}\n\nEvery sample is in {self.path / 'samples.jsonl'}, the picture in comparison.png.")
        self._lock.release()

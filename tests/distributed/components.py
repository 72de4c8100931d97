"""Components for configs in tests: rollouts that can be had again, and a log that can be read."""

import json
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch

from oprd_tune.rollout import NativeEngine


@dataclass(kw_only=True, eq=False)
class RecordingEngine(NativeEngine):
    """Samples, and keeps each rollout."""

    record: str

    def __post_init__(self):
        super().__post_init__()
        self._calls = count()
        Path(self.record).mkdir(parents=True, exist_ok=True)

    def generate(self, prompts, *, stream=0):
        rollout = super().generate(prompts, stream=stream)
        torch.save(rollout, Path(self.record) / f"{next(self._calls)}.pt")
        return rollout


@dataclass(kw_only=True, eq=False)
class ReplayingEngine(NativeEngine):
    """Gives the recorded responses, in their order, to a rank's prompts."""

    record: str

    def __post_init__(self):
        super().__post_init__()
        self._calls = count()

    def generate(self, prompts, *, stream=0):
        rollout = torch.load(Path(self.record) / f"{next(self._calls)}.pt", weights_only=False)
        mine = torch.isin(rollout.prompt_positions_B, torch.tensor(prompts.positions))
        return rollout.rows(mine.nonzero(as_tuple=True)[0])


class JSONLogger:
    """Appends each step's metrics as a line of `log.jsonl`."""

    def __init__(self, log_dir):
        self._path = Path(log_dir) / "log.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)

    def log_dict(self, payload, step):
        with open(self._path, "a") as file:
            file.write(json.dumps({"step": step, **payload}) + "\n")

    def log_config(self, config):
        pass

    def close(self):
        pass

"""Components for configs in tests: rollouts that can be had again, and a log that can be read."""

import json
from itertools import count
from pathlib import Path

import torch

from oprd_tune.rollout import NativeEngine


class RecordingEngine(NativeEngine):
    """Samples, and keeps each rollout."""

    def __init__(self, model, *, record, **kwargs):
        super().__init__(model, **kwargs)
        self._record, self._calls = Path(record), count()
        self._record.mkdir(parents=True, exist_ok=True)

    def generate(self, prompts, *, stream=0):
        rollout = super().generate(prompts, stream=stream)
        torch.save(rollout, self._record / f"{next(self._calls)}.pt")
        return rollout


class ReplayingEngine(NativeEngine):
    """Gives the recorded responses, in their order, to a rank's prompts."""

    def __init__(self, model, *, record, **kwargs):
        super().__init__(model, **kwargs)
        self._record, self._calls = Path(record), count()

    def generate(self, prompts, *, stream=0):
        rollout = torch.load(self._record / f"{next(self._calls)}.pt", weights_only=False)
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

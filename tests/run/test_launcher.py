"""From a recipe's class to an exit status: messages, signals, engines that are lost."""

import os
import signal

import pytest
from omegaconf import OmegaConf

from oprd_tune.errors import CheckpointError, ConfigError, NothingLeftToDo, RolloutError
from oprd_tune.rollout import NativeEngine
from oprd_tune.run.launcher import StopSignals, _processes_for, run_recipe
from tests.conftest import ENDED, SMALL, assert_same_student, load_config, recipe_class

CFG = OmegaConf.create({"seed": 0, "max_steps": 3, "output_dir": "there"})


def test_signals_ask_once_and_then_act(capsys):
    before = signal.getsignal(signal.SIGINT)  # none in a shell's background
    with StopSignals() as stop:
        assert stop.received == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) is before
    assert "finishing the step, then saving" in capsys.readouterr().err


def test_user_errors_become_one_message_and_a_status(capsys):
    def make(cfg):
        raise ConfigError("positions is 'tail'")

    assert run_recipe(make, CFG) == 2
    assert capsys.readouterr().err == "error: positions is 'tail'\n"


class Losing:
    """A recipe whose engine is lost in its third step."""

    def __init__(self, cfg):
        self.saved = []

    def setup(self):
        pass

    def train(self):
        raise RolloutError("no vLLM server is left")

    def save(self):
        self.saved.append("last finished step")


def test_a_run_without_an_engine_saves_and_ends_with_a_message(capsys):
    made = []
    assert run_recipe(lambda cfg: made.append(Losing(cfg)) or made[0], CFG) == 1
    assert made[0].saved == ["last finished step"]
    said = capsys.readouterr().err
    assert said.startswith("error: no vLLM server is left\n")
    assert "saved; resume=true goes on" in said
    assert "Traceback" not in said


def test_a_run_that_cannot_be_saved_either_says_both(capsys):
    class Full(Losing):
        def save(self):
            raise CheckpointError("step_00000003 could not be written: no space left")

    assert run_recipe(Full, CFG) == 1
    assert capsys.readouterr().err == (
        "error: no vLLM server is left\nAnd then step_00000003 could not be written: no space left\n"
    )


@pytest.mark.parametrize("when", ["in the first step", "later"])
def test_what_was_learned_until_an_engine_is_lost_is_saved(when, out, monkeypatch):
    """And it is bit by bit what a run that ends there saves: the step that failed changed nothing."""
    steps = {"in the first step": 0, "later": 2}[when]
    generate = NativeEngine.generate

    def lose(self, prompts, *, stream=0):
        if self._policy_version == steps and self._request.samples_per_prompt == 2:
            raise RolloutError("the rollout of this step is not the student's")
        return generate(self, prompts, stream=stream)

    overrides = {**SMALL, "samples_per_prompt": 2, "checkpoint_every_n_steps": 2, "task_accuracy": "null"}
    overrides["rollout._component_"] = "oprd_tune.rollout.NativeEngine"
    cfg = load_config("tiny/oprd", output_dir=out, **overrides)
    with monkeypatch.context() as patch:
        patch.setattr(NativeEngine, "generate", lose)
        assert run_recipe(recipe_class("oprd_distributed"), cfg) == 1
    saved = [folder.name for folder in sorted((out / "checkpoints").glob("step_*"))]
    assert saved == ([f"step_{steps:08d}"] if steps else [])
    assert run_recipe(recipe_class("oprd_distributed"), OmegaConf.merge(cfg, {"resume": True})) in ENDED
    run_recipe(recipe_class("oprd_distributed"), OmegaConf.merge(cfg, {"output_dir": str(out / "whole")}))
    assert_same_student(out, out / "whole")


def test_what_is_done_before_training_is_said_and_is_no_error(capsys):
    class Done(Losing):
        def setup(self):
            raise NothingLeftToDo("the bridge is fitted")

    assert run_recipe(Done, CFG) == 0
    assert capsys.readouterr().out == "the bridge is fitted\n"


@pytest.mark.parametrize(("called_as", "processes"), [("oprd_single_device", 1), ("oprd_distributed", 8)])
def test_a_recipe_called_for_one_device_takes_one(called_as, processes, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr("sys.orig_argv", ["python", "tune", "run", called_as, "--config", "x"])
    assert _processes_for(None) == processes
    assert _processes_for("cuda:3") == 1

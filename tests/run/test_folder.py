"""Checkpoints: what they restore, when they are written, and whose folder it is."""

from concurrent.futures import Future

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_saver import async_save

from oprd_tune.errors import CheckpointError, ConfigError
from oprd_tune.run.export import export_checkpoint
from oprd_tune.run.folder import RunFolder
from oprd_tune.run.records import read_config
from oprd_tune.run.restore import load_checkpoint
from oprd_tune.training.gradients import FiniteGuard
from tests.conftest import make_model

RECORD = {"seed": 0, "max_steps": 3, "output_dir": "there"}


def training_state(folder, *, steps):
    """A model and optimizer after some steps, and the folder they are saved in."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.randint(0, 23, (2, 5))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, RunFolder(str(folder), keep=2)


def test_a_checkpoint_restores_model_optimizer_and_randomness_bit_by_bit(out):
    model, optimizer, folder = training_state(out, steps=2)
    folder.open(RECORD)
    guard = FiniteGuard(3)
    guard.load_state_dict({"in_a_row": 2})
    folder.save(2, model, optimizer, {"guard": guard, "nothing": None})
    drawn = torch.rand(3)
    folder.wait()
    other, other_optimizer, _ = training_state(out, steps=0)
    later = FiniteGuard(3)
    parts = {"guard": later, "nothing": None}
    assert load_checkpoint(folder.latest(), other, other_optimizer, parts, seed=0) == 2
    assert later.state_dict() == {"in_a_row": 2}
    assert torch.equal(torch.rand(3), drawn)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        for key, value in optimizer.state[a].items():
            assert torch.equal(value, other_optimizer.state[b][key])


def test_only_the_newest_checkpoints_are_kept_and_leftovers_are_swept(out):
    model, optimizer, folder = training_state(out, steps=1)
    folder.open(RECORD)
    for step in (1, 2, 3):
        folder.save(step, model, optimizer, {})
    folder.wait()
    (out / "checkpoints" / ".staged-step_00000004").mkdir()
    folder.open(RECORD)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step_00000002", "step_00000003"]


def test_nothing_is_saved_before_something_is_learned(out):
    model, optimizer, folder = training_state(out, steps=0)
    folder.open(RECORD)
    folder.save(0, model, optimizer, {})
    folder.wait()
    assert folder.latest() is None
    assert not optimizer.state


def test_a_checkpoint_that_cannot_be_written_is_told_and_the_next_one_is(out, capsys, monkeypatch):
    model, optimizer, folder = training_state(out, steps=1)
    folder.open(RECORD)
    full: Future = Future()
    full.set_exception(OSError("No space left on device"))
    with monkeypatch.context() as patch:
        patch.setattr("oprd_tune.run.folder.async_save", lambda *args, **kwargs: full)
        folder.save(1, model, optimizer, {})
    folder.save(2, model, optimizer, {})
    assert "step_00000001 could not be written: No space left on device" in capsys.readouterr().err
    folder.wait()
    assert folder.latest().name == "step_00000002"
    with monkeypatch.context() as patch:
        patch.setattr("oprd_tune.run.folder.async_save", lambda *args, **kwargs: full)
        folder.save(3, model, optimizer, {})
    with pytest.raises(CheckpointError, match="No space left"):
        folder.wait()


def test_a_default_group_for_gpus_alone_does_not_keep_one_process_from_saving(out):
    """A library may have made it, and may take it away; `async_save` wants a group that works on a CPU."""
    model, optimizer, folder = training_state(out, steps=1)
    folder.open(RECORD)
    dist.init_process_group("cuda:gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(AssertionError, match="CPU backend must be enabled"):
            async_save({"x": torch.zeros(1)}, checkpoint_id=out / "x")
        for step in (1, 2):
            folder.save(step, model, optimizer, {})
    finally:
        dist.destroy_process_group()
    folder.save(3, model, optimizer, {})
    folder.wait()
    assert folder.latest().name == "step_00000003"


def test_a_crash_in_the_middle_of_a_save_leaves_the_previous_checkpoint(out, monkeypatch):
    model, optimizer, folder = training_state(out, steps=1)
    folder.open(RECORD)
    folder.save(1, model, optimizer, {})
    folder.wait()
    save = torch.save

    def crash(data, file):
        return 1 / 0 if str(getattr(file, "name", "")).endswith("state.pt") else save(data, file)

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(ZeroDivisionError):
        folder.save(2, model, optimizer, {})
    assert folder.latest().name == "step_00000001"


def test_a_folder_of_another_run_is_refused(out):
    model, optimizer, folder = training_state(out, steps=1)
    assert folder.check(resume=False) is None
    folder.open(RECORD)
    assert folder.check(resume=False) is None  # nothing saved yet, so nothing to lose
    assert folder.check(resume=True) is None
    folder.save(1, model, optimizer, {})
    folder.wait()
    with pytest.raises(ConfigError, match="holds another run; continue it with resume=true"):
        folder.check(resume=False)
    assert folder.check(resume=True).name == "step_00000001"
    assert read_config(folder.latest()) == RECORD


def test_export_explains_what_it_takes(tmp_path):
    with pytest.raises(ConfigError, match="is no checkpoint"):
        export_checkpoint(str(tmp_path), str(tmp_path / "x"))
    (tmp_path / "state.pt").touch()
    with pytest.raises(ConfigError, match="exists already"):
        export_checkpoint(str(tmp_path), str(tmp_path))

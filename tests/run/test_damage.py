"""Checkpoints that a disk, a copy or a full quota has damaged, and things beside them that only look like one."""

import os
import resource
import shutil
import tarfile
from contextlib import contextmanager

import pytest
import torch

from oprd_tune.errors import CheckpointError, ConfigError
from oprd_tune.run.folder import RunFolder
from oprd_tune.run.launcher import run_recipe as launch
from oprd_tune.run.manifest import MANIFEST, check_whole
from oprd_tune.run.publishing import checkpoints_in
from tests.conftest import ENDED, SMALL, load_config, make_model, recipe_class, run_recipe, weights

NAME, CONFIG = "oprd_distributed", "tiny/oprd"


@pytest.fixture
def saved(out):
    """A folder with checkpoints of the steps 2 and 4, and what made it."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    folder = RunFolder(str(out), keep=2)
    folder.open({"seed": 0})
    for step in (2, 4):
        model(torch.zeros(1, 3, dtype=torch.long)).sum().backward()
        optimizer.step()
        folder.save(step, model, optimizer, {})
        folder.wait()
    return out, model, optimizer


def cut(file, count=1):
    os.truncate(file, file.stat().st_size - count)


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "shorter tensors": (lambda c: cut(c / "__0_0.distcp"), "__0_0.distcp has"),
    "one flipped bit": (lambda c: flip(c / "__0_0.distcp"), "__0_0.distcp has other content"),
    "shorter state": (lambda c: cut(c / "state.pt"), "state.pt has"),
    "no metadata": (lambda c: (c / ".metadata").unlink(), ".metadata is missing"),
    "empty config": (lambda c: (c / "config.yaml").write_text(""), "config.yaml is damaged: it holds no config"),
    "no tensors": (lambda c: (c / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "empty manifest": (lambda c: (c / MANIFEST).write_text(""), "manifest.json cannot be read"),
}
WITHOUT_MANIFEST = set(DAMAGES) - {"one flipped bit", "empty manifest"}


@pytest.mark.parametrize("case", DAMAGES)
@pytest.mark.parametrize("manifest", [True, False], ids=["manifest", "older"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(saved, case, manifest, capsys):
    out, model, optimizer = saved
    damage, told = DAMAGES[case]
    newest, older = (out / "checkpoints" / f"step_0000000{step}" for step in (4, 2))
    if not manifest:
        if case not in WITHOUT_MANIFEST:
            pytest.skip("found by the manifest alone")
        for checkpoint in (newest, older):
            (checkpoint / MANIFEST).unlink()
    damage(newest)
    folder = RunFolder(str(out), keep=2)
    assert folder.check(resume=True) == older
    (line,) = capsys.readouterr().err.splitlines()
    assert str(newest) in line
    assert told in line or (not manifest and f"{told.split()[0]} is missing or damaged" in line)
    folder.open({"seed": 0})
    folder.save(4, model, optimizer, {})
    folder.wait()
    check_whole(newest)
    assert checkpoints_in(newest.parent) == [older, newest]
    assert (out / "checkpoints" / "step_00000004.set_aside").is_dir()


def test_if_none_is_whole_a_run_says_so_and_does_not_start_again(saved, capsys):
    out, _, _ = saved
    for checkpoint in (out / "checkpoints").iterdir():
        cut(checkpoint / "state.pt")
    with pytest.raises(ConfigError) as refused:
        RunFolder(str(out), keep=2).check(resume=True)
    assert "step_00000004 is damaged: state.pt has" in str(refused.value)
    assert "step_00000002 is damaged: state.pt has" in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
    assert capsys.readouterr().err == ""
    with pytest.raises(ConfigError, match="holds another run"):
        RunFolder(str(out), keep=2).check(resume=False)


def test_what_is_no_checkpoint_counts_as_none_and_blocks_nothing(saved, tmp_path):
    out, model, optimizer = saved
    checkpoints = out / "checkpoints"
    shutil.copytree(checkpoints / "step_00000004", checkpoints / "step_00000004_backup")
    with tarfile.open(checkpoints / "step_00000004.tar", "w") as archive:
        archive.add(checkpoints / "step_00000004")
    shutil.copytree(checkpoints / "step_00000004", tmp_path / "elsewhere")
    (checkpoints / "step_00000008").symlink_to(tmp_path / "elsewhere")
    (checkpoints / "step_00000006").symlink_to(tmp_path / "nowhere")
    (checkpoints / "step_9").mkdir()
    folder = RunFolder(str(out), keep=2)
    assert folder.check(resume=True) == checkpoints / "step_00000004"
    folder.open({"seed": 0})
    for step in (6, 8):
        folder.save(step, model, optimizer, {})
        folder.wait()
    assert [c.name for c in checkpoints_in(checkpoints)] == ["step_00000006", "step_00000008"]
    assert {"step_00000004_backup", "step_00000004.tar", "step_9"} <= {entry.name for entry in checkpoints.iterdir()}
    assert (tmp_path / "elsewhere" / "state.pt").is_file()


def test_ten_digits_come_after_nine(out):
    for name in ("step_00000002", "step_999999999", "step_1000000000", "step_0000000001"):
        (out / name).mkdir(parents=True)
    assert [c.name for c in checkpoints_in(out)] == ["step_00000002", "step_999999999", "step_1000000000"]


@pytest.mark.parametrize("leads_somewhere", [True, False])
def test_final_may_be_a_link_and_what_it_leads_to_stays(out, tmp_path, leads_somewhere):
    elsewhere = tmp_path / "elsewhere"
    if leads_somewhere:
        elsewhere.mkdir()
        (elsewhere / "mine").touch()
    out.mkdir()
    (out / "final").symlink_to(elsewhere)
    run_recipe(NAME, CONFIG, out, max_steps=1)
    assert weights(out / "final")
    assert not (out / "final").is_symlink()
    assert (elsewhere / "mine").exists() == leads_somewhere
    assert not list(out.glob(".*"))


def test_a_run_goes_on_from_the_newest_whole_checkpoint(out, capsys):
    run_recipe(NAME, CONFIG, out, checkpoint_every_n_steps=2)
    cut(out / "checkpoints" / "step_00000004" / "__0_0.distcp")
    cfg = load_config(CONFIG, output_dir=out, resume="true", **{**SMALL, "checkpoint_every_n_steps": 2})
    assert launch(recipe_class(NAME), cfg) in ENDED
    said = capsys.readouterr()
    assert "step_00000004 is damaged: __0_0.distcp has" in said.err
    assert "Resuming after step 2" in said.out
    check_whole(out / "checkpoints" / "step_00000004")


@contextmanager
def files_of_at_most(count):
    """Within the scope, no file may grow beyond a size: a write ends in its middle, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [300, 20_000], ids=["state", "tensors"])
def test_a_save_that_finds_no_room_keeps_the_last_checkpoint_and_leaves_nothing(saved, room, capsys):
    out, model, optimizer = saved
    folder = RunFolder(str(out), keep=2)
    folder.open({"seed": 0})
    with files_of_at_most(room):
        folder.save(6, model, optimizer, {})
        with pytest.raises(CheckpointError) as failed:
            folder.wait()
    told = str(failed.value)
    assert "step_00000006 could not be written: " in told
    assert told.endswith("free some space, or lower keep_checkpoints, and continue with resume=true")
    assert len(told.splitlines()) == 1
    left = sorted(entry.name for entry in (out / "checkpoints").iterdir())
    assert left == ["step_00000002", "step_00000004"]
    check_whole(folder.latest())


def test_a_checkpoint_whose_manifest_finds_no_room_is_kept_without(saved, monkeypatch, capfd):
    out, model, optimizer = saved
    folder = RunFolder(str(out), keep=2)
    folder.open({"seed": 0})

    def no_room(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("oprd_tune.run.publishing.write_manifest", no_room)
    folder.save(6, model, optimizer, {})
    folder.wait()
    assert capfd.readouterr().err == ""
    assert sorted(entry.name for entry in (out / "checkpoints").iterdir()) == ["step_00000004", "step_00000006"]
    check_whole(out / "checkpoints" / "step_00000006")


def test_a_student_that_finds_no_room_is_told_and_leaves_nothing(out, capsys):
    recipe = recipe_class(NAME)(load_config(CONFIG, output_dir=out, **{**SMALL, "max_steps": 1}))
    recipe.setup()
    with files_of_at_most(20_000), pytest.raises(CheckpointError, match="final could not be written: .*resume=true$"):
        recipe.run._export("final")
    assert not [entry.name for entry in out.iterdir() if entry.name.startswith(".") or entry.name == "final"]
    recipe.engine.close()

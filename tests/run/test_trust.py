"""A checkpoint from someone else runs nothing, neither on resume nor on export."""

import io
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch.distributed.checkpoint import FileSystemReader, metadata

from oprd_tune.errors import ConfigError, DamagedCheckpoint
from oprd_tune.modeling.safe_reading import SafeReader, read_metadata
from oprd_tune.run.export import export_checkpoint
from oprd_tune.run.folder import RunFolder
from oprd_tune.run.launcher import run_recipe as launch
from oprd_tune.run.manifest import MANIFEST, write_manifest
from oprd_tune.run.restore import load_checkpoint
from oprd_tune.run.trusted import find_trusted
from tests.conftest import SMALL, load_config, make_model, recipe_class, run_recipe

NAME, CONFIG = "oprd_distributed", "tiny/oprd"


class Calls:
    """Pickled, a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    run_recipe(NAME, CONFIG, out, max_steps=1)
    return out


@pytest.fixture
def run(whole_run, tmp_path):
    return Path(shutil.copytree(whole_run, tmp_path / "copy"))


@pytest.fixture
def checkpoint(run):
    return run / "checkpoints" / "step_00000001"


def resumed(folder, **extra):
    return launch(recipe_class(NAME), load_config(CONFIG, output_dir=folder, resume="true", **{**SMALL, **extra}))


def one_line(text):
    (line,) = [line for line in text.splitlines() if line.startswith("error")]
    assert text.strip().endswith(line)
    return line


def test_metadata_that_calls_something_is_refused_on_resume_and_export(run, checkpoint, tmp_path, capsys):
    touched = tmp_path / "touched"
    honest = FileSystemReader(checkpoint).read_metadata()
    honest.planner_data = Calls(os.system, f"touch {touched}")
    (checkpoint / ".metadata").write_bytes(pickle.dumps(honest))
    write_manifest(checkpoint)
    assert resumed(run) == 2
    told = one_line(capsys.readouterr().err)
    assert f"{checkpoint / '.metadata'} names posix.system" in told
    command = [sys.executable, "-m", "oprd_tune", "export", str(checkpoint), str(tmp_path / "exported")]
    exported = subprocess.run(command, capture_output=True, text=True, check=False)
    assert exported.returncode == 1
    assert "names posix.system" in one_line(exported.stderr)
    assert not (tmp_path / "exported").exists()
    assert not touched.exists()
    pickle.loads((checkpoint / ".metadata").read_bytes())  # read without limits, it does call
    assert touched.exists()


@pytest.mark.parametrize("name", ["builtins eval", "torch load", "torch.serialization os.system", "os system"])
def test_metadata_may_name_metadata_only(checkpoint, name):
    module, function = name.split()
    (checkpoint / ".metadata").write_bytes(f"c{module}\n{function}\n.".encode())
    with pytest.raises(ConfigError, match=f"names {module}.{function}, which"):
        read_metadata(checkpoint)


def test_metadata_of_real_checkpoints_reads_as_the_library_reads_it(checkpoint):
    ours, theirs = (reader(checkpoint).read_metadata() for reader in (SafeReader, FileSystemReader))
    for part in ("state_dict_metadata", "planner_data", "storage_data", "version"):
        assert getattr(ours, part) == getattr(theirs, part)


@pytest.mark.parametrize("place", ["../state.pt", "/etc/hostname", "a/b"])
def test_metadata_leads_to_no_file_elsewhere(checkpoint, place):
    found = FileSystemReader(checkpoint).read_metadata()
    next(iter(found.storage_data.values())).relative_path = place
    (checkpoint / ".metadata").write_bytes(pickle.dumps(found))
    with pytest.raises(ConfigError, match="only plain files beside it are read"):
        read_metadata(checkpoint)


def test_a_value_that_calls_something_is_not_unpickled(out, tmp_path):
    """The library reads values that are no tensors, such as a learning rate, as a pickle without limits."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.zeros(1, 3, dtype=torch.long)).sum().backward()
    optimizer.step()
    folder = RunFolder(str(out), keep=1)
    folder.open({"seed": 0})
    folder.save(1, model, optimizer, {})
    folder.wait()
    checkpoint, touched = folder.latest(), tmp_path / "touched"
    found = FileSystemReader(checkpoint).read_metadata()
    assert isinstance(found.state_dict_metadata["optimizer.param_groups.0.lr"], metadata.BytesStorageMetadata)
    (place,) = [p for index, p in found.storage_data.items() if index.fqn == "optimizer.param_groups.0.lr"]
    evil = io.BytesIO()
    torch.save(Calls(os.system, f"touch {touched}"), evil)
    (checkpoint / "evil.distcp").write_bytes(evil.getvalue())
    place.relative_path, place.offset, place.length = "evil.distcp", 0, len(evil.getvalue())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(found))
    with pytest.raises(ConfigError) as refused:
        load_checkpoint(checkpoint, model, optimizer, {}, seed=0)
    assert len(str(refused.value).splitlines()) == 1
    assert not touched.exists()


def test_a_state_that_calls_something_is_refused(run, checkpoint, tmp_path, capsys):
    touched = tmp_path / "touched"
    torch.save({"step": 1, "rng": [], "parts": Calls(os.system, f"touch {touched}")}, checkpoint / "state.pt")
    write_manifest(checkpoint)
    assert resumed(run, max_steps=2) == 2
    assert "state.pt holds more than plain values (it names posix.system)" in one_line(capsys.readouterr().err)
    assert not touched.exists()


def rewritten(checkpoint, **sections):
    config = OmegaConf.load(checkpoint / "config.yaml")
    OmegaConf.save(OmegaConf.merge(config, sections), checkpoint / "config.yaml")
    (checkpoint / MANIFEST).unlink()


STRANGERS = {
    "a module": "os.system",
    "a way out of a trusted module": "oprd_tune.modeling.weights.os.system",
    "what runs what it is told": "torchtune.config.instantiate",
    "a part of torchtune's that builds nothing": "torchtune.training.set_seed",
    "a similar name": "oprd_tune.modeling_of_mine.decoder",
}


@pytest.mark.parametrize("path", STRANGERS.values(), ids=STRANGERS)
def test_a_component_that_is_no_builder_is_refused_by_name(checkpoint, tmp_path, path):
    for section in (
        {"model": {"_component_": path, "command": f"touch {tmp_path / 'touched'}"}},
        {"model": {"max_seq_len": {"_component_": path}}},
        {"checkpointer": {"_component_": path}},
    ):
        rewritten_copy = checkpoint.parent.parent / "copy_of_it"
        shutil.copytree(checkpoint, rewritten_copy, dirs_exist_ok=True)
        rewritten(rewritten_copy, **section)
        with pytest.raises(ConfigError) as refused:
            export_checkpoint(str(rewritten_copy), str(tmp_path / "exported"))
        assert f"--trust {path}" in str(refused.value)
        assert repr(path) in str(refused.value)
    assert not (tmp_path / "touched").exists()


def test_the_user_may_trust_a_component(checkpoint, tmp_path):
    section = {"_component_": "tests.conftest.make_model", "depth": 2}
    with pytest.raises(ConfigError, match="if you trust it"):
        find_trusted("model", section)
    assert find_trusted("model", section, ["tests.conftest.make_model"]).arguments == {"depth": 2}
    assert find_trusted("model", {"_component_": "torchtune.models.qwen2.qwen2_0_5b"}).arguments == {}
    assert export_checkpoint(str(checkpoint), str(tmp_path / "exported")).is_dir()


def test_a_run_that_resumes_builds_its_own_config_only(run, checkpoint, capsys, tmp_path):
    rewritten(checkpoint, model={"_component_": "os.system", "command": f"touch {tmp_path / 'touched'}"})
    assert resumed(run) == 2
    assert "was written under another config: model._component_: 'os.system' then" in one_line(capsys.readouterr().err)
    assert not (tmp_path / "touched").exists()


def test_an_emptied_config_is_told(checkpoint, tmp_path):
    for text in ("", "- a list", "{"):
        (checkpoint / "config.yaml").write_text(text)
        (checkpoint / MANIFEST).unlink(missing_ok=True)
        with pytest.raises(DamagedCheckpoint, match=r"config.yaml is (missing or )?damaged"):
            export_checkpoint(str(checkpoint), str(tmp_path / "exported"))

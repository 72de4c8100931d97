"""torchtune's own `tune` knows our recipes, however we are installed."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from oprd_tune.registry import config_files, recipe_files, recipe_named_in

ROOT = Path(__file__).parents[1]
TUNE = Path(sys.executable).with_name("tune")


def call(*words, cwd=None, **env):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | env
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False, cwd=cwd, env=environment)


def test_tune_lists_copies_and_shows(tmp_path):
    listed = call(TUNE, "ls", cwd=tmp_path).stdout.split()
    assert "full_finetune_single_device" in listed
    assert all(listed.count(name) == 1 for name in recipe_files())
    for name, path in config_files().items():  # a training recipe has two names
        assert listed.count(name) == (1 if recipe_named_in(path) == "math_eval" else 2)
    for name in ("oprd_distributed", "oprd_single_device"):
        assert call(TUNE, "cp", name, f"{name}.py", cwd=tmp_path).returncode == 0
        assert (tmp_path / f"{name}.py").read_text() == recipe_files()["oprd_distributed"].read_text()
    assert call(TUNE, "cp", "tiny/oprd", "my.yaml", cwd=tmp_path).returncode == 0
    assert "HiddenStateMSE" in call(TUNE, "cat", "tiny/oprd", cwd=tmp_path).stdout
    assert "well-formed" in call(TUNE, "validate", "my.yaml", cwd=tmp_path).stdout


def test_a_copied_recipe_runs_in_a_foreign_folder(tmp_path):
    (tmp_path / "my_recipe.py").write_text(recipe_files()["oprd_distributed"].read_text())
    (tmp_path / "my.yaml").write_text(config_files()["tiny/oprd"].read_text())
    words = ("max_steps=1", "eval_dataset.count=20", "dataset.count=64", "output_dir=run")
    result = call(TUNE, "run", "my_recipe.py", "--config", "my.yaml", *words, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_torchtune_config_is_refused_by_name(tmp_path):
    config = "llama3_2/1B_full_single_device"
    result = call(TUNE, "run", "oprd_distributed", "--config", config, cwd=tmp_path)
    assert result.returncode == 2
    assert "error: this config belongs to full_finetune_single_device" in result.stderr


@pytest.mark.long
def test_module_form_works_without_the_hook(tmp_path):
    listed = call(TUNE, "ls", cwd=tmp_path, OPRD_TUNE_NO_HOOK="1").stdout
    assert "full_finetune_single_device" in listed
    assert "oprd_" not in listed
    listed = call(sys.executable, "-m", "oprd_tune", "ls", cwd=tmp_path, OPRD_TUNE_NO_HOOK="1").stdout
    assert listed.count("oprd_distributed") == 1
    listed = call(sys.executable, "-m", "oprd_tune", "ls", cwd=tmp_path).stdout
    assert listed.count("oprd_distributed") == 1


def test_export_explains_itself(tmp_path):
    result = call(sys.executable, "-m", "oprd_tune", "export", tmp_path, tmp_path / "x")
    assert result.returncode == 1
    assert "error:" in result.stderr
    assert "is no checkpoint" in result.stderr


def test_compare_explains_itself(tmp_path):
    result = call(sys.executable, "-m", "oprd_tune", "compare", tmp_path, cwd=ROOT)
    assert result.returncode == 2
    assert (
        result.stderr == f"error: {tmp_path} is no run's folder: it has no config.yaml; give the output_dir of a run\n"
    )


def test_prune_explains_itself(tmp_path):
    result = call(sys.executable, "-m", "oprd_tune", "prune", "tiny/teacher", tmp_path, "--blocks", 3, cwd=ROOT)
    assert result.returncode == 2
    assert result.stderr == f"error: {tmp_path} exists already; give a folder that does not\n"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    result = call(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return next(folder.glob("*.whl"))


def test_the_wheel_registers_recipes_and_occupies_no_foreign_name(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
        top = {name.split("/")[0] for name in archive.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"oprd_tune", "oprd_tune.pth"}
    # A bare interpreter whose only .pth file is the wheel's.
    code = (
        "import sys, site; sys.path += sys.argv[2:]; site.addsitedir(sys.argv[1])\n"
        "assert 'torch' not in sys.modules and 'torchtune' not in sys.modules\n"
        "from torchtune._recipe_registry import get_all_recipes\n"
        "ours = [r for r in get_all_recipes() if r.name == 'oprd_distributed']\n"
        "print(len(ours), ours[0].file_path, *(c.file_path for c in ours[0].configs))"
    )
    packages = [p for p in sys.path if p.endswith("site-packages")]
    result = call(sys.executable, "-I", "-S", "-c", code, tmp_path, *packages, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    count, *paths = result.stdout.split()
    assert count == "1"
    assert all(path.startswith(str(tmp_path / "oprd_tune" / "_shipped")) and Path(path).exists() for path in paths)


def test_the_hook_costs_less_than_a_millisecond_and_imports_nothing():
    """What the `.pth` line does at interpreter start, in interpreters that have done nothing else."""
    code = (
        "import sys, time; line = open(sys.argv[1]).read(); modules = set(sys.modules); start = time.perf_counter()\n"
        "exec(line)\n"
        "print(1e6 * (time.perf_counter() - start), *(set(sys.modules) - modules))"
    )
    pth = ROOT / "oprd_tune" / "oprd_tune.pth"
    runs = [call(sys.executable, "-I", "-S", "-c", code, pth).stdout.split() for _ in range(5)]
    assert all(len(run) == 1 for run in runs)
    assert min(float(microseconds) for (microseconds,) in runs) < 1000

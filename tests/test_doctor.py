"""`python -m oprd_tune`: what it lists, and what `doctor` finds."""

import subprocess
import sys
from pathlib import Path

import pytest

from oprd_tune import doctor


def call(*words):
    return subprocess.run([sys.executable, "-m", "oprd_tune", *words], capture_output=True, text=True, check=False)


def test_help_lists_every_command():
    for words in ([], ["--help"], ["-h"]):
        shown = call(*words)
        assert shown.returncode == 0
        for command in ("run RECIPE", "prune", "compare", "export", "doctor"):
            assert f"\n    {command}" in shown.stdout
    for command in ("export", "doctor"):
        assert call(command, "--help").returncode == 0
    wrong = call("docter")
    assert wrong.returncode == 2
    assert wrong.stderr == (
        "error: there is no command 'docter'; did you mean 'doctor'?; python -m oprd_tune --help explains them\n"
    )


def rows(capsys):
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    return {rest.split("  ")[0]: (mark, rest) for mark, rest in lines}


def test_doctor_says_what_works(capsys, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    assert doctor.main() == 0
    found = rows(capsys)
    for name in ("oprd-tune", "torch", "torchtune", "devices", "rollout: native", "rollout: auto", "tune"):
        assert found[name][0] == doctor.OK, found[name]
    assert "lists our recipes" in found["tune"][1]
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert doctor.main() == 0
    mark, said = rows(capsys)["tune"]
    assert mark == doctor.MISSING
    assert f"is not on the path: source {Path(sys.executable).parent / 'activate'}" in said


@pytest.mark.parametrize("broken", [None, "2.12.0"])
def test_doctor_fails_where_a_package_is_missing_or_another_one_than_was_tested(broken, capsys, monkeypatch):
    known = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: broken if name == "torch" else known(name))
    assert doctor.main() == 1
    mark, said = rows(capsys)["torch"]
    assert mark == doctor.BROKEN
    assert said.endswith(f"{broken or 'not installed'}; pip install torch==2.13.0, which it is tested with")


@pytest.mark.parametrize("missing", ["torch", "torchtune"])
def test_doctor_works_where_imports_fail(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; from oprd_tune.doctor import main; sys.exit(main())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "  ok oprd-tune" in result.stdout
    assert "Traceback" not in result.stderr
    assert f"import of {missing} halted" in result.stdout or "ModuleNotFoundError" in result.stdout

"""The commands of the README and of the tour, run as they stand there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from oprd_tune.command_line import look_at

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TOUR = (ROOT / "docs" / "tour.md").read_text()
USE_IT = README.partition("## Train")[2].partition("\n## ")[0]
BLOCKS = re.findall(r"(?:^    .+\n)+", USE_IT, re.MULTILINE)


def run(script, folder):
    """The commands in a shell, in a folder where the README's environment is."""
    (folder / ".venv").symlink_to(sys.prefix)
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    command = ["bash", "-euo", "pipefail", "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.slow
def test_the_readmes_commands_do_what_it_says(tmp_path):
    assert len(BLOCKS) == 2
    said = run(BLOCKS[0], tmp_path)
    by_kl, by_states = (summary(tmp_path / "outputs" / name) for name in ("kl", "states"))
    assert 0.35 < by_kl["gap_closed"] < 0.65
    assert by_states["gap_closed"] > 0.9
    assert "gap closed" in said
    assert (tmp_path / "compare" / "compare.png").is_file()
    assert re.search(r"\| addition  \| mine +\| 500 × 4 +\| 0\.9", said)


@pytest.mark.parametrize("line", [line for line in BLOCKS[1].splitlines() if "tune run" in line])
def test_the_readmes_commands_for_gpus_are_right(line):
    words = line.partition("#")[0].split()
    look_at(words[1:])


@pytest.mark.slow
def test_the_tours_commands_do_what_it_says(tmp_path):
    run("".join(re.findall(r"```bash\n(.*?)```", TOUR, re.DOTALL)), tmp_path)
    found = {name: summary(tmp_path / "tour" / "outputs" / name) for name in ("mine", "huber", "healed", "copied")}
    for name in ("mine", "huber", "copied"):
        assert found[name]["student_before"] < 0.2
        assert found[name]["student_after"] > 0.7
    assert found["huber"] != found["mine"]
    assert found["healed"]["student_before"] < 0.1
    assert found["healed"]["student_after"] > 0.6


def test_the_data_pages_command_counts_prompts(tmp_path):
    page = (ROOT / "docs" / "data.md").read_text()
    (block,) = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    said = run(f"source .venv/bin/activate\n{block}", tmp_path)
    assert "3 prompts" in said
    assert "nothing was loaded" in said


@pytest.mark.long
def test_the_choosing_pages_commands_find_a_rate(tmp_path):
    page = (ROOT / "docs" / "choosing.md").read_text()
    (block,) = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    said = run(f"source .venv/bin/activate\n{block}", tmp_path)
    after = {rate: summary(tmp_path / "outputs" / f"rate_{rate}")["student_after"] for rate in ("2e-3", "6e-3", "2e-2")}
    assert max(after, key=after.get) == "6e-3"
    assert "rate_6e-3" in said


@pytest.mark.slow
def test_a_teachers_answers_are_a_data_set(tmp_path):
    page = (ROOT / "docs" / "objectives.md").read_text()
    (block,) = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    said = run(f"source .venv/bin/activate\n{block}", tmp_path)
    assert "over 5,000 prompts" in said
    found = summary(tmp_path / "outputs" / "answers_first")
    assert found["student_after"] > found["student_before"]
    lines = (tmp_path / "outputs" / "answers_first" / "metrics.jsonl").read_text().splitlines()
    shares = [row["rollout/reference_share"] for row in map(json.loads, lines) if "rollout/reference_share" in row]
    assert shares[0] == 1
    assert shares[-1] == 0

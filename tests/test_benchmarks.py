"""The benchmarks run, small, and write what they promise."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(name, folder, *words, writes=None):
    command = [sys.executable, str(BENCHMARKS / name), "--out", str(folder), *words]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads((folder / (writes or name)).with_suffix(".json").read_text())


def heal(tmp_path, kind, *words):
    """The healing of a part of the embedded teacher."""
    sums = [{"question": f"{a}+{a % 7 + 3}=", "answer": str(a + a % 7 + 3)} for a in range(10, 200)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    words = (*words, "--model", "tiny/teacher", "--prompts", str(tmp_path / "sums.jsonl"), "--template", "{prompt}")
    words = (*words, "--work", str(tmp_path / "work"), "--rates", "1e-3", "--steps", "2", "--tokens", "8")
    found = run("healing.py", tmp_path, kind, *words, "--jobs", "2", "max_prompt_tokens=16", writes=f"healing_{kind}")
    assert 1 <= found["teacher"] < 1.1
    assert "tmp" not in found["facts"]["command"]
    assert (tmp_path / f"healing_{kind}.png").exists()
    return found["runs"], (tmp_path / f"healing_{kind}.md").read_text()


@pytest.mark.slow
def test_update_cost(tmp_path):
    rows = run("update_cost.py", tmp_path, "--tokens", "64", "--layers", "1", "--objectives", "bound", "topk")
    cases = [(row["objective"], row["formulation"], row["tokens"]) for row in rows]
    assert cases == [("bound", "ours", 64), ("topk", "ours", 64), ("topk", "plain", 64)]
    assert all(row["delta_peak_bytes"] > 0 and row["seconds"] > 0 for row in rows)
    for key in ("loss", "grad_norm"):  # the same objective, however it is written
        assert rows[1][key] == pytest.approx(rows[2][key], rel=1e-4)
    assert "| 64 | topk |" in (tmp_path / "update_cost.md").read_text()
    assert (tmp_path / "update_cost.png").exists()


@pytest.mark.slow
def test_launches_of_a_decoding_step(tmp_path):
    at_once, steady, *_ = run("rollout.py", tmp_path, "--launches", "--batch", "2", writes="rollout_launches")
    assert steady["waits"] == 1 / 16
    assert at_once["launches"] > 100
    assert "| 2 | fixed shapes |" in (tmp_path / "rollout_launches.md").read_text()


@pytest.mark.slow
def test_objectives(tmp_path):
    words = (
        "--steps",
        "2",
        "--objectives",
        "OPRD",
        "top-4, detached",
        "--rates",
        "1e-4",
        "--seeds",
        "1",
        "--jobs",
        "2",
    )
    found = run("objectives.py", tmp_path, *words)
    assert found["OPRD"]["rate"] == 1e-4
    assert [e["step"] for e in found["top-4, detached"]["runs"][0]["evaluations"]] == [0, 2]
    assert "| OPRD |" in (tmp_path / "objectives.md").read_text()
    assert (tmp_path / "objectives.png").exists()


@pytest.mark.slow
def test_grading(tmp_path):
    rows = run("grading.py", tmp_path, "--count", "20", "--repeats", "1", "--workers", "1", "2", "--seconds", "1")
    assert [row["workers"] for row in rows] == [1, 2]
    assert all(row["verdict"] < row["start"] and row["endless"] > 0.9 for row in rows)
    assert "| 2 |" in (tmp_path / "grading.md").read_text()


@pytest.mark.slow
def test_prompts(tmp_path):
    rows = run("prompts.py", tmp_path, "--count", "30", "--repeats", "1", "--threads", "1")
    assert [(row["kind"], row["threads"], row["prompts"]) for row in rows] == [("text", 1, 30), ("messages", 1, 30)]
    assert all(row["seconds"] > 0 and row["tokens"] > 30 for row in rows)
    assert "| text | 1 | 30 |" in (tmp_path / "prompts.md").read_text()


@pytest.mark.slow
def test_healthy_and_sick(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "healthy_and_sick.py"), "--out", str(tmp_path), "--steps", "2"]
    done = subprocess.run([*command, "--runs", "rate too high"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "rate too high: " in done.stdout + done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"reading_curves.png", "reading_heatmaps.png"}


@pytest.mark.slow
def test_healing_of_width(tmp_path):
    name = "full KL + 100 bridge"
    runs, table = heal(tmp_path, "width", "--cut=--width 64 --heads 2", "--seeds", "0", "--objectives", name)
    assert [e["step"] for e in runs[name][0]["evaluations"]] == [0, 2]
    assert len(runs[name][0]["steps"]["loss/bridge"]) == 2
    assert f"| {name} | 0.001 | 0 |" in table


@pytest.mark.slow
def test_healing_of_depth(tmp_path):
    name = "full KL + 30 OPRD"
    runs, table = heal(tmp_path, "depth", "--cut=--drop-blocks 2", "--seeds", "0", "--objectives", name)
    assert [(one["rate"], one["seed"]) for one in runs[name]] == [(1e-3, 0)]
    assert f"| {name} | 0.001 | 0 |" in table

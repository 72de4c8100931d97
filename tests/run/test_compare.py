"""Runs compared, from folders that are written here."""

import json

import pytest
from omegaconf import OmegaConf

from oprd_tune.compare.command import main
from oprd_tune.compare.comparison import differences, for_terminal, remarks, results
from oprd_tune.compare.past_run import read_runs
from oprd_tune.compare.picture import draw
from oprd_tune.compare.seed_groups import group_by_seed
from oprd_tune.compare.short_settings import differing_keys, short_settings, shown_values
from oprd_tune.errors import ConfigError
from oprd_tune.metrics.step_log import StepLog

SUMMARY = {
    "steps": 4,
    "teacher": 1.0,
    "seconds": 2.0,
    "response_tokens": 80,
    "skipped_steps": 0,
    "peak_memory_bytes": 2**29,
    "evaluations": [
        {"step": 0, "seconds": 0.0, "accuracy": 0.5, "perplexity": None},
        {"step": 4, "seconds": 2.0, "accuracy": 0.75, "perplexity": None},
    ],
}


def config(**changes):
    values = {
        "recipe": "oprd_distributed",
        "output_dir": "there",
        "resume": False,
        "seed": 0,
        "max_steps": 4,
        "model": {"_component_": "oprd_tune.modeling.decoder", "path": "/models/small"},
        "checkpointer": {"_component_": "x.hugging_face_checkpointer", "checkpoint_dir": "/models/small"},
        "tokenizer": {"_component_": "x.HuggingFaceTokenizer", "path": "/models/small"},
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-3},
        "metric_logger": {"_component_": "x.TensorBoardLogger", "log_dir": "there/tensorboard"},
    }
    return values | changes


def past(folder, *, steps=4, accuracy=(0.5, 0.75), summary=None, perplexity=2.0, **changes):
    """Write a run's folder."""
    folder.mkdir(parents=True)
    given = config(output_dir=str(folder), metric_logger={"log_dir": f"{folder}/tensorboard"}, **changes)
    OmegaConf.save(OmegaConf.create(given), folder / "config.yaml")
    log = StepLog(folder, first_step=0)
    first = {"eval/accuracy": accuracy[0], "eval/teacher_accuracy": 1.0}
    first |= {} if perplexity is None else {"eval/perplexity": perplexity}
    log.add(0, first, seconds=0.0, tokens=0)
    for step in range(1, steps + 1):
        metrics = {"loss/total": 1.0 / step, "memory/peak": 0.5, "time/step": 0.5, "rollout/response_tokens": 10.0}
        log.add(step, metrics, seconds=step / 2, tokens=20 * step)
    if steps:
        log.add(steps, {**first, "eval/accuracy": accuracy[-1]}, seconds=steps / 2, tokens=20 * steps)
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_a_run_is_read_without_its_summary(tmp_path):
    (run,) = read_runs([past(tmp_path / "a")])
    values = run.values()
    assert (values["accuracy_before"], values["accuracy_after"], values["accuracy_teacher"]) == (0.5, 0.75, 1.0)
    assert (values["gap_closed"], values["steps"], values["tokens_per_second"]) == (0.5, 4, 40.0)
    assert values["loss"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4, rel=1e-6)
    assert values["kl"] is None
    assert remarks([run]) == ["a: not finished, step 4 of 4; it still goes, or was stopped"]


def test_a_run_that_has_only_begun_has_nothing_after(tmp_path):
    (run,) = read_runs([past(tmp_path / "a", steps=0)])
    values = run.values()
    assert (values["accuracy_before"], values["accuracy_after"], values["seconds"]) == (0.5, None, None)
    (tmp_path / "a" / "metrics.jsonl").write_text("")
    groups = group_by_seed(read_runs([tmp_path / "a"]))
    assert results(groups)[-1] == ["steps", "0"]
    draw(groups).savefig(tmp_path / "empty.png")


def test_a_run_without_a_log_is_read_from_its_summary(tmp_path):
    folder = past(tmp_path / "old", summary=SUMMARY | {"remarks": ["all is well"]})
    from_log = read_runs([folder])[0].values()
    (folder / "metrics.jsonl").unlink()
    (run,) = read_runs([folder])
    same = ("accuracy_before", "accuracy_after", "gap_closed", "seconds", "tokens_per_second", "peak_gib", "steps")
    assert all(run.values()[key] == from_log[key] for key in same)
    assert remarks([run]) == ["old: all is well"]


def test_a_summary_of_fewer_steps_is_that_of_the_part_before_a_resumption(tmp_path):
    past(tmp_path / "a", steps=8, summary=SUMMARY)
    assert read_runs([tmp_path / "a"])[0].summary is None


def test_seeds_of_one_setting_are_one_group_wherever_they_lie(tmp_path):
    faster = {"_component_": "torch.optim.AdamW", "lr": 1e-2}
    folders = [
        past(tmp_path / "x" / "lr3_seed0", accuracy=(0.5, 0.75), perplexity=2.0),
        past(tmp_path / "fast", optimizer=faster),
        past(tmp_path / "y" / "lr3_seed11", accuracy=(0.5, 0.85), perplexity=None, seed=11, resume=True),
    ]
    first, second = group_by_seed(read_runs([*folders, folders[0]]))
    assert ([run.seed for run in first.runs], first.name, second.name) == ([0, 11], "lr3", "fast")
    table = {row[0]: row[1:] for row in results([first, second])}
    assert table["seed"] == ["0, 11", "0"]
    assert table["accuracy after"] == ["0.800 (0.750–0.850)", "0.750"]
    assert table["perplexity before"] == ["2, n = 1", "2"]
    assert differences([first, second]) == [["key", "lr3", "fast"], ["optimizer.lr", "0.001", "0.01"]]
    (line,) = [point for point in first.curve("eval/accuracy") if point.step == 4]
    assert (line.value.low, line.value.high, line.value.count, line.seconds) == (0.75, 0.85, 2, 2.0)


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    for name, seed in (("one", 0), ("two", 1)):
        past(tmp_path / name / "run", seed=seed)
    assert [run.name for run in read_runs([tmp_path / "one/run", tmp_path / "two/run"])] == ["one/run", "two/run"]


def test_models_are_named_as_in_a_short_config():
    here, there = config(), config()
    assert short_settings(here)["student"] == "/models/small"
    there["checkpointer"] |= {"checkpoint_dir": "/models/large", "hub_name": "Qwen/Qwen3-4B"}
    there["model"] |= {"path": "/models/large"}
    there["tokenizer"] |= {"path": "/models/large"}
    assert differing_keys([short_settings(here), short_settings(there)]) == ["student"]
    there["model"] |= {"lora_rank": 8}
    there["seed"] = None  # as if the key were not there
    keys = differing_keys([short_settings(here), short_settings(there)])
    assert sorted(keys) == ["model.lora_rank", "seed", "student"]


def test_values_are_shown_by_what_tells_them_apart():
    assert shown_values(["a.b.Adam", "c.SGD"]) == ["Adam", "SGD"]
    assert shown_values(["a.Adam", "c.Adam"]) == ["a.Adam", "c.Adam"]
    assert shown_values(["/models/small", "Qwen/Qwen3-4B"]) == ["small", "Qwen3-4B"]
    assert shown_values([0.006, True, None, [1, 2]]) == ["0.006", "true", "None", "[1, 2]"]


def test_a_table_breaks_where_the_terminal_ends():
    table = [["", "aaaa", "bbbb", "cccc"], ["loss", "1", "2", "3"]]
    assert for_terminal(table, 80) == "      aaaa  bbbb  cccc\nloss     1     2     3"
    assert for_terminal(table, 16) == "      aaaa  bbbb\nloss     1     2\n\n      cccc\nloss     3"
    assert for_terminal(table, 1).count("loss") == 3


def test_long_curves_are_averaged_and_shorter_runs_end_where_they_end(tmp_path):
    folders = [past(tmp_path / "a", steps=400), past(tmp_path / "b", steps=200, seed=1)]
    (group,) = group_by_seed(read_runs(folders))
    curve = group.curve("loss/total")
    assert (len(curve), curve[0].step, curve[0].value.count, curve[-1].value.count) == (40, 5.5, 2, 1)
    assert curve[0].value.mean == pytest.approx(sum(1 / step for step in range(1, 11)) / 10, rel=1e-6)


@pytest.mark.parametrize("against", ["steps", "seconds"])
def test_only_what_was_measured_is_drawn(tmp_path, against):
    folders = [past(tmp_path / "a"), past(tmp_path / "b", perplexity=None, seed=1)]
    figure = draw(group_by_seed(read_runs(folders)), against=against)
    titles = [axes.get_title() for axes in figure.axes if axes.axison]
    assert titles == [
        "held-out accuracy",
        "perplexity of reference answers",
        "loss",
        "response length, tokens",
        "seconds per step",
        "peak memory, GiB",
    ]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a … b  (n = 2)", "teacher"]


def answered(folder, after, *, name="math500", teacher=0.9, **changes):
    """A run that has also answered a benchmark."""
    past(folder, **changes)
    log = StepLog(folder, first_step=100)
    for step, score in ((0, 0.25), (4, after)):
        told = {f"eval/{name}/avg_at_k": score, f"eval/{name}/teacher_avg_at_k": teacher}
        log.add(step, {**told, f"eval/{name}/best_at_k": 1.0}, seconds=step / 2, tokens=0)
    return folder


def test_each_benchmark_has_rows_and_a_panel(tmp_path):
    folders = [answered(tmp_path / "a", 0.5), answered(tmp_path / "b", 0.75, seed=1)]
    folders.append(answered(tmp_path / "c", 0.3, name="accuracy", max_steps=9))
    groups = group_by_seed(read_runs([*folders, past(tmp_path / "d", optimizer={"lr": 1})]))
    table = {row[0]: row[1:] for row in results(groups)}
    assert table["math500, Avg@k before"] == ["0.250", "–", "–"]
    assert table["math500, Avg@k after"] == ["0.625 (0.500–0.750)", "–", "–"]
    assert table["math500, Avg@k teacher"] == ["0.900", "–", "–"]
    assert table["accuracy, Avg@k after"] == ["–", "0.300", "–"]
    assert table["accuracy after"] == ["0.750", "0.750", "0.750"]  # held-out accuracy is something else
    figure = draw(groups)
    panels = {axes.get_title(): axes for axes in figure.axes if axes.axison}
    assert list(panels)[:4] == [
        "held-out accuracy",
        "math500, Avg@k",
        "accuracy, Avg@k",
        "perplexity of reference answers",
    ]
    dashed = [line for line in panels["math500, Avg@k"].lines if line.get_linestyle() == "--"]
    assert [line.get_ydata()[0] for line in dashed] == [0.9]


def test_benchmarks_are_read_from_a_summary_too(tmp_path):
    rows = [{**row, "benchmarks": {"sums": {"avg_at_k": {"value": 0.5}}}} for row in SUMMARY["evaluations"]]
    folder = past(tmp_path / "old", summary=SUMMARY | {"evaluations": rows})
    (folder / "metrics.jsonl").unlink()
    (run,) = read_runs([folder])
    assert run.benchmarks == ["sums"]
    assert run.values()["sums_avg_at_k_after"] == 0.5


def spoil(folder, name, text):
    past(folder, summary=SUMMARY)
    (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "is no folder; give the output_dir of a run"),
        (lambda folder: folder.mkdir(), "is no run's folder: it has no config.yaml"),
        (lambda folder: spoil(folder, "config.yaml", "a: [1"), "config.yaml cannot be read"),
        (lambda folder: spoil(folder, "config.yaml", "a: 1"), "config.yaml is none of a run's: it names no recipe"),
        (lambda folder: spoil(folder, "summary.json", "{"), "summary.json is damaged"),
        (lambda folder: spoil(folder, "summary.json", '{"a": 1}'), "summary.json is damaged or none of a run's"),
        (lambda folder: spoil(folder, "metrics.jsonl", "x\n{}\n"), "line 1 of metrics.jsonl is damaged"),
        (lambda folder: (past(folder) / "metrics.jsonl").unlink(), "has neither metrics.jsonl nor summary.json"),
    ],
)
def test_a_folder_that_is_no_runs_is_told_in_one_line(tmp_path, capsys, make, message):
    make(tmp_path / "strange")
    assert main([str(past(tmp_path / "good")), str(tmp_path / "strange"), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path / 'strange'}")
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_told(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main([str(past(tmp_path / "a")), "--out", str(tmp_path / "file")]) == 2
    assert f"error: --out {tmp_path / 'file'} cannot be written" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        read_runs([tmp_path / "file"])

import json
import math

from oprd_tune.metrics.history import History
from oprd_tune.run.summary import as_table, summarise, write_summary


def test_summary_has_every_key_and_null_where_nothing_was_measured(tmp_path):
    history = History(teacher_accuracy=0.9, loop_seconds=2.0, response_tokens=10)
    history.evaluations = [
        {"step": 0, "accuracy": 0.1, "perplexity": None},
        {"step": 5, "accuracy": 0.7, "perplexity": None},
        {"step": 9, "accuracy": 0.5, "perplexity": None},
    ]
    summary = summarise(history, steps=9, peak_memory_bytes=2**30)
    write_summary(tmp_path, summary, history)
    read = json.loads((tmp_path / "summary.json").read_text())
    assert (read["student_before"], read["student_after"], read["teacher"]) == (0.1, 0.5, 0.9)
    assert (read["student_best"], read["best_step"], read["tokens_per_second"]) == (0.7, 5, 5.0)
    assert math.isclose(read["gap_closed"], 0.5)
    assert read["perplexity_before"] is None
    assert (tmp_path / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
    assert read["benchmarks"] is None
    assert "50.0%" in as_table(summary)
    assert "perplexity" not in as_table(summary)

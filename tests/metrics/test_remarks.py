import pytest

from oprd_tune.metrics.history import WINDOW, History
from oprd_tune.metrics.remarks import falls, length_change, never_ending, remarks, repetition, skipped


def run(*accuracies, perplexities=(), **given):
    """A history with an evaluation every ten steps."""
    history = History(**given)
    count = max(len(accuracies), len(perplexities))
    for i, (accuracy, perplexity) in enumerate(
        zip(accuracies or [None] * count, perplexities or [None] * count, strict=True)
    ):
        history.evaluations.append({"step": 10 * i, "seconds": 0.0, "accuracy": accuracy, "perplexity": perplexity})
    return history


def said(history, *, graded=200, ended=True, max_new_tokens=512):
    return list(remarks(history, max_new_tokens=max_new_tokens, graded=graded, ended=ended).values())


@pytest.mark.parametrize(
    ("before", "after", "graded", "expected"),
    [
        (0.40, 0.24, 200, True),  # two standard errors of the difference are 0.092
        (0.40, 0.32, 200, False),
        (0.40, 0.32, 2000, True),  # 0.030
        (0.40, 0.48, 2000, False),
        (1.00, 0.99, 100, False),  # one answer, although 1 seems to have no error
        (1.00, 0.90, 100, True),
        (0.50, 0.46, None, False),
        (0.50, 0.44, None, True),
    ],
)
def test_an_accuracy_falls_if_two_standard_errors_do_not_explain_it(before, after, graded, expected):
    assert falls(before, after, graded) is expected


def test_a_run_without_trouble_says_nothing():
    assert said(History()) == []
    assert said(run(0.4)) == []
    assert said(run(0.4, 0.3, 0.9)) == []
    assert said(run(0.4, 0.9, 0.89)) == []  # within noise: final/ is as good as best/
    assert said(run(perplexities=(1.5, 1.505))) == []


def test_worse_than_at_the_start():
    worse = "worse than at the start: the best was step 0 (accuracy 0.400, now 0.240); lower optimizer.lr"
    assert said(run(0.4, 0.24)) == [worse]
    assert said(run(0.4, 0.24), graded=20) == []
    assert said(run(0.4, 0.6, 0.24)) == [
        "worse than at the start (accuracy 0.400, now 0.240); the best was step 10 (0.600); lower optimizer.lr",
        "the best student is in best/, not final/: step 10 (accuracy 0.600), against 0.240 after step 20",
    ]
    perplexity = "worse than at the start: the best was step 0 (perplexity 1.500, now 1,234); lower optimizer.lr"
    assert said(run(perplexities=(1.5, 1234.4))) == [perplexity]


def test_a_student_that_learns_something_else_is_not_blamed_on_the_learning_rate_first():
    nearer = {"first_kls": [1.0] * WINDOW, "last_kls": [0.5] * WINDOW}
    (sentence,) = said(run(0.4, 0.24, **nearer))
    assert sentence.endswith(
        "on the training's own prompts it does come nearer to the teacher, so see that eval_dataset asks the same kind "
        "of prompts; if it does, lower optimizer.lr"
    )
    for kls in ([0.9] * WINDOW, [0.1]):  # hardly nearer, and not known well enough
        assert said(run(0.4, 0.24, **nearer | {"last_kls": kls}))[0].endswith("); lower optimizer.lr")


def test_avg_at_k_is_the_measure_where_there_is_no_accuracy():
    history = run(perplexities=(2.0, 1.0, 1.0))
    for row, score in zip(history.evaluations, (0.4, 0.9, 0.2), strict=True):
        row |= {"avg_at_k": score, "benchmarks": {"one": {"problems": 150}, "two": {"problems": 50}}}
    assert history.best["step"] == 10
    assert said(history, graded=None) == [
        "worse than at the start (Avg@k 0.400, now 0.200); the best was step 10 (0.900); lower optimizer.lr",
        "the best student is in best/, not final/: step 10 (Avg@k 0.900), against 0.200 after step 20",
    ]
    for row in history.evaluations:
        row["benchmarks"] = {"one": {"problems": 15}}
    history.evaluations[2]["avg_at_k"] = 0.3
    assert "worse than at the start" not in str(said(history, graded=None))  # 15 problems cannot tell
    history.evaluations[2]["avg_at_k"] = None  # not asked there
    assert said(history) == []
    history.evaluations[0]["accuracy"] = 0.5
    assert history.measured[0] == "accuracy"


def test_a_checkpoint_from_before_benchmarks_still_loads():
    state = run(0.4, 0.6).state_dict()
    del state["teacher_benchmarks"]
    history = History()
    history.load_state_dict(state)
    assert history.best["step"] == 10
    assert history.teacher_benchmarks == {}


def test_during_training_three_evaluations_in_a_row_have_to_be_worse():
    assert said(run(0.4, 0.2, 0.2), ended=False) == []
    assert said(run(0.4, 0.2, 0.4, 0.2), ended=False) == []
    assert len(said(run(0.4, 0.2, 0.2, 0.2), ended=False)) == 1
    assert said(run(0.4, 0.9, 0.6), ended=False) == []  # what is in best/ counts at the end


def test_the_best_student_is_in_best():
    best = "the best student is in best/, not final/: step 10 (accuracy 0.900), against 0.600 after step 20"
    assert said(run(0.4, 0.9, 0.6)) == [best]


def test_responses_that_never_end():
    assert never_ending([], 512) is None
    assert never_ending([0.8] * 10, 512) is None
    assert never_ending([0.97, 0.99], 512) == (
        "responses never end: 98% reach max_new_tokens = 512 in the last 2 steps; check EOS and the chat template, or "
        "raise max_new_tokens"
    )
    history = History()
    for step in range(WINDOW):
        assert said(history, ended=False) == []
        history.add_responses({"rollout/response_tokens": 512.0, "rollout/truncated_share": 1.0})
        assert len(said(history)) == 1, step
    assert len(said(history, ended=False)) == 1
    for _ in range(WINDOW):
        history.add_responses({"rollout/response_tokens": 500.0, "rollout/truncated_share": 0.5})
    assert said(history) == []


def test_lengths_are_compared_over_steps_that_do_not_overlap():
    grew = "the student's responses grew from 120 to 900 tokens"
    assert length_change([120.0] * WINDOW, [900.0] * WINDOW) == grew
    assert length_change([900.0] * WINDOW, [120.0] * WINDOW) == "the student's responses shrank from 900 to 120 tokens"
    assert length_change([120.0] * WINDOW, [900.0] * (WINDOW - 1)) is None
    assert length_change([120.0] * WINDOW, [200.0] * WINDOW) is None
    assert length_change([2.0] * WINDOW, [8.0] * WINDOW) is None
    history = History()
    for step in range(50):
        history.add_responses({"loss/total": 1.0})  # nothing was sampled
        history.add_responses({"rollout/response_tokens": 100.0 * (1 + step), "rollout/truncated_share": 0.0})
    assert said(history) == ["the student's responses grew from 550 to 4550 tokens"]


def test_skipped_steps_are_told_with_their_cause():
    assert skipped(0, 0) is None
    assert skipped(1, 0) == "1 step was not finite and skipped; lower optimizer.lr, or set dtype=fp32"
    assert said(History(skipped_steps=5, not_finite_steps=2)) == [
        "2 steps were not finite and skipped; lower optimizer.lr, or set dtype=fp32; 3 steps were skipped since no "
        "token was selected; see truncated_responses and positions"
    ]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [(0.9, 0.4, True), (0.9, 0.75, False), (0.6, 0.45, False), (0.4, 0.9, False)],
)
def test_responses_that_come_to_repeat_themselves(before, after, expected):
    sentence = repetition([before] * WINDOW, [after] * WINDOW)
    assert (sentence is not None) is expected
    assert repetition([before] * (WINDOW - 1), [after] * WINDOW) is None


def test_repetition_is_said_of_a_run_whose_checkpoint_did_not_keep_it():
    rows = [[40.0, 0.0, 0.9]] * WINDOW
    history = History(first_responses=rows, last_responses=[[40.0, 0.0, 0.25]] * WINDOW)
    assert said(history) == [
        "responses repeat themselves: 25% of a response's 4-grams differ, 90% at the start; read rollout/samples, and "
        "lower optimizer.lr"
    ]
    assert said(History(first_responses=[[40.0, 0.0]] * WINDOW, last_responses=[[40.0, 0.0]] * WINDOW)) == []


def test_a_student_that_agrees_with_its_teacher_on_other_things():
    falling = {"first_kls": [3.4] * WINDOW, "last_kls": [0.45] * WINDOW}
    astray = (
        "the student learns to say what nobody asked for: the KL on its own responses fell from 3.400 to 0.450, "
        "while the perplexity of reference answers rose from 2.9e+04 to 3e+09; set reference_share, such as [1, 0], "
        "or add a loss on hidden states"
    )
    assert said(run(perplexities=(2.9e4, 3e9), **falling), ended=False) == [astray]
    assert said(run(perplexities=(2.9e4, 3e3), **falling), ended=False) == []
    for kls in ([3.0] * WINDOW, [0.45]):
        assert said(run(perplexities=(2.9e4, 3e9), **falling | {"last_kls": kls}), ended=False) == []


@pytest.mark.parametrize(
    ("metrics", "kept"),
    [
        ({"token/kl": 0.5}, [0.5]),
        ({"token/support_kl": 0.5}, [0.5]),
        ({"token/sft/reference_nll": 2.0, "token/opd/kl": 0.5}, [0.5]),
        ({"token/opd/support_kl": 0.5, "token/more/kl": 0.25}, [0.25]),
        ({"token/kl": 0.5, "rollout/reference_share": 0.0}, [0.5]),
        ({"token/kl": 0.5, "rollout/reference_share": 0.25}, []),  # that on the data's text is another number
        ({"token/kl": float("nan")}, []),
        ({"teachers/math/token/kl": 0.5, "loss/total": 1.0}, []),
    ],
)
def test_a_step_gives_the_kl_on_the_students_own_responses(metrics, kept):
    history = History()
    history.add_kl(metrics)
    assert history.first_kls == kept

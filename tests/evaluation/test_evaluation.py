import math

import pytest
import torch

from oprd_tune.data import PromptDataset
from oprd_tune.errors import ConfigError
from oprd_tune.evaluation import ReferencePerplexity, TaskAccuracy
from oprd_tune.tiny import tokenizer
from tests.conftest import make_model


def data(prompts=("1+1=", "20+30=", "5+4="), answers=("2", "50", "9")):
    return PromptDataset(
        [{"prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True)],
        tokenizer(),
        prompt_template="{prompt}",
    )


def test_perplexity_is_that_of_the_formula():
    model, texts = make_model(vocab=16), data()
    total, count = 0.0, 0
    for i in range(len(texts)):
        prompt, answer = texts[i][0], texts.answer_tokens(i)
        logprobs = model(torch.tensor([[*prompt, *answer]])).log_softmax(-1)[0]
        total -= sum(logprobs[len(prompt) - 1 + j, t].item() for j, t in enumerate(answer))
        count += len(answer)
    for budget in (10, 1000):
        measured = ReferencePerplexity(texts, tokenizer(), tokens_per_micro_batch=budget)(model)
        assert math.isclose(measured, math.exp(total / count), rel_tol=1e-5)
    assert ReferencePerplexity(texts, tokenizer(), first=1, max_answer_tokens=1).longest == 5


def test_perplexity_is_measured_without_dropout():
    model = make_model(vocab=16, attn_dropout=0.5).train()
    measure = ReferencePerplexity(data(), tokenizer())
    assert measure(model) == measure(model)
    assert model.training


def test_accuracy_is_the_graders_mean(monkeypatch):
    monkeypatch.setattr(
        "oprd_tune.evaluation.task_accuracy.decode_responses", lambda *_: ["2", "51", "9 ", "2", "50", "8"]
    )
    measure = TaskAccuracy(
        data(), tokenizer(), grader="oprd_tune.grading.exact_match", max_new_tokens=3, samples_per_prompt=2
    )
    monkeypatch.setattr(measure, "grader", lambda response, answer: response.strip() in ("2", "9"))
    assert measure(make_model(vocab=16)) == 0.5


class Batches:
    """A grader that notes what it is given at once."""

    def __init__(self):
        self.seen = []

    def __call__(self, response, answer, /):
        return response == answer

    def grade(self, pairs, /):
        self.seen.append(pairs)
        return [response == answer for response, answer in pairs]


def test_a_grader_of_batches_gets_all_responses_at_once(monkeypatch):
    responses = ["2", "51", "50", "50", "9", "8"]
    monkeypatch.setattr("oprd_tune.evaluation.task_accuracy.decode_responses", lambda *_: responses)
    grader = Batches()
    measure = TaskAccuracy(data(), tokenizer(), grader=grader, max_new_tokens=3, samples_per_prompt=2)
    assert measure(make_model(vocab=16)) == 4 / 6
    assert grader.seen == [list(zip(responses, ["2", "2", "50", "50", "9", "9"], strict=True))]


def test_evaluators_explain_what_they_lack():
    with pytest.raises(ConfigError, match="grader 'oprd_tune.grading.fuzzy' cannot be found"):
        TaskAccuracy(data(), tokenizer(), grader="oprd_tune.grading.fuzzy", max_new_tokens=3)
    without = PromptDataset([{"prompt": "1", "answer": None}], tokenizer(), prompt_template="{prompt}")
    with pytest.raises(ConfigError, match="needs reference answers"):
        ReferencePerplexity(without, tokenizer())

"""Texts for the log."""

from dataclasses import replace

import torch

from oprd_tune.evaluation.texts import differences_as_markdown, samples_as_markdown
from oprd_tune.losses.diagnostics import TokenDifference
from oprd_tune.rollout.responses import Response, pack_responses
from oprd_tune.tiny import tokenizer
from oprd_tune.types import Prompts

ENCODE = tokenizer().encode


def rollout(*texts):
    """Responses to `1+1=`; those that end in ⏎ have an EOS."""
    prompt = tuple(ENCODE("1+1=", add_bos=False, add_eos=False))
    responses = [ENCODE(text.rstrip("⏎"), add_bos=False, add_eos=text.endswith("⏎")) for text in texts]
    prompts = Prompts((prompt,) * len(texts), tuple(range(len(texts))), ("2",) * len(texts))
    packed = [
        Response(torch.tensor(own), *(torch.zeros(len(own), *rest) for rest in ((), (0,), ()))) for own in responses
    ]
    stops, pad = tokenizer().stop_tokens, tokenizer().pad_id
    return pack_responses(
        prompts,
        packed,
        samples_per_prompt=1,
        stop_tokens=stops,
        pad_id=pad,
        policy_version=0,
        device=torch.device("cpu"),
    )


def test_samples_show_reference_answer_verdict_and_cut():
    text = samples_as_markdown(
        rollout("2⏎", "33", "4⏎"), tokenizer(), ["2", "2"], lambda response, answer: response == answer
    )
    first, second = text.split("---")
    assert "**prompt**\n\n```\n1+1=\n```" in first
    assert "**response, right**\n\n```\n2\n```" in first
    assert "**response, wrong, cut**\n\n```\n33\n```" in second
    assert "**reference answer**\n\n```\n2\n```" in second


def test_samples_without_answers_or_grader_have_no_verdict():
    text = samples_as_markdown(rollout("2⏎", "33"), tokenizer(), [None, "2"])
    assert "**response**" in text
    assert "**response, cut**" in text
    assert text.count("reference answer") == 1


def test_the_largest_differences_come_first_with_what_both_would_have_said():
    one, two = ENCODE("12", add_bos=False, add_eos=False)
    small = TokenDifference(0.5, [one, two], two, [(two, 0.9), (one, 0.1)], [(one, 0.75), (two, 0.25)])
    text = differences_as_markdown([small, replace(small, kl=3.0, before=[two])], tokenizer(), count=5)
    assert text.splitlines()[2:] == [
        "| 3.00 | `2` | `2` | `2` 90%, `1` 10% | `1` 75%, `2` 25% |",
        "| 0.50 | `12` | `2` | `2` 90%, `1` 10% | `1` 75%, `2` 25% |",
    ]

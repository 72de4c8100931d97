from dataclasses import replace

import pytest
import torch

from oprd_tune.errors import ConfigError
from oprd_tune.losses.masking import StateSelector, select_states
from oprd_tune.types import Reading, Rollout

PROMPTS = [3, 1, 5, 2, 4]
RESPONSES = [7, 1, 0, 50, 2]


def response_mask():
    mask = torch.zeros(len(PROMPTS), max(p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)) + 2, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        mask[row, prompt : prompt + response] = True
    return mask


def rollout(mask):
    rows = len(mask)
    return Rollout(
        tokens_BS=torch.zeros_like(mask, dtype=torch.long),
        response_mask_BS=mask,
        sampler_logprobs_BS=torch.zeros(mask.shape),
        lengths_B=torch.full((rows,), mask.shape[1]),
        truncated_B=torch.zeros(rows, dtype=torch.bool),
        prompt_positions_B=torch.arange(rows),
        policy_version=0,
    )


def expected_index(positions, k, shift):
    """Row by row, with plain lists."""
    width, index = response_mask().shape[1], []
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        tokens = list(range(prompt, prompt + response))
        chosen = {
            "all": tokens,
            "last": tokens[-1:],
            "first_k": tokens[:k],
            "last_k": tokens[-k:],
        }[positions]
        index += [row * width + column - shift for column in chosen]
    return index


@pytest.mark.parametrize("k", [1, 3, 50])
@pytest.mark.parametrize("positions", ["all", "last", "first_k", "last_k"])
@pytest.mark.parametrize(("anchor", "shift"), [("predict", 1), ("consume", 0)])
def test_selects_tokens_by_position_and_shifts_their_states(positions, k, anchor, shift):
    selection = select_states(response_mask(), positions=positions, k=k, anchor=anchor)
    assert selection.index_T.tolist() == expected_index(positions, k, shift)
    selected = StateSelector(positions, k, anchor)(rollout(response_mask()))
    for name in ("index_T", "part_T", "teacher_index_T"):
        assert torch.equal(getattr(selected, name), getattr(selection, name))
    assert len(selected) == len(expected_index(positions, k, shift))


@pytest.mark.parametrize("k", [1, 3, 50])
@pytest.mark.parametrize("positions", ["all", "last", "first_k", "last_k"])
def test_the_most_of_a_response_is_what_one_of_that_length_has_selected(positions, k):
    select = StateSelector(positions, k)
    for length in (1, 2, 3, 7, 49, 50, 51):
        mask = torch.zeros(1, 60, dtype=torch.bool)
        mask[:, 4 : 4 + length] = True
        assert select.most(length) == len(select(rollout(mask)))


@pytest.mark.parametrize("positions", ["all", "last", "first_k"])
def test_responses_weigh_the_same_whatever_their_lengths(positions):
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[0, 2:3] = mask[1, 1:8] = True  # and a row that was masked
    select = StateSelector(positions, 4, average_over="responses")
    selection, tokens = select(rollout(mask)), select.tokens(rollout(mask))
    first = {"all": 7, "last": 1, "first_k": 4}[positions]
    assert selection.weight_T.tolist() == pytest.approx([1] + [1 / first] * first)
    assert tokens.weight_T.tolist() == pytest.approx([1] + [1 / 7] * 7)
    assert selection.count == tokens.count == 2
    plain = StateSelector(positions, 4)
    assert (plain(rollout(mask)).count, plain.tokens(rollout(mask)).count) == (1 + first, 8)


def test_the_weights_are_those_of_the_states_that_are_left():
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 2:5] = mask[1, 3:6] = True
    column_BS = torch.tensor([[-1, 3, -1, 4, 6, -1], [-1, -1, 2, -1, -1, 7]])
    read = replace(rollout(mask), reading=Reading(torch.zeros(2, 9, dtype=torch.long), torch.tensor([7, 8]), column_BS))
    selection = StateSelector(average_over="responses")(read)
    assert selection.weight_T.tolist() == [0.5, 0.5, 1]


def test_states_that_a_teacher_with_another_tokenizer_has_no_equal_of_are_left_out():
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 2:5] = mask[1, 3:6] = True
    column_BS = torch.tensor([[-1, 3, -1, 4, 6, -1], [-1, -1, 2, 5, -1, 7]])
    reading = Reading(torch.zeros(2, 9, dtype=torch.long), torch.tensor([7, 8]), column_BS)
    read = replace(rollout(mask), reading=reading)
    selection = StateSelector()(read)
    assert selection.index_T.tolist() == [1, 3, 6 + 2, 6 + 3]
    assert selection.teacher_index_T.tolist() == [3, 4, 9 + 2, 9 + 5]
    assert selection.part_T.tolist() == [0, 10, 0, 5]
    assert StateSelector("last", anchor="consume")(read).teacher_index_T.tolist() == [6, 9 + 7]
    assert len(StateSelector("last")(read)) == 1


def test_predict_takes_the_last_prompt_state_and_leaves_the_last_response_state():
    mask = torch.tensor([[False, False, True, True, True, False]])
    assert select_states(mask, anchor="predict").index_T.tolist() == [1, 2, 3]
    assert select_states(mask, anchor="consume").index_T.tolist() == [2, 3, 4]
    assert select_states(mask, positions="last", anchor="predict").index_T.tolist() == [3]


def test_parts_run_along_each_response():
    selection = select_states(response_mask())
    parts = selection.part_T.split([r for r in RESPONSES if r])
    assert parts[0].tolist() == [0, 2, 4, 6, 9, 11, 13]
    assert parts[1].tolist() == [0]
    assert (parts[2] // 4).bincount().tolist() == [13, 12, 13, 12]


def test_nothing_to_select_is_an_empty_selection():
    assert len(select_states(torch.zeros(3, 5, dtype=torch.bool))) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"positions": "tail"}, "'tail'; allowed are all, last, first_k, last_k"),
        ({"positions": "last_k", "k": 0}, "positions_k is 0"),
        ({"k": 2.5}, "positions_k is 2.5; it must be a whole number"),
        ({"anchor": "after"}, "'after'; allowed are predict, consume"),
    ],
)
def test_explains_what_is_allowed(arguments, message):
    with pytest.raises(ConfigError, match=message):
        StateSelector(**arguments)


def test_refuses_a_response_that_nothing_predicts():
    with pytest.raises(ValueError, match="column 0"):
        select_states(torch.ones(1, 3, dtype=torch.bool), anchor="predict")

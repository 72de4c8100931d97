"""Data sets whose prompts several teachers read, and the microbatches made of them."""

import json

import pytest
import torch

from oprd_tune.data import PromptStream, RoutedPrompts, prompt_dataset
from oprd_tune.data.routing import PromptsOfTeacher
from oprd_tune.errors import ConfigError
from oprd_tune.ranks import Ranks
from oprd_tune.tiny import tokenizer, two_tasks
from oprd_tune.training.gradients import split_alike
from oprd_tune.types import Rollout

TEACHERS = {"math": PromptsOfTeacher(("sums", "products")), "code": PromptsOfTeacher(("code",))}
KINDS = ["sums", "code", "products", "code", "sums"]
ROWS = [{"prompt": f"{i}+1=", "answer": str(i + 1), "kind": kind} for i, kind in enumerate(KINDS)]


def routed(rows=ROWS, teachers=TEACHERS, teacher_column="kind", **options):
    options = {"prompt_template": "{prompt}", **options}
    return RoutedPrompts(rows, tokenizer(), teacher_column=teacher_column, teachers=teachers, **options)


def test_each_prompt_keeps_its_place_and_knows_its_teacher():
    data = routed([ROWS[0], {"prompt": "", "kind": "code"}, *ROWS[1:]])
    assert [data.teacher_of(i) for i in range(len(data))] == ["math", "code", "math", "code", "math"]
    assert [data[i] for i in range(5)] == [(tuple(tokenizer().encode(r["prompt"])), r["answer"]) for r in ROWS]
    assert data.counts == {
        **{"used": 5, "dropped": 1, "empty": 1, "too_long": 0, "unanswered": 0},
        **{"for_math": 3, "for_code": 2},
    }
    assert (len(data.parts["math"]), data.dropped, data.has_answers, data.longest_teacher_prompt) == (3, 1, True, None)
    assert data.answer_tokens(1) == (*tokenizer().encode("2"), tokenizer().eos_id)
    prompts = PromptStream(data, prompts_per_step=5, seed=0).at_step(0)
    by_prompt = {ROWS[i]["prompt"]: data.teacher_of(i) for i in range(5)}
    decode = tokenizer().decode
    assert prompts.teachers == tuple(by_prompt[decode(list(tokens))] for tokens in prompts.tokens)


def test_each_teacher_reads_in_its_own_tokens():
    teachers = {**TEACHERS, "code": PromptsOfTeacher(("code",), tokenizer("teens_teacher"))}
    data = routed([{"prompt": "12+13=", "kind": "code"}, {"prompt": "12+13=", "kind": "sums"}], teachers)
    assert data.teacher_prompt(0) == tuple(tokenizer("teens_teacher").encode("12+13="))
    assert data.teacher_prompt(1) == data[1][0]
    assert (data.longest_teacher_prompt, routed().teacher_prompt(0)) == (4, None)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"teachers": None}, "there is one teacher; leave it out"),
        ({"teacher_column": None}, "give dataset.teacher_column"),
        ({"teachers": {"math": TEACHERS["math"]}}, "no teacher reads the prompts whose 'kind' is 'code'; list them"),
        (
            {"rows": [*ROWS, {"prompt": "1", "kind": None}]},
            "row 5, counted from 0, has no kind, so no teacher reads it",
        ),
        ({"teachers": {**TEACHERS, "more": PromptsOfTeacher(("code",))}}, "both teachers.code and teachers.more read"),
        ({"rows": [{"prompt": "", "kind": "code"}]}, "of the 1 rows for code, counted by themselves: the data set is"),
    ],
)
def test_what_does_not_fit_is_told(changed, said):
    with pytest.raises(ConfigError, match=said):
        routed(**changed)


def test_a_file_says_who_reads_its_prompts(tmp_path):
    file = tmp_path / "mixed.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options = {"source": str(file), "answer_column": "answer", "prompt_template": "{prompt}"}
    data = prompt_dataset(tokenizer(), teacher_column="kind", teachers=TEACHERS, **options)
    assert [data.teacher_of(i) for i in range(5)] == ["math", "code", "math", "code", "math"]
    with pytest.raises(ConfigError, match="has no column 'task'; it has prompt, answer, kind"):
        prompt_dataset(tokenizer(), teacher_column="task", teachers=TEACHERS, **options)


def test_the_two_tiny_tasks_alternate_and_may_be_shuffled():
    teachers = {name: PromptsOfTeacher((name,)) for name in ("addition", "reversal")}
    options = {"split": "train", "count": 8, "teachers": teachers}
    plain, shuffled = (two_tasks(tokenizer(), **options, shuffled=s) for s in (False, True))
    assert [plain.teacher_of(i) for i in range(4)] == ["addition", "reversal"] * 2
    assert [shuffled.teacher_of(i) for i in range(4)] == ["addition", "reversal", "reversal", "addition"]
    assert [plain[i] for i in range(8)] == [shuffled[i] for i in range(8)]
    assert plain[1][1] == tokenizer().decode(list(plain[1][0]))[-2::-1]


def rollout(teachers, lengths):
    """Rows of these lengths, whose last two tokens are responses."""
    length_B = torch.tensor(lengths)
    column_S = torch.arange(max(lengths))
    mask_BS = (column_S < length_B[:, None]) & (column_S >= length_B[:, None] - 2)
    return Rollout(
        tokens_BS=torch.arange(len(lengths))[:, None].expand(-1, max(lengths)),
        response_mask_BS=mask_BS,
        sampler_logprobs_BS=torch.zeros(mask_BS.shape),
        lengths_B=length_B,
        truncated_B=torch.zeros(len(lengths), dtype=torch.bool),
        prompt_positions_B=torch.arange(len(lengths)),
        policy_version=0,
        teacher_B=torch.tensor(teachers),
    )


class OfTwo(Ranks):
    """The first of two ranks, whose neighbour has these numbers of microbatches by teacher."""

    def __init__(self, others):
        super().__init__()
        self._others = others

    def collect(self, value):
        return [value, self._others]


def test_a_microbatch_has_one_teacher_and_idle_ones_stand_where_the_others_have_more():
    batch = rollout([2, 0, 2, 0, 0], [4, 5, 3, 5, 3])
    micro_batches = split_alike(batch, 10, OfTwo({1: 1, 2: 3}))
    assert [micro.teacher for micro in micro_batches] == [0, 0, 1, 2, 2, 2]
    rows = [micro.prompt_positions_B.tolist() for micro in micro_batches]
    assert [rows[0], rows[1], rows[3]] == [[1, 3], [4], [0, 2]]
    assert [micro.response_tokens for micro in micro_batches] == [4, 2, 0, 4, 0, 0]
    assert len({id(micro) for micro in micro_batches}) == 6  # the last one is told by its identity
    assert [micro.teacher for micro in split_alike(batch, 100, Ranks())] == [0, 2]  # the teacher 1 reads nothing

"""Characters that a tokenizer has no tokens for are told."""

import pytest

from oprd_tune.data import HuggingFaceTokenizer
from oprd_tune.data.prompts import PromptDataset
from oprd_tune.data.unwritable import missing
from oprd_tune.modeling.folders import find_folder


@pytest.fixture(scope="module")
def tokenizer():
    """The embedded one, which knows digits and few signs."""
    return HuggingFaceTokenizer(str(find_folder("student", "tiny/student")))


@pytest.mark.parametrize(
    ("text", "decoded", "lost"),
    [
        ("12+3=", "12+3=", ""),
        ("12 − 3", "12  3", "−"),
        ("Größe ﬁne", "grosse fine", "ö"),  # the two dots are gone
        ("Größe", "Größe", ""),
        ("A\n\tb", "a b", ""),
        ("½x", "½", "x"),
        ("说", "", "说"),
        ("", "anything", ""),
    ],
)
def test_what_is_lost(text, decoded, lost):
    assert missing(text, decoded) == set(lost)


def test_prompts_that_cannot_be_written_are_counted(tokenizer, capsys):
    rows = [{"prompt": f"{n}+1=" if n % 4 else f"say {n}+1="} for n in range(10, 30)]
    PromptDataset(rows, tokenizer, prompt_template="{prompt}")
    said = capsys.readouterr().out
    assert "dataset: 5 of 20 prompts have characters that the tokenizer cannot write" in said
    assert set(said.partition("read them: ")[2].partition(" (")[0].split()) == set("say")


@pytest.mark.parametrize(("count", "looked_at"), [(200, 200), (201, 200), (399, 200), (1000, 200)])
def test_no_more_than_two_hundred_are_looked_at(count, looked_at, tokenizer, capsys):
    PromptDataset([{"prompt": f"say {n}+1="} for n in range(count)], tokenizer, prompt_template="{prompt}")
    assert f"dataset: {looked_at} of {looked_at} prompts have" in capsys.readouterr().out


def test_no_order_of_prompts_hides_them(tokenizer, capsys):
    """As where every second one comes from another source."""
    for first in (0, 1):
        rows = [{"prompt": f"say {n}+1=" if n % 2 == first else f"{n}+1="} for n in range(400)]
        PromptDataset(rows, tokenizer, prompt_template="{prompt}")
        found = int(capsys.readouterr().out.partition("dataset: ")[2].partition(" of ")[0])
        assert 80 < found < 120


def test_it_is_said_whose_prompts_they_are(tokenizer, capsys):
    rows = [{"prompt": f"{n}+1="} for n in range(10, 30)]
    PromptDataset(rows, tokenizer, prompt_template="{prompt}", teacher_prompt_template="say {prompt}")
    assert "20 of 20 prompts, as the teacher reads them, have characters" in capsys.readouterr().out


def test_all_is_well_says_nothing(tokenizer, capsys):
    PromptDataset([{"prompt": f"{n}+1="} for n in range(10, 30)], tokenizer, prompt_template="{prompt}")
    assert "cannot write" not in capsys.readouterr().out

"""Reference answers in the place of samples: which prompts, how many, what the losses see, and who refuses."""

import json
from dataclasses import replace

import pytest
import torch

from oprd_tune.config import OPRDSettings
from oprd_tune.errors import ConfigError, RolloutError
from oprd_tune.ranks import Ranks
from oprd_tune.run.launcher import run_recipe as launch
from oprd_tune.training.references import References
from oprd_tune.types import SamplingRequest
from tests.conftest import ENDED, SMALL, load_config, recipe_class, weights
from tests.run.test_rollouts import AHEAD, rollout_of, stream

REQUEST = SamplingRequest(stop_tokens=(1,), pad_id=0, max_prompt_tokens=4, max_new_tokens=3, vocabulary=120)
CONSTANT = {"lr_scheduler._component_": "oprd_tune.training.constant_with_warmup", "checkpoint_every_n_steps": 1}


def made(share, *, rank=0, world_size=1, steps=11, request=REQUEST):
    ranks = Ranks(rank, world_size)
    return References(share, stream(rank, world_size), request, ranks, prompts_per_step=4, steps=steps)


def test_a_share_may_move_over_the_run_or_its_first_steps():
    assert [made(0.25).share(step) for step in (0, 10)] == [0.25, 0.25]
    assert [made([1, 0]).share(step) for step in (0, 5, 10, 20)] == [1, 0.5, 0, 0]
    assert [made([0.2, 0.6, 3]).share(step) for step in (0, 1, 2, 10)] == pytest.approx([0.2, 0.4, 0.6, 0.6])
    assert made([1, 0], steps=1).share(0) == 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("share", [0, 0.3, 0.5, 0.8, 1])
def test_ranks_sample_and_take_the_same_prompts_however_many_they_are(share, world_size):
    sampled, kept = [], []
    for rank in range(world_size):
        references, prompts = made(share, rank=rank, world_size=world_size), stream(rank, world_size).at_step(2)
        own = references.to_sample(prompts, 2)
        sampled += own.positions
        kept.append(len(own))
    assert all(kept) or not any(kept)  # engines need every rank
    assert len(sampled) == 4 - made(share, world_size=world_size).count(2)
    assert sorted(sampled) == list(range(8, 12))[4 - len(sampled) :]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("samples", [1, 2, 8])
@pytest.mark.parametrize("share", [0.03, 0.1, 0.5, 0.9])
def test_what_a_step_cannot_give_the_next_ones_do(share, samples, world_size):
    """Four prompts a step: a share of their rows that is less than one of them, or that a rank's sample stands in."""
    references = made(share, world_size=world_size, request=replace(REQUEST, samples_per_prompt=samples))
    given = [references.count(step) for step in range(4000)]
    assert {*given} <= {*range(4 - world_size + 1), 4}
    sampled = samples * (4 * 4000 - sum(given))
    assert sum(given) / (sum(given) + sampled) == pytest.approx(share, abs=0.005)
    assert [references.count(step) for step in (3999, 0)] == [given[3999], given[0]]


def test_a_share_that_has_ended_owes_nothing():
    references = made([0.6, 0, 3], world_size=4)
    assert [references.count(step) for step in range(6)] == [4, 0, 0, 0, 0, 0]


def test_answers_stand_beside_samples_in_the_order_of_prompts(monkeypatch):
    references, prompts = made(0.5), stream().at_step(2)  # 8 to 11
    monkeypatch.setattr(references._prompts, "answer_tokens", lambda position: (position, 7, 7, 7, 1)[: position - 5])
    found = references.beside(rollout_of((10, 11), 1), prompts, 2)
    assert found.prompt_positions_B.tolist() == [8, 9, 10, 11]
    assert found.given_B.tolist() == [True, True, False, False]
    assert found.policy_version == 1
    answers = [found.tokens_BS[row][found.response_mask_BS[row]].tolist() for row in (0, 1)]
    assert answers == [[8, 7, 7], [9, 7, 7]]  # cut at three tokens
    assert found.truncated_B.tolist()[:2] == [True, True]
    assert found.sampler_logprobs_BS[:2].abs().max() == 0
    assert found.sampled.prompt_positions_B.tolist() == [10, 11]
    everything = made(1.0)
    monkeypatch.setattr(everything._prompts, "answer_tokens", lambda position: (position, 1))
    found = everything.beside(None, prompts, 2)
    assert (found.policy_version, found.given_B.tolist()) == (2, [True] * 4)
    assert found.truncated_B.tolist() == [False] * 4
    assert len(found.sampled) == 0


def test_an_answer_that_no_model_can_say_is_named(monkeypatch):
    references = made(1.0)
    monkeypatch.setattr(references._prompts, "answer_tokens", lambda position: (3, 500))
    with pytest.raises(RolloutError, match="the reference answer to prompt 8 has the token 500, but .* ends at 119"):
        references.beside(None, stream().at_step(2), 2)


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (1.2, "reference_share is 1.2; it must lie within 0 and 1"),
        ([1.0], "give a share, or [from, to], or [from, to, steps]"),
        ([1.0, -0.5], "reference_share is -0.5; it must lie within 0 and 1"),
        ([1.0, 0.0, 2.5], "give a share, or [from, to], or [from, to, steps]"),
        ([1.0, 0.0, 3.0, 4.0], "give a share, or [from, to], or [from, to, steps]"),
    ],
)
def test_a_share_that_is_none_is_refused(share, said):
    with pytest.raises(ConfigError) as error:
        OPRDSettings(output_dir="out", max_steps=1, max_prompt_tokens=1, max_new_tokens=1, reference_share=share)
    assert said in str(error.value)


# ---- in recipes ----


def run(out, config="tiny/oprd", status=ENDED, **overrides):
    bridge = {"bridge.prompts": 64, "bridge.held_out_prompts": 16} if config == "tiny/cross_tokenizer" else {}
    cfg = load_config(config, output_dir=out, **{**SMALL, **CONSTANT, **bridge, **overrides})
    assert launch(recipe_class(cfg.recipe), cfg) in status
    rows = (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else []
    return [row for row in map(json.loads, rows) if "loss/total" in row]


@pytest.mark.parametrize(
    ("config", "ahead"),
    [("tiny/oprd", {}), ("tiny/opd_topk", {}), ("tiny/cross_tokenizer", {}), ("tiny/oprd", AHEAD)],
    ids=["oprd", "opd_topk", "cross_tokenizer", "one step ahead"],
)
def test_a_run_goes_over_from_answers_to_samples_and_resumes(tmp_path, config, ahead):
    whole = run(tmp_path / "whole", config, reference_share="[1,0]", log_samples_every_n_steps=1, **ahead)
    assert [row["rollout/reference_share"] for row in whole] == pytest.approx([1, 0.75, 0.25, 0], abs=0.01)
    assert "rollout/entropy" not in whole[0]
    assert "time/sync" not in whole[0] or ahead
    assert all("rollout/response_tokens" in row for row in whole[1:])
    if not ahead:
        run(tmp_path / "parts", config, reference_share="[1,0,4]", max_steps=2)
        run(tmp_path / "parts", config, reference_share="[1,0,4]", resume="true")
        wanted = weights(tmp_path / "whole" / "final")
        assert all(torch.equal(w, wanted[name]) for name, w in weights(tmp_path / "parts" / "final").items())


def test_answers_that_cannot_be_learned_as_they_are_written_are_counted(tmp_path, capsys):
    path = tmp_path / "sums.jsonl"
    answers = ["33", "", "is 33", "3" * 12]
    path.write_text("".join(json.dumps({"question": f"{n}+1=", "answer": answers[n % 4]}) + "\n" for n in range(80)))
    cfg = load_config("tiny/oprd", output_dir=tmp_path / "out", **SMALL, reference_share=0.5, preflight="only")
    cfg.dataset = {"_component_": "oprd_tune.data.prompt_dataset", "source": str(path), "prompt_column": "question"}
    cfg.dataset |= {"answer_column": "answer", "prompt_template": "{prompt}"}
    assert launch(recipe_class(cfg.recipe), cfg) == 0
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("reference_share"))
    assert "of the first 80 reference answers, " in said
    assert "20 are longer than max_new_tokens = 8, so they are cut" in said
    assert "20 are empty, so that they teach to say nothing" in said
    assert "20 are written with characters that the tokenizer does not know" in said


@pytest.mark.parametrize("policy", ["mask", "drop"])
def test_a_run_in_which_all_answers_are_cut_says_so(tmp_path, capsys, policy):
    run(tmp_path, "tiny/opd_topk", (3,), reference_share=1.0, max_new_tokens=1, truncated_responses=policy)
    assert "the student has not changed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "overrides", "said"),
    [
        ("tiny/vopd", {}, "reference_share: ControlVariateReverseKL needs what the sampler says of each token"),
        ("tiny/opd_topk", {"loss.support": "sampler"}, "reference_share: TopKReverseKL needs what the sampler says"),
        ("tiny/oprd", {"dataset._component_": "tests.training.test_references.prompts_alone"}, "some prompts of"),
    ],
)
def test_what_cannot_use_them_says_so(tmp_path, capsys, config, overrides, said):
    run(tmp_path / "out", config, (2,), reference_share=0.5, **overrides)
    assert said in capsys.readouterr().err


def prompts_alone(tokenizer, *, max_prompt_tokens, split, count):
    """The sums without their results."""
    from oprd_tune.tiny import addition

    dataset = addition(tokenizer, max_prompt_tokens=max_prompt_tokens, split=split, count=count)
    kind = type("PromptsAlone", (type(dataset),), {"has_answers": False})
    dataset.__class__ = kind
    return dataset

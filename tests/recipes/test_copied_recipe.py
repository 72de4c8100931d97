"""What a researcher changes in a copied recipe takes five lines, and nothing in the package."""

import json
import runpy
from difflib import unified_diff

import pytest
import torch

from oprd_tune.losses.masking import response_tokens
from oprd_tune.modeling.taps import collect_states
from oprd_tune.modeling.weights import load_decoder
from oprd_tune.registry import recipe_files
from oprd_tune.tiny import checkpointer, tiny_qwen2
from oprd_tune.types import TeacherTargets
from tests.conftest import ENDED, SMALL, load_config

OPRD, OPD = "oprd_distributed", "opd_topk_distributed"
LOG = {"metric_logger._component_": "tests.distributed.components.JSONLogger"}


def copied(name, folder, *edits):
    """The class of a recipe's copy in which texts were replaced, five lines at most."""
    text = own = recipe_files()[name].read_text()
    for before, after in edits:
        assert own.count(before) == 1
        own = own.replace(before, after)
    _, _, *changed = unified_diff(text.splitlines(), own.splitlines(), n=0, lineterm="")
    assert 0 < sum(line[0] in "+-" for line in changed) <= 5
    (folder / "my_recipe.py").write_text(own)
    names = runpy.run_path(str(folder / "my_recipe.py"), run_name="recipe")
    (found,) = (v for v in names.values() if isinstance(v, type) and v.__module__ == "recipe")
    return found


def prepared(make_recipe, config, out, **overrides):
    recipe = make_recipe(load_config(config, output_dir=out, **{**SMALL, **LOG, **overrides}))
    recipe.setup()
    return recipe


def logged(out):
    lines = [json.loads(line) for line in (out / "tensorboard" / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss/total" in line]


def shipped(name, out):
    return load_decoder(tiny_qwen2, checkpointer(name, str(out)), dtype=torch.float32, device=torch.device("cpu"))


def first_rollout(recipe):
    return recipe.engine.generate(recipe.data.prompts.at_step(0), stream=0)


@pytest.mark.parametrize(("name", "config"), [(OPRD, "tiny/oprd"), (OPD, "tiny/opd_topk")])
def test_a_metric_of_ones_own_reaches_the_logger(name, config, out, tmp_path):
    collect = "            teacher.merge(metrics, stream.metrics)\n"
    own = '            metrics.add_each("my/thing", -micro.sampler_logprobs_BS[micro.response_mask_BS])\n'
    recipe = prepared(copied(name, tmp_path, (collect, collect + own)), config, out, tokens_per_micro_batch=20)
    assert recipe.train() in ENDED
    assert len(logged(out)) == 4
    for line in logged(out):
        assert line["my/thing"] == pytest.approx(line["rollout/entropy"], rel=1e-6)
        assert line["my/thing"] > 0.1


def test_forward_kl_as_a_plain_function_is_what_trains(out, tmp_path):
    own = "def forward_kl(log_p_TV, log_q_TV):\n    return (log_q_TV.exp() * (log_q_TV - log_p_TV)).sum(-1)\n"
    make_recipe = copied(
        OPD,
        tmp_path,
        ("from oprd_tune.losses.masking", "from oprd_tune.losses import PerTokenLoss\nfrom oprd_tune.losses.masking"),
        ("\nclass OPDRecipe:", own + "\nclass OPDRecipe:"),
        ("as_composite(parts.loss())", "as_composite(PerTokenLoss(per_token=forward_kl))"),
    )
    recipe = prepared(make_recipe, "tiny/opd_full", out, tokens_per_micro_batch=20)
    rollout = first_rollout(recipe)
    student, teacher = (shipped(role, out) for role in ("student", "teacher"))
    at = rollout.response_mask_BS[:, 1:]
    log_p, log_q = (model(rollout.tokens_BS)[:, :-1][at].log_softmax(-1) for model in (student, teacher))
    wanted = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    wanted.backward()
    norm = torch.stack([p.grad.norm() for p in student.parameters()]).norm().item()
    reverse = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert recipe.train() in ENDED
    assert len(logged(out)) == 4
    assert logged(out)[0]["loss/total"] == pytest.approx(wanted.item(), rel=1e-5)
    assert logged(out)[0]["loss/total"] != pytest.approx(reverse, rel=0.05)
    assert logged(out)[0]["optimizer/grad_norm"] == pytest.approx(norm, rel=1e-4)


class Stubborn:
    """A teacher that says the same of every token and at every layer."""

    def __init__(self):
        self.state_D = torch.linspace(-1, 2, 128)

    def targets(self, tokens_BS, index_T, final_index_T=None):
        final_TD = None if final_index_T is None else self.state_D.expand(len(final_index_T), -1)
        return TeacherTargets({layer: self.state_D.expand(len(index_T), -1) for layer in (1, 2, 3, 4)}, final_TD)


@pytest.mark.parametrize(("name", "config"), [(OPRD, "tiny/oprd"), (OPD, "tiny/opd_full")], ids=[OPRD, OPD])
def test_another_teacher_is_what_the_student_learns_from(name, config, out, tmp_path):
    ours = "        run.begin("
    theirs = "from tests.recipes.test_copied_recipe import Stubborn\n"
    imported = "from oprd_tune.training.student import Student\n"
    make_recipe = copied(
        name, tmp_path, (imported, imported + theirs), (ours, "        self.teachers[0].teacher = Stubborn()\n" + ours)
    )
    recipe = prepared(make_recipe, config, out, **{"optimizer.lr": 6e-3})
    rollout = first_rollout(recipe)
    index_T = response_tokens(rollout).index_T

    def distance():
        """Of the student from what the teacher says."""
        states = collect_states(recipe.student.model, rollout.tokens_BS, [(n, index_T, None) for n in (1, 2, 3, 4)])
        if name == OPRD:
            return torch.stack(
                [(state_TD - recipe.teachers[0].teacher.state_D).square().mean() for state_TD in states]
            ).mean()
        heads = (shipped(role, out).tok_embeddings.weight for role in ("student", "teacher"))
        log_p, log_q = (
            (state @ head_VD.T).log_softmax(-1)
            for state, head_VD in zip((states[-1], recipe.teachers[0].teacher.state_D), heads, strict=True)
        )
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    wanted = distance().item()
    recipe.engine.generate = lambda *_, **__: rollout
    losses = [recipe.train_step(recipe.data.prompts.at_step(0)).loss for _ in range(12)]
    assert losses[0] == pytest.approx(wanted, rel=1e-5)
    assert losses[-1] < 0.8 * losses[0]

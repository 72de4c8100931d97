"""A step that is not finite names what was so first: the teacher, an update, the student, or the loss itself."""

import pytest
import torch

from oprd_tune.losses import HiddenStateLoss
from tests.conftest import SMALL, load_config, recipe_class

BOTH = [("oprd_distributed", "tiny/oprd"), ("opd_topk_distributed", "tiny/oprd_plus_opd")]


def teacher_overflows(recipe):
    block = recipe.teachers[0].teacher._model.layers[1]
    block.register_forward_hook(lambda module, inputs, output: output * torch.inf)


def student_overflows(recipe):
    block = recipe.student.model.layers[2]
    block.register_forward_hook(lambda module, inputs, output: output * torch.inf)


def update_overflows(recipe):
    with torch.no_grad():
        recipe.student.model.layers[1].mlp.w1.weight[0, 0] = torch.nan


def loss_overflows(recipe):
    loss = recipe.loss if isinstance(recipe.loss, HiddenStateLoss) else recipe.loss.hidden
    loss.error = lambda student_TD, teacher_TD: (student_TD - teacher_TD).square().mean(-1) * torch.inf


@pytest.mark.parametrize(("recipe", "config"), BOTH)
@pytest.mark.parametrize(
    ("breaks", "said"),
    [
        (teacher_overflows, r"the teacher's states are not, first those for student layer \d"),
        (student_overflows, "the student's states are not, from block 3 on, although its weights are"),
        (
            update_overflows,
            r"the student's weights are not, such as layers\.1\.mlp\.w1\.weight: an update has overflowed",
        ),
        (loss_overflows, "states of both models are finite, so the loss or its gradient overflows"),
    ],
)
def test_the_first_that_is_not_finite_is_named(out, recipe, config, breaks, said):
    made = recipe_class(recipe)(load_config(config, output_dir=out, **SMALL, evaluate_every_n_steps=100))
    made.setup()
    with made.run:
        sampled = made.engine.generate(made.data.prompts.at_step(0), stream=0)
        made.engine.sync_weights = lambda step: None
        made.engine.generate = lambda prompts, *, stream: sampled  # broken models cannot sample
        breaks(made)
        for _ in range(2):
            assert made.train_step(made.data.prompts.at_step(0)).loss is None
        with pytest.raises(
            FloatingPointError, match=f"^step 1: loss .*; the 3. step in a row that is not finite: {said}"
        ):
            made.train_step(made.data.prompts.at_step(0))

"""A student that teaches itself with a hint, by hidden states and by tokens, and where its gradient comes from.

    python benchmarks/self_distillation.py --jobs 2 --steps 150      all of it; about twenty minutes on two cores

The student of `tiny/self_distillation` adds badly, but well if it reads the answer first. Its teacher is itself with
that hint. Rates, seeds and processes are as in objectives.py. The table also has the share of the gradient's squared
norm that the top 1 % of response tokens carry, before training and after it: the pivot tokens of OPSD (arXiv
2601.18734). Of each token, that is the gradient with respect to the states that the loss reads there.
"""

from __future__ import annotations

import inspect
import math
import runpy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from objectives import Case, compare, launch, mean
from omegaconf import OmegaConf
from torch import Tensor

from oprd_tune.losses.composite import Composite
from oprd_tune.modeling.taps import layer_taps
from oprd_tune.registry import config_files, recipe_files, recipe_named_in

HINT = "'{answer} {prompt}'"  # quoted, or it would be read as YAML's own braces
TOKENS = (
    *("student=tiny/hinted", "teacher=student"),
    *(f"dataset.teacher_prompt_template={HINT}", f"eval_dataset.teacher_prompt_template={HINT}"),
)
FORWARD = (*TOKENS, "loss._component_=oprd_tune.losses.ForwardKL")
LIVE = "teacher_weights=live"
CASES = {
    "hidden states": Case("tiny/self_distillation", (5e-4, 1e-3, 2e-3)),
    "hidden states, live teacher": Case("tiny/self_distillation", (5e-4, 1e-3, 2e-3), (LIVE,)),
    "full KL": Case("tiny/opd_full", (3e-4, 1e-3, 3e-3), TOKENS),
    "full KL, live teacher": Case("tiny/opd_full", (3e-4, 1e-3, 3e-3), (*TOKENS, LIVE)),
    "forward KL": Case("tiny/opd_full", (3e-4, 1e-3, 3e-3), FORWARD),
}
ROLLOUTS = 16  # steps of 64 responses whose tokens are looked at
TOP = 0.01


def pivots(case: Case, rate: float, seed: int, steps: int) -> list[float]:
    """The share of the gradient's squared norm in the top tokens, before training and after it; none if it diverged."""
    with tempfile.TemporaryDirectory() as folder:
        trained = Path(folder) / "trained"
        if not launch(case, rate, seed, steps, trained, []):
            return []
        return [top_share(prepared(case, student, Path(folder))) for student in ("tiny/hinted", trained / "final")]


def prepared(case: Case, student: str | Path, folder: Path, first: str = "tiny/hinted") -> Any:
    """The case's recipe, set up with a student; its teacher is a frozen model, the `first` student."""
    path = config_files()[case.config]
    module = runpy.run_path(str(recipe_files()[str(recipe_named_in(path))]))
    make = next(item for item in module.values() if inspect.isclass(item) and hasattr(item, "train_step"))
    own = {"student": str(student), "teacher": first, "teacher_weights": "initial", "evaluate_teacher": False}
    given = [word for word in case.overrides if not word.startswith("~")]
    cfg = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(given))
    for section, key in (word[1:].split(".") for word in case.overrides if word.startswith("~")):
        del cfg[section][key]
    recipe = make(OmegaConf.merge(cfg, {**own, "output_dir": tempfile.mkdtemp(dir=folder)}))
    recipe.setup()
    return recipe


def top_share(recipe: Any) -> float:
    """The share of the sum of squared norms that the top tokens of some rollouts carry."""
    recipe.engine.sync_weights(0)
    found = [read(recipe, step) for step in range(ROLLOUTS)]
    square_T = torch.cat([square_T for square_T, _ in found]).sort(descending=True).values
    return (square_T[: math.ceil(TOP * len(square_T))].sum() / square_T.sum()).item()


def read(recipe: Any, step: int) -> tuple[Tensor, dict[str, float]]:
    """‖∂loss/∂states‖² of each response token of a step, over all layers that the loss reads, [T], and the metrics."""
    prompts = recipe.data.prompts.at_step(step)
    rollout = recipe.data.read(recipe.engine.generate(prompts, stream=step), prompts)
    selection, tokens = recipe.select(rollout), recipe.select.tokens(rollout)
    is_composite = isinstance(recipe.loss, Composite)
    final_index_T = [tokens.teacher_index_T] if is_composite else []
    targets = recipe.teachers[0].targets(rollout, selection.teacher_index_T, *final_index_T)
    (teacher,) = recipe.teachers
    if is_composite:
        stream = recipe.loss.stream(targets, tokens, selection, heads=teacher.heads, pairs=teacher.pairs)
    else:
        stream = recipe.loss.stream(teacher.pairs, targets.states, selection)
    leaves, totals = [], []

    @torch.enable_grad()
    def tap(layer: int, state_BSD: Tensor) -> Tensor:
        leaves.append(state_BSD.detach().requires_grad_())
        totals.append(stream(layer, leaves[-1]))
        return state_BSD.new_zeros(())

    with torch.no_grad(), layer_taps(recipe.student.model, stream.layers, tap):
        recipe.student.model(rollout.tokens_BS)
    totals[-1].sum().backward()
    squares = [leaf.grad.float().square().sum(-1).flatten()[tokens.index_T] for leaf in leaves]
    return torch.stack(squares).sum(0), stream.metrics.reduce(recipe.ranks)


def with_pivots(found: dict[str, Any], cases: Mapping[str, Case], seed: int, steps: int) -> str:
    """A table of the top tokens' share, which is also added to the numbers."""
    lines = [
        "",
        "Share of the gradient's squared norm in the top 1 % of response tokens, with the first weights as teacher:",
        "",
        "| objective | before training | after it |",
        "|---|---|---|",
    ]
    for name in sorted(found, key=lambda name: -mean(found[name], "gap_closed")):
        found[name]["pivots"] = pivots(cases[name], found[name]["rate"], seed, steps)
        if found[name]["pivots"]:
            lines.append("| {} | {:.3f} | {:.3f} |".format(name, *found[name]["pivots"]))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    compare(
        CASES,
        name="self_distillation",
        title="# A student that teaches itself with a hint",
        description=__doc__,
        seeds=(1, 2, 3),
        more=with_pivots,
    )

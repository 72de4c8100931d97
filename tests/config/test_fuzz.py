"""Configs with one key turned into nonsense end in a message, or run. `tests/fuzz_configs.py` makes many more."""

import pytest

from tests.fuzz_configs import CONFIGS, Variant, run, variants


@pytest.mark.parametrize("config", CONFIGS)
def test_the_configs_themselves_get_as_far_as_their_weights(config, tmp_path):
    assert run(Variant(config, "log_every_n_steps=1"), tmp_path) == ("accepted", "")


def test_no_single_change_ends_in_a_traceback(tmp_path):
    failed = []
    for number, variant in enumerate(variants(75, seed=20)):
        folder = tmp_path / str(number)
        folder.mkdir()
        outcome, said = run(variant, folder)
        if outcome == "failed":
            failed.append(f"{variant.config} {variant.change}\n{said}")
    assert not failed, "\n\n".join(failed)


# From reports: each trained, or ended in a traceback.
NONSENSE = {
    "output_dir=' '": "output_dir is ' '; give the path of a folder",
    "num_threads=0": "num_threads is 0; it must be a whole number, at least 1",
    "num_threads=99999999": "num_threads is 99999999; it must be a whole number, at most",
    "bridge=${missing}": "Interpolation key 'missing' not found",
    "recipe=${missing}": "Interpolation key 'missing' not found",
    "device=${missing}": "Interpolation key 'missing' not found",
    "recipe=[x]": "recipe is ['x']; give the name of a recipe",
    "rollout.batch_size=x": "rollout.batch_size is 'x'; it must be a whole number or null",
    "rollout.temperature=.inf": "rollout.temperature is inf; it must be a finite number",
    "rollout.temperature=-1": "rollout.temperature is -1; it must be a finite number, 0 or above",
    "model={_component_: torch.nn.Identity}": "model: torch.nn.Identity gives a Identity; it must give torchtune's",
    "checkpointer={_component_: torch.nn.Identity}": "it must give torchtune's FullModelHFCheckpointer",
    "tokenizer={_component_: torch.nn.Identity}": "tokenizer: Identity lacks decode, encode, eos_id",
    "tokenizer={_component_: builtins.print}": "tokenizer: builtins.print gives nothing",
    "dataset._component_=builtins.len": "builtins.len takes no argument dataset.",
    "metric_logger=3": "metric_logger must be a component",
    "metric_logger.log_dir=/proc/nowhere": "metric_logger: oprd_tune.metrics.TensorBoardLogger cannot be constructed",
    "optimizer.betas=[0.9]": "optimizer.betas is [0.9]; it must be a list of 2",
    "optimizer.fused=3": "optimizer.fused is 3; it must be true or false or null",
    "optimizer.lr=.inf": "with these arguments turn a weight of 1",
    "optimizer.lr=false": "optimizer.lr is False; it must be a number",
    "optimizer.lr=.nan": "Invalid learning rate: nan",
    "lr_scheduler.final_ratio=-3": "lr_scheduler.final_ratio is -3; it must lie within 0 and 1",
    "lr_scheduler.warmup_steps=.nan": "lr_scheduler.warmup_steps is nan; it must be a whole number",
    "lr_scheduler.warmup_steps=-1": "lr_scheduler.warmup_steps is -1; it must be a whole number, at least 0",
    "lr_scheduler.num_training_steps=7": "lr_scheduler.num_training_steps is set by the recipe",
    "task_accuracy.seed=-1": "task_accuracy.seed is -1; it must be a whole number within 0 and 2**32 - 1",
    "task_accuracy.grader=builtins.len": "task_accuracy.grader: the grader len takes other arguments",
    "reference_perplexity.tokens_per_micro_batch=0": "reference_perplexity.tokens_per_micro_batch is 0",
    "dataset.count=2.5": "dataset.count is 2.5; it must be a whole number",
    "dataset.count=1e30": "dataset.count is 1e+30; it must be a whole number",
    "dataset.count=2147483648": "dataset.count is 2147483648; it must be a whole number, at most",
    "dataset.teacher_tokenizer=3": "dataset.teacher_tokenizer is 3; it must be a component that gives a Tokenizer",
    "device=meta": "device 'meta' with dtype 'fp32' cannot be used",
    "device=x": "device 'x' with dtype 'fp32' cannot be used",
    "device=cuda:99": "device 'cuda:99' with dtype 'fp32' cannot be used",
    "max_steps=2.5": "max_steps is 2.5; it must be int",
    "samples_per_prompt=1000000000000": "samples_per_prompt is 1000000000000; it must be a whole number, at most",
    "activation_checkpointing=5": "activation_checkpointing is 5, but the student has 4 blocks",
    "activation_checkpointing=-1": "activation_checkpointing is -1; allowed are true, false",
    "clip_grad_norm=.nan": "clip_grad_norm is nan",
    "diagnostics_k=17": "diagnostics_k is 17, but the models share 16 tokens",
    "min_matched_share=.nan": "min_matched_share is nan",
}


@pytest.mark.parametrize("change", NONSENSE)
def test_nonsense_is_told_before_weights_are_read(change, tmp_path):
    outcome, said = run(Variant("tiny/oprd", change), tmp_path)
    assert outcome == "refused"
    assert NONSENSE[change] in said
    assert said.count("\n") == 1

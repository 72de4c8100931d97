"""From a config to settings and parts, with every mistake named."""

from dataclasses import dataclass

import pytest
from omegaconf import OmegaConf

from oprd_tune.config import Component, EvalParts, EvalSettings, OPRDSettings, Parts, resolve
from oprd_tune.config.components import check_offers
from oprd_tune.errors import ConfigError
from oprd_tune.protocols import PromptSource, RolloutEngine
from oprd_tune.registry import config_files, full_name, recipe_files, recipe_named_in
from oprd_tune.rollout import NativeEngine
from oprd_tune.tiny import tokenizer
from tests.conftest import load_config
from tests.rehearsal import with_folders

SETTINGS = {"oprd_distributed": OPRDSettings, "opd_topk_distributed": OPRDSettings}


def parse(cfg, recipe="oprd_distributed"):
    return resolve(cfg, SETTINGS[recipe], recipe=recipe)[0]


def parts_of(cfg, recipe="oprd_distributed"):
    return resolve(cfg, SETTINGS[recipe], recipe=recipe)[1]


def test_returns_typed_values():
    settings = parse(load_config("tiny/oprd", layers="[1,3]", clip_grad_norm=2))
    assert settings.layers == [1, 3]
    assert isinstance(settings.clip_grad_norm, float)
    assert settings.layer_pairs is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"max_step": 5}, "unknown config key 'max_step'; did you mean 'max_steps'"),
        (
            {"loss.normalization": "l2"},
            "no argument loss.normalization .* takes it away.; did you mean 'normalisation'",
        ),
        ({"optimizer._component_": "torch.optim.AdamV"}, "'torch.optim.AdamV' cannot be found"),
        ({"loss": 3}, "loss must be a component"),
        ({"layers": "1"}, r"layers is 1; it must be str or list\[int\]"),
        ({"max_steps": "many"}, "max_steps is 'many'; it must be int"),
        ({"max_steps": "0"}, "max_steps is 0; it must be a whole number, at least 1"),
        ({"max_steps": "true"}, "max_steps is True; it must be int"),
        ({"dtype": "fp16"}, "allowed are bf16 and fp32"),
        ({"truncated_responses": "cut"}, "truncated_responses is 'cut'; allowed are keep, mask and drop"),
        ({"truncated_responses": "null"}, "truncated_responses is None; it must be str"),
        ({"clip_grad_norm": "0"}, "give a positive number, or null"),
        ({"seed": "-1"}, "seed is -1"),
        ({"recipe": "opd_topk_single_device"}, "belongs to opd_topk_single_device, not to oprd_distributed"),
        ({"output_dir": "null"}, "the config lacks output_dir"),
        ({"output_dir": "'${nothing}'"}, "cannot be resolved"),
    ],
)
def test_mistakes_are_explained(overrides, message):
    with pytest.raises(ConfigError, match=message):
        parse(load_config("tiny/oprd", **overrides))


def test_a_config_of_a_torchtune_recipe_is_named(monkeypatch):
    import torchtune

    path = torchtune.__path__[0] + "/../recipes/configs/llama3_2/1B_full_single_device.yaml"
    monkeypatch.setattr("sys.argv", ["recipe", "--config", path])
    with pytest.raises(ConfigError, match="belongs to full_finetune_single_device, not to oprd_distributed"):
        parse(OmegaConf.load(path))


def test_an_optional_component_can_be_switched_off_as_torchtune_writes_it():
    parts = parts_of(load_config("tiny/oprd", **{"task_accuracy._component_": "null"}))
    assert parts.task_accuracy is None
    assert parts.record["task_accuracy"] is None


def test_differences_name_keys_and_values_but_not_what_may_change():
    free = {"max_steps": 9, "metric_logger.log_dir": "there", "teacher_placement": "offloaded", "rollout.batch_size": 2}
    old = parts_of(load_config("tiny/oprd")).record
    assert parts_of(load_config("tiny/oprd", **free)).differences(old, OPRDSettings) == []
    changed = parts_of(load_config("tiny/oprd", **free, **{"optimizer.lr": 3, "rollout.temperature": 0.5, "seed": 1}))
    assert changed.differences(old, OPRDSettings) == [
        "optimizer.lr: 0.006 then, 3 now",
        "rollout.temperature: None then, 0.5 now",
        "seed: 0 then, 1 now",
    ]


def test_a_run_may_resume_under_the_recipes_further_name():
    old = parts_of(load_config("tiny/oprd")).record
    now = parts_of(load_config("tiny/oprd", recipe="oprd_single_device"))
    assert now.differences(old, OPRDSettings) == []


def test_every_component_says_itself_what_may_change():
    bridged = parts_of(load_config("tiny/bridge"))
    assert bridged.bridge.free_on_resume == {
        f"bridge.{name}" for name in ("fit_only", "held_out_prompts", "moments_device")
    }
    assert bridged.rollout.free_on_resume == {"rollout.batch_size"}
    assert bridged.optimizer.free_on_resume == set()


def test_a_recipe_of_ones_own_may_have_more_settings_and_parts():
    @dataclass(frozen=True)
    class MySettings(OPRDSettings):
        sharpness: float = 1.0

    @dataclass(frozen=True)
    class MyParts(Parts):
        second_loss: Component | None = None

    more = {"sharpness": 2, "second_loss._component_": "oprd_tune.losses.HiddenStateMSE"}
    cfg = load_config("tiny/oprd", **more)
    settings, parts = resolve(cfg, MySettings, recipe="oprd_distributed", parts=MyParts)
    assert settings.sharpness == 2.0
    assert type(parts.second_loss()).__name__ == "HiddenStateMSE"
    with pytest.raises(ConfigError, match="unknown config key 'sharpness'"):
        parse(cfg)


def test_what_becomes_of_truncated_responses_stays_as_the_run_began():
    assert parse(load_config("tiny/oprd")).truncated_responses == "keep"
    for policy in ("keep", "mask", "drop"):
        assert parse(load_config("tiny/oprd", truncated_responses=policy)).truncated_responses == policy
    old = parts_of(load_config("tiny/oprd", truncated_responses="mask")).record
    now = parts_of(load_config("tiny/oprd", truncated_responses="drop"))
    assert now.differences(old, OPRDSettings) == ["truncated_responses: 'mask' then, 'drop' now"]


@pytest.mark.parametrize("name", config_files())
def test_every_shipped_config_belongs_to_a_recipe_and_is_well_formed(name, tmp_path):
    from torchtune import config

    path = config_files()[name]
    assert recipe_named_in(path) in recipe_files()
    cfg = OmegaConf.load(path)
    config.validate(cfg)
    if cfg.recipe == "math_eval":
        resolve(cfg, EvalSettings, recipe="math_eval", parts=EvalParts)
    else:
        parse(with_folders(cfg, tmp_path), full_name(cfg.recipe))


def test_what_the_recipe_sets_may_not_stand_in_the_config():
    with pytest.raises(ConfigError, match="dataset.split is set by the recipe; leave it out of dataset"):
        parts_of(load_config("tiny/oprd")).dataset(None, split="train")


def test_what_an_object_lacks_of_its_protocol_is_named():
    class Half:
        temperature = 1.0

        def generate(self, prompts, *, stream=0):
            return None

    with pytest.raises(ConfigError, match="rollout: Half lacks check, close, free_on_resume, memory_bytes, samples"):
        check_offers("rollout", Half(), RolloutEngine)
    check_offers("rollout", NativeEngine(), RolloutEngine)
    check_offers("dataset", parts_of(load_config("tiny/oprd")).dataset(tokenizer()), PromptSource)


def test_components_within_components_are_constructed():
    cfg = load_config("tiny/oprd_plus_opd", **{"loss.parts.oprd.coefficient": 3})
    loss = parts_of(cfg, "opd_topk_distributed").loss()
    assert [type(part).__name__ for part in loss.parts.values()] == ["FullReverseKL", "HiddenStateMSE"]
    assert loss.hidden.coefficient == 3

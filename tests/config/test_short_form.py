"""What a model's name stands for, and what the config's own sections change about it."""

import json
import shutil

import pytest

from oprd_tune.config.short_form import expand, shortened
from oprd_tune.errors import ConfigError
from oprd_tune.modeling.folders import find_folder
from oprd_tune.registry import config_files
from oprd_tune.torchtune_compat import component_at
from tests.conftest import load_config
from tests.teacher.transformers_models import save_model

FOLDERS = {name: str(find_folder("x", f"tiny/{name}")) for name in ("student", "teacher", "teens_teacher")}
TINY = {"output_dir": "out", "student": "tiny/student", "teacher": "tiny/teacher"}
OWN = {"_component_": "my.own"}


def test_two_names_give_models_weights_tokenizer_engine_and_logger():
    assert expand(TINY) == {
        "output_dir": "out",
        "model": {"_component_": "oprd_tune.modeling.decoder", "path": FOLDERS["student"]},
        "checkpointer": {
            "_component_": "oprd_tune.modeling.hugging_face_checkpointer",
            "checkpoint_dir": FOLDERS["student"],
        },
        "teacher_model": {"_component_": "oprd_tune.modeling.decoder", "path": FOLDERS["teacher"]},
        "teacher_checkpointer": {
            "_component_": "oprd_tune.modeling.hugging_face_checkpointer",
            "checkpoint_dir": FOLDERS["teacher"],
        },
        "tokenizer": {"_component_": "oprd_tune.data.HuggingFaceTokenizer", "path": FOLDERS["teacher"]},
        "rollout": {"_component_": "oprd_tune.rollout.NativeEngine"},
        "metric_logger": {"_component_": "oprd_tune.metrics.TensorBoardLogger", "log_dir": "out/tensorboard"},
    }


def test_models_with_other_tokens_get_a_tokenizer_each():
    found = expand(TINY | {"teacher": "tiny/teens_teacher"})
    assert found["tokenizer"]["path"] == FOLDERS["student"]
    assert found["teacher_tokenizer"]["path"] == FOLDERS["teens_teacher"]
    assert "teacher_tokenizer" not in expand(TINY | {"teacher": "tiny/teens_teacher", "tokenizer": OWN})


def test_a_tokenizer_section_adds_to_the_folders_that_the_names_imply():
    extra = {"tokenizer": {"chat_template_kwargs": {"enable_thinking": False}}}
    found = expand(TINY | extra)["tokenizer"]
    assert found["path"] == FOLDERS["teacher"]
    assert found["chat_template_kwargs"] == {"enable_thinking": False}
    found = expand(TINY | extra | {"teacher": "tiny/teens_teacher"})
    assert (found["tokenizer"]["path"], found["teacher_tokenizer"]["path"]) == (
        FOLDERS["student"],
        FOLDERS["teens_teacher"],
    )


def test_the_only_chat_template_counts(tmp_path):
    folders = {name: shutil.copytree(FOLDERS[name], tmp_path / name) for name in ("student", "teacher")}
    names = {name: str(folder) for name, folder in folders.items()}
    assert expand(TINY | names)["tokenizer"]["path"] == names["teacher"]
    (folders["student"] / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert expand(TINY | names)["tokenizer"]["path"] == names["student"]
    (folders["teacher"] / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert expand(TINY | names)["tokenizer"]["path"] == names["teacher"]


def test_sections_of_the_configs_own_take_the_place_of_implied_ones_or_add_to_them():
    found = expand(TINY | {"model": {"max_seq_len": 64}, "checkpointer": OWN, "rollout": {"batch_size": 2}})
    assert found["model"] == {
        "_component_": "oprd_tune.modeling.decoder",
        "path": FOLDERS["student"],
        "max_seq_len": 64,
    }
    assert found["checkpointer"] == OWN
    assert found["rollout"] == {"_component_": "oprd_tune.rollout.NativeEngine", "batch_size": 2}
    assert expand(TINY | {"tokenizer": "tiny/student"})["tokenizer"]["path"] == FOLDERS["student"]
    found = expand(TINY | {"dataset": {"source": "x"}, "optimizer": {"lr": 1}, "bridge": None, "eval_dataset": OWN})
    assert found["dataset"]["_component_"] == "oprd_tune.data.prompt_dataset"
    assert found["optimizer"]["_component_"] == "torch.optim.AdamW"
    assert found["bridge"] is None
    assert found["eval_dataset"] == OWN


def test_an_engine_may_be_a_word_in_place_of_a_path():
    word = {"auto": "auto", "native": "NativeEngine", "colocated": "VLLMColocated", "server": "VLLMServer"}
    for short, name in word.items():
        full = {"_component_": f"oprd_tune.rollout.{name}"}
        assert expand(TINY | {"rollout": short})["rollout"] == full
        assert expand(TINY | {"rollout": full | {"temperature": 0.5}})["rollout"] == full | {"temperature": 0.5}
        assert expand(TINY | {"rollout": {"_component_": short, "x": 1}})["rollout"] == full | {"x": 1}
        assert component_at(full["_component_"])
    assert expand(TINY | {"rollout": "my.Engine"})["rollout"] == {"_component_": "my.Engine"}
    given = {"models": {"me": "x"}, "benchmarks": {}, "profile": "paper", "rollout": "auto"}
    assert expand(given)["rollout"] == {"temperature": 0.7, "_component_": "oprd_tune.rollout.auto"}


def test_a_logger_gets_a_folder_if_it_takes_one():
    disk, out = "torchtune.training.metric_logging.DiskLogger", "torchtune.training.metric_logging.StdoutLogger"
    assert expand(TINY | {"metric_logger": {"_component_": disk}})["metric_logger"]["log_dir"] == "out/tensorboard"
    own = {"_component_": disk, "log_dir": "there"}
    assert expand(TINY | {"metric_logger": own})["metric_logger"] == own
    assert expand(TINY | {"metric_logger": {"_component_": out}})["metric_logger"] == {"_component_": out}


def test_benchmarks_are_names_or_sections():
    found = expand({"benchmarks": ["aime24", "math500"]})["benchmarks"]
    assert found["math500"] == {"_component_": "oprd_tune.data.prompt_dataset", "benchmark": "math500"}
    assert list(found) == ["aime24", "math500"]
    found = expand({"benchmarks": {"mine": {"source": "x.jsonl"}, "own": OWN}})["benchmarks"]
    assert found == {"mine": {"_component_": "oprd_tune.data.prompt_dataset", "source": "x.jsonl"}, "own": OWN}


def test_a_profile_fills_in_what_an_evaluation_leaves_out():
    mine = {"mine": {"source": "x.jsonl"}, "own": OWN, "told": {"source": "x", "instruction": "none"}}
    given = {"models": {"me": "x"}, "benchmarks": mine, "profile": "paper"}
    found = expand(given)
    assert found["samples_per_problem"] == 16
    assert found["rollout"] == {"_component_": "oprd_tune.rollout.NativeEngine", "temperature": 0.7}
    assert found["benchmarks"]["mine"]["instruction"] == "boxed"
    assert (found["benchmarks"]["own"], found["benchmarks"]["told"]["instruction"]) == (OWN, "none")
    assert "instruction" not in expand({**given, "benchmarks": ["aime24"]})["benchmarks"]["aime24"]  # has its own
    found = expand({**given, "profile": "greedy", "samples_per_problem": 4, "rollout": {"batch_size": 2}})
    assert (found["samples_per_problem"], found["rollout"]["temperature"]) == (4, 0.0)
    assert found["rollout"]["batch_size"] == 2
    assert "instruction" not in found["benchmarks"]["mine"]
    assert expand({**given, "rollout": {"temperature": 1.0}})["rollout"]["temperature"] == 1.0
    found = expand({"eval": {"benchmarks": ["math500"], "profile": "greedy", "samples_per_problem": 2}})["eval"]
    assert (found["temperature"], found["samples_per_problem"]) == (0.0, 2)
    with pytest.raises(ConfigError, match="profile is 'papers'; allowed are paper, greedy"):
        expand({**given, "profile": "papers"})


def test_a_model_of_an_evaluation_cannot_be_null():
    for nothing in (None, {"_component_": None}):  # what torchtune makes of `models.base=null`
        with pytest.raises(ConfigError, match="models.base is null; '~models.base' takes a model away"):
            expand({"models": {"me": "x", "base": nothing}})


def test_lora_adds_adapters_to_the_student():
    assert expand(TINY | {"lora": {"rank": 4}})["model"]["lora"] == {"rank": 4}
    with pytest.raises(ConfigError, match="lora adds adapters to `student`"):
        expand(TINY | {"model": OWN, "lora": {"rank": 4}})


def test_a_teacher_that_torchtune_cannot_be_is_loaded_by_transformers(tmp_path):
    """By its architecture, by a number that no builder takes, or because it is quantised."""
    for name in ("gemma3", "mistral"):  # this mistral has a sliding window
        save_model(tmp_path / name, name)
        found = expand({"teacher": str(tmp_path / name)})
        assert found["teacher_model"] == {
            "_component_": "oprd_tune.teacher.transformers_teacher",
            "path": str(tmp_path / name),
        }
        assert found["teacher_checkpointer"]["_component_"] == "oprd_tune.teacher.transformers_files"
    save_model(tmp_path / "llama", "llama")
    llama = {"teacher": str(tmp_path / "llama")}
    assert expand(llama)["teacher_model"]["_component_"] == "oprd_tune.modeling.decoder"
    path = tmp_path / "llama" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "awq"}}))
    assert expand(llama)["teacher_model"]["_component_"] == "oprd_tune.teacher.transformers_teacher"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": 3}, "student is 3; give a model folder or a hub name"),
        ({"teacher": "./nowhere"}, "teacher: there is no folder ./nowhere"),
        ({"model": OWN, "checkpointer": OWN}, "student has no effect beside model and checkpointer; leave it out"),
        ({"teacher_tokenizer": "some/body"}, "teacher_tokenizer: some/body is neither"),
    ],
)
def test_mistakes_are_explained(changes, message):
    with pytest.raises(ConfigError, match=message):
        expand(TINY | changes)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_tokens_that_cannot_be_compared_are_an_error_unless_a_tokenizer_is_named(side, tmp_path):
    folder = shutil.copytree(FOLDERS[side], tmp_path / side)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=f"{folder} has no tokenizer.json, so nobody can tell"):
        expand(TINY | {side: str(folder)})
    assert expand(TINY | {side: str(folder), "tokenizer": "tiny/student"})["tokenizer"]["path"] == FOLDERS["student"]


def test_what_is_missing_is_asked_for_by_the_models_names():
    missing = ["model", "checkpointer", "teacher_model", "teacher_checkpointer", "tokenizer", "loss"]
    assert shortened(missing) == ["teacher", "student", "loss"]
    assert shortened(["tokenizer", "teacher_model"]) == ["tokenizer", "teacher_model"]


@pytest.mark.parametrize("name", config_files())
def test_configs_for_gpus_take_vllm_where_it_works_and_those_for_a_laptop_the_student(name):
    on_laptop = name.startswith(("tiny/", "smollm2"))
    assert (load_config(name).get("rollout") == "auto") != on_laptop


@pytest.mark.parametrize("name", config_files())
def test_shipped_configs_are_short(name):
    cfg = load_config(name)
    assert not {"model", "checkpointer", "teacher_model", "teacher_checkpointer"} & cfg.keys()

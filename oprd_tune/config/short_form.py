"""The short form of a config: names of models in place of the sections that follow from them, and usual components."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oprd_tune.config.components import takes
from oprd_tune.config.profiles import with_profile
from oprd_tune.config.several_teachers import expand_teachers
from oprd_tune.data.tokenizer_files import conventions
from oprd_tune.data.vocabularies import share_tokens
from oprd_tune.errors import ConfigError
from oprd_tune.modeling.folders import find_folder, hub_name
from oprd_tune.modeling.from_folder import can_build

NAMES = ("student", "teacher", "lora")
_TOKENIZER = "oprd_tune.data.HuggingFaceTokenizer"
# A builder and a checkpointer. transformers loads the teachers that torchtune's modules cannot be.
_TORCHTUNE = ("oprd_tune.modeling.decoder", "oprd_tune.modeling.hugging_face_checkpointer")
_TRANSFORMERS = ("oprd_tune.teacher.transformers_teacher", "oprd_tune.teacher.transformers_files")
# What a section without a `_component_` gets.
_USUAL = {
    "dataset": "oprd_tune.data.prompt_dataset",
    "eval_dataset": "oprd_tune.data.prompt_dataset",
    "rollout": "oprd_tune.rollout.NativeEngine",
    "bridge": "oprd_tune.modeling.BridgePlan",
    "optimizer": "torch.optim.AdamW",
    "lr_scheduler": "oprd_tune.training.cosine_with_warmup",
    "task_accuracy": "oprd_tune.evaluation.TaskAccuracy",
    "reference_perplexity": "oprd_tune.evaluation.ReferencePerplexity",
    "metric_logger": "oprd_tune.metrics.TensorBoardLogger",  # also where there is no such section
    "tokenizer": _TOKENIZER,
    "teacher_tokenizer": _TOKENIZER,
}
# Engines by a word: `rollout: auto`.
_ENGINES = {
    "auto": "oprd_tune.rollout.auto",
    "native": "oprd_tune.rollout.NativeEngine",
    "colocated": "oprd_tune.rollout.VLLMColocated",
    "server": "oprd_tune.rollout.VLLMServer",
}
Values = dict[str, Any]


def expand(values: Mapping[str, Any]) -> Values:
    """Write a config's short form out, so that each section names its component.

    `student` and `teacher` imply sections. A section that the config has itself takes the place of an implied one if it
    has a `_component_`, and adds to it if it has none. Any other section without a `_component_` gets the usual one. An
    engine may be a word. A logger that takes a `log_dir` gets one in the run's folder. Each of several `teachers` is
    expanded as if it were the only one.

    Args:
        values: the config's content as plain values.

    Raises:
        ConfigError: if a model cannot be found or used, or if a name has no effect.
    """
    found = {key: _without_empty_component(value) for key, value in values.items()}
    if found.get("teachers") is not None:
        if not isinstance(found["teachers"], Mapping) or not found["teachers"]:
            raise ConfigError(f"teachers is {found['teachers']!r}; give names, each with a teacher")
        return expand_teachers(found, expand)
    student, teacher, lora = (found.pop(name, None) for name in NAMES)
    logger = {} if found.get("metric_logger") is None else found["metric_logger"]
    if isinstance(logger, Mapping):
        logger = {"_component_": _USUAL["metric_logger"], **logger}
        if takes(str(logger["_component_"]), "log_dir"):
            folder = "wandb" if str(logger["_component_"]).endswith("WandBLogger") else "tensorboard"
            logger = {"log_dir": f"{found.get('output_dir')}/{folder}", **logger}
        found["metric_logger"] = logger
    if "rollout" in found:
        found["rollout"] = _engine(found["rollout"])
    implied: dict[str, Values] = {"rollout": {}}
    for key, prefix, name in (("student", "", student), ("teacher", "teacher_", teacher)):
        if name is None:
            continue
        if all(_is_whole(found.get(prefix + part)) for part in ("model", "checkpointer")):
            raise ConfigError(
                f"{key} has no effect beside {prefix}model and {prefix}checkpointer; leave it out, or say {key}=null"
            )
        is_student = key == "teacher" and name == "student"
        implied |= _student_as_teacher(implied, found) if is_student else _model_sections(key, prefix, name)
    if "tokenizer" not in found or (isinstance(found["tokenizer"], Mapping) and not _is_whole(found["tokenizer"])):
        implied |= _tokenizer_sections(implied)
    if lora is not None:
        if "model" not in implied or _is_whole(found.get("model")):
            raise ConfigError("lora adds adapters to `student`; the builder in `model` takes lora_rank, lora_alpha, …")
        implied["model"]["lora"] = lora
    for name in ("tokenizer", "teacher_tokenizer"):
        if isinstance(found.get(name), str):
            found[name] = {"path": str(find_folder(name, found[name]))}
    if "benchmarks" in found:
        found["benchmarks"] = _benchmarks(found["benchmarks"])
    if isinstance(models := found.get("models"), Mapping):
        _check_present(models)
        found = with_profile("profile", found, temperature_in="rollout")
    if isinstance(section := found.get("eval"), Mapping):
        found["eval"] = with_profile("eval.profile", {**section, "benchmarks": _benchmarks(section.get("benchmarks"))})
    for name in dict.fromkeys((*implied, *_USUAL)):
        section = found.get(name, {} if name in implied else None)
        if isinstance(section, Mapping) and not _is_whole(section):
            found[name] = {"_component_": _USUAL.get(name), **implied.get(name, {}), **section}
    return found


def _engine(given: object) -> object:
    """The section of an engine, which may be a word or have one in place of a dotted path."""
    section = {"_component_": given} if isinstance(given, str) else given
    if not isinstance(section, Mapping) or not _is_whole(section):
        return section
    path = section["_component_"]
    return {**section, "_component_": _ENGINES.get(str(path), path)}


def _benchmarks(given: object) -> object:
    """Benchmarks by name, from a list of names or from sections."""
    if isinstance(given, list):
        given = {str(name): {"benchmark": name} for name in given}
    if not isinstance(given, Mapping):
        return given
    found: Values = {}
    for name, section in given.items():
        is_short = isinstance(section, Mapping) and not _is_whole(section)
        found[str(name)] = {"_component_": _USUAL["dataset"], **section} if is_short else section
    return found


def shortened(missing: Sequence[str]) -> list[str]:
    """What to ask a user for who has not given these sections: a model's name stands for several."""
    found = list(missing)
    for name, prefix in (("student", ""), ("teacher", "teacher_")):
        sections = [f"{prefix}model", f"{prefix}checkpointer"]
        if set(sections) <= set(found):
            implied = {*sections, "tokenizer"} if name == "student" else set(sections)
            found = [name, *(section for section in found if section not in implied)]
    return found


def _model_sections(key: str, prefix: str, name: object) -> dict[str, Values]:
    """The sections that a model's name stands for."""
    if not isinstance(name, str):
        raise ConfigError(f"{key} is {name!r}; give a model folder or a hub name")
    folder = find_folder(key, name)
    loader = _TRANSFORMERS if key == "teacher" and not can_build(folder) else _TORCHTUNE
    files = {"checkpoint_dir": str(folder)} | ({} if hub_name(name) is None else {"hub_name": name})
    return {
        f"{prefix}model": {"_component_": loader[0], "path": str(folder)},
        f"{prefix}checkpointer": {"_component_": loader[1], **files},
    }


def _student_as_teacher(implied: Mapping[str, Values], given: Mapping[str, Any]) -> dict[str, Values]:
    """The sections of a teacher that is the student: the same model and files."""
    sections = {name: {**implied.get(name, {}), **(given.get(name) or {})} for name in ("model", "checkpointer")}
    if not all(map(_is_whole, sections.values())):
        raise ConfigError("teacher is the student, but there is no `student`; name a model folder there")
    return {f"teacher_{name}": section for name, section in sections.items()}


def _tokenizer_sections(implied: Mapping[str, Values]) -> dict[str, Values]:
    """The tokenizer of both models, or one of each if they read texts in different tokens.

    Models that share their tokens share the teacher's chat template and stop tokens, with which it was trained. If only
    the student's folder has a chat template, then that one counts.
    """
    student, teacher = (implied.get(f"{prefix}model", {}).get("path") for prefix in ("", "teacher_"))
    if student is None:
        return {}
    if teacher is None:
        return {"tokenizer": {"path": student}}
    if not share_tokens(Path(student), Path(teacher)):
        return {"tokenizer": {"path": student}, "teacher_tokenizer": {"path": teacher}}
    has_template = [(conventions(Path(folder)) or {}).get("chat template") is not None for folder in (student, teacher)]
    return {"tokenizer": {"path": student if has_template == [True, False] else teacher}}


def _check_present(models: Mapping[str, Any]) -> None:
    """Raise ConfigError if a model of an evaluation is null, which does not take it away."""
    for name, model in models.items():
        if _without_empty_component(model) is None:
            raise ConfigError(f"models.{name} is null; '~models.{name}' takes a model away that the config has")


def _without_empty_component(section: object) -> Any:
    """None for a section that the command line takes away: torchtune reads `bridge=null` as an empty component."""
    return None if isinstance(section, Mapping) and section.get("_component_", "") is None else section


def _is_whole(section: object) -> bool:
    return isinstance(section, Mapping) and "_component_" in section

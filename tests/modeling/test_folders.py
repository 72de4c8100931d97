"""Where models are found, which files count, and what is said about folders that cannot be used."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from oprd_tune.errors import ConfigError
from oprd_tune.modeling import folders, hugging_face_checkpointer
from oprd_tune.modeling.folders import find_folder, hub_name, weight_files
from tests.modeling.test_families import TOKENS, load, write_reference


@pytest.fixture
def folder(tmp_path):
    write_reference(tmp_path / "model", "Llama 3.2")
    return tmp_path / "model"


def test_a_folder_is_itself(folder, monkeypatch):
    assert find_folder("student", str(folder)) == folder
    monkeypatch.chdir(folder.parent.parent)
    name = f"{folder.parent.name}/model"  # looks like a hub name, but lies here
    assert find_folder("student", name) == Path(name)
    assert hub_name(name) is None


def test_a_hub_name_is_found_where_tune_download_puts_it(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(folders, "DOWNLOADS", tmp_path)
    assert find_folder("student", "someone/model") == folder
    assert hub_name("someone/model") == "someone/model"


def test_a_hub_name_is_found_in_the_hubs_cache(folder, monkeypatch, tmp_path):
    import huggingface_hub.constants

    cache = tmp_path / "hub" / "models--some--one"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    shutil.copytree(folder, cache / "snapshots" / "abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert find_folder("student", "some/one") == cache / "snapshots" / "abc"


def test_what_is_not_there_is_said_with_the_command_that_fetches_it():
    with pytest.raises(ConfigError, match="teacher: some/nobody is neither .*`tune download some/nobody`"):
        find_folder("teacher", "some/nobody")
    with pytest.raises(ConfigError, match="student: there is no folder ./nowhere"):
        find_folder("student", "./nowhere")


def test_embedded_models_have_names():
    assert (find_folder("student", "tiny/student") / "config.json").is_file()
    assert hub_name("tiny/student") is None
    with pytest.raises(ConfigError, match="student: there is no embedded model tiny/nobody"):
        find_folder("student", "tiny/nobody")


def split(folder, listed):
    """The weights in two files, with an index that lists other names."""
    weights = load_file(file := folder / "model.safetensors")
    file.unlink()
    names = sorted(weights)
    for i in range(2):
        part = {name: weights[name] for name in names[i::2]}
        save_file(part, folder / f"model-0000{i + 1}-of-00002.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: listed[i % 2] for i, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@torch.no_grad()
def test_a_stale_index_does_no_harm(folder):
    wanted = load(folder)(TOKENS)
    split(folder, ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"])
    assert weight_files(folder, "") == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert torch.equal(load(folder)(TOKENS), wanted)


def test_missing_files_are_named(folder):
    split(folder, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ConfigError, match="lacks model-00002-of-00002.safetensors; `tune download me/it "):
        hugging_face_checkpointer(str(folder), str(folder.parent / "out"), hub_name="me/it")


def refused(folder):
    with pytest.raises(ConfigError) as error:
        hugging_face_checkpointer(str(folder), str(folder.parent / "out"))
    return str(error.value)


def test_pickles_are_refused_with_the_conversion(folder):
    weights = load_file(file := folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    file.unlink()
    told = refused(folder)
    assert "has its weights as pickles" in told
    code = told.partition('python -c "')[2].rpartition('"')[0]
    exec(code)  # as a user would run it
    assert (folder / "model.safetensors").is_file()
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(folder).lm_head.weight, weights["model.embed_tokens.weight"]
    )


@pytest.mark.parametrize("method", ["awq", "gptq", "fp8"])
def test_quantised_weights_are_named(method, folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": method}}))
    assert f"the weights are quantised ({method}). A student trains in full precision" in refused(folder)


def test_a_peft_folder_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "Qwen/Qwen3-4B"}))
    assert "holds a PEFT adapter of Qwen/Qwen3-4B, not a model. Merge it" in refused(tmp_path)


def test_a_damaged_config_is_named(folder):
    (folder / "config.json").write_text('{"model_type": ')
    assert "config.json is damaged" in refused(folder)

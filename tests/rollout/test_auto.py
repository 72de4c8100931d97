"""Which engine a run takes, and what its arguments may be."""

import sys

import pytest
import torch

from oprd_tune.config import OPRDSettings, resolve
from oprd_tune.errors import ConfigError
from oprd_tune.ranks import Ranks
from oprd_tune.rollout import choose_engine
from oprd_tune.rollout.auto import AUTO
from oprd_tune.rollout.vllm.requests import find_vllm
from tests.conftest import load_config

CPU = torch.device("cpu")


def auto_parts(**rollout):
    cfg = load_config("tiny/oprd")
    cfg.rollout = {"_component_": AUTO, "temperature": 0.7, **rollout}
    return resolve(cfg, OPRDSettings, recipe="oprd_distributed")[1]


def checked(parts, saved=None):
    """What a recipe does with its engine before anything is loaded."""
    parts = choose_engine(parts, saved, CPU, Ranks())
    parts.rollout().check(CPU, Ranks())
    return parts


@pytest.fixture
def vllm_works(monkeypatch):
    """Says whether vLLM can be imported."""

    def say(works):
        def import_vllm(device):
            if not works:
                raise ConfigError("rollout: vLLM cannot be imported; install it")

        for module in ("auto", "vllm.colocated"):
            monkeypatch.setattr(sys.modules[f"oprd_tune.rollout.{module}"], "import_vllm", import_vllm)

    return say


@pytest.mark.parametrize(
    ("works", "engine", "why"),
    [(True, "VLLMColocated", "vLLM works here"), (False, "NativeEngine", "vLLM cannot be imported; install it")],
)
def test_auto_gives_way_to_the_best_engine_that_works(works, engine, why, vllm_works, capsys):
    vllm_works(works)
    parts = checked(auto_parts())
    assert parts.record["rollout"] == {"_component_": f"oprd_tune.rollout.{engine}", "temperature": 0.7}
    assert capsys.readouterr().out == f"rollout: {engine}, since {why}\n"
    assert (type(parts.rollout()).__name__, parts.rollout().temperature) == (engine, 0.7)


def test_without_vllm_one_line_says_so_and_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert checked(auto_parts(_component_="auto")).rollout.path == "oprd_tune.rollout.NativeEngine"
    said = capsys.readouterr().out
    assert said.startswith("rollout: NativeEngine, since vLLM cannot be imported (")
    assert "; `pip install 'oprd-tune[vllm]'` installs it for CUDA" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("engine", ["NativeEngine", "VLLMColocated"])
def test_a_resumed_run_keeps_its_engine_whatever_works_now(engine, vllm_works, capsys):
    vllm_works(engine == "NativeEngine")
    saved = f"oprd_tune.rollout.{engine}"
    if engine == "NativeEngine":
        parts = checked(auto_parts(), saved)
        assert parts.record["rollout"]["_component_"] == saved
    else:
        with pytest.raises(ConfigError, match="vLLM cannot be imported"):
            checked(auto_parts(), saved)
    assert capsys.readouterr().out == f"rollout: {engine}, as before\n"


def test_an_engine_that_is_named_stays_and_has_to_work(vllm_works, capsys):
    vllm_works(False)
    assert checked(auto_parts(_component_="oprd_tune.rollout.NativeEngine")).rollout.path.endswith("NativeEngine")
    with pytest.raises(ConfigError, match="vLLM cannot be imported"):
        checked(auto_parts(_component_="oprd_tune.rollout.VLLMColocated"))
    assert capsys.readouterr().out == ""
    with pytest.raises(ConfigError, match="oprd_tune.rollout.auto is no engine itself"):
        auto_parts().rollout()


@pytest.mark.parametrize("missing", [("torchvision",), ("flashinfer",), ("torchvision", "flashinfer")])
def test_what_vllm_imports_late_on_a_gpu_is_asked_for_early(missing, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in missing else name)
    find_vllm(CPU)
    packages = " and ".join("flashinfer-python" if name == "flashinfer" else name for name in missing)
    with pytest.raises(ConfigError, match=f"on CUDA vLLM needs {packages} too, .*; `pip install 'oprd-tune"):
        find_vllm(torch.device("cuda"))


BAD_ENGINE_ARGUMENTS = [
    (
        "VLLMColocated",
        "tensor_parallel_size",
        0,
        "rollout.tensor_parallel_size is 0; it must be a whole number, at least 1",
    ),
    ("VLLMColocated", "tensor_parallel_size", 2, "it must divide the number of processes, 1"),
    ("VLLMColocated", "kv_cache_gib", "abc", "rollout.kv_cache_gib is 'abc'; it must be a number or null"),
    ("VLLMColocated", "max_num_seqs", -4, "rollout.max_num_seqs is -4"),
    ("VLLMColocated", "gpu_memory_utilization", 1.5, "it must be at most 1"),
    ("VLLMColocated", "temperature", -1, "rollout.temperature is -1"),
    ("VLLMServer", "requests_in_flight", 0, "rollout.requests_in_flight is 0; it must be a whole number, at least 1"),
    ("VLLMServer", "timeout", -1, "rollout.timeout is -1; it must be a finite number above 0"),
    ("VLLMServer", "checksum_every_n_syncs", -1, "it must be a whole number, at least 0"),
    ("VLLMServer", "addresses", "http://127.0.0.1:9", "it must be a list, each a text or null"),
    ("VLLMServer", "addresses", [], r"rollout.addresses is \[\]"),
    ("VLLMServer", "addresses", ["host:8000"], r"rollout.addresses is \['host:8000'\]"),
    ("VLLMServer", "transfer", "nccl", "rollout.transfer is 'nccl'; allowed here: folder"),
]


@pytest.mark.parametrize(("engine", "name", "value", "message"), BAD_ENGINE_ARGUMENTS)
def test_an_engines_wrong_arguments_are_found_before_anything_is_loaded(engine, name, value, message, vllm_works):
    vllm_works(True)
    rest = {} if name == "addresses" or engine != "VLLMServer" else {"addresses": ["http://127.0.0.1:9"]}
    with pytest.raises(ConfigError, match=message):
        checked(auto_parts(_component_=f"oprd_tune.rollout.{engine}", **{**rest, name: value}))


def test_a_server_of_ones_own_needs_vllm(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    parts = auto_parts(_component_="oprd_tune.rollout.VLLMServer")
    with pytest.raises(ConfigError, match="vLLM is not installed; `pip install 'oprd-tune"):
        checked(parts)

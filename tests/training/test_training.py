import itertools
import json
import math
import os
import signal
import sys
from concurrent.futures import Future

import pytest
import torch
from omegaconf import OmegaConf
from oprd_tune.training.engine import settle_engine
from torch import nn

from oprd_tune.config.components import Components
from oprd_tune.data import PromptDataset
from oprd_tune.data.prompts import in_memory
from oprd_tune.errors import CheckpointError, ConfigError, RolloutError
from oprd_tune.metrics.history import History
from oprd_tune.ranks import Ranks
from oprd_tune.rollout import NativeEngine
from oprd_tune.rollout.auto import AUTO
from oprd_tune.run.export import export_checkpoint
from oprd_tune.run.folder import RunFolder, load_checkpoint
from oprd_tune.run.launch import StopSignals, run_recipe
from oprd_tune.run.summary import as_table, summarise, write_summary
from oprd_tune.tiny import tokenizer
from oprd_tune.training import ReferencePerplexity, TaskAccuracy, constant_with_warmup, cosine_with_warmup
from oprd_tune.training.gradients import FiniteGuard, backward, clip_gradients
from oprd_tune.training.schedules import restore_schedule
from oprd_tune.training.student import TiedHeadDrift, freeze
from tests.conftest import SMALL, assert_same_student, load_config, make_model, recipe_class

CPU = torch.device("cpu")
CFG = OmegaConf.create({"seed": 0, "max_steps": 3, "output_dir": "there"})


def rates(make_schedule, steps, **kwargs):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make_schedule(optimizer, num_training_steps=steps, **kwargs)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_schedules_learn_from_the_first_step():
    assert rates(constant_with_warmup, 5, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates(constant_with_warmup, 2) == [1.0, 1.0]
    cosine = rates(cosine_with_warmup, 12, warmup_steps=2, final_ratio=0.1)
    assert cosine[:3] == [0.5, 1.0, 1.0]
    assert math.isclose(cosine[7], 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert all(a >= b for a, b in itertools.pairwise(cosine[1:]))


def test_a_longer_schedule_applies_from_the_first_resumed_step():
    def schedule(steps):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        return optimizer, cosine_with_warmup(optimizer, num_training_steps=steps)

    optimizer, short = schedule(4)
    for _ in range(4):
        optimizer.step()
        short.step()
    saved = optimizer.state_dict()
    optimizer, longer = schedule(8)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0
    restore_schedule(longer, short.state_dict())
    assert math.isclose(optimizer.param_groups[0]["lr"], 0.5)


def test_microbatches_of_any_size_give_the_gradient_of_the_global_mean():
    x = torch.randn(7, 3, dtype=torch.float64)
    gradients = []
    for sizes in ([7], [1, 6], [3, 3, 1]):
        weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
        for part in x.split(sizes):
            backward((part @ weight).square().sum(), 7)
        gradients.append(weight.grad)
    for gradient in gradients:
        torch.testing.assert_close(gradient, (2 * (x @ torch.ones(3).double())[:, None] * x).mean(0))


def test_world_size_undoes_the_average_over_ranks():
    weight = nn.Parameter(torch.ones(1))
    backward(3 * weight.sum(), 6, world_size=4)
    assert weight.grad.item() == 3 * 4 / 6


def test_clipping_returns_the_norm_before():
    for max_norm, after in ((1.0, 1.0), (None, 5.0), (10.0, 5.0)):
        weight = nn.Parameter(torch.zeros(2))
        weight.grad = torch.tensor([3.0, 4.0])
        assert clip_gradients([weight], max_norm) == 5.0
        assert math.isclose(weight.grad.norm().item(), after, rel_tol=1e-5)


def test_steps_that_are_not_finite_are_refused_and_stop_the_run_when_they_repeat():
    guard = FiniteGuard(2)
    assert guard.allows(1, loss=1.0, grad_norm=1.0)
    assert not guard.allows(2, loss=math.nan, grad_norm=1.0)
    assert guard.allows(3, loss=1.0, grad_norm=1.0)
    assert not guard.allows(4, loss=1.0, grad_norm=math.inf)
    with pytest.raises(FloatingPointError, match="step 5: .*Lower the learning rate"):
        guard.allows(5, loss=math.nan, grad_norm=1.0)


@pytest.mark.parametrize("tied", [True, False])
def test_only_what_the_loss_reaches_is_trained(tied):
    model = make_model(tied=tied)
    message = freeze(model, top=2, trains_head=False, freeze_embedding=True)
    trained = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"0", "1"}
    assert "blocks above layer 2" in message
    assert ("the LM head" in message) == (not tied)
    model = make_model(tied=tied)
    assert freeze(model, top=3, trains_head=True, freeze_embedding=False) == ""
    assert all(p.requires_grad for p in model.parameters())


def test_drift_of_a_tied_head_is_relative_and_survives_a_checkpoint():
    model = make_model()
    drift = TiedHeadDrift(model)
    assert drift.measure(model) == 0
    with torch.no_grad():
        model.tok_embeddings.weight.mul_(1.25)
    assert math.isclose(drift.measure(model), 0.25, rel_tol=1e-5)
    later = TiedHeadDrift(model)
    later.load_state_dict(drift.state_dict())
    assert math.isclose(later.measure(model), 0.25, rel_tol=1e-5)
    assert TiedHeadDrift(make_model(tied=False)).measure(model) is None


def data(prompts=("1+1=", "20+30=", "5+4="), answers=("2", "50", "9")):
    return PromptDataset(in_memory(prompts, answers), tokenizer(), prompt_template="{prompt}")


def test_perplexity_is_that_of_the_formula():
    model, texts = make_model(vocab=16), data()
    total, count = 0.0, 0
    for i in range(len(texts)):
        prompt, answer = texts[i][0], texts.answer_tokens(i)
        logprobs = model(torch.tensor([[*prompt, *answer]])).log_softmax(-1)[0]
        total -= sum(logprobs[len(prompt) - 1 + j, t].item() for j, t in enumerate(answer))
        count += len(answer)
    for budget in (10, 1000):
        measured = ReferencePerplexity(texts, tokenizer(), tokens_per_micro_batch=budget)(model)
        assert math.isclose(measured, math.exp(total / count), rel_tol=1e-5)
    assert ReferencePerplexity(texts, tokenizer(), first=1, max_answer_tokens=1).longest == 5


def test_perplexity_is_measured_without_dropout():
    model = make_model(vocab=16, attn_dropout=0.5).train()
    measure = ReferencePerplexity(data(), tokenizer())
    assert measure(model) == measure(model)
    assert model.training


def test_accuracy_is_the_graders_mean(monkeypatch):
    monkeypatch.setattr(
        "oprd_tune.evaluation.task_accuracy.decode_responses", lambda *_: ["2", "51", "9 ", "2", "50", "8"]
    )
    measure = TaskAccuracy(
        data(), tokenizer(), grader="oprd_tune.grading.exact_match", max_new_tokens=3, samples_per_prompt=2
    )
    monkeypatch.setattr(measure, "_grader", lambda response, answer: response.strip() in ("2", "9"))
    assert measure(make_model(vocab=16)) == 0.5


def test_evaluators_explain_what_they_lack():
    with pytest.raises(ConfigError, match="grader 'oprd_tune.grading.fuzzy' cannot be found"):
        TaskAccuracy(data(), tokenizer(), grader="oprd_tune.grading.fuzzy", max_new_tokens=3)
    without = PromptDataset(
        in_memory(["1"], ["1"]).map(lambda row: {"answer": None}), tokenizer(), prompt_template="{prompt}"
    )
    with pytest.raises(ConfigError, match="needs reference answers"):
        ReferencePerplexity(without, tokenizer())


def training_state(folder, *, steps):
    """A model and optimizer after some steps, and the folder they are saved in."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.randint(0, 23, (2, 5))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, RunFolder(str(folder), keep=2)


def test_a_checkpoint_restores_model_optimizer_and_randomness_bit_by_bit(out):
    model, optimizer, folder = training_state(out, steps=2)
    folder.open(CFG)
    guard = FiniteGuard(3)
    guard.load_state_dict({"in_a_row": 2})
    folder.save(2, model, optimizer, {"guard": guard, "nothing": None}, CFG)
    drawn = torch.rand(3)
    folder.wait()
    other, other_optimizer, _ = training_state(out, steps=0)
    later = FiniteGuard(3)
    parts = {"guard": later, "nothing": None}
    assert load_checkpoint(folder.latest(), other, other_optimizer, parts, seed=0) == 2
    assert later.state_dict() == {"in_a_row": 2}
    assert torch.equal(torch.rand(3), drawn)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        for key, value in optimizer.state[a].items():
            assert torch.equal(value, other_optimizer.state[b][key])


def test_only_the_newest_checkpoints_are_kept_and_leftovers_are_swept(out):
    model, optimizer, folder = training_state(out, steps=1)
    folder.open(CFG)
    for step in (1, 2, 3):
        folder.save(step, model, optimizer, {}, CFG)
    folder.wait()
    (out / "checkpoints" / ".staged-step_00000004").mkdir()
    folder.open(CFG)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step_00000002", "step_00000003"]


def test_nothing_is_saved_before_something_is_learned(out):
    model, optimizer, folder = training_state(out, steps=0)
    folder.open(CFG)
    folder.save(0, model, optimizer, {}, CFG)
    folder.wait()
    assert folder.latest() is None
    assert not optimizer.state


def test_a_checkpoint_that_cannot_be_written_is_told_and_the_next_one_is(out, capsys, monkeypatch):
    model, optimizer, folder = training_state(out, steps=1)
    folder.open(CFG)
    full: Future = Future()
    full.set_exception(OSError("No space left on device"))
    with monkeypatch.context() as patch:
        patch.setattr("oprd_tune.run.folder.async_save", lambda *args, **kwargs: full)
        folder.save(1, model, optimizer, {}, CFG)
    folder.save(2, model, optimizer, {}, CFG)
    assert "step_00000001 could not be written: No space left on device" in capsys.readouterr().err
    folder.wait()
    assert folder.latest().name == "step_00000002"
    with monkeypatch.context() as patch:
        patch.setattr("oprd_tune.run.folder.async_save", lambda *args, **kwargs: full)
        folder.save(3, model, optimizer, {}, CFG)
    with pytest.raises(CheckpointError, match="No space left"):
        folder.wait()


def test_a_crash_in_the_middle_of_a_save_leaves_the_previous_checkpoint(out, monkeypatch):
    model, optimizer, folder = training_state(out, steps=1)
    folder.open(CFG)
    folder.save(1, model, optimizer, {}, CFG)
    folder.wait()
    save = torch.save

    def crash(data, file):
        return 1 / 0 if str(getattr(file, "name", "")).endswith("state.pt") else save(data, file)

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(ZeroDivisionError):
        folder.save(2, model, optimizer, {}, CFG)
    assert folder.latest().name == "step_00000001"


def test_a_folder_of_another_run_is_refused(out):
    model, optimizer, folder = training_state(out, steps=1)
    assert folder.check(CFG, resume=False) is None
    folder.open(CFG)
    assert folder.check(CFG, resume=False) is None  # nothing saved yet, so nothing to lose
    assert folder.check(CFG, resume=True) is None
    folder.save(1, model, optimizer, {}, CFG)
    folder.wait()
    with pytest.raises(ConfigError, match="holds another run; continue it with resume=true"):
        folder.check(CFG, resume=False)
    allowed = OmegaConf.merge(CFG, {"max_steps": 9, "output_dir": "here"})
    assert folder.check(allowed, resume=True).name == "step_00000001"
    with pytest.raises(ConfigError, match="another config: seed: 0 then, 1 now"):
        folder.check(OmegaConf.merge(CFG, {"seed": 1}), resume=True)


def test_export_explains_what_it_takes(tmp_path):
    with pytest.raises(ConfigError, match="is no checkpoint"):
        export_checkpoint(str(tmp_path), str(tmp_path / "x"))
    (tmp_path / "state.pt").touch()
    with pytest.raises(ConfigError, match="exists already"):
        export_checkpoint(str(tmp_path), str(tmp_path))


def test_signals_ask_once_and_then_act(capsys):
    before = signal.getsignal(signal.SIGINT)  # none in a shell's background
    with StopSignals() as stop:
        assert stop.exit_status == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) is before
    assert stop.exit_status == 128 + signal.SIGTERM
    assert "finishing the step, then saving" in capsys.readouterr().err


def test_user_errors_become_one_message_and_a_status(capsys):
    def make(cfg):
        raise ConfigError("positions is 'tail'")

    assert run_recipe(make, CFG) == 2
    assert capsys.readouterr().err == "error: positions is 'tail'\n"


class Losing:
    """A recipe whose engine is lost in its third step."""

    def __init__(self, cfg):
        self.saved = []

    def setup(self):
        return True

    def train(self):
        raise RolloutError("no vLLM server is left")

    def save(self):
        self.saved.append("last finished step")


def test_a_run_without_an_engine_saves_and_ends_with_a_message(capsys):
    made = []
    assert run_recipe(lambda cfg: made.append(Losing(cfg)) or made[0], CFG) == 1
    assert made[0].saved == ["last finished step"]
    said = capsys.readouterr().err
    assert said.startswith("error: no vLLM server is left\n")
    assert "saved; resume=true goes on" in said
    assert "Traceback" not in said


def test_a_run_that_cannot_be_saved_either_says_both(capsys):
    class Full(Losing):
        def save(self):
            raise CheckpointError("step_00000003 could not be written: no space left")

    assert run_recipe(Full, CFG) == 1
    assert capsys.readouterr().err == (
        "error: no vLLM server is left\nAnd then step_00000003 could not be written: no space left\n"
    )


@pytest.mark.parametrize("when", ["in the first step", "later"])
def test_what_was_learned_until_an_engine_is_lost_is_saved(when, out, monkeypatch):
    """And it is bit by bit what a run that ends there saves: the step that failed changed nothing."""
    steps = {"in the first step": 0, "later": 2}[when]
    generate = NativeEngine.generate

    def lose(self, prompts, *, stream=0):
        if self._policy_version == steps and self._samples_per_prompt == 2:
            raise RolloutError("the rollout of this step is not the student's")
        return generate(self, prompts, stream=stream)

    overrides = {**SMALL, "samples_per_prompt": 2, "checkpoint_every_n_steps": 2, "task_accuracy": "null"}
    overrides["rollout._component_"] = "oprd_tune.rollout.NativeEngine"
    cfg = load_config("tiny/oprd", output_dir=out, **overrides)
    with monkeypatch.context() as patch:
        patch.setattr(NativeEngine, "generate", lose)
        assert run_recipe(recipe_class("oprd_single_device"), cfg) == 1
    saved = [folder.name for folder in sorted((out / "checkpoints").glob("step_*"))]
    assert saved == ([f"step_{steps:08d}"] if steps else [])
    assert run_recipe(recipe_class("oprd_single_device"), OmegaConf.merge(cfg, {"resume": True})) == 0
    run_recipe(recipe_class("oprd_single_device"), OmegaConf.merge(cfg, {"output_dir": str(out / "whole")}))
    assert_same_student(out, out / "whole")


def auto_config(**rollout):
    return OmegaConf.create({"rollout": {"_component_": AUTO, "temperature": 0.7, **rollout}})


@pytest.fixture
def vllm_works(monkeypatch):
    """Says whether vLLM can be imported."""

    def say(works):
        def import_vllm(device):
            if not works:
                raise ConfigError("rollout: vLLM cannot be imported")

        for module in ("auto", "vllm_colocated"):
            monkeypatch.setattr(sys.modules[f"oprd_tune.rollout.{module}"], "import_vllm", import_vllm)

    return say


@pytest.mark.parametrize(
    ("works", "engine", "why"),
    [(True, "VLLMColocated", "vLLM works here"), (False, "NativeEngine", "rollout: vLLM cannot be imported")],
)
def test_auto_gives_way_to_the_best_engine_that_works(works, engine, why, vllm_works, capsys):
    vllm_works(works)
    cfg = auto_config()
    settle_engine(cfg, None, CPU, Ranks())
    assert cfg.rollout == {"_component_": f"oprd_tune.rollout.{engine}", "temperature": 0.7}
    assert capsys.readouterr().out == f"rollout: {engine} ({why})\n"
    assert Components(cfg).type_of("rollout").__name__ == engine


@pytest.mark.parametrize("engine", ["NativeEngine", "VLLMColocated"])
def test_a_resumed_run_keeps_its_engine_whatever_works_now(engine, vllm_works, tmp_path, capsys):
    vllm_works(engine == "NativeEngine")
    OmegaConf.save({"rollout": {"_component_": f"oprd_tune.rollout.{engine}"}}, tmp_path / "config.yaml")
    cfg = auto_config()
    if engine == "NativeEngine":
        settle_engine(cfg, tmp_path, CPU, Ranks())
    else:
        with pytest.raises(ConfigError, match="vLLM cannot be imported"):
            settle_engine(cfg, tmp_path, CPU, Ranks())
    assert cfg.rollout._component_ == f"oprd_tune.rollout.{engine}"
    assert capsys.readouterr().out == f"rollout: {engine} (as before)\n"


def test_an_engine_that_is_named_stays_and_has_to_work(vllm_works, capsys):
    vllm_works(False)
    cfg = auto_config(_component_="oprd_tune.rollout.NativeEngine")
    settle_engine(cfg, None, CPU, Ranks())
    assert cfg.rollout._component_ == "oprd_tune.rollout.NativeEngine"
    with pytest.raises(ConfigError, match="vLLM cannot be imported"):
        settle_engine(auto_config(_component_="oprd_tune.rollout.VLLMColocated"), None, CPU, Ranks())
    assert capsys.readouterr().out == ""
    with pytest.raises(ConfigError, match="oprd_tune.rollout.auto is no engine itself"):
        Components(auto_config())("rollout")


def test_summary_has_every_key_and_null_where_nothing_was_measured(tmp_path):
    history = History(teacher_accuracy=0.9, loop_seconds=2.0, response_tokens=10)
    history.evaluations = [
        {"step": 0, "accuracy": 0.1, "perplexity": None},
        {"step": 5, "accuracy": 0.7, "perplexity": None},
        {"step": 9, "accuracy": 0.5, "perplexity": None},
    ]
    summary = summarise(history, steps=9, peak_memory_bytes=2**30)
    write_summary(tmp_path, summary, history)
    read = json.loads((tmp_path / "summary.json").read_text())
    assert (read["student_before"], read["student_after"], read["teacher"]) == (0.1, 0.5, 0.9)
    assert (read["student_best"], read["best_step"], read["tokens_per_second"]) == (0.7, 5, 5.0)
    assert math.isclose(read["gap_closed"], 0.5)
    assert read["perplexity_before"] is None
    assert (tmp_path / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
    assert "50.0%" in as_table(summary)
    assert "perplexity" not in as_table(summary)


BAD_ENGINE_ARGUMENTS = [
    ("VLLMColocated", "tensor_parallel_size", 0, "rollout.tensor_parallel_size is 0; it must be at least 1"),
    ("VLLMColocated", "tensor_parallel_size", 2, "it must divide the number of processes, 1"),
    ("VLLMColocated", "kv_cache_gib", "abc", "rollout.kv_cache_gib is 'abc'; it must be a positive number"),
    ("VLLMColocated", "max_num_seqs", -4, "rollout.max_num_seqs is -4"),
    ("VLLMColocated", "gpu_memory_utilization", 1.5, "it must be at most 1"),
    ("VLLMColocated", "temperature", -1, "rollout.temperature is -1"),
    ("VLLMServer", "requests_in_flight", 0, "rollout.requests_in_flight is 0; it must be at least 1"),
    ("VLLMServer", "timeout", -1, "rollout.timeout is -1; it must be a positive number"),
    ("VLLMServer", "checksum_every_n_syncs", -1, "it must be at least 0"),
    ("VLLMServer", "addresses", "http://127.0.0.1:9", r"give a list such as \[http://host:8000\], or null"),
    ("VLLMServer", "addresses", [], r"rollout.addresses is \[\]"),
    ("VLLMServer", "addresses", ["host:8000"], r"rollout.addresses is \['host:8000'\]"),
    ("VLLMServer", "transfer", "nccl", "rollout.transfer is 'nccl'; allowed here: folder"),
]


@pytest.mark.parametrize(("engine", "name", "value", "message"), BAD_ENGINE_ARGUMENTS)
def test_an_engines_wrong_arguments_are_found_before_anything_is_loaded(engine, name, value, message, vllm_works):
    vllm_works(True)
    rest = {} if name == "addresses" or engine != "VLLMServer" else {"addresses": ["http://127.0.0.1:9"]}
    cfg = auto_config(_component_=f"oprd_tune.rollout.{engine}", **{**rest, name: value})
    with pytest.raises(ConfigError, match=message):
        settle_engine(cfg, None, CPU, Ranks())


def test_a_server_of_ones_own_needs_vllm(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    cfg = auto_config(_component_="oprd_tune.rollout.VLLMServer")
    with pytest.raises(ConfigError, match="vLLM is not installed; `pip install 'oprd-tune"):
        settle_engine(cfg, None, CPU, Ranks())

"""Mistakes in a command: one line that says what to do, at once, and no traceback."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from oprd_tune.command_line import file_to_register, look_at
from oprd_tune.config.components import Component
from oprd_tune.errors import ConfigError
from oprd_tune.registry import config_files, recipe_named_in
from oprd_tune.run.launcher import run_recipe as launch
from tests.conftest import SMALL, load_config, recipe_class

ROOT = Path(__file__).parents[1]
TUNE = Path(sys.executable).with_name("tune")
AT_ONCE = 2  # seconds; it takes a tenth of one

OURS = "run oprd_distributed --config tiny/oprd"
MISTAKES = {
    "run": "the recipe is missing: tune run oprd_distributed --config tiny/oprd",
    "run oprd_distributed": "--config is missing: tune run oprd_distributed --config tiny/",
    "run math_eval": "--config is missing: tune run math_eval --config tiny/eval",
    "run oprd_distributed --config": "--config is missing",
    "run oprd_distributed tiny/oprd": "--config is missing",
    "run oprd_distributed --config tiny/opdr": "no config 'tiny/opdr', nor such a file; did you mean 'tiny/oprd'?",
    "run --nproc_per_node 2 oprd_distributed --config my.yaml": "there is no config 'my.yaml', nor such a file",
    "run oprd_distribted --config tiny/oprd": "there is no recipe 'oprd_distribted'; did you mean 'oprd_distributed'?",
    "run zzz --config tiny/oprd": "there is no recipe 'zzz'; known are",
    "run oprd_distributed --config=tiny/oprd": "write it as two words: --config tiny/oprd",
    "run ./recipes/mine.py --config tiny/oprd": "there is no file ./recipes/mine.py; `tune cp oprd_distributed ./",
    f"{OURS} --max_steps 3": "--max_steps is no option; settings are written without dashes: max_steps=VALUE",
    f"{OURS} --max_steps=3": "--max_steps=3 is no option; settings are written without dashes: max_steps=VALUE",
    f"{OURS} max_steps": "'max_steps' is no setting; write key=value",
    f"{OURS} lr=0.1": "unknown config key 'lr'; did you mean 'optimizer.lr'?",
    f"{OURS} optimiser.lr=0.1": "unknown config key 'optimiser'; did you mean 'optimizer'?",
    f"{OURS} max_steps=many": "max_steps is 'many'; it must be int",
    f"{OURS} seed=1.5": "seed is 1.5; it must be int",
    f"{OURS} clip_grad_norm=[1]": "clip_grad_norm is [1]; it must be float or null",
    f"{OURS} dataset.prompt_template={{hint}}{{prompt}}": "is no YAML; a text with braces or colons needs two pairs",
    f"{OURS} dataset.prompt_template={{prompt}}=": "has more than one `=`, which torchtune cannot read here; `tune cp`",
    f"{OURS} ~lora": "~lora takes away a key that the config does not have; leave it out",
    f"{OURS} ~loss.k": "~loss.k takes away a key that the config does not have; leave it out",
    f"{OURS} ~eval_dataset": "~eval_dataset is a section with a `_component_`, which the command line cannot take away",
    f"{OURS} ~task_acuracy": "unknown config key 'task_acuracy'; did you mean 'task_accuracy'?",
}
FINE = (
    f"{OURS} max_steps=3 teachers.a=tiny/teacher ~teacher lora.rank=8 bridge.rank=2 eval.first=3",
    f"{OURS} optimizer[lr]=0.1 clip_grad_norm=-1",
    f"{OURS} clip_grad_norm=1e-3 master_dtype=null layers=[1,2] preflight=only max_steps=${{seed}} reference_share=1",
    "run --nproc_per_node 2 oprd_distributed --config tiny/oprd max_steps=1",
    "run --rdzv_id oprd_distributed --standalone oprd_distributed max_steps=1 --config tiny/oprd",
    "run opd_topk_single_device --config tiny/opd_topk average_over=responses",
    "run full_finetune_distributed --config llama2/7B_full --anything",
    "run theirs/recipe.py --config db://my_run --debug",
    "run theirs/recipe a=1 --config my.yaml",
    "run theirs.recipe path=foo.py --config my.yaml",
    "run theirs --config my.yaml",
    "run torchtune.foo --config my.yaml",
    "run --standalone",
    "run --help",
    "cp tiny/oprd my.yaml",
    "",
)


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_in_a_command_is_told_in_one_line(words, capsys):
    with pytest.raises(SystemExit) as ended:
        look_at(words.split())
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert MISTAKES[words] in line


@pytest.mark.parametrize("words", FINE)
def test_what_is_not_surely_a_mistake_is_left_to_torchtune(words, tmp_path, monkeypatch):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "recipe.py").write_text("print('theirs')")
    monkeypatch.chdir(tmp_path)
    look_at(words.split())


def test_a_file_that_is_no_yaml_is_told_with_its_place(tmp_path, monkeypatch, capsys):
    (tmp_path / "my.yaml").write_text("recipe: oprd_distributed\nstudent: a: b\n")
    monkeypatch.chdir(tmp_path)
    for config, said in (("my.yaml", "my.yaml, line 2, column 11: "), ("my.yml", "did you mean 'my.yaml'?")):
        with pytest.raises(SystemExit):
            look_at(["run", "oprd_distributed", "--config", config])
        assert said in capsys.readouterr().err


def test_keys_and_types_in_a_file_are_told_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    whole = config_files()["tiny/oprd"].read_text()
    cases = {
        "taks_accuracy: {}": "my.yaml: unknown config key 'taks_accuracy'; did you mean 'task_accuracy'?",
        "samples_per_prompt: two": "samples_per_prompt is 'two'; it must be int",
    }
    for line, said in cases.items():
        Path("my.yaml").write_text(
            "\n".join(x for x in whole.splitlines() if not x.startswith("samples")) + f"\n{line}\n"
        )
        with pytest.raises(SystemExit):
            look_at(["run", "oprd_distributed", "--config", "my.yaml"])
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", config_files())
def test_shipped_configs_are_fine(name):
    look_at(["run", recipe_named_in(config_files()[name]), "--config", name])


def test_no_word_ends_in_a_traceback():
    look_at(["run", "", "--config", "my.yaml"])


def test_it_takes_no_time():
    started = time.perf_counter()
    result = subprocess.run([TUNE, *f"{OURS} lr=1".split()], capture_output=True, text=True, check=False)
    assert time.perf_counter() - started < AT_ONCE
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: unknown config key 'lr'; did you mean 'optimizer.lr'?\n"


def test_the_list_of_recipes_is_torchtunes_own(monkeypatch):
    started = time.perf_counter()
    ours = subprocess.run([TUNE, "ls"], capture_output=True, text=True, check=True).stdout
    assert time.perf_counter() - started < AT_ONCE
    code = "import sys, oprd_tune.command_line as c; c.look_at = lambda words: None; sys.argv = ['tune', 'ls']\n"
    code += "from torchtune._cli.tune import main; main()"
    theirs = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert ours == theirs


def test_which_files_torchtune_cannot_import(tmp_path, monkeypatch):
    (tmp_path / "mine.py").touch()
    for folder in ("exp", "deep-er", "recipes"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").touch()
    monkeypatch.chdir(tmp_path)
    for path in ("./mine.py", "exp/../mine.py", "deep-er/mine.py", "recipes/mine.py", str(tmp_path / "mine.py")):
        assert file_to_register(["run", "--nproc_per_node", "2", path]) == (path, str((tmp_path / path).resolve()))
    for path in ("mine.py", "exp/mine.py", "nowhere/mine.py", "oprd_distributed"):
        assert file_to_register(["run", path, "--config", "x"]) is None


def test_a_recipes_file_may_lie_anywhere(tmp_path):
    """Also where torchtune's own way fails; elsewhere it is torchtune's own way that runs it."""
    told = "import sys; print('{} runs with', *sys.argv[1:])"
    for folder in ("recipes", "exp"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(told.format(folder))
    (tmp_path / "exp" / "helper.py").write_text("X = 1")
    (tmp_path / "exp" / "relative.py").write_text("from .helper import X\n" + told.format("relative"))
    (tmp_path / "mine.py").write_text(told.format("here"))
    (tmp_path / "my.yaml").write_text("a: 1\n")
    paths = {"recipes/mine.py": "recipes", "exp/relative.py": "relative", str(tmp_path / "exp" / "mine.py"): "exp"}
    for path, name in paths.items():
        words = [str(TUNE), "run", path, "--config", "my.yaml", "b=2"]
        result = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert f"{name} runs with --config my.yaml b=2" in result.stdout, result.stderr
    words = [str(TUNE), "run", "--nproc_per_node", "1", "recipes/mine.py", "--config", "my.yaml"]
    result = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "recipes runs with --config my.yaml" in result.stdout, result.stderr


def test_a_text_in_braces_that_was_read_as_a_section_is_told_so():
    section = {"_component_": "oprd_tune.data.prompt_dataset", "source": "a.jsonl", "prompt_template": {"prompt": None}}
    with pytest.raises(ConfigError, match="two pairs of quotes: dataset.prompt_template=\"'{prompt}'\""):
        Component.find("dataset", section)


LATER = {
    "a wrong type": ({"max_steps": "many"}, "max_steps is 'many'; it must be int"),
    "a text for a number": ({"optimizer.lr": "fast"}, "optimizer.lr is 'fast'; it must be a number"),
    "a device that is not there": ({"device": "cuda:7"}, "device 'cuda:7' with dtype 'fp32' cannot be used"),
    "a folder that is a file": ({"output_dir": f"{__file__}/out"}, "cannot be used: [Errno 20] Not a directory"),
    "a misspelt component": (
        {"loss._component_": "oprd_tune.losses.HiddenStateMES"},
        "cannot be found in oprd_tune.losses; did you mean oprd_tune.losses.HiddenStateMSE?",
    ),
    "a misspelt argument": ({"loss.normalization": "l2"}, "did you mean 'normalisation'?"),
    "a component without its module": ({"loss._component_": "HiddenStateMSE"}, "loss._component_ 'HiddenStateMSE' can"),
    "a broken line": ({"dataset": {"source": "{folder}/broken.jsonl"}}, "broken.jsonl, line 2"),
    "an empty file": ({"dataset": {"source": "{folder}/empty.jsonl"}}, "empty.jsonl"),
}


@pytest.mark.parametrize("name", LATER)
def test_a_mistake_in_a_value_is_told_in_one_line_too(name, tmp_path, capsys):
    (tmp_path / "broken.jsonl").write_text('{"prompt": "1+1="}\n{"prompt": \n')
    (tmp_path / "empty.jsonl").write_text("")
    overrides, said = LATER[name]
    cfg = load_config("tiny/oprd", output_dir=tmp_path / "out", **{k: v for k, v in SMALL.items() if k[:5] != "datas"})
    for key, value in overrides.items():
        if isinstance(value, dict):
            cfg[key] = {inner: text.format(folder=tmp_path) for inner, text in value.items()}
        else:
            cfg.merge_with_dotlist([f"{key}={value}"])
    assert launch(recipe_class("oprd_distributed"), cfg) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if "error" in line.lower()]
    assert len(told) == 1
    assert said in told[0]

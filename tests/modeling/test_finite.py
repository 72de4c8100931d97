"""Weights that are not finite are named when they are read."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from oprd_tune import tiny
from oprd_tune.errors import ConfigError
from oprd_tune.modeling.finite import check_finite
from oprd_tune.run.launcher import run_recipe as launch
from tests.conftest import SMALL, load_config, recipe_class


def broken(tmp_path, name, key, value=math.nan):
    """A copy of an embedded model with one number replaced."""
    folder = tmp_path / name
    shutil.copytree(Path(tiny.__file__).parent / name, folder)
    weights = load_file(folder / "model.safetensors")
    weights[key].view(-1)[3] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("which", "key", "value"),
    [
        ("teacher", "model.norm.weight", math.nan),
        ("teacher", "model.layers.2.mlp.down_proj.weight", math.nan),
        ("student", "model.embed_tokens.weight", math.inf),
    ],
)
def test_a_broken_file_is_named_and_not_the_learning_rate(which, key, value, tmp_path, capsys):
    folder = broken(tmp_path, which, key, value)
    words = {"output_dir": tmp_path / "out", "evaluate_teacher": "false", which: str(folder), **SMALL}
    assert launch(recipe_class("oprd_distributed"), load_config("tiny/oprd", **words)) == 2
    errors = capsys.readouterr().err
    assert f"model.safetensors: {key} has values that are NaN or infinite" in errors
    assert "learning rate" not in errors


def test_a_teacher_of_transformers_is_checked_too(tmp_path):
    from oprd_tune.teacher import transformers_files
    from oprd_tune.teacher.block_placement import Placing

    folder = broken(tmp_path, "teacher", "model.norm.weight")
    files = transformers_files(str(folder), str(tmp_path / "out"))
    placing = Placing(torch.device("cpu"), None, False, None, ())
    with pytest.raises(ConfigError, match=r"model\.norm\.weight has values that are NaN"):
        files.load_teacher(dtype=torch.float32, top=None, placing=placing)


def test_whole_numbers_and_large_sums_are_fine():
    weights = {"a": torch.tensor([1, 2]), "b": torch.full((70_000,), 6e4, dtype=torch.float16)}
    check_finite(weights.items(), [])
    with pytest.raises(ConfigError, match="^c has values"):
        check_finite({**weights, "c": torch.tensor([1.0, -math.inf, math.inf])}.items(), [])

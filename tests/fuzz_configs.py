"""Changes one key of a shipped config at a time into nonsense, and sees whether the recipe says so in one line.

    python -m tests.fuzz_configs --variants 1000 --train 60

A variant runs in this process until weights would be read. It ends well if it gets there, or if the recipe ends with a
message and exit status 2. Anything else is a failure, and is printed: a traceback, another status, or no end within
`SECONDS`. `--train` goes on with some of the variants that got there, for two steps. Several ranks must end alike:

    torchrun --nproc_per_node 2 -m tests.fuzz_configs --variants 1000
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import os
import random
import signal
import sys
import tempfile
import traceback
import warnings
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torchtune.config._utils import _merge_yaml_and_cli_args
from torchtune.training import FullModelHFCheckpointer

from oprd_tune.config import OPRDSettings
from oprd_tune.config.short_form import expand
from oprd_tune.ranks import leave_ranks
from oprd_tune.registry import config_files
from oprd_tune.run import launcher
from oprd_tune.run.launcher import launch
from oprd_tune.torchtune_compat import component_at
from tests.conftest import recipe_class

CONFIGS = ("tiny/oprd", "tiny/opd_topk", "tiny/bridge", "tiny/cross_tokenizer")
QUICK = {"max_steps": 2, "prompts_per_step": 4, "dataset.count": 32, "eval_dataset.count": 8, "bridge.prompts": 16}
SECONDS = 20
VALUES = (
    *("-1", "0", "1", "2", "3", "-3", "2.5", "0.5", "1e30", "1" + "0" * 30, "999999999", "2147483648"),
    *(".nan", ".inf", "-.inf", "nan", "inf", "''", "' '", "null", "true", "false", "x", "all", "none", "../x", "/"),
    *("[]", "[0.9]", "[1,2]", "[x]", "[[1,1]]", "{}", "{a: 1}", "{_component_: torch.nn.Identity}", "${missing}"),
)
COMPONENTS = (
    *("torch.nn.Identity", "nowhere.Thing", "torch", "oprd_tune.losses", "x", "''", "1", "[]", "builtins.dict"),
    *("builtins.len", "builtins.print", "torch.optim.SGD", "torch.optim.LBFGS", "torch.optim.SparseAdam"),
    *("oprd_tune.losses.HiddenStateMSE", "oprd_tune.losses.TopKReverseKL", "oprd_tune.tiny.addition"),
)


_LONG = ("max_steps=", "compile=")  # fine values of these only take long


@dataclass(frozen=True)
class Variant:
    """A config with one change, given as on the command line."""

    config: str
    change: str


def variants(count: int, *, seed: int = 0) -> Iterator[Variant]:
    """As many changes, drawn evenly over the keys of all configs."""
    rng = random.Random(seed)
    keys = [(config, key) for config in CONFIGS for key in _keys(config)]
    while count > 0:
        rng.shuffle(keys)
        for config, key in keys[:count]:
            yield Variant(config, _change(key, rng))
        count -= len(keys)


def _change(key: str, rng: random.Random) -> str:
    if key.endswith("_component_"):
        return f"{key}={rng.choice(COMPONENTS)}"
    kind = rng.random()
    if kind < 0.04:
        place = rng.randrange(len(key))
        return f"{key[:place]}{key[place + 1 :]}=1"  # a misspelt key
    return f"{key}={rng.choice(VALUES)}"


def _keys(config: str) -> list[str]:
    """Every scalar, section and argument of a config, those with a default included."""
    content = OmegaConf.to_container(OmegaConf.load(config_files()[config]))
    found = [f.name for f in fields(OPRDSettings)] + ["student", "teacher", "lora", "recipe", "tokenizer.path"]
    for name, section in expand(content).items():
        if isinstance(section, dict) and "_component_" in section:
            taken = inspect.signature(component_at(section["_component_"])).parameters.values()
            found += [name, f"{name}._component_"]
            found += [f"{name}.{p.name}" for p in taken if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return list(dict.fromkeys(found))


class _Reached(Exception):  # noqa: N818 - not an error
    """Weights would be read now."""


class _TooLong(BaseException):
    """The variant takes too long."""


def run(variant: Variant, folder: Path, *, train: bool = False) -> tuple[str, str]:
    """Run a variant in an empty folder; returns `refused`, `accepted`, `late` or `failed`, and what was said.

    `late` is a message after weights were read, as for responses of a student that diverges.
    """
    given = OmegaConf.to_container(OmegaConf.load(config_files()[variant.config]))
    quick = [f"{key}={value}" for key, value in QUICK.items() if key.partition(".")[0] in given]
    words = [f"output_dir={folder}/out", *quick, variant.change]
    try:
        cfg = _merge_yaml_and_cli_args(Namespace(**given), words)
    except Exception as error:  # torchtune's own command line refuses it
        return "refused", str(error)
    reached = [False]

    def load(self: FullModelHFCheckpointer) -> object:
        reached[0] = True
        if train:
            return read(self)
        raise _Reached

    read, said = FullModelHFCheckpointer.load_checkpoint, io.StringIO()
    try:
        with _scope(folder, said), mock.patch.object(FullModelHFCheckpointer, "load_checkpoint", load):
            status = launch(recipe_class(cfg.recipe if _known(cfg) else "oprd_distributed"), cfg)
    except _Reached:
        return "accepted", ""
    except _TooLong:
        return "failed", f"no end within {SECONDS} seconds"
    except BaseException:
        return "failed", traceback.format_exc(limit=-6)
    if status == 2 or (status == 1 and "\nerror: " in f"\n{said.getvalue()}"):
        return ("late" if reached[0] else "refused"), said.getvalue()
    return ("accepted" if status == 0 else "failed"), said.getvalue()


def _known(cfg: object) -> bool:
    try:
        return cfg.recipe in ("oprd_distributed", "opd_topk_distributed")  # type: ignore[attr-defined]
    except Exception:
        return False


@contextlib.contextmanager
def _scope(folder: Path, said: io.StringIO) -> Iterator[None]:
    """Run in a folder, quietly, and not for long. Leave this process as it was."""

    def stop(*_: object) -> None:
        raise _TooLong

    before, path, threads = os.getcwd(), list(sys.path), torch.get_num_threads()
    handler = signal.signal(signal.SIGALRM, stop)
    os.chdir(folder)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        os.chdir(before)
        sys.path[:] = path
        torch.set_num_threads(threads)


def main() -> int:
    """Run the variants, print every failure and the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", type=int, default=1000)
    parser.add_argument("--train", type=int, default=0, help="how many of the accepted variants to train for two steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="print every variant and what was said about it")
    asked = parser.parse_args()
    counts = {"refused": 0, "accepted": 0, "late": 0, "failed": 0}
    if "RANK" in os.environ:
        return _run_on_all_ranks(asked, counts)
    accepted = []
    with tempfile.TemporaryDirectory() as folder:
        for number, variant in enumerate(variants(asked.variants, seed=asked.seed)):
            if asked.show:
                print(f"{variant.config} {variant.change}", flush=True)
            outcome, text = run(variant, _made(Path(folder) / str(number)))
            counts[outcome] += 1
            accepted += [variant] if outcome == "accepted" and not variant.change.startswith(_LONG) else []
            if outcome == "failed" or asked.show:
                print(f"{outcome}: {variant.config} {variant.change}\n{text}", flush=True)
        print(f"before weights are read: {counts}")
        counts = dict.fromkeys(counts, 0)
        chosen = random.Random(asked.seed).sample(accepted, min(asked.train, len(accepted)))
        for number, variant in enumerate(chosen):
            outcome, text = run(variant, _made(Path(folder) / f"train-{number}"), train=True)
            counts[outcome] += 1
            if outcome != "accepted":
                print(f"{outcome} in training: {variant.config} {variant.change}\n{text}", flush=True)
        print(f"trained: {counts}")
    return 0


def _run_on_all_ranks(asked: Namespace, counts: dict[str, int]) -> int:
    """Run the variants on every rank at once; returns 1 if one failed, or if the ranks disagree."""
    # A rank may need all of its seconds for a variant that another one has refused at once.
    dist.init_process_group("gloo", timeout=timedelta(seconds=3 * SECONDS))
    os.environ.pop("TORCHELASTIC_RUN_ID", None)  # no watch over the launcher for each variant
    first = dist.get_rank() == 0
    found: list[tuple[str, str]] = [("", "")] * dist.get_world_size()
    keep_group = mock.patch.object(launcher, "leave_ranks")
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(launcher, "_LATER_SECONDS", 0), keep_group:
        place = [folder]
        dist.broadcast_object_list(place)
        for number, variant in enumerate(variants(asked.variants, seed=asked.seed)):
            own = Path(place[0]) / str(number)
            own.mkdir(exist_ok=True)
            if first and asked.show:
                print(f"{variant.config} {variant.change}", flush=True)
            dist.all_gather_object(found, run(variant, own))
            outcomes = sorted({outcome for outcome, _ in found})
            alike = len(outcomes) == 1 and outcomes != ["failed"]
            counts[outcomes[0] if alike else "failed"] += 1
            if first and not alike:
                print(f"failed: {variant.config} {variant.change}", *found, sep="\n", flush=True)
        if first:
            print(f"before weights are read, on {len(found)} ranks: {counts}", flush=True)
        dist.barrier()  # the folder is the first rank's
    leave_ranks(together=True)
    return int(counts["failed"] > 0)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


if __name__ == "__main__":
    sys.exit(main())

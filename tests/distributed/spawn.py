"""Several processes on one machine. They meet over a file: nobody can take it, and it outlives whoever ends first."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from oprd_tune.ranks import leave_ranks


def run_ranks(function, world_size, folder: Path, *args):
    """Call `function(rank, *args)` on each of `world_size` gloo ranks; one alone has no process group, as in a run."""
    folder.mkdir(parents=True, exist_ok=True)
    mp.spawn(_start, (world_size, str(folder / "store"), function, args), nprocs=world_size)


def _start(rank, world_size, store, function, args):
    torch.set_num_threads(1)
    os.environ["TORCH_COMPILE_BACKEND"] = "aot_eager"
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    function(rank, *args)
    if dist.is_initialized():
        dist.barrier()
    if "vllm" in sys.modules:  # it removes its shared memory in an ordinary exit
        leave_ranks(together=True)
    else:
        os._exit(0)

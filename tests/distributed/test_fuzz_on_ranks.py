"""Nonsense in a config ends alike on all ranks: no rank waits for one that has ended with a message."""

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_no_single_change_leaves_a_rank_waiting():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "tests.fuzz_configs", "--variants", "30", "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout
    assert "on 2 ranks: {'refused': " in done.stdout
    assert "'failed': 0}" in done.stdout

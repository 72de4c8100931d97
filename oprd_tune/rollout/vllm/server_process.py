"""A process that serves a student with vLLM on this machine."""

from __future__ import annotations

import atexit
import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from oprd_tune.errors import ConfigError
from oprd_tune.rollout.vllm.client import VLLMClient

LOOPBACK = "127.0.0.1"
SERVER_MODULE = "vllm.entrypoints.openai.api_server"  # `vllm serve` runs it, but does not start in vLLM's CPU build
_PORTS = range(20_000, 32_000)  # below the ports that the system gives to other programs
_SHUTDOWN_SECONDS = 10.0
_LAST_LINES, _LAST_ERRORS = 15, 4
_PR_SET_PDEATHSIG = 1


class ServerProcess:
    """A local vLLM server on a free port of the loopback interface. It ends when this process ends, in whatever way.

    Args:
        folder: the model's folder.
        environment: environment variables, in addition to those of this process.
        log: the file for the server's output.
    """

    def __init__(self, folder: Path, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        port = _free_port()
        self.address = f"http://{LOOPBACK}:{port}"
        self._log = log
        module = [sys.executable, "-m", SERVER_MODULE, "--model", str(folder)]
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "wb") as output:
            self._process = subprocess.Popen(
                [*module, *arguments, "--host", LOOPBACK, "--port", str(port)],
                env={**os.environ, "VLLM_SERVER_DEV_MODE": "1", **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C must reach the run only, which ends its step and then the server
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        atexit.register(self.close)

    @property
    def pid(self) -> int:
        """The process id of the server."""
        return self._process.pid

    def wait_until_ready(self, timeout: float) -> None:
        """Wait until the server answers.

        Raises ConfigError, which quotes the log, if the server ends or does not answer within `timeout` seconds.
        """
        print(f"Starting vLLM's server at {self.address}; its log is {self._log}", flush=True)
        client, deadline = VLLMClient(self.address, timeout=5.0), time.monotonic() + timeout
        while not client.is_ready():
            ended = self._process.poll() is not None
            if ended or time.monotonic() > deadline:
                self.close()
                lines = self._log.read_text(errors="replace").splitlines()
                told = [line for line in lines if "Error: " in line or "error: " in line][-_LAST_ERRORS:]
                tail = "\n".join(told or lines[-_LAST_LINES:])
                what = "ended" if ended else f"was not ready within {timeout:g} seconds"
                raise ConfigError(f"rollout: vLLM's server {what}; from {self._log}:\n{tail}")
            time.sleep(0.2)

    def close(self) -> None:
        """Stop the server and all its processes."""
        atexit.unregister(self.close)
        if self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_SHUTDOWN_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _end_with_parent() -> None:
    """In the child: have the kernel send SIGTERM when the parent has ended, even if it was killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _free_port() -> int:
    while True:
        port = random.SystemRandom().choice(_PORTS)
        with socket.socket() as probe:
            if probe.connect_ex((LOOPBACK, port)):  # nobody listens
                return port

"""Checks whether servers fit a run, and tells how to start one that does."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from oprd_tune.errors import ConfigError
from oprd_tune.rollout.vllm.client import VLLM_VERSION, LostServerError, RefusedRequestError, VLLMClient
from oprd_tune.rollout.vllm.fingerprints import engine_names
from oprd_tune.rollout.vllm.policy_weights import PolicyWeights
from oprd_tune.rollout.vllm.requests import CPU_CACHE_GIB, GIB
from oprd_tune.rollout.vllm.server_process import SERVER_MODULE

_MOST_LOGPROBS = 20  # at each token, vLLM's default


@dataclass(frozen=True)
class ServerFit:
    """What a run needs from its servers.

    Attributes:
        length: the most tokens of a prompt and its response together.
        logprobs: the number of log-probabilities at each token.
        nccl: whether weights come over NCCL.
        checksums: whether servers have to compute checksums of their weights.
    """

    weights: PolicyWeights
    length: int
    logprobs: int
    nccl: bool
    checksums: bool

    def arguments(self, memory: float, kv_cache_gib: float | None) -> list[str]:
        """Arguments for `vllm serve`. `memory` is the share of a GPU's memory, unless the cache has a fixed size."""
        on_cuda = self.weights.device.type == "cuda"
        named: dict[str, Any] = {
            "dtype": str(self.weights.dtype).removeprefix("torch."),
            "max-model-len": self.length,
            "max-logprobs": max(_MOST_LOGPROBS, self.logprobs),
            "generation-config": "vllm",
        }
        if on_cuda and kv_cache_gib is None:
            named["gpu-memory-utilization"] = memory
        else:
            named["kv-cache-memory-bytes"] = int((kv_cache_gib or CPU_CACHE_GIB) * GIB)
        flags = ["--skip-tokenizer-init", "--enable-scale-out", *([] if on_cuda else ["--enforce-eager"])]
        if self.nccl:
            named |= {"load-format": "dummy", "weight-transfer-config": '{"backend": "nccl"}'}
        return [word for name, value in named.items() for word in (f"--{name}", str(value))] + flags

    def check(self, server: VLLMClient) -> None:
        """Raise ConfigError if a server has the wrong version, model, precision or settings."""
        wanted = {"dtype": str(self.weights.dtype), "logprobs_mode": "raw_logprobs"}
        least = {"max_model_len": self.length, "max_logprobs": self.logprobs}
        try:
            version = server.version().partition("+")[0]
            if version != VLLM_VERSION:
                raise ConfigError(f"rollout: {server} runs vLLM {version}; this needs {VLLM_VERSION}")
            settings = server.settings()
            names = set(server.checksums()) if self.checksums else set()
        except (LostServerError, RefusedRequestError) as error:
            raise ConfigError(f"rollout: {server} cannot be used: {error}") from error
        model, receives = settings["model_config"], settings["weight_transfer_config"] or {}
        wrong = [f"{key} is {model[key]}, not {value}" for key, value in wanted.items() if model[key] != value]
        wrong += [f"{key} is {model[key]}, below {value}" for key, value in least.items() if model[key] < value]
        if self.nccl and receives.get("backend") != "nccl":
            wrong.append('it was started without --weight-transfer-config {"backend": "nccl"}')
        if names:
            own = engine_names(self.weights.shapes())
            wrong += [f"only one of it and the student has {name}" for name in sorted(names ^ own)[:1]]
        if wrong:
            raise ConfigError(f"rollout: {server} serves {model['model']}, which does not fit: {'; '.join(wrong)}")


def wait_for_servers(
    servers: Sequence[VLLMClient], timeout: float, folder: Path, arguments: Sequence[str], *, tell: bool
) -> None:
    """Wait until all servers answer. After `timeout` seconds, raise ConfigError.

    If `tell` is true, print for each server that does not answer yet the command that starts it, with `folder` as its
    model and with `arguments`.
    """
    deadline = time.monotonic() + timeout
    while missing := [server for server in servers if not server.is_ready()]:
        if tell:
            limit = f"{timeout:g} seconds (rollout.startup_timeout)"
            print(f"Waiting up to {limit} for servers, to be started with", flush=True)
            for server in missing:
                place = urlsplit(server.address)
                where = ["--host", str(place.hostname), "--port", str(place.port or 80)]
                command = ["python", "-m", SERVER_MODULE, "--model", str(folder), *arguments, *where]
                print(f"  VLLM_SERVER_DEV_MODE=1 {shlex.join(command)}", flush=True)
            tell = False
        if time.monotonic() > deadline:
            raise ConfigError(
                f"rollout.addresses: nothing answers at {', '.join(map(str, missing))} after {timeout:g} seconds "
                "(rollout.startup_timeout)"
            )
        time.sleep(1.0)

"""Sampling with one or more `vllm serve` processes, here or elsewhere."""

from __future__ import annotations

import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import nn

from oprd_tune.errors import ConfigError, RolloutError
from oprd_tune.metrics.progress import LateBar
from oprd_tune.rollout.fingerprints import Digests, check_arrived, engine_names
from oprd_tune.rollout.policy_weights import PolicyWeights
from oprd_tune.rollout.proof import prove_on_policy
from oprd_tune.rollout.responses import Response
from oprd_tune.rollout.sampling import Sampling, check_versions
from oprd_tune.rollout.server_client import VLLM_VERSION, Answer, LostServerError, RefusedRequestError, VLLMClient
from oprd_tune.rollout.server_process import ServerProcess, serve_command
from oprd_tune.rollout.weight_transfer import FolderTransfer, NCCLTransfer, write_config
from oprd_tune.types import Prompts, Rollout

_GIB = 2**30
_CPU_CACHE_GIB = 1.0
_MOST_LOGPROBS = 20  # at a token, vLLM's default
_ATTEMPTS = 3
_PAUSE_SECONDS = 1.0
T = TypeVar("T")


class VLLMServer:
    """Spreads requests over servers, and sends them the student's weights.

    Without addresses it starts a server here, on the loopback interface. A server that is lost, because it ended, hangs
    or fails, is not used again; its requests go to the others. When none is left, the run saves and ends.

    Args:
        model: the student; see `weights`.
        weights: what each sync sends.
        stop_tokens: see `NativeEngine`, as for all arguments up to `seed`.
        max_prompt_tokens: the longest prompt.
        addresses: of servers, such as `http://host:8000`; None starts one.
        transfer: `nccl` or `folder`; None for the first if the run computes on GPUs, else the second.
        shared_folder: what weights pass through, under the same path for servers; None for one in the run's folder.
        requests_in_flight: to each server, from each process.
        timeout: seconds that a response, or a sync, may take; then the server counts as lost.
        startup_timeout: seconds to wait for servers at the start.
        checksum_every_n_syncs: how often servers sum up their weights, with SHA-256, to compare; 0 for never.
        gpu_memory_utilization: of a server started here.
        kv_cache_gib: the cache of a server started here, instead of that share; on a CPU 1 unless given.
        server_environment: variables of a server started here, such as CUDA_VISIBLE_DEVICES.
        server_arguments: more arguments of a server started here, such as `--tensor-parallel-size`, 2.
        max_logprob_gap: see `prove_on_policy`.
        vocabulary: what `weights` are cut to.
        folder: for the log of a server started here, and for weights that no `shared_folder` takes.

    Raises:
        ConfigError: for arguments that cannot be, or a server that cannot be used.
    """

    samples_with_student: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        *,
        weights: PolicyWeights,
        stop_tokens: Collection[int],
        pad_id: int,
        max_prompt_tokens: int,
        max_new_tokens: int,
        folder: Path,
        samples_per_prompt: int = 1,
        temperature: float = 1.0,
        seed: int = 0,
        vocabulary: int | None = None,
        top_k_ids: int | None = None,
        addresses: Sequence[str] | None = None,
        transfer: str | None = None,
        shared_folder: str | None = None,
        requests_in_flight: int = 64,
        timeout: float = 600.0,
        startup_timeout: float = 600.0,
        checksum_every_n_syncs: int = 1,
        gpu_memory_utilization: float = 0.9,
        kv_cache_gib: float | None = None,
        server_environment: Mapping[str, Any] | None = None,
        server_arguments: Sequence[str] = (),
        max_logprob_gap: float | None = None,
    ) -> None:
        self._sampling = Sampling(stop_tokens, pad_id, max_new_tokens, samples_per_prompt, temperature, seed, top_k_ids)
        self._weights, self._ranks, self._limit = weights, weights.ranks, max_logprob_gap
        self._in_flight, self._checksum_every = requests_in_flight, checksum_every_n_syncs
        on_cuda = weights.device.type == "cuda"
        transfer = transfer or ("nccl" if on_cuda else "folder")
        if transfer not in ("nccl", "folder") or (transfer == "nccl" and not on_cuda):
            raise ConfigError(f"rollout.transfer is {transfer!r}; allowed are folder and, where the run has GPUs, nccl")
        self._length = max_prompt_tokens + max_new_tokens
        self._process: ServerProcess | None = None
        place = Path(shared_folder) if shared_folder else folder
        by_folder = FolderTransfer(weights, place) if transfer == "folder" else None
        start = by_folder.write_start() if by_folder else write_config(weights, place)
        arguments = self._arguments(on_cuda, transfer, gpu_memory_utilization, kv_cache_gib)
        if addresses is None:
            if self._ranks.first:
                environment = {name: str(value) for name, value in (server_environment or {}).items()}
                arguments += map(str, server_arguments)
                self._process = ServerProcess(start, arguments, environment, folder / "server.log")
                self._process.wait_until_ready(startup_timeout)
            addresses = self._ranks.collect([self._process.address] if self._process else [])[0]
        if wrong := [address for address in addresses if not str(address).startswith(("http://", "https://"))]:
            raise ConfigError(f"rollout.addresses has {', '.join(map(str, wrong))}; each is to begin with http://")
        self._servers = [VLLMClient(address, timeout) for address in addresses]
        self._wait_for_servers(startup_timeout, serve_command(start, arguments))
        self._check_servers()
        self._transfer = by_folder or NCCLTransfer(weights, self._servers, timeout)
        self._run, self._syncs = self._ranks.collect(uuid.uuid4().hex[:8])[0], 0
        self._label, self._policy_version = "", -1
        self._lock, self._why_lost = threading.Lock(), ""

    # ---- before the first rollout ----

    def _arguments(self, on_cuda: bool, transfer: str, memory: float, kv_cache_gib: float | None) -> list[str]:
        """Arguments of `vllm serve` that fit this run."""
        named: dict[str, Any] = {
            "dtype": str(self._weights.dtype).removeprefix("torch."),
            "max-model-len": self._length,
            "max-logprobs": max(_MOST_LOGPROBS, self._sampling.logprobs),
            "generation-config": "vllm",
            "gpu-memory-utilization": memory,
        }
        if kv_cache_gib is not None or not on_cuda:
            named["kv-cache-memory-bytes"] = int((kv_cache_gib or _CPU_CACHE_GIB) * _GIB)
        flags = ["--skip-tokenizer-init", "--enable-scale-out", *([] if on_cuda else ["--enforce-eager"])]
        if transfer == "nccl":
            named |= {"load-format": "dummy", "weight-transfer-config": '{"backend": "nccl"}'}
        return [word for name, value in named.items() for word in (f"--{name}", str(value))] + flags

    def _wait_for_servers(self, timeout: float, command: str) -> None:
        deadline, told = time.monotonic() + timeout, False
        while missing := [server for server in self._servers if not server.is_ready()]:
            if not told and self._ranks.first:
                print(f"Waiting for {', '.join(map(str, missing))}, to be started there with", flush=True)
                print(f"  {command} --host HOST --port PORT", flush=True)
            told = True
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"rollout.addresses: nothing answers at {', '.join(map(str, missing))} after {timeout:g} seconds"
                )
            time.sleep(1.0)

    def _check_servers(self) -> None:
        """Refuse servers of another version or model, by name."""
        wanted = {"dtype": str(self._weights.dtype), "logprobs_mode": "raw_logprobs"}
        least = {"max_model_len": self._length, "max_logprobs": self._sampling.logprobs}
        own = engine_names(self._weights.shapes())
        for server in self._servers:
            try:
                version = server.version().partition("+")[0]
                if version != VLLM_VERSION:
                    raise ConfigError(f"rollout: {server} runs vLLM {version}; this needs {VLLM_VERSION}")
                model = server.settings()["model_config"]
                names = set(server.checksums()) if self._checksum_every else set()
            except (LostServerError, RefusedRequestError) as error:
                raise ConfigError(f"rollout: {server} cannot be used: {error}") from error
            wrong = [f"{key} is {model[key]}, not {value}" for key, value in wanted.items() if model[key] != value]
            wrong += [f"{key} is {model[key]}, below {value}" for key, value in least.items() if model[key] < value]
            if names:
                wrong += [f"only one of it and the student has {n}" for n in sorted(names ^ own)[:1]]
            if wrong:
                raise ConfigError(f"rollout: {server} serves {model['model']}, which does not fit: {'; '.join(wrong)}")

    # ---- rollouts ----

    def sync_weights(self, policy_version: int) -> None:
        """Send the student's weights to all servers, and compare what arrived."""
        label = f"{self._run}/{policy_version}"
        compare = self._checksum_every > 0 and self._syncs % self._checksum_every == 0
        sent = Digests(enabled=compare)

        def commit(server: VLLMClient) -> None:
            server.commit_weights(label)
            if compare and (found := server.checksums()):
                check_arrived(sent.by_name, found, str(server))

        def send() -> None:
            self._transfer.send(self._servers, sent, self._on_each)
            if self._ranks.first:
                self._on_each(commit)

        self._together(send)
        self._syncs += 1
        self._label, self._policy_version = label, policy_version

    def generate(self, prompts: Prompts, *, stream: int = 0) -> Rollout:
        """Have servers sample, and prove the responses on-policy. See `RolloutEngine.generate`."""
        requests = self._sampling.requests(prompts, stream)
        responses = self._together(lambda: self._ask_all(requests))
        rollout = self._sampling.pack(prompts, responses, self._policy_version, self._weights.device)
        return prove_on_policy(rollout, self._weights, self._limit)

    def close(self) -> None:
        """Stop the server that was started here."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def _together(self, action: Callable[[], T]) -> T:
        """Do something on all ranks or none. A server that one of them has lost is lost for all."""
        result = self._ranks.agree(action)
        for alive in self._ranks.collect([server.address for server in self._servers]):
            self._servers = [server for server in self._servers if server.address in alive]
        if not self._servers:
            raise RolloutError("no vLLM server is left that all processes can reach")
        return result

    def _ask_all(self, requests: Sequence[tuple[list[int], dict[str, Any]]]) -> list[Response]:
        """Responses, in the order of requests. They come back as they finish."""
        answers: dict[int, Answer] = {}
        with (
            ThreadPoolExecutor(min(len(requests), self._in_flight * len(self._servers))) as pool,
            LateBar(total=len(requests), desc="rollout", unit="response", disable=not self._ranks.first) as bar,
        ):
            places = {pool.submit(self._ask, place, *request): place for place, request in enumerate(requests)}
            try:
                for done in as_completed(places):
                    answers[places[done]] = done.result()
                    bar.update()
            except RolloutError:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [self._sampling.response(answers[i].tokens, answers[i].logprobs) for i in range(len(requests))]

    def _ask(self, place: int, tokens: list[int], parameters: dict[str, Any]) -> Answer:
        """One response, from whatever server is left."""
        failures: Counter[str] = Counter()
        while servers := self._servers:
            server = servers[place % len(servers)]
            try:
                answer = server.generate(tokens, parameters)
            except RefusedRequestError as error:
                raise RolloutError(f"{server} refused a request: {error}") from error
            except LostServerError as error:
                failures[server.address] += 1
                if error.hung or failures[server.address] == _ATTEMPTS:
                    self._lose(server, error)
                else:
                    time.sleep(_PAUSE_SECONDS)
            else:
                check_versions(answer.weight_versions, self._label, str(server))
                return answer
        raise RolloutError(f"no vLLM server is left; {self._why_lost}")

    def _on_each(self, call: Callable[[VLLMClient], None]) -> None:
        """Call something with every server, at the same time."""

        def attempt(server: VLLMClient) -> None:
            try:
                call(server)
            except (LostServerError, RefusedRequestError) as error:
                self._lose(server, error)

        with ThreadPoolExecutor(len(self._servers)) as pool:
            list(pool.map(attempt, self._servers))
        if not self._servers:
            raise RolloutError(f"no vLLM server is left; {self._why_lost}")

    def _lose(self, server: VLLMClient, reason: Exception) -> None:
        with self._lock:
            if server in self._servers:
                self._servers = [other for other in self._servers if other is not server]
                self._why_lost = f"{server} was lost: {reason}"
                print(f"{self._why_lost}; {len(self._servers)} left", file=sys.stderr, flush=True)

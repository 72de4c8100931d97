"""Sampling with one or more `vllm serve` processes, on this machine or on others."""

from __future__ import annotations

import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torchtune.modules import TransformerDecoder

from oprd_tune.config.checks import check_positive, check_whole
from oprd_tune.errors import ConfigError, RolloutError
from oprd_tune.metrics.progress import LateBar
from oprd_tune.protocols import Policy
from oprd_tune.ranks import Ranks
from oprd_tune.rollout.responses import Response
from oprd_tune.rollout.vllm.client import Answer, LostServerError, RefusedRequestError, VLLMClient
from oprd_tune.rollout.vllm.fingerprints import Digests, check_arrived
from oprd_tune.rollout.vllm.in_flight import InFlight
from oprd_tune.rollout.vllm.policy_weights import PolicyWeights
from oprd_tune.rollout.vllm.proof import PROOF_ROWS, PROOF_TOKENS, prove_on_policy
from oprd_tune.rollout.vllm.requests import Sampling, check_shared_arguments, check_versions, find_vllm
from oprd_tune.rollout.vllm.server_fit import ServerFit, wait_for_servers
from oprd_tune.rollout.vllm.server_process import ServerProcess
from oprd_tune.rollout.vllm.weight_transfer import FolderTransfer, NCCLTransfer, WeightTransfer, write_config
from oprd_tune.types import LogprobGap, Prompts, Rollout, SamplingRequest

_ATTEMPTS = 3
_PAUSE_SECONDS = 1.0
T = TypeVar("T")


@dataclass(kw_only=True, eq=False)
class VLLMServer:
    """Spreads requests over servers, and sends the student's weights to them.

    Without addresses, it starts a server on this machine's loopback interface. If a server ends, hangs or fails, it is
    lost: it is not used again, and the other servers get its requests. If no server is left, the run saves and ends.

    Attributes:
        temperature: 1 is on-policy; 0 is greedy.
        ahead: 1 samples each step's responses while the step before trains, with weights that are one step older.
        addresses: such as `http://host:8000`; None starts a server.
        transfer: how weights travel: `nccl` or `folder`; None takes `nccl` if the run computes on GPUs.
        shared_folder: the folder for weights, at the same path on all machines; None takes one in the run's folder.
        requests_in_flight: the most unanswered requests, for each server and each of the run's processes.
        timeout: seconds that a response or a sync may take before the server counts as lost.
        startup_timeout: seconds to wait for servers at the start.
        checksum_every_n_syncs: compare SHA-256 checksums of the servers' weights at every n-th sync; 0 never compares.
        gpu_memory_utilization: the share of a GPU's memory for a server started here.
        kv_cache_gib: the size of the cache of a server started here, instead of that share; None: 1 on a CPU.
        server_environment: environment variables of a server started here, such as CUDA_VISIBLE_DEVICES.
        server_arguments: further arguments of a server started here, such as `--tensor-parallel-size`, 2.
        logprob_gap_limit: the `limit` of `prove_on_policy`.

    Raises:
        ConfigError: if an argument is out of its range.
    """

    temperature: float = 1.0
    ahead: int = 0
    addresses: Sequence[str] | None = None
    transfer: str | None = None
    shared_folder: str | None = None
    requests_in_flight: int = 64
    timeout: float = 600.0
    startup_timeout: float = 600.0
    checksum_every_n_syncs: int = 1
    gpu_memory_utilization: float = 0.9
    kv_cache_gib: float | None = None
    server_environment: Mapping[str, Any] | None = None
    server_arguments: Sequence[str] = ()
    logprob_gap_limit: float | None = None

    samples_with_student: ClassVar[bool] = False
    free_on_resume: ClassVar[tuple[str, ...]] = (
        *("addresses", "transfer", "shared_folder", "requests_in_flight", "timeout", "startup_timeout"),
        *("checksum_every_n_syncs", "gpu_memory_utilization", "kv_cache_gib", "server_environment"),
        *("server_arguments", "logprob_gap_limit"),
    )

    def __post_init__(self) -> None:
        check_shared_arguments(self.temperature, self.gpu_memory_utilization, self.kv_cache_gib, self.logprob_gap_limit)
        if self.ahead not in (0, 1) or isinstance(self.ahead, bool):
            raise ConfigError(f"rollout.ahead is {self.ahead!r}; allowed are 0 and 1")
        check_whole("rollout.requests_in_flight", self.requests_in_flight)
        check_whole("rollout.checksum_every_n_syncs", self.checksum_every_n_syncs, at_least=0)
        check_positive("rollout.timeout", self.timeout)
        check_positive("rollout.startup_timeout", self.startup_timeout)
        given = self.addresses
        if given is not None and (isinstance(given, str) or not given or not all(str(a)[:4] == "http" for a in given)):
            raise ConfigError(f"rollout.addresses is {given!r}; give a list such as [http://host:8000], or null")
        self._process: ServerProcess | None = None
        self._lock, self._why_lost = threading.Lock(), ""
        self._asked: tuple[Prompts, InFlight] | None = None
        self._proof: tuple[Prompts, InFlight, Sampling] | None = None
        self._taken: Rollout | None = None
        self._gap: LogprobGap | None = None

    def check(self, device: torch.device, ranks: Ranks) -> None:
        """Raise ConfigError if `transfer` is not possible here, or if a server is to start but vLLM is missing."""
        if self.addresses is None:
            find_vllm(device)
        ways = ("folder", "nccl") if device.type == "cuda" else ("folder",)
        if self.transfer not in (None, *ways):
            raise ConfigError(f"rollout.transfer is {self.transfer!r}; allowed here: {', '.join(ways)}")

    def memory_bytes(
        self, model: TransformerDecoder, *, rows: int, columns: int, dtype: torch.dtype
    ) -> tuple[int, int]:
        """Zero, since servers have devices of their own."""
        return 0, 0

    def start(self, policy: Policy, request: SamplingRequest, *others: SamplingRequest) -> None:
        """Start a server, or wait for those at the addresses. Raises ConfigError if a server does not fit the run."""
        self._weights, self._ranks = PolicyWeights(policy), policy.ranks
        self._sampling = Sampling(request, policy.vocabulary, self.temperature)
        self._run, self._syncs = self._ranks.collect(uuid.uuid4().hex[:8])[0], 0
        self._label, self._policy_version = "", -1
        nccl = (self.transfer or ("nccl" if self._weights.device.type == "cuda" else "folder")) == "nccl"
        length = max(one.longest_row for one in (request, *others))
        logprobs = max(self._sampling.of(one).logprobs for one in (request, *others))
        fit = ServerFit(self._weights, length, logprobs, nccl, checksums=self.checksum_every_n_syncs > 0)
        folder = policy.folder.resolve()  # a server's working directory may be another
        shared = self.shared_folder
        place = Path(shared).expanduser().resolve() / self._run if shared else folder
        by_folder = None if nccl else FolderTransfer(self._weights, place)
        source = by_folder.write_start() if by_folder else write_config(self._weights, place)
        self._servers = self._find_servers(
            source, fit.arguments(self.gpu_memory_utilization, self.kv_cache_gib), folder / "server.log"
        )
        for server in self._servers:
            fit.check(server)
        if by_folder:
            by_folder.remove_start()
        self._transfer: WeightTransfer = by_folder or NCCLTransfer(self._weights, self._servers, self.timeout)

    def _find_servers(self, source: Path, arguments: list[str], log: Path) -> list[VLLMClient]:
        """Wait for the servers at the addresses, or for one that rank 0 starts, and return their clients."""
        addresses = self.addresses
        if addresses is None:
            if self._ranks.first:
                environment = {name: str(value) for name, value in (self.server_environment or {}).items()}
                own = [*arguments, *map(str, self.server_arguments)]
                self._process = ServerProcess(source, own, environment, log)
                self._process.wait_until_ready(self.startup_timeout)
            addresses = self._ranks.collect([self._process.address] if self._process else [])[0]
        servers = [VLLMClient(address, self.timeout) for address in addresses]
        wait_for_servers(servers, self.startup_timeout, source, arguments, tell=self._ranks.first)
        return servers

    def sync_weights(self, policy_version: int) -> None:
        """Send the student's weights to all servers, and compare checksums of what arrived.

        What was asked for before is waited for, since it is sampled with the weights that servers have until now.
        """
        self._settle()
        label = f"{self._run}/{policy_version}"
        compare = self.checksum_every_n_syncs > 0 and self._syncs % self.checksum_every_n_syncs == 0
        sent = Digests(enabled=compare and self._ranks.first)

        def announce() -> None:
            """Change the servers' label, so that no token sampled during the transfer carries the old one."""
            if self._ranks.first:
                self._on_each(lambda server: server.label_weights(f"{label}, on their way"))
                self._transfer.prepare(self._on_each)

        def commit(server: VLLMClient) -> None:
            server.commit_weights(label)
            if compare and (found := server.checksums()):
                check_arrived(sent.by_name, found, str(server))

        def send() -> None:
            self._transfer.send(self._servers, sent, self._on_each)
            if self._ranks.first:
                self._on_each(commit)

        self._together(announce)
        self._together(send)
        self._syncs += 1
        self._label, self._policy_version = label, policy_version

    def generate(self, prompts: Prompts, *, stream: int = 0, request: SamplingRequest | None = None) -> Rollout:
        """Have servers sample, and prove that the responses are on-policy."""
        sampling = self._sampling.of(request)
        rollout = self._receive(prompts, self._send(prompts, stream, sampling), sampling)
        return prove_on_policy(rollout, self._weights, self.logprob_gap_limit)

    def ask(self, prompts: Prompts, *, stream: int) -> None:
        """As in `SamplesAhead`. A few short responses are asked for too, for the proof."""
        few, short = prompts.among(prompts.positions[:PROOF_ROWS]), self._sampling.shortened(PROOF_TOKENS)
        self._proof = few, self._send(few, stream, short), short
        self._asked = prompts, self._send(prompts, stream, self._sampling)

    def prove(self) -> None:
        """As in `SamplesAhead`."""
        proof, self._proof = self._proof, None
        if proof is not None:
            asked, self._asked = self._asked, None  # which nobody takes if the proof fails
            self._gap = prove_on_policy(self._receive(*proof), self._weights, self.logprob_gap_limit).logprob_gap
            self._asked = asked

    def take(self) -> Rollout | None:
        """As in `SamplesAhead`."""
        self._settle()
        taken, self._taken = self._taken, None
        return taken

    def _settle(self) -> None:
        """Wait for what was asked for."""
        self.prove()
        asked, self._asked = self._asked, None
        if asked is not None:
            self._taken = replace(self._receive(*asked, self._sampling), logprob_gap=self._gap)

    def _send(self, prompts: Prompts, stream: int, sampling: Sampling) -> InFlight:
        at_once = self.requests_in_flight * len(self._servers)
        return InFlight(self._ask, sampling.requests(prompts, stream), at_once)

    def _receive(self, prompts: Prompts, in_flight: InFlight, sampling: Sampling) -> Rollout:
        """Wait for all responses."""

        def receive() -> list[Response]:
            with LateBar(total=len(in_flight), desc="rollout", unit="response", disable=not self._ranks.first) as bar:
                answers = in_flight.answers(bar.update)
            return [sampling.response(answer.tokens, answer.logprobs) for answer in answers]

        try:
            responses = self._together(receive)
        except KeyboardInterrupt:  # the second Ctrl-C: end without waiting for anything
            self.close()
            raise
        return sampling.pack(prompts, responses, self._policy_version, self._weights.device)

    def close(self) -> None:
        """Disconnect from all servers, and stop the one that was started here."""
        self._servers = []  # what still waits to be sent is not sent
        self._transfer.close()
        if self._process is not None:
            self._process.close()
            self._process = None

    def _together(self, action: Callable[[], T]) -> T:
        """Carry out an action on all ranks. A server that is lost on one rank is then lost on all."""
        result = self._ranks.agree(action)
        for alive in self._ranks.collect([server.address for server in self._servers]):
            self._servers = [server for server in self._servers if server.address in alive]
        if not self._servers:
            raise RolloutError("no vLLM server is left that all processes can reach")
        return result

    def _ask(self, place: int, tokens: list[int], parameters: dict[str, Any]) -> Answer:
        """Get one response, from another server if the first is lost."""
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
        """Call a function with every server, all at the same time."""

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

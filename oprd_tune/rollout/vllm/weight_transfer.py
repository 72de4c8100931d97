"""Two ways to send the student's weights to servers: NCCL, if both have GPUs, and a shared folder."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from oprd_tune.errors import RolloutError
from oprd_tune.rollout.vllm.client import VLLMClient
from oprd_tune.rollout.vllm.fingerprints import Checksums
from oprd_tune.rollout.vllm.policy_weights import PolicyWeights

_START = "start"


class WeightTransfer(Protocol):
    """A way to send weights to servers. `on_each` takes a function of a server and calls it for every server."""

    def prepare(self, on_each: Callable[..., None]) -> None:
        """Prepare servers for a transfer. Only rank 0 calls. A failure here comes before any weights are gathered."""

    def send(self, servers: Sequence[VLLMClient], checksums: Checksums, on_each: Callable[..., None]) -> None:
        """Send the student's weights to servers, and note their `checksums`. All ranks must call; rank 0 sends."""

    def close(self) -> None:
        """Free all resources, here and on servers."""


def write_config(weights: PolicyWeights, folder: Path) -> Path:
    """Write the engine's `config.json`, from which a server can start without weights. Returns the folder."""
    target = folder / _START
    if weights.ranks.first:
        target.mkdir(parents=True, exist_ok=True)
        (target / "config.json").write_text(json.dumps(weights.config, indent=1) + "\n")
    weights.ranks.wait()
    return target


class FolderTransfer:
    """Writes a Hugging Face folder, one file per block, and has servers read it. They must see it at the same path."""

    def __init__(self, weights: PolicyWeights, folder: Path) -> None:
        self._weights, self._folder = weights, folder
        self._count = 0

    def write_start(self) -> Path:
        """Write a config and weights from which a server can start. Returns the folder."""
        target = write_config(self._weights, self._folder)
        self._write(self._weights.parts(), target)
        return target

    def remove_start(self) -> None:
        """Remove the weights that `write_start` wrote, after servers have read them."""
        if self._weights.ranks.first:
            for file in (self._folder / _START).glob("*.safetensors"):
                file.unlink()

    def prepare(self, on_each: Callable[..., None]) -> None:
        """Do nothing: servers read the files after they are written."""

    def close(self) -> None:
        """Do nothing: files are removed as soon as servers have read them."""

    def send(self, servers: Sequence[VLLMClient], checksums: Checksums, on_each: Callable[..., None]) -> None:
        """Write the weights, and have servers read them."""
        self._count += 1
        target = self._folder / f"weights_{self._count % 2}"
        if self._weights.ranks.first:
            shutil.rmtree(target, ignore_errors=True)
        self._write(checksums.passing(self._weights.parts()), target)
        if self._weights.ranks.first:
            on_each(lambda server: server.load_weights(target))
            shutil.rmtree(target, ignore_errors=True)

    def _write(self, parts: Iterable[dict[str, Tensor]], target: Path) -> None:
        """Write each part. After a failure, go on gathering the parts, or other ranks would wait for this one."""
        failure: Exception | None = None
        for number, part in enumerate(parts):
            if not self._weights.ranks.first or failure is not None:
                continue
            try:
                # A tied head shares the embedding's memory, but a file may not hold the same memory twice.
                own = {name: w.clone() if name == "lm_head.weight" else w.contiguous() for name, w in part.items()}
                target.mkdir(parents=True, exist_ok=True)
                save_file(own, target / f"model-{number:05d}.safetensors", metadata={"format": "pt"})
            except (OSError, SafetensorError) as error:
                failure = error
        if failure is not None:
            shutil.rmtree(target, ignore_errors=True)  # a checkpoint may need the space
            raise RolloutError(f"the student's weights cannot be written to {target}: {failure}") from failure


class NCCLTransfer:
    """vLLM's own weight transfer: one broadcast from rank 0 to the GPUs of all servers.

    A transfer may take `timeout` seconds. Servers cannot be added later.
    """

    def __init__(self, weights: PolicyWeights, servers: Sequence[VLLMClient], timeout: float) -> None:
        from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

        class Source(WeightSource):
            """The student's weights, with the interface that vLLM expects."""

            checksums: Checksums
            passing: Iterator[dict[str, Tensor]] = iter(())

            def metadata(self) -> list[ParamMeta]:
                return [ParamMeta(name, weights.dtype, shape) for name, shape in weights.shapes().items()]

            def __iter__(self) -> Any:
                self.passing = iter(self.checksums.passing(weights.parts()))
                for part in self.passing:
                    yield from part.items()

        self._source = Source()
        sizes = [server.world_size() for server in servers] if weights.ranks.first else []
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        self._client = _AllServers(servers, sizes, timeout)
        self._engine = NCCLTrainerWeightTransferEngine.trainer_init(
            NCCLTrainerInitInfo(
                master_address=_address_towards(servers[0].address),
                master_port=port,
                world_size=1 + sum(sizes),
                rank=weights.ranks.rank,
                packed=False,  # packing reads parameters on CUDA streams that do not wait for the optimizer
            ),
            client=self._client,
            source=self._source,
        )

    def prepare(self, on_each: Callable[..., None]) -> None:
        """Start the update on all servers."""
        try:
            self._client.open_update()
        except OSError as error:
            raise RolloutError(f"vLLM's servers do not take new weights: {error}") from error

    def close(self) -> None:
        """Close the connection on the servers and here."""
        with suppress(OSError, RuntimeError):
            if self._engine.is_sender:
                self._client.shutdown_weight_transfer_engine()
            self._engine.shutdown()

    def send(self, servers: Sequence[VLLMClient], checksums: Checksums, on_each: Callable[..., None]) -> None:
        """Broadcast the weights. If a server is lost, the NCCL group is broken, and the run ends."""
        self._source.checksums = checksums
        try:
            self._engine.send_weights()
        except (OSError, RuntimeError) as error:  # from the HTTP client or from NCCL
            for _ in self._source.passing:  # take part in gathering to the end, as other ranks do
                pass
            raise RolloutError(f"the student's weights did not reach vLLM's servers over NCCL: {error}") from error


def _address_towards(server: str) -> str:
    """This host's address on the route to a server. No packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        route.connect((urlsplit(server).hostname, 9))
        return route.getsockname()[0]


class _AllServers:
    """Acts as vLLM's client for weight transfers, for several servers. Each gets its own ranks of the NCCL group."""

    def __init__(self, servers: Sequence[VLLMClient], sizes: Sequence[int], timeout: float) -> None:
        from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient

        self._clients = [HTTPVLLMWeightSyncClient(server.address, timeout) for server in servers]
        self._offsets = [1 + sum(sizes[:i]) for i in range(len(sizes))]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        infos = [{**init_info, "rank_offset": offset} for offset in self._offsets]
        self._each("init_weight_transfer_engine", infos)

    def open_update(self) -> None:
        """Start the update, before any rank gathers weights. vLLM's own call to start it then does nothing."""
        self._each("start_weight_update")

    def start_weight_update(self) -> None:
        pass

    def update_weights(self, update_info: Any) -> None:
        self._each("update_weights", [update_info] * len(self._clients))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._each("finish_weight_update", [weight_version] * len(self._clients))

    def shutdown_weight_transfer_engine(self) -> None:
        self._each("shutdown_weight_transfer_engine")

    def _each(self, method: str, arguments: Sequence[Any] | None = None) -> None:
        """Call all servers at the same time, because they wait for each other in these calls."""
        calls = [getattr(client, method) for client in self._clients]
        with ThreadPoolExecutor(len(calls)) as pool:
            list(pool.map(lambda call, *args: call(*args), calls, *([] if arguments is None else [arguments])))

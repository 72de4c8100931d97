"""An HTTP client for `vllm serve`, which must run with VLLM_SERVER_DEV_MODE=1 and --enable-scale-out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

VLLM_VERSION = "0.32.0"  # other versions have other endpoints for tokens and weights
_CONNECT_SECONDS = 5.0


class LostServerError(Exception):
    """A server does not answer, or it failed. `hung` means that it took too long."""

    def __init__(self, reason: str, *, hung: bool = False) -> None:
        super().__init__(reason)
        self.hung = hung


class RefusedRequestError(Exception):
    """A server rejects a request as wrong."""


@dataclass(frozen=True)
class Answer:
    """A sampled response: its ids, log-probabilities by id at each of them, and the labels of the sampling weights."""

    tokens: Sequence[int]
    logprobs: Sequence[Mapping[int, float]]
    weight_versions: Sequence[str]


class VLLMClient:
    """The client of one server, such as `http://127.0.0.1:8000`. It waits `timeout` seconds for a sign of an answer."""

    def __init__(self, address: str, timeout: float) -> None:
        self.address = address.rstrip("/")
        self._timeout = timeout

    def __str__(self) -> str:
        return self.address

    def is_ready(self) -> bool:
        """Whether the server answers and its engine runs."""
        try:
            self._call("GET", "health")
        except (LostServerError, RefusedRequestError):
            return False
        return True

    def version(self) -> str:
        """The version of vLLM."""
        return self._ask("GET", "version", "version")

    def settings(self) -> dict[str, Any]:
        """The server's vLLM configuration, by section."""
        return self._ask("GET", "server_info", "vllm_config", params={"config_format": "json"})

    def world_size(self) -> int:
        """The number of processes that hold the server's weights."""
        return self._ask("GET", "get_world_size", "world_size")

    def generate(self, tokens: list[int], parameters: Mapping[str, Any]) -> Answer:
        """Sample one response to a prompt's tokens, with vLLM's `SamplingParams`."""
        body = {"token_ids": tokens, "sampling_params": parameters}
        choices = self._ask("POST", "inference/v1/generate", "choices", json=body)
        try:
            (choice,) = choices
            if choice["finish_reason"] not in ("stop", "length"):
                raise LostServerError(f"it gave a response up: {choice['finish_reason']}; does another run use it?")
            return Answer(
                tokens=choice["token_ids"],
                logprobs=[
                    {top["token_id"]: top["logprob"] for top in (place, *place["top_logprobs"])}
                    for place in choice["logprobs"]["content"]
                ],
                weight_versions=[span["version"] for span in choice["weight_versions"]],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise LostServerError(f"an answer that is not vLLM's: {str(choices)[:300]}") from error

    def load_weights(self, folder: Path) -> None:
        """Have the server load the weights of a Hugging Face folder, which it must be able to read."""
        self._call("POST", "collective_rpc", json={"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})

    def label_weights(self, label: str) -> None:
        """Have the server return this label with each token that it samples from now on."""
        self._call("POST", "update_weight_version", json={"new_version": label})

    def commit_weights(self, label: str) -> None:
        """Clear the cache, which belongs to the previous weights, and label the present ones."""
        if not self._ask("POST", "reset_prefix_cache", "success"):
            raise LostServerError("it did not forget what it had cached with the old weights; does another run use it?")
        self.label_weights(label)

    def checksums(self) -> dict[str, str]:
        """The SHA-256 of each parameter; empty if several processes each hold a part of the weights."""
        found = self._ask("POST", "weight_checker", "checksums", json={"action": "checksum"})
        pieces = {name.rpartition(":")[0] for name in found}
        return {name.rpartition(":")[2]: digest for name, digest in found.items()} if len(pieces) == 1 else {}

    def _ask(self, method: str, path: str, key: str, **kwargs: Any) -> Any:
        """The value under `key` in an answer."""
        answer = self._call(method, path, **kwargs)
        try:
            return answer.json()[key]
        except (ValueError, KeyError, TypeError) as error:
            raise LostServerError(f"{path}: an answer that is not vLLM's: {answer.text[:300]}") from error

    def _call(self, method: str, path: str, **kwargs: Any) -> requests.Response:
        try:
            with requests.Session() as session:
                session.trust_env = False  # an internet proxy cannot reach this machine's loopback interface
                timeout = (_CONNECT_SECONDS, self._timeout)
                answer = session.request(method, f"{self.address}/{path}", timeout=timeout, **kwargs)
        except requests.ReadTimeout as error:
            raise LostServerError(f"no answer to {path} within {self._timeout:g} seconds", hung=True) from error
        except requests.RequestException as error:
            if "timed out" in str(error):  # in the middle of an answer
                raise LostServerError(f"{path} was not answered to its end", hung=True) from error
            raise LostServerError(f"no connection for {path} ({type(error).__name__})") from error
        if answer.status_code >= 500:
            raise LostServerError(f"{path} failed: {answer.text[:300]}")
        if answer.status_code == 404:
            raise RefusedRequestError(f"it has no {path}; start it with VLLM_SERVER_DEV_MODE=1 and --enable-scale-out")
        if not answer.ok:
            raise RefusedRequestError(f"{path}: {answer.text[:300]}")
        return answer

"""What is asked of a `vllm serve` process, over HTTP.

It has to run with VLLM_SERVER_DEV_MODE=1 and --enable-scale-out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

VLLM_VERSION = "0.32.0"  # its token and weight endpoints are not settled between versions
_CONNECT_SECONDS = 5.0


class LostServerError(Exception):
    """A server that does not answer, or answers with an error of its own; `hung` if it only took too long."""

    def __init__(self, reason: str, *, hung: bool = False) -> None:
        super().__init__(reason)
        self.hung = hung


class RefusedRequestError(Exception):
    """A server says that a request is wrong."""


@dataclass(frozen=True)
class Answer:
    """A sampled response: ids; for each, log-probabilities by id; and the labels of the weights that sampled it."""

    tokens: Sequence[int]
    logprobs: Sequence[Mapping[int, float]]
    weight_versions: Sequence[str]


class VLLMClient:
    """One server.

    Args:
        address: such as `http://127.0.0.1:8000`.
        timeout: seconds within which a request must be answered.
    """

    def __init__(self, address: str, timeout: float) -> None:
        self.address = address.rstrip("/")
        self._timeout = timeout

    def __str__(self) -> str:
        return self.address

    def is_ready(self) -> bool:
        """Whether it answers, and its engine runs."""
        try:
            self._call("GET", "health")
        except (LostServerError, RefusedRequestError):
            return False
        return True

    def version(self) -> str:
        """Of vLLM."""
        return self._call("GET", "version").json()["version"]

    def settings(self) -> dict[str, Any]:
        """vLLM's own configuration, by its parts."""
        return self._call("GET", "server_info", params={"config_format": "json"}).json()["vllm_config"]

    def world_size(self) -> int:
        """Processes that hold its weights."""
        return self._call("GET", "get_world_size").json()["world_size"]

    def generate(self, tokens: list[int], parameters: Mapping[str, Any]) -> Answer:
        """Sample one response.

        Args:
            tokens: of the prompt.
            parameters: vLLM's `SamplingParams`.
        """
        body = {"token_ids": tokens, "sampling_params": parameters}
        (choice,) = self._call("POST", "inference/v1/generate", json=body).json()["choices"]
        places = choice["logprobs"]["content"]
        return Answer(
            tokens=choice["token_ids"],
            logprobs=[
                {place["token_id"]: place["logprob"], **{t["token_id"]: t["logprob"] for t in place["top_logprobs"]}}
                for place in places
            ],
            weight_versions=[span["version"] for span in choice["weight_versions"]],
        )

    def load_weights(self, folder: Path) -> None:
        """Replace its weights by those of a Hugging Face folder that it can read."""
        self._call("POST", "collective_rpc", json={"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})

    def commit_weights(self, label: str) -> None:
        """Forget what was cached with the weights before, and give those that it has now a label."""
        if not self._call("POST", "reset_prefix_cache").json()["success"]:
            raise LostServerError("it did not forget what it had cached with the old weights; does another run use it?")
        self._call("POST", "update_weight_version", json={"new_version": label})

    def checksums(self) -> dict[str, str]:
        """SHA-256 by parameter, of a server whose weights are in one piece; otherwise nothing."""
        found = self._call("POST", "weight_checker", json={"action": "checksum"}).json()["checksums"]
        pieces = {name.rpartition(":")[0] for name in found}
        return {name.rpartition(":")[2]: digest for name, digest in found.items()} if len(pieces) == 1 else {}

    def _call(self, method: str, path: str, **kwargs: Any) -> requests.Response:
        try:
            with requests.Session() as session:
                session.trust_env = False  # a proxy for the internet knows nothing of this machine's loopback
                timeout = (_CONNECT_SECONDS, self._timeout)
                answer = session.request(method, f"{self.address}/{path}", timeout=timeout, **kwargs)
        except requests.ReadTimeout as error:
            raise LostServerError(f"no answer to {path} within {self._timeout:g} seconds", hung=True) from error
        except requests.RequestException as error:
            raise LostServerError(f"no connection for {path} ({type(error).__name__})") from error
        if answer.status_code >= 500:
            raise LostServerError(f"{path} failed: {answer.text[:300]}")
        if answer.status_code == 404:
            raise RefusedRequestError(f"it has no {path}; start it with VLLM_SERVER_DEV_MODE=1 and --enable-scale-out")
        if not answer.ok:
            raise RefusedRequestError(f"{path}: {answer.text[:300]}")
        return answer

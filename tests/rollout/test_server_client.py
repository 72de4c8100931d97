"""The client against a real HTTP server that plays vLLM's: what it asks, and what it makes of any answer."""

import json
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from oprd_tune.rollout.vllm.client import LostServerError, RefusedRequestError, VLLMClient

CHOICE = {
    "finish_reason": "stop",
    "token_ids": [7, 1],
    "logprobs": {
        "content": [
            {"token_id": 7, "logprob": -3.0, "top_logprobs": [{"token_id": t, "logprob": -t / 8} for t in (2, 4)]},
            {"token_id": 1, "logprob": -0.5, "top_logprobs": [{"token_id": 1, "logprob": -0.5}]},
        ]
    },
    "weight_versions": [{"start": 0, "version": "run/1"}, {"start": 1, "version": "run/2"}],
}


@contextmanager
def serving(answer):
    """A server whose `answer(method, path, body)` gives a status and what it says, text or JSON; yields a client."""

    class Handler(BaseHTTPRequestHandler):
        def reply(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, said = answer(self.command, self.path, json.loads(body or "null"))
            if status is None:  # gone in the middle of an answer
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
                return
            text = (said if isinstance(said, str) else json.dumps(said)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = reply

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield VLLMClient(f"http://127.0.0.1:{server.server_port}", timeout=5.0)
        finally:
            server.shutdown()


def always(status, said=""):
    return serving(lambda *_: (status, said))


@pytest.fixture
def nobody():
    """An address at which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{free.getsockname()[1]}"


@contextmanager
def recording(answers):
    """A server with an answer for each path, and what it was asked."""
    asked = []

    def answer(method, path, body):
        asked.append((method, path, body))
        return 200, answers[path]

    with serving(answer) as client:
        yield client, asked


def test_a_response_has_its_tokens_log_probabilities_and_weights():
    with recording({"/inference/v1/generate": {"choices": [CHOICE]}}) as (client, asked):
        answer = client.generate([4, 2], {"seed": 2**63 - 1, "temperature": 1.0})
    sent = {"token_ids": [4, 2], "sampling_params": {"seed": 2**63 - 1, "temperature": 1.0}}
    assert asked == [("POST", "/inference/v1/generate", sent)]
    assert answer.tokens == [7, 1]
    assert answer.logprobs == [{7: -3.0, 2: -0.25, 4: -0.5}, {1: -0.5}]
    assert answer.weight_versions == ["run/1", "run/2"]


def test_what_a_server_is_asked_about_itself():
    answers = {"/health": "", "/version": {"version": "0.32.0+cpu"}, "/get_world_size": {"world_size": 4}}
    answers["/server_info?config_format=json"] = {"vllm_config": {"model_config": {"dtype": "x"}}}
    with recording(answers) as (client, asked):
        assert client.is_ready()
        assert client.version() == "0.32.0+cpu"
        assert client.world_size() == 4
        assert client.settings() == {"model_config": {"dtype": "x"}}
    assert {method for method, _, _ in asked} == {"GET"}


def test_weights_are_loaded_and_then_labelled_once_the_cache_is_empty():
    answers = {"/collective_rpc": {}, "/reset_prefix_cache": {"success": True}, "/update_weight_version": {}}
    with recording(answers) as (client, asked):
        client.load_weights(Path("/shared/weights_1"))
        client.commit_weights("run/3")
    load = {"method": "reload_weights", "kwargs": {"weights_path": "/shared/weights_1"}}
    assert asked == [
        ("POST", "/collective_rpc", load),
        ("POST", "/reset_prefix_cache", None),
        ("POST", "/update_weight_version", {"new_version": "run/3"}),
    ]


def test_weights_get_no_label_while_the_old_ones_are_cached():
    with (
        recording({"/reset_prefix_cache": {"success": False}}) as (client, asked),
        pytest.raises(LostServerError, match="did not forget .* does another run use it") as lost,
    ):
        client.commit_weights("run/3")
    assert len(asked) == 1
    assert not lost.value.hung


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ({"dp0:pp0:pcp0:tp0:a.b": "x", "dp0:pp0:pcp0:tp0:c": "y"}, {"a.b": "x", "c": "y"}),
        ({"dp0:pp0:pcp0:tp0:a.b": "x", "dp0:pp0:pcp0:tp1:a.b": "y"}, {}),
        ({"dp0:pp0:pcp0:tp0:a.b": "x", "dp0:pp1:pcp0:tp0:c": "y"}, {}),
        ({}, {}),
    ],
)
def test_checksums_are_those_of_weights_in_one_piece(told, found):
    with recording({"/weight_checker": {"checksums": told}}) as (client, asked):
        assert client.checksums() == found
    assert asked == [("POST", "/weight_checker", {"action": "checksum"})]


@pytest.mark.parametrize("status", [500, 502, 503])
def test_an_error_of_the_servers_own_loses_it(status):
    with always(status, "engine died " * 100) as client:
        with pytest.raises(LostServerError, match=r"^inference/v1/generate failed: engine died ") as lost:
            client.generate([1], {})
        assert not client.is_ready()
    assert not lost.value.hung
    assert len(str(lost.value)) < 400


@pytest.mark.parametrize("status", [400, 403, 422])
def test_a_request_that_is_wrong_is_refused_in_its_words(status):
    with always(status, '{"error": "prompt too long"}') as client:
        with pytest.raises(RefusedRequestError, match='^inference/v1/generate: {"error": "prompt too long"}$'):
            client.generate([1], {})
        assert not client.is_ready()


def test_an_endpoint_that_is_missing_tells_how_to_start_a_server():
    with (
        always(404, '{"detail": "Not Found"}') as client,
        pytest.raises(
            RefusedRequestError,
            match="it has no weight_checker; start it with VLLM_SERVER_DEV_MODE=1 and --enable-scale-out",
        ),
    ):
        client.checksums()


def test_a_server_that_takes_too_long_hangs():
    wake = threading.Event()
    with serving(lambda *_: (wake.wait(20), (200, ""))[1]) as client:
        patience = VLLMClient(client.address, timeout=0.2)
        started = time.monotonic()
        with pytest.raises(LostServerError, match="no answer to version within 0.2 seconds") as lost:
            patience.version()
        assert lost.value.hung
        assert not patience.is_ready()
        assert time.monotonic() - started < 5
        wake.set()


def test_a_server_that_is_not_there_is_lost_but_does_not_hang(nobody):
    client = VLLMClient(nobody, timeout=5.0)
    with pytest.raises(LostServerError, match=r"no connection for version \(ConnectionError\)") as lost:
        client.version()
    assert not lost.value.hung
    assert not client.is_ready()


def test_a_connection_that_breaks_is_lost_but_does_not_hang():
    with always(None) as client:
        with pytest.raises(LostServerError, match=r"no connection for version") as lost:
            client.version()
        assert not lost.value.hung


def test_proxies_are_not_asked(monkeypatch, nobody):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, nobody)
        monkeypatch.setenv(name.upper(), nobody)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with always(200) as client:
        assert client.is_ready()


def test_addresses_may_end_with_a_slash():
    with recording({"/health": ""}) as (client, asked):
        slashed = VLLMClient(f"{client.address}/", timeout=5.0)
        assert slashed.is_ready()
        assert str(slashed) == slashed.address == client.address
    assert asked == [("GET", "/health", None)]


@pytest.mark.parametrize(
    "said", ["<html>", [], {"detail": "x"}, {"choices": []}, {"choices": [{**CHOICE, "weight_versions": None}]}]
)
def test_an_answer_that_is_not_vllms_is_a_lost_server(said):
    with always(200, said) as client, pytest.raises(LostServerError, match="an answer that is not vLLM's"):
        client.generate([1, 2], {})
    with always(200, said) as client, pytest.raises(LostServerError, match="version: an answer that is not vLLM's"):
        client.version()


@pytest.mark.parametrize("reason", ["abort", "repetition", None])
def test_a_response_that_was_given_up_is_a_lost_server(reason):
    choice = {**CHOICE, "finish_reason": reason}
    with (
        always(200, {"choices": [choice]}) as client,
        pytest.raises(LostServerError, match=f"gave a response up: {reason}"),
    ):
        client.generate([1, 2], {})

"""A server's process, from its start to its end. A package named vllm stands in for the real one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from oprd_tune.errors import ConfigError
from oprd_tune.rollout.vllm.client import VLLMClient
from oprd_tune.rollout.vllm.server_fit import wait_for_servers
from oprd_tune.rollout.vllm.server_process import ServerProcess

ROOT = Path(__file__).parents[2]
# Answers 200 to everything, with its arguments and environment; has a child, as vLLM's engine is one.
SERVER = """
import json, os, subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
print("\\n".join(f"line {i}" for i in range(20)), flush=True)
if "--die" in sys.argv:
    sys.exit("out of memory")
if "--fail" in sys.argv:
    print("ValueError: too long\\nand so on\\nRuntimeError: see above\\nresources leaked")
    sys.exit(1)
child = subprocess.Popen(["sleep", "0" if "--alone" in sys.argv else "60"])
print(f"child {child.pid}", flush=True)
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        said = json.dumps({"argv": sys.argv[1:], "env": dict(os.environ), "child": child.pid}).encode()
        self.send_response(503 if "--never" in sys.argv else 200)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)
host, port = (sys.argv[sys.argv.index(name) + 1] for name in ("--host", "--port"))
HTTPServer((host, int(port)), Handler).serve_forever()
"""
START = """
import sys, time
from pathlib import Path
from oprd_tune.rollout.vllm.client import VLLMClient
from oprd_tune.rollout.vllm.server_fit import wait_for_servers
from oprd_tune.rollout.vllm.server_process import ServerProcess
folder = Path(sys.argv[1])
server = ServerProcess(folder, sys.argv[2:], {"PYTHONPATH": str(folder)}, folder / "server.log")
server.wait_until_ready(30)
print(server.pid, flush=True)
time.sleep(60 if "--alone" in sys.argv else 0)
"""


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "vllm" / "entrypoints" / "openai"
    folder.mkdir(parents=True)
    for place in (folder, folder.parent, folder.parents[1]):
        (place / "__init__.py").touch()
    (folder / "api_server.py").write_text(SERVER)
    return tmp_path


def start(package, *arguments):
    environment = {"PYTHONPATH": str(package), "WHERE": "there"}
    return ServerProcess(Path("a model"), arguments, environment, package / "server.log")


def is_gone(pid, seconds=5.0):
    """Whether a process ends soon; a zombie has."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def told_by(server):
    import requests

    with requests.Session() as session:
        session.trust_env = False
        return json.loads(session.get(f"{server.address}/health", timeout=5).text)


def test_it_is_started_as_asked_and_leaves_nobody_behind(package, capfd):
    server = start(package, "--dtype", "float32")
    server.wait_until_ready(30)
    told = told_by(server)
    assert told["argv"][:4] == ["--model", "a model", "--dtype", "float32"]
    assert (told["env"]["VLLM_SERVER_DEV_MODE"], told["env"]["WHERE"]) == ("1", "there")
    assert told["env"]["PATH"] == os.environ["PATH"]
    assert server.address.startswith("http://127.0.0.1:")
    assert os.getsid(server.pid) != os.getsid(0)
    assert "line 19" in (package / "server.log").read_text()
    assert "line" not in (shown := capfd.readouterr().out)
    assert server.address in shown
    assert str(package / "server.log") in shown
    server.close()
    assert is_gone(server.pid)
    assert is_gone(told["child"])
    server.close()


def test_a_server_that_ends_is_told_with_the_end_of_its_log(package):
    server = start(package, "--die")
    with pytest.raises(ConfigError, match="rollout: vLLM's server ended; from .*server.log:\n") as error:
        server.wait_until_ready(30)
    assert str(error.value).splitlines()[1:] == [*(f"line {i}" for i in range(6, 20)), "out of memory"]


def test_errors_in_the_log_are_picked_out(package):
    server = start(package, "--fail")
    with pytest.raises(ConfigError) as error:
        server.wait_until_ready(30)
    assert str(error.value).splitlines()[1:] == ["ValueError: too long", "RuntimeError: see above"]


def test_a_server_that_is_never_ready_is_stopped(package):
    server = start(package, "--never")
    with pytest.raises(ConfigError, match="was not ready within 0.5 seconds; from"):
        server.wait_until_ready(0.5)
    assert is_gone(server.pid)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at a parent's end is Linux's")
@pytest.mark.parametrize("ending", ["--killed", "--by itself"])
def test_it_ends_with_the_process_that_started_it(package, ending):
    killed = ending == "--killed"
    command = [sys.executable, "-c", START, str(package), *(["--alone"] if killed else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment) as parent:
        pid = next(int(line) for line in parent.stdout if line.strip().isdigit())
        if killed:
            os.kill(parent.pid, signal.SIGKILL)
        assert parent.wait(30) == (-signal.SIGKILL if killed else 0)
    assert is_gone(pid)
    assert is_gone((package / "server.log").read_text().rpartition("child ")[2].split()[0])


def test_the_command_can_be_pasted_into_a_shell(capsys):
    server = VLLMClient("http://10.0.0.7:8123", timeout=1.0)
    server.is_ready = lambda: False
    arguments = ["--weight-transfer-config", '{"backend": "nccl"}']
    with pytest.raises(ConfigError, match="nothing answers at http://10.0.0.7:8123 after 0 seconds"):
        wait_for_servers([server], 0.0, Path("/a model"), arguments, tell=True)
    command = capsys.readouterr().out.splitlines()[1].strip()
    shell = subprocess.run(["sh", "-c", f"set -- {command}; echo $#"], capture_output=True, text=True, check=True)
    assert shell.stdout.strip() == "12"
    assert command.startswith("VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model '/a model'")
    assert command.endswith("--host 10.0.0.7 --port 8123")

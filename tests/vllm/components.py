"""An engine whose servers die when it hurts."""

import os
import signal
import threading
import time
from dataclasses import dataclass

from oprd_tune.rollout import VLLMServer

SLOW = 0.1  # seconds that each request waits, so that a batch has a middle


@dataclass(kw_only=True, eq=False)
class FragileServer(VLLMServer):
    """Kills servers at its addresses: in a batch, at a sync, or between the two.

    Attributes:
        record: a file for a line on each rollout: step, policy version, prompts.

    The environment variable MOMENTS says where, at which policy version, and whom: `batch 2 <pid>`.
    """

    record: str

    def start(self, policy, request):
        super().start(policy, request)
        self._moments = dict(moment.rsplit(" ", 1) for moment in os.environ["MOMENTS"].split(",") if moment)
        for server in self._servers:
            server.generate = lambda *args, ask=server.generate: (time.sleep(SLOW), ask(*args))[1]

    def _strike(self, moment, version):
        pid = int(self._moments.pop(f"{moment} {version}", -1))
        if pid >= 0:
            os.killpg(pid, signal.SIGKILL)

    def sync_weights(self, policy_version):
        transfer = self._transfer.send

        def send(servers, checksums, on_each):
            def each(call):
                self._strike("sync", policy_version)
                on_each(call)

            transfer(servers, checksums, each)

        self._transfer.send = send
        try:
            super().sync_weights(policy_version)
        finally:
            del self._transfer.send
        self._strike("between", policy_version)

    def generate(self, prompts, **kwargs):
        timer = threading.Timer(0.05, self._strike, ("batch", self._policy_version))
        timer.start()
        try:
            rollout = super().generate(prompts, **kwargs)
        finally:
            timer.join()
        with open(self.record, "a") as file:
            file.write(f"{kwargs['stream']} {rollout.policy_version} {list(prompts.positions)}\n")
        return rollout

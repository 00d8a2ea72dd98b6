"""Jobs on a Ray cluster: a task for each, which runs the job's process on a node.

The lease says who runs a job, as on one machine: a node that is lost extends it no more, and the job goes on at another one. A
process whose worker or task is gone ends itself (`job.Heart`).
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

LOST = 1  # exit status of a process that a lost or stopped task ran


class Cluster:
    """A cluster that this process is connected to. A job takes a GPU where the cluster has any, else a CPU."""

    def __init__(self, ray: Any, stopping: threading.Event) -> None:
        self.ray, self.stopping = ray, stopping
        gpus = min(1, ray.cluster_resources().get("GPU", 0))
        # A second attempt is the queue's: it has an owner of its own.
        self.task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0, scheduling_strategy="SPREAD")(_process)

    def run(self, arguments: Sequence[str]) -> int:
        """Run Python with these arguments on some node; the exit status. Stops the process when ``stopping`` is set."""
        task = self.task.remote(list(arguments))
        while not self.ray.wait([task], timeout=0.2)[0]:
            if self.stopping.is_set():
                self.ray.cancel(task)
        try:
            return int(self.ray.get(task))
        except self.ray.exceptions.RayError:
            return LOST


def _process(arguments: list[str]) -> int:
    """Run on a node: a process of its own, which ends with this task."""
    with subprocess.Popen([sys.executable, *arguments], stdin=subprocess.DEVNULL) as process:
        try:
            while process.poll() is None:
                time.sleep(0.2)  # a cancelled task is interrupted between two looks, not while it waits
            return process.returncode
        finally:
            process.terminate()

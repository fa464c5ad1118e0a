"""The script for Slurm on two nodes that are one machine. Opt-in: MAR_SLURM=1, as root, with slurm-wlm and munge."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "examples/slurm/train.sh"
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")

pytestmark = pytest.mark.skipif(
    os.environ.get("MAR_SLURM") != "1" or not all(map(shutil.which, PROGRAMS)),
    reason="needs MAR_SLURM=1, root, and slurm-wlm and munge",
)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass
class Cluster:
    """Slurm with two nodes on this machine.

    Attributes:
        folder: of its configuration, states and logs.
        env: what its commands need.
        daemons: its processes, by the node's name or "controller".
    """

    folder: Path
    env: dict[str, str]
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str) -> None:
        """Start the controller or a node."""
        command = ["slurmctld", "-c", "-D"] if name == "controller" else ["slurmd", "-D", "-N", name]
        with open(self.folder / f"{name}.out", "ab") as out:
            self.daemons[name] = subprocess.Popen(command, env=self.env, stdout=out, stderr=out)

    def fail(self, node: str) -> None:
        """Kill a node's daemon and all that it runs, as a power failure would."""
        self.daemons[node].kill()
        self.daemons[node].wait()
        tasks = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                env = (process / "environ").read_bytes()
            except OSError:  # it ended meanwhile
                continue
            if f"SLURMD_NODENAME={node}\0".encode() in env and str(self.folder).encode() in env:
                tasks.append(process)
        steps = {int((task / "stat").read_text().rsplit(")", 1)[1].split()[1]) for task in tasks}
        steps = {step for step in steps if Path(f"/proc/{step}/comm").read_text().startswith("slurmstepd")}
        # The step's daemon first: nothing tells the controller that its tasks end.
        for number in (*steps, *(int(task.name) for task in tasks)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)

    def run(self, *command: str) -> str:
        """Return what a command of Slurm prints."""
        return subprocess.run(command, env=self.env, check=True, capture_output=True, text=True).stdout

    def state(self, job: str) -> str:
        """Return the state of a job, as "RUNNING"."""
        return next(part[9:] for part in self.run("scontrol", "show", "job", job).split() if part[:9] == "JobState=")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    host = socket.gethostname()
    conf = tmp_path / "slurm.conf"
    conf.write_text(
        f"""ClusterName=two
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={free_port()}
SlurmUser=root
AuthType=auth/munge
StateSaveLocation={tmp_path}/state
SlurmdSpoolDir={tmp_path}/spool-%n
SlurmctldPidFile={tmp_path}/controller.pid
SlurmdPidFile={tmp_path}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdTimeout=10
ReturnToService=2
MpiDefault=none
SlurmdParameters=config_overrides
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=4 State=UNKNOWN
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.2 Port={free_port()} CPUs=4 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=60 State=UP
"""
    )
    (tmp_path / "state").mkdir()
    if subprocess.run(["munge", "-n"], capture_output=True).returncode:  # its daemon is not there
        Path("/run/munge").mkdir(exist_ok=True)
        shutil.chown("/run/munge", "munge")
        subprocess.run(["su", "-s", "/bin/sh", "munge", "-c", "munged"], check=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    cluster = Cluster(tmp_path, {**os.environ, "SLURM_CONF": str(conf), "PATH": path, "OMP_NUM_THREADS": "1"})
    cluster.env["MAR_RENDEZVOUS"] = f"127.0.0.1:{free_port()}"  # no name server knows node1
    for name in ("controller", "node1", "node2"):
        cluster.start(name)
    yield cluster
    for daemon in cluster.daemons.values():
        daemon.terminate()
    for daemon in cluster.daemons.values():
        daemon.wait(timeout=60)


def wait_for(true: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.5)


def images_seen(run: Path) -> list[int]:
    lines = (run / "log.jsonl").read_text().splitlines() if (run / "log.jsonl").exists() else []
    return [record["images"] for record in map(json.loads, lines) if "loss" in record]


def test_slurm_script_time_limit_and_lost_node_training_goes_on_to_its_end(cluster: Cluster) -> None:
    """Saved before the limit, requeued, a node lost and back, and the whole training in the end."""
    pictures, run, log = (cluster.folder / name for name in ("pictures", "run", "job.log"))
    for label in "ab":
        (pictures / label).mkdir(parents=True)
        for i in range(32):
            pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(pictures / label / f"{i}.png")
    images = 3_200
    job = cluster.run(
        *("sbatch", "--parsable", "--nodes", "2", "--gpus-per-node", "0", "--cpus-per-task", "1", "--time", "3"),
        *("--signal", "B:USR1@120", "--output", str(log), str(SCRIPT), "cifar10", "--data", str(pictures)),
        *("--images", str(images), "--out", str(run), "--save-every", "640", "--sample-every", "100000"),
        *("--flip", "False", "--model.classes", "2", "--log-every", "1"),
    ).strip()

    # The limit: whatever was learned is saved, and the job waits for its next turn.
    wait_for(lambda: log.exists() and "stopped and saved" in log.read_text(), 170, "a save in time")
    wait_for(lambda: cluster.state(job) == "PENDING", 60, "back in the queue")
    seen = images_seen(run)[-1]
    assert 0 < seen < images
    assert int((run / "latest").read_text().strip().rsplit("-", 1)[-1]) == seen

    # The next turn goes on from there; Slurm begins it after two minutes. Then a node fails.
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    wait_for(lambda: images_seen(run)[-1] > seen + 320, 300, "going on")
    assert images_seen(run)[len([i for i in images_seen(run) if i <= seen])] - seen <= 32
    cluster.fail("node2")
    wait_for(lambda: cluster.state(job) == "PENDING", 150, "back in the queue after a node failed")
    cluster.start("node2")

    # All turns together are the whole training.
    going = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")
    wait_for(lambda: cluster.state(job) not in going, 500, "the end")
    assert cluster.state(job) == "COMPLETED", log.read_text()[-3000:]
    assert images_seen(run)[-1] == images
    assert (run / "model.safetensors").exists()


def test_slurm_script_wrong_option_fails_without_going_back_to_the_queue(cluster: Cluster) -> None:
    log = cluster.folder / "job.log"
    job = cluster.run(
        *("sbatch", "--parsable", "--nodes", "2", "--gpus-per-node", "0", "--cpus-per-task", "1", "--time", "3"),
        *("--output", str(log), str(SCRIPT), "cifar10", "--data", str(cluster.folder / "nothing"), "--out", "x"),
    ).strip()
    wait_for(lambda: cluster.state(job) == "FAILED", 90, "the failure")
    assert "nothing" in log.read_text()
    assert "Restarts=0" in cluster.run("scontrol", "show", "job", job)

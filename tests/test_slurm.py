"""launch/slurm.sbatch on a Slurm of this machine's own: two nodes on loopback, a job that is requeued and resumes.

Needs root and `apt-get install --no-install-recommends slurmctld slurmd slurm-client`; munge's daemon is not used.
All it starts is ended and all it writes is in a temporary folder.
"""

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.slurm]

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("slurmctld", "slurmd", "sbatch", "scontrol")
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=requeue_delay=1
MpiDefault=none
ReturnToService=2
KillWait=30
JobRequeue=1
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=main Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def until(what, condition, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.5)
    pytest.fail(f"{what}: not within {seconds} s")


@pytest.fixture
def slurm(tmp_path):
    """The environment in which sbatch and scontrol speak to a Slurm of two nodes."""
    if missing := [name for name in NEEDED if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]:
        pytest.fail(f"these tests need {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client")
    if os.geteuid():
        pytest.fail("these tests start Slurm's daemons: they need root")
    folder = tmp_path / "slurm"
    for name in ("state", "spool-node1", "spool-node2"):
        (folder / name).mkdir(parents=True)
    user = pwd.getpwuid(os.geteuid()).pw_name
    host = socket.gethostname().split(".")[0]
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(folder=folder, user=user, host=host, ports=free_ports(3)))
    variables = {**os.environ, "SLURM_CONF": str(conf), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    started = []

    def daemon(*command):
        log = open(folder / f"{Path(command[0]).name}-{len(started)}.out", "w")  # noqa: SIM115
        started.append(subprocess.Popen(command, env=variables, stdout=log, stderr=log, start_new_session=True))
        log.close()

    try:
        daemon("slurmctld", "-D", "-f", str(conf))
        for node in ("node1", "node2"):
            daemon("slurmd", "-D", "-N", node, "-f", str(conf))
        idle = lambda: tell(variables, "sinfo", "--noheader", "--format=%T %D").strip() == "idle 2"
        until(f"two idle nodes ({folder})", idle, 60)
        yield variables
    finally:
        subprocess.run(["scancel", "--full", "--signal=KILL", "--user", user], env=variables, capture_output=True)
        subprocess.run(["scancel", "--user", user], env=variables, capture_output=True)
        time.sleep(2)
        for process in reversed(started):
            process.terminate()
        for process in started:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        end_what_is_left(folder)


def end_what_is_left(folder):
    """Steps outlive their daemon: whatever still has this test's configuration in its environment is ended."""
    for place in Path("/proc").glob("[0-9]*/environ"):
        try:
            ours = str(folder).encode() in place.read_bytes() and int(place.parent.name) != os.getpid()
        except OSError:
            continue
        if ours:
            os.kill(int(place.parent.name), signal.SIGKILL)


def lose(run, rank):
    """Kills the processes of one rank of a run."""
    killed = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            said, known = (place / "cmdline").read_bytes(), (place / "environ").read_bytes()
        except OSError:
            continue
        if str(run).encode() in said and b"embedjax" in said and f"\0SLURM_PROCID={rank}\0".encode() in b"\0" + known:
            os.kill(int(place.name), signal.SIGKILL)
            killed.append(place.name)
    assert killed


def tell(variables, *command):
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60).stdout


def steps(run):
    file = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines() if line.strip()] if file.exists() else []


def test_a_job_is_requeued_and_resumes(slurm, tmp_path, config_file):
    config = config_file(4000)
    run, log = tmp_path / "run", tmp_path / "job.log"
    variables = {
        **slurm,
        "EMBEDJAX": f"{sys.executable} -m embedjax",
        "EMBEDJAX_COORDINATOR": f"127.0.0.1:{free_ports(1)[0]}",
        "PYTHONPATH": str(ROOT),
        "JAX_NUM_CPU_DEVICES": "1",
    }
    command = ["sbatch", "--parsable", "--nodes=2", f"--output={log}", f"--chdir={tmp_path}", str(ROOT / "launch/slurm.sbatch")]
    sent = subprocess.run(
        [*command, str(config), "--run-dir", str(run)], env=variables, capture_output=True, text=True, timeout=60
    )
    assert sent.returncode == 0, sent.stderr
    job = sent.stdout.strip()
    told = lambda: f"{log}: {log.read_text() if log.exists() else 'nothing'}"
    until(f"the first steps; {told()}", lambda: len(steps(run)) > 5, 240)
    # What Slurm does before the time limit, by --signal: the processes of the step are asked to stop, not the script.
    subprocess.run(["scancel", "--signal=TERM", job], env=slurm, check=True)
    until("the job back in the queue", lambda: "restart 1" in log.read_text(), 120)
    saved = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal())
    before = len(steps(run))
    until("steps after the restart", lambda: len(steps(run)) > before + 5, 240)
    text = log.read_text()
    assert "exit 75" in text and "Restarts=1" in tell(slurm, "scontrol", "show", "job", job)
    # It went on where it had saved: no step is lost and none is made twice.
    assert steps(run)[: before + 5] == list(range(1, before + 6))
    assert saved == before
    # A process that is lost outright, as by the kernel for want of memory: srun's code is the signal's.
    lose(run, rank=1)
    until("the job back in the queue again", lambda: "restart 2" in log.read_text(), 240)
    assert "exit 137" in log.read_text() and (tmp_path / f"embedjax-{job}.lost").read_text() == "1\n"

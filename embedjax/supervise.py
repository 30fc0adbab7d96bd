"""A thin parent of each process of a run of several: when the child dies of another's death, the last line is still ours.

A lost peer makes jax's coordination service abort the process from a thread of its own, after pages of its own. Imports
nothing of ours, for it runs before jax is loaded: a process that has started threads should not be forked.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Mapping

LOST = 70
"""Exit code of a process that cannot go on without another."""

facts: dict[str, int] = {}
"""Of a run of several processes: which `process` this is, of what `count`; the exit `code` to come."""

_report: int | None = None


def several(variables: Mapping[str, str]) -> bool:
    """Whether this process was started as one of several, by what it finds in its environment."""
    if "EMBEDJAX_COORDINATOR" in variables or "JAX_COORDINATOR_ADDRESS" in variables:
        return True
    slurm = "SLURM_PROCID" in variables and "SLURM_STEP_NODELIST" in variables  # set by srun, not in a plain allocation
    counts = [variables.get("SLURM_NTASKS", 1) if slurm else 1, variables.get("OMPI_COMM_WORLD_SIZE", 1)]
    pod = "," in variables.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in variables
    return pod or max(map(int, counts)) > 1


def split() -> None:
    """Goes on in a child process. The parent passes signals to it, ends as it does, and explains an end it could not."""
    global _report
    alive, held = os.pipe()
    told, _report = os.pipe()
    child = os.fork()
    if child:
        os.close(alive)
        os.close(_report)
        sys.exit(_outlive(child, told))
    os.close(held)
    os.close(told)
    threading.Thread(target=_die_with_parent, args=(alive,), daemon=True).start()


def report(key: str, value: int) -> None:
    """Keeps a fact, and tells it to the parent if there is one."""
    facts[key] = value
    if _report is not None:
        with contextlib.suppress(OSError):
            os.write(_report, f"{key} {value}\n".encode())


def _die_with_parent(alive: int) -> None:
    os.read(alive, 1)  # returns when the parent's end is closed
    os.kill(os.getpid(), signal.SIGKILL)


def _outlive(child: int, told: int) -> int:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: _pass_on(child, number))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    facts.update((key, int(value)) for key, value in map(str.split, os.read(told, 1 << 16).decode().splitlines()))
    if "failed" not in facts and (status >= 0 or "code" in facts):  # it has said why, even if it died while it said good-bye
        return facts.get("code", status)
    who = f"process {facts['process']} of {facts['count']}" if "count" in facts else "this process"
    if "failed" in facts:
        code, why = LOST, "failed, or another process of the run is gone; the last lines above tell which"
    elif -status == signal.SIGABRT:
        code, why = LOST, "was ended by jax (SIGABRT): another process of the run is gone or cannot be reached"
    else:
        code, why = 128 - status, f"was ended by {signal.Signals(-status).name}"
    print(f"embedjax: {who} {why}. Start all of them again: the run goes on from its last save", file=sys.stderr, flush=True)
    return code


def _pass_on(child: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, number)

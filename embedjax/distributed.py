"""The processes of one run: how they start, meet, tell each other of errors and of being asked to stop.

Every process runs the same program on its part of the mesh. The first one writes files and speaks; the others are silent, but
for an error that is their own. They wait for each other only in `gather`, which has a name and a time limit.
"""

import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from embedjax import supervise
from embedjax.config import Distributed
from embedjax.config.errors import ConfigError, Elsewhere, EmbedjaxError, Lost

T = TypeVar("T")

# Seconds a process waits for the others before it ends: those that cannot come are then ended by its going.
FAREWELL = 15

_meetings = itertools.count()


def start(how: Distributed, variables: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes, if this one was started as one of several. To be called before any device is touched.

    Explicit by EMBEDJAX_COORDINATOR (host:port of the first process), EMBEDJAX_PROCESS_COUNT and EMBEDJAX_PROCESS_ID; found
    by jax on Slurm, TPU pods and Open MPI, and with EMBEDJAX_COORDINATOR=auto. Raises ConfigError, or Lost when not all came.
    """
    if not supervise.several(variables):
        return
    # jax would take SIGTERM for itself; ours is agreed on with the steps.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **_address(variables),
            initialization_timeout=how.start,
            heartbeat_timeout_seconds=how.heartbeat,
            shutdown_timeout_seconds=FAREWELL,
        )
    except ValueError as error:
        raise ConfigError(f"this process was started as one of several, but jax cannot tell which: {error}") from error
    except jax.errors.JaxRuntimeError as error:
        raise Lost(f"not all processes started within {how.start} s: {str(error).splitlines()[0]}") from error
    supervise.report("process", jax.process_index())
    supervise.report("count", jax.process_count())


def _address(variables: Mapping[str, str]) -> dict[str, Any]:
    coordinator = variables.get("EMBEDJAX_COORDINATOR", "auto")
    if coordinator == "auto":
        return {}
    try:
        count, index = int(variables["EMBEDJAX_PROCESS_COUNT"]), int(variables["EMBEDJAX_PROCESS_ID"])
    except (KeyError, ValueError) as error:
        raise ConfigError(
            "EMBEDJAX_COORDINATOR is set; EMBEDJAX_PROCESS_COUNT and EMBEDJAX_PROCESS_ID must be numbers beside it"
        ) from error
    if not 0 <= index < count:
        raise ConfigError(f"EMBEDJAX_PROCESS_ID is {index}; it must be from 0 to {count - 1}")
    return {"coordinator_address": coordinator, "num_processes": count, "process_id": index}


def first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return jax.process_index() == 0


def leave(code: int) -> None:
    """Ends this process of several, together with the others unless they are lost."""
    sys.stdout.flush()
    sys.stderr.flush()
    supervise.report("code", code)
    if code != supervise.LOST:
        with contextlib.suppress(Exception):
            jax.distributed.shutdown()
    os._exit(code)


def gather(name: str, number: int = 0, *, error: Exception | None = None, limit: float) -> np.ndarray:
    """Every process's number, on all of them. All have to come, within `limit` seconds, with a number or an error.

    Raises `error`; Elsewhere where there is none, but another process has one; Lost when not all came.
    """
    if jax.process_count() == 1:
        if error:
            raise error
        return np.array([number])
    # Not by name: a process with an error is ahead of the others, and waits where they come to next.
    key = f"embedjax-{next(_meetings)}"
    try:
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=int(limit * 1000))
    except jax.errors.JaxRuntimeError as failed:
        raise Lost(f"{name}: not all processes came there within {limit:.0f} s") from failed
    codes, numbers = multihost_utils.process_allgather(np.array([_code(error), number], np.int32)).T
    failed = np.flatnonzero(codes)
    if len(failed) and error is not None and failed[0] == jax.process_index():
        raise error
    if len(failed):
        raise Elsewhere(int(codes[failed[0]]))
    return numbers


def _code(error: Exception | None) -> int:
    """The exit code an error leads to, 0 for none."""
    return error.code if isinstance(error, EmbedjaxError) else 4 if isinstance(error, OSError) else int(error is not None)


@contextlib.contextmanager
def together(name: str, limit: float) -> Iterator[None]:
    """All processes leave the block, or none: an error of one is raised there, and ends the others. Inside, they must not
    wait for each other but in `gather`."""
    try:
        yield
    except (Elsewhere, Lost):
        raise
    except Exception as error:
        gather(name, error=error, limit=limit)
    else:
        gather(name, limit=limit)


def in_turn(name: str, act: Callable[[], T], limit: float) -> T:
    """What `act` gives, called by the first process before all others: they find what it has left in the run folder."""
    found = []
    with together(name, limit):
        if first():
            found.append(act())
    return found[0] if found else act()


def whole(tree: Any) -> Any:
    """A tree of global arrays as one that each process can read alone. All have to call it."""
    alone = lambda x: not isinstance(x, jax.Array) or x.is_fully_addressable
    return jax.tree.map(lambda x: x if alone(x) else multihost_utils.process_allgather(x, tiled=True), tree)


class Ballot:
    """What the processes tell each other at every step: asked to stop, or an error. Known to all one step later, so that none
    waits for it and all stop after the same step; at once to a process that is alone."""

    STOP = 1
    ERROR = 100
    """An error votes for this and its exit code."""

    def __init__(self, mesh: Mesh):
        self.alone = jax.process_count() == 1
        self.error: Exception | None = None
        self.last: jax.Array | None = None
        self._places = NamedSharding(mesh, P(mesh.axis_names))
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))
        self._votes: dict[int, jax.Array] = {}

    def draw(self, batches: Iterator[T], blank: Callable[[], T]) -> T:
        """The next batch. Where there is none for an error, `blank()`: the others expect a step before they can know."""
        if self.error is None:
            try:
                return next(batches)
            except Exception as error:
                if self.alone:
                    raise
                self.error = error
        return blank()

    def cast(self, stop: bool) -> bool:
        """To be called by all after each step: whether they are to stop after it. Raises an error that was met before."""
        if self.alone:
            return stop
        vote = self.ERROR + _code(self.error) if self.error else int(stop)
        earlier, self.last = self.last, self._largest(self._placed(vote))
        return self._read(earlier) == self.STOP

    def settle(self) -> None:
        """Raises an error met in the last step: before what it gave is used for more than another step."""
        self._read(self.last)

    def _read(self, vote: jax.Array | None) -> int:
        found = 0 if vote is None else int(vote)
        if found > self.ERROR:
            raise self.error or Elsewhere(found - self.ERROR)
        return found

    def _placed(self, vote: int) -> jax.Array:
        if vote not in self._votes:
            make = lambda index: np.full(1, vote, np.int32)
            self._votes[vote] = jax.make_array_from_callback((self._places.mesh.size,), self._places, make)
        return self._votes[vote]

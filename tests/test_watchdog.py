"""The watchdog fires for what takes too long while it is armed, and for nothing else."""

import subprocess
import sys
import time

from embedjax.watchdog import Watchdog

HANGS = """
import threading, time
from embedjax.watchdog import Watchdog

def hang():
    time.sleep(60)

with Watchdog(0.4) as watchdog:
    with watchdog.waiting("step 3", None):
        time.sleep(0.8)
    with watchdog.waiting("step 4", 0.1):
        time.sleep(0.8)
    print("step 4 took less than ten times what is usual", flush=True)
    with watchdog.waiting("step 5", 0.01):
        hang()
"""


def test_it_shows_the_stacks_and_exits_with_70():
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 70 and time.monotonic() - began < 30
    assert "step 4 took less" in done.stdout
    lines = done.stderr.splitlines()
    assert lines[-1].startswith("embedjax: step 5 takes far longer than usual")
    assert any("in hang" in line for line in lines) and any("in _watch" in line for line in lines)


def test_it_ends_with_its_block():
    with Watchdog(100) as watchdog, watchdog.waiting("a step", 1.0):
        assert watchdog.armed and watchdog.armed[1] == "a step"
    assert watchdog.armed is None and not watchdog._thread.is_alive()

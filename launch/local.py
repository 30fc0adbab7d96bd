"""Trains a config in several processes of this machine, and starts them again from the last save when one is lost.

    python launch/local.py 2 configs/quickstart.py --run-dir runs/two

The first argument is the number of processes; the rest goes to `embedjax train`. On GPUs each process gets an equal part of
them, on a CPU a device of its own. Asked to stop, by SIGTERM or Ctrl-C, all save the same step and this exits with 75.
Imports nothing that is not Python's own.
"""

import os
import signal
import socket
import subprocess
import sys
import time

SAVED, LOST = 75, 70
RESTARTS = int(os.environ.get("RESTARTS", 20))
# Seconds after one process has failed until the others are ended: they have to notice and to say why.
PATIENCE = float(os.environ.get("PATIENCE", 180))


def main() -> int:
    if len(sys.argv) < 3 or not sys.argv[1].isdecimal() or int(sys.argv[1]) < 1:
        print(__doc__, file=sys.stderr)
        return 2
    count, arguments = int(sys.argv[1]), sys.argv[2:]
    asked: list[int] = []
    children: list[subprocess.Popen] = []

    def stop(number: int, frame: object) -> None:
        asked.append(number)
        for child in children:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    lost = 0
    while True:
        children[:] = start(count, arguments)
        if asked:  # while they were started
            stop(asked[0], None)
        code = wait(children)
        if asked or code not in (SAVED, LOST):
            return code
        lost += code == LOST
        if lost > RESTARTS:
            return code
        print(f"exit {code}: starting {count} processes again from the last save", file=sys.stderr, flush=True)


def start(count: int, arguments: list[str]) -> list[subprocess.Popen]:
    """The processes of one attempt, each told where the first is, how many they are and which it is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"EMBEDJAX_COORDINATOR": f"127.0.0.1:{port}", "EMBEDJAX_PROCESS_COUNT": str(count)}
    command = [sys.executable, "-m", "embedjax", "train", *arguments]
    made = []
    for index in range(count):
        own = {"EMBEDJAX_PROCESS_ID": str(index), **devices(index, count)}
        # A group of its own each, so that Ctrl-C reaches this process alone, which passes it on once.
        made.append(subprocess.Popen(command, env={**os.environ, **shared, **own}, start_new_session=True))
    return made


def devices(index: int, count: int) -> dict[str, str]:
    """The GPUs of one process, where the machine has any to share."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(gpus())).split(",") if name]
    if len(visible) < count:
        return {}
    each = len(visible) // count
    return {"CUDA_VISIBLE_DEVICES": ",".join(visible[index * each : (index + 1) * each])}


def gpus() -> list[str]:
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(number) for number, _ in enumerate(listed.splitlines())]


def wait(children: list[subprocess.Popen]) -> int:
    """The exit code of the attempt: that of the first process that failed with a reason of its own."""
    failed: list[int] = []
    deadline = None
    while True:
        codes = [child.poll() for child in children]
        failed += [code for code in codes if code and code not in failed]
        if None not in codes:
            break
        if failed and deadline is None:
            deadline = time.monotonic() + PATIENCE
        if deadline and time.monotonic() > deadline:
            for child in children:
                child.kill()
        time.sleep(0.1)
    if not failed:
        return 0
    reasons = [code for code in failed if code not in (SAVED, LOST) and 0 < code < 128]
    # Ended by a signal, without a word: lost, but for one that was asked to stop before it could have anything to save.
    stopped = {SAVED, -signal.SIGTERM, 128 + signal.SIGTERM}
    return reasons[0] if reasons else SAVED if set(failed) <= stopped else LOST


if __name__ == "__main__":
    sys.exit(main())

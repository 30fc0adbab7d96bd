"""Asks another process for a plan, since a process has one set of devices, and passes on what it says."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from embedjax.config import Config, errors, serialize
from embedjax.config.errors import CheckFailed, ConfigError
from embedjax.plan import chips

# libtpu looks for a TPU's host otherwise, and refuses to be loaded twice on a machine.
TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def plan(
    config: Config,
    topology: str,
    *,
    search: bool = False,
    memory: float | None = None,
    tries: int = 8,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The plan of a config on a topology: {"topology", "devices", "limit_bytes", "steps": [...]}, with what to change
    ("changes", at most `tries`) where a step does not fit, or the largest batch ("largest_batch") if it is searched.

    `memory` is the GiB a device has, the chip's own by default. Raises ConfigError for a wrong topology or config.
    """
    wanted = chips.parse(topology)
    if wanted.platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        raise ConfigError(f"--topology {topology} needs the TPU compiler: pip install 'embedjax[plan]'")
    request = {
        "config": serialize.to_json(config),
        "topology": topology,
        "memory": memory,
        "search": search,
        "tries": tries,
        "cpu_devices": 0 if wanted.platform == "tpu" else wanted.devices,
    }
    found = _ask(request, wanted.platform, progress)
    return {"topology": wanted.text, "devices": wanted.devices, "limit_bytes": wanted.memory(memory), **found}


def fits(found: dict[str, Any]) -> bool:
    """Whether the plan, or some batch that was searched for, fits."""
    return found["largest_batch"] > 0 if "largest_batch" in found else all(step["fits"] for step in found["steps"])


def _ask(request: dict[str, Any], platform: str, progress: Callable[[str], None]) -> dict[str, Any]:
    variables = {**os.environ, "JAX_PLATFORMS": "cpu", **(TPU if platform == "tpu" else {})}
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", variables.get("XLA_FLAGS", ""))
    variables["XLA_FLAGS"] = flags
    with tempfile.TemporaryFile("w+") as noise:
        command = [sys.executable, "-m", "embedjax.plan.worker"]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=noise, env=variables, text=True
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request))
            process.stdin.close()
            for line in process.stdout:
                said = json.loads(line)
                if "result" in said:
                    return said["result"]
                if "error" in said:
                    raise getattr(errors, said["error"])(said["message"])
                if "traceback" in said:
                    raise RuntimeError(f"in the compiling process:\n{said['traceback']}")
                progress(said["progress"])
            code = process.wait()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        noise.seek(0)
        last = [line.strip() for line in noise if line.strip()][-1:]
    raise CheckFailed(f"the compiling process ended with {code} and no plan: {' '.join(last) or 'it said nothing'}")

"""The process a plan is made in, whose jax has other devices than the caller's: a request on standard input, JSON lines out.

python -m embedjax.plan.worker < request.json
"""

import json
import os
import sys
import traceback
from typing import Any


def answer(request: dict[str, Any], say) -> dict[str, Any]:
    """The plan of a request; `say` is called with a line on what is being compiled."""
    from embedjax import build
    from embedjax.config import serialize
    from embedjax.config.errors import ConfigError
    from embedjax.plan import chips, variants
    from embedjax.plan.measure import measure

    config = build.resolve(serialize.from_json(request["config"]))
    topology = chips.parse(request["topology"])
    limit = topology.memory(request["memory"])

    def measured(changed, told):
        say(f"compiling {told}")
        return measure(changed, topology, limit)

    if request["search"]:
        if limit is None:
            raise ConfigError(f"--search on {request['topology']} needs --memory: how much a device has is not known")
        seen: dict[int, list] = {}

        def fits(rows: int) -> bool:
            seen[rows] = measured(variants.with_batch(config, rows), f"batch {rows}")
            return all(step["fits"] for step in seen[rows])

        unit = topology.devices * config.optim.accumulate * config.optim.cached
        best = variants.search(fits, config.data.batch_size, unit)
        tried = {str(rows): all(step["fits"] for step in seen[rows]) for rows in sorted(seen)}
        return {"steps": seen[best or min(seen)], "largest_batch": best, "tried_batches": tried}
    found: dict[str, Any] = {"steps": measured(config, f"batch {config.data.batch_size}")}
    if not all(step["fits"] for step in found["steps"]):
        found["changes"] = []
        for told, changed in variants.smaller(config, topology.devices):
            if len(found["changes"]) >= request["tries"]:
                break
            steps = measured(changed, told)
            well = all(step["fits"] for step in steps)
            worst = max(steps, key=lambda step: step["needed_bytes"] or 0)
            found["changes"].append({"change": told, "fits": well, "needed_bytes": worst["needed_bytes"]})
    return found


def main() -> None:
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries write to standard output too
    write = lambda **line: print(json.dumps(line), file=out, flush=True)
    request = json.loads(sys.stdin.read())
    import jax

    jax.config.update("jax_enable_compilation_cache", False)  # programs for devices that are not here cannot be read back
    if request["cpu_devices"]:
        jax.config.update("jax_num_cpu_devices", request["cpu_devices"])
    from embedjax.config.errors import EmbedjaxError

    try:
        write(result=answer(request, lambda line: write(progress=line)))
    except EmbedjaxError as error:
        write(error=type(error).__name__, message=str(error))
    except Exception:
        write(traceback=traceback.format_exc())


if __name__ == "__main__":
    main()

"""The trainer's own training step of a config, on columns that are given: for the scripts beside this file."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from embedjax import build, objective, sharding, step
from embedjax.config import Config


class Step:
    """A compiled step of a config with one data set, on the first device, and its state; random weights but for `towers`."""

    def __init__(
        self,
        config: Config,
        columns: Mapping[str, Any],
        towers: Mapping[str, Any] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.clock = clock
        config = build.resolve(config)
        mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
        made, (task,) = build.parts(config, mesh), config.data.sets

        def start() -> step.TrainState:
            last, *keys = jax.random.split(jax.random.key(0), 1 + len(made.embedders))
            named = zip(made.embedders.items(), keys, strict=True)
            params = {"towers": {name: embedder.init(key) for (name, embedder), key in named}}
            loss = objective.loss_params(task, config.model, made.embedders, last)
            return step.init_state(params | ({"loss": loss} if loss else {}), made.tx)

        self.state = jax.jit(start, out_shardings=jax.tree.map(lambda x: x.sharding, made.abstract))()
        if towers:
            placed = sharding.put({"towers": towers}, mesh)
            self.state = self.state._replace(params=self.state.params | placed)
        self.columns = sharding.place(columns, mesh)
        self.traced = made.steps[task.name].trace(self.state, {}, self.columns)
        self.compiled = self.traced.lower().compile()
        self.metrics: dict[str, jax.Array] = {}

    def __call__(self) -> float:
        """Takes a step; its seconds by the clock."""
        start = self.clock()
        self.state, self.metrics = self.compiled(self.state, {}, self.columns)
        jax.block_until_ready((self.state, self.metrics))
        return self.clock() - start

    @property
    def loss(self) -> float:
        """That of the last step."""
        return float(self.metrics["loss"])

    @property
    def extra_memory(self) -> float:
        """GB the program needs besides its arguments and results, as the compiler counts them."""
        found = self.compiled.memory_analysis()
        return (0 if found is None else found.temp_size_in_bytes) / 2**30

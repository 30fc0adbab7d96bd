"""Memory of the ring loss per device on 8 simulated devices, from the compiled program: nothing is run.

    python tests/benchmarks/ring.py [--sizes 32768,262144,1048576] [--criterion symmetric] [--width 512] [--devices 8]

Extra is what value and gradient take beyond inputs and gradients. Inf-CL's published memory of the loss on 8 GPUs (Cheng et
al. 2024, table 1) stands beside it where it was published.
"""

import argparse
import os
import time

INF_CL = {32768: 0.18, 262144: 1.45}
CRITERIA = {
    "softmax": {},
    "symmetric": {"directions": ("q2d", "d2q"), "partition": "per_direction"},
    "joint": {"directions": ("q2d", "d2q", "q2q", "d2d")},
    "sigmoid": {},
}


def measured(size: int, criterion: str, width: int, tile: int) -> tuple[float, float, float, float]:
    """GB per device of inputs, gradients and the rest, and seconds to compile."""
    import jax
    import jax.numpy as jnp

    from embedjax import config, objective, sharding
    from embedjax.models.embedder import Embedder

    mesh = sharding.make_mesh(config.Mesh())
    kind = config.Siglip if criterion == "sigmoid" else config.MultipleNegatives
    loss = kind(form="ring", tile=tile, mask_duplicates=False, **CRITERIA[criterion])
    arch = config.Bert(width=width, depth=1, heads=1)
    task = config.Set(columns={"anchor": "a", "positive": "b"}, loss=loss)
    model, embedders = config.Model({"text": config.Tower(arch=arch)}), {"text": Embedder(arch)}
    made = objective.make(task, model, embedders, mesh)
    params = {"loss": objective.loss_params(task, model, embedders, jax.random.key(0))}

    def value(anchor, positive):
        return made.loss(params, {"anchor": anchor, "positive": positive[:, None]}, (None, None), None)[0]

    vectors = jax.ShapeDtypeStruct((size, width), jnp.float32, sharding=sharding.rows(mesh))
    start = time.perf_counter()
    gradient = jax.jit(jax.value_and_grad(value, (0, 1)), out_shardings=(sharding.replicated(mesh), sharding.rows(mesh)))
    memory = gradient.lower(vectors, vectors).compile().memory_analysis()
    seconds = time.perf_counter() - start
    sizes = (memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes)
    return *(x / 1e9 for x in sizes), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="32768,262144,1048576", help="global batch sizes")
    parser.add_argument("--criterion", choices=CRITERIA, default="symmetric")
    parser.add_argument("--width", type=int, default=512, help="numbers of an embedding")
    parser.add_argument("--devices", type=int, default=8, help="simulated devices")
    parser.add_argument("--tile", type=int, default=0, help="columns of a tile; 0 for the form's own choice")
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    jax.config.update("jax_num_cpu_devices", options.devices)
    print(f"{options.criterion}, D = {options.width}, {options.devices} devices; GB per device\n")
    print("| global B | inputs | gradients | extra | scores B x B / devices | Inf-CL, published | compile, s |")
    print("|---|---|---|---|---|---|---|")
    for size in map(int, options.sizes.split(",")):
        inputs, gradients, extra, seconds = measured(size, options.criterion, options.width, options.tile)
        published = INF_CL.get(size, "")
        scores = size * size * 4 / options.devices / 1e9
        print(
            f"| {size} | {inputs:.3f} | {gradients:.3f} | {extra:.3f} | {scores:.1f} | {published} | {seconds:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

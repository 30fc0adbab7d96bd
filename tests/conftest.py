"""Eight simulated devices, strict shapes, and the folder of real data sets for every test."""

import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
# XLA aborts a collective whose threads do not all arrive in time, which busy cores make likely.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_collective_call_terminate_timeout_seconds=600"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """The folder of real data sets: $EMBEDJAX_DATA, else ../shared/data beside the checkout."""
    default = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = pathlib.Path(os.environ.get("EMBEDJAX_DATA", default))
    if not folder.is_dir():
        pytest.fail(f"these tests read real data sets: set EMBEDJAX_DATA to their folder ({folder} does not exist)")
    return folder

"""Rates, utilisation and what the status line says."""

import io
import os

import jax
import jax.numpy as jnp
import pytest

from embedjax import config
from embedjax.config.errors import NonFiniteError
from embedjax.metrics.pace import Pace, peak_flops, train_flops
from embedjax.metrics.progress import Progress, Status, duration
from embedjax.models.embedder import Embedder
from embedjax.models.image import ImageEmbedder
from embedjax.plan.flops import flops


def test_rates_count_pairs_and_waiting():
    now = [0.0]
    pace = Pace(clock=lambda: now[0])
    for _ in range(5):
        now[0] += 2.0
        pace.step(64, flops=1e9, waited=0.5)
    assert pace.rates() == pytest.approx({"pairs_per_second": 32.0, "data_wait": 0.25})
    assert pace.utilization(1e9) == pytest.approx(0.5)
    assert pace.utilization(None) is None


def test_a_pause_between_steps_does_not_count():
    now = [0.0]
    pace = Pace(clock=lambda: now[0])
    now[0] = 100.0
    pace.restart()
    now[0] = 101.0
    pace.step(10, 0.0, 0.0)
    assert pace.rates()["pairs_per_second"] == pytest.approx(10.0)


def test_flops_of_bert_base_are_six_per_parameter_and_token():
    arch = config.Bert()
    blocks = arch.depth * (4 * arch.width**2 + 2 * arch.width * arch.mlp)
    assert train_flops(arch, 1, 1) == pytest.approx(6 * blocks, rel=0.01)
    assert train_flops(arch, 2, 128) > 2 * 128 * 6 * blocks


SIZES = {"width": 64, "depth": 4, "heads": 2, "mlp": 256}


@pytest.mark.parametrize(
    "embedder",
    [
        ImageEmbedder(config.Vit(image=32, patch=8, **SIZES)),
        ImageEmbedder(config.Vit(image=32, patch=8, pool="mean", **SIZES)),
        Embedder(config.ClipText(vocab_size=50, positions=16, **SIZES), "lasttoken"),
        Embedder(config.Bert(vocab_size=50, positions=16, **SIZES)),
    ],
    ids=lambda embedder: type(embedder.arch).__name__,
)
def test_flops_are_those_of_the_traced_products(embedder):
    """But for the gradient of the pixels, which nobody asks for, and the attention of one token in the last layer."""
    column, length = {"ids": jnp.ones((3, 16), jnp.int32), "mask": jnp.ones((3, 16), bool)}, 16
    if isinstance(embedder, ImageEmbedder):
        column, length = {"pixels": jnp.zeros((3, 32, 32, 3), jnp.uint8)}, embedder.arch.tokens
    gradient = jax.grad(lambda params: embedder.apply(params, column).pooled.sum())
    traced = flops(jax.make_jaxpr(gradient)(jax.eval_shape(embedder.init, jax.random.key(0))))
    assert train_flops(embedder.arch, 3, length) == pytest.approx(traced.total, rel=0.06)


def test_known_chips_have_a_peak_and_a_cpu_has_none():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("TPU v5 lite") == 197e12 and peak_flops("TPU v5p") == 459e12
    assert peak_flops("cpu") is None


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.6, "1m00s"), (188, "3m08s"), (7500, "2h05m"), (float("inf"), "?")]
)
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_one_line_that_is_rewritten_and_a_file_plain_lines():
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        status = Status(stream)
        status.show("step 1")
        status.show("step 2")
        status.line("done")
    assert terminal.getvalue().count("\n") == 1 and terminal.getvalue().endswith("\r\x1b[Kdone\n")
    assert file.getvalue() == "step 1\nstep 2\ndone\n"


def metrics(loss=1.0, bad=0):
    values = {"loss": loss, "grad_norm": 1.0, "learning_rate": 1e-3, "skipped": bad, "in_a_row": bad, "top1": 0.5}
    return {key: jnp.asarray(value) for key, value in values.items()}


def test_a_reader_that_went_away_does_not_stop_what_is_shown():
    """As after `embedjax train CONFIG | head`."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        status = Status(stream)
        for show in (status.line, status.show, status.line):
            show("step 1")
        assert os.path.samestat(os.fstat(stream.fileno()), os.stat(os.devnull))  # what comes later is not tried in vain


def test_the_status_line_has_what_a_person_looks_for():
    out = io.StringIO()
    progress = Progress(status=Status(out), writer=None, start=0, steps=2, pairs=64, log_every=1, peak=1e12)
    progress.read(1, "a", 1e9, metrics())
    progress.read(2, "a", 1e9, metrics(0.5))
    last = out.getvalue().splitlines()[-1]
    for word in (
        "step 2/2 100%",
        "eta 0s",
        "pairs/s",
        "loss 0.500 (avg 0.990)",
        "top1 0.50",
        "lr 1.0e-03",
        "grad",
        "data wait",
        "util",
    ):
        assert word in last
    assert progress.summary().startswith("trained 2 steps") and progress.summary().endswith(" pairs/s, data wait 0.0%")


def test_the_summary_has_the_share_of_all_steps_but_the_first_of_a_shape(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    progress = Progress(status=Status(io.StringIO()), writer=None, start=0, steps=5, pairs=10, log_every=1, peak=None)
    progress.pace = Pace(lambda: now[0])
    for step, (waited, whole) in enumerate([(9.0, 9.0), (0.5, 2.0), (0.0, 1.0), (0.25, 1.0), (0.25, 1.0)], 1):
        with progress.waiting():
            now[0] += waited
        now[0] += whole - waited
        progress.read(step, "a", 1.0, metrics())
    assert progress.summary() == "trained 5 steps, 8 pairs/s, data wait 20.0%"


def test_the_third_bad_step_in_a_row_stops():
    progress = Progress(status=Status(io.StringIO()), writer=None, start=0, steps=9, pairs=1, log_every=1, peak=None)
    for n in (1, 2):
        progress.read(n, "a", 0.0, metrics(float("nan"), n))
    with pytest.raises(NonFiniteError, match="step 3: .* 3 steps in a row"):
        progress.read(3, "a", 0.0, metrics(float("nan"), 3))

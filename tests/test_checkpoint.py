"""Saves: bitwise on any mesh, only whole ones used, kept or removed by rule, and none lost to a kill."""

import functools
import json
import logging
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from embedjax import checkpoint
from embedjax.checkpoint import Checkpoints
from embedjax.config.errors import StorageError

TX = optax.adam(1e-3)


class State(NamedTuple):
    step: jax.Array
    params: dict
    opt_state: optax.OptState
    extra: dict


@functools.cache
def builder(devices):
    """seed -> a state after one update, its matrices split over the devices."""
    mesh = jax.make_mesh((devices,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])

    def build(seed):
        kernel, half = jnp.sin(jnp.arange(64.0) + seed).reshape(16, 4), jnp.arange(8, dtype=jnp.bfloat16) / 3
        params = {"towers": {"text": {"kernel": kernel, "half": half}}, "loss": {"scale": jnp.float32(seed)}}
        _, opt_state = TX.update(params, TX.init(params), params)
        return State(jnp.int32(seed), params, opt_state, {"skipped": jnp.int32(2)})

    shardings = jax.tree.map(lambda x: NamedSharding(mesh, P("fsdp") if x.ndim == 2 else P()), jax.eval_shape(build, 0))
    return jax.jit(build, out_shardings=shardings)


@functools.cache
def make_state(seed=0, devices=1):
    return builder(devices)(seed)


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture
def saves(tmp_path):
    with Checkpoints(tmp_path / "checkpoints", keep=2, best="sts/spearman") as opened:
        yield opened


def fill(saves, steps, state=None, metrics=None):
    state = make_state() if state is None else state
    for step in steps:
        saves.save(step, state, position=step + 1, config={"name": "x"}, metrics=(metrics or {}).get(step))
    saves.wait()


def files_of(folder, step):
    return sorted((folder / "checkpoints" / str(step) / "state").rglob("*.ocdbt")) + sorted(
        file for file in (folder / "checkpoints" / str(step) / "state").rglob("d/*") if file.is_file()
    )


def flip(file):
    """One bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_states_come_back_bitwise_on_another_mesh(saves):
    first = make_state(7)
    saves.save(
        3, first, position=12, config={"name": "quick", "optim": {"b1": 0.9}}, metrics={"sts/spearman": 0.5, "bad": np.nan}
    )
    on_four, record = saves.restore(None, abstract(make_state(0, 4)))
    assert (record.step, record.position, record.config) == (3, 12, {"name": "quick", "optim": {"b1": 0.9}})
    assert record.metrics == {"sts/spearman": 0.5}
    assert_same(on_four, first)
    saves.save(4, on_four, position=13, config={})
    on_eight, _ = saves.restore(4, abstract(make_state(0, 8)))
    assert_same(on_eight, first)
    assert len(on_eight.params["towers"]["text"]["kernel"].sharding.device_set) == 8
    on_host, _ = saves.restore(4, jax.eval_shape(lambda: first))
    assert_same(on_host, first)
    assert isinstance(on_host.params["loss"]["scale"], np.ndarray)


def test_the_state_may_be_donated_while_it_is_saved(saves):
    make = jax.jit(lambda: {"params": {"w": jnp.arange(2.0**19)}})
    change = jax.jit(lambda s: jax.tree.map(lambda x: -x - 1, s), donate_argnums=0)
    state = make()
    saves.save(1, state, position=1, config={})
    for _ in range(3):
        state = jax.block_until_ready(change(state))
    params, step = saves.params_only()
    assert step == 1
    np.testing.assert_array_equal(params["w"], np.arange(2.0**19, dtype=np.float32))


def test_params_come_alone_from_the_best_whole_step(saves, tmp_path):
    fill(saves, [1], make_state(1), {1: {"sts/spearman": 0.9}})
    fill(saves, [2], make_state(2), {2: {"sts/spearman": 0.8}})
    params, step = saves.params_only()
    assert step == 1
    assert_same(params, jax.tree.map(np.asarray, make_state(1).params))
    params, step = saves.params_only(2)
    assert step == 2 and params["loss"]["scale"] == 2
    flip(files_of(tmp_path, 1)[0])
    assert saves.params_only()[1] == 2


def test_the_latest_and_the_best_are_kept(saves, tmp_path):
    fill(saves, range(1, 7), metrics={2: {"sts/spearman": 0.7}, 3: {"sts/spearman": 0.6}, 4: {"sts/spearman": np.nan}})
    assert (saves.steps(), saves.latest(), saves.best()) == ([2, 5, 6], 6, 2)
    assert sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir()) == ["2", "5", "6"]
    fill(saves, [7], metrics={7: {"sts/spearman": 0.7}})
    assert (saves.steps(), saves.best()) == ([6, 7], 7)


def test_scores_may_come_after_their_save(saves, tmp_path):
    """They choose the best save, what they are not any more is removed, and the save stays whole."""
    fill(saves, [1], make_state(1), {1: {"sts/spearman": 0.6}})
    saves.save(2, make_state(2), position=2, config={})
    assert saves.annotate(2, {"sts/spearman": 0.5, "bad": np.nan})
    assert (saves.best(), saves.record(2).metrics, saves.record(2).position) == (1, {"sts/spearman": 0.5}, 2)
    assert saves.annotate(2, {"sts/spearman": 0.7}) and saves.best() == 2
    fill(saves, [3, 4])
    assert saves.steps() == [2, 3, 4]
    assert saves.annotate(4, {"sts/spearman": 0.8})
    assert saves.steps() == [3, 4] and not (tmp_path / "checkpoints" / "2").exists()
    with Checkpoints(tmp_path / "checkpoints", best="sts/spearman") as other:
        assert other.best() == 4 and other.restore(4, abstract(make_state()))[1].metrics == {"sts/spearman": 0.8}
    assert saves.annotate(9, {"sts/spearman": 0.9}) is False


def test_scores_that_cannot_be_written_leave_the_save_as_it_was(saves, tmp_path, monkeypatch):
    fill(saves, [1], metrics={1: {"sts/spearman": 0.6}})

    def dies(file, target):
        raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr(checkpoint.Path, "rename", dies)
    with pytest.raises(StorageError, match="1/metrics.json cannot be saved: No space left on device"):
        saves.annotate(1, {"sts/spearman": 0.7})
    monkeypatch.undo()
    assert saves.restore(1, abstract(make_state()))[1].metrics == {"sts/spearman": 0.6}
    assert saves.annotate(1, {"sts/spearman": 0.7}) and saves.record(1).metrics == {"sts/spearman": 0.7}


def test_a_saved_step_is_not_saved_again(saves):
    fill(saves, [1], make_state(1))
    assert saves.save(1, make_state(2), position=9, config={}) is False
    assert saves.restore(None, abstract(make_state()))[0].step == 1


@pytest.mark.parametrize("fault", ["flip", "truncate", "delete", "meta", "manifest"])
def test_a_damaged_save_is_passed_over_with_a_warning(saves, tmp_path, caplog, fault):
    fill(saves, [1], make_state(1))
    fill(saves, [2], make_state(2))
    file = max(files_of(tmp_path, 2), key=lambda file: file.stat().st_size)
    folder = tmp_path / "checkpoints" / "2"
    if fault == "flip":
        flip(file)
    elif fault == "truncate":
        file.write_bytes(file.read_bytes()[:-1])
    elif fault == "delete":
        file.unlink()
    else:
        file = folder / {"meta": "meta.json", "manifest": "manifest-0-of-1.json"}[fault]
        flip(file)
    with caplog.at_level(logging.WARNING):
        state, record = saves.restore(None, abstract(make_state()))
    assert (int(state.step), record.step, saves.latest()) == (1, 1, 1)
    assert "step 2 cannot be used" in caplog.text
    assert fault == "manifest" or str(file) in caplog.text
    with pytest.raises(StorageError, match="holds no save of step 2; saved:"):
        saves.restore(2, abstract(make_state()))
    fill(saves, [2], make_state(3))
    assert saves.restore(None, abstract(make_state()))[0].step == 3


def test_every_single_flipped_bit_is_seen(saves, tmp_path):
    fill(saves, [1])
    saves.annotate(1, {"sts/spearman": 0.25})
    folder = tmp_path / "checkpoints" / "1"
    assert checkpoint._damage(folder) is None
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        if file.stat().st_size:
            flip(file)
            assert checkpoint._damage(folder), file
            flip(file)
    assert checkpoint._damage(folder) is None


def test_without_a_whole_save_it_stops(saves, tmp_path):
    with pytest.raises(StorageError, match="holds no whole save"):
        saves.restore(None, abstract(make_state()))
    fill(saves, [1, 2])
    for step in (1, 2):
        flip(files_of(tmp_path, step)[0])
    with pytest.raises(StorageError, match=r"holds no whole save; damaged: \[1, 2\]"):
        saves.restore(None, abstract(make_state()))


def test_a_named_step_that_is_damaged_is_an_error(saves, tmp_path):
    fill(saves, [1, 2])
    flip(files_of(tmp_path, 1)[0])
    with pytest.raises(StorageError, match="step 1: .*/checkpoints/1/state/.* has changed: its SHA-256"):
        saves.params_only(1)


def test_a_save_without_its_manifest_does_not_count(saves, tmp_path, monkeypatch, caplog):
    fill(saves, [1], make_state(1))

    def dies(folder):
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(checkpoint, "_write_manifest", dies)
    saves.save(2, make_state(2), position=2, config={})
    with pytest.raises(StorageError, match="checkpoints/2 cannot be saved: No space left on device"):
        saves.wait()
    monkeypatch.undo()
    assert (tmp_path / "checkpoints" / "2" / "state").is_dir() and saves.steps() == [1]
    assert saves.restore(None, abstract(make_state()))[0].step == 1
    fill(saves, [3], make_state(3))
    assert "removing" in caplog.text and not (tmp_path / "checkpoints" / "2").exists()
    assert saves.steps() == [1, 3]


def test_a_save_of_several_processes_needs_all_manifests(saves, tmp_path):
    fill(saves, [1])
    folder = tmp_path / "checkpoints" / "1"
    whole = json.loads((folder / "manifest-0-of-1.json").read_text())
    names = sorted(whole["files"])
    (folder / "manifest-0-of-1.json").unlink()
    for index in (0, 1):
        assert saves.steps() == []
        share = {"total": len(names), "files": {name: whole["files"][name] for name in names[index::2]}}
        (folder / f"manifest-{index}-of-2.json").write_text(json.dumps(share))
    assert saves.steps() == [1] and checkpoint._damage(folder) is None
    (folder / "manifest-1-of-2.json").write_text(json.dumps({"total": len(names), "files": {}}))
    assert f"list {len(names[0::2])} files of [{len(names)}]" in (checkpoint._damage(folder) or "")


def test_an_unfinished_removal_leaves_no_save(saves, tmp_path, monkeypatch):
    fill(saves, [1, 2])
    saves.save(3, make_state(), position=3, config={})
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        saves.wait()
    monkeypatch.undo()
    assert (tmp_path / "checkpoints" / "1").exists() and saves.steps() == [2, 3]


def test_a_removal_that_fails_is_told_and_tried_again(saves, monkeypatch, caplog, tmp_path):
    fill(saves, [1, 2])

    def busy(folder):
        raise OSError(16, "Device or resource busy", str(folder))

    monkeypatch.setattr(checkpoint.shutil, "rmtree", busy)
    fill(saves, [3])
    assert "checkpoints/1 cannot be removed: Device or resource busy" in caplog.text and saves.steps() == [2, 3]
    monkeypatch.undo()
    fill(saves, [4])
    assert sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir()) == ["3", "4"]


def test_nothing_is_removed_while_the_next_save_is_written(saves, tmp_path, monkeypatch):
    saves._keep = 1
    fill(saves, [1])
    go = checkpoint.threading.Event()
    write = checkpoint._write_manifest
    monkeypatch.setattr(checkpoint, "_write_manifest", lambda folder: (go.wait(30), write(folder)))
    saves.save(2, make_state(), position=2, config={})
    assert Checkpoints(tmp_path / "checkpoints").steps() == [1]
    go.set()
    saves.wait()
    assert saves.steps() == [2]


def test_another_state_is_refused_with_the_difference(saves):
    fill(saves, [1])
    other = abstract(make_state())._replace(step=jax.ShapeDtypeStruct((2,), jnp.int32), extra={})
    with pytest.raises(StorageError, match=r"extra/skipped: saved int32 \[\], expected nothing; step: .* expected int32 \[2\]"):
        saves.restore(None, other)


def test_an_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with Checkpoints(tmp_path / "file" / "checkpoints") as saves:
        with pytest.raises(StorageError, match="file/checkpoints/1 cannot be saved: Not a directory") as caught:
            saves.save(1, make_state(), position=1, config={})
        assert "\n" not in str(caught.value)


def test_a_full_disk_is_one_line_and_loses_nothing(saves, caplog):
    fill(saves, [1])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = {"params": {"w": jax.random.normal(jax.random.key(0), (2**19,))}}
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, hard))
    try:
        with pytest.raises(StorageError, match="checkpoints/2 cannot be saved: ") as caught:
            saves.save(2, noise, position=2, config={})
            saves.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value) and str(caught.value).endswith("File too large [os_error_code='27']")
    assert "Traceback" not in caplog.text
    assert saves.restore(None, abstract(make_state()))[1].step == 1
    assert saves.save(2, noise, position=2, config={})


WRITER = textwrap.dedent("""
    import sys
    import jax
    import jax.numpy as jnp
    import numpy as np
    from embedjax.checkpoint import Checkpoints

    def state(step):
        return {"step": jnp.int32(step), "params": {"w": jnp.arange(64.0) * step}}

    saves = Checkpoints(sys.argv[1], keep=2)
    step = saves.latest() or 0
    if step:
        found, record = saves.restore(None, jax.eval_shape(lambda: state(0)))
        good = record.step == found["step"] == record.position
        good &= (found["params"]["w"] == np.arange(64.0) * found["step"]).all()
        print("found" if good else "wrong", record.step, flush=True)
        step = record.step
    print("ready", step, flush=True)
    while True:
        step += 1
        saves.save(step, state(step), position=step, config={})
        print("saved", step - 1, flush=True)  # a save returns once the one before it counts
""")


def kill_in_the_midst(folder, delay):
    """Runs the writer until `delay` seconds after its first save, and gives what it said: [(word, step)]."""
    child = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True)
    said = []
    try:
        while not said or said[-1][0] != "saved":
            word, step = child.stdout.readline().split()
            said.append((word, int(step)))
        time.sleep(delay)
    finally:
        child.send_signal(signal.SIGKILL)
    rest, _ = child.communicate()
    return said + [(line.split()[0], int(line.split()[1])) for line in rest.splitlines() if len(line.split()) == 2]


def check_kills(folder, count):
    draw, acknowledged = random.Random(0), 0
    for _ in range(count):
        said = kill_in_the_midst(folder, draw.uniform(0, 0.5))
        found = [step for word, step in said if word == "found"]
        assert not any(word == "wrong" for word, _ in said)
        assert found or not acknowledged
        assert all(acknowledged <= step <= acknowledged + 1 for step in found), (found, acknowledged)
        acknowledged = max(step for word, step in said if word == "saved")
    with Checkpoints(folder) as saves:
        params, step = saves.params_only()
    assert acknowledged <= step <= acknowledged + 1
    np.testing.assert_array_equal(params["w"], np.arange(64.0) * step)


def test_a_kill_loses_nothing_but_the_save_in_flight(tmp_path):
    check_kills(tmp_path, 1)


@pytest.mark.slow
def test_twenty_kills_lose_nothing_but_the_saves_in_flight(tmp_path):
    check_kills(tmp_path, 20)


PEER = textwrap.dedent("""
    import logging, pathlib, sys
    import jax
    import jax.numpy as jnp
    import numpy as np
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    folder, port, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=index)
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from embedjax import lock
    from embedjax.checkpoint import Checkpoints
    from embedjax.config.errors import StorageError

    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
    build = lambda k: {"step": jnp.int32(k), "params": {"w": jnp.arange(32.0).reshape(8, 4) * k}}
    shard = {"step": NamedSharding(mesh, P()), "params": {"w": NamedSharding(mesh, P("fsdp"))}}
    make = jax.jit(build, out_shardings=shard, static_argnums=0)
    one = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    like = lambda shard: jax.tree.map(one, jax.eval_shape(lambda: build(0)), shard)
    local = lambda x: [(s.index, np.asarray(s.data)) for s in x.addressable_shards]
    with lock.hold(folder), Checkpoints(folder, keep=2) as saves:
        assert saves.latest() is None
        for k in range(1, 5):
            assert saves.save(k, make(k), position=k, config={})
        saves.wait()
        assert saves.steps() == [3, 4], saves.steps()
        other = {**shard, "params": {"w": NamedSharding(mesh, P(None, "fsdp"))}}
        state, record = saves.restore(None, like(other))
        want = np.arange(32.0).reshape(8, 4) * 4
        assert record.step == 4 and all((data == want[i]).all() for i, data in local(state["params"]["w"]))
        jax.experimental.multihost_utils.sync_global_devices("checked")
        if index == 0:
            file = max(pathlib.Path(folder, "4", "state").rglob("d/*"), key=lambda f: f.stat().st_size)
            content = bytearray(file.read_bytes()); content[5] ^= 1; file.write_bytes(content)
        jax.experimental.multihost_utils.sync_global_devices("flipped")
        state, record = saves.restore(None, like(shard))
        assert record.step == 3, record.step
        params, _ = saves.params_only(3)
        assert (params["w"] == np.arange(32.0).reshape(8, 4) * 3).all()
        assert saves.annotate(3, {"m": 0.5}) and not saves.annotate(4, {"m": 0.6})
        assert saves.restore(3, like(shard))[1].metrics == {"m": 0.5}
        assert saves.save(4, make(4), position=4, config={})
    print("peer done")
    jax.distributed.shutdown()
""")


@pytest.mark.slow
def test_two_processes_save_and_one_restores(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-c", PEER, str(tmp_path), port]
    # Without the cache of compiled programs: a peer that finds one and a peer that compiles wait for each other.
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    peers = [subprocess.Popen([*command, i], **pipes) for i in "01"]
    outputs = [peer.communicate(timeout=240) for peer in peers]
    assert all("peer done" in out for out, _ in outputs), outputs
    assert {file.name for file in (tmp_path / "4").glob("manifest*")} == {"manifest-0-of-2.json", "manifest-1-of-2.json"}
    with Checkpoints(tmp_path) as saves:
        params, step = saves.params_only()
        assert step == 4
        np.testing.assert_array_equal(params["w"], np.arange(32.0).reshape(8, 4) * 4)

"""launch/serve/app.py over HTTP, as it is started by the command in its docstring: batches, prompts, and what is refused."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import small_models

from embedjax.evaluate.encode import encode
from embedjax.export import export

pytestmark = pytest.mark.reference
SERVE = Path(__file__).resolve().parents[2] / "launch" / "serve"
TEXTS = ["red cat", "an old blue dog and a tree", "tree", "blue " * 40]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_models.make(small_models.ARCHS["bert"], tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """`ask(body)` -> (status, answer)."""
    folder = tmp_path_factory.mktemp("served") / "model"
    export(model, folder, programs=("onnx",))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "app:app", "--app-dir", str(SERVE), "--port", str(port)]
    blocked = tmp_path_factory.mktemp("blocked")  # the server must not need these
    for name in ("embedjax", "jax", "torch", "transformers"):
        (blocked / f"{name}.py").write_text(f"raise ImportError('{name} is blocked')\n")
    environment = os.environ | {"MODEL": str(folder), "MAX_BATCH": "8", "PYTHONPATH": str(blocked)}
    process = subprocess.Popen([*command, "--log-level", "warning"], env=environment)

    def ask(body, path="/embed"):
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None and time.monotonic() < deadline, "the server did not start"
            try:
                assert ask(None, "/health") == (200, {"status": "ok"})
                break
            except urllib.error.URLError:
                time.sleep(0.2)
        yield ask
    finally:
        process.terminate()
        process.wait(30)


def test_a_batch_is_answered_with_the_models_vectors(server, model):
    status, found = server({"inputs": TEXTS})
    assert status == 200
    np.testing.assert_allclose(found, encode(model, TEXTS), atol=1e-5)


def test_prompts(server, model):
    _, found = server({"inputs": TEXTS, "prompt": "query"})
    np.testing.assert_allclose(found, encode(model, TEXTS, column="query"), atol=1e-5)


def test_many_requests_at_once(server, model):
    wanted = encode(model, TEXTS)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: server({"inputs": [TEXTS[n % 4], TEXTS[(n + 1) % 4]]}), range(24)))
    for n, (status, found) in enumerate(answers):
        assert status == 200
        np.testing.assert_allclose(found, wanted[[n % 4, (n + 1) % 4]], atol=1e-5)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"inputs": []}, "at least 1 item"),
        ({"inputs": ["a"] * 9}, "at most 8 items"),
        ({"inputs": "a"}, "valid list"),
        ({"inputs": ["a", 3]}, "valid string"),
        ({}, "Field required"),
        (b"{", "JSON decode error"),
        (b"\xff\xfe", "JSON decode error"),
        (b'{"inputs": ["\\ud800"]}', "a text is not valid Unicode"),
        ({"inputs": ["a"], "prompt": "qury"}, "there is no prompt 'qury'; the model has ['document', 'query']"),
    ],
)
def test_bad_input_is_told(server, body, told):
    status, answer = server(body)
    assert status == 422 and told in json.dumps(answer), (status, answer)
    assert server({"inputs": ["tree"]})[0] == 200  # it goes on

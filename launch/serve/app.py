"""Serves an exported folder with onnx/model.onnx over HTTP, by FastAPI and onnxruntime; needs neither embedjax nor jax.

    pip install fastapi uvicorn onnxruntime tokenizers
    MODEL=path/to/folder uvicorn app:app --app-dir launch/serve --port 8080
    curl localhost:8080/embed -H 'content-type: application/json' -d '{"inputs": ["a text", "another"], "prompt": "query"}'

A request is a batch: at most MAX_BATCH texts (default 64). onnxruntime runs several requests at a time; INTRA_OP threads work
on one (default: all cores).
"""

import json
import os
import pathlib

import numpy as np
import onnxruntime
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field
from tokenizers import Tokenizer

FOLDER, LARGEST = pathlib.Path(os.environ["MODEL"]), int(os.environ.get("MAX_BATCH", 64))
config, limits, settings = (
    json.loads((FOLDER / name).read_text("utf-8"))
    for name in ("config.json", "sentence_bert_config.json", "config_sentence_transformers.json")
)
PROMPTS, DEFAULT = settings["prompts"], settings["default_prompt_name"]

tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
tokenizer.enable_truncation(limits["max_seq_length"])
tokenizer.enable_padding(pad_id=config["pad_token_id"], pad_token=tokenizer.id_to_token(config["pad_token_id"]))
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(os.environ.get("INTRA_OP", 0))
options.add_session_config_entry("session.x64quantprecision", "1")  # x86 without VNNI would let int8 sums overflow
session = onnxruntime.InferenceSession(str(FOLDER / "onnx" / "model.onnx"), options, providers=["CPUExecutionProvider"])
app = FastAPI(title="vectors of texts")


class Request(BaseModel):
    inputs: list[str] = Field(min_length=1, max_length=LARGEST)
    prompt: str | None = None


@app.get("/health")
def health() -> dict:
    return {"status": "ok"}


@app.post("/embed")
def embed(request: Request) -> list[list[float]]:
    name = request.prompt or DEFAULT
    if name and name not in PROMPTS:
        raise HTTPException(422, f"there is no prompt {name!r}; the model has {sorted(PROMPTS)}")
    try:
        encodings = tokenizer.encode_batch([(PROMPTS[name] if name else "") + text for text in request.inputs])
    except TypeError as error:  # JSON may hold half of a surrogate pair
        raise HTTPException(422, "a text is not valid Unicode") from error
    ids, mask = (np.array([getattr(e, what) for e in encodings], np.int64) for what in ("ids", "attention_mask"))
    return session.run(["sentence_embedding"], {"input_ids": ids, "attention_mask": mask})[0].tolist()

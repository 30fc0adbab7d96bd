"""Encodes by the program in this folder. Needs jax, flatbuffers and numpy, and tokenizers for texts; embedjax is not needed.

python load.py "a text" "another text"
"""

import json
import pathlib
import sys

import jax
import numpy as np
from jax import export


class Program:
    """The program of a folder: call it on arrays, or `encode` texts."""

    def __init__(self, folder: pathlib.Path = pathlib.Path(__file__).parent):
        self.folder, self.about = folder, json.loads((folder / "program.json").read_text("utf-8"))
        older = [list(map(int, version.split(".")[:2])) for version in (jax.__version__, self.about["jax"])]
        if older[0] < older[1]:
            raise RuntimeError(f"the program is of jax {self.about['jax']}, which jax {jax.__version__} is too old to read")
        raw = np.memmap(folder / "weights.safetensors", np.uint8, "r")
        start = 8 + int(raw[:8].view("<u8")[0])
        header = json.loads(raw[8:start].tobytes())
        kinds = {"F32": np.float32, "I8": np.int8}
        part = lambda at: raw[start:][slice(*at["data_offsets"])].view(kinds[at["dtype"]]).reshape(at["shape"])
        self.weights = jax.device_put({name: part(at) for name, at in header.items() if name != "__metadata__"})
        self.run = jax.jit(export.deserialize(bytearray((folder / "program.jaxexport").read_bytes())).call)

    def __call__(self, *inputs: np.ndarray) -> np.ndarray:
        """Vectors of token ids int32 [B L] and their mask bool [B L], or of pictures uint8 [B H W 3]."""
        longest = self.about.get("max_length")
        if longest and inputs[0].shape[1] > longest:
            raise ValueError(f"texts of {inputs[0].shape[1]} tokens; the program takes at most {longest}: truncate them")
        return np.asarray(self.run(self.weights, *inputs))

    def encode(self, texts: list[str], prompt: str | None = None, batch: int = 32) -> np.ndarray:
        """Vectors of texts. Each new shape compiles: lengths are of 16, 32, ... tokens, batches of 1, 2, 4, ... texts."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))  # which truncates and pads
        before = self.about["prompts"][prompt] if prompt else self.about["default_prompt"]
        found = [np.zeros((0, self.about["width"]), np.float32)]
        for start in range(0, len(texts), batch):
            part = [before + text for text in texts[start : start + batch]]
            size = batch if len(texts) > batch else 1 << (len(part) - 1).bit_length()
            encodings = tokenizer.encode_batch(part + [""] * (size - len(part)))
            arrays = [np.array([getattr(e, what) for e in encodings]) for what in ("ids", "attention_mask")]
            ids, mask = (array[:, : self.about["max_length"]] for array in arrays)
            mask = mask.astype(bool) | self.about["padding_counts"]
            found.append(self(ids.astype(np.int32), mask)[: len(part)])
        return np.concatenate(found)


if __name__ == "__main__":
    print(Program().encode(sys.argv[1:]))

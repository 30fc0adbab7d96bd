"""How a model card says that a folder is used: a few lines of Python for each format and kind of tower, and its programs."""

from collections.abc import Sequence

LIBRARIES = {
    "sentence-transformers": "sentence-transformers",
    "hf": "transformers",
    "open-clip": "open_clip",
    "pylate": "PyLate",
    "classifier": "transformers",
}
CLASSIFIES = "text-classification"
TASKS = {
    "text": "sentence-similarity",
    "picture": "image-feature-extraction",
    "text and picture": "zero-shot-image-classification",
}

IMPORT = """from sentence_transformers import SentenceTransformer

"""
MODEL = (
    IMPORT
    + """model = SentenceTransformer("path/to/{title}")
"""
)
OPEN = """from PIL import Image
"""
TEXTS = {
    "text": MODEL
    + """vectors = model.encode(["a text", "another text"])
print(model.similarity(vectors, vectors))""",
    "query": MODEL
    + """queries = model.encode_query(["what is looked for"])
documents = model.encode_document(["a text", "another text"])
print(model.similarity(queries, documents))""",
    "bare": MODEL
    + """vectors = model.encode(["a text", "another text"], normalize_embeddings=True)
print(model.similarity(vectors, vectors))""",
    "bare query": IMPORT
    + """query, document = (SentenceTransformer(f"path/to/{title}/{{side}}") for side in ("query", "document"))
queries = query.encode(["what is looked for"], normalize_embeddings=True)
documents = document.encode(["a text", "another text"], normalize_embeddings=True)
print(document.similarity(queries, documents))""",
}
LATE = {
    "pylate": """from pylate import models, scores

model = models.ColBERT("path/to/{title}")
queries = model.encode(["what is looked for"], is_query=True)
documents = model.encode(["a text", "another text"], is_query=False)
print(scores.colbert_scores(queries, documents[:1]))""",
    "sentence-transformers": """from sentence_transformers import MultiVectorEncoder

model = MultiVectorEncoder("path/to/{title}")
queries = model.encode_query(["what is looked for"])
documents = model.encode_document(["a text", "another text"])
print(model.similarity(queries, documents))""",
}
CLASSES = """from transformers import pipeline

classify = pipeline("text-classification", "path/to/{title}", top_k=None, truncation=True)
print(classify(["a text", "another text"]))"""
PICTURES = {
    ("text and picture", "sentence-transformers"): OPEN
    + MODEL
    + """queries = model.encode_query(["what is looked for"])
pictures = model.encode([Image.open("picture.jpg")])
print(model.similarity(queries, pictures))""",
    ("picture", "sentence-transformers"): OPEN
    + MODEL
    + """vectors = model.encode([Image.open("picture.jpg"), Image.open("other.jpg")])
print(model.similarity(vectors, vectors))""",
    ("text and picture", "hf"): OPEN
    + """from transformers import AutoModel, AutoProcessor

model, processor = AutoModel.from_pretrained("path/to/{title}"), AutoProcessor.from_pretrained("path/to/{title}")
texts, pictures = ["what is looked for", "another text"], [Image.open("picture.jpg")]
inputs = processor(text=texts, images=pictures, padding="max_length", truncation=True, return_tensors="pt")
print(model(**inputs).logits_per_image)""",
    ("picture", "hf"): OPEN
    + """from transformers import AutoImageProcessor, AutoModel

model, processor = AutoModel.from_pretrained("path/to/{title}"), AutoImageProcessor.from_pretrained("path/to/{title}")
print(model(**processor([Image.open("picture.jpg")], return_tensors="pt")).last_hidden_state)""",
    ("text and picture", "open-clip"): OPEN
    + """import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:path/to/{title}")
tokenizer = open_clip.get_tokenizer("local-dir:path/to/{title}")
pictures = model.eval().encode_image(preprocess(Image.open("picture.jpg"))[None], normalize=True)
texts = model.encode_text(tokenizer(["what is looked for", "another text"]), normalize=True)
print(texts @ pictures.T)""",
}


def usage(kind: str, format: str, *, searches: bool, late: bool, title: str) -> str:
    """The lines for a kind of model, "text", "picture" or "text and picture"; `searches` tells queries from documents, and
    `late` interaction one vector a token."""
    if late:
        return LATE[format].format(title=title)
    if format == "classifier":
        return CLASSES.format(title=title)
    if kind != "text":
        return PICTURES[kind, format].format(title=title)
    use = ("bare query" if searches else "bare") if format == "hf" else "query" if searches else "text"
    return TEXTS[use].format(title=title)


PROGRAMS = {
    "stablehlo": """`stablehlo/` stands on its own (`python stablehlo/load.py "a text"`); it needs jax, flatbuffers, numpy and
tokenizers:

```python
from load import Program

vectors = Program().encode(["a text", "another text"])
```
""",
    "onnx": """`onnx/model.onnx` gives `sentence_embedding` from `input_ids` and `attention_mask`, as text-embeddings-inference
takes it, and `last_hidden_state`, which `SentenceTransformer(..., backend="onnx")` reads.
""",
}


def program_usage(programs: Sequence[str], weights: str) -> str:
    """A card's part on the programs of a folder, empty without any."""
    if not programs:
        return ""
    rounded = "Their weights are int8, a scale an output channel; activations are rounded row by row as they run.\n"
    return "\n".join(["", "## Programs", "", *(PROGRAMS[name] for name in programs), *([rounded] if weights == "int8" else [])])

"""What `retention` measured -> a table, and in the model's folder retention.json, retention.svg and a section of its card."""

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from embedjax import calibration
from embedjax.config.errors import StorageError
from embedjax.export.plot import Points, svg
from embedjax.export.retention import RESCORE, Encoding, Row

FORMAT = 1
MARKS = "<!-- retention -->", "<!-- end of retention -->"


def keep(folder: Path, rows: Sequence[Row], encoding: Encoding, rescore: int = RESCORE) -> list[Row]:
    """Writes retention.json, the plot and the card's section; those of other tasks stay where they are of the same weights.
    Returns all rows. Raises StorageError for a damaged retention.json."""
    place, weights = folder / calibration.FOLDER / "retention.json", calibration.weights_of(folder)
    known = _read(place, weights, rescore)
    names = {row.task for row in rows}
    every = [*(row for row in known if row.task not in names), *rows]
    record = {
        "format": FORMAT, "weights": weights, "rescore": rescore, "encoding": dataclasses.asdict(encoding),
        "rows": [dataclasses.asdict(row) for row in every],
    }  # fmt: skip
    place.parent.mkdir(exist_ok=True)
    place.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    place.with_suffix(".svg").write_text(picture(every), encoding="utf-8")
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.exists() else ""
    card.write_text(_with_section(text, section(every, encoding, rescore)), encoding="utf-8")
    return every


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Lines of columns, a task after the other; shares are of whole float32 vectors."""
    yield f"{'task':<12} {'dim':>5} {'precision':<9} {'bytes':>6} {'by codes':>9} {'kept':>7} {'rescored':>9} {'kept':>7}"
    for row in rows:
        whole = _whole(rows, row)
        shares = (row.score / whole, row.rescored / whole) if whole else (0.0, 0.0)
        yield (
            f"{row.task:<12} {row.dim:>5} {row.precision:<9} {row.bytes:>6} {row.score:>9.4f} {shares[0]:>7.1%} "
            f"{row.rescored:>9.4f} {shares[1]:>7.1%}"
        )


def section(rows: Sequence[Row], encoding: Encoding, rescore: int = RESCORE) -> str:
    """The card's section, as Markdown."""
    parts = [
        "## Dimensions and precisions",
        "What is kept of the score of whole float32 vectors when documents are stored shorter or as codes. By codes: queries "
        f"are codes too. Rescored: the {rescore} x 10 documents found by codes are ranked by the float32 query and what the "
        f"codes stand for. Ranges and conventions are in `{calibration.FOLDER}/quantization.json`.",
        f"![what is kept of the quality, by the bytes of a vector]({calibration.FOLDER}/retention.svg)",
    ]
    for task in dict.fromkeys(row.task for row in rows):
        own = [row for row in rows if row.task == task]
        lines = [f"| {task} | precision | bytes | {own[0].metric} by codes | kept | rescored | kept |", "|---" * 7 + "|"]
        for row in own:
            whole = _whole(rows, row)
            kept = [f"{score / whole:.1%}" if whole else "" for score in (row.score, row.rescored)]
            lines += [
                f"| {row.dim} | {row.precision} | {row.bytes} | {row.score:.4f} | {kept[0]} | {row.rescored:.4f} | {kept[1]} |"
            ]
        parts.append("\n".join(lines))
    speed = encoding.rows / max(encoding.seconds, 1e-9)
    parts.append(
        f"Encoded {encoding.rows:,} texts or pictures at {speed:,.0f} a second on {encoding.device}, compilation included."
    )
    return "\n\n".join(parts) + "\n"


def picture(rows: Sequence[Row]) -> str:
    """The plot of the mean share over the tasks, at the sizes that all of them were scored at."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    lines: dict[str, Points] = {}
    for precision in dict.fromkeys(row.precision for row in rows):
        points = []
        for size in sorted({row.bytes for row in rows if row.precision == precision}):
            own = [(row, _whole(rows, row)) for row in rows if (row.precision, row.bytes) == (precision, size)]
            shares = [(row.score / whole, row.rescored / whole) for row, whole in own if whole]
            if len(shares) == len(tasks):
                points.append((size, *(sum(share) / len(tasks) for share in zip(*shares, strict=True))))
        lines[precision] = points
    return svg(f"share of the score kept: {', '.join(tasks)}", lines)


def _whole(rows: Sequence[Row], row: Row) -> float:
    """The task's score of whole float32 vectors."""
    own = [other for other in rows if other.task == row.task and other.precision == "float32"]
    return max(own, key=lambda other: other.dim).score


def _with_section(card: str, body: str) -> str:
    """The card with the section at its end, or in the place of the one before."""
    first, last = MARKS
    new = f"{first}\n{body}{last}\n"
    pattern = re.compile(f"{re.escape(first)}.*{re.escape(last)}\n?", re.S)
    return pattern.sub(lambda _: new, card) if pattern.search(card) else f"{card.rstrip()}\n\n{new}".lstrip()


def _read(place: Path, weights: str, rescore: int) -> list[Row]:
    if not place.exists():
        return []
    try:
        record = json.loads(place.read_text(encoding="utf-8"))
        rows = [Row(**row) for row in record["rows"]]
        return rows if (record["format"], record["weights"], record["rescore"]) == (FORMAT, weights, rescore) else []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{place}: cannot be read ({error!r}); delete it to measure anew") from error

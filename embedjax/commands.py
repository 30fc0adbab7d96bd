"""The verbs of the command line: each reads its arguments, then imports and calls what does the work."""

import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from embedjax import supervise
from embedjax.config import Bert, Config, Data, Evaluate, Model, Retrieval, Set, Task, Tower
from embedjax.config.errors import CheckFailed, ConfigError
from embedjax.config.overrides import parse
from embedjax.config.run import run_folder

# What `train --help` without a config file shows the fields of.
EXAMPLE = Config(model=Model({"text": Tower(arch=Bert())}), data=Data(sets=(Set(),)), evaluate=Evaluate(tasks=(Retrieval(),)))


@dataclasses.dataclass(frozen=True)
class Train:
    """Trains an experiment, or goes on with the one in its run folder."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    run_dir: str = ""
    """Run folder, on a file system (default runs/NAME)."""
    fresh: bool = False
    """Move an old run in the folder aside and start anew."""
    dry_run: bool = False
    """Print the resolved config, shapes, memory and three rows; train nothing."""
    profile: str = ""
    """Steps to trace, such as 10:13; the trace lands in the run folder's profile/."""


def train(arguments: Sequence[str]) -> None:
    """train CONFIG [options]"""
    config, rest, shown = _config_of("train", arguments)
    options = parse(Train, rest, prog=f"embedjax train {shown}", default=Train(config))
    folder = run_folder(options.run_dir) if options.run_dir else None
    if options.dry_run:
        from embedjax.preview import preview

        for line in preview(options.config):
            print(line, flush=True)
        return
    from embedjax import distributed

    distributed.start(options.config.distributed)
    _let_the_first_speak()
    from embedjax.train import train as run  # not before: importing it touches the devices

    run(options.config, folder, fresh=options.fresh, profile=_steps(options.profile))


def _config_of(command: str, arguments: Sequence[str]) -> tuple[Config, list[str], str]:
    """(the config of the file, or FILE.py:FUNCTION, named first, the rest of the arguments, the file); with --help alone, an
    example's."""
    from embedjax.config.load import from_file, function_of

    if not arguments or arguments[0].startswith("-"):
        if not {"-h", "--help"} & set(arguments):
            raise ConfigError(f"{command} needs a config file: embedjax {command} CONFIG.py [--FIELD VALUE ...]")
        return EXAMPLE, list(arguments), "CONFIG"
    config = from_file(Path(arguments[0]))
    if config.name == "run":
        config = dataclasses.replace(config, name=function_of(Path(arguments[0]))[0].stem)
    return config, list(arguments[1:]), arguments[0]


def _let_the_first_speak() -> None:
    """The other processes of a run log what is their own alone, and say whose it is."""
    if process := supervise.facts.get("process"):
        logging.getLogger().setLevel(logging.ERROR)
        logging.getLogger("embedjax").setLevel(logging.WARNING)
        for handler in logging.getLogger().handlers:
            handler.setFormatter(logging.Formatter(f"process {process}: %(message)s"))


def _steps(text: str) -> range | None:
    if not text:
        return None
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 0 < int(first) < int(last)):
        raise ConfigError(f"--profile is {text!r}; it must be FIRST:LAST, such as 10:13")
    return range(int(first), int(last))


def evaluate(arguments: Sequence[str]) -> None:
    """evaluate MODEL --task TASK --data FILE"""
    from embedjax.evaluate import arguments as reading

    name, task, every = reading.parse(arguments)
    from embedjax.config import Mesh
    from embedjax.evaluate import tasks
    from embedjax.evaluate.progress import Stages
    from embedjax.load import load
    from embedjax.sharding import make_mesh

    if every:
        _retention(name, task)
        return
    with Stages() as progress:
        found = tasks.evaluate(load(name), tasks.prepare((task,)), mesh=make_mesh(Mesh()), progress=progress)
    for key, value in found.items():
        print(f"{key}\t{value:.4f}")


def _retention(name: str, task: Task) -> None:
    """The table of a task's dimensions and precisions; kept in an exported folder."""
    from embedjax.config import Mesh
    from embedjax.evaluate import tasks
    from embedjax.evaluate.progress import Stages
    from embedjax.export import retained
    from embedjax.export.retention import retention
    from embedjax.load import load, run_of
    from embedjax.sharding import make_mesh

    with Stages() as progress:
        found = retention(load(name), tasks.prepare((task,)), task.dims, mesh=make_mesh(Mesh()), progress=progress)
    for line in retained.table(found[0]):
        print(line)
    if Path(name).is_dir() and not run_of(name):
        retained.keep(Path(name), *found)
        print(f"{name}: the card, quantization/retention.json and retention.svg tell of it")


def encode(arguments: Sequence[str]) -> None:
    """encode MODEL INPUT OUTPUT"""
    from embedjax.evaluate import encode_arguments as reading

    made = reading.parse(arguments)
    from embedjax.config import Mesh
    from embedjax.evaluate.calibrate import ranges_from
    from embedjax.evaluate.files import encode_file
    from embedjax.evaluate.progress import Display
    from embedjax.evaluate.token_files import encode_tokens_file
    from embedjax.load import load
    from embedjax.sharding import make_mesh
    from embedjax.token_prefix import first_numbers

    model, mesh = load(made.model), make_mesh(Mesh())
    late = model.config.late
    model = first_numbers(model, made.dim) if late and made.dim else model
    write, more = (encode_tokens_file, made.late()) if late else (encode_file, made.single())
    if made.calibrate:
        with Display("calibrate") as progress:
            more["ranges"] = ranges_from(
                model, made.calibrate, made.input, more["dim"], as_column=made.kind, task=made.task or None,
                mesh=mesh, progress=progress,
            )  # fmt: skip
    with Display("encode") as progress:
        rows = write(
            model,
            made.input,
            made.output,
            column=made.column or None,
            as_column=made.kind,
            task=made.task or None,
            mesh=mesh,
            progress=progress,
            **more,
        )
    print(f"{made.output}: {rows} {'texts, a vector a token' if late else 'vectors'}")


def search(arguments: Sequence[str]) -> None:
    """search MODEL --corpus FILE | --images FOLDER QUERY | --like PICTURE"""
    from embedjax.search import arguments as reading

    made = reading.parse(arguments)
    from embedjax import search as finder
    from embedjax.config import Mesh
    from embedjax.data.files import cache_folder
    from embedjax.evaluate.progress import Display
    from embedjax.load import load
    from embedjax.sharding import make_mesh
    from embedjax.token_prefix import first_numbers

    funnel = finder.stages_of(made.funnel)
    model, column = load(made.model), made.column or None
    if made.html and not model.config.late:
        raise ConfigError(f"--html shows which tokens matched; {made.model} has one vector a text")
    first = made.first if made.first in ("", "bm25", "tokens") else load(made.first)
    model = first_numbers(model, made.dim) if model.config.late and made.dim else model
    tokens = model.config.late or (made.pool, made.first, made.candidates) != (1, "", 100)
    if tokens and not funnel:
        how = finder.How(made.pool, made.precision, first, made.candidates)
    else:
        how = finder.Compared(made.dim, made.precision, funnel)
    corpus = finder.open_gallery(made.images, column) if made.images else finder.open_corpus(made.corpus, column)
    with Display("encode the corpus") as progress:
        hits = finder.search(
            model,
            corpus,
            made.query or Path(made.like),
            made.k,
            how=how,
            task=made.task or None,
            mesh=make_mesh(Mesh()),
            cache=cache_folder("search"),
            progress=progress,
        )
    finder.show(hits)
    if made.html:
        Path(made.html).write_text(finder.page(made.query, hits), encoding="utf-8")
        print(f"{made.html}: the same with what matched")


def mine(arguments: Sequence[str]) -> None:
    """mine MODEL CORPUS PAIRS OUT"""
    from embedjax.mine import arguments as reading

    made = reading.parse(arguments)
    from embedjax import mine as miner
    from embedjax.config import Mesh
    from embedjax.evaluate.progress import Stages
    from embedjax.load import load
    from embedjax.sharding import make_mesh

    mesh, scorer = make_mesh(Mesh()), ("the model", None) if made.scores else None
    if made.teacher:
        scorer = miner.teacher(load(made.teacher), mesh, made.teacher_task or None)
    elif made.cross_encoder:
        scorer = miner.cross_encoder(made.cross_encoder)
    with Stages() as progress:
        found = miner.mine_file(
            load(made.model), made.corpus, made.pairs, made.output, made.how,
            corpus_columns=tuple(filter(None, made.corpus_columns.split(","))), pair_columns=made.pair_columns,
            task=made.task or None, scorer=scorer, seed=made.seed, mesh=mesh, progress=progress,
        )  # fmt: skip
    print(f"{made.output}: {found.rows} rows, {found.left_out} pairs left out for too few negatives")
    print(f"mean score of positives {found.positive:.3f}, of negatives {found.negative:.3f}")


def export(arguments: Sequence[str]) -> None:
    """export MODEL FOLDER [--calibrate FILE] | export FOLDER --calibrate FILE | export FOLDER --check"""
    from embedjax.export import arguments as reading

    made = reading.parse(arguments)
    from embedjax.evaluate.progress import Display
    from embedjax.export import export as write
    from embedjax.export import gate, quantize
    from embedjax.load import load
    from embedjax.token_prefix import first_numbers

    if made.check:
        found = gate.check(Path(made.model))
        for consumer, difference in found.items():
            print(f"{consumer}\t{gate.told(difference)}")
        gate.judge(Path(made.model), found)
        return
    if made.folder:
        model = load(made.model)
        model = first_numbers(model, made.dim) if made.dim else model
        options = {"adapter": made.adapter, "head": made.head, "programs": made.program, "weights": made.weights}
        difference = write(model, Path(made.folder), made.format, **options)
        print(f"exported {made.folder} (largest difference {difference:.1e})")
    if made.calibrate:
        place, sets = Path(made.folder or made.model), quantize.sets_of(made.calibrate)
        with Display("calibrate") as progress:
            ranges = quantize.save_ranges(place, sets, made.prefixes, column=made.column or None, progress=progress)
        for line in quantize.told(ranges):
            print(line)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Compiles an experiment's training step for devices that are not here: does it fit, how long will it take?"""

    config: Annotated[Config, tyro.conf.arg(name="")]
    topology: str = ""
    """Which devices: v5e:16x16, v6e:8x8, v6e:16x16*2 (two slices), v5p:4x4x4, h100:64, h200:8, a100:8, b200:8 or cpu:8."""
    search: bool = False
    """Find the largest batch that fits."""
    memory: float = 0
    """GiB a device has; 0 for the chip's own."""
    tries: int = 8
    """When it does not fit: at most so many changes are tried."""
    json: Path | None = None
    """Write the numbers to this file too."""


def plan(arguments: Sequence[str]) -> None:
    """plan CONFIG --topology TOPOLOGY"""
    import json

    config, rest, shown = _config_of("plan", arguments)
    options = parse(Plan, rest, prog=f"embedjax plan {shown}", default=Plan(config))
    from embedjax.plan import ahead, table

    say = lambda line: print(line, file=sys.stderr, flush=True)
    found = ahead.plan(
        options.config,
        options.topology,
        search=options.search,
        memory=options.memory or None,
        tries=options.tries,
        progress=say,
    )
    for line in table.lines(found):
        print(line)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if not ahead.fits(found):
        raise CheckFailed(f"it does not fit on {options.topology}")


def launch(arguments: Sequence[str]) -> None:
    """launch TARGET CONFIG [--with NAME=VALUE ...] [--dry-run] [what train takes]"""
    from embedjax import launch as launcher

    if code := launcher.main(arguments):
        sys.exit(code)


def doctor(arguments: Sequence[str]) -> None:
    """doctor [FOLDER ...] | doctor --data CONFIG"""

    def command(folders: tyro.conf.Positional[tuple[str, ...]] = ("runs",), data: str = "", limit: int = 100_000) -> tuple:
        """Prints devices, versions, the allocator, and whether data and run folders can be used; or what data are like.

        Args:
            folders: Folders to look at.
            data: Config file whose data are looked at instead: lengths, cut texts, sizes of pictures, repeated and bad rows,
                texts and pictures both trained and evaluated on, and three rows as the model meets them.
            limit: At most so many rows of a set, evenly spaced.
        """
        return folders, data, limit

    folders, data, limit = parse(command, arguments, prog="embedjax doctor")
    if limit < 1:
        raise ConfigError(f"--limit is {limit}; it must be at least 1")
    if data:
        from embedjax.survey import survey

        findings = survey(_config_of("doctor --data", [data])[0], limit=limit)
    else:
        from embedjax.doctor import report

        findings = report([Path(folder) for folder in folders])
    marks = {True: "ok  ", False: "look", None: "    "}
    for what, finding, well in findings:
        print(f"{marks[well]}  {what:<22} {finding}", flush=True)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "evaluate": evaluate,
    "encode": encode,
    "search": search,
    "mine": mine,
    "export": export,
    "plan": plan,
    "launch": launch,
    "doctor": doctor,
}

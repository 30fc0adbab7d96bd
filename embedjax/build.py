"""config -> everything a run needs: mesh, data, objectives, optimiser, abstract state, shardings, jitted steps."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from embedjax import distributed, objective, optim, sharding, step
from embedjax.config import (
    Architecture,
    Config,
    HeadAccuracy,
    ImageArchitecture,
    ImageTower,
    ModifiedResnet,
    Tower,
    Transformer,
    Vit,
)
from embedjax.config.errors import ConfigError, nearest
from embedjax.data.batches import Batches
from embedjax.data.columns import is_text
from embedjax.data.mined import Mined
from embedjax.data.sources import BadRow, open_source
from embedjax.data.text import Texts
from embedjax.data.tokenizer import add_tokens, save_tokenizer, train_wordpiece
from embedjax.evaluate import tasks
from embedjax.evaluate.encode import asked, side_of
from embedjax.evaluate.rows import column_of
from embedjax.evaluate.tasks.heads import HeadData, head_of
from embedjax.export import check_format, classes
from embedjax.load import adapter_of, heads_of, make_images, make_texts, read_start, resolve_tower, tokenizer_folders
from embedjax.metrics.pace import train_flops
from embedjax.models import folders, lora
from embedjax.models.classifier import Head
from embedjax.models.embedder import build_embedder
from embedjax.models.families.static import LONGEST

# Rows whose text a "wordpiece" tokenizer is trained on: more changes its pieces little and costs seconds.
TOKENIZER_ROWS = 8_000

ENCODED = {"anchor", "positive", "negative"}


class Parts(NamedTuple):
    """What of a run needs no data: embedders, optimiser, the shapes and places of state and constants, the steps by task."""

    embedders: dict[str, Any]
    tx: optax.GradientTransformation
    abstract: step.TrainState
    constants: dict
    steps: dict[str, Callable]


@dataclasses.dataclass(frozen=True)
class Run:
    """A resolved experiment, ready to train."""

    config: Config
    mesh: jax.sharding.Mesh
    sources: dict[str, Any]
    texts: dict[str, Texts]
    mined: dict[str, Mined]
    batches: Batches
    embedders: dict[str, Any]
    init: Callable[[], tuple[step.TrainState, dict]]
    abstract: step.TrainState
    constants: dict
    steps: dict[str, Callable]


def resolve(config: Config, known: Config | None = None) -> Config:
    """The config with every tower resolved; `known` is the same run's config as stored earlier."""
    if not config.model.towers:
        raise ConfigError("model.towers is empty; name at least one tower")
    if not config.data.sets:
        raise ConfigError("data.sets is empty; name at least one data set")
    stored = known.model.towers if known else {}
    towers = {name: resolve_tower(tower, stored.get(name)) for name, tower in config.model.towers.items()}
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, towers=towers))
    known_sets = {task.name: task for task in known.data.sets} if known else {}
    sets = tuple(objective.resolve(task, config.model, known_sets.get(task.name)) for task in config.data.sets)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sets=sets))
    _check_towers(config)
    objective.first_values(config.data.tasks, config.model)  # raises where sets differ
    _check_adapters(config)
    _check_head(config)
    _check_prompts(config)
    _check_tasks(config)
    return config


def _check_towers(config: Config) -> None:
    """What the towers of one model must agree in, and that each has something to do."""
    model = config.model
    losses = [loss for task in config.data.sets for loss in (task.loss, *getattr(task.loss, "losses", ()))]
    guides = {getattr(loss, field, "") for loss in losses for field in ("guide", "teacher", "document_teacher")}
    if idle := sorted(model.towers.keys() - {*model.encoders} - guides):
        raise ConfigError(f"tower {idle[0]!r} encodes no column, nor does it guide or teach; give it one in model.columns")
    if "negative" in model.columns and (other := model.tower_of("positive")) != model.columns["negative"]:
        raise ConfigError(
            f"model.columns gives negatives to tower {model.columns['negative']!r}; they go where positives do, to {other!r}"
        )
    widths = {name: model.towers[name].width for name in model.encoders}
    if len(set(widths.values())) > 1:
        raise ConfigError(
            f"the towers' vectors are compared with each other, but have {widths} numbers; end the wider tower in a "
            'Dense(..., activation="identity")'
        )
    for name in model.encoders:
        if getattr(model.towers[name], "max_length", 0) == LONGEST and not config.data.buckets:
            raise ConfigError(f"tower {name!r} takes texts of any length, but batches are of one: set its max_length")
    _ = model.similarity, model.late  # these raise where towers differ
    if model.late and (mined := [task.name for task in config.data.sets if task.mine]):
        raise ConfigError(f"set {mined[0]!r} mines its negatives, which late interaction, without a vector a text, cannot")
    if config.export.format != "none":
        check_format(model, config.export.format)
    if config.export.calibrate and model.late:
        raise ConfigError("export.calibrate is of one vector a text; late interaction takes its ranges from what is stored")
    if max(config.export.dims, default=0) > (width := max(widths.values())):
        raise ConfigError(f"export.dims holds {max(config.export.dims)}; the model's vectors have {width} numbers")


def _check_adapters(config: Config) -> None:
    """Every set and the export must know their adapter now, not at the end of the run."""
    named = {f"set {task.name!r}": task.adapter for task in config.data.sets}
    named |= {"export": config.export.adapter} if config.export.format != "none" else {}
    towers = {name: config.model.towers[name].lora for name in config.model.encoders}
    for what, name in named.items():
        if name and not any(towers.values()):
            raise ConfigError(f"{what} names the adapter {name!r}; no tower has `lora`")
    for tower, adapters in towers.items():
        for what, name in named.items():
            try:
                lora.chosen(adapters, name)
            except ConfigError as error:
                raise ConfigError(f"{what}, tower {tower!r}: {error}") from error


def _check_head(config: Config) -> None:
    """The head that is to be exported must be there, and read single texts."""
    if config.export.format == classes.FORMAT:
        adapter = adapter_of(config.model, config.export.adapter)
        heads = {name: head for name, head in _untrained_heads(config).items() if head.adapter == adapter}
        classes.head_of(heads, config.export.head)


def _check_prompts(config: Config) -> None:
    """A set's prompt must be one of a tower that reads it, for one side at least."""
    for task in config.data.sets:
        towers = {column: config.model.towers[config.model.tower_of(column)] for column in task.names if is_text(column)}
        towers = {column: tower for column, tower in towers.items() if isinstance(tower, Tower)}
        if task.prompt and not any(tower.prompt_named(task.prompt, column) for column, tower in towers.items()):
            known = sorted({name for tower in towers.values() for name in tower.prompts or {}})
            raise ConfigError(
                f"set {task.name!r}: no tower of its texts has a prompt {task.prompt!r}; {nearest(task.prompt, known)}"
            )


def _check_tasks(config: Config) -> None:
    """What every evaluation asks of the model must be there now, not at its first evaluation: prompt or adapter, dims, head."""
    heads = _untrained_heads(config)
    for task in config.evaluate.tasks:
        tasks.check_late(task, config.model)
        for side, seen in zip(task.sides, task.seen, strict=True):
            what = f"evaluation task {task.name!r}"
            try:
                column = side_of(config.model, side, seen)
                name = config.model.tower_of(column)
                tower, what = config.model.towers[name], f"{what}, tower {name!r}"
                _, adapter = asked(config.model, column, task=task.prompt or None)
                lora.chosen(tower.lora, adapter)
                if max(task.dims, default=0) > tower.width:
                    raise ConfigError(f"dims holds {max(task.dims)}; its vectors have {tower.width} numbers")
            except ConfigError as error:
                raise ConfigError(f"{what}: {error}") from error
        if isinstance(task, HeadAccuracy):
            head_of(task, heads, f"run {config.name!r}", config.model)


def _untrained_heads(config: Config) -> dict[str, Head]:
    """The class heads as the run will have them, all zeros; made only where one is evaluated or is what is exported."""
    evaluated = any(isinstance(task, HeadAccuracy) for task in config.evaluate.tasks)
    if not evaluated and config.export.format != classes.FORMAT:
        return {}
    shapes = jax.eval_shape(lambda: _loss_params(config, {n: build_embedder(t) for n, t in config.model.towers.items()}))
    return heads_of(config, {"loss": jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)})


def prepare(config: Config) -> tuple[tasks.TaskData, ...]:
    """The evaluation tasks of a resolved config, read. Labels that a head will not know are an error now, not at the end."""
    prepared, heads = tasks.prepare(config.evaluate.tasks), _untrained_heads(config)
    for data in prepared:
        if isinstance(data, HeadData):
            data.of(heads, f"run {config.name!r}", config.model)
    if config.export.calibrate:
        column_of(open_source(config.export.calibrate), config.export.calibrate_column or None, ("text", "image"))
    return prepared


def build(config: Config, folder: Path) -> Run:
    """Everything a resolved config needs, in a run folder that exists. No parameter is made yet."""
    mesh = sharding.make_mesh(config.mesh)
    _check_sizes(config, mesh)
    sources = {task.name: open_source(task.source) for task in config.data.sets}
    towers = {name: tower for name, tower in config.model.towers.items() if isinstance(tower, Tower)}
    make_all = lambda: {name: _texts(config, name, tower, sources, folder) for name, tower in towers.items()}
    texts = distributed.in_turn("making the tokenizers", make_all, config.distributed.meet)
    mined = {task.name: Mined(task, sources[task.name], folder / "mined") for task in config.data.sets if task.mine}
    batches = _batches(config, sources, mined, texts, folder, mesh)
    made = parts(config, mesh)
    init = functools.partial(_init, config, made.embedders, made.tx, mesh)
    return Run(config, mesh, sources, texts, mined, batches, made.embedders, init, made.abstract, made.constants, made.steps)


def parts(config: Config, mesh: jax.sharding.Mesh) -> Parts:
    """What of a run needs no data, from a resolved config. The mesh may be of devices that are not here."""
    _check_sizes(config, mesh)
    embedders: dict[str, Any] = {name: build_embedder(tower) for name, tower in config.model.towers.items()}
    objectives = {task.name: objective.make(task, config.model, embedders, mesh) for task in config.data.tasks}
    shapes = jax.eval_shape(functools.partial(_random_params, config, embedders))
    trained_shapes, frozen = _partition(config, shapes)
    trained_shapes, stats_shapes = optim.statistics(trained_shapes)
    if "loss" in frozen:
        path = sharding.path_of(jax.tree_util.tree_leaves_with_path({"loss": frozen["loss"]})[0][0])
        learned = path.removeprefix("loss/") if path in optim.OF_THE_LOSS else ""
        instead = f"; set the loss's learn_{learned} to False instead" if learned else ", which is the loss's own: leave it out"
        raise ConfigError(f"optim.freeze matches {path}{instead}")
    if stats_shapes and config.optim.cached > 1:
        tower = next(iter(stats_shapes["towers"]))
        raise ConfigError(
            f"optim.cached is {config.optim.cached}, but tower {tower!r} normalises by statistics of the batch, which chunks "
            f"have not: set model.towers.{tower}.freeze_statistics to True, or use optim.accumulate"
        )
    still = {name: tower.freeze_layers for name, tower in config.model.towers.items() if tower.freeze_layers}
    tx, schedule = optim.make(config.optim, config.steps, trained_shapes, still)
    start = functools.partial(step.init_state, tx=tx, ema=config.optim.ema)
    abstract = jax.eval_shape(start, trained_shapes, stats=stats_shapes)
    shardings = sharding.shardings(abstract, mesh)
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    constants = jax.tree.map(place, frozen, sharding.shardings(frozen, mesh))
    steps = {}
    for name, made in objectives.items():
        made_step = step.make(_gradient(config, made, mesh), tx, schedule, config.seed, config.optim.ema)
        steps[name] = step.jitted(made_step, shardings)
    return Parts(embedders, tx, jax.tree.map(place, abstract, shardings), constants, steps)


def _partition(config: Config, params: dict) -> tuple[dict, dict]:
    return optim.partition(params, (*config.optim.freeze, *optim.constant(config.model, config.data.sets)))


def _gradient(config: Config, made: objective.Objective, mesh: jax.sharding.Mesh) -> step.Gradient:
    if config.optim.cached > 1:
        return step.cached(made, config.optim.cached, mesh)
    return step.plain(made) if config.optim.accumulate == 1 else step.accumulated(made, config.optim.accumulate)


def _check_sizes(config: Config, mesh: jax.sharding.Mesh) -> None:
    size, devices = config.data.batch_size, math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
    for name in ("accumulate", "cached"):
        parts = getattr(config.optim, name)
        if size % (devices * parts):
            raise ConfigError(f"data.batch_size {size} is not divisible by {devices} devices x optim.{name} {parts}")
    for name, tower in config.model.towers.items():
        if isinstance(tower.arch, Transformer | Vit | ModifiedResnet) and tower.arch.heads % mesh.shape["tensor"]:
            raise ConfigError(
                f"mesh.tensor {mesh.shape['tensor']} does not divide the {tower.arch.heads} heads of tower {name!r}"
            )


def _random_params(config: Config, embedders: dict[str, Any]) -> dict:
    """Random parameters of all towers and losses; every tower has a key of its own."""
    key = jax.random.key(config.seed)
    towers = {}
    for i, name in enumerate(sorted(embedders)):
        own = jax.random.fold_in(key, i)
        towers[name] = embedders[name].init(own)
        if adapters := config.model.towers[name].lora:
            towers[name]["lora"] = lora.init(adapters, towers[name]["encoder"], jax.random.fold_in(own, 0))
    losses = _loss_params(config, embedders)
    return {"towers": towers, **({"loss": losses} if losses else {})}


def _loss_params(config: Config, embedders: dict[str, Any]) -> dict:
    key, losses = jax.random.key(config.seed), {}
    for i, task in enumerate(config.data.tasks, len(embedders)):
        losses |= objective.loss_params(task, config.model, embedders, jax.random.fold_in(key, i))
    return losses


def _init(config: Config, embedders, tx, mesh) -> tuple[step.TrainState, dict]:
    """The first state and the constants, each part made where it lives: random ones in a jitted, sharded call, pretrained
    ones from their folder."""
    make = functools.partial(_random_params, config, embedders)
    params = jax.jit(make, out_shardings=sharding.shardings(jax.eval_shape(make), mesh))()
    for name, tower in config.model.towers.items():
        if tower.init:
            whole = {"towers": {name: _overlay(params["towers"][name], read_start(tower))}}
            params["towers"][name] = sharding.put(whole, mesh)["towers"][name]
    trained, constants = _partition(config, params)
    trained, stats = optim.statistics(trained)
    start = lambda trained, stats: step.init_state(trained, tx, config.optim.ema, stats)
    places = sharding.shardings(jax.eval_shape(start, trained, stats), mesh)
    return jax.jit(start, out_shardings=places)(trained, stats), constants


def _overlay(random: dict, read: dict) -> dict:
    """What the folder holds, and random values for what it does not (a new projection)."""
    missing = {key: jax.tree.map(np.asarray, distributed.whole(value)) for key, value in random.items() if key not in read}
    for key, value in random.get("dense", {}).items():
        if key not in read.get("dense", {}):
            missing.setdefault("dense", dict(read.get("dense", {})))[key] = jax.tree.map(np.asarray, distributed.whole(value))
    return {**read, **missing}


def _texts(config: Config, name: str, tower: Tower, sources: dict, folder: Path) -> Texts:
    """The tower's tokenizer, kept in the run folder so that the run stands alone."""
    kept = tokenizer_folders(folder, config.model)[name]
    if not (kept / "tokenizer.json").exists():
        assert tower.arch is not None and tower.max_length is not None
        if tower.tokenizer == "wordpiece":
            if tower.arch.pad_id != 0:
                raise ConfigError(
                    f"tower {name!r}: a trained tokenizer pads with id 0; set arch.pad_id to 0, not {tower.arch.pad_id}"
                )
            rows = _training_text(config, sources)
            markers = (tower.late.query_marker, tower.late.document_marker) if tower.late else ()
            made = train_wordpiece(rows, tower.arch.vocab_size - len(markers), lowercase=tower.lowercase)
            add_tokens(made, markers, tower.arch.vocab_size)
            save_tokenizer(made, kept, max_length=tower.max_length)
        else:
            origin = tower.tokenizer or tower.init
            if not origin:
                raise ConfigError(f'tower {name!r} has no tokenizer; name one, or use "wordpiece" to train one')
            texts = make_texts(tower, folders.resolve(origin))
            save_tokenizer(texts.tokenizer, kept, max_length=tower.max_length, source=folders.resolve(origin))
    return make_texts(tower, kept)


def _training_text(config: Config, sources: dict) -> Iterator[str]:
    """The text columns of evenly spaced training rows."""
    for task in config.data.sets:
        source = sources[task.name]
        reads = lambda name: is_text(name) and isinstance(config.model.towers[config.model.tower_of(name)], Tower)
        columns = [theirs for ours, theirs in task.columns.items() if reads(ours)]
        stride = max(1, len(source) // TOKENIZER_ROWS)
        for i in range(0, len(source), stride):
            try:
                row = source[i]
            except BadRow:
                continue
            for value in map(row.get, columns):
                yield from (text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str))


def _batches(
    config: Config, sources: dict, mined: dict[str, Mined], texts: dict[str, Texts], folder: Path, mesh: jax.sharding.Mesh
) -> Batches:
    columns = {name.partition("_")[0] for task in config.data.sets for name in task.names} & ENCODED
    towers = {column: config.model.tower_of(column) for column in columns}
    found = {column: config.model.towers[tower] for column, tower in towers.items()}
    part, parts = sharding.share(mesh)
    return Batches(
        config.data,
        [sources[task.name] for task in config.data.sets],
        {column: texts[tower].of(column) for column, tower in towers.items() if tower in texts},
        [
            {column: tower.prompt_for(column, task.prompt) for column, tower in found.items() if isinstance(tower, Tower)}
            for task in config.data.sets
        ],
        seed=config.seed,
        steps=config.steps,
        images={column: make_images(tower) for column, tower in found.items() if isinstance(tower, ImageTower)},
        mined=mined,
        process_index=part,
        process_count=parts,
        run_folder=folder,
    )


def step_flops(run: Run, columns: Mapping[str, Any]) -> float:
    """FLOPs of a training step on a batch of these columns; frozen layers count as trained ones."""
    total = 0.0
    for name in ENCODED & columns.keys():
        arch = run.config.model.towers[run.config.model.tower_of(name)].arch
        assert arch is not None
        rows, length = column_size(arch, columns[name])
        total += train_flops(arch, rows, length)
    return total


def column_size(arch: Architecture | ImageArchitecture, column: Mapping[str, Any]) -> tuple[int, int]:
    """(texts or pictures, tokens or patches of each) of a column."""
    if "pixels" in column:
        return math.prod(column["pixels"].shape[:-3]), arch.tokens  # pyright: ignore[reportAttributeAccessIssue]
    *rows, length = column["ids"].shape
    return math.prod(rows), length


def shape_name(task: str, columns: Mapping[str, Any]) -> str:
    """A name for the compiled step of a batch: its task and the shapes of its texts and pictures."""
    shapes = (next(iter(columns[name].values())).shape for name in sorted(ENCODED & columns.keys()))
    return " ".join([task, *("x".join(map(str, shape)) for shape in shapes)])


def summary(run: Run) -> str:
    """One line on what is about to be trained."""
    trained = sum(math.prod(x.shape) for x in jax.tree.leaves(run.abstract.params))
    devices = run.mesh.devices.flat
    rows = sum(len(source) for source in run.sources.values())
    shape = " x ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items())
    return (
        f"{trained / 1e6:.1f}M trained parameters, {rows} rows, batch {run.config.data.batch_size}, {run.config.steps} steps, "
        f"mesh {shape} ({devices[0].platform})"
    )


def compiled(run: Run) -> Iterator[tuple[str, jax.stages.Compiled]]:
    """Each step of the run compiled ahead, not run: for its memory."""
    for task, columns in run.batches.shapes():
        batch = placed(columns, run.mesh)
        yield shape_name(task, columns), run.steps[task].lower(run.abstract, run.constants, batch).compile()


def placed(columns: Mapping[str, Any], mesh: jax.sharding.Mesh) -> Any:
    """The shapes of a global batch, with their place on the mesh."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.rows(mesh)), columns)

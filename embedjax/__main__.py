"""The entry of the command line: calls a verb, and tells errors in one line and an exit code of the README."""

import logging
import os
import sys
import traceback
from collections.abc import Sequence

from embedjax import allocator, supervise
from embedjax.commands import COMMANDS
from embedjax.config.errors import ConfigError, Elsewhere, EmbedjaxError, NonFiniteError, Saved, nearest

USAGE = """usage: embedjax COMMAND ...

  train CONFIG [--run-dir DIR] [--fresh] [--dry-run] [--FIELD VALUE ...]   train, or go on with a run
  evaluate MODEL --task TASK --data FILE [--columns a=b,...] [--dims 64]   score a model
  encode MODEL INPUT OUTPUT [--as query|document] [--task NAME]            texts or pictures -> vectors (.npy or .parquet)
  encode MODEL INPUT OUTPUT --precision int8 [--dim 256]                   shorter, as codes; OUTPUT.faiss, .usearch: an index
  encode MODEL INPUT OUT.jsonl --for qdrant|vespa|pgvector [--ids COLUMN]  vectors for an engine
  search MODEL --corpus FILE|--images FOLDER "query" [--like PICTURE]       the texts or pictures nearest to it
  mine MODEL CORPUS PAIRS OUT [--num-negatives 5 ...]                      hard negatives of the pairs, from the corpus
  export MODEL FOLDER [--format sentence-transformers|hf]                  write a folder that others load
  export FOLDER --check                                                    read it back and compare
  export FOLDER --calibrate FILE [--dims 256,64]                           save the ranges of int8 and uint8 in it
  evaluate FOLDER --task retrieval|sts --data FILE --retention             what each dimension and precision keeps
  plan CONFIG --topology v5e:16x16 [--search]                              memory, FLOPs, traffic and time on devices not here
  launch local|slurm|tpu-vm|jobset-tpu|jobset-gpu|sky CONFIG [--dry-run]   start it there
  doctor [FOLDER ...]                                                      this machine, versions, allocator, folders
  doctor --data CONFIG                                                     lengths, cut, repeated, bad and leaking rows

MODEL is a run folder (newest save; RUN@best, RUN@500; RUN@soup:100,200 or RUN@soup:last3, the mean of saves), an exported
folder, a Hugging Face or sentence-transformers folder, or a hub id. `embedjax COMMAND --help` tells more."""


def run(arguments: Sequence[str]) -> int:
    """Runs a command and returns its exit code; what went wrong is told in one line on standard error."""
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(USAGE, flush=True)
            return 0 if arguments else 2
        if arguments[0] not in COMMANDS:
            raise ConfigError(f"unknown command {arguments[0]!r}; {nearest(arguments[0], COMMANDS)}")
        COMMANDS[arguments[0]](arguments[1:])
    except EmbedjaxError as error:
        shared = isinstance(error, Saved | NonFiniteError) and supervise.facts.get("process")  # the first one tells
        return error.code if shared or isinstance(error, Elsewhere) else _fail(str(error), error.code)
    except BrokenPipeError as error:
        if _heard():
            return _fail(f"a connection broke off ({error.strerror})", 4)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", 4)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Exception as error:
        if "count" in supervise.facts and "RESOURCE_EXHAUSTED" not in str(error):
            traceback.print_exc()
            supervise.report("failed", 1)  # the parent has the last word: jax may be about to end this process, loudly
            return supervise.LOST
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = next(line for line in str(error).splitlines() if "RESOURCE_EXHAUSTED" in line)
        return _fail(f"the device is out of memory: a smaller data.batch_size, remat or optim.cached needs less ({reason})", 2)
    return 0


def _heard() -> bool:
    """Whether standard output still has a reader. A run of training goes on without: its status sees to that."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return False
    return True


def _fail(message: str, code: int) -> int:
    who = f"process {process} of {supervise.facts['count']}: " if (process := supervise.facts.get("process")) else ""
    sys.stdout.flush()
    print(f"embedjax: {who}{' '.join(message.split())}", file=sys.stderr, flush=True)
    return code


def main() -> None:
    """The command `embedjax`."""
    allocator.restart()
    several = sys.argv[1:2] == ["train"] and supervise.several(os.environ)
    if several:
        supervise.split()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("embedjax").setLevel(logging.INFO)
    code = run(sys.argv[1:])
    if several:
        from embedjax import distributed

        distributed.leave(code)
    sys.exit(code)


if __name__ == "__main__":
    main()

"""Hard negatives from a model and a corpus: a file of them (`mine_file`), or those of a run that mines its own (`renew`)."""

from embedjax.mine.again import mining_due, renew
from embedjax.mine.files import Mining, mine_file
from embedjax.mine.scorers import Scorer, cross_encoder, teacher

__all__ = ["Mining", "Scorer", "cross_encoder", "mine_file", "mining_due", "renew", "teacher"]

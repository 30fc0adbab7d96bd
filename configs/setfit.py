r"""A classifier from few labelled texts, after SetFit (Tunstall et al. 2022): first the encoder learns what is alike from all
pairs of them, then a plain classifier is fitted on its vectors.

    embedjax train configs/setfit.py --data.sets.0.source.path few.tsv --evaluate.tasks.0.train.path few.tsv \
        --evaluate.tasks.0.source.path test.tsv --run-dir runs/few

Data: the columns text and label, labels numbered from 0; about 8 texts a label are enough, and no fewer rows than a batch. In
every batch texts of one label are each other's positives and all others negatives, which are SetFit's pairs without writing
them down. 8 questions of each of TREC's six kinds and 40 steps took the 500 test questions from 0.55 to 0.79, in a minute on
two busy CPU cores. `classification/accuracy` is that of a logistic regression on few.tsv, asked on test.tsv. For a head that
is exported with the model, train one on the vectors as they are now:

    embedjax train configs/classify.py --model.towers.text.init runs/few/export --optim.freeze '^towers/' \
        --optim.learning-rate 1e-2 --data.sets.0.source.path few.tsv --data.sets.0.loss.classes 6 --run-dir runs/head
"""

from embedjax.config import Classification, Config, Data, Evaluate, File, Model, Optim, Set, SupCon, Tower


def config() -> Config:
    return Config(
        name="setfit",
        steps=100,
        model=Model(towers={"text": Tower(init="sentence-transformers/all-MiniLM-L6-v2", max_length=64)}),
        data=Data(
            batch_size=32,
            sets=(
                Set(
                    source=File("few.tsv"),
                    columns={"anchor": "text", "label": "label"},
                    loss=SupCon(),
                    name="few",
                ),
            ),
        ),
        optim=Optim(learning_rate=2e-5, warmup=0.1),
        evaluate=Evaluate(
            tasks=(Classification(source=File("test.tsv"), train=File("few.tsv"), per_label=0, name="classification"),),
            baseline=True,
        ),
    )

r"""A small encoder from random weights, first of three runs: masked words, then pairs, then pairs with hard negatives.

    embedjax train configs/mlm.py --data.sets.0.source.path my_texts.txt --run-dir runs/words
    embedjax train configs/finetune.py --model.towers.text.init runs/words/export --data.sets.0.source.path my_pairs.tsv \
        --optim.learning-rate 2e-4 --run-dir runs/pairs
    embedjax mine runs/pairs/export my_corpus.tsv my_pairs.tsv my_triplets.jsonl

and the second command once more, on my_triplets.jsonl with `"negative": "negative"` among the columns of the config, from
runs/pairs/export. The first run's vectors alone are no good for search: it teaches words, the others what is alike.

Data: a text a line. The tokenizer is trained on them. Hardware: sized for a small machine; a larger `arch` and more steps are
what a GPU is for. Metrics: `accuracy`, the share of the hidden tokens that are told, and `weight`, how many a batch has.
"""

from embedjax.config import Bert, Checkpoint, Config, Data, File, MaskedLanguage, Model, Optim, Set, Tower


def config() -> Config:
    return Config(
        name="mlm",
        steps=20_000,
        model=Model(
            towers={
                "text": Tower(
                    arch=Bert(
                        vocab_size=16_384,
                        width=256,
                        depth=4,
                        heads=4,
                        mlp=1024,
                        positions=128,
                        dropout=0.1,
                        attention_dropout=0.1,
                    ),
                    tokenizer="wordpiece",
                    max_length=128,
                )
            }
        ),
        data=Data(
            batch_size=64,
            sets=(
                Set(
                    source=File("texts.txt"),
                    columns={"anchor": "text"},
                    loss=MaskedLanguage(share=0.15, whole_words=True),
                    name="words",
                ),
            ),
        ),
        optim=Optim(learning_rate=5e-4, schedule="linear", warmup=0.05),
        checkpoint=Checkpoint(every=1000),
    )

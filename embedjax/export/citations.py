"""The papers that a model card names: of the losses that trained a model, and of what its vectors are made by."""

from collections.abc import Iterator

from embedjax.config import Config, ImageTower

PAPERS: dict[str, str] = {
    "AnglE": "Li & Li 2024, AnglE-optimized Text Embeddings",
    "BatchAll": "Hermans, Beyer & Leibe 2017, In Defense of the Triplet Loss for Person Re-Identification",
    "BatchHard": "Hermans, Beyer & Leibe 2017, In Defense of the Triplet Loss for Person Re-Identification",
    "BatchHardSoftMargin": "Hermans, Beyer & Leibe 2017, In Defense of the Triplet Loss for Person Re-Identification",
    "BatchSemiHard": "Schroff, Kalenichenko & Philbin 2015, FaceNet",
    "Bert": "Devlin et al. 2018, BERT: Pre-training of Deep Bidirectional Transformers",
    "ClassifyPair": "Reimers & Gurevych 2019, Sentence-BERT",
    "ClipText": "Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision",
    "CoSent": "Huang et al. 2024, CoSENT: Consistent Sentence Embedding via Similarity Ranking",
    "Contrastive": "Hadsell, Chopra & LeCun 2006, Dimensionality Reduction by Learning an Invariant Mapping",
    "CosineRegression": "Reimers & Gurevych 2019, Sentence-BERT",
    "DenoisingAutoEncoder": "Wang, Reimers & Gurevych 2021, TSDAE",
    "DistilBert": "Sanh et al. 2019, DistilBERT",
    "GlobalOrthogonal": "Zhang et al. 2017, Learning Spread-out Local Feature Descriptors",
    "KlDistillation": "Lin, Yang & Lin 2020, Distilling Dense Representations for Ranking using Tightly-Coupled Teachers",
    "MarginMse": "Hofstätter et al. 2020, Improving Efficient Neural Ranking Models (Margin-MSE)",
    "MaskedLanguage": "Devlin et al. 2018, BERT: Pre-training of Deep Bidirectional Transformers",
    "ModernBert": "Warner et al. 2024, Smarter, Better, Faster, Longer (ModernBERT)",
    "ModifiedResnet": "Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision",
    "Mpnet": "Song et al. 2020, MPNet: Masked and Permuted Pre-training for Language Understanding",
    "MultipleNegatives": "van den Oord, Li & Vinyals 2018, Representation Learning with Contrastive Predictive Coding",
    "OnlineContrastive": "Hadsell, Chopra & LeCun 2006, Dimensionality Reduction by Learning an Invariant Mapping",
    "Resnet": "He et al. 2015, Deep Residual Learning for Image Recognition",
    "Roberta": "Liu et al. 2019, RoBERTa: A Robustly Optimized BERT Pretraining Approach",
    "Siglip": "Zhai et al. 2023, Sigmoid Loss for Language Image Pre-Training",
    "SiglipText": "Zhai et al. 2023, Sigmoid Loss for Language Image Pre-Training",
    "SupCon": "Khosla et al. 2020, Supervised Contrastive Learning",
    "Triplet": "Schroff, Kalenichenko & Philbin 2015, FaceNet",
    "VectorDistillation": "Reimers & Gurevych 2020, Making Monolingual Sentence Embeddings Multilingual",
    "Vit": "Dosovitskiy et al. 2020, An Image is Worth 16x16 Words",
}
"""By the names of the config's classes."""
LATE = "Khattab & Zaharia 2020, ColBERT: Efficient and Effective Passage Search via Contextualized Late Interaction over BERT"
LORA = "Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models"
MATRYOSHKA = "Kusupati et al. 2022, Matryoshka Representation Learning"
CACHED = "Gao et al. 2021, Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup (GradCache)"


def citations(config: Config) -> list[str]:
    """The papers behind a run's losses, towers and training, each once."""
    return list(dict.fromkeys(_cited(config)))


def _cited(config: Config) -> Iterator[str]:
    losses = [part for task in config.data.sets for part in (task.loss, *getattr(task.loss, "losses", ()))]
    yield from (PAPERS[name] for loss in losses if (name := type(loss).__name__) in PAPERS)
    if any(getattr(loss, "matryoshka", ()) for loss in losses):
        yield MATRYOSHKA
    for name in config.model.encoders:
        tower = config.model.towers[name]
        if (kind := type(tower.arch).__name__) in PAPERS:
            yield PAPERS[kind]
        if not isinstance(tower, ImageTower) and tower.late:
            yield LATE
        if tower.lora:
            yield LORA
    if config.optim.cached > 1:
        yield CACHED

"""open_clip's models of pictures and texts <-> our towers: `open_clip_config.json` and the names of its tensors.

As `clip.py` it speaks of a config and of tensors, not of files. A picture is seen by open_clip's own ViT (CLIP's form) or
ModifiedResNet, or by one of timm's ViTs, a text read by its own transformer, causal as CLIP's or, as SigLIP's, not. Towers of
texts that open_clip takes from Hugging Face are not held by a folder: it fetches their sizes by a hub id.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from embedjax.config import ClipText, Dense, ImageArchitecture, ModifiedResnet, Pixels, SiglipText, Vit
from embedjax.config.errors import ConfigError, nearest
from embedjax.config.model import Activation
from embedjax.models import joint, timm
from embedjax.models.families import modified_resnet, typed
from embedjax.models.joint import Outer, Part, Parts, Scheme
from embedjax.models.names import Names, Row, linear, norm

CONFIG = "open_clip_config.json"
STEM = "open_clip_model"
TOKENIZER = "tokenizer of this folder"
"""Any name: with one, open_clip reads the folder's tokenizer, not OpenAI's. A folder on the hub has its own id here."""

FITS: dict[str, Literal["crop", "squash"]] = {"shortest": "crop", "squash": "squash"}
INTERPOLATIONS = ("bicubic", "bilinear")
FREE = ("patch_dropout", "output_tokens", "tokenizer_kwargs", "pos_embed_type")
"""Options that change no vector of a trained model, or that `data/text.py` knows."""
PLAIN = (None, False, 0)
"""Values of an option that is off."""


# ---- open_clip_config.json


def parts(config: Mapping[str, Any], *, file: str | Path) -> dict[str, Part]:
    """The towers that an open_clip_config.json describes. Raises ConfigError, under the name of `file`, for what they do not
    compute."""
    whole = _object(config, "model_cfg", file)
    vision, text = _object(whole, "vision_cfg", file), _object(whole, "text_cfg", file)
    if "multimodal_cfg" in whole:
        raise ConfigError(f"{file}: models that write captions (multimodal_cfg) are not supported")
    try:
        features, quick = whole["embed_dim"], bool(whole.get("quick_gelu"))
        if vision.get("timm_model_name"):
            image = _timm(vision, features)
        elif isinstance(vision.get("layers"), list):
            _refuse(vision, "vision_cfg", ("image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"))
            image = Part(
                modified_resnet.from_open_clip({**vision, "image_size": _side(vision.get("image_size", 224))}, features)
            )
        else:
            image = _native(vision, features, quick)
        found = {"image": image, "text": _text(text, features, quick)}
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    except KeyError as error:
        raise ConfigError(f"{file} has no {error}, which a model of open_clip needs") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ConfigError(f"{file} does not describe a model of open_clip: {error}") from error
    for part in found.values():
        typed(part.arch, file=file)
    return found


def _object(config: Mapping[str, Any], key: str, file: str | Path) -> Mapping[str, Any]:
    if not isinstance(value := config.get(key), Mapping):
        raise ConfigError(f"{file}: {key} is {value!r}; expected an object")
    return value


def _refuse(config: Mapping[str, Any], what: str, known: tuple[str, ...]) -> None:
    """Raises ConfigError for an option that is on and changes what is computed, but is not ours."""
    for key, value in config.items():
        if key not in (*known, *FREE) and value not in PLAIN and not key.startswith(("hf_", "timm_", "attn_pooler_")):
            raise ConfigError(f"{what}.{key} is {value!r}, which is not supported")


def _native(config: Mapping[str, Any], features: int, quick: bool) -> Part:
    """open_clip's own ViT."""
    known = ("image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio", "no_ln_pre", "norm_kwargs", "act_kwargs")
    _refuse(config, "vision_cfg", (*known, "pool_type"))
    if config.get("pool_type", "tok") != "tok":
        raise ConfigError(f"vision_cfg.pool_type is {config['pool_type']!r}; expected 'tok'")
    width = config.get("width", 768)
    arch = Vit(
        image=_side(config.get("image_size", 224)),
        patch=_side(config.get("patch_size", 16)),
        width=width,
        depth=config.get("layers", 12),
        heads=width // config.get("head_width", 64),
        mlp=int(width * config.get("mlp_ratio", 4.0)),
        activation=_activation(config, quick),
        norm_eps=_eps(config),
        pool="cls",
        input_norm=not config.get("no_ln_pre"),
        patch_bias=False,
    )
    return Part(arch, (Dense(features, False, "identity"),))


def _timm(config: Mapping[str, Any], features: int) -> Part:
    """One of timm's ViTs."""
    name = str(config["timm_model_name"]).partition(".")[0]
    if name not in timm.VITS:
        raise ConfigError(f"vision_cfg.timm_model_name {name!r} is not supported; {nearest(name, timm.VITS)}")
    arch = timm.VITS[name]
    if (pool := config.get("timm_pool", "avg")) not in ("", timm.POOLS[arch.pool]):
        raise ConfigError(f"vision_cfg.timm_pool is {pool!r}; {name} is supported with {timm.POOLS[arch.pool]!r}")
    if (size := _side(config.get("image_size", arch.image))) != arch.image:
        raise ConfigError(f"vision_cfg.image_size is {size}; {name} sees pictures of {arch.image}")
    if (projection := config.get("timm_proj", "linear")) == "none":
        return Part(arch)
    if projection != "linear":
        raise ConfigError(f"vision_cfg.timm_proj is {projection!r}; expected 'linear' or 'none'")
    return Part(arch, (Dense(features, bool(config.get("timm_proj_bias")), "identity"),))


def _text(config: Mapping[str, Any], features: int, quick: bool) -> Part:
    """open_clip's own transformer of texts."""
    if name := config.get("hf_model_name"):
        raise ConfigError(f"text_cfg.hf_model_name is {name!r}: its sizes are not in the folder; only own towers are read")
    known = ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "norm_kwargs", "act_kwargs", "pad_id")
    _refuse(config, "text_cfg", (*known, "eos_id", "no_causal_mask", "pool_type", "proj_bias", "proj_type"))
    if (config.get("tokenizer_kwargs") or {}).keys() - {"clean"}:
        raise ConfigError(f"text_cfg.tokenizer_kwargs is {config['tokenizer_kwargs']!r}; expected clean alone")
    pool, width = config.get("pool_type", "argmax"), config.get("width", 512)
    fills, vocab_size = bool(config.get("no_causal_mask")), config.get("vocab_size", 49408)
    if pool not in (allowed := ("last",) if fills else ("argmax", "eos")):
        seen = "without" if fills else "with"
        raise ConfigError(f"text_cfg.pool_type is {pool!r}; {seen} a causal mask {' or '.join(allowed)} is supported")
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "width": width,
        "depth": config.get("layers", 12),
        "heads": config.get("heads", 8),
        "mlp": int(width * config.get("mlp_ratio", 4.0)),
        "positions": config.get("context_length", 77),
        "activation": _activation(config, quick),
        "norm_eps": _eps(config),
    }
    if fills:
        arch = SiglipText(**sizes, pad_id=config.get("pad_id", SiglipText().pad_id))
    else:
        # The end of a text is the largest id in it, and so that of the vocabulary.
        arch = ClipText(**sizes, pad_id=config.get("pad_id", 0), eos_id=config["eos_id"] if pool == "eos" else vocab_size - 1)
    if config.get("proj_type", "linear") == "none":
        return Part(arch)
    return Part(arch, (Dense(features, bool(config.get("proj_bias")), "identity"),))


def _activation(config: Mapping[str, Any], quick: bool) -> Activation:
    """Of an own tower."""
    options = config.get("act_kwargs") or {}
    if quick:
        if options:
            raise ConfigError(f"act_kwargs is {options!r}; quick_gelu takes none")
        return "quick_gelu"
    if options not in ({}, {"approximate": "tanh"}, {"approximate": "none"}):
        raise ConfigError(f"act_kwargs is {options!r}; expected approximate 'tanh' or none")
    return "gelu_tanh" if options.get("approximate") == "tanh" else "gelu"


def _eps(config: Mapping[str, Any]) -> float:
    options = config.get("norm_kwargs") or {}
    if options.keys() - {"eps"}:
        raise ConfigError(f"norm_kwargs is {options!r}; expected eps alone")
    return options.get("eps", 1e-5)


def _side(value: Any) -> int:
    """The side of a square, which may be written as [side, side]."""
    if isinstance(value, list):
        if len(value) != 2 or value[0] != value[1]:
            raise ConfigError(f"a size is {value}; pictures and patches are squares here")
        return value[0]
    return value


def to_config(found: Parts, loss: Mapping[str, Any]) -> dict[str, Any]:
    """The model_cfg of two towers. Raises ConfigError, which says what does not fit, where open_clip has no such model."""
    image, text = found["image"], found["text"]
    assert isinstance(image.arch, ImageArchitecture) and isinstance(text.arch, ClipText | SiglipText)
    own = isinstance(image.arch, Vit) and is_native(image.arch)
    if isinstance(image.arch, ModifiedResnet) and image.dense:
        raise ConfigError(f"a ModifiedResnet has the projections {image.dense}; open_clip's has none but that of its pooling")
    if not isinstance(image.arch, ModifiedResnet):
        _check_projection("image", image, optional=not own, biased=not own)
    _check_projection("text", text, optional=True, biased=True)
    widths = {side: part.dense[-1].features if part.dense else part.arch.width for side, part in found.items()}
    if widths["image"] != widths["text"]:
        raise ConfigError(f"the towers give vectors of {widths['image']} and {widths['text']} numbers; they must be as many")
    kinds = [text.arch.activation] + ([image.arch.activation] if isinstance(image.arch, Vit) and own else [])
    quick = {kind == "quick_gelu" for kind in kinds}
    if len(quick) > 1:
        raise ConfigError(f"open_clip has quick_gelu in both towers or in none; these have {kinds[1]} and {kinds[0]}")
    whole: dict[str, Any] = {"embed_dim": widths["text"]}
    whole |= {"quick_gelu": True} if quick == {True} else {}
    whole |= {"init_logit_bias": _first(found, loss)["loss/bias"]} if _biased(found, loss) else {}
    whole |= {"custom_text": True} if text.arch.fills else {}
    return whole | {"vision_cfg": _vision_config(image), "text_cfg": _text_config(text)}


def is_native(arch: Vit) -> bool:
    """Whether a ViT is of the form that open_clip has itself."""
    return arch.pool == "cls" and not arch.patch_bias


def _check_projection(side: str, part: Part, *, optional: bool, biased: bool) -> None:
    plain = [dense for dense in part.dense if dense.activation == "identity" and (biased or not dense.bias)]
    if len(part.dense) > 1 or len(plain) < len(part.dense) or not (part.dense or optional):
        wanted = f"{'at most ' if optional else ''}one projection, without {'activation' if biased else 'activation and bias'}"
        raise ConfigError(f"the {side} tower has the projections {part.dense}; in open_clip it has {wanted}")


def _vision_config(part: Part) -> dict[str, Any]:
    arch = part.arch
    if isinstance(arch, ModifiedResnet):
        return modified_resnet.to_open_clip(arch)
    if not isinstance(arch, Vit):
        raise ConfigError(f"open_clip has no {type(arch).__name__} of ours; it has ViTs and CLIP's ModifiedResnet")
    if arch.registers:
        raise ConfigError(f"the image tower has {arch.registers} registers; open_clip's have none")
    if not is_native(arch):
        named = {"image_size": arch.image, "timm_model_name": timm.name_of(arch), "timm_model_pretrained": False}
        projection = {"timm_proj": "linear", "timm_proj_bias": part.dense[0].bias} if part.dense else {"timm_proj": "none"}
        return named | {"timm_pool": timm.POOLS[arch.pool]} | projection
    whole = {"image_size": arch.image, "layers": arch.depth, "width": arch.width, "head_width": arch.width // arch.heads}
    whole |= {"patch_size": arch.patch, "mlp_ratio": _ratio(arch)} | _options(arch)
    return whole | ({} if arch.input_norm else {"no_ln_pre": True})


def _text_config(part: Part) -> dict[str, Any]:
    arch = part.arch
    assert isinstance(arch, ClipText | SiglipText)
    whole = {"context_length": arch.positions, "vocab_size": arch.vocab_size, "hf_tokenizer_name": TOKENIZER}
    whole |= {"width": arch.width, "heads": arch.heads, "layers": arch.depth, "mlp_ratio": _ratio(arch)} | _options(arch)
    whole |= {"proj_bias": part.dense[0].bias} if part.dense else {"proj_type": "none"}
    if isinstance(arch, SiglipText):
        whole |= {"no_causal_mask": True, "pool_type": "last"}
    else:
        last = arch.eos_id == arch.vocab_size - 1
        whole |= {"pool_type": "argmax"} if last else {"pool_type": "eos", "eos_id": arch.eos_id}
    return whole | {"pad_id": arch.pad_id}


def _ratio(arch: Vit | ClipText | SiglipText) -> float:
    """The feed-forward part's share of the width, of which open_clip takes the whole part of the product."""
    ratio = arch.mlp / arch.width
    while int(arch.width * ratio) < arch.mlp:
        ratio = math.nextafter(ratio, math.inf)
    return ratio


def _options(arch: Vit | ClipText | SiglipText) -> dict[str, Any]:
    if arch.activation not in ("gelu", "gelu_tanh", "quick_gelu"):
        raise ConfigError(f"a {type(arch).__name__} has activation {arch.activation!r}; open_clip's have gelu or quick_gelu")
    tanh = {"act_kwargs": {"approximate": "tanh"}} if arch.activation == "gelu_tanh" else {}
    return tanh | ({"norm_kwargs": {"eps": arch.norm_eps}} if arch.norm_eps != 1e-5 else {})


def pixels(config: Mapping[str, Any], *, file: str | Path) -> Pixels:
    """What a preprocess_cfg says. Raises ConfigError for steps that are not ours."""
    default = Pixels()
    mode, how = config.get("resize_mode") or "shortest", config.get("interpolation") or "bicubic"
    if mode not in FITS:
        raise ConfigError(f"{file}: resize_mode {mode!r} is not supported; {nearest(str(mode), FITS)}")
    if how not in (*INTERPOLATIONS, "random"):
        raise ConfigError(f"{file}: interpolation {how!r} is not supported; {nearest(str(how), INTERPOLATIONS)}")
    three = [config.get(name) or getattr(default, name) for name in ("mean", "std")]
    if any(len(values) != 3 or not all(isinstance(x, int | float) for x in values) for values in three):
        raise ConfigError(f"{file}: mean and std must be three numbers each")
    mean, std = (cast(tuple[float, float, float], tuple(map(float, values))) for values in three)
    return Pixels(mean, std, FITS[mode], 0, "bilinear" if how == "bilinear" else "bicubic")


def from_pixels(pixels: Pixels, size: int) -> dict[str, Any]:
    """The preprocess_cfg of pictures of `size`. Raises ConfigError for steps that open_clip does not take."""
    if pixels.fit == "crop" and pixels.shorter not in (0, size):
        raise ConfigError(f"Pixels.shorter is {pixels.shorter}; open_clip scales the shorter side to the picture's, {size}")
    if pixels.interpolation not in INTERPOLATIONS:
        raise ConfigError(f"Pixels.interpolation is {pixels.interpolation!r}; open_clip has {' and '.join(INTERPOLATIONS)}")
    mode = next(theirs for theirs, ours in FITS.items() if ours == pixels.fit)
    square = {"size": [size, size], "mode": "RGB", "resize_mode": mode, "interpolation": pixels.interpolation}
    return square | {"mean": list(pixels.mean), "std": list(pixels.std)}


# ---- tensors


def _blocks(layer: str) -> tuple[Row, ...]:
    parts = tuple(f"blocks/attn/{part}" for part in ("query", "key", "value"))
    return (
        *norm("blocks/attn_norm", f"{layer}.ln_1"),
        Row(tuple(f"{part}/kernel" for part in parts), f"{layer}.attn.in_proj_weight", "3D D"),
        Row(tuple(f"{part}/bias" for part in parts), f"{layer}.attn.in_proj_bias", "3D"),
        *linear("blocks/attn/out", f"{layer}.attn.out_proj", "D D"),
        *norm("blocks/mlp_norm", f"{layer}.ln_2"),
        *linear("blocks/up", f"{layer}.mlp.c_fc", "F D"),
        *linear("blocks/down", f"{layer}.mlp.c_proj", "D F"),
    )


BLOCKS = _blocks("transformer.resblocks.{layer}")
VISION = Names(
    prefix="visual.",
    left_out=(),
    rows=(
        Row("class/embedding", "class_embedding", "D", form="rows"),
        Row("patches/kernel", "conv1.weight", "D C P P", form="conv"),
        Row("positions/embedding", "positional_embedding", "N D"),
        *BLOCKS,
        *norm("final_norm", "ln_post"),
    ),
)
INPUT_NORM = norm("norm", "ln_pre")
TEXT = Names(
    left_out=("attn_mask", "input_resolution", "context_length", "vocab_size"),
    rows=(
        Row("tokens/embedding", "token_embedding.weight", "V D"),
        Row("positions/embedding", "positional_embedding", "P D"),
        *BLOCKS,
        *norm("final_norm", "ln_final"),
    ),
)


def from_tensors(found: Parts, tensors: Mapping[str, np.ndarray], *, file: str | Path) -> dict[str, Any]:
    """As clip.from_tensors. Names of the tower of texts may all begin with "text.", as open_clip reads them."""
    nested = any(name.startswith("text.") for name in tensors)
    single = {name: x.reshape(()) if x.size == 1 and name.startswith("logit_") else x for name, x in tensors.items()}
    return joint.from_tensors(found, single, scheme(found, nested=nested, biased="logit_bias" in tensors), file=file)


def to_tensors(found: Parts, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `from_tensors`; what is not learned of the loss is written as it starts."""
    loss = params.get("loss", {})
    named = scheme(found, nested=isinstance(found["text"].arch, SiglipText), biased=_biased(found, loss))
    return joint.to_tensors(found, params, named._replace(first=_first(found, loss)))


def _biased(found: Parts, loss: Mapping[str, Any]) -> bool:
    return "bias" in loss or isinstance(found["text"].arch, SiglipText)


def _first(found: Parts, loss: Mapping[str, Any]) -> dict[str, float]:
    """What the loss starts from (Radford et al. 2021, Zhai et al. 2023), where it is not learned."""
    scale = math.log(10) if _biased(found, loss) else math.log(1 / 0.07)
    return {"loss/scale": scale} | ({"loss/bias": float(loss.get("bias", -10.0))} if _biased(found, loss) else {})


def scheme(found: Parts, *, nested: bool, biased: bool) -> Scheme:
    """The names of all tensors in a file of open_clip's; `nested` puts "text." before those of the tower of texts."""
    image, prefix = found["image"], "text." if nested else ""
    own = isinstance(image.arch, Vit) and is_native(image.arch)
    names = {
        "image": _vision(image.arch),
        "text": Names(TEXT.rows, TEXT.left_out, prefix),
    }
    outer = {"logit_scale": Outer("loss/scale", ())} | ({"logit_bias": Outer("loss/bias", ())} if biased else {})
    for side, part in found.items():
        for dense in part.dense:
            linear_name = f"{prefix}text_projection" if side == "text" else "visual.head.proj"
            kernel, bias = (f"towers/{side}/dense/0/{leaf}" for leaf in ("kernel", "bias"))
            if dense.bias or (side == "image" and not own):
                outer[f"{linear_name}.weight"] = Outer(kernel, (dense.features, part.arch.width))
            else:  # a matrix of its own, not a layer's weight: it lies as ours does
                plain = linear_name if side == "text" else "visual.proj"
                outer[plain] = Outer(kernel, (part.arch.width, dense.features), turned=False)
            if dense.bias:
                outer[f"{linear_name}.bias"] = Outer(bias, (dense.features,))
    return Scheme(names, outer)


def _vision(arch: Any) -> Names:
    """The table of an image tower."""
    if isinstance(arch, ModifiedResnet):
        return modified_resnet.names(arch)
    if not is_native(arch):
        return timm.names(arch, "visual.trunk.")
    return Names(VISION.rows + INPUT_NORM, VISION.left_out, VISION.prefix) if arch.input_norm else VISION

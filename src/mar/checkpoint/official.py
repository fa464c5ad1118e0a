"""The authors' `checkpoint-last.pth` of a MAR, read and written.

A file of `torch.save` is read without running anything in it. It may hold the state of its training, too.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import math
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from mar.checkpoint import checksums
from mar.checkpoint.contents import find_states, foreign, only_state, unwrap_name
from mar.checkpoint.files import CheckpointError, check_pickle, check_regular, is_zip, write_atomically
from mar.checkpoint.store import check_table, model_shapes, shape_differences
from mar.config import HeadConfig, ModelConfig, TrunkConfig
from mar.published import Family

logger = logging.getLogger(__name__)
Weights = Literal["ema", "raw"]
ANCHOR = "encoder_pos_embed_learned"
"""A tensor of every such model."""
_ADAMW_FAMILIES = ("mar", "emigm")
"""Families whose optimizer has the parameter groups of the reference."""
_DETOK_KEYS = {"loss_scaler", "last_elapsed_time"}
"""Entries that files of l-DeTok's training have, and others have not."""
_HEADS_BY_MODEL = {"mar_base": 12, "mar_large": 16, "mar_huge": 16}
_HEADS_BY_WIDTH = {448: 8, 512: 8, 768: 12, 1024: 16, 1280: 16}
"""Heads of the published models: MAR from 768, eMIGM from 448."""


@dataclass(frozen=True)
class OfficialMAR:
    """An official checkpoint under our names.

    Tensors are float32, and stay on the disk until they are used.
    """

    model_config: ModelConfig
    state: dict[str, Tensor]
    """The requested weights."""
    weights: str
    """The kind of `state`: ema, raw, or unknown for a file of one set of weights."""
    raw: dict[str, Tensor] | None
    ema: dict[str, Tensor] | None
    notes: dict[str, Any] = field(default_factory=dict)
    """The weights' origin, for the header of an export."""
    optimizer: dict[str, dict[str, Tensor]] | None = None
    """AdamW's `step`, `exp_avg` and `exp_avg_sq` for each of our parameters, if the file has them."""
    epoch: int | None = None
    """The last finished epoch, counted from 0."""
    args: dict[str, Any] | None = None
    """The settings of the reference's command line."""
    family: Family = "mar"
    """The project that trained it."""


def read_mar(
    path: str | os.PathLike[str],
    weights: Weights | None = None,
    *,
    num_heads: int | None = None,
    patch_size: int | None = None,
    family: Family | None = None,
) -> OfficialMAR:
    """Read the reference's `checkpoint-last.pth`, or one of eMIGM or l-DeTok.

    Raises CheckpointError for a file that asks to run code, is damaged, lacks the requested weights, or holds another
    model.

    Args:
        path: the file.
        weights: ema or raw; None: ema, or the only set of a flat file.
        num_heads: number of attention heads; None: from the file's settings, or known for the widths of B, L and H.
        patch_size: side of a patch in latent cells; None: from the file's settings, or 1.
        family: the project that trained it; None: as tensors and entries of the file tell, or MAR.
    """
    if weights not in (None, *get_args(Weights)):
        raise ValueError(f"weights: got {weights!r}, expected ema or raw")
    path = Path(path)
    holder = read_any(path)
    args = vars(holder["args"]) if isinstance(holder.get("args"), argparse.Namespace) else None
    official = _weights_of(path, holder)
    if "unknown" in official:
        if weights is None:
            logger.warning(
                "%s holds one set of weights, of unknown kind; those of jadechoghari/mar are the raw ones "
                "and draw worse pictures (FID 5.56, EMA 2.31)",
                path,
            )
            weights = "unknown"  # type: ignore[assignment]
        else:
            official["raw"] = official.pop("unknown")
    weights = weights or "ema"
    chosen = official.get(weights)
    if chosen is None:
        raise CheckpointError(_missing_weights(path, weights, list(holder)))
    given, family = family, family or _family_of(holder, chosen)
    if (family == "emigm") != is_tied(chosen):
        has = "eMIGM's one vector as mask token and null class" if is_tied(chosen) else "MAR's tensors, not eMIGM's"
        raise CheckpointError(f"{path}: family: got {given}, but the file has {has}; leave it out")
    try:
        config = infer_config(chosen, args or {}, num_heads=num_heads, patch_size=patch_size)
        states = {kind: _convert(state, config) for kind, state in official.items() if state is not None}
        optimizer = holder.get("optimizer") if family in _ADAMW_FAMILIES else None
        moments = (
            convert_optimizer(optimizer, official.get("raw") or chosen) if isinstance(optimizer, Mapping) else None
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    logger.info("%s: took the %s weights", path, weights)
    if is_tied(chosen) and "fake_latent" in chosen and not torch.equal(chosen["fake_latent"], chosen["mask_token"]):
        logger.warning(
            "%s: fake_latent and mask_token are one tensor, stored with two values; took mask_token's, as its authors",
            path,
        )
    epoch = holder.get("epoch") if isinstance(holder.get("epoch"), int) else None
    notes: dict[str, Any] = {"source": path.name, "weights": weights}
    notes |= {} if epoch is None else {"epoch": epoch}
    return OfficialMAR(
        config, states[weights], weights, states.get("raw"), states.get("ema"), notes, moments, epoch, args,
        family,
    )  # fmt: skip


def _weights_of(path: Path, holder: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Return a file's weights by their kind: raw and ema, or those of unknown kind.

    Raises CheckpointError if there are none of a MAR, or several of which either could be meant.
    """
    try:
        states = find_states(holder, ANCHOR)
        named = {kind: states[key] for kind, key in (("raw", "model"), ("ema", "model_ema")) if key in states}
        only = None if named else only_state(holder, ANCHOR, ())
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if not named and only is None:
        raise foreign(path, holder)
    return named or {"unknown": only[1]}  # type: ignore[index]


def _family_of(holder: Mapping[str, Any], state: Mapping[str, Tensor]) -> Family:
    """Tell a file's family by its tensors and entries; MAR, too, for one of l-DeTok without them."""
    if is_tied(state):
        return "emigm"
    return "detok" if _DETOK_KEYS & set(holder) else "mar"


def is_flat_official(path: Path) -> bool:
    """Return whether a safetensors file holds a MAR under the official names."""
    return has_tensor(path, ANCHOR)


def has_tensor(path: Path, *anchors: str) -> bool:
    """Return whether another program's safetensors file has one of these tensors."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            names = [unwrap_name(name) for name in file.keys()]  # noqa: SIM118 (it is not a dict)
            return "mar" not in (file.metadata() or {}) and any(name.endswith(anchors) for name in names)
    except (SafetensorError, OSError):
        return False


def is_torch_file(path: Path) -> bool:
    """Return whether a file is one of torch.save, by content or name."""
    if path.suffix in (".pth", ".ckpt", ".pt") or not path.is_file():
        return path.is_file()
    try:
        with path.open("rb") as file:
            return file.read(2) == b"PK"
    except OSError:
        return False


def read_any(path: Path) -> dict[str, Any]:
    """Read the dict of a file of torch.save or safetensors. Raises CheckpointError."""
    check_regular(path)
    with contextlib.suppress(OSError), path.open("rb") as file:
        start = file.read(9)
        fits = start[8:] == b"{" and int.from_bytes(start[:8], "little") + 8 < path.stat().st_size
        if start[:2] != b"PK" and (fits or path.suffix == ".safetensors"):
            check_table(path)
            return dict(load_file(path))
    return read_torch(path)


def write_mar(
    path: str | os.PathLike[str],
    config: ModelConfig,
    state: Mapping[str, Tensor],
    ema_state: Mapping[str, Tensor],
) -> None:
    """Write raw and EMA weights for the reference's `--resume FOLDER`.

    Raises CheckpointError for a model with features that the reference lacks, and if the disk refuses.

    Args:
        path: the file, which the reference expects to be called checkpoint-last.pth.
        config: the model's.
        state: raw weights.
        ema_state: EMA weights.
    """
    path = Path(path)
    if why := _unsupported_feature(config):
        raise CheckpointError(f"{path}: the reference has no {why}, so this model can't be written in its format")
    holder: dict[str, dict[str, Tensor]] = {}
    for kind, tensors in (("model", state), ("model_ema", ema_state)):
        if different := shape_differences({n: t.shape for n, t in tensors.items()}, model_shapes(config)):
            raise CheckpointError(f"{path}: {kind} does not fit its config: {'; '.join(different[:3])}")
        plain = {name: tensor.detach().float().cpu() for name, tensor in tensors.items()}
        holder[kind] = to_official(plain, tied=config.tie_null)

    def write(temporary: Path) -> None:
        try:
            torch.save(holder, temporary)
        except RuntimeError as error:  # what its C++ code makes of a full disk
            raise OSError(str(error).split("\n")[0]) from error

    write_atomically(path, write, sum(t.numel() * t.itemsize for tensors in holder.values() for t in tensors.values()))


def infer_config(
    official: Mapping[str, Tensor],
    args: Mapping[str, Any],
    *,
    num_heads: int | None = None,
    patch_size: int | None = None,
) -> ModelConfig:
    """Infer the config of an official state dict. Raises ValueError if it is no MAR.

    Args:
        official: tensors under the reference's names.
        args: settings of the reference's command line.
        num_heads: as for `read_mar`.
        patch_size: as for `read_mar`.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in official.items()}
    try:
        positions, tokens = shapes["encoder_pos_embed_learned"][1], shapes["diffusion_pos_embed_learned"][1]
        token_width, classes = shapes["z_proj.weight"][1], shapes["class_emb.weight"][0]
        head_width = shapes["diffloss.net.input_proj.weight"][0]
        trunks = [_trunk_config(shapes, stack, num_heads, str(args.get("model"))) for stack in ("encoder", "decoder")]
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"these are not the tensors of a MAR: {error} is missing; it holds {_first_few(shapes)}"
        ) from None
    patch_size = patch_size or _setting(args, "patch_size", 1)
    side = math.isqrt(tokens)
    if side * side != tokens or token_width % patch_size**2:
        raise ValueError(
            f"{tokens} tokens of {token_width} values are no square of patches of {patch_size}x{patch_size}"
        )
    return ModelConfig(
        channels=token_width // patch_size**2,
        grid=(side * patch_size, side * patch_size),
        patch_size=patch_size,
        encoder=trunks[0],
        decoder=trunks[1],
        head=HeadConfig(
            head_width,
            _count_blocks(shapes, "diffloss.net.res_blocks."),
            batch_mul=_setting(args, "diffusion_batch_mul", 4),
        ),
        tie_null=is_tied(official),
        mask_schedule="exp" if is_tied(official) else "normal",
        buffer_size=positions - tokens,
        classes=classes,
        label_drop=_setting(args, "label_drop_prob", 0.1),
        attention_dropout=_setting(args, "attn_dropout", 0.1),
        projection_dropout=_setting(args, "proj_dropout", 0.1),
        mask_ratio_min=_setting(args, "mask_ratio_min", 0.7),
    )


def convert_optimizer(optimizer: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Convert the reference's AdamW state to one for each of our parameters.

    `parameters` are the official ones in the reference's order. Its first group has no weight decay: 1-d tensors,
    biases, the whole head. Its second has the others. Raises ValueError if the moments don't fit.
    """
    if is_tied(parameters):  # one parameter, in the place of its first name
        parameters = {"mask_token" if n == "fake_latent" else n: p for n, p in parameters.items() if n != "mask_token"}
    undecayed = [n for n, p in parameters.items() if p.dim() == 1 or n.endswith(".bias") or "diffloss" in n]
    names = undecayed + [name for name in parameters if name not in set(undecayed)]
    try:
        ids = [number for group in optimizer["param_groups"] for number in group["params"]]
        stored = {name: optimizer["state"].get(number, {}) for name, number in zip(names, ids, strict=True)}
        steps = {n: torch.as_tensor(s["step"], dtype=torch.float32) for n, s in stored.items() if s}
        moments = {
            key: {name: state[key].detach().float() for name, state in stored.items() if state}
            for key in ("exp_avg", "exp_avg_sq")
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"its optimizer is not the reference's AdamW ({type(error).__name__}: {error})") from error
    for name, moment in moments["exp_avg"].items():
        if moment.shape != parameters[name].shape:
            raise ValueError(f"its optimizer has {tuple(moment.shape)} where {name} is {tuple(parameters[name].shape)}")
    return _rename_moments(steps, moments)


def _rename_moments(
    steps: Mapping[str, Tensor], moments: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    ours = {key: from_official(tensors) for key, tensors in moments.items()}
    # both dicts keep the order of their names, so that steps and moments go side by side
    return {
        name: {"step": step, **{key: tensors[name] for key, tensors in ours.items()}}
        for name, step in zip(ours["exp_avg"], steps.values(), strict=True)
    }


def _convert(official: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    state = from_official({name: tensor.detach().float() for name, tensor in official.items()})
    if different := shape_differences({n: t.shape for n, t in state.items()}, model_shapes(config)):
        raise ValueError(f"the tensors are not those of a MAR: {'; '.join(different[:3])}")
    return state


def _missing_weights(path: Path, weights: Weights, keys: list[str]) -> str:
    key = "model_ema" if weights == "ema" else "model"
    kind = "EMA" if weights == "ema" else "raw"
    message = f"{path} has no {kind} weights (`{key}`); it has {_first_few(keys)}. "
    if weights == "raw":
        return message + "Is it a MAR's checkpoint-last.pth?"
    return (
        message
        + "Raw weights draw worse pictures (FID 5.56 where EMA has 2.31); ask for them with `mar convert --weights raw`"
    )


def _trunk_config(shapes: Mapping[str, tuple[int, ...]], stack: str, num_heads: int | None, model: str) -> TrunkConfig:
    width = shapes[f"{stack}_pos_embed_learned"][2]
    num_heads = num_heads or _HEADS_BY_MODEL.get(model) or _HEADS_BY_WIDTH.get(width)
    if num_heads is None:
        raise ValueError(
            f"the number of attention heads can't be seen in tensors of width {width}, and is only known of "
            "MAR-B, L and H: give it, by `mar convert --num-heads`"
        )
    return TrunkConfig(
        width,
        _count_blocks(shapes, f"{stack}_blocks."),
        num_heads,
        shapes[f"{stack}_blocks.0.mlp.fc1.weight"][0] / width,
    )


def _count_blocks(shapes: Mapping[str, Any], prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return len({match[1] for name in shapes if (match := pattern.match(name))})


def _setting(args: Mapping[str, Any], name: str, default: Any) -> Any:
    value = args.get(name, default)
    return value if isinstance(value, int | float) else default


def _first_few(names: Any) -> str:
    names = list(names)
    return ", ".join(map(str, names[:4])) + (", ..." if len(names) > 4 else "")


def _unsupported_feature(config: ModelConfig) -> str | None:
    """Name a feature of the model that the reference lacks, if any."""
    shape = (config.encoder.mlp_ratio, config.decoder.mlp_ratio)
    reasons = {
        "models of captions": config.takes_captions,
        "unconditional models": config.classes == 0,
        "rectangular grids": config.grid[0] != config.grid[1],
        f"prediction of {config.head.prediction}": config.head.prediction != "noise",
        "a linear path to noise": config.head.path != "cosine",
        f"schedule of {config.head.diffusion_steps} steps": config.head.diffusion_steps != 1000,
        "MLPs of different ratios": shape[0] != shape[1],
        "rotary positions": config.encoder.rotary or config.decoder.rotary,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


# ---- names of tensors

_BLOCK = [
    ("norm1", "norm1"),
    ("attn.qkv", "attention.qkv"),
    ("attn.proj", "attention.out"),
    ("norm2", "norm2"),
    ("mlp.fc1", "fc1"),
    ("mlp.fc2", "fc2"),
]
_HEAD = "diffloss.net"
_HEAD_BLOCK = [("in_ln", "norm"), ("mlp.0", "fc1"), ("mlp.2", "fc2"), ("adaLN_modulation.1", "modulation")]
# (official, ours), in the order of the reference's parameters; {} stands for a block's number.
_PARAMETERS = [
    ("fake_latent", "null_class"),
    ("encoder_pos_embed_learned", "encoder_position"),
    ("mask_token", "mask_token"),
    ("decoder_pos_embed_learned", "decoder_position"),
    ("diffusion_pos_embed_learned", "diffusion_position"),
    ("class_emb", "class_embed"),
    ("z_proj", "token_embed"),
    ("z_proj_ln", "embed_norm"),
    *((f"encoder_blocks.{{}}.{official}", f"encoder.{{}}.{ours}") for official, ours in _BLOCK),
    ("encoder_norm", "encoder_norm"),
    ("decoder_embed", "decoder_embed"),
    *((f"decoder_blocks.{{}}.{official}", f"decoder.{{}}.{ours}") for official, ours in _BLOCK),
    ("decoder_norm", "decoder_norm"),
    (f"{_HEAD}.time_embed.mlp.0", "head.time_embed.fc1"),
    (f"{_HEAD}.time_embed.mlp.2", "head.time_embed.fc2"),
    (f"{_HEAD}.cond_embed", "head.z_embed"),
    (f"{_HEAD}.input_proj", "head.input"),
    *((f"{_HEAD}.res_blocks.{{}}.{official}", f"head.blocks.{{}}.{ours}") for official, ours in _HEAD_BLOCK),
    (f"{_HEAD}.final_layer.linear", "head.output"),
    (f"{_HEAD}.final_layer.adaLN_modulation.1", "head.final_modulation"),
]
# Ours have no leading axes of length 1; the number says how many the official tensor has.
_LEADING = {"encoder_position": 1, "decoder_position": 1, "diffusion_position": 1, "mask_token": 2}
_TIED_AXES = 1
"""Leading axes of `mask_token` where it is the null class as well (eMIGM)."""


def is_tied(official: Mapping[str, Tensor]) -> bool:
    """Return whether mask token and null class are one tensor: (1, width), where others have (1, 1, width)."""
    return "mask_token" in official and official["mask_token"].dim() == _TIED_AXES + 1


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\{\}", r"(\d+)") + r"(\.weight|\.bias)?")


def _rename(name: str, table: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, template in table:
        if match := pattern.fullmatch(name):
            *numbers, suffix = match.groups()
            return template.format(*numbers) + (suffix or "")
    return None


_TO_OURS = [(_pattern(official), ours) for official, ours in _PARAMETERS]
_TO_OFFICIAL = [(_pattern(ours), official) for official, ours in _PARAMETERS]
_ORDER = {official: place for place, (official, _) in enumerate(_PARAMETERS)}


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename an official state dict to our names. Raises ValueError for other tensors.

    Of a tied vector stored twice, `mask_token` counts: the authors load it last.
    """
    tied = is_tied(state)
    if tied:
        state = {name: tensor for name, tensor in state.items() if name != "fake_latent"}
    renamed = {name: _rename(name, _TO_OURS) for name in state}
    _check_names([name for name, ours in renamed.items() if ours is None])
    ours = {str(renamed[name]): tensor for name, tensor in state.items()}
    for name, axes in _LEADING.items():
        if name in ours:
            axes = _TIED_AXES if tied and name == "mask_token" else axes
            ours[name] = ours[name].reshape(ours[name].shape[axes:])
    return ours


def to_official(state: Mapping[str, Tensor], *, tied: bool = False) -> dict[str, Tensor]:
    """Invert `from_official`; the names come in the reference's order.

    If `tied`, the mask token is the null class as well, and is written under both names.
    """
    renamed = {name: _rename(name, _TO_OFFICIAL) for name in state}
    _check_names([name for name, official in renamed.items() if official is None])
    official = {
        str(renamed[name]): tensor.reshape((1,) * _LEADING.get(name, 0) + tensor.shape)
        for name, tensor in state.items()
    }
    if tied:
        official["mask_token"] = official["fake_latent"] = official["mask_token"].squeeze(0)
    return {name: official[name] for name in sorted(official, key=_module_order)}


def _module_order(official: str) -> tuple[int, int, int, int]:
    """Sorts official names as the reference's modules have them: stack, block, layer in it, weight before bias."""
    number = re.search(r"blocks\.(\d+)\.", official)
    layer = re.sub(r"blocks\.\d+\.", "blocks.{}.", official).removesuffix(".weight").removesuffix(".bias")
    place = _ORDER[layer]
    if number is None:
        return place, 0, 0, int(official.endswith(".bias"))
    stack = next(i for i, (name, _) in enumerate(_PARAMETERS) if name.split("{}")[0] == layer.split("{}")[0])
    return stack, int(number[1]), place, int(official.endswith(".bias"))


def _check_names(names: list[str]) -> None:
    if names:
        shown = ", ".join(sorted(names)[:5])
        raise ValueError(f"{len(names)} tensors are not those of a MAR: {shown}{', ...' if len(names) > 5 else ''}")


# ---- files of torch.save


def read_torch(path: Path) -> dict[str, Any]:
    """Read the dict in a file of `torch.save`, mapped to memory.

    Allows tensors, plain values and `argparse.Namespace`. Raises CheckpointError for a file with anything else, a
    truncated one, and any other file.
    """
    _check_is_torch_file(path)
    unlisted = _check_records(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            holder = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_pickle_refusal(path, str(error))) from None
    except Exception as error:
        raise CheckpointError(f"{path} is damaged ({_first_line(error)}); copy or download it again") from error
    if unlisted is not None:
        raise CheckpointError(f"{path} is damaged ({_first_line(unlisted)}); copy or download it again")
    if not isinstance(holder, dict):
        raise CheckpointError(f"{path} holds a {type(holder).__name__}, not a dict of tensors")
    return holder


def _check_is_torch_file(path: Path) -> None:
    check_regular(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise CheckpointError(f"{path} is empty: the copy or download of it failed; get it again")
    if start.lstrip().startswith(b"<"):
        raise CheckpointError(f"{path} is a web page, not weights: the download of it failed; get it again")
    if start.startswith(b"\x80"):
        raise CheckpointError(f"{path} is a bare pickle (or of PyTorch before 1.6), which is not read")
    if not start.startswith(b"PK"):
        raise CheckpointError(f"{path} is not a file of torch.save")
    if not is_zip(path):
        raise CheckpointError(f"{path} is truncated or damaged: its end is missing; copy or download it again")


def _check_records(path: Path) -> Exception | None:
    """Compare the zip's records with its CRC-32s, and their lengths with the tensors in them.

    PyTorch does neither: a flipped bit is read, and a short record is read on into the next. Returns the error of a
    pickle whose tensors can't be listed.
    """
    compare = checksums.enabled() and not checksums.was_compared(path)
    try:
        with zipfile.ZipFile(path) as archive:
            records = {record.filename: record for record in archive.infolist()}
            if any(record.compress_type != zipfile.ZIP_STORED for record in records.values()):
                raise ValueError("its records are compressed, which torch.save never does")
            if sum(record.file_size for record in records.values()) > path.stat().st_size:
                raise ValueError("its records are longer than the file")
            for record in records.values() if compare else ():
                with archive.open(record) as file:
                    while file.read(2**20):  # raises BadZipFile at the end of a record with another CRC-32
                        pass
            name = next((name for name in records if name == "data.pkl" or name.endswith("/data.pkl")), None)
            if name is None:
                inside = f"a zip of {', '.join(list(records)[:3])}" if records else "an empty zip"
                raise CheckpointError(f"{path} is {inside}, and not a file of torch.save")
            check_pickle(data := archive.read(name))
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path} is damaged ({_first_line(error)}); copy or download it again") from error
    try:
        storages = _storages(data)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is refused: {error}") from None
    except Exception as error:  # noqa: BLE001
        return error  # PyTorch says more
    for key, size in storages.items():
        stored = records.get(f"{name.removesuffix('data.pkl')}data/{key}")
        if stored is None or stored.file_size < size:
            length = "missing" if stored is None else f"{stored.file_size:,} bytes long"
            raise CheckpointError(
                f"{path} is damaged: its record {key} is {length}, but a tensor of {size:,} bytes is in it; "
                "copy or download it again"
            )
    if compare:
        checksums.note_compared(path)
    return None


_STORAGES = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8, "IntStorage": 4,
    "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1, "ComplexFloatStorage": 8,
    "ComplexDoubleStorage": 16,
}  # fmt: skip
"""Bytes of a value of PyTorch's kinds of storages."""


class _Inert(dict[Any, Any]):
    """Stands for whatever a pickle builds: takes everything, does nothing."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> _Inert:
        return _Inert()

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def append(self, value: Any) -> None:
        """Ignore a value."""

    def extend(self, values: Any) -> None:
        """Ignore values."""

    add = append


class _StorageLister(pickle.Unpickler):
    """Lists the storages of a pickle of tensors, and creates nothing."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.sizes: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module in ("builtins", "__builtin__") and name == "bytearray":  # of any length
            raise CheckpointError("its pickle wants to run builtins.bytearray, and weights need nothing but tensors")
        return type(name, (_Inert,), {"pickled_name": name})

    def persistent_load(self, pid: Any) -> Any:
        _, kind, key, _, count = pid
        name = getattr(kind, "pickled_name", "")
        self.sizes[str(key)] = max(self.sizes.get(str(key), 0), int(count) * _STORAGES.get(name, 1))
        return _Inert()


def _storages(data: bytes) -> dict[str, int]:
    """Return the bytes of each storage that a pickle of tensors names."""
    lister = _StorageLister(data)
    lister.load()
    return lister.sizes


def _pickle_refusal(path: Path, message: str) -> str:
    blocked = re.search(r"GLOBAL ([\w.]+)", message) or re.search(r"type <class '([\w.]+)'>", message)
    if blocked is None:
        return f"{path} is refused: its pickle asks for more than tensors and plain values"
    return (
        f"{path} is refused: its pickle wants to run {blocked[1]}, and weights need nothing but tensors, plain values "
        "and argparse.Namespace; don't trust it, or save it again without that"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:120] or type(error).__name__

"""Models and tokenizers by name: bundled, official, files, folders, Hub."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from mar import devices
from mar.assets import asset, imagenet_classes
from mar.backends import configure
from mar.checkpoint import official, store
from mar.checkpoint.download import OFFICIAL, home
from mar.checkpoint.files import CheckpointError
from mar.checkpoint.official_kl16 import read_kl16, to_diffusers
from mar.checkpoint.official_vit import is_vit, load_vit
from mar.checkpoint.tokenizers import load_tokenizer as load_diffusers
from mar.config import SamplingConfig
from mar.model.mar import MAR
from mar.nn import init_empty_weights
from mar.pipeline import WEIGHTS_FILE, Pipeline
from mar.presets import MODELS, PUBLISHED, SAMPLING, Family, published
from mar.tokenizer import Tokenizer, from_name, is_name

BUNDLED = ("emoji", "fashion")
"""Models that come with the package."""

_TOKENIZERS = {
    "kl16": "the KL-16 tokenizer beside it; get it with `mar download kl16`",
    "dc-ae": "the DC-AE tokenizer of 32 channels; give its folder or Hub id (--tokenizer)",
    "detok": "the tokenizer of l-DeTok; give its file, with stats.pkl beside it (--tokenizer)",
}
"""Each tokenizer as errors name it, and how to get it."""
_KINDS = {"kl16": "kl", "dc-ae": "dc", "detok": "vit"}
"""Kinds of the published tokenizers, in `mar.tokenizer.TOKENIZERS`."""
_TORCH_FILES = (".pth", ".ckpt", ".pt")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def load(
    name: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    tf32: bool = False,
) -> Pipeline:
    """Load a model, ready to sample: `load("fashion").sample(labels=["dress"])`.

    Args:
        name: a bundled model (emoji, fashion); an official one (mar-base, mar-large, mar-huge, after `mar download`); a
            folder or a file that mar wrote; an official `checkpoint-last.pth`; a repository of the Hub.
        device: by default the best available.
        dtype: of the model's matrices: float32, bfloat16, or int8 on a CPU; by default bfloat16 on GPUs that multiply
            in it, else float32.
        tf32: on GPUs, round inputs of float32 products to TF32, for the whole process.

    Raises ValueError if there is no such model.
    """
    chosen = device if isinstance(device, torch.device) else devices.choose_device(device)
    configure(chosen, tf32=tf32)
    return _open(str(name)).to(chosen, dtype or devices.torch_dtype(devices.default_precision(chosen)))


def check_name(name: str) -> None:
    """Raise ValueError for a name that `load` can't find, without loading anything.

    An official model may be absent, and a repository of the Hub may not exist.
    """
    path = Path(name)
    if name in BUNDLED or name in MODELS or path.exists() or _is_repository(name):
        return
    raise _unknown(name)


def _is_repository(name: str) -> bool:
    path = Path(name)
    return (
        _REPOSITORY.fullmatch(name) is not None
        and path.suffix not in (*_TORCH_FILES, ".safetensors")
        and not path.parent.is_dir()
    )


def _unknown(name: str) -> CheckpointError:
    known = ", ".join((*BUNDLED, *MODELS))
    return CheckpointError(f"model: got {name!r}, expected {known}, a file, a folder, or a Hub repository owner/name")


def _open(name: str) -> Pipeline:
    if name in BUNDLED:
        return Pipeline.open(asset(f"{name}.safetensors"))
    path = Path(name)
    if name in MODELS and not path.exists():
        return _official(name)
    if path.is_dir():
        if not (path / WEIGHTS_FILE).is_file():
            raise CheckpointError(f"{path} has no {WEIGHTS_FILE}: expected a folder of `mar train` or save_pretrained")
        return Pipeline.open(path / WEIGHTS_FILE)
    if path.is_file() and (path.suffix in _TORCH_FILES or official.is_flat_official(path)):
        return import_official(path, kl16_path(path.parent))
    if path.suffix == ".safetensors" or path.is_file():
        return Pipeline.open(path)
    if _is_repository(name):
        return _from_hub(name)
    raise _unknown(name)


def _official(name: str) -> Pipeline:
    """Load an official model from the download folder, converted or not."""
    converted, downloaded = home() / f"{name}.safetensors", home() / OFFICIAL[name].name
    if converted.is_file():
        return Pipeline.open(converted)
    if not downloaded.is_file():
        raise CheckpointError(f"{name} is not in {home()}; get it with `mar download {name} kl16`")
    return import_official(downloaded, kl16_path(), sampling=SAMPLING[name])


def _from_hub(name: str) -> Pipeline:
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Pipeline.from_pretrained(name)
    except (EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"can't get {name} from the Hub: {reason}") from error


def import_official(
    path: Path,
    tokenizer: Path | None,
    *,
    weights: official.Weights | None = None,
    sampling: SamplingConfig | None = None,
    num_heads: int | None = None,
    patch_size: int | None = None,
    family: Family | None = None,
) -> Pipeline:
    """Load a checkpoint of MAR, eMIGM or l-DeTok with its tokenizer.

    Args:
        path: the checkpoint.
        tokenizer: kl16.ckpt, or a name for `load_tokenizer`.
        weights: EMA or raw weights; None: EMA, or the only set of a flat file.
        sampling: defaults of the pipeline.
        num_heads: attention heads, for models other than B, L and H: the file lacks them.
        patch_size: patch size, if the file lacks it.
        family: the project that trained it, if the file does not tell.
    """
    read = official.read_mar(path, weights, num_heads=num_heads, patch_size=patch_size, family=family)
    known = published(read.model_config, read.family)
    of_family = next(p for p in PUBLISHED.values() if p.family == read.family)
    kind = known.tokenizer if known else of_family.tokenizer
    if kind != "kl16" and tokenizer is not None and tokenizer.name == OFFICIAL["kl16"].name:
        tokenizer = None  # found beside the file, but not its own
    if tokenizer is None:
        raise CheckpointError(f"{path} needs {_TOKENIZERS[kind]}")
    loaded = load_kl16(tokenizer) if kind == "kl16" else load_tokenizer(str(tokenizer))
    _check_tokenizer(loaded, kind, path, tokenizer)
    with init_empty_weights():
        model = MAR(read.model_config)
    model.load_state_dict(read.state, assign=True)
    if known is None:
        sampling = sampling or (of_family.sampling if read.family == "emigm" else None)
    return Pipeline(
        model,
        loaded,
        classes=imagenet_classes() if read.model_config.classes == 1000 else (),
        sampling=sampling or (known.sampling if known else SamplingConfig()),
        weights=read.weights,
        notes=read.notes | {"family": read.family},
    )


def _check_tokenizer(loaded: Tokenizer, kind: str, path: Path, tokenizer: Path) -> None:
    """Refuse another project's tokenizer, whose channels may fit, and one without statistics."""
    got, expected = loaded.config()["kind"], _KINDS[kind]
    if got in _KINDS.values() and got != expected:
        raise CheckpointError(f"{path} got {tokenizer}, a tokenizer of kind {got}; it needs {_TOKENIZERS[kind]}")
    if not loaded.has_stats:
        raise CheckpointError(f"{tokenizer} has no statistics of its latents: put l-DeTok's stats.pkl beside the file")


def load_tokenizer(name: str, image_channels: int = 3) -> Tokenizer:
    """Load the tokenizer called `name`.

    Args:
        name: pixels; kl16 (after `mar download kl16`); a file kl16.ckpt, or of l-DeTok's tokenizer; a folder or
            repository in diffusers' format; one of our files of weights, which has its tokenizer inside.
        image_channels: channels of the images, for pixels.
    """
    if is_name(name):
        tokenizer = from_name(name, image_channels)
        if not tokenizer.learns_basis:
            return tokenizer
        if not Path(name).exists():
            raise CheckpointError(
                f"tokenizer: got {name}, which `mar train` fits to a data set and saves in a model; "
                "name the model instead"
            )
    if name == "kl16":
        path = kl16_path()
        if path is None:
            raise CheckpointError(f"kl16 is not in {home()}; get it with `mar download kl16`")
        return load_kl16(path)
    if Path(name).suffix in _TORCH_FILES:
        return load_official_tokenizer(Path(name))
    if Path(name).suffix == ".safetensors" or name in BUNDLED:
        return _open(name).tokenizer
    return load_diffusers(name)


def load_official_tokenizer(path: Path) -> Tokenizer:
    """Load an official tokenizer, told by its tensors: KL-16, or l-DeTok's.

    l-DeTok's has the statistics of the stats.pkl beside it.
    """
    if is_vit(official.read_torch(path)):
        return load_vit(path)
    return load_kl16(path)


def load_kl16(path: Path) -> Tokenizer:
    """Load the official KL-16 from `kl16.ckpt`, with its published scale."""
    from mar.tokenizer.kl import kl16

    tokenizer = kl16()
    try:
        tokenizer.autoencoder.load_state_dict(to_diffusers(read_kl16(path)))
    except RuntimeError as error:  # names or shapes, a line for each kind
        reason = " ".join(str(error).splitlines()[1].split())
        raise CheckpointError(f"{path} is not the KL-16 tokenizer: {reason[:200]}") from None
    return tokenizer


def kl16_path(folder: Path | None = None) -> Path | None:
    """Find kl16.ckpt in `folder` or the download folder; None: in neither."""
    folders = [*([folder] if folder else []), home()]
    return next((path for f in folders if (path := f / OFFICIAL["kl16"].name).is_file()), None)


def describe(path: Path) -> store.Header:
    """Read the header of a file or folder that mar wrote."""
    return store.read_header(path / WEIGHTS_FILE if path.is_dir() else path)

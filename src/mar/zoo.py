"""Models and tokenizers by name: bundled, official, files, folders, Hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mar import devices
from mar.assets import asset, imagenet_classes
from mar.backends import configure
from mar.checkpoint import official, store
from mar.checkpoint.download import OFFICIAL, home, missing
from mar.checkpoint.files import CheckpointError, check_regular
from mar.checkpoint.official_dc import is_dc, load_dc, load_published_dc
from mar.checkpoint.official_kl16 import KL16_BLOCK, read_kl16, to_diffusers
from mar.checkpoint.official_vit import PATCH_EMBED, STATISTICS_FILE, is_vit, load_vit
from mar.checkpoint.tokenizers import load_tokenizer as load_diffusers
from mar.config import SamplingConfig
from mar.model.mar import MAR
from mar.nn import init_empty_weights
from mar.pipeline import WEIGHTS_FILE, Pipeline
from mar.published import BUNDLED as BUNDLED_MODELS
from mar.published import (
    FAMILIES,
    PUBLISHED,
    TOKENIZERS,
    Family,
    PublishedTokenizer,
    names_in_repository,
    published,
    same_tensors,
    tokenizer_of,
)
from mar.tokenizer import Tokenizer, from_name, is_name

BUNDLED = tuple(BUNDLED_MODELS)
"""Models that come with the package."""

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
        name: a bundled model (emoji, fashion); a published one of `mar models`, after `mar download`. Or a folder or a
            file that mar wrote; a file of MAR, eMIGM or l-DeTok; a repository of the Hub.
        device: by default the best available.
        dtype: of the model's matrices: float32, bfloat16, or int8 on a CPU; by default bfloat16 on GPUs that multiply
            in it, else float32.
        tf32: on GPUs, round inputs of float32 products to TF32, for the whole process.

    Raises ValueError if there is no such model.
    """
    chosen = device if isinstance(device, torch.device) else devices.choose_device(device)
    configure(chosen, tf32=tf32)
    return _open(str(name)).to(chosen, dtype or devices.torch_dtype(devices.default_precision(chosen)))


def _official_path(name: str) -> Path:
    """Return the file of a published model: converted, else as it was published, else somebody's flat one."""
    published, other = home() / OFFICIAL[name][0].name, home() / f"{name}.safetensors"
    if other.is_file() and not (official.is_flat_official(other) and published.is_file()):
        return other
    if missing(name):
        raise CheckpointError(f"{name} is not in {home()}; get it with `mar download {name}`")
    return published


def check_name(name: str) -> None:
    """Raise ValueError for a name that `load` can't find, without loading anything.

    A published model may be absent, and a repository of the Hub may not exist.
    """
    path = Path(name)
    check_regular(path)
    if name in BUNDLED or name in PUBLISHED or path.exists() or _is_repository(name):
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
    known = ", ".join((*BUNDLED, *PUBLISHED))
    return CheckpointError(f"model: got {name!r}, expected {known}, a file, a folder, or a Hub repository owner/name")


def _open(name: str) -> Pipeline:
    if name in BUNDLED:
        return Pipeline.open(asset(f"{name}.safetensors"))
    path = Path(name)
    check_regular(path)
    if name in PUBLISHED and not path.exists():
        return _official(name)
    if path.is_dir():
        if not (path / WEIGHTS_FILE).is_file():
            raise CheckpointError(f"{path} has no {WEIGHTS_FILE}: expected a folder of `mar train` or save_pretrained")
        return Pipeline.open(path / WEIGHTS_FILE)
    if path.is_file() and (official.is_torch_file(path) or official.is_flat_official(path)):
        return import_official(path)
    if path.suffix == ".safetensors" or path.is_file():
        return Pipeline.open(path)
    if _is_repository(name):
        return _from_hub(name)
    raise _unknown(name)


def _official(name: str) -> Pipeline:
    """Load a published model from the download folder, converted or not."""
    record, path = PUBLISHED[name], _official_path(name)
    if not official.is_torch_file(path) and not official.is_flat_official(path):
        return Pipeline.open(path)  # converted
    loaded = import_official(path, family=record.family, sampling=record.sampling)
    if loaded.model.config != record.config:
        raise CheckpointError(f"{path} is another model than {name}; give the file's path, or download {name} again")
    return loaded


def _from_hub(name: str) -> Pipeline:
    if own := names_in_repository(name):
        raise CheckpointError(f"{name} on the Hub has the authors' files; get them with `mar download {' '.join(own)}`")
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Pipeline.from_pretrained(name)
    except (EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"can't get {name} from the Hub: {reason}") from error


def import_official(
    path: Path,
    tokenizer: Path | None = None,
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
        tokenizer: a file, or a name for `load_tokenizer`; None: its family's, beside it or downloaded.
        weights: EMA or raw weights; None: EMA, or the only set of a flat file.
        sampling: defaults of the pipeline.
        num_heads: attention heads, for models other than B, L and H: the file lacks them.
        patch_size: patch size, if the file lacks it.
        family: the project that trained it, if the file does not tell.
    """
    read = official.read_mar(path, weights, num_heads=num_heads, patch_size=patch_size, family=family)
    known = published(read.model_config, read.family)
    name = known.tokenizer if known else tokenizer_of(read.model_config, read.family)
    loaded = _tokenizer_of_checkpoint(path, read.family, name, tokenizer)
    with init_empty_weights():
        model = MAR(read.model_config)
    model.load_state_dict(read.state, assign=True)
    return Pipeline(
        model,
        loaded,
        classes=imagenet_classes() if read.model_config.classes == 1000 else (),
        sampling=sampling or (known.sampling if known else FAMILIES[read.family].sampling),
        weights=read.weights,
        notes=read.notes | {"family": read.family},
    )


def _tokenizer_of_checkpoint(path: Path, family: Family, name: str, given: Path | None) -> Tokenizer:
    """Load a checkpoint's tokenizer, and refuse another project's, whose channels may fit.

    Args:
        path: the checkpoint.
        family: the project that trained it.
        name: of its tokenizer in `TOKENIZERS`.
        given: the tokenizer that the user gave, if any.
    """
    record = TOKENIZERS[name]
    file = given or tokenizer_path(name, path.parent)
    if file is None:
        raise CheckpointError(f"{path} needs the tokenizer {record.title}; get it with `mar download {name}`")
    loaded = _load_published(name, file) if given is None else load_tokenizer(str(given))
    got = loaded.config()["kind"]
    if got != record.kind and got in {each.kind for each in TOKENIZERS.values()}:
        others = [f for f in same_tensors(family) if TOKENIZERS[FAMILIES[f].tokenizer].kind == got]
        hint = f", or --family {others[0]} if it is {FAMILIES[others[0]].title}" if others else ""
        raise CheckpointError(f"{path} got {file}, a tokenizer of kind {got}; it needs {record.title} ({name}){hint}")
    if not loaded.has_stats:
        raise CheckpointError(f"{file} has no statistics of its latents, expected {_statistics_of(record)}")
    _check_scale(loaded, record, file)
    return loaded


def _statistics_of(record: PublishedTokenizer) -> str:
    own = f"l-DeTok's {STATISTICS_FILE} beside it"
    return own if record.scale is None else f"the scale {record.scale} of {record.title}"


def _check_scale(loaded: Tokenizer, record: PublishedTokenizer, file: Path) -> None:
    """Refuse a tokenizer of the same kind that scales its latents in another way, so is another one."""
    if record.scale is None or loaded.config()["kind"] != record.kind:
        return
    if bool(loaded.mean.any()) or not torch.allclose(loaded.std * record.scale, torch.ones_like(loaded.std), rtol=1e-3):
        got = ", ".join(f"{1 / value:.4g}" for value in loaded.std.tolist()[:3])
        raise CheckpointError(
            f"{file} is another tokenizer: got latents of the scale {got}, expected {record.scale} of {record.title}"
        )


def load_tokenizer(name: str, image_channels: int = 3) -> Tokenizer:
    """Load the tokenizer called `name`.

    Args:
        name: pixels; kl16, dc-ae or detok, after `mar download`. Or a file of KL-16, of l-DeTok's tokenizer or of a
            DC-AE; a folder or repository in diffusers' format; a model of ours, for the tokenizer in it.
        image_channels: channels of the images, for pixels.
    """
    check_regular(name)
    if is_name(name):
        tokenizer = from_name(name, image_channels)
        if not tokenizer.learns_basis:
            return tokenizer
        if not Path(name).exists():
            raise CheckpointError(
                f"tokenizer: got {name}, which `mar train` fits to a data set and saves in a model; "
                "name the model instead"
            )
    if name in TOKENIZERS:
        file = tokenizer_path(name)
        if file is None:
            raise CheckpointError(f"{name} is not in {home()}; get it with `mar download {name}`")
        return _load_published(name, file)
    path = Path(name)
    if path.suffix in _TORCH_FILES or (path.is_file() and official.is_torch_file(path)):
        return load_official_tokenizer(path)
    if path.suffix == ".safetensors" and is_dc(path):
        return load_dc(path)
    if path.suffix == ".safetensors" and official.has_tensor(path, PATCH_EMBED, KL16_BLOCK):
        return load_official_tokenizer(path)
    if path.suffix == ".safetensors" or path.is_file() or name in BUNDLED:
        return _open(name).tokenizer
    own = next((record for record in TOKENIZERS.values() if name in record.repositories), None)
    if own is not None and not path.exists():  # the other repository has the authors' layout
        name = own.repositories[0]
    return load_diffusers(name)


def _load_published(name: str, path: Path) -> Tokenizer:
    """Load a tokenizer of `TOKENIZERS` from its file of weights."""
    loaders: dict[str, Callable[[Path], Tokenizer]] = {"kl16": load_kl16, "dc-ae": load_published_dc, "detok": load_vit}
    return loaders[name](path)


def load_official_tokenizer(path: Path) -> Tokenizer:
    """Load an official tokenizer, told by its tensors: KL-16, or l-DeTok's.

    l-DeTok's has the statistics of the stats.pkl beside it.
    """
    holder = official.read_any(path)
    try:
        return load_vit(path, holder=holder) if is_vit(holder) else load_kl16(path, holder)
    except CheckpointError as error:
        raise error if str(path) in str(error) else CheckpointError(f"{path}: {error}") from None


def load_kl16(path: Path, holder: Mapping[str, Any] | None = None) -> Tokenizer:
    """Load the official KL-16 from `kl16.ckpt`, with its published scale.

    `holder` is the file's dict, if it has been read.
    """
    from mar.tokenizer.kl import kl16

    try:
        state = to_diffusers(read_kl16(path, holder))
        tokenizer = kl16()
        tokenizer.autoencoder.load_state_dict(state)
    except RuntimeError as error:  # names or shapes, a line for each kind
        reason = " ".join(str(error).splitlines()[1].split())
        raise CheckpointError(f"{path} is not the KL-16 tokenizer: {reason[:200]}") from None
    except CheckpointError:
        raise
    except ValueError as error:  # names of another autoencoder
        raise CheckpointError(f"{path} is not the KL-16 tokenizer: {error}") from None
    return tokenizer


def tokenizer_path(name: str, folder: Path | None = None) -> Path | None:
    """Find a published tokenizer's weights in `folder` or the download folder.

    None: they, or the files they need, are in neither.
    """
    files = [Path(file.name) for file in TOKENIZERS[name].files]  # some are in a folder, as dc-ae/config.json
    beside = [Path(file.name) for file in files]
    for place, own in ([(folder, beside), (folder, files)] if folder else []) + [(home(), files)]:
        if all((place / file).is_file() for file in own):
            return place / own[0]
    return None


def describe(name: str | Path) -> store.Header:
    """Read the description of a model by name, file or folder.

    It is a bundled or published one, one that mar wrote, or a checkpoint of MAR, eMIGM or l-DeTok. Weights are compared
    as `load` does: those that are not finite raise CheckpointError.
    """
    path = asset(f"{name}.safetensors") if name in BUNDLED else Path(name)
    if name in PUBLISHED and not path.exists():
        path = _official_path(str(name))
    if path.is_file() and (official.is_torch_file(path) or official.is_flat_official(path)):
        return _describe_official(path)
    return store.check(path / WEIGHTS_FILE if path.is_dir() else path)


def _describe_official(path: Path) -> store.Header:
    """Describe a checkpoint of MAR, eMIGM or l-DeTok; its tokenizer is another file."""
    try:
        read = official.read_mar(path)
    except CheckpointError:
        read = official.read_mar(path, "raw")
    known = published(read.model_config, read.family)
    name = known.tokenizer if known else tokenizer_of(read.model_config, read.family)
    classes = imagenet_classes() if read.model_config.classes == 1000 else ()
    sampling = known.sampling if known else FAMILIES[read.family].sampling
    tokenizer = {"kind": TOKENIZERS[name].kind, "name": name}
    notes = read.notes | {"family": read.family}
    return store.Header(read.model_config, sampling, tokenizer, tuple(classes), read.weights, notes)

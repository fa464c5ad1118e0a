"""The pipeline: model, tokenizer, class names and sampling defaults in one."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, SupportsIndex, overload

import torch
from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, hf_hub_download
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch import Tensor

from mar import backends, distributed
from mar.backends.cpu.int8 import is_quantized, quantize_, require_int8
from mar.checkpoint import store
from mar.config import ConfigError, SamplingConfig, rename_old_keys, to_dict_for_hash
from mar.config.fields import log_new_names
from mar.data.conditions import CaptionReader, ClassReader, ConditionReader, Label, Prompt, reader_from_header
from mar.data.images import Transform
from mar.data.labels import resolve_labels
from mar.model.mar import MAR
from mar.nn import init_empty_weights, set_matrix_dtype
from mar.presets import apply_preset
from mar.sampling.confidence import token_losses
from mar.sampling.generate import Images, LatentStep, Mask, Request, as_images, as_mask, as_seeds, generate
from mar.sampling.inpainting import Paste, read_masks, soft_seam, tokens_to_generate
from mar.sampling.progress import bar
from mar.tokenizer import Tokenizer, build

logger = logging.getLogger(__name__)

ImageSize = SupportsIndex | Sequence[SupportsIndex]
"""Height and width in pixels; or one number, for a square."""
MAX_ENLARGEMENT = 4
"""Images have at most this many times the height and the width that the model was trained at."""
WEIGHTS_FILE = "model.safetensors"
"""Name of the weights in a saved folder."""
CARD = """\
---
{data}
---

Generates images of {size} pixels: {millions:.1f} million parameters{classes}. A masked autoregressive transformer with
a diffusion loss, after [Autoregressive Image Generation without Vector Quantization](https://arxiv.org/abs/2406.11838).

```python
import mar

model = mar.load("OWNER/NAME")  # this repository, or a folder of these files
images = model.sample({example})
```
"""
"""Model card on the Hub."""


@dataclass(frozen=True)
class RevealStep:
    """Images after a reveal step."""

    step: int
    """Number of reveal steps done, from 1."""
    steps: int
    known: Bool[Tensor, "n rows columns"]
    """True at known tokens (CPU)."""
    revealed_at: Int[Tensor, "n rows columns"]
    """Reveal step of each token, from 1; 0: known before (CPU)."""
    latents: Float[Tensor, "n c h w"]
    """Normalized latents; zeros at masked tokens."""
    decode: Callable[[], Float[Tensor, "n c H W"]]
    """Decodes the images, in [-1, 1]; masked tokens are decoded from zeros."""

    @cached_property
    def images(self) -> list[Image.Image]:
        """Images with their masked tokens mid-gray, decoded when they are asked for."""
        images = self.decode()
        rows, columns = self.known.shape[1:]
        side = (images.shape[2] // rows, images.shape[3] // columns)
        known = self.known.repeat_interleave(side[0], 1).repeat_interleave(side[1], 2)
        return to_pil(images * known.unsqueeze(1))


class Pipeline(
    ModelHubMixin,
    library_name="mar",
    pipeline_tag="unconditional-image-generation",
    tags=["image-generation", "masked-autoregressive"],
):
    """A model with its tokenizer: labels or prompts, and seeds in, images out.

    `save_pretrained`, `from_pretrained` and `push_to_hub` are huggingface_hub's.

    Args:
        model: is put into eval mode.
        tokenizer: of the model's latents.
        classes: class names by class number (none: the classes have no names).
        captions: reads prompts, for a model that draws from words.
        sampling: defaults of `sample`.
        weights: kind of weights, as the model's file tells it: ema or raw.
        notes: free facts about the model, saved in its file; JSON-able.
    """

    def __init__(
        self,
        model: MAR,
        tokenizer: Tokenizer,
        *,
        classes: Sequence[str] = (),
        captions: CaptionReader | None = None,
        sampling: SamplingConfig | None = None,
        weights: str = "ema",
        notes: dict[str, Any] | None = None,
    ) -> None:
        if model.config.channels != tokenizer.channels:
            raise ValueError(
                f"tokenizer: got one with {tokenizer.channels} latent channels, expected {model.config.channels}, "
                "as the model has"
            )
        if expected := tokenizer.unfit(*(height_and_width := tokenizer.image_size(model.config.grid))):
            got = "{}x{}".format(*height_and_width)
            raise ValueError(f"tokenizer: the model's grid makes pictures of {got}, expected {expected}")
        if model.config.takes_captions != (captions is not None):
            raise ValueError(f"captions: got {captions!r}, but the model's condition is {model.config.condition!r}")
        self.model = model.eval()
        self.tokenizer = tokenizer.eval()
        self.classes = tuple(classes)
        self.captions = captions
        self.sampling = sampling or SamplingConfig()
        self.weights = weights
        self.notes = notes or {}
        self._trained: Pipeline | None = None

    @property
    def reader(self) -> ConditionReader:
        """Reader of labels or prompts: the model's conditions of them."""
        return self.captions or ClassReader(self.classes, self.model.config.classes)

    @property
    def condition_argument(self) -> Literal["labels", "prompts"]:
        """The argument of `sample` that says what to draw."""
        return "prompts" if self.captions else "labels"

    @property
    def examples(self) -> tuple[str, ...]:
        """Prompts to draw where none are given, from the model's notes; () if it has none."""
        return tuple(map(str, self.notes.get("examples", ()))) if self.captions else ()

    def condition_metadata(self, ask: Label) -> dict[str, Any]:
        """Return an image's metadata: the class number of its label, or its prompt."""
        if self.captions is not None:
            return {"prompt": ask or None}
        [number] = resolve_labels([ask], self.classes, self.model.config.classes)
        return {"label": None if number < 0 else number}

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.mask_token.device

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        return self.tokenizer.image_size(self.model.config.grid)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Pipeline:
        """Move model and tokenizer to a device, and cast the model's matrices.

        `dtype` is float32, bfloat16, or int8 on a CPU. Raises ConfigError for int8 on another device, and for a model
        with int8 weights that would be cast or moved, and for one of `at_size`.
        """
        if self._trained is not None:
            raise ConfigError("a model at another size can't be moved or cast: move the model itself, then at_size")
        if is_quantized(self.model) and not (
            dtype in (None, torch.int8) and torch.device(device or "cpu").type == "cpu"
        ):
            raise ConfigError(f"int8 weights can't be cast or moved: load the model again for {dtype or device}")
        if dtype is torch.int8:
            require_int8(torch.device(device) if device is not None else self.device)
        if device is not None:
            backends.configure_once(torch.device(device))
            self.model.to(device)
            self.tokenizer.to(device)
            if self.captions is not None:
                self.captions.to(device)
        if dtype is torch.int8:
            quantize_(self.model.blocks())
        elif dtype is not None:
            set_matrix_dtype(self.model, dtype)
        return self

    def at_size(self, image_size: ImageSize) -> Pipeline:
        """Return this model at another image size; experimental, and said in one line.

        It draws on a larger or smaller grid than it was trained on, with interpolated positions. All else is shared:
        move and cast the model before. The trained size returns the model itself. Raises ValueError for a size that it
        can't draw.
        """
        trained = self._trained or self
        size = trained._check_size(image_size)
        if size == trained.image_size:
            return trained
        other = copy.copy(trained)
        stride = trained.tokenizer.stride
        other.model, other._trained = trained.model.with_grid((size[0] // stride, size[1] // stride)), trained
        if distributed.rank() == 0:
            logger.warning(
                "images of %d x %d pixels by a model that was trained at %d x %d: experimental, expect worse ones",
                *size,
                *trained.image_size,
            )
        return other

    def _check_size(self, image_size: ImageSize) -> tuple[int, int]:
        """Return height and width. Raises ValueError for those that the model can't draw."""
        try:
            pair = image_size if isinstance(image_size, Sequence) else (image_size, image_size)
            height, width = map(operator.index, pair)
        except (TypeError, ValueError):
            raise ValueError(
                f"image_size: got {image_size!r}, expected (height, width) in pixels, or one number for a square"
            ) from None
        own, multiple = self.image_size, self.tokenizer.stride * self.model.config.patch_size
        got = f"image_size: got {height}x{width} pixels (height x width), expected"
        if (fixed := self.tokenizer.fixed_size) is not None and (height, width) != fixed:
            raise ValueError(f"{got} {fixed[0]}x{fixed[1]}: this model's tokenizer knows no other size")
        if min(height, width) < 1 or height % multiple or width % multiple:
            raise ValueError(f"{got} positive multiples of {multiple}, the side of a token")
        if height > MAX_ENLARGEMENT * own[0] or width > MAX_ENLARGEMENT * own[1]:
            largest = f"{MAX_ENLARGEMENT * own[0]}x{MAX_ENLARGEMENT * own[1]}"
            raise ValueError(f"{got} at most {largest}, {MAX_ENLARGEMENT} times the trained size")
        return height, width

    def fingerprint(self) -> str:
        """Hash (sha256, hex) model and tokenizer, as images depend on them."""
        configs = {"model": to_dict_for_hash(self.model.config), "tokenizer": self.tokenizer.config()}
        digest = hashlib.sha256(json.dumps(configs, sort_keys=True).encode())
        if self.captions is not None:
            digest.update(json.dumps(self.captions.header(), sort_keys=True).encode())
        for module in (self.model, self.tokenizer):
            for name, tensor in sorted(module.state_dict().items()):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    # ---- sampling

    def sampling_with(self, preset: str | None = None, **changes: Any) -> SamplingConfig:
        """Return the model's sampling settings, with a preset and changes applied.

        `changes` are fields of SamplingConfig. Raises ConfigError for settings that are invalid for this model.
        """
        sampling = self.sampling if preset is None else apply_preset(self.sampling, self.model.config.tokens, preset)
        log_new_names(SamplingConfig, changes)
        sampling = replace(sampling, **rename_old_keys(SamplingConfig, changes, base=sampling))
        sampling.check(self.model.config)
        return sampling

    @overload
    def sample(self, labels: Iterable[Label] | None = ..., seeds: Iterable[SupportsIndex] | None = ..., *,
               prompts: Iterable[Prompt] | None = ..., output: Literal["pil"] = ...,
               **options: Any) -> list[Image.Image]: ...  # fmt: skip

    @overload
    def sample(self, labels: Iterable[Label] | None = ..., seeds: Iterable[SupportsIndex] | None = ..., *,
               prompts: Iterable[Prompt] | None = ..., output: Literal["tensor"],
               **options: Any) -> Tensor: ...  # fmt: skip

    def sample(
        self,
        labels: Iterable[Label] | None = None,
        seeds: Iterable[SupportsIndex] | None = None,
        *,
        prompts: Iterable[Prompt] | None = None,
        output: Literal["pil", "tensor"] = "pil",
        batch: int = 64,
        known: Images | None = None,
        mask: Mask | None = None,
        grow: int = 1,
        progress: bool = False,
        allow_broken: bool = False,
        image_size: ImageSize | None = None,
        **settings: Any,
    ) -> list[Image.Image] | Tensor:
        """Generate an image for each label or prompt, and seed.

        An image depends on its label or prompt, seed, known part and the settings alone, not on `batch`, unless the
        weights are int8.

        Args:
            labels: class numbers, class names, or None for no class.
            seeds: one per image (None: 0, 1, 2, ...).
            prompts: instead of labels, for a model that draws from words; None or "" for no condition.
            output: "pil" for PIL images, "tensor" for a float32 tensor (n, channels, height, width) in [-1, 1].
            batch: number of images at a time.
            known: images to keep where `mask` is false.
            mask: one flag per token (n, rows, columns) or pixel (n, height, width), true: generate; or PIL images of
                the size of `known`, white: generate. Painted pixels become tokens. Outside them the original stays, bit
                by bit.
            grow: tokens around painted pixels to generate as well, with a soft seam of half a token; 0: no seam.
            progress: show a progress bar.
            allow_broken: return noise instead of raising BrokenLatents.
            image_size: height and width in pixels, as for `at_size` (None: those of training); experimental.
            settings: a preset, and fields of SamplingConfig that differ from the model's own (guidance_scale, ...).
        """
        pipeline = self if image_size is None else self.at_size(image_size)
        request = pipeline._request(labels, prompts, seeds, settings, batch, known, mask, grow)
        with bar(progress, len(request.seeds)) as advance:
            batches = pipeline._batches(request, batch, allow_broken, advance)
            parts = [images.cpu() if output == "tensor" else to_uint8(images) for images in batches]
        if output == "pil":
            return [image for part in parts for image in _as_pil(part)]
        return torch.cat(parts) if parts else torch.empty(0, self.tokenizer.image_channels, *pipeline.image_size)

    def stream(
        self,
        labels: Iterable[Label] | None = None,
        seeds: Iterable[SupportsIndex] | None = None,
        *,
        prompts: Iterable[Prompt] | None = None,
        batch: int = 64,
        allow_broken: bool = False,
        image_size: ImageSize | None = None,
        advance: Callable[[float], None] | None = None,
        **settings: Any,
    ) -> Iterator[UInt8[Tensor, "n c H W"]]:
        """Generate images as `sample` does, and yield them batch by batch.

        They are 8-bit, on the CPU.

        Args:
            labels, seeds, prompts, batch, allow_broken, image_size, settings: as in `sample`.
            advance: called after each reveal step with the number of images done, in fractions.
        """
        pipeline = self if image_size is None else self.at_size(image_size)
        request = pipeline._request(labels, prompts, seeds, settings, batch)
        return map(to_uint8, pipeline._batches(request, batch, allow_broken, advance or (lambda done: None)))

    def _batches(
        self, request: Request, batch: int, allow_broken: bool, advance: Callable[[float], None]
    ) -> Iterator[Tensor]:
        for first in range(0, len(request.seeds), batch):
            part = request.part(first, first + batch)
            for state in self._generate(part, allow_broken):
                advance(first + len(part.seeds) * state.step / max(state.steps, 1))
                latents = state.latents
            images = self._decode(latents)
            yield images if part.paste is None else part.paste(images.cpu())

    def reveal(
        self,
        labels: Iterable[Label] | None = None,
        seeds: Iterable[SupportsIndex] | None = None,
        *,
        prompts: Iterable[Prompt] | None = None,
        known: Images | None = None,
        mask: Mask | None = None,
        grow: int = 1,
        allow_broken: bool = False,
        image_size: ImageSize | None = None,
        **settings: Any,
    ) -> Iterator[RevealStep]:
        """Generate images as `sample` does, and yield them after every reveal step.

        Args:
            labels, seeds, prompts, known, mask, grow, allow_broken, image_size, settings: as in `sample`.
        """
        pipeline = self if image_size is None else self.at_size(image_size)
        request = pipeline._request(labels, prompts, seeds, settings, 64, known, mask, grow)
        for state in pipeline._generate(request, allow_broken):

            def decode(latents: Tensor = state.latents) -> Tensor:
                images = pipeline._decode(latents).cpu()
                return images if request.paste is None else request.paste(images)

            yield RevealStep(state.step, state.steps, state.known, state.revealed_at, state.latents, decode)

    def token_losses(
        self, labels: Iterable[Label] | None, images: Images, *, prompts: Iterable[Prompt] | None = None
    ) -> Float[Tensor, "n rows columns"]:
        """Return the diffusion loss of every token, given the others: low where the model is sure.

        Args:
            labels: as in `sample`, one per image.
            images: PIL images or arrays in [-1, 1].
            prompts: as in `sample`.
        """
        known = as_images(images)
        condition = self._condition(labels, prompts)
        if len(condition) != len(known):
            kind = "labels" if prompts is None else "prompts"
            raise ValueError(f"{kind}: got {len(condition)} for {len(known)} images, expected one per image")
        config = self.model.config
        if not len(known):
            return torch.zeros(0, *config.token_grid)
        latents = self._encode(known, 64)
        if latents.shape[1:] != (config.channels, *config.grid):
            got, expected = ("x".join(map(str, size)) for size in (known[0].shape[-2:], self.image_size))  # type: ignore[union-attr]
            raise ValueError(f"images: got {got} pixels, expected {expected}")
        return token_losses(self.model, latents, condition.to(self.device))

    def _condition(self, labels: Iterable[Label] | None, prompts: Iterable[Prompt] | None) -> Tensor:
        """Read the conditions of images. ValueError where there are neither labels nor prompts."""
        if labels is None and prompts is None:
            raise ValueError("got neither labels nor prompts, expected one of them; [None] draws without")
        return self.reader.read(labels, prompts)

    def _request(
        self, labels: Iterable[Label] | None, prompts: Iterable[Prompt] | None, seeds: Iterable[SupportsIndex] | None,
        settings: dict[str, Any], batch: int,
        known: Images | None = None, mask: Mask | None = None, grow: int = 1,
    ) -> Request:  # fmt: skip
        if batch < 1:
            raise ValueError(f"batch: got {batch}, expected at least 1")
        sampling = self.sampling_with(**settings)
        condition = self._condition(labels, prompts)
        seed_list = list(range(len(condition))) if seeds is None else as_seeds(seeds)
        known_images = None if known is None else as_images(known)
        flags = None if mask is None else self._read_mask(mask, known_images)
        for name, values in (("seeds", seed_list), ("known", known_images), ("mask", flags)):
            if values is not None and len(values) != len(condition):
                kind = "labels" if prompts is None else "prompts"
                raise ValueError(f"{name}: got {len(values)} for {len(condition)} {kind}, expected one per image")
        if known_images is None or not len(condition):
            return Request(condition, seed_list, sampling, None, flags)
        latents = self._encode(known_images, batch)
        if flags is None or not self._marks_pixels(flags):
            return Request(condition, seed_list, sampling, latents, flags)
        if grow < 0:
            raise ValueError(f"grow: got {grow}, expected 0 or more tokens")
        token_mask = tokens_to_generate(flags, self.model.config.token_grid, grow)
        seam = self.image_size[0] // token_mask.shape[1] // 2 if grow else 0
        paste = Paste(self._pixels(known_images).cpu(), soft_seam(flags.cpu(), seam))
        return Request(condition, seed_list, sampling, latents, token_mask, paste)

    def _marks_pixels(self, flags: Tensor) -> bool:
        """Tell a mask of pixels from one of tokens, which `generate` checks."""
        shape = flags.shape[1:]
        return flags.dtype == torch.bool and shape == self.image_size and shape != self.model.config.token_grid

    def _read_mask(self, mask: Mask, known: Sequence[Image.Image] | Tensor | None) -> Tensor:
        """Convert a mask to one flag per token or pixel."""
        if isinstance(mask, Sequence) and len(mask) and all(isinstance(each, Image.Image) for each in mask):
            sizes = None if known is None or isinstance(known, Tensor) else [image.size for image in known]
            return read_masks(mask, self.image_size, sizes)
        return as_mask(mask)

    def _generate(self, request: Request, allow_broken: bool) -> Iterator[LatentStep]:
        return generate(
            self.model, request.condition, request.seeds, request.sampling,
            known=request.known, mask=request.mask, allow_broken=allow_broken, first=request.first,
        )  # fmt: skip

    @torch.no_grad()
    def _encode(self, images: Sequence[Image.Image] | Tensor, batch: int) -> Tensor:
        parts = (self._pixels(images[first : first + batch]) for first in range(0, len(images), batch))
        return torch.cat([self.tokenizer.encode(pixels.to(self.device)).mean for pixels in parts])

    def _pixels(self, images: Sequence[Image.Image] | Tensor) -> Tensor:
        if isinstance(images, Tensor):
            return images
        transform = Transform(self.image_size, self.tokenizer.image_channels)
        return torch.stack([transform(image) for image in images])

    @torch.no_grad()
    def _decode(self, latents: Tensor) -> Tensor:
        return self.tokenizer.decode(latents.nan_to_num(0.0, 0.0, 0.0))

    # ---- saving and loading

    def save(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write one safetensors file with model, tokenizer and sampling defaults.

        `dtype` bfloat16 halves the file; int8 rounds the matrices of model and tokenizer to 8 bits, for a quarter of
        it. `open` makes float32 of rounded weights. Raises ConfigError for a model with int8 weights.
        """
        if is_quantized(self.model):
            raise ConfigError("int8 weights can't be saved: save the model as it was loaded")
        if self._trained is not None:
            raise ConfigError("a model at another size can't be saved: save the model itself")
        header = store.Header(
            self.model.config, self.sampling, self.tokenizer.config(), self.classes, self.weights, self.notes,
            {} if self.captions is None else self.captions.header(),
        )  # fmt: skip
        bits8 = dtype is torch.int8
        tensors = {
            f"model.{name}": tensor.to(None if bits8 else dtype) for name, tensor in self.model.state_dict().items()
        }
        tensors |= {f"tokenizer.{name}": tensor for name, tensor in self.tokenizer.state_dict().items()}
        store.save(path, header, tensors, bits8=bits8)

    @classmethod
    def open(cls, path: str | Path) -> Pipeline:
        """Load a file that `save` wrote. Raises CheckpointError for any other."""
        header, tensors = store.load(path)
        store.check_values(Path(path), tensors)
        with init_empty_weights():
            model, tokenizer = MAR(header.model), build(header.tokenizer)
        for prefix, module in (("model.", model), ("tokenizer.", tokenizer)):
            state = {key.removeprefix(prefix): t.float() for key, t in tensors.items() if key.startswith(prefix)}
            module.load_state_dict(state, assign=True)
        try:
            return cls(
                model, tokenizer, classes=header.classes, sampling=header.sampling, weights=header.weights,
                captions=reader_from_header(header.condition, header.model.buffer_size), notes=header.notes,
            )  # fmt: skip
        except (LookupError, TypeError, AttributeError) as error:
            raise store.CheckpointError(f"{path}: its header describes no model ({error})") from error

    def generate_model_card(self, *args: Any, license: str | None = None, **unused: Any) -> ModelCard:
        """Generate the model card of `save_pretrained` and `push_to_hub`.

        It names a license only if `model_card_kwargs` has one.
        """
        facts = {**self._hub_mixin_info.model_card_data.to_dict(), "license": license}
        if self.captions is not None:
            facts["pipeline_tag"] = "text-to-image"
        data = ModelCardData(**facts)
        classes = self.model.config.classes
        text = CARD.format(
            data=data.to_yaml(), millions=sum(p.numel() for p in self.model.parameters()) / 1e6,
            size="x".join(map(str, self.image_size)), classes=f", {classes} classes" if classes else "",
            example=f"prompts={json.dumps(self.examples[:2] or ['...'])}" if self.captions
            else "labels=[0]" if classes else "labels=[None]",
        )  # fmt: skip
        return ModelCard(text)

    def _save_pretrained(self, save_directory: Path) -> None:
        self.save(save_directory / WEIGHTS_FILE)

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, revision: str | None, cache_dir: str | Path | None, force_download: bool,
        local_files_only: bool, token: str | bool | None, **unused: Any,
    ) -> Pipeline:  # fmt: skip
        if Path(model_id).is_dir():
            return cls.open(Path(model_id) / WEIGHTS_FILE)
        path = hf_hub_download(
            model_id, WEIGHTS_FILE, revision=revision, cache_dir=cache_dir, force_download=force_download,
            local_files_only=local_files_only, token=token,
        )  # fmt: skip
        return cls.open(path)


def to_uint8(images: Float[Tensor, "n c H W"]) -> UInt8[Tensor, "n c H W"]:
    """Round images in [-1, 1] to 8-bit values.

    The device rounds; only the 8-bit values are copied to the CPU.
    """
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def to_pil(images: Float[Tensor, "n c H W"]) -> list[Image.Image]:
    """Convert images in [-1, 1] to 8-bit PIL images, gray or RGB."""
    return _as_pil(to_uint8(images))


def _as_pil(images: UInt8[Tensor, "n c H W"]) -> list[Image.Image]:
    arrays = images.permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(a[..., 0] if a.shape[-1] == 1 else a) for a in arrays]

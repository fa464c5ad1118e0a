"""A diffusers pipeline around a model, for tools that know diffusers.

    from mar.diffusers_pipeline import MARPipeline
    pipe = MARPipeline.from_pretrained("fashion")
    image = pipe("dress", generator=torch.Generator().manual_seed(7)).images[0]

Images are those of `mar.Pipeline.sample` with the same seeds. The conventions are those of diffusers' DiT and Flux
pipelines (diffusers 0.42).
"""

from __future__ import annotations

import contextlib
import json
import operator
import os
import reprlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, SupportsIndex, get_args

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from mar.backends.cpu.int8 import is_quantized
from mar.checkpoint.files import write_text
from mar.config import SamplingConfig
from mar.config.fields import renamed_fields
from mar.data.conditions import Label, Prompt
from mar.nn import Linear
from mar.pipeline import Pipeline, RevealStep, to_pil
from mar.sampling.generate import as_seeds
from mar.zoo import load

KnownImages = Image.Image | Sequence[Image.Image] | Float[Tensor, "..."] | Float[np.ndarray, "..."]
"""PIL images, or arrays as `OutputType` has them; one or several."""
MaskImages = Image.Image | Bool[Tensor, "*n rows columns"] | Bool[np.ndarray, "*n rows columns"] | Sequence[Any]
"""PIL images, white where to generate, or bools, true there; one or several."""
OutputType = Literal["pil", "pt", "np", "latent"]
"""PIL images; a tensor (n, channels, height, width) or array (n, height, width, channels) in [0, 1]; latents."""
Callback = Callable[[Any, int, int, dict[str, Any]], dict[str, Any] | None]
"""Takes the pipeline, the step from 0, the number of steps left, and the requested tensors."""
CODE = '''\
"""Tell diffusers where the class of this folder is. Needs mar, from its repository: PyPI's is another."""

from mar.diffusers_pipeline import MARPipeline
'''
"""The file pipeline.py of a saved folder, which `DiffusionPipeline.from_pretrained` runs if it is trusted."""

_HUB_OPTIONS = ("revision", "cache_dir", "force_download", "local_files_only", "token")
_WITHOUT_EFFECT = frozenset(
    ("low_cpu_mem_usage", "use_safetensors", "max_memory", "offload_folder", "offload_state_dict", "disable_mmap",
     "trust_remote_code")
)  # fmt: skip


class MARModel(ModelMixin):  # type: ignore[misc]
    """The component of a MARPipeline: a `mar.Pipeline` as diffusers saves, loads and moves components.

    Args:
        pipeline: stays the owner of its modules; `pipe.model.pipeline` is this one.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__()
        self.pipeline = pipeline
        self.transformer = pipeline.model
        self.tokenizer = pipeline.tokenizer

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the model's matrices."""
        if is_quantized(self.transformer):
            return torch.int8
        return next(module.weight.dtype for module in self.transformer.modules() if isinstance(module, Linear))

    def to(self, device: torch.device | str | torch.dtype | None = None, dtype: torch.dtype | None = None) -> MARModel:
        """Move the model, and cast its matrices, as `mar.Pipeline.to` does."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        self.pipeline.to(device, dtype)
        return self

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write the folder of `mar.Pipeline.save_pretrained`."""
        self.pipeline.save_pretrained(Path(save_directory))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> MARModel:
        """Load a model onto the CPU, by any name that `mar.load` knows.

        Args:
            pretrained_model_name_or_path: a folder or a file; a bundled or official model; a repository of the Hub.
            dtype, torch_dtype: of the model's matrices (None: float32).
            options: of the Hub, as revision and token. Options of diffusers about memory have no effect, and others
                raise a ValueError.
        """
        hub = {name: options.pop(name) for name in _HUB_OPTIONS if name in options}
        _refuse("from_pretrained", options)
        name, dtype = os.fspath(pretrained_model_name_or_path), dtype or torch_dtype or torch.float32
        if any(hub.values()) and "/" in name and not Path(name).exists():
            return cls(Pipeline.from_pretrained(name, **hub).to(dtype=dtype))
        return cls(load(name, device="cpu", dtype=dtype))


class MARPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Generates images of classes or prompts, as a `DiffusionPipeline`.

    Args:
        model: of `mar.load`; or the component of another MARPipeline.
    """

    _callback_tensor_inputs = ("latents",)

    def __init__(self, model: Pipeline | MARModel) -> None:
        super().__init__()
        self.register_modules(model=MARModel(model) if isinstance(model, Pipeline) else model)
        self._interrupt = False
        self._num_timesteps = 0
        self._seeds: list[int] = []

    @property
    def labels(self) -> dict[str, int]:
        """Return the class numbers by class name."""
        return {name: number for number, name in enumerate(self.model.pipeline.classes)}

    @property
    def interrupt(self) -> bool:
        """Tell whether the call in progress is to end after its step; set `_interrupt` for that."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Return the number of reveal steps of the last call."""
        return self._num_timesteps

    @property
    def seeds(self) -> list[int]:
        """Return the seeds of the last call, one per image; `seeds=` draws the same images again."""
        return self._seeds

    # ---- sampling

    def __call__(
        self,
        class_labels: Label | Iterable[Label] = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        *,
        seeds: SupportsIndex | Iterable[SupportsIndex] | None = None,
        num_images_per_prompt: int = 1,
        image: KnownImages | None = None,
        mask_image: MaskImages | None = None,
        grow: int = 1,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        prompt: Prompt | Iterable[Prompt] = None,
        allow_broken: bool = False,
        height: int | None = None,
        width: int | None = None,
        **settings: Any,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Generate images, all in one batch.

        Raises ValueError for arguments that do not fit the model or each other.

        Args:
            class_labels: class names, class numbers, or None for no class; one or several. For a model that draws
                from words, prompts, so that `pipe("...")` draws them.
            num_inference_steps: K, the reveal steps (None: the model's).
            guidance_scale: scale of classifier-free guidance, 1 for none (None: the model's).
            generator: gives the seeds of the images, as `seeds_of` has it; one, or one per image (None: PyTorch's
                default generator).
            seeds: seeds of the images instead, as for `mar.Pipeline.sample`.
            num_images_per_prompt: images of each label or prompt, one after the other.
            image: images to keep where `mask_image` is black: PIL images, or arrays as `output_type` has them; one, one
                per label or prompt, or one per image.
            mask_image: PIL images, white where to generate; or bools (n, rows, columns), one per token or pixel.
            grow: tokens around painted pixels to generate as well, as for `mar.Pipeline.sample`.
            output_type: kind of `images`.
            return_dict: return an ImagePipelineOutput instead of a tuple.
            callback_on_step_end: called after every reveal step. It may stop the call by `pipe._interrupt = True`;
                masked tokens are then decoded from zeros. Other latents than those given are refused.
            callback_on_step_end_tensor_inputs: names of the tensors to give to it: latents, or none.
            prompt: what to draw, in words, for a model that draws from them; one or several, None for no condition.
            allow_broken: return noise instead of raising BrokenLatents.
            height, width: of the images, in pixels (None: the model's); others are experimental, as
                `mar.Pipeline.at_size` has it.
            settings: a preset, and fields of SamplingConfig that differ from the model's own.
        """
        model: Pipeline = self.model.pipeline
        asks = _as_prompts(class_labels, prompt) if model.captions else _as_labels(class_labels, prompt)
        if output_type not in get_args(OutputType):
            raise ValueError(f"output_type: got {output_type!r}, expected one of {', '.join(get_args(OutputType))}")
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(f"callback_on_step_end_tensor_inputs: got {', '.join(sorted(unknown))}, expected latents")
        settings = _merge_settings(settings, steps=num_inference_steps, guidance_scale=guidance_scale)
        if height is not None or width is not None:
            own = model.image_size
            model = model.at_size((own[0] if height is None else height, own[1] if width is None else width))
        asks, known, mask = _expand(asks, num_images_per_prompt, image, mask_image)
        self._num_timesteps = model.sampling_with(**settings).steps
        self._seeds = seeds_of(len(asks), generator, seeds)
        self._interrupt = False

        argument: dict[str, Any] = {model.condition_argument: asks}
        steps = model.reveal(
            seeds=self._seeds, known=known, mask=mask, grow=grow, allow_broken=allow_broken, **argument, **settings
        )
        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for step in steps:
                # known parts leave fewer tokens, so that there may be fewer steps
                self._num_timesteps = progress_bar.total = step.steps
                progress_bar.update(step.step - progress_bar.n)
                if callback_on_step_end is not None and step.step:
                    self._call_back(callback_on_step_end, step, callback_on_step_end_tensor_inputs)
                if self._interrupt:
                    break

        images = step.latents if output_type == "latent" else _convert(step.decode(), output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _call_back(self, callback: Callback, step: RevealStep, inputs: Sequence[str]) -> None:
        given = {"latents": step.latents.clone()} if "latents" in inputs else {}
        returned = callback(self, step.step - 1, step.steps - step.step, given) or {}
        latents = returned.get("latents", step.latents)
        if not torch.equal(latents.nan_to_num(), step.latents.nan_to_num()):
            raise ValueError(
                "callback_on_step_end: got other latents back, expected those that were given to it; "
                "use image and mask_image to set parts of an image"
            )

    # ---- saving and loading

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Write a folder that `mar.load`, MARPipeline and DiffusionPipeline open.

        Args:
            save_directory: is created if it does not exist.
            safe_serialization: has to be true.
            variant: has to be None.
            push_to_hub: upload the folder as well.
            options: of `push_to_hub`: repo_id (None: the name of the folder), token, private, ...
        """
        if not safe_serialization or variant:
            raise ValueError(
                f"save_pretrained: got safe_serialization={safe_serialization} and variant={variant!r}, expected True "
                "and None: mar writes safetensors of one kind"
            )
        folder = Path(save_directory)
        self.model.save_pretrained(folder)
        index = json.loads(self.to_json_string()) | {"_class_name": ["pipeline", type(self).__name__]}
        write_text(folder / self.config_name, json.dumps(index, indent=2, sort_keys=True) + "\n")
        write_text(folder / "pipeline.py", CODE)
        if push_to_hub:
            self.push_to_hub(options.pop("repo_id", None) or folder.name, **options)
        else:
            _refuse("save_pretrained", options)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any) -> MARPipeline:
        """Load a pipeline onto the CPU, by any name that `mar.load` knows.

        Args:
            pretrained_model_name_or_path, options: as in `MARModel.from_pretrained`.
        """
        return cls(MARModel.from_pretrained(pretrained_model_name_or_path, **options))


# ---- seeds


def seeds_of(
    count: int,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    seeds: SupportsIndex | Iterable[SupportsIndex] | None = None,
) -> list[int]:
    """Return one seed per image.

    A generator that has drawn nothing since `manual_seed(s)` gives s, and then what it draws. So the first image of
    such a generator is that of seed s, and a second call with it gives other images.

    Args:
        count: number of images.
        generator: one for all images, or one per image (None: PyTorch's default generator).
        seeds: the seeds, if they are known.
    """
    if seeds is not None:
        if generator is not None:
            raise ValueError("generator and seeds: got both, expected one of them")
        known = as_seeds(seeds if isinstance(seeds, Iterable) else [seeds])
        if len(known) != count:
            raise ValueError(f"seeds: got {len(known)}, expected {count}, one per image")
        return known
    if generator is None or isinstance(generator, torch.Generator):
        generators = [generator or torch.default_generator] * count
    else:
        generators = list(generator)
    if len(generators) != count or not all(isinstance(each, torch.Generator) for each in generators):
        raise ValueError(
            f"generator: got {reprlib.repr(generator)}, expected a torch.Generator, or a list of {count}, one per image"
        )
    return [_next_seed(each) for each in generators]


def _next_seed(generator: torch.Generator) -> int:
    seed = generator.initial_seed()
    fresh = torch.Generator(generator.device).manual_seed(seed)
    is_fresh = torch.equal(generator.get_state(), fresh.get_state())
    drawn = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
    return seed if is_fresh else drawn


# ---- arguments


def _merge_settings(settings: dict[str, Any], **named: Any) -> dict[str, Any]:
    """Merge settings with those that have an argument of their own."""
    names = {field.name for field in fields(SamplingConfig)}
    if unknown := set(settings) - names - set(renamed_fields(SamplingConfig)) - {"preset"}:
        raise ValueError(f"got {', '.join(sorted(unknown))}, expected preset, or settings: {', '.join(sorted(names))}")
    given = {name: value for name, value in named.items() if value is not None}
    if twice := set(settings) & set(given):
        raise ValueError(f"{', '.join(sorted(twice))}: got it twice, also by the name that diffusers has for it")
    return {**settings, **given}


def _as_labels(labels: Label | Iterable[Label], prompt: Any) -> list[Label]:
    if prompt is not None:
        raise ValueError(f"prompt: got {reprlib.repr(prompt)}, but this model takes classes; use class_labels")
    if labels is None or isinstance(labels, str):
        return [labels]
    with contextlib.suppress(TypeError):
        return [operator.index(labels)]  # type: ignore[arg-type]
    with contextlib.suppress(TypeError):
        if several := list(labels):  # type: ignore[arg-type]
            return several
    raise ValueError(f"class_labels: got {labels!r}, expected class names, class numbers or None, at least one")


def _as_prompts(labels: Any, prompt: Any) -> list[Prompt]:
    """Return the prompts in either argument: the first one of a call is `class_labels`."""
    if labels is not None and prompt is not None:
        raise ValueError(f"class_labels: got {reprlib.repr(labels)} and a prompt, expected a prompt alone")
    name, given = ("prompt", prompt) if labels is None else ("class_labels", labels)
    if given is None or isinstance(given, str):
        return [given]
    several = list(given) if isinstance(given, Iterable) else []
    if not several or not all(isinstance(each, str | None) for each in several):
        raise ValueError(
            f"{name}: got {reprlib.repr(given)}, but this model draws from words; expected prompts, at least one"
        )
    return several


def _expand(
    asks: list[Any],
    repeats: int,
    image: KnownImages | None,
    mask_image: MaskImages | None,
) -> tuple[list[Any], Any, Any]:
    """Repeat labels or prompts, images and masks to one per image to generate."""
    if repeats < 1:
        raise ValueError(f"num_images_per_prompt: got {repeats}, expected at least 1")
    if (image is None) != (mask_image is None):
        raise ValueError("image and mask_image: got only one of them, expected both (mask: white = generate)")
    known = None if image is None else _repeat(_as_known(image), len(asks), repeats)
    mask = None if mask_image is None else _repeat(_as_mask(mask_image), len(asks), repeats)
    return _repeat(asks, len(asks), repeats), known, mask


def _repeat(values: Any, labels: int, repeats: int) -> Any:
    """Repeat one value for all images, or those of each label; others stay."""
    if len(values) not in (1, labels):
        return values
    rows = [0 if len(values) == 1 else row for row in range(labels) for _ in range(repeats)]
    return values[rows] if isinstance(values, Tensor) else [values[row] for row in rows]


def _as_known(image: KnownImages) -> Sequence[Image.Image] | Tensor:
    """Convert images of diffusers' kinds to those of `mar.Pipeline.sample`."""
    if isinstance(image, Image.Image):
        return [image]
    if not isinstance(image, Tensor | np.ndarray):
        return image
    values = torch.as_tensor(image)
    values = values if values.ndim == 4 else values.unsqueeze(0)
    if values.ndim != 4 or not values.is_floating_point() or not ((values >= 0) & (values <= 1)).all():
        raise ValueError(
            f"image: got {tuple(image.shape)} of {image.dtype}, expected floats in [0, 1]: a tensor (n, channels, "
            "height, width) or an array (n, height, width, channels); or PIL images"
        )
    return (values.movedim(-1, 1) if isinstance(image, np.ndarray) else values) * 2 - 1


def _as_mask(mask: MaskImages) -> Any:
    """Convert a mask for one image to masks."""
    if isinstance(mask, Image.Image):
        return [mask]
    if isinstance(mask, Tensor | np.ndarray):
        flags = torch.as_tensor(mask)
        return flags.unsqueeze(0) if flags.ndim == 2 else flags
    return mask


def _convert(images: Tensor, output_type: str) -> list[Image.Image] | Tensor | np.ndarray:
    """Convert images in [-1, 1] to an output type."""
    if output_type == "pil":
        return to_pil(images)
    scaled = (images / 2 + 0.5).clamp(0, 1)
    return scaled if output_type == "pt" else scaled.permute(0, 2, 3, 1).numpy()


def _refuse(method: str, options: dict[str, Any]) -> None:
    """Raise ValueError for options of diffusers that would change something, but can't here."""
    if names := sorted(name for name, value in options.items() if value and name not in _WITHOUT_EFFECT):
        raise ValueError(f"{method}: got {', '.join(names)}, which mar does not have; leave it out")

"""Describe the published models: architecture, figures, files, licenses.

`PUBLISHED`, `TOKENIZERS` and `BUNDLED` hold one record a model. `mar models`, `mar download`, the studio's list and the
tables of README.md and docs/models.md are made from them. No published file was opened here: sizes and hashes are those
that others report, and None where nobody does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from mar.config import HeadConfig, ModelConfig, SamplingConfig, TrunkConfig

Family = Literal["mar", "emigm", "detok"]
"""Projects that publish weights of this architecture: MAR, eMIGM, l-DeTok."""

MIB = 2**20
_CODE_LICENSE = "MIT (the code; that of the weights was not seen)"


@dataclass(frozen=True)
class PublishedFile:
    """A file on the web, and what it has to be like."""

    name: str
    """Its name in the download folder; `/` for one in a folder there."""
    sources: tuple[str, ...]
    """Addresses of the same bytes, the first one preferred; `hf://OWNER/NAME@REVISION/PATH` on the Hub."""
    size: int | None = None
    """In bytes, if it is known exactly."""
    mebibytes: float | None = None
    """Approximate size in MiB."""
    sha256: str | None = None
    """In hexadecimal, if it is known."""
    pattern: str | None = None
    """Regular expression of its name on the Hub, where the path in `sources` was not seen."""

    def approximate_mebibytes(self) -> float | None:
        """Return the size in MiB; None: unknown."""
        return self.mebibytes if self.size is None else self.size / MIB


@dataclass(frozen=True)
class PublishedTokenizer:
    """A tokenizer of published models."""

    title: str
    kind: str
    """Its kind in `mar.tokenizer.TOKENIZERS`."""
    files: tuple[PublishedFile, ...]
    """The first one holds the weights."""
    parameters: int
    channels: int
    stride: int
    scale: float | None
    """Factor of its latents; None: its statistics are in a file."""
    license: str
    compared: str
    """Comparisons with figures of the authors' code."""
    repositories: tuple[str, ...] = ()
    """Repositories on the Hub, the first one in diffusers' format."""


@dataclass(frozen=True)
class Figures:
    """Report FID and Inception Score of 50,000 pictures, by the authors."""

    fid: float
    inception_score: float | None
    sampling: SamplingConfig
    note: str = ""


@dataclass(frozen=True)
class FamilyInfo:
    """A project with published models, and defaults for other sizes."""

    title: str
    paper: str
    tokenizer: str
    """In `TOKENIZERS`, for as many channels as none of its published models has."""
    sampling: SamplingConfig
    compared: str
    """Comparisons with figures of the authors' code."""
    tied: bool = False
    """Mask token and null class are one tensor, which tells its files from others'."""
    license: str = _CODE_LICENSE
    images: int = 800 * 1_281_167
    """Length of the trainings, in images seen."""


@dataclass(frozen=True)
class PublishedModel:
    """A model with published weights, and the settings of its figures."""

    family: Family
    config: ModelConfig
    tokenizer: str
    """A name in `TOKENIZERS`."""
    parameters: int
    figures: tuple[Figures, ...]
    """The first ones are those of `sampling`."""
    files: tuple[PublishedFile, ...]
    batch: int = 2048
    """Images a step of its training."""

    @property
    def sampling(self) -> SamplingConfig:
        """The settings of its first figures."""
        return self.figures[0].sampling

    @property
    def pixels(self) -> int:
        """Side of its pictures."""
        return self.config.grid[0] * TOKENIZERS[self.tokenizer].stride

    @property
    def images(self) -> int:
        """Length of its training, in images seen."""
        return FAMILIES[self.family].images

    def summary(self) -> str:
        """Return a line with size, pixels and the authors' figures."""
        best = self.figures[0]
        return (
            f"{self.parameters / 1e6:.0f} M parameters, {self.pixels} x {self.pixels} pixels; "
            f"its authors' FID in {best.sampling.steps} steps: {best.fid:.2f}"
        )


@dataclass(frozen=True)
class BundledModel:
    """A model that comes with the package."""

    parameters: int
    pixels: int
    draws: str
    license: str


BUNDLED: dict[str, BundledModel] = {
    "emoji": BundledModel(5_279_712, 64, "emoji from words", "MIT"),
    "fashion": BundledModel(3_544_864, 28, "gray pictures of ten classes of clothes", "MIT"),
}
"""Models of the package by name."""


# ---- tokenizers

_SHARE = "https://www.dropbox.com/scl/fi"
# dl=1 asks for the file itself: the dl=0 of the published links gives a web page around it.
_MAR_COPY = "hf://jadechoghari/mar@773c9bdcd98740c7b876ce0d66f684a0e2468990"
"""A third party's copy of two of MAR's files; later revisions have other files."""
_DETOK = "hf://jjiaweiyang/l-DeTok"
_DC_AE = "hf://mit-han-lab/dc-ae-f32c32-in-1.0-diffusers"

TOKENIZERS: dict[str, PublishedTokenizer] = {
    "kl16": PublishedTokenizer(
        "KL-16 of MAR",
        "kl",
        (
            PublishedFile(
                "kl16.ckpt",
                (
                    f"{_SHARE}/hhmuvaiacrarfg28qxhwz/kl16.ckpt?rlkey=l44xipsezc8atcffdp4q7mwmh&dl=1",
                    f"{_MAR_COPY}/kl16.ckpt",
                ),
                265_900_046,
                sha256="34ce001bcfffb7af67ec8af1e683a30d7bd45760855ddc7deedc1330f2cfd38f",
            ),
        ),
        parameters=66_456_019,
        channels=16,
        stride=16,
        scale=0.2325,
        license=_CODE_LICENSE,
        compared="moments and decoded pictures",
    ),
    "dc-ae": PublishedTokenizer(
        "DC-AE f32c32-in-1.0",
        "dc",
        (
            PublishedFile(
                "dc-ae/diffusion_pytorch_model.safetensors",
                (f"{_DC_AE}/diffusion_pytorch_model.safetensors",),
            ),
            PublishedFile("dc-ae/config.json", (f"{_DC_AE}/config.json",)),
        ),
        parameters=323_356_460,
        channels=32,
        stride=32,
        scale=0.3189,
        license="Apache-2.0",
        compared="with nothing but diffusers",
        repositories=("mit-han-lab/dc-ae-f32c32-in-1.0-diffusers", "mit-han-lab/dc-ae-f32c32-in-1.0"),
    ),
    "detok": PublishedTokenizer(
        "l-DeTok BB, decoder fine-tuned",
        "vit",
        (
            PublishedFile(
                "detok/detok-BB-gamm3.0-m0.7-decoder_tuned.pth",
                (f"{_DETOK}/detok-BB-gamm3.0-m0.7-decoder_tuned.pth",),
            ),
            PublishedFile("detok/stats.pkl", (f"{_DETOK}/stats.pkl",)),
        ),
        parameters=171_712_628,
        channels=16,
        stride=16,
        scale=None,
        license=_CODE_LICENSE,
        compared="moments, statistics and decoded pictures, at full size too",
    ),
}
"""Tokenizers of the published models by name, as `--tokenizer` and `mar download` take them."""


# ---- models


def _trunk(width: int, depth: int, num_heads: int) -> TrunkConfig:
    return TrunkConfig(width, depth, num_heads)


def _architecture(trunk: TrunkConfig, head_depth: int, head_width: int) -> ModelConfig:
    return ModelConfig(encoder=trunk, decoder=trunk, head=HeadConfig(width=head_width, depth=head_depth))


BASE, LARGE, HUGE = _trunk(768, 12, 12), _trunk(1024, 16, 16), _trunk(1280, 20, 16)
"""Trunks of the paper's three sizes."""

MODELS: dict[str, ModelConfig] = {
    "mar-base": _architecture(BASE, 6, 1024),
    "mar-large": _architecture(LARGE, 8, 1280),
    "mar-huge": _architecture(HUGE, 12, 1536),
}
"""The paper's models for ImageNet 256x256 in KL-16 latents: 208, 478 and 942 million parameters (paper, table 4)."""


def _mar(
    name: str, parameters: int, guidance_scale: float, guided: tuple[float, float], plain: tuple[float, float],
    file: PublishedFile,
) -> PublishedModel:  # fmt: skip
    return PublishedModel(
        "mar",
        MODELS[name],
        "kl16",
        parameters,
        (
            Figures(*guided, SamplingConfig(steps=256, guidance_scale=guidance_scale)),
            Figures(*plain, SamplingConfig(steps=256, temperature=0.95), "without guidance"),
        ),
        (file,),
    )


_EMIGM = SamplingConfig(
    steps=16,
    diffusion_steps=8,
    guidance_scale=4.0,
    guidance_schedule="constant",
    solver="dpm++3s",
    mask_schedule="exponential",
    reveal="binomial",
    guidance_time=(0.1, 0.3),
)
"""Settings of eMIGM's figures in 16 steps."""

_LONG_DIFFUSION_STEPS = 14
"""Evaluations of eMIGM's head with more than 16 reveal steps."""


def _emigm(
    name: str,
    trunk: TrunkConfig,
    head: tuple[int, int],
    parameters: int,
    short: tuple[float, float | None, tuple[float, float]],
    long: tuple[float, float | None, tuple[float, float]],
    pixels: int = 256,
    batch: int = 2048,
) -> PublishedModel:
    """Describe an eMIGM.

    Args:
        name: its size in the names of its files.
        trunk: of encoder and decoder.
        head: depth and width.
        parameters: their number.
        short: FID, Inception Score and guided times in 16 steps.
        long: the same in 128 steps, at 512 pixels in 64.
        pixels: side of the pictures.
        batch: images a step of its training.
    """
    config = replace(
        _architecture(trunk, *head), channels=16 if pixels == 256 else 32, mask_schedule="exp", tie_null=True
    )
    return PublishedModel(
        "emigm",
        config,
        "kl16" if pixels == 256 else "dc-ae",
        parameters,
        tuple(
            Figures(fid, score, replace(_EMIGM, steps=steps, diffusion_steps=evaluations, guidance_time=times))
            for (fid, score, times), steps, evaluations in (
                (short, 16, _EMIGM.diffusion_steps),
                (long, 128 if pixels == 256 else 64, _LONG_DIFFUSION_STEPS),
            )
        ),
        (
            PublishedFile(
                f"emigm-{'xs' if name == 'xsmall' else name}{'' if pixels == 256 else '-512'}.pth",
                (f"hf://GSAI-ML/eMIGM/eMIGM_{name}_{pixels}_checkpoint.pth",),
                pattern=rf"(?i).*emigm[_-]{'x(s|small)' if name == 'xsmall' else name}[_-]{pixels}.*\.pth",
            ),
        ),
        batch,
    )


def _detok(
    size: str, parameters: int, guidance_scale: float, tuned: tuple[float, float], plain: tuple[float, float]
) -> PublishedModel:
    sampling = SamplingConfig(steps=256, guidance_scale=guidance_scale)
    return PublishedModel(
        "detok",
        MODELS[f"mar-{size}"],
        "detok",
        parameters,
        (Figures(*tuned, sampling), Figures(*plain, sampling, "with the decoder as it was before its fine-tuning")),
        (PublishedFile(f"detok-{size}.pth", (f"{_DETOK}/mar_{size}.pth",)),),
        batch=1024,
    )


_XS, _SMALL = _trunk(448, 10, 8), _trunk(512, 12, 8)
_EARLY, _EARLY_512, _LATE, _LATE_512 = (0.1, 0.3), (0.15, 0.35), (0.18, 0.6), (0.25, 0.5)

PUBLISHED: dict[str, PublishedModel] = {
    "mar-base": _mar(
        "mar-base", 207_924_768, 2.9, (2.31, 281.7), (3.48, 192.4),
        PublishedFile(
            "mar-base.pth",
            (f"{_SHARE}/f6dpuyjb7fudzxcyhvrhk/checkpoint-last.pth?rlkey=a6i4bo71vhfo4anp33n9ukujb&dl=1",
             f"{_MAR_COPY}/checkpoint-last.pth"),
            1_663_614_946,
            sha256="7e970a33bc90353e2fabe3498ed1f2d194dd8d17cd387665f80b2984dfca538c",
        ),
    ),
    "mar-large": _mar(
        "mar-large", 478_326_304, 3.0, (1.78, 296.0), (2.60, 221.4),
        PublishedFile(
            "mar-large.pth",
            (f"{_SHARE}/pxacc5b2mrt3ifw4cah6k/checkpoint-last.pth?rlkey=m48ovo6g7ivcbosrbdaz0ehqt&dl=1",),
            mebibytes=3650,
        ),
    ),
    "mar-huge": _mar(
        "mar-huge", 942_403_104, 3.2, (1.55, 303.7), (2.35, 227.8),
        PublishedFile(
            "mar-huge.pth",
            (f"{_SHARE}/1qmfx6fpy3k7j9vcjjs3s/checkpoint-last.pth?rlkey=4lae281yzxb406atp32vzc83o&dl=1",),
            mebibytes=7191,
        ),
    ),
    "emigm-xs": _emigm(
        "xsmall", _XS, (3, 1024), 69_018_848, (4.23, 218.6, _EARLY), (3.62, 224.9, _LATE), batch=1024
    ),
    "emigm-small": _emigm(
        "small", _SMALL, (3, 1024), 96_640_544, (3.44, 244.2, _EARLY), (2.87, 254.5, _LATE), batch=1024
    ),
    "emigm-base": _emigm(
        "base", BASE, (6, 1024), 207_924_000, (2.79, 284.6, _EARLY), (2.32, 279.0, (0.05, 0.4))
    ),
    "emigm-large": _emigm("large", LARGE, (8, 1280), 478_325_280, (2.22, 291.6, _EARLY), (1.72, 304.2, _LATE)),
    "emigm-huge": _emigm(
        "huge", HUGE, (12, 1536), 942_401_824, (2.02, 299.4, (0.2, 0.4)), (1.57, 306.0, (0.3, 0.7))
    ),
    "emigm-xs-512": _emigm(
        "xsmall", _XS, (6, 1280), 104_506_624, (4.63, None, _EARLY_512), (4.45, None, _LATE_512), 512, 1024
    ),
    "emigm-small-512": _emigm(
        "small", _SMALL, (6, 1280), 132_145_728, (3.65, None, _EARLY_512), (3.29, None, _LATE_512), 512, 1024
    ),
    "emigm-base-512": _emigm(
        "base", BASE, (8, 1280), 244_150_592, (2.78, None, _EARLY_512), (2.31, None, _LATE_512), 512
    ),
    "emigm-large-512": _emigm(
        "large", LARGE, (8, 1280), 478_403_136, (2.19, None, _EARLY_512), (1.77, None, _LATE_512), 512
    ),
    "detok-base": _detok("base", 207_924_768, 3.9, (1.55, 291.0), (1.61, 289.7)),
    "detok-large": _detok("large", 478_326_304, 3.4, (1.32, 304.1), (1.43, 303.5)),
}  # fmt: skip
"""Published models by name: MAR; eMIGM; the MAR of l-DeTok. Their figures are their authors', for ImageNet."""

SAMPLING: dict[str, SamplingConfig] = {name: PUBLISHED[name].sampling for name in MODELS}
"""The guidance with which each of MAR's models reaches its published FID: 2.31, 1.78, 1.55 (paper, table 4)."""

FAMILIES: dict[Family, FamilyInfo] = {
    "mar": FamilyInfo(
        "MAR",
        "arXiv 2406.11838",
        "kl16",
        SamplingConfig(),
        "conditions, loss, gradients, sampling steps",
    ),
    "emigm": FamilyInfo(
        "eMIGM",
        "arXiv 2503.07197",
        "kl16",
        _EMIGM,
        "conditions, loss, gradients, masks, schedules, solver, whole samples of a tiny model",
        tied=True,
    ),
    "detok": FamilyInfo(
        "l-DeTok's MAR",
        "arXiv 2507.15856",
        "detok",
        SamplingConfig(),
        "conditions, loss, gradients, and decoded samples of a tiny model",
    ),
}
"""Families by name."""


def published(config: ModelConfig, family: Family) -> PublishedModel | None:
    """Find the published model of a family with this architecture; None for another."""
    return next((p for p in PUBLISHED.values() if p.family == family and p.config == config), None)


def tokenizer_of(config: ModelConfig, family: Family) -> str:
    """Return the tokenizer of a family for as many channels."""
    own = (p.tokenizer for p in PUBLISHED.values() if p.family == family and p.config.channels == config.channels)
    return next(own, FAMILIES[family].tokenizer)


def same_tensors(family: Family) -> list[Family]:
    """List the other families whose files have the same tensors."""
    return [name for name, info in FAMILIES.items() if name != family and info.tied == FAMILIES[family].tied]


def files_of(name: str) -> tuple[PublishedFile, ...]:
    """Return the files of a published model or tokenizer alone."""
    return TOKENIZERS[name].files if name in TOKENIZERS else PUBLISHED[name].files


def names_in_repository(repository: str) -> list[str]:
    """List the published names with files in a Hub repository."""
    names = []
    for name in (*PUBLISHED, *TOKENIZERS):
        sources = [source for file in files_of(name) for source in file.sources]
        own = TOKENIZERS[name].repositories if name in TOKENIZERS else ()
        if repository in own or any(
            source.startswith((f"hf://{repository}/", f"hf://{repository}@")) for source in sources
        ):
            names.append(name)
    return names

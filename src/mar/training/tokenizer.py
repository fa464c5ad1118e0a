"""Train a tokenizer by the loop that trains models (`mar.training.trainer`).

The loss of an image and its reconstruction is L1, and optionally a perceptual distance and a patch discriminator. A
residual tokenizer decodes latents with noise. An autoencoder decodes samples of a posterior, and has its KL divergence
in the loss.
A run's folder is that of a model's run, with two differences. samples/ has held-out images above their reconstructions.
At the end come config.json, EMA weights and their statistics: the folder is then a tokenizer (`load_tokenizer`).
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn import functional

from mar import distributed
from mar.checkpoint.run_state import RunState
from mar.checkpoint.tokenizers import save_tokenizer
from mar.config import ConfigError
from mar.config.tokenizer import TokenizerTrainConfig
from mar.data.images import Source, Transform, image_grid
from mar.data.loader import Batch, ImageBatch, batches, in_order, resume_data
from mar.data.splits import hold_out, load_held_out, save_held_out, subset
from mar.pipeline import to_pil
from mar.random import make_generator
from mar.tokenizer import Tokenizer
from mar.tokenizer.base import Posterior, RoundTrip, measure_latents, reconstruct, round_trip
from mar.tokenizer.residual import ResidualTokenizer
from mar.training.early_stopping import HISTORY_FILE, read_history, write_history
from mar.training.ema import EMA
from mar.training.log import Log, save_sheet
from mar.training.optim import make_adamw, make_tokenizer_optimizers
from mar.training.page_html import Command
from mar.training.run import check_same_run, moved_from, save_config
from mar.training.trainer import StepResult, TrainingRun, autocast, latent_noise_level, posterior_noise

EVAL_IMAGES = 1000
"""Held-out images, at most, for the PSNR."""
STATS_IMAGES = 10_000
"""Training images, at most, for the statistics of latents."""
NOISE_RISE = 0.25
"""Share of a residual tokenizer's training in which its noise rises from 0."""
MIN_RISE = 0.02
"""A rise of the PSNR by less, in decibels, does not count."""
_PSNRS = {"psnr": "held-out images"}
"""Names the values of a tokenizer's history."""
GRID_IMAGES = 8
"""Held-out images shown with their reconstructions."""
TAPS = (0, 2, 4, 10)
"""Blocks of EfficientNet-Lite0 whose features are compared: the last of each resolution, from 1/2 to 1/16."""
MIN_SIDE = 64
"""Smaller images are enlarged to this short side before features are computed."""
_EPSILON = 1e-10


# ---- losses


class PerceptualDistance(nn.Module):
    """Distance between features of EfficientNet-Lite0, like LPIPS without its learned weights.

    Zhang et al. (arXiv 1801.03924), equation 1 with equal weights: features are normalized at each position, and their
    squared differences summed over channels and averaged over positions and taps. The network is not trained.
    """

    def __init__(self, efficientnet: Any) -> None:
        super().__init__()
        self.network = efficientnet.eval().requires_grad_(False)

    def forward(self, images: Float[Tensor, "n c h w"], others: Float[Tensor, "n c h w"]) -> Float[Tensor, ""]:
        """Compute the mean distance of pairs of images in [-1, 1], gray or RGB."""
        pairs = zip(self._features(images), self._features(others), strict=True)
        distances = [(a - b).square().sum(1).mean() for a, b in pairs]
        return torch.stack(distances).mean()

    def _features(self, images: Tensor) -> list[Tensor]:
        x = (127.5 * images.expand(-1, 3, -1, -1) + 0.5) / 128  # pixels as the network was trained: (x - 127) / 128
        side = min(x.shape[2:])
        if side < MIN_SIDE:
            x = functional.interpolate(x, scale_factor=MIN_SIDE / side, mode="bilinear", align_corners=False)
        network, features = self.network, []
        x = network._swish(network._bn0(network._conv_stem(x)))
        for number, block in enumerate(network._blocks[: TAPS[-1] + 1]):
            x = block(x)
            if number in TAPS:
                features.append(x * (x.square().sum(1, keepdim=True) + _EPSILON).rsqrt())
        return features


class PatchDiscriminator(nn.Module):
    """Discriminator of image patches, real from reconstructed (Isola et al., arXiv 1611.07004, section 3.2.2)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width)
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for before, after in itertools.pairwise(widths):
            stride = 2 if after == widths[1] else 1
            layers += [nn.Conv2d(before, after, 4, stride, 1), nn.GroupNorm(8, after), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 1 p q"]:
        """Compute a logit for each patch, high for real ones."""
        return self.layers(images)


def hinge_loss(real: Float[Tensor, "n 1 p q"], fake: Float[Tensor, "n 1 p q"]) -> Float[Tensor, ""]:
    """Compute the discriminator's loss from its logits (Lim and Ye, arXiv 1705.02894)."""
    return 0.5 * (functional.relu(1 - real).mean() + functional.relu(1 + fake).mean())


def adversarial_weight(
    loss: Float[Tensor, ""], adversarial: Float[Tensor, ""], last_layer: Tensor
) -> Float[Tensor, ""]:
    """Compute the factor for equal gradients of both losses, at most 10^4.

    They are measured at the decoder's last layer: Esser et al., "Taming transformers" (arXiv 2012.09841), equation 7.
    """
    (gradient,) = torch.autograd.grad(loss, last_layer, retain_graph=True)
    (adversarial_gradient,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (gradient.norm() / (adversarial_gradient.norm() + 1e-4)).clamp(max=1e4).detach()


# ---- objectives: what is trained, and how images come back in training


class Objective(Protocol):
    """The training of one kind of tokenizer."""

    def make(self, config: TokenizerTrainConfig) -> nn.Module:
        """Create the module that is trained, with random weights."""
        ...

    def fit(self, module: nn.Module, batches: Iterator[Tensor]) -> None:
        """Fit the parts without gradients to images, before the first step."""
        ...

    def reconstruct(
        self, module: Any, images: Tensor, positions: Tensor, config: TokenizerTrainConfig
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return reconstructions, float32, and further terms of the loss.

        Args:
            module: of `make`.
            images: in [-1, 1].
            positions: of the images in the run, for their noise.
            config: settings of the run.
        """
        ...

    def last_layer(self, module: Any) -> Tensor:
        """Return the weight of the decoder's last layer."""
        ...

    def hidden_kernels(self, module: Any) -> list[Tensor]:
        """Return the kernels between features, which Muon may train."""
        ...

    def tokenizer(self, module: Any) -> Tokenizer:
        """Return a tokenizer without statistics around a trained module."""
        ...

    def set_statistics(self, tokenizer: Any, batches: Iterator[Tensor]) -> None:
        """Measure the statistics of latents."""
        ...


class ResidualObjective:
    """Decodes latents with noise, since drawn ones are never exact.

    Source: l-DeTok, arXiv 2507.15856.
    The standard deviation of the noise is uniform between 0 and `noise`, different for each image. The upper end rises
    from 0 at the beginning: a young network would lose more by the noise than it has learned.
    """

    def make(self, config: TokenizerTrainConfig) -> ResidualTokenizer:
        """Create a tokenizer without components."""
        config = config.resolved()
        assert config.width is not None
        assert config.depth is not None
        return ResidualTokenizer(
            config.channels_in, config.stride, config.channels, config.width, config.depth, sample_size=max(config.size)
        )

    def fit(self, module: ResidualTokenizer, batches: Iterator[Tensor]) -> None:
        """Fit the principal components."""
        module.fit_linear(batches)

    def reconstruct(
        self, module: ResidualTokenizer, images: Tensor, positions: Tensor, config: TokenizerTrainConfig
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Decode the latents with noise.

        Args:
            module, images, positions, config: as in `Objective.reconstruct`.
        """
        latents = module.encode_raw(images).float()
        noise = posterior_noise(latents, config.seed, positions)
        # relative to the latents, with its gradient: else the encoder outgrows the noise
        scale = latents.square().mean().sqrt()
        rise = (positions / (NOISE_RISE * config.images)).clamp(max=1)
        level = config.noise * scale * (rise * latent_noise_level(config.seed, positions)).to(latents.device)
        return module.decode_raw(latents + level.view(-1, 1, 1, 1) * noise).float(), {}

    def last_layer(self, module: ResidualTokenizer) -> Tensor:
        """Return the weight of the decoder's last convolution."""
        return module.last_layer.weight

    def hidden_kernels(self, module: ResidualTokenizer) -> list[Tensor]:
        """Return all kernels but the last ones."""
        return module.hidden_kernels

    def tokenizer(self, module: ResidualTokenizer) -> ResidualTokenizer:
        """Return the module: it is the tokenizer."""
        return module

    def set_statistics(self, tokenizer: ResidualTokenizer, batches: Iterator[Tensor]) -> None:
        """Measure the mean of each channel, and one standard deviation for all.

        So channels keep the proportions of their principal components, as `PCATokenizer` has them.
        """
        stats = measure_latents(tokenizer, batches, per_channel=True)
        std = math.sqrt(sum(value**2 for value in stats.std) / len(stats.std))
        tokenizer.set_statistics(stats.mean, [std] * len(stats.std))


class KLObjective:
    """Decodes samples of the posterior, and returns its KL divergence."""

    def make(self, config: TokenizerTrainConfig) -> nn.Module:
        """Create an AutoencoderKL of diffusers."""
        from mar.tokenizer.kl import from_config

        return from_config(autoencoder_config(config)).autoencoder

    def fit(self, module: nn.Module, batches: Iterator[Tensor]) -> None:
        """Do nothing: all is learned."""

    def reconstruct(
        self, module: Any, images: Tensor, positions: Tensor, config: TokenizerTrainConfig
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Decode a sample of the posterior. Source of the divergence: arXiv 1312.6114, appendix B.

        Args:
            module, images, positions, config: as in `Objective.reconstruct`.
        """
        posterior = module.encode(images).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
        latents = Posterior(mean, torch.exp(0.5 * logvar)).sample(posterior_noise(mean, config.seed, positions))
        return module.decode(latents).sample.float(), {"kl": kl}

    def last_layer(self, module: Any) -> Tensor:
        """Return the weight of the decoder's last convolution."""
        weight: Tensor = module.decoder.conv_out.weight
        return weight

    def hidden_kernels(self, module: Any) -> list[Tensor]:
        """Return all kernels but those that make latents, moments or pixels."""
        last = ("conv_out", "quant_conv", "post_quant_conv")
        convolutions = ((name, part) for name, part in module.named_modules() if isinstance(part, nn.Conv2d))
        return [part.weight for name, part in convolutions if name.rpartition(".")[2] not in last]

    def tokenizer(self, module: Any) -> Tokenizer:
        """Wrap an autoencoder."""
        from mar.tokenizer.kl import KLTokenizer

        return KLTokenizer(module)

    def set_statistics(self, tokenizer: Tokenizer, batches: Iterator[Tensor]) -> None:
        """Measure mean and standard deviation of each channel."""
        stats = measure_latents(tokenizer, batches, per_channel=True)
        tokenizer.set_statistics(stats.mean, stats.std)


OBJECTIVES: dict[str, Any] = {"residual": ResidualObjective(), "kl": KLObjective()}
"""Objectives (`Objective`) by the `kind` of a run's config."""


# ---- the run


def autoencoder_config(config: TokenizerTrainConfig) -> dict[str, Any]:
    """Return the arguments of diffusers' AutoencoderKL."""
    config = config.resolved()
    assert config.width is not None
    stages = int(math.log2(config.stride)) + 1
    return {
        "in_channels": config.channels_in,
        "out_channels": config.channels_in,
        "down_block_types": ["DownEncoderBlock2D"] * stages,
        "up_block_types": ["UpDecoderBlock2D"] * stages,
        "block_out_channels": [config.width * min(2**stage, 4) for stage in range(stages)],
        "layers_per_block": config.depth,
        "latent_channels": config.channels,
        "norm_num_groups": 8,
        "sample_size": max(config.size),
    }


class TokenizerRun(TrainingRun):
    """Training of one tokenizer, in one process.

    Args:
        config: all settings.
        folder: where the run keeps its files.
        source: what it learns from.
        held_out: what it is evaluated on.
        module: trained in place; of the objective's `make`.
        device: where to train.
        efficientnet: EfficientNet-Lite0 for the perceptual loss; None: no such loss.
    """

    config: TokenizerTrainConfig
    source: Source
    stage = "tokenizer"
    model: Any
    """The module of the objective: a ResidualTokenizer, or a diffusers AutoencoderKL."""

    def __init__(
        self,
        config: TokenizerTrainConfig,
        folder: Path,
        source: Source,
        held_out: Source,
        module: nn.Module,
        device: torch.device,
        efficientnet: Any = None,
    ) -> None:
        super().__init__(config, folder, device)
        self.source, self.held_out = source, held_out
        self.objective: Objective = OBJECTIVES[config.kind]
        self.model = module.to(device).train()
        self.ema = EMA(self.model, config.ema)
        self.optimizers = make_tokenizer_optimizers(self.model, self.objective.hidden_kernels(self.model), config)
        self.perceptual = None if efficientnet is None else PerceptualDistance(efficientnet.to(device))
        self.discriminator: PatchDiscriminator | None = None
        self.discriminator_start = config.adversarial_from
        """Images after which the discriminator is used."""
        if config.adversarial:
            width = config.resolved().width
            assert width is not None
            self.discriminator = PatchDiscriminator(config.channels_in, width).to(device)
            groups = [{"params": list(self.discriminator.parameters()), "weight_decay": 0.0}]
            self.discriminator_optimizer = make_adamw(groups, config.scaled_lr, (config.beta1, config.beta2))

    @property
    def transform(self) -> Transform:
        """Crop and channels of the images."""
        return Transform(self.config.size, self.config.channels_in, self.config.upright)

    def batches(self) -> Iterator[Batch]:
        """Yield batches without end, from the current position."""
        config = self.config
        return batches(
            self.source, self.transform, batch=config.batch, seed=config.seed, start=self.progress.images,
            workers=config.workers, flip=config.flip,
        )  # fmt: skip

    def next_commands(self) -> tuple[Command, ...]:
        """Return the command that uses the tokenizer."""
        return (Command("Train a model on it", train_command(self.config, self.folder)),)

    def step(self, batch: Batch) -> StepResult:
        """Take a step of the autoencoder, and of a discriminator in use."""
        assert isinstance(batch, ImageBatch)
        images = batch.images.to(self.device)
        discriminator = self.discriminator if self.progress.images >= self.discriminator_start else None

        # tokenizer
        self.model.zero_grad(set_to_none=True)
        with autocast(self.device, self.config.precision):
            reconstructed, further = self.objective.reconstruct(self.model, images, batch.positions, self.config)
            terms = {"l1": (images - reconstructed).abs().mean(), **further}
            loss = terms["l1"]
            if "kl" in further:
                loss = loss + self.config.kl * further["kl"]
            if self.perceptual is not None:
                terms["perceptual"] = self.perceptual(images, reconstructed)
                loss = loss + self.config.perceptual * terms["perceptual"]
            total = loss
            if discriminator is not None:
                terms["adversarial"] = -discriminator(reconstructed).mean()
                weight = adversarial_weight(loss, terms["adversarial"], self.objective.last_layer(self.model))
                total = loss + self.config.adversarial * weight * terms["adversarial"]
        total.backward()
        norm = self.optimizer_step()

        # discriminator
        if discriminator is not None and math.isfinite(norm):
            terms["critic"] = self._discriminator_step(discriminator, images, reconstructed.detach())
        self.extra_metrics = {name: term.item() for name, term in terms.items()}
        return StepResult(loss.item(), norm)

    def _discriminator_step(
        self, discriminator: PatchDiscriminator, images: Tensor, reconstructed: Tensor
    ) -> Float[Tensor, ""]:
        """Take a step at the autoencoder's learning rate, unless the gradient is not finite. Returns the loss."""
        self.discriminator_optimizer.param_groups[0]["lr"] = self.optimizers[0].param_groups[0]["lr"]
        discriminator.zero_grad(set_to_none=True)
        with autocast(self.device, self.config.precision):
            loss = hinge_loss(discriminator(images), discriminator(reconstructed))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(discriminator.parameters(), self.config.clip)
        if norm.isfinite():
            self.discriminator_optimizer.step()
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return all that the run needs to resume."""
        state = super().state_dict()
        state["data"] = {"pictures": len(self.source), "digest": self.data_digest}
        if self.discriminator is not None:
            state["critic"] = self.discriminator.state_dict()
            state["critic_optimizer"] = get_optimizer_state_dict(self.discriminator, self.discriminator_optimizer)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned. ConfigError for other images in another place."""
        super().load_state_dict(state)
        self.data_note = resume_data(
            self.source, state.get("data"), self.progress.images, digest=self.data_digest, moved_from=self.moved_from
        )
        if self.discriminator is not None:
            self.discriminator.load_state_dict(state["critic"])
            set_optimizer_state_dict(self.discriminator, self.discriminator_optimizer, state["critic_optimizer"])
            # `adversarial_from` moves if the run is made longer, but a discriminator in use stays in use
            if any(moments["step"] > 0 for moments in self.discriminator_optimizer.state.values()):
                self.discriminator_start = min(self.discriminator_start, self.progress.images)


def open_tokenizer_run(
    config: TokenizerTrainConfig, folder: Path, *, device: torch.device, load_network: Callable[[], Any]
) -> TokenizerRun:
    """Open the run in a folder, resumed if there are saved states.

    ConfigError if the folder holds another run, or for several processes; ValueError without images.

    Args:
        config: all settings.
        folder: where the run keeps its files.
        device: where to train.
        load_network: loads an EfficientNet-Lite0 for the perceptual loss.
    """
    if distributed.world_size() > 1:
        raise ConfigError(
            f"got {distributed.world_size()} processes, but a tokenizer is trained by one; start it without torchrun"
        )
    config = config.resolved()
    check_same_run(config, folder)
    source, held_out = hold_out(config.data, load_held_out(folder))
    efficientnet = load_network() if config.perceptual else None
    torch.manual_seed(make_generator(config.seed).initial_seed())
    objective: Objective = OBJECTIVES[config.kind]
    module = objective.make(config)
    if not RunState(folder).states():
        transform = Transform(config.size, config.channels_in, config.upright)
        objective.fit(module, in_order(subset(source, STATS_IMAGES), transform))
    run = TokenizerRun(config, folder, source, held_out, module, device, efficientnet)
    run.moved_from = moved_from(config, folder)
    run.resume()
    save_config(config, folder)
    save_held_out(folder, source)
    return run


# ---- evaluation and export


def train_command(config: TokenizerTrainConfig, folder: Path) -> tuple[str, ...]:
    """Return the command that trains a model on a tokenizer's latents."""
    height, width = config.size
    oblong = () if height == width else ("--image-size", str(height), str(width))
    return ("mar", "train", "folder", "--data", config.data, "--tokenizer", str(folder), *oblong)


def ema_tokenizer(run: TokenizerRun) -> Tokenizer:
    """Copy the current EMA weights to a tokenizer without statistics."""
    return run.objective.tokenizer(copy.deepcopy(run.ema.model)).to(run.device)


def evaluate_reconstruction(run: TokenizerRun, log: Log, tokenizer: Tokenizer | None = None) -> RoundTrip:
    """Measure the PSNR of held-out images, and save a grid of some.

    By default the tokenizer has the EMA weights. If no image can be read, the log says so, and nothing else is written.
    """
    tokenizer = tokenizer or ema_tokenizer(run)
    result = round_trip(tokenizer, in_order(subset(run.held_out, EVAL_IMAGES), run.transform))
    if not result.images:
        log.note("warning: none of the held-out pictures can be read: no PSNR is measured")
        return result
    path = run.folder / "samples" / f"{run.progress.images:012d}.png"
    for images in in_order(subset(run.held_out, GRID_IMAGES), run.transform):  # one batch; none if all are unreadable
        grid = reconstruction_grid(tokenizer, images)
        save_sheet(path, grid, log)
        log.write_image(run.progress.images, "reconstructions", grid)
    log.write(run.progress.images, psnr=result.psnr)
    log.note(f"PSNR {result.psnr:.2f} dB on {result.images:,} held-out pictures; see {path}")
    return result


class Evaluation:
    """Callback: evaluates a run, and ends it where the PSNR has stopped rising.

    The run ends after `patience` evaluations without a rise. Those in its first part do not count: there the PSNR may
    fall, since the noise rises, and the averaged weights follow later. PSNRs after the state that a run resumes from
    are dropped: they will be measured again.

    Args:
        run: ended by its `should_stop`.
        log: gets the PSNR, and a message when the run ends.
    """

    def __init__(self, run: TokenizerRun, log: Log) -> None:
        self.run, self.log = run, log
        self.patience = run.config.resolved().patience
        saved = read_history(run.folder / HISTORY_FILE, _PSNRS)
        self.psnrs = {images: psnr for images, psnr in saved.items() if images <= run.progress.images}
        self._stop_if_due()

    def __call__(self, run: TokenizerRun) -> None:
        """Evaluate the run."""
        result = evaluate_reconstruction(run, self.log)
        if not result.images:
            return
        self.psnrs[run.progress.images] = result.psnr
        write_history(run.folder / HISTORY_FILE, _PSNRS, self.psnrs)
        self._stop_if_due()

    def _stop_if_due(self) -> None:
        psnrs = self._counted()
        if self.run.should_stop or not self.patience or len(psnrs) <= self.patience:
            return
        before, last = max(psnrs[: -self.patience]), max(psnrs[-self.patience :])
        if last < before + MIN_RISE:
            self.run.should_stop = True
            self.log.note(
                f"the PSNR of held-out pictures has not risen from {before:.2f} dB for {self.patience} evaluations, "
                "and its training ends; `mar tokenizer train` with a larger --patience goes on"
            )

    def _counted(self) -> list[float]:
        """Return the PSNRs since the noise has risen, and since their lowest in the first half of the training."""
        length = self.run.config.images
        risen = [images for images in sorted(self.psnrs) if images >= NOISE_RISE * length]
        early = [images for images in risen if images <= length / 2]
        lowest = min(early, key=self.psnrs.__getitem__, default=0)
        return [self.psnrs[images] for images in risen if images >= lowest]


def reconstruction_grid(tokenizer: Tokenizer, images: Float[Tensor, "n c h w"]) -> Image.Image:
    """Draw images in the upper row, reconstructions in the lower one."""
    return image_grid([*to_pil(images), *to_pil(reconstruct(tokenizer, images).cpu())], len(images))


def export_tokenizer(run: TokenizerRun, log: Log) -> tuple[Tokenizer, RoundTrip]:
    """Measure the EMA tokenizer's statistics, evaluate it, and write it."""
    tokenizer = ema_tokenizer(run)
    run.objective.set_statistics(tokenizer, in_order(subset(run.source, STATS_IMAGES), run.transform))
    result = evaluate_reconstruction(run, log, tokenizer)
    save_tokenizer(tokenizer, run.folder)
    return tokenizer, result

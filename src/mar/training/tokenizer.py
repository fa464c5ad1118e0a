"""What a tokenizer's reconstruction may be judged by beside its pixels: features of a network, and a discriminator.

A tokenizer of one's own: diffusers' AutoencoderKL, learned from pictures by the loop that trains models.

A run is a folder: state-* (to go on from), run.json, log.jsonl, tensorboard/, samples/ (held-out pictures above, what
came back of them below); at the end config.json, the averaged weights and their statistics, so that the folder is a
tokenizer (`mar.checkpoint.tokenizers.load_tokenizer`).
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn import functional

from mar import distributed
from mar.checkpoint.run_state import RunState
from mar.checkpoint.tokenizers import save_tokenizer
from mar.config import ConfigError, to_dict
from mar.config.tokenizer import TokenizerTrainConfig
from mar.data.images import Source, Transform, image_grid
from mar.data.loader import Batch, ImageBatch, batches, in_order
from mar.data.splits import hold_out, load_held_out, save_held_out, subset
from mar.pipeline import to_pil
from mar.random import make_generator
from mar.tokenizer.base import Posterior, RoundTrip, measure_latents, reconstruct, round_trip
from mar.tokenizer.kl import KLTokenizer, from_config
from mar.training.ema import EMA
from mar.training.log import Log
from mar.training.optim import ready_adamw
from mar.training.run import check_same, keep_settings
from mar.training.trainer import Callback, Progress, autocast, optimizer_step, posterior_noise

TAPS = (0, 2, 4, 10)
"""Blocks of EfficientNet-Lite0 after which features are compared: the last of each size of map, from 1/2 to 1/16."""
SMALLEST = 64
"""Pixels of the short side that smaller pictures are enlarged to."""
_EPSILON = 1e-10


class PerceptualDistance(nn.Module):
    """Distances between features of EfficientNet-Lite0, in the manner of LPIPS, without its learned weights.

    Zhang et al. (arXiv 1801.03924), equation 1 with all weights the same: features of unit length at each place, their
    squared differences summed over channels and averaged over places and taps. Gradients reach the pictures; the
    network learns nothing.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)

    def forward(self, images: Float[Tensor, "n c h w"], others: Float[Tensor, "n c h w"]) -> Float[Tensor, ""]:
        """The mean distance of pairs of pictures in [-1, 1]; grey ones are repeated."""
        both = zip(self._features(images), self._features(others), strict=True)
        distances = [(a - b).square().sum(1).mean() for a, b in both]
        return torch.stack(distances).mean()

    def _features(self, images: Tensor) -> list[Tensor]:
        x = (127.5 * images.expand(-1, 3, -1, -1) + 0.5) / 128  # pixels as the network was trained: (x - 127) / 128
        short = min(x.shape[2:])
        if short < SMALLEST:
            x = functional.interpolate(x, scale_factor=SMALLEST / short, mode="bilinear", align_corners=False)
        network, found = self.network, []
        x = network._swish(network._bn0(network._conv_stem(x)))
        for number, block in enumerate(network._blocks[: TAPS[-1] + 1]):
            x = block(x)
            if number in TAPS:
                found.append(x * (x.square().sum(1, keepdim=True) + _EPSILON).rsqrt())
        return found


class PatchDiscriminator(nn.Module):
    """Says of each patch of a picture how real it looks (Isola et al., arXiv 1611.07004, section 3.2.2)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width)
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for before, after in itertools.pairwise(widths):
            stride = 2 if after == widths[1] else 1
            layers += [nn.Conv2d(before, after, 4, stride, 1), nn.GroupNorm(8, after), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 1 p q"]:
        """A number for each patch: high where it looks real."""
        return self.layers(images)


def hinge(real: Float[Tensor, "n 1 p q"], fake: Float[Tensor, "n 1 p q"]) -> Float[Tensor, ""]:
    """The discriminator's loss: nothing to learn from patches judged beyond 1 and -1 (Lim and Ye, arXiv 1705.02894)."""
    return 0.5 * (functional.relu(1 - real).mean() + functional.relu(1 + fake).mean())


def balance(loss: Float[Tensor, ""], adversarial: Float[Tensor, ""], last: Tensor) -> Float[Tensor, ""]:
    """The factor that makes both losses pull equally hard at the decoder's `last` weights, at most 10^4.

    Esser et al., "Taming transformers" (arXiv 2012.09841), equation 7.
    """
    (one,) = torch.autograd.grad(loss, last, retain_graph=True)
    (other,) = torch.autograd.grad(adversarial, last, retain_graph=True)
    return (one.norm() / (other.norm() + 1e-4)).clamp(max=1e4).detach()


JUDGED = 1000
"""Held-out pictures, at most, that a PSNR is of."""
MEASURED = 10_000
"""Training pictures, at most, that statistics are of."""
SHOWN = 8
"""Held-out pictures of a sheet."""


def architecture(config: TokenizerTrainConfig) -> dict[str, Any]:
    """The autoencoder in diffusers' terms."""
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


@dataclass
class TokenizerRun:
    """The training of one tokenizer: its parts, and its state as one dict. One process."""

    config: TokenizerTrainConfig
    folder: Path
    source: Source
    held_out: Source
    tokenizer: KLTokenizer
    device: torch.device
    network: Any = None
    """An EfficientNet-Lite0, where distances between its features are part of the loss."""
    progress: Progress = field(default_factory=Progress)
    hooks: list[Callback] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = self.config
        self.model = self.tokenizer.to(self.device).autoencoder.train()
        self.ema = EMA(self.model, config.ema)
        self.optimizers: tuple[torch.optim.Optimizer, ...] = (self._optimizer(self.model),)
        self.store = RunState(self.folder, to_dict(config))
        self.perceptual = None if self.network is None else PerceptualDistance(self.network.to(self.device))
        self.critic: PatchDiscriminator | None = None
        self.critic_from = config.adversarial_from
        """Images seen from which on it takes part: once it has begun, it stays, also where the run is made longer."""
        if config.adversarial:
            self.critic = PatchDiscriminator(config.channels_in, config.width).to(self.device)
            self.critic_optimizer = self._optimizer(self.critic)

    def _optimizer(self, module: nn.Module) -> torch.optim.AdamW:
        groups = [{"params": list(module.parameters()), "weight_decay": 0.0}]
        return ready_adamw(groups, self.config.scaled_lr, (self.config.beta1, self.config.beta2))

    def state_dict(self) -> dict[str, Any]:
        """Everything that the run needs to go on."""
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict(),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizers),
            "progress": vars(self.progress).copy(),
        }
        if self.critic is not None:
            state["critic"] = self.critic.state_dict()
            state["critic_optimizer"] = get_optimizer_state_dict(self.critic, self.critic_optimizer)
        return state

    def resume(self) -> bool:
        """Goes on from the folder's latest state; False where there is none."""
        state = self.state_dict()
        if not self.store.load(state):
            return False
        self.model.load_state_dict(state["model"])
        self.ema.model.load_state_dict(state["ema"])
        set_optimizer_state_dict(self.model, self.optimizers, state["optimizer"])
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])
            set_optimizer_state_dict(self.critic, self.critic_optimizer, state["critic_optimizer"])
        self.progress = Progress.resumed(self.folder, state["progress"])
        if self.critic is not None and any(each["step"] > 0 for each in self.critic_optimizer.state.values()):
            self.critic_from = min(self.critic_from, self.progress.images)
        return True

    def save(self) -> None:
        """Stores the state."""
        self.store.save(self.progress.images, self.state_dict(), self.config.keep)

    @property
    def transform(self) -> Transform:
        """What is done to pictures first."""
        return Transform(self.config.size, self.config.channels_in)

    @property
    def finished(self) -> bool:
        """Whether it has come to its end."""
        return self.progress.images >= self.config.images

    def batches(self) -> Iterator[Batch]:
        """Training pictures, from where the run has come to."""
        config = self.config
        return batches(
            self.source, self.transform, batch=config.batch, seed=config.seed, start=self.progress.images,
            workers=config.workers, flip=config.flip,
        )  # fmt: skip

    def step(self, batch: Batch) -> tuple[float, float]:
        """One step of the autoencoder, and of the discriminator once it takes part. Returns the loss and the norm."""
        assert isinstance(batch, ImageBatch)
        images = batch.images.to(self.device)
        self.model.zero_grad(set_to_none=True)
        with autocast(self.device, self.config.precision):
            back, divergence = self._there_and_back(images, batch.positions)
            terms = {"l1": (images - back).abs().mean(), "kl": divergence}
            loss = terms["l1"] + self.config.kl * divergence
            if self.perceptual is not None:
                terms["perceptual"] = self.perceptual(images, back)
                loss = loss + self.config.perceptual * terms["perceptual"]
            critic = self.critic if self.progress.images >= self.critic_from else None
            total = loss
            if critic is not None:
                terms["adversarial"] = -critic(back).mean()
                factor = balance(loss, terms["adversarial"], self.model.decoder.conv_out.weight)
                total = loss + self.config.adversarial * factor * terms["adversarial"]
        total.backward()
        norm = optimizer_step(self)
        if critic is not None and math.isfinite(norm):
            terms["critic"] = self._teach(critic, images, back.detach())
        self.parts = {name: term.item() for name, term in terms.items()}
        return loss.item(), norm

    def _there_and_back(self, images: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """images -> what comes back by a latent drawn from the posterior, and that one's divergence from a standard
        normal, summed over a picture's latents (Kingma and Welling, arXiv 1312.6114, appendix B)."""
        found = self.model.encode(images).latent_dist
        mean, logvar = found.mean.float(), found.logvar.float()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
        latents = Posterior(mean, torch.exp(0.5 * logvar)).sample(posterior_noise(mean, self.config.seed, positions))
        return self.model.decode(latents).sample.float(), divergence

    def _teach(self, critic: PatchDiscriminator, images: Tensor, back: Tensor) -> Tensor:
        """One step of the discriminator, at the autoencoder's learning rate."""
        self.critic_optimizer.param_groups[0]["lr"] = self.optimizers[0].param_groups[0]["lr"]
        critic.zero_grad(set_to_none=True)
        with autocast(self.device, self.config.precision):
            loss = hinge(critic(images), critic(back))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(critic.parameters(), self.config.clip)
        if norm.isfinite():
            self.critic_optimizer.step()
        return loss.detach()


def open_tokenizer_run(
    config: TokenizerTrainConfig, folder: Path, *, device: torch.device, load_network: Callable[[], Any]
) -> TokenizerRun:
    """The run of `config` in `folder`, resumed where it has saved states; `load_network` gives the EfficientNet-Lite0
    where features are compared.

    ConfigError where the folder holds another run, or several processes were started; ValueError without pictures.
    """
    if distributed.world_size() > 1:
        raise ConfigError(
            f"got {distributed.world_size()} processes, but a tokenizer is trained by one; start it without"
        )
    check_same(config, folder)
    source, held_out = hold_out(config.data, load_held_out(folder))
    network = load_network() if config.perceptual else None
    torch.manual_seed(make_generator(config.seed).initial_seed())
    tokenizer = from_config(architecture(config))
    run = TokenizerRun(config, folder, source, held_out, tokenizer, device, network)
    run.resume()
    keep_settings(config, folder)
    save_held_out(folder, source)
    return run


def averaged(run: TokenizerRun) -> KLTokenizer:
    """The tokenizer of the averaged weights as they are now, without statistics."""
    return KLTokenizer(copy.deepcopy(run.ema.model)).to(run.device)


def evaluate_reconstruction(run: TokenizerRun, log: Log, tokenizer: KLTokenizer | None = None) -> RoundTrip:
    """The PSNR of held-out pictures, by the averaged weights; and a sheet of some of them, with what came back."""
    tokenizer = tokenizer or averaged(run)
    found = round_trip(tokenizer, in_order(subset(run.held_out, JUDGED), run.transform))
    path = run.folder / "samples" / f"{run.progress.images:012d}.png"
    for images in in_order(subset(run.held_out, SHOWN), run.transform):  # one batch, or none where none can be read
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn = sheet(tokenizer, images)
        drawn.save(path)
        log.picture(run.progress.images, "reconstructions", drawn)
    log.write(run.progress.images, psnr=found.psnr)
    log.note(f"PSNR {found.psnr:.2f} dB on {found.images:,} held-out pictures; see {path}")
    return found


def sheet(tokenizer: KLTokenizer, images: Float[Tensor, "n c h w"]) -> Image.Image:
    """Pictures in the upper row, what came back of them in the lower one."""
    return image_grid([*to_pil(images), *to_pil(reconstruct(tokenizer, images).cpu())], len(images))


def finish(run: TokenizerRun, log: Log) -> tuple[KLTokenizer, RoundTrip]:
    """Measures the averaged weights' statistics on the training pictures, judges them, and writes the tokenizer."""
    tokenizer = averaged(run)
    statistics = measure_latents(tokenizer, in_order(subset(run.source, MEASURED), run.transform), per_channel=True)
    tokenizer.set_statistics(statistics.mean, statistics.std)
    found = evaluate_reconstruction(run, log, tokenizer)
    save_tokenizer(tokenizer, run.folder)
    return tokenizer, found

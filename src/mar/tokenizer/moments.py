"""What a tokenizer says of a picture before anything is drawn or scaled: what a latent cache keeps.

Raw moments do not know the tokenizer's mean and standard deviation, so that a cache outlives measuring them anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mar.tokenizer.base import Posterior, Tokenizer
from mar.tokenizer.statistics import Statistics

# What changes an autoencoder's arithmetic and does not show in its weights. The rest of diffusers' config is left out:
# a newer version that notes more in it would make every cache another tokenizer's.
_ARITHMETIC = ("down_block_types", "up_block_types", "act_fn", "norm_num_groups")


@dataclass(frozen=True)
class LatentMoments:
    """Mean and log-variance of raw latents, float32."""

    mean: Float[Tensor, "n c h w"]
    logvar: Float[Tensor, "n c h w"] | None
    """None for a deterministic tokenizer."""

    def to(self, device: torch.device) -> LatentMoments:
        """The same on another device."""
        return LatentMoments(self.mean.to(device), None if self.logvar is None else self.logvar.to(device))


def unscaled_moments(tokenizer: Tokenizer, images: Float[Tensor, "n k H W"]) -> LatentMoments:
    """images in [-1, 1] -> moments of what `tokenizer.encode` makes of them: of the raw latents where its mean is 0
    and its standard deviation 1."""
    posterior = tokenizer.encode(images)
    mean = posterior.mean.float()
    return LatentMoments(mean, None if tokenizer.deterministic else 2 * posterior.std.float().log())


def to_posterior(tokenizer: Tokenizer, moments: LatentMoments) -> Posterior:
    """raw moments -> posterior of the normalised latents, as `tokenizer.encode` gives it for the pictures."""
    mean = tokenizer.normalise(moments.mean)
    if moments.logvar is None:
        return Posterior(mean, torch.zeros_like(mean))
    return Posterior(mean, torch.exp(0.5 * moments.logvar) / tokenizer.std.view(-1, 1, 1))


def measure_moments(batches: Iterable[LatentMoments]) -> Statistics:
    """The statistics that `mar.tokenizer.statistics.measure` finds on the pictures, from their raw moments: one number
    each. Raises ValueError without any."""
    first = second = 0.0
    values = images = 0
    for moments in batches:
        mean = moments.mean.double()
        first += float(mean.sum())
        second += float(mean.square().sum())
        second += 0.0 if moments.logvar is None else float(moments.logvar.double().exp().sum())
        values += mean.numel()
        images += len(mean)
    if not images:
        raise ValueError("tokenizer statistics: there are no latents to measure")
    mean_of_all = first / values
    return Statistics((mean_of_all,), (max(second / values - mean_of_all**2, 0.0) ** 0.5,), images)


def fingerprint(tokenizer: Tokenizer, without: Iterable[str] = ("mean", "std")) -> str:
    """sha256, in hex, of all that raw moments depend on: the tokenizer's kind and weights, not its statistics.

    `without`: tensors that are left out.
    """
    left_out = {*without}
    spec = {name: value for name, value in tokenizer.spec().items() if name not in ("measured", "per_channel")}
    if "config" in spec:
        spec["config"] = {name: spec["config"].get(name) for name in _ARITHMETIC}
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode())
    for name, tensor in sorted(tokenizer.state_dict().items()):
        if name not in left_out:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()

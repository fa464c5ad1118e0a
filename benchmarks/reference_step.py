"""A training step as the reference computes it, to compare with ours: the same networks, the same loss.

It is written from its description, not copied, and differs from ours in these points:

- A boolean mask selects the visible tokens.
- The head runs on all tokens, masked or not, and the mean is masked afterwards.
- Timesteps, conditions and their SiLU are computed for every row and layer.
- Attention with dropout is PyTorch's unfused one, AdamW its default.
- The EMA is updated tensor by tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from mar.config import ModelConfig, TrainConfig, TrunkConfig
from mar.diffusion import gaussian
from mar.diffusion.gaussian import Coefficients
from mar.diffusion.head import MAX_PERIOD, NUM_FREQUENCIES
from mar.diffusion.schedule import cosine
from mar.model.masking import draw_mask_ratio, masked_count
from mar.model.tokens import patchify
from mar.random import make_generator
from mar.training.optim import decays

EPS = 1e-6


class Block(nn.Module):
    """A block of a vision transformer."""

    def __init__(self, trunk: TrunkConfig, attention_dropout: float, dropout: float) -> None:
        super().__init__()
        width, hidden = trunk.width, int(trunk.width * trunk.mlp_ratio)
        self.num_heads, self.attention_dropout = trunk.num_heads, attention_dropout
        self.norm1, self.norm2 = nn.LayerNorm(width, EPS), nn.LayerNorm(width, EPS)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        drop = nn.Dropout(dropout)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), drop, nn.Linear(hidden, width), drop)
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        n, s, e = x.shape
        q, k, v = (
            self.qkv(self.norm1(x))
            .reshape(n, s, 3, self.num_heads, e // self.num_heads)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        attended = functional.scaled_dot_product_attention(q, k, v, dropout_p=self.attention_dropout)
        x = x + self.drop(self.out(attended.transpose(1, 2).reshape(n, s, e)))
        return x + self.mlp(self.norm2(x))


class HeadBlock(nn.Module):
    """A residual block of the head, with its own modulations."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition).chunk(3, dim=-1)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


class Head(nn.Module):
    """Rows of noisy tokens, timesteps and conditions -> predictions."""

    weight_decay = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, values = config.head.width, config.token_width
        self.time = nn.Sequential(nn.Linear(NUM_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.condition = nn.Linear(config.decoder.width, width)
        self.input = nn.Linear(values, width)
        self.blocks = nn.ModuleList(HeadBlock(width) for _ in range(config.head.depth))
        self.norm = nn.LayerNorm(width, EPS, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.output = nn.Linear(width, 2 * values)

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        half = NUM_FREQUENCIES // 2
        angles = t[:, None].float() * torch.exp(-torch.log(torch.tensor(MAX_PERIOD)) * torch.arange(half) / half)
        condition = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1)) + self.condition(z)
        x = self.input(x)
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        return self.output(self.norm(x) * (1 + scale) + shift)


class Reference(nn.Module):
    """Latents and labels -> the loss."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        e, f, length, buffer = config.encoder.width, config.decoder.width, config.tokens, config.buffer_size
        dropouts = (config.attention_dropout, config.projection_dropout)
        self.classes, self.null = nn.Embedding(config.classes, e), nn.Parameter(torch.zeros(1, e))
        self.tokens, self.embed = nn.Linear(config.token_width, e), nn.Linear(e, f)
        self.encoder_position = nn.Parameter(0.02 * torch.randn(1, buffer + length, e))
        self.decoder_position = nn.Parameter(0.02 * torch.randn(1, buffer + length, f))
        self.diffusion_position = nn.Parameter(0.02 * torch.randn(1, length, f))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, f))
        self.encoder = nn.ModuleList(Block(config.encoder, *dropouts) for _ in range(config.encoder.depth))
        self.decoder = nn.ModuleList(Block(config.decoder, *dropouts) for _ in range(config.decoder.depth))
        self.first, self.encoded, self.decoded = nn.LayerNorm(e, EPS), nn.LayerNorm(e, EPS), nn.LayerNorm(f, EPS)
        self.head = Head(config)
        table = Coefficients.table(cosine(config.head.diffusion_steps)).float()
        self.register_buffer("table", table, persistent=False)

    def forward(self, latents: Tensor, labels: Tensor, masked: int) -> Tensor:
        tokens = patchify(latents, self.config.patch_size)
        mask = self.draw_mask(len(tokens), masked)
        return self.head_loss(tokens, self.trunk(tokens, self.embed_labels(labels), mask), mask)

    def draw_mask(self, images: int, masked: int) -> Tensor:
        positions = torch.rand(images, self.config.tokens).argsort(1)[:, :masked]
        return torch.zeros(images, self.config.tokens).scatter_(1, positions, 1.0)

    def embed_labels(self, labels: Tensor) -> Tensor:
        dropped = (torch.rand(len(labels), 1) < self.config.label_drop).float()
        return dropped * self.null + (1 - dropped) * self.classes(labels)

    def trunk(self, tokens: Tensor, classes: Tensor, mask: Tensor) -> Tensor:
        n, buffer = len(tokens), self.config.buffer_size
        x = torch.cat([torch.zeros(n, buffer, classes.shape[-1]), self.tokens(tokens)], dim=1)
        with_buffer = torch.cat([torch.zeros(n, buffer), mask], dim=1)
        x[:, :buffer] = classes[:, None]
        x = self.first(x + self.encoder_position)
        visible = (1 - with_buffer).nonzero(as_tuple=True)
        x = x[visible].reshape(n, -1, x.shape[-1])
        for block in self.encoder:
            x = block(x)
        x = self.embed(self.encoded(x))
        full = self.mask_token.repeat(n, with_buffer.shape[1], 1).to(x.dtype)
        full[visible] = x.reshape(-1, x.shape[-1])
        x = full + self.decoder_position
        for block in self.decoder:
            x = block(x)
        return self.decoded(x)[:, buffer:] + self.diffusion_position

    def head_loss(self, tokens: Tensor, z: Tensor, mask: Tensor) -> Tensor:
        head = self.config.head
        x0, z, mask = (a.flatten(0, 1).repeat(head.batch_mul, *[1] * (a.ndim - 2)) for a in (tokens, z, mask))
        t, noise = torch.randint(head.diffusion_steps, (len(x0),)), torch.randn_like(x0)
        c = Coefficients.at(self.table, t)
        x = gaussian.q_sample(x0, noise, c)
        losses = gaussian.diffusion_loss(self.head(x, t, z), x0, x, noise, t == 0, c, head.prediction)
        return (losses * mask).sum() / mask.sum()


class ReferenceStep:
    """The model with its optimizer and EMA."""

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.model = config, Reference(config.model).train()
        named = [*self.model.named_parameters()]
        groups = [
            {
                "params": [p for name, p in named if decays(self.model, name, p) == decay],
                "weight_decay": decay * config.weight_decay,
            }
            for decay in (False, True)
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.scaled_lr, betas=(config.beta1, config.beta2))
        self.average = [p.detach().clone() for p in self.model.parameters()]

    def __call__(self, latents: Tensor, labels: Tensor, step: int) -> float:
        model, config = self.model, self.config
        ratio = draw_mask_ratio(config.model.mask_ratio_min, make_generator(config.seed, step))
        loss = model(latents, labels, masked_count(config.model.tokens, ratio))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.update_average()
        return loss.item()

    def update_average(self) -> None:
        rate = self.config.ema
        for average, p in zip(self.average, self.model.parameters(), strict=True):
            average.mul_(rate).add_(p.detach(), alpha=1 - rate)

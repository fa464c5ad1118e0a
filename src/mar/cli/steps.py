"""What `mar train folder` does before it trains a model: its tokenizer, and the latents of all pictures. Each goes on
where it stopped, and is left out where it is finished."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from mar import distributed
from mar.autoconfig.sizes import DatasetSummary
from mar.autoconfig.summary import save_summary
from mar.checkpoint.tokenizers import STATISTICS_FILE
from mar.cli.alone import run_on_rank0
from mar.cli.cache import CacheOptions, make_cache
from mar.cli.tokenizer import TokenizerTrainOptions, train_tokenizer
from mar.cli.train import TrainOptions
from mar.config import ConfigError, TrainConfig
from mar.config.tokenizer import TokenizerTrainConfig
from mar.data.latent_cache import INDEX
from mar.training.preflight import estimate
from mar.training.run import check_same, saved_settings


@dataclass(frozen=True)
class FolderPlan:
    """What is to be done; what is None needs not be."""

    train: TrainOptions
    recipe: TrainConfig
    """What was chosen, before options changed it."""
    told: tuple[str, ...]
    """What was chosen, and why, in words."""
    pictures: DatasetSummary | None = None
    """What the choices follow from, to be remembered."""
    tokenizer: TokenizerTrainOptions | None = None
    cache: CacheOptions | None = None


def prepare(steps: FolderPlan) -> int:
    """Does what comes before the model is trained, with all processes. Returns the exit code: 130 where a signal
    stopped it."""
    assert steps.train.out is not None
    with distributed.collective_errors():
        check_same(steps.train.config, steps.train.out)
        estimate(steps.train.config, distributed.world_size()).check_disk(steps.train.out)
        trained = steps.tokenizer is None or _is_trained(steps.tokenizer)
        if distributed.rank() == 0:
            for line in steps.told:
                print(line, file=sys.stderr)
            if steps.pictures is not None:
                save_summary(steps.train.out, steps.pictures)
    if steps.tokenizer is not None and not trained:
        _say(f"first, the tokenizer: {steps.tokenizer.out}")
        if code := run_on_rank0(train_tokenizer, steps.tokenizer):
            return code
    if steps.cache is not None:
        assert steps.cache.out is not None
        if not (steps.cache.out / INDEX).is_file():
            _say(f"then the latents of all pictures: {steps.cache.out}")
            if code := make_cache(steps.cache):
                return code
        _say(f"then the model: {steps.train.out}")
    return 0


def _say(text: str) -> None:
    if distributed.rank() == 0:
        print(text, file=sys.stderr)


def _is_trained(options: TokenizerTrainOptions) -> bool:
    """Whether the tokenizer is finished; ConfigError where another one is."""
    if not (options.out / STATISTICS_FILE).is_file():
        return False
    check_same(options.config, options.out)
    saved = saved_settings(TokenizerTrainConfig, options.out)
    if saved is not None and saved.images != options.config.images:
        raise ConfigError(
            f"{options.out} is finished: it has seen {saved.images:,} pictures, not {options.config.images:,}; "
            "leave out --vae.images, or take another --out"
        )
    return True

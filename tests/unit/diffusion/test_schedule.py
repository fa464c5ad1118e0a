"""What the noise schedule promises beyond the golden numbers of four of its lengths."""

from __future__ import annotations

import math

import pytest
import torch

from mar.config import TimestepSpacing
from mar.diffusion.gaussian import Coefficients
from mar.diffusion.schedule import MAX_BETA, cosine, linear, respace

FULL = cosine(1000)


def test_cosine_alpha_bar_is_right_until_the_cap() -> None:
    t = torch.arange(1, 1000, dtype=torch.float64) / 1000
    f = ((t + 0.008) / 1.008 * math.pi / 2).cos().square() / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(FULL.alphas_cumprod[:-1], f, rtol=1e-9, atol=0)
    assert FULL.betas[-1] == MAX_BETA
    assert (FULL.betas[:-1] < MAX_BETA).all()


def test_linear_schedule_mixes_evenly() -> None:
    """Signal and noise in the ratio (1 - u) : u."""
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    alphas = linear(1000).alphas_cumprod
    torch.testing.assert_close((alphas / (1 - alphas)).sqrt(), (1 - u) / u, rtol=1e-9, atol=0)
    assert linear(1000).betas.min() > 0
    assert linear(1000).betas.max() < 1


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50, 999, 1000])
def test_respace_keeps_alpha_bar(steps: int) -> None:
    short = respace(FULL, steps)
    assert len(short) == len(set(short.timesteps.tolist())) == steps
    assert int(short.timesteps[-1]) == 999  # it starts where the noise is all there is
    assert int(short.timesteps[0]) == (0 if steps > 1 else 999)
    torch.testing.assert_close(short.alphas_cumprod, FULL.alphas_cumprod[short.timesteps], rtol=1e-12, atol=1e-16)
    assert short.betas.dtype == torch.float64


def test_respace_to_all_steps_changes_nothing() -> None:
    torch.testing.assert_close(respace(FULL, 1000).betas, FULL.betas, rtol=1e-10, atol=0)


def test_respace_timesteps_are_trained_ones() -> None:
    assert respace(respace(FULL, 100), 10).timesteps.tolist() == respace(FULL, 100).timesteps[
        [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]
    ].tolist()  # fmt: skip


@pytest.mark.parametrize("spacing", ["time", "log-snr"])
@pytest.mark.parametrize("noisiest", [1.0, 0.95, 0.5])
@pytest.mark.parametrize("steps", [1, 2, 5, 40, 300])
def test_respace_covers_cleanest_to_start_t(spacing: TimestepSpacing, noisiest: float, steps: int) -> None:
    short = respace(FULL, steps, spacing, noisiest)
    assert int(short.timesteps[-1]) == round(noisiest * 999)
    assert int(short.timesteps[0]) == 0 or steps == 1
    assert (short.timesteps.diff() > 0).all()  # none twice, where even steps fall between timesteps too
    assert len(short) == steps
    torch.testing.assert_close(short.alphas_cumprod, FULL.alphas_cumprod[short.timesteps], rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("steps", [3, 6, 9])
def test_respace_by_log_snr_is_even(steps: int) -> None:
    short = respace(FULL, steps, "log-snr", 0.95)
    lam = 0.5 * (short.alphas_cumprod / (1 - short.alphas_cumprod)).log()
    torch.testing.assert_close(short.log_snr, lam, rtol=1e-9, atol=1e-12)
    assert (lam.diff() / lam.diff().mean() - 1).abs().max() < 0.3
    by_time = respace(FULL, steps, "time", 0.95).log_snr
    assert by_time.diff().abs().max() > 1.3 * lam.diff().abs().max()


def test_respace_to_too_many_steps_is_refused() -> None:
    assert len(respace(FULL, 500, "log-snr", 0.4995)) == 500
    available = "the training schedule's 1000 timesteps up to start_t 0.4995"
    with pytest.raises(ValueError, match=f"got 501, expected 1 to 500, {available}"):
        respace(FULL, 501, "log-snr", 0.4995)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_respace_to_an_invalid_length_is_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"got {steps}, expected 1 to 1000"):
        respace(FULL, steps)


@pytest.mark.parametrize("steps", [1, 2, 25, 1000])
def test_posterior_coefficients_follow_bayes(steps: int) -> None:
    """q(x_{t-1} | x_t, x_0) is the product of q(x_{t-1} | x_0) and q(x_t | x_{t-1}), precisions adding."""
    s = respace(FULL, steps)
    prior, beta, alpha = 1 - s.alphas_cumprod_prev, s.betas, 1 - s.betas
    precision = 1 / prior[1:] + alpha[1:] / beta[1:]
    torch.testing.assert_close(s.posterior_variance[1:], 1 / precision, rtol=1e-9, atol=0)
    torch.testing.assert_close(
        s.posterior_mean_coef1[1:], s.alphas_cumprod_prev.sqrt()[1:] / prior[1:] / precision, rtol=1e-9, atol=0
    )
    torch.testing.assert_close(s.posterior_mean_coef2[1:], alpha.sqrt()[1:] / beta[1:] / precision, rtol=1e-9, atol=0)
    assert s.posterior_variance[0] == 0  # the last step knows x_0
    assert s.posterior_mean_coef1[0] == pytest.approx(1)
    assert s.posterior_mean_coef2[0] == 0
    assert s.posterior_log_variance.isfinite().all()
    if steps > 1:
        assert s.posterior_log_variance[0] == s.posterior_log_variance[1]


def test_coefficients_follow_their_timesteps() -> None:
    table = Coefficients.table(FULL)
    assert table.shape == (len(Coefficients._fields), 1000)
    t = torch.tensor([3, 999, 3])
    c = Coefficients.at(table, t)
    assert c.sqrt_alphas_cumprod.shape == (3, 1)
    torch.testing.assert_close(
        c.sqrt_alphas_cumprod**2 + c.sqrt_one_minus_alphas_cumprod**2, torch.ones(3, 1, dtype=torch.float64)
    )
    torch.testing.assert_close(
        c.sqrt_recip_alphas_cumprod * c.sqrt_alphas_cumprod, torch.ones(3, 1, dtype=torch.float64)
    )
    torch.testing.assert_close(c.sqrt_recipm1_alphas_cumprod * c.sqrt_alphas_cumprod, c.sqrt_one_minus_alphas_cumprod)
    assert torch.equal(c.log_beta[:, 0], FULL.betas.log()[t])
    assert torch.equal(c.posterior_log_variance[:, 0], FULL.posterior_log_variance[t])

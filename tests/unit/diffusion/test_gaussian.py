"""Forward, reverse and the loss of the diffusion process, against what theory says of them."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import noise
from torch import Tensor

from mar.config import Prediction
from mar.diffusion.gaussian import Coefficients, diffusion_loss, p_mean_variance, predict_x0, q_sample, training_target
from mar.diffusion.schedule import cosine, linear

SCHEDULE = cosine(1000)
TABLE = Coefficients.table(SCHEDULE)
EVERY: list[Prediction] = ["noise", "v", "x0", "flow"]


def drawn(t: Tensor, width: int = 3) -> tuple[Tensor, Tensor, Coefficients, Tensor]:
    """x0, noise, coefficients and x_t of rows at timesteps t, in float64."""
    x0, epsilon = noise(len(t), width).double(), noise(len(t), width, seed=1).double()
    c = Coefficients.at(TABLE, t)
    return x0, epsilon, c, q_sample(x0, epsilon, c)


@pytest.mark.parametrize("prediction", EVERY)
def test_predict_x0_of_a_perfect_prediction_is_clean(prediction: Prediction) -> None:
    t = torch.arange(1000)
    x0, epsilon, c, x = drawn(t)
    output = torch.cat([training_target(x0, epsilon, c, prediction), torch.zeros_like(x0)], -1)
    p = p_mean_variance(output, x, c, prediction)
    torch.testing.assert_close(p.x0, x0, rtol=0, atol=1e-9)
    torch.testing.assert_close(p.mean, c.posterior_mean_coef1 * x0 + c.posterior_mean_coef2 * x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("prediction", ["v", "x0", "flow"])
def test_prediction_types_are_equivalent(prediction: Prediction) -> None:
    _, epsilon, c, x = drawn(torch.tensor([1, 300, 700, 950]))
    wrong = epsilon + 0.1 * noise(4, 3, seed=2).double()
    implied = (
        c.sqrt_recip_alphas_cumprod * x - c.sqrt_recipm1_alphas_cumprod * wrong
    )  # the x0 that goes with the wrong noise
    variance = noise(4, 3, seed=3).double()
    by_noise = p_mean_variance(torch.cat([wrong, variance], -1), x, c, "noise")
    by_other = p_mean_variance(
        torch.cat([training_target(implied, wrong, c, prediction), variance], -1), x, c, prediction
    )
    for one, other in zip(by_noise, by_other, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_flow_prediction_is_the_velocity() -> None:
    """x_u = (1 - u) x0 + u noise, of which x is the one at unit variance: dx_u / du is what is predicted."""
    t = torch.tensor([0, 250, 700, 999])
    x0, epsilon = noise(4, 3).double(), noise(4, 3, seed=1).double()
    c = Coefficients.at(Coefficients.table(linear(1000)), t)
    u = (t.double().unsqueeze(1) + 0.5) / 1000
    scale = ((1 - u).square() + u.square()).sqrt()
    x = q_sample(x0, epsilon, c)
    torch.testing.assert_close(x * scale, (1 - u) * x0 + u * epsilon, rtol=1e-9, atol=1e-9)
    velocity = training_target(x0, epsilon, c, "flow")
    torch.testing.assert_close(x * scale + (1 - u) * velocity, epsilon, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(predict_x0(velocity, x, c, "flow"), x0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", EVERY)
def test_x0_bound_clips_x0_only(prediction: Prediction) -> None:
    _, _, c, x = drawn(torch.tensor([10, 500, 990]))
    output = 5 * noise(3, 6, seed=4).double()
    free, bound = p_mean_variance(output, x, c, prediction), p_mean_variance(output, x, c, prediction, x0_bound=1.5)
    assert (free.x0.abs() > 1.5).any()
    assert torch.equal(bound.x0, free.x0.clamp(-1.5, 1.5))
    torch.testing.assert_close(bound.mean, c.posterior_mean_coef1 * bound.x0 + c.posterior_mean_coef2 * x)
    assert torch.equal(bound.log_variance, free.log_variance)


def test_learned_variance_interpolates_and_extrapolates() -> None:
    _, _, c, x = drawn(torch.tensor([0, 1, 500, 999]), width=2)
    for value, expected in [
        (-1.0, c.posterior_log_variance),
        (1.0, c.log_beta),
        (0.0, (c.posterior_log_variance + c.log_beta) / 2),
        (3.0, 2 * c.log_beta - c.posterior_log_variance),  # the reference does not clamp it
    ]:
        output = torch.cat([torch.zeros_like(x), torch.full_like(x, value)], -1)
        torch.testing.assert_close(p_mean_variance(output, x, c, "noise").log_variance, expected.expand(4, 2))


@pytest.mark.parametrize("prediction", EVERY)
def test_diffusion_loss_is_least_for_the_truth(prediction: Prediction) -> None:
    t = torch.tensor([1, 5, 300, 998])
    x0, epsilon, c, x = drawn(t)
    right = training_target(x0, epsilon, c, prediction)
    posterior = torch.full_like(x0, -1.0)

    def of(predicted: Tensor, variance: Tensor) -> Tensor:
        return diffusion_loss(torch.cat([predicted, variance], -1), x0, x, epsilon, t == 0, c, prediction)

    torch.testing.assert_close(of(right, posterior), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-9)
    assert (of(right, posterior + 0.5)[:2] > 1e-4).all()  # where the two ends of the variance differ
    assert (of(right + 0.1, posterior) >= 0.01 - 1e-12).all()
    assert of(right, posterior).dtype == torch.float64


@pytest.mark.parametrize("prediction", EVERY)
def test_variational_bound_trains_the_variance_only(prediction: Prediction) -> None:
    t = torch.tensor([0, 1, 400, 999])
    x0, epsilon, c, x = drawn(t)
    output = (0.3 * noise(4, 6, seed=5).double()).requires_grad_()
    rows = diffusion_loss(output, x0, x, epsilon, t == 0, c, prediction)
    (gradient,) = torch.autograd.grad(rows.sum(), output)
    predicted, variance = gradient.chunk(2, -1)
    error = output[:, :3].detach() - training_target(x0, epsilon, c, prediction)
    torch.testing.assert_close(predicted, 2 * error / 3)  # that of the mean square alone
    assert (variance[1:] != 0).all()


def test_variational_bound_is_the_kl_in_bits() -> None:
    t = torch.tensor([200])
    x0, epsilon, c, x = drawn(t, width=1)
    output = torch.tensor([[0.4, 0.2]], dtype=torch.float64)
    p = p_mean_variance(output, x, c, "noise")
    q = torch.distributions.Normal(
        c.posterior_mean_coef1 * x0 + c.posterior_mean_coef2 * x,
        (0.5 * torch.as_tensor(c.posterior_log_variance)).exp(),
    )
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(p.mean, (0.5 * p.log_variance).exp()))
    expected = (epsilon - 0.4).square() + kl / math.log(2)
    torch.testing.assert_close(diffusion_loss(output, x0, x, epsilon, t == 0, c, "noise"), expected[0])


@pytest.mark.parametrize("x", [-3.0, -0.9995, -0.5, 0.0, 0.7, 0.9995, 3.0])
def test_variational_bound_first_step_is_a_discrete_likelihood(x: float) -> None:
    """Bins of width 2/255 whose probabilities add up to 1, the outermost without end."""
    t = torch.tensor([0])
    c = Coefficients.at(TABLE, t)
    x0 = torch.tensor([[x]], dtype=torch.float64)
    x1 = q_sample(x0, torch.zeros_like(x0), c)
    output = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
    p = p_mean_variance(output, x1, c, "noise")
    std = (0.5 * p.log_variance).exp()
    normal = torch.distributions.Normal(p.mean, std)
    low = normal.cdf(x0 - 1 / 255) if x >= -0.999 else torch.zeros_like(x0)
    high = normal.cdf(x0 + 1 / 255) if x <= 0.999 else torch.ones_like(x0)
    bits = -(high - low).log() / math.log(2)
    got = diffusion_loss(output, x0, x1, torch.zeros_like(x0), t == 0, c, "noise")
    torch.testing.assert_close(got, bits[0], rtol=0, atol=2e-3)  # the reference's CDF is an approximation


def test_diffusion_loss_rows_are_independent() -> None:
    t = torch.tensor([0, 7, 999])
    x0, epsilon, c, x = drawn(t)
    output = noise(3, 6, seed=6).double()
    together = diffusion_loss(output, x0, x, epsilon, t == 0, c, "v")
    for i in range(3):
        row = slice(i, i + 1)
        own = Coefficients.at(TABLE, t[row])
        alone = diffusion_loss(output[row], x0[row], x[row], epsilon[row], t[row] == 0, own, "v")
        torch.testing.assert_close(alone, together[row], rtol=1e-12, atol=0)

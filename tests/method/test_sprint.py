from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import kstest, norm

from tbcm.method.sprint import adversarial_times, discriminator_loss, student_loss

HALF_PI = math.pi / 2
SIGMA = 0.5


def test_a_share_of_the_times_is_t_max_and_the_rest_logit_normal() -> None:
    generator = torch.Generator().manual_seed(0)
    normal, uniform = torch.randn(8000, generator=generator), torch.rand(8000, generator=generator)
    t = adversarial_times(normal, uniform, HALF_PI, share=0.3, sigma_data=SIGMA, mean=0.2, std=1.6)
    at_max = t == torch.tensor(HALF_PI)
    assert at_max.float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert kstest(torch.log(SIGMA * torch.tan(t[~at_max].double())), norm(0.2, 1.6).cdf).pvalue > 0.01


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_none_or_all_of_the_times_can_be_t_max(share: float) -> None:
    uniform = torch.tensor([0.0, 0.5, 1 - 2**-24])
    t = adversarial_times(torch.zeros(3), uniform, 1.2, share=share, sigma_data=SIGMA, mean=0.2, std=1.6)
    assert (t == torch.tensor(1.2)).all().item() is bool(share)


def test_losses_of_scores_by_hand() -> None:
    real, fake = torch.tensor([[2.0, 0.0], [0.5, -1.0]]), torch.tensor([[-2.0, 0.0], [1.0, -0.5]])
    # max(0, 1 - real): 0, 1, .5, 2; max(0, 1 + fake): 0, 1, 2, .5; a mean of two scores a sample, 4 samples in the step
    assert discriminator_loss(real, fake, 4).item() == pytest.approx(0.5 * (3.5 / 2 + 3.5 / 2) / 4)
    assert student_loss(fake, 4).item() == pytest.approx(1.5 / 2 / 4)


def test_gradients_push_fakes_up_for_the_student_and_both_apart_for_the_discriminator() -> None:
    real, fake = torch.tensor([[0.0, 1.5]], requires_grad=True), torch.tensor([[0.0, -1.5]], requires_grad=True)
    student_loss(fake, 1).backward()
    torch.testing.assert_close(fake.grad, torch.full((1, 2), -0.5))
    fake.grad = None
    discriminator_loss(real, fake, 1).backward()
    torch.testing.assert_close(real.grad, torch.tensor([[-0.25, 0.0]]))  # beyond the margin there is nothing to learn
    torch.testing.assert_close(fake.grad, torch.tensor([[0.25, 0.0]]))

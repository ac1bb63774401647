from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tbcm.evaluation.agreement import relative_errors


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_teacher_agrees_with_itself() -> None:
    x = normal(5, 4, 3, 3)
    assert torch.equal(relative_errors(x, x), torch.zeros(5, dtype=torch.float64))


def test_a_known_perturbation_has_its_known_value() -> None:
    """Teacher samples at -1 and 1 in every element: variance 2 (n - 1 = 1) each. Off by 0.1 and 0.2."""
    teacher = torch.stack([-torch.ones(4, 2, 2), torch.ones(4, 2, 2)])
    student = teacher + torch.tensor([0.1, -0.2]).view(2, 1, 1, 1)
    errors = relative_errors(student, teacher)
    torch.testing.assert_close(errors, torch.tensor([0.01 / 2, 0.04 / 2], dtype=torch.float64), rtol=1e-6, atol=0)


def test_the_mean_image_is_at_one_and_unrelated_samples_at_two() -> None:
    """Exactly (n - 1) / n for the sample mean; 2 within the scatter of 2,000 x 64 elements."""
    teacher, unrelated = 3 * normal(2000, 4, 4, 4) + 1, 3 * normal(2000, 4, 4, 4, seed=1) + 1
    assert relative_errors(teacher.mean(0).expand_as(teacher), teacher).mean().item() == pytest.approx(1999 / 2000)
    assert relative_errors(unrelated, teacher).mean().item() == pytest.approx(2, abs=0.03)


def test_other_shapes_are_refused() -> None:
    for n, m in ((1, 1), (3, 2)):
        with pytest.raises(ValueError, match="n >= 2"):
            relative_errors(normal(n, 1, 2, 2), normal(m, 1, 2, 2))

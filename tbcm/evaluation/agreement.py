"""Agreement with the teacher: how far a student's latents are from those that the teacher's many steps reach from the
same noise. It needs no images and no VAE."""

from __future__ import annotations

from torch import Tensor


def relative_errors(student: Tensor, teacher: Tensor) -> Tensor:
    """|xbar_student - xbar_teacher|^2 / Var of each of n samples [n, C, h, w] from the same noise: [n] float64.

    Var is the teacher's total variance, E |xbar - E xbar|^2, estimated from these n >= 2 samples. So 0 is the teacher
    itself, 1 in the mean is what one image for all would have, and 2 an unrelated sample of the teacher.
    """
    if student.shape != teacher.shape or len(teacher) < 2:
        raise ValueError(f"give [n, C, h, w] each, n >= 2, not {list(student.shape)} and {list(teacher.shape)}")
    x, y = student.double().flatten(1), teacher.double().flatten(1)
    variance = y.var(0).sum()  # unbiased: divides by n - 1
    return (x - y).square().sum(1) / variance

from __future__ import annotations

import pytest
import torch

from tbcm.evaluation.concepts import Classifier


def clouds(count: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """Three clouds of unit width around corners 6 apart, one class ten times as large as the others."""
    generator = torch.Generator().manual_seed(seed)
    labels = ["a"] * (10 * count) + ["b"] * count + ["c"] * count
    centres = {"a": torch.tensor([0.0, 0, 5]), "b": torch.tensor([6.0, 0, 5]), "c": torch.tensor([0.0, 6, 5])}
    points = torch.stack([centres[label] for label in labels])
    return points + torch.randn(points.shape, generator=generator), labels


def test_classes_that_lie_apart_are_told_apart() -> None:
    features, labels = clouds(20, 0)
    classifier = Classifier.fit(features, labels)
    again, expected = clouds(20, 1)
    named = classifier.names(again)
    for label in "abc":
        hits = [name == label for name, truth in zip(named, expected, strict=True) if truth == label]
        assert sum(hits) / len(hits) > 0.95  # 3 standard deviations from the boundary
    assert classifier.names(again) == Classifier.fit(features, labels).names(again)


def test_the_minimum_is_that_of_the_penalised_cross_entropy() -> None:
    features, labels = clouds(5, 0)
    c = Classifier.fit(features, labels, decay=0.1, steps=300)
    weight, bias = c.weight.double().requires_grad_(), c.bias.double().requires_grad_()
    x = ((features - c.mean) / c.std).double()
    total = torch.zeros((), dtype=torch.float64)
    for label, name in enumerate("abc"):
        rows = [i for i, other in enumerate(labels) if other == name]
        total = total - (x[rows] @ weight.T + bias).log_softmax(1)[:, label].mean() / 3
    (total + 0.05 * weight.square().sum()).backward()
    assert weight.grad is not None and weight.grad.abs().max() < 1e-3 and bias.grad is not None
    assert bias.grad.abs().max() < 1e-3


def test_a_feature_that_never_changes_does_no_harm() -> None:
    features, labels = clouds(5, 0)
    features[:, 2] = 1
    assert Classifier.fit(features, labels).names(features[:1]) == ["a"]
    with pytest.raises(RuntimeError):
        Classifier.fit(features, labels).names(features[:, :2])

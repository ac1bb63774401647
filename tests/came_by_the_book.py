"""CAME in fp64, from the paper."""

from __future__ import annotations

import numpy as np


class CameByTheBook:
    """Algorithm 2 of arXiv 2307.02047 for one parameter, letter by letter, in fp64 (with its sums, not means).

    What of the parameter is a matrix is not said there; in NVlabs/Sana (`CAMEWrapper`) it is a weight [n, m] or
    [n, m, 1, 1]. All else is neither factored nor has it an instability.
    """

    def __init__(self, theta: np.ndarray, lr: float, weight_decay: float) -> None:
        self.shape = theta.shape
        self.matrix = theta.ndim == 2 or (theta.ndim == 4 and theta.shape[2] == theta.shape[3] == 1)
        self.theta = theta.reshape(theta.shape[:2] if self.matrix else (1, -1))
        self.lr, self.weight_decay = lr, weight_decay
        self.m, self.v = np.zeros_like(self.theta), np.zeros_like(self.theta)
        self.r = self.R = np.zeros((self.theta.shape[0], 1))
        self.c = self.C = np.zeros((1, self.theta.shape[1]))

    def step(self, gradient: np.ndarray) -> np.ndarray:
        b1, b2, b3, eps1, eps2, d = 0.9, 0.999, 0.9999, 1e-30, 1e-16, 1.0
        g = gradient.reshape(self.theta.shape)
        one_n, one_m = np.ones((g.shape[0], 1)), np.ones((g.shape[1], 1))
        if self.matrix:
            self.r = b2 * self.r + (1 - b2) * (g**2 + eps1 * one_n @ one_m.T) @ one_m
            self.c = b2 * self.c + (1 - b2) * one_n.T @ (g**2 + eps1 * one_n @ one_m.T)
            v = self.r @ self.c / (one_n.T @ self.r)
        else:
            v = self.v = b2 * self.v + (1 - b2) * (g**2 + eps1)
        u = g / np.sqrt(v)
        u_hat = u / max(1.0, np.sqrt(np.mean(u**2)) / d)
        self.m = b1 * self.m + (1 - b1) * u_hat
        update = self.m
        if self.matrix:
            instability = (u_hat - self.m) ** 2 + eps2 * one_n @ one_m.T
            self.R = b3 * self.R + (1 - b3) * instability @ one_m
            self.C = b3 * self.C + (1 - b3) * one_n.T @ instability
            update = self.m / np.sqrt(self.R @ self.C / (one_n.T @ self.R))
        self.theta = self.theta * (1 - self.lr * self.weight_decay) - self.lr * update
        return self.theta.reshape(self.shape)

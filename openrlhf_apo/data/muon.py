"""Muon in float32: momentum, orthogonalised.

    m <- mu m + (1 - mu) g,   u = (1 - mu) g + mu m                         (Nesterov)
    X_0 = u / |u|,   X <- a X + (b X X^T + c (X X^T)^2) X, five times       (singular values near 1)
    w <- w (1 - lr decay) - lr 0.2 sqrt(max(rows, columns)) X               (an update as large as AdamW's)

torch.optim.Muon is the same with X in bfloat16, which a CPU without bfloat16 instructions multiplies ten times slower.

Reference: Jordan et al., https://kellerjordan.github.io/posts/muon/; the scale is that of arXiv 2502.16982, Eq. 4.
"""

import math

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a, b, c
STEPS = 5
EPS = 1e-7


class Muon(torch.optim.Optimizer):
    """For matrices only."""

    def __init__(self, params, lr: float, weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for weight in group["params"]:
                average = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                average.lerp_(weight.grad, 1 - momentum)
                update = orthogonalised(weight.grad.lerp(average, momentum))
                weight.mul_(1 - lr * group["weight_decay"])
                weight.add_(update, alpha=-lr * 0.2 * math.sqrt(max(weight.shape)))


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """matrix[rows, columns] = U S V^T -> about U V^T: singular values between some 0.7 and 1.2."""
    a, b, c = COEFFICIENTS
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix  # the smaller Gram matrix
    x = x / x.norm().clamp(min=EPS)
    for _ in range(STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x

"""A linear readout: ridge regression onto labels, with the penalty chosen without the test rows."""

import torch
import torch.nn.functional as F
from torch import Tensor

# for standardised columns, whose squares sum to the number of rows
RIDGES = tuple(10.0**k for k in range(7))


def readout(train: Tensor, labels: Tensor, test: Tensor, classes: int) -> tuple[Tensor, float]:
    """Classes of the rows `test` (n d): n, int64; and the share of training rows that are
    classified correctly when they are left out.

    Ridge regression onto one-hot labels `labels` of the rows `train` (m d), with standardised
    columns. The penalty in RIDGES with the smallest squared leave-one-out error is used. This needs
    no further fits, since the error of a row left out is its error in the fit / (1 - leverage).
    """
    centre, scale = train.double().mean(0), train.double().std(0).clamp_min(1e-6)
    a, b = ((x.double() - centre) / scale for x in (train, test))
    target = F.one_hot(labels, classes).double()
    rate = target.mean(0)
    u, s, vt = torch.linalg.svd(a, full_matrices=False)
    found = []
    for ridge in RIDGES:
        keep = s.square() / (s.square() + ridge)
        error = (target - rate - (u * keep) @ (u.T @ target)) / (
            1 - 1 / len(a) - (u.square() * keep).sum(1)
        )[:, None]
        found.append((error.square().sum().item(), ridge, target - error))
    _, ridge, left_out = min(found, key=lambda fit: fit[0])
    w = vt.T @ ((s / (s.square() + ridge))[:, None] * (u.T @ target))
    return (b @ w + rate).argmax(1), (left_out.argmax(1) == labels).double().mean().item()

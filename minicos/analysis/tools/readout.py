"""A linear readout: ridge regression onto labels, its penalty chosen without a look at the rows
that are judged.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# of standardised columns, whose squares sum to the number of rows
RIDGES = tuple(10.0**k for k in range(7))


def readout(train: Tensor, labels: Tensor, test: Tensor, classes: int) -> tuple[Tensor, float]:
    """Classes of the rows `test` (n d): n, int64; and the share of training rows that are read
    rightly when they are left out.

    Ridge regression onto one-hot labels `labels` of the rows `train` (m d), columns standardised.
    Of RIDGES the one is taken whose squared error on left-out rows is least; leaving out needs no
    fit of its own, since an error left out is the error left in / (1 - leverage).
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

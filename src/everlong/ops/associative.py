"""An associative matrix: pairs of keys and values, written and read by non-negative key features.

B batch, T queries, M pairs, K width of a key, D width of a value, P = 2 nu K features. Rodkin et
al. 2024, arXiv 2407.04841, section 3; the features are DPFP (Schlag et al. 2021, arXiv 2102.11174).
"""

import torch
from torch import Tensor

EPSILON = 1e-5  # in every denominator, so that an empty memory reads as 0


def features(x: Tensor, nu: int) -> Tensor:
    """phi(x): [..., K] -> [..., 2 nu K], non-negative.

    r = [relu(x); relu(-x)], then r * roll(r, j) for j = 1..nu, side by side. From nu = K on the
    products repeat themselves or vanish.
    """
    r = torch.cat([x.relu(), (-x).relu()], -1)
    return torch.cat([r * r.roll(j, -1) for j in range(1, nu + 1)], -1)


def read(matrix: Tensor, norm: Tensor, queries: Tensor) -> Tensor:
    """A^T q / (z . q + epsilon): matrix A [B, P, D], norm z [B, P], queries [B, T, P] -> [B, T, D].

    Exactly 0 where nothing was written (A = 0).
    """
    return queries @ matrix / (queries @ norm[..., None] + EPSILON)


def novelty(norm: Tensor, keys: Tensor) -> Tensor:
    """g = clip(1 - z . k / (|k|^2 + epsilon), 0, 1), without gradient: [B, M].

    1 for a key that meets nothing in z [B, P], 0 for one that stands there already.
    """
    seen = (keys @ norm[..., None]).squeeze(-1) / (keys.square().sum(-1) + EPSILON)
    return (1 - seen).clamp(0, 1).detach()


def write(
    matrix: Tensor, norm: Tensor, keys: Tensor, values: Tensor, strength: Tensor
) -> tuple[Tensor, Tensor]:
    """Replace what stands at each key by its value; all M pairs see the same old matrix.

    A += sum_j b_j k_j (v_j - old_j)^T with old_j read at k_j; z += sum_j g_j k_j (`novelty`).
    keys [B, M, P], values [B, M, D], strength b [B, M] -> the new matrix and norm.
    """
    change = strength[..., None] * (values - read(matrix, norm, keys))
    added = novelty(norm, keys)[..., None] * keys
    return matrix + keys.mT @ change, norm + added.sum(1)


def write_reference(
    matrix: Tensor, norm: Tensor, keys: Tensor, values: Tensor, strength: Tensor
) -> tuple[Tensor, Tensor]:
    """Row by row and pair by pair: the definition of `write`."""
    matrices, norms = [], []
    for b in range(keys.shape[0]):
        new_matrix, new_norm = matrix[b], norm[b]
        for j in range(keys.shape[1]):
            k = keys[b, j]
            met = torch.dot(norm[b], k)
            old = matrix[b].T @ k / (met + EPSILON)
            fresh = (1 - met / (torch.dot(k, k) + EPSILON)).clamp(0, 1).detach()
            new_matrix = new_matrix + strength[b, j] * torch.outer(k, values[b, j] - old)
            new_norm = new_norm + fresh * k
        matrices.append(new_matrix)
        norms.append(new_norm)
    return torch.stack(matrices), torch.stack(norms)

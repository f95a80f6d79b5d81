"""Newton-Schulz: the nearest orthogonal matrix, nearly, by matrix products alone.

r rows, c columns.
"""

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Muon's: singular values end near 1, not at 1


def newton_schulz(matrix: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """S [..., r, c] -> [..., r, c], with its singular values brought to about 1 (0.68 to 1.13 at
    full rank), float32 at least, whatever autocast says.

        X = S / (||S||_F + eps),   `steps` times X <- a X + (b A + c A^2) X,  A = X X^T

    (Muon, Keller Jordan 2024; as Atlas uses it, arXiv 2505.23735, section 5), transposed where
    r > c. What S maps to 0 stays 0, and S = 0 too; a factor of S drops out as far as its norm is
    above eps. The gradient at S is of the size 1 / ||S||_F: near 0 it is large.
    """
    if matrix.dim() < 2:
        raise ValueError(f"matrix must be [..., r, c], got {list(matrix.shape)}")
    a, b, c = COEFFICIENTS
    x = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    with torch.autocast(x.device.type, enabled=False):
        x = x / (torch.linalg.matrix_norm(x, keepdim=True) + eps)
        for _ in range(steps):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT

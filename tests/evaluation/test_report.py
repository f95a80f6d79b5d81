"""The picture of a run."""

import json

import numpy as np
import pytest
from matplotlib.image import imread

from everlong.errors import UserError
from everlong.evaluation.report import plot_curves


def line(step):
    bits = 2 + 6 / step
    found = {"step": step, "tokens": step * 100, "bits_per_byte": bits}
    found |= {"learning_rate": 1e-3 / step, "grad_norm": 1.0 + step % 3}
    return found | ({"validation_bits_per_byte": bits + 0.1} if step % 5 == 0 else {})


@pytest.mark.parametrize("steps", [1, 30])
def test_curves_are_drawn(tmp_path, steps):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line(step)) + "\n" for step in range(1, steps + 1)))
    png = plot_curves(metrics, tmp_path / "curves.png")
    pixels = imread(png)[..., :3]
    assert pixels.shape[0] > 400
    blue = np.array([0x1F, 0x77, 0xB4]) / 255  # the training curve
    orange = np.array([0xFF, 0x7F, 0x0E]) / 255  # the validation curve
    assert (np.abs(pixels - blue).max(-1) < 0.1).sum() > 10
    assert ((np.abs(pixels - orange).max(-1) < 0.1).sum() > 10) == (steps > 1)


def test_an_empty_run_has_no_curves(tmp_path):
    with pytest.raises(UserError, match="nothing to draw"):
        plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")

"""The small run on as many processes as the environment says; the main one writes the folder.

    python distributed_run.py RUN [--resume PATH]

Without dropout: processes draw from generators of their own.
"""

import argparse
import os
from pathlib import Path

from accelerate import PartialState
from small_run import small_config, small_model, small_texts  # beside this file

from everlong.training.loop import train


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    model = small_model(seed=int(os.environ.get("RANK", "0")), dropout=0.0)
    config = small_config(
        steps=arguments.steps,
        schedule="constant",
        batch_size=4,
        segments=2,
        eval_every=0,
        checkpoint_every=2,
    )
    texts = small_texts(90, 31, 160, 12, 77, 240, 8, seed=1)
    train(model, texts, None, config, arguments.run_dir, arguments.resume)
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()

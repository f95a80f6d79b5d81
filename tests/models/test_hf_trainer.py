"""transformers' Trainer by memory replay: the gradients, and everything else, are Trainer's."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

import everlong
from everlong.training import trainer as module
from models.backbones import make_backbone
from models.hub_models import make_config

LENGTH = 13  # three segments of 4 and one token


def rows(count=8):
    """Documents of several lengths, padded to one; the padding is masked and has no labels."""
    generator, found = torch.Generator().manual_seed(2), []
    for row in range(count):
        ids = torch.randint(0, 16, (LENGTH,), generator=generator)
        mask = (torch.arange(LENGTH) < LENGTH - 3 * (row % 3)).long()
        found.append(
            {
                "input_ids": ids,
                "attention_mask": mask,
                "labels": ids.masked_fill(mask == 0, -100),
            }
        )
    return found


def arguments(folder, **options):
    options = {
        "per_device_train_batch_size": 2,
        "learning_rate": 0.05,
        "max_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "max_grad_norm": 0,
        "lr_scheduler_type": "constant",
        "seed": 3,
        **options,
    }
    return TrainingArguments(output_dir=str(folder), **options)


def build(name="memformer", **options):
    torch.manual_seed(0)
    return everlong.EverlongForCausalLM(make_config(name, **options)).double()


class Seen:
    """A trainer's gradients as the optimiser finds them, and the losses of its training steps."""

    def __init__(self, kind, model, folder, **options):
        given = {k: options.pop(k) for k in ("segment_length", "horizon") if k in options}
        self.trainer = kind(
            model=model, args=arguments(folder, **options), train_dataset=rows(), **given
        )
        self.grads, self.losses = {}, []
        step, clip = self.trainer.training_step, self.trainer.create_optimizer

        def training_step(*args, **kwargs):
            loss = step(*args, **kwargs)
            self.losses.append(float(loss))
            return loss

        def create_optimizer(*args):
            optimizer = clip(*args)
            optimizer.register_step_pre_hook(lambda *_: self.keep(model))
            return optimizer

        self.trainer.training_step = training_step
        self.trainer.create_optimizer = create_optimizer
        self.trainer.train()

    def keep(self, model):
        for name, each in model.named_parameters():
            if each.grad is not None:
                self.grads[name] = each.grad.clone()


def same_gradients(a, b):
    assert a.grads.keys() == b.grads.keys()
    for name, grad in a.grads.items():
        torch.testing.assert_close(grad, b.grads[name], rtol=1e-4, atol=1e-6, msg=name)
    assert a.losses == pytest.approx(b.losses, rel=1e-5)


@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("name", ["memformer", "gated_deltanet"])
def test_the_gradients_are_those_of_trainer(name, accumulated, tmp_path):
    """Back-propagation through the whole row, over several batches of unequal label counts."""
    found = []
    for kind in (Trainer, everlong.ReplayTrainer):
        options = {"gradient_accumulation_steps": accumulated}
        if kind is everlong.ReplayTrainer and name == "gated_deltanet":
            options["segment_length"] = 5
        found.append(Seen(kind, build(name), tmp_path, **options))
    same_gradients(*found)
    assert len(found[0].losses) == accumulated
    assert max(float(each.abs().max()) for each in found[0].grads.values()) > 1e-3


def test_methods_agree_with_dropout_and_a_cut_horizon_does_not(tmp_path):
    found = {}
    for method in ("replay", "full", "checkpoint", "truncated"):
        options = {"truncate": 1} if method == "truncated" else {}
        horizon = everlong.Horizon(method, **options)
        found[method] = Seen(
            everlong.ReplayTrainer, build(dropout=0.3), tmp_path, horizon=horizon, segment_length=4
        )
    same_gradients(found["replay"], found["full"])
    same_gradients(found["replay"], found["checkpoint"])
    with pytest.raises(AssertionError):
        same_gradients(found["replay"], found["truncated"])


def test_a_stopped_training_goes_on_from_its_checkpoint(tmp_path):
    """Trainer's own folders: weights, optimiser, scheduler; the loss falls meanwhile."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "weight_decay": 0.01}
    whole = Seen(everlong.ReplayTrainer, build(), tmp_path / "whole", **options)
    folder = tmp_path / "whole" / "checkpoint-3"
    assert {"README.md", "config.json", "model.safetensors", "optimizer.pt"} <= {
        path.name for path in folder.iterdir()
    }
    again = everlong.ReplayTrainer(
        model=everlong.EverlongForCausalLM.from_pretrained(folder),
        args=arguments(tmp_path / "again", **options),
        train_dataset=rows(),
    )
    again.train(resume_from_checkpoint=str(folder))
    pairs = zip(whole.trainer.model.named_parameters(), again.model.named_parameters(), strict=True)
    for (name, a), (_, b) in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)
    found = [
        everlong.ReplayTrainer(each, args=arguments(tmp_path), eval_dataset=rows())
        for each in (build(), again.model)
    ]
    before, after = (each.evaluate()["eval_loss"] for each in found)
    assert after < before - 0.1


def test_an_extended_model_trains_alike(tmp_path):
    base = make_backbone("llama")
    model = everlong.extend(base, "rmt", segment_length=4, num_slots=2)
    plain = copy.deepcopy(model)
    same_gradients(Seen(everlong.ReplayTrainer, model, tmp_path), Seen(Trainer, plain, tmp_path))


def test_what_it_cannot_train_with_is_refused(tmp_path, monkeypatch):
    model, args = build("gated_deltanet"), arguments(tmp_path)

    def make(model=model, **options):
        return everlong.ReplayTrainer(
            **{"model": model, "args": args, "train_dataset": rows(), **options}
        )

    with pytest.raises(ValueError, match="whole number of tokens, such as segment_length=256"):
        make()
    with pytest.raises(ValueError, match="segment_length is 0"):
        make(segment_length=0)
    with pytest.raises(ValueError, match="give a pretrained one a memory with everlong.extend"):
        make(torch.nn.Linear(2, 2), segment_length=4)
    with pytest.raises(ValueError, match="compute_loss_func: leave it out"):
        make(segment_length=4, compute_loss_func=lambda *_, **__: None)
    smooth = arguments(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="neftune_noise_alpha"):
        make(segment_length=4, args=arguments(tmp_path, neftune_noise_alpha=5.0))
    with pytest.raises(ValueError, match="label_smoothing_factor: leave it out"):
        make(segment_length=4, args=smooth)
    batch = {key: row[None] for key, row in rows()[0].items()}
    with pytest.raises(ValueError, match="the batch lacks labels"):
        module.segments({"input_ids": batch["input_ids"]}, 4)
    with pytest.raises(ValueError, match="leave out position_ids"):
        module.segments({**batch, "position_ids": batch["input_ids"]}, 4)


def test_targets_cross_the_boundaries():
    batch = {key: row[None] for key, row in rows()[0].items()}
    cuts = module.segments(batch, 4)
    assert [each["inputs"].shape[1] for each in cuts] == [4, 4, 4, 1]
    targets = torch.cat([each["targets"] for each in cuts], 1)
    assert torch.equal(targets[:, :-1], batch["labels"][:, 1:])
    assert targets[:, -1].tolist() == [-100]
    assert torch.equal(torch.cat([each["mask"] for each in cuts], 1), batch["attention_mask"])


def test_a_label_behind_padding_is_no_target():
    batch = {key: row[None] for key, row in rows()[0].items()}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][:, :2] = 0
    whole = torch.cat([each["targets"] for each in module.segments(batch, 4)], 1)
    assert whole[0, :2].tolist() == [-100, -100]
    assert torch.equal(whole[:, 2:-1], batch["labels"][:, 3:])


@pytest.mark.parametrize("kind", [Trainer, everlong.ReplayTrainer])
def test_the_side_of_the_padding_changes_nothing(kind, tmp_path):
    found = {}
    for left in (0, 3):
        ids = torch.randint(5, (4, 9), generator=torch.Generator().manual_seed(1))
        sides = (left, 3 - left)
        padded = [torch.nn.functional.pad(row, sides) for row in ids]
        mask = torch.nn.functional.pad(torch.ones(9, dtype=torch.long), sides)
        data = [
            {"input_ids": row, "attention_mask": mask, "labels": row.masked_fill(mask == 0, -100)}
            for row in padded
        ]
        given = {"gradient_accumulation_steps": 2}
        trainer = kind(build(), arguments(tmp_path, **given), train_dataset=data, eval_dataset=data)
        before = trainer.evaluate()["eval_loss"]
        found[left] = before, trainer.train().training_loss
    assert found[0] == pytest.approx(found[3], rel=1e-5)


def test_a_half_precise_training_is_trainer_s(tmp_path):
    kinds = (Trainer, everlong.ReplayTrainer)
    found = [Seen(kind, build().float(), tmp_path, bf16=True) for kind in kinds]
    assert found[0].losses == pytest.approx(found[1].losses, rel=1e-2)
    exact = Seen(everlong.ReplayTrainer, build().float(), tmp_path)
    assert found[1].losses != exact.losses, "autocast was on"
    assert found[1].trainer.model.training


_PROCESS = """
import sys
import everlong
from models.test_hf_trainer import Seen, build
steps, rows = map(int, sys.argv[2:])
sizes = {"gradient_accumulation_steps": steps, "per_device_train_batch_size": rows}
seen = Seen(everlong.ReplayTrainer, build(), sys.argv[1], ddp_backend="gloo", **sizes)
print("norm", sum(float(each.square().sum()) for each in seen.grads.values()) ** 0.5)
"""


@pytest.mark.benchmark
@pytest.mark.parametrize(("steps", "size"), [(1, 2), (2, 1)])
def test_two_processes_are_one(steps, size, tmp_path):
    """The gradient of four rows, wherever they are read."""
    script = tmp_path / "process.py"
    script.write_text(_PROCESS)
    one = Seen(everlong.ReplayTrainer, build(), tmp_path, per_device_train_batch_size=4)
    wanted = sum(float(each.square().sum()) for each in one.grads.values()) ** 0.5
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = subprocess.run(
        [*launch, str(script), str(tmp_path), str(steps), str(size)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    norms = [float(line.split()[1]) for line in done.stdout.splitlines() if "norm" in line]
    assert norms == pytest.approx([wanted, wanted], rel=1e-5)

"""Gradient checkpointing: the values and gradients of every memory are those without it."""

import pytest
import torch

import everlong
from models.backbones import make_backbone
from models.hub_models import close, every_model, make_model, tokens


def switch(model, **options):
    """By its newer name where there is one: the older one warns."""
    new = getattr(model, "activation_checkpointing_enable", None)
    (new or model.gradient_checkpointing_enable)(**options)


def read(model, ids):
    """Loss, gradients and how many values the graph held for the backward pass."""
    held = []
    model.zero_grad()
    torch.manual_seed(7)
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda each: (held.append(each.numel()), each)[1], lambda each: each
    )
    with hooks:
        loss = model(ids, labels=ids).loss
    loss.backward()
    grads = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return loss.detach(), grads, sum(held)


def compare(model, ids):
    plain = read(model, ids)
    switch(model)
    recomputed = read(model, ids)
    close(recomputed[0], plain[0])
    assert plain[1].keys() == recomputed[1].keys()
    for name, grad in plain[1].items():
        close(recomputed[1][name], grad)
    assert recomputed[2] < 0.75 * plain[2], "activations must not be held"


@pytest.mark.supports("gradient checkpointing")
@every_model
def test_every_memory_is_recomputed(name):
    compare(make_model(name, dropout=0.2).train(), tokens(2, 14))


def test_every_second_layer_alone_can_be_recomputed():
    ids, held = tokens(2, 14), []
    for options in (None, {"every_n_layers": 2}, {}):
        model = make_model("gated_deltanet", num_layers=4).train()
        if options is not None:
            switch(model, **options)
        held.append(read(model, ids)[2])
    assert held[0] > held[1] > held[2]


@pytest.mark.supports("extend: gradient checkpointing", of="{memory}, {backbone}")
@pytest.mark.parametrize("memory", ["rmt", "memformer", "hmt"])
@pytest.mark.parametrize("backbone", ["gpt2", "gemma3"])
def test_a_pretrained_decoder_is_recomputed(backbone, memory):
    options = dict(everlong.registry.memory_entry(memory).small)
    base = make_backbone(backbone, exact=True)
    model = everlong.extend(base, memory, train="all", **options).train()
    if model.core.prefix is not None:
        torch.nn.init.constant_(model.core.prefix.gate, 0.7)
    compare(model, tokens(2, 14))


@pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")
def test_it_is_switched_by_its_old_name_too_and_off():
    model, ids = make_model("memformer").train(), tokens(1, 9)
    plain = read(model, ids)[2]
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    assert read(model, ids)[2] < plain
    model.eval()
    assert model(ids).loss is None
    model.train().gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    assert read(model, ids)[2] == plain


def test_what_cannot_be_recomputed_is_refused():
    model, ids = make_model("mom").train(), tokens(1, 9)
    with pytest.raises(ValueError, match="loses the gradients of the state"):
        switch(model, **{_kwargs(model): {"use_reentrant": True}})
    switch(model)
    with pytest.raises(ValueError, match="turn gradient checkpointing off"):
        model(ids, trace=everlong.Trace())
    armt = everlong.extend(make_backbone("gpt2"), "armt", segment_length=4, num_slots=2).train()
    switch(armt)
    with pytest.raises(ValueError, match="cannot be run again"):
        armt(ids)


def _kwargs(model):
    newer = hasattr(model, "activation_checkpointing_enable")
    return "activation_checkpointing_kwargs" if newer else "gradient_checkpointing_kwargs"

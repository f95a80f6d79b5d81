"""LoRA of peft on every memory: what learns, merging, files."""

import pytest
import torch

from models.hub_models import close, every_model, make_model, tokens

peft = pytest.importorskip("peft")


@pytest.mark.supports("LoRA")
@every_model
def test_adapters_learn_alone_merge_and_are_saved(name, tmp_path):
    model, ids = make_model(name), tokens(2, 18)
    before = {key: each.clone() for key, each in model.state_dict().items()}
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", r=2, init_lora_weights=False
    )
    adapted = peft.get_peft_model(model, config).train()
    adapted(input_ids=ids, labels=ids).loss.backward()
    grads = {key: each.grad for key, each in adapted.named_parameters() if each.grad is not None}
    trainable = {key for key, each in adapted.named_parameters() if each.requires_grad}
    aside = {key for key in trainable if ".compressor." in key}  # the task never trains it
    assert grads.keys() == trainable - aside
    assert all("lora_" in key for key in grads)
    still = [key for key, each in grads.items() if not each.abs().max() > 0]
    assert still == []
    with torch.no_grad():
        wanted = adapted.eval()(input_ids=ids).logits
        with adapted.disable_adapter():
            base = adapted(input_ids=ids).logits
        assert (wanted - base).abs().max() > 1e-6
        adapted.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(make_model(name), tmp_path)
        close(again(input_ids=ids).logits, wanted)
        close(adapted.merge_and_unload()(ids).logits, wanted)
    assert model.state_dict().keys() == before.keys()

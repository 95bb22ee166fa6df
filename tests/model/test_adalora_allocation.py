"""AdaLoRA's budget, and its regularisation."""

from __future__ import annotations

import copy
import functools
import warnings

import peft
import pytest
import torch
from adalora_cases import BF16, OPTIONS, STEPS, labelled, pair_of, pattern, train, wrap

import pyfused
from pyfused import AdaLoraConfig


@pytest.fixture
def pair(build):
    return functools.partial(pair_of, build)


@pytest.fixture
def inputs(batch):
    return functools.partial(labelled, batch)


class TestAllocation:
    @pytest.fixture
    def model(self, build):
        return lambda **options: wrap(pyfused, build("llama"), task_type="CAUSAL_LM", **options)

    def test_it_needs_gradients(self, model):
        with pytest.raises(ValueError, match=r"update_and_allocate: no parameter .* after loss.backward\(\)"):
            model().update_and_allocate(0)

    def test_only_a_trained_adalora_adapter_has_one(self, build, model, inputs, tmp_path):
        lora = pyfused.get_peft_model(build("llama"), pyfused.LoraConfig())
        model().save_pretrained(tmp_path)
        loaded = pyfused.PeftModel.from_pretrained(build("llama"), tmp_path)
        for other in (lora, loaded):
            assert not hasattr(other, "update_and_allocate") and not hasattr(other.base_model, "rankallocator")
        assert torch.isfinite(loaded(**inputs("llama")).loss)
        deleted = model()
        assert deleted.trainable_adapter_name == "default"
        deleted.delete_adapter("default")
        assert not hasattr(deleted, "update_and_allocate")

    def test_nothing_to_prune(self, model, inputs):
        """HF PEFT's kthvalue fails where init_r is target_r."""
        ours = model(target_r=6)
        train(ours, "llama", inputs)
        assert all(all(ranks) for ranks in pattern(ours).values())

    def test_everything_is_pruned(self, model, inputs):
        ours = model(target_r=0)
        losses = train(ours, "llama", inputs)
        assert not any(any(ranks) for ranks in pattern(ours).values())
        with torch.no_grad(), ours.disable_adapter():
            expected = ours(**inputs("llama")).logits
        torch.testing.assert_close(ours.eval()(**inputs("llama")).logits, expected)
        assert all(map(torch.isfinite, map(torch.tensor, losses)))

    def test_a_step_that_was_left_out(self, model, inputs):
        """The last allocation comes late where the training did not stop at it."""
        ours = model()
        train(ours, "llama", inputs, [0, 3, 25, 26])
        assert sum(map(sum, pattern(ours).values())) == 3 * len(pattern(ours))

    def test_a_layer_that_was_not_called(self, model, inputs):
        ours = model()
        layer = ours.base_model.layers.of("default")["model.layers.1.self_attn.q_proj"]
        with torch.no_grad():
            layer.lora_E["default"].fill_(1.0)
        ours.base_model.peft_config["default"].orth_reg_weight = 0.0
        for step in range(8):
            ours(**inputs("llama")).loss.backward()
            for parameter in layer.parameters():
                parameter.grad = None
            ours.update_and_allocate(step)
        assert not any(pattern(ours)["model.layers.1.self_attn.q_proj.lora_E"]), "it is of no importance"

    def test_budget(self, model):
        theirs = peft.tuners.adalora.layer.RankAllocator
        ours = model().base_model.rankallocator
        reference = theirs.__new__(theirs)
        reference.peft_config, reference.init_bgt, reference.target_bgt = ours.peft_config, 36, 18
        assert (ours.init_bgt, ours.target_bgt) == (36, 18)
        assert [ours.budget_schedule(step) for step in range(STEPS)] == [
            reference.budget_schedule(step) for step in range(STEPS)
        ]
        ours.set_total_step(40)
        assert ours.peft_config.total_step == 40
        with pytest.raises(ValueError, match="tinit must be less than total_step - tfinal"):
            ours.set_total_step(10)

    def test_copies_have_a_budget_of_their_own(self, model, inputs):
        ours = model()
        train(ours, "llama", inputs, range(10))
        other = copy.deepcopy(ours)
        train(ours, "llama", inputs, range(10, 24))
        assert pattern(other) != pattern(ours)
        train(other, "llama", inputs, range(10, 24))
        assert sum(map(sum, pattern(other).values())) == sum(map(sum, pattern(ours).values()))


class TestRegularisation:
    def test_without_a_task_type_there_is_none(self, build, inputs):
        """As in HF PEFT, whose trained weights depend on it; but it is said."""
        with pytest.warns(UserWarning, match="orth_reg_weight: .* only where task_type is set"):
            ours = pyfused.get_peft_model(build("llama"), AdaLoraConfig(**OPTIONS))
        theirs = wrap(peft, build("llama"))
        losses = [model(**inputs("llama")).loss for model in (ours.eval(), theirs)]
        torch.testing.assert_close(*losses)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pyfused.get_peft_model(build("llama"), AdaLoraConfig(**OPTIONS | {"orth_reg_weight": 0.0}))

    def test_it_follows_the_formula(self, build):
        ours = wrap(pyfused, build("t5"))
        layers = ours.base_model.layers.of("default")
        norms = []
        for layer in layers.values():
            for rows in (layer.lora_A["default"], layer.lora_B["default"].T):
                norms.append((rows.double() @ rows.double().T - torch.eye(6)).norm())
        penalty = ours.base_model.rankallocator.orthogonality(layers)
        torch.testing.assert_close(penalty.double(), torch.stack(norms).mean(), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("options", [{"return_dict": False}, {"labels": None}])
    def test_outputs_without_a_loss(self, build, inputs, options):
        ours = wrap(pyfused, build("llama"), task_type="CAUSAL_LM")
        ours(**(inputs("llama") | options))

    def test_autocast(self, pair, inputs):
        losses = []
        for model in pair("llama", init_lora_weights=False, lora_alpha=0.1):
            with torch.autocast("cpu", BF16):
                losses.append(model(**inputs("llama")).loss)
        assert losses[1].dtype == losses[0].dtype
        torch.testing.assert_close(losses[1], losses[0], rtol=2e-2, atol=0)

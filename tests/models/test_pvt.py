"""What every model class does, once: each class below runs all of `ModelChecks`."""

import copy
import logging

import pytest
import torch
from torch.export import Dim
from transformers import PreTrainedModel
from transformers.integrations.accelerate import infer_auto_device_map

import pvt_hf
from pvt_hf.models.layers import DropPath
from tests.support.small_models import STAGES, randomize, small_config


def tensors(output) -> list[torch.Tensor]:
    """The main result of a model: logits, last hidden state or feature maps."""
    if "feature_maps" in output:
        return list(output.feature_maps)
    return [output.logits if "logits" in output else output.last_hidden_state]


def assert_close(actual, expected, atol=1e-10):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


def gradients(model: PreTrainedModel, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Of all parameters; fails if one of them has none."""
    model.zero_grad()
    sum(tensor.square().sum() for tensor in tensors(model(pixels))).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    return [parameter.grad.clone() for parameter in model.parameters()]


class ModelChecks:
    version: str
    model_class: type[PreTrainedModel]

    def build(self, **overrides) -> PreTrainedModel:
        config = small_config(self.version, out_features=STAGES, **overrides)
        return randomize(self.model_class(config)).eval()

    def pixels(self, height=64, width=96, dtype=torch.float32) -> torch.Tensor:
        return torch.randn(2, 3, height, width, dtype=dtype)

    @property
    def is_backbone(self) -> bool:
        return self.model_class.__name__.endswith("Backbone")

    @property
    def is_encoder(self) -> bool:
        return self.model_class.__name__.endswith("Model")

    @torch.no_grad()
    def test_saved_model_loads_unchanged(self, tmp_path):
        model, pixels = self.build(), self.pixels()
        model.save_pretrained(tmp_path)
        assert (tmp_path / "model.safetensors").exists()
        loaded, info = self.model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        weights = model.state_dict()
        assert all(torch.equal(value, weights[key]) for key, value in loaded.state_dict().items())
        assert_close(tensors(loaded(pixels)), tensors(model(pixels)), atol=1e-6)

    @torch.no_grad()
    @pytest.mark.parametrize("size", [(32, 32), (65, 33), (224, 100)], ids=str)
    def test_images_of_any_size(self, size):
        height, width = size
        output = self.build()(self.pixels(*size))
        if self.is_backbone:
            for index, feature_map in enumerate(output.feature_maps):
                stride = 4 * 2**index
                rounded = [side // stride if self.version == "v1" else -(-side // stride) for side in (height, width)]
                assert feature_map.shape[1:] == (8 * (index + 1), *rounded)
        assert all(tensor.isfinite().all() for tensor in tensors(output))

    @pytest.mark.parametrize(
        ("pixels", "error", "message"),
        [
            (torch.zeros(2, 4, 64, 64), ValueError, "`pixel_values` must have 3 channels.*got 4"),
            (torch.zeros(3, 64, 64), ValueError, r"`pixel_values` must have shape.*got \(3, 64, 64\)"),
            (torch.zeros(2, 3, 31, 64), ValueError, "`pixel_values` must be at least 32 pixels.*got 31 x 64"),
            (torch.zeros(2, 3, 64, 16), ValueError, "`pixel_values` must be at least 32 pixels.*got 64 x 16"),
            (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), TypeError, "`pixel_values`.*floating-point.*torch.uint8"),
            ([[0.0]], TypeError, "`pixel_values`.*floating-point.*list"),
        ],
        ids=["channels", "dimensions", "low", "narrow", "integer", "list"],
    )
    def test_wrong_pixels_are_refused(self, pixels, error, message):
        with pytest.raises(error, match=message):
            self.build()(pixels)

    def test_empty_batches_give_empty_outputs(self):
        """As torch's own modules; in training and with attentions too."""
        model, pixels = self.build(drop_path_rate=0.1), self.pixels()
        for mode in (False, True):
            model.train(mode)
            output = model(pixels[:0], output_hidden_states=True)
            for empty, full in zip(tensors(output), tensors(model(pixels)), strict=True):
                assert empty.shape == (0, *full.shape[1:])
            assert len(output.hidden_states[0]) == 0
            assert all(not grad.any() for grad in gradients(model, pixels[:0]))
        assert len(model(pixels[:0], output_attentions=True).attentions[0]) == 0

    @torch.no_grad()
    def test_attention_takes_no_argument_of_the_call(self):
        """Wrappers for every kind of model hand over what this one does not know, and transformers ignores."""
        model, pixels = self.build(), self.pixels()
        expected = tensors(model(pixels))
        known = {"is_causal": True, "attention_mask": None, "dropout": 0.5, "scaling": 2.0, "height": 1, "query": None}
        output = model(pixels, **known, hidden_states=None, input_ids=None, inputs_embeds=None, module=None, other=1)
        assert_close(tensors(output), expected, atol=0)

    @torch.no_grad()
    def test_tuples_equal_the_outputs(self):
        model, pixels = self.build(), self.pixels()
        expected = model(pixels, output_hidden_states=True).to_tuple()
        count = 3 if self.is_encoder else 2
        assert len(expected) == count
        for output in (
            model(pixels, output_hidden_states=True, return_dict=False),
            self.with_config(model, return_dict=False)(pixels, output_hidden_states=True),
        ):
            assert isinstance(output, tuple) and len(output) == count
            first = [(x if isinstance(x, tuple) else (x,)) for x in (output[0], expected[0])]
            assert_close(*first, atol=0)

    @staticmethod
    def with_config(model, **fields):
        for name, value in fields.items():
            setattr(model.config, name, value)
        return model

    @torch.no_grad()
    def test_pooled_output_is_what_is_classified(self):
        """The CLS token of v1, the mean of v2."""
        if self.is_encoder:
            output = self.build()(self.pixels())
            states = output.last_hidden_state
            pooled = states[:, 0] if self.version == "v1" else states.mean(dim=(2, 3))
            assert torch.equal(output.pooler_output, pooled)

    @torch.no_grad()
    def test_hidden_states_are_those_of_the_blocks_or_stages(self):
        model, pixels = self.build(), self.pixels()
        states = model(pixels, output_hidden_states=True).hidden_states
        if self.version == "v1":
            tokens = [16 * 24, 8 * 12, 8 * 12, 4 * 6, 2 * 3 if self.is_backbone else 7]
            shapes = [(2, count, channels) for count, channels in zip(tokens, (8, 16, 16, 24, 32), strict=True)]
            shapes += [] if self.is_backbone else [shapes[-1]]
        else:
            shapes = [(2, 8, 16, 24), (2, 16, 8, 12), (2, 24, 4, 6), (2, 32, 2, 3)]
        assert [state.shape for state in states] == shapes
        assert_close(self.with_config(model, output_hidden_states=True)(pixels).hidden_states, states, atol=0)
        model.config.output_hidden_states = False
        assert model(pixels).hidden_states is None
        last = model(pixels, output_hidden_states=[-1]).hidden_states
        assert last[:-1] == (None,) * (len(states) - 1) and torch.equal(last[-1], states[-1])
        assert torch.equal(model(pixels, output_hidden_states=1).hidden_states[1], states[1])

    @torch.no_grad()
    def test_attentions_are_probabilities(self):
        model, pixels = self.build(attn_implementation="eager"), self.pixels()
        assert model(pixels).attentions is None
        attentions = model(pixels, output_attentions=True).attentions
        tokens = [16 * 24, 8 * 12, 8 * 12, 4 * 6, 2 * 3]
        reduced = [49] * 5 if self.version == "v2_linear" else [6] * 5
        if self.version == "v1" and not self.is_backbone:
            tokens[-1] = reduced[-1] = 7  # the CLS token
        assert [attention.shape for attention in attentions] == [
            (2, heads, queries, keys) for heads, queries, keys in zip((1, 2, 2, 3, 4), tokens, reduced, strict=True)
        ]
        for attention in attentions:
            assert_close([attention.sum(-1)], [torch.ones(attention.shape[:-1])], atol=1e-5)

    @torch.no_grad()
    def test_attentions_under_sdpa_are_eager(self, caplog):
        """They come from the eager implementation, with a warning; nothing else changes."""
        model, pixels = self.build(), self.pixels()
        assert model.config._attn_implementation == "sdpa"
        logging.getLogger("transformers").propagate = True
        with caplog.at_level(logging.WARNING):
            from pvt_hf.models.modeling_common import logger

            logger.warning_once.cache_clear()  # another class may have warned already
            output = model(pixels, output_attentions=True)
        assert "this call uses the eager implementation" in caplog.text
        assert len(output.attentions) == 5
        assert_close(tensors(output), tensors(model(pixels)), atol=1e-5)

    def test_sdpa_equals_eager(self):
        pixels = self.pixels(97, 66, torch.double)
        model = self.build().double()
        sdpa_output, sdpa_gradients = tensors(model(pixels)), gradients(model, pixels)
        model.set_attn_implementation("eager")
        assert_close(tensors(model(pixels)), sdpa_output)
        assert_close(gradients(model, pixels), sdpa_gradients)

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_attention_dropout_only_in_training(self, implementation):
        model, pixels = self.build(attention_probs_dropout_prob=0.5, attn_implementation=implementation), self.pixels()
        assert_close(tensors(model(pixels)), tensors(model(pixels)), atol=0)
        model.train()
        assert not torch.equal(tensors(model(pixels))[-1], tensors(model(pixels))[-1])

    @torch.no_grad()
    def test_attention_dropout_acts_on_probabilities(self):
        """Each is zero with probability p, or divided by 1 - p."""
        model = self.build(attention_probs_dropout_prob=0.25, attn_implementation="eager")
        pixels = self.pixels(128, 128)
        kept = model(pixels, output_attentions=True).attentions[0]
        dropped = model.train()(pixels, output_attentions=True).attentions[0]
        assert (dropped == 0).float().mean() == pytest.approx(0.25, abs=0.02)
        torch.testing.assert_close(dropped[dropped != 0], kept[dropped != 0] / 0.75)

    def test_attention_interface_gets_no_causal_mask(self):
        """What a registered kernel sees: (batch, heads, tokens, head_dim), scaling, no mask, a module not causal."""
        from transformers import AttentionInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        calls = []

        def spy(module, query, key, value, attention_mask, **kwargs):
            calls.append((module.is_causal, query.shape, key.shape, attention_mask, kwargs["scaling"]))
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

        AttentionInterface.register("spy", spy)
        model, pixels = self.build(), self.pixels()
        expected = tensors(model(pixels))
        model.set_attn_implementation("spy")
        assert_close(tensors(model(pixels)), expected, atol=0)
        assert len(calls) == 5
        is_causal, query, key, mask, scaling = calls[0]
        assert is_causal is False and mask is None and scaling == 8**-0.5
        assert query == (2, 1, 16 * 24, 8) and key == (2, 1, 49 if self.version == "v2_linear" else 6, 8)

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_activation_checkpointing_changes_no_gradient(self, use_reentrant):
        """Block by block: the same gradients, and every block runs twice."""
        model, pixels = self.build().double().train(), self.pixels(dtype=torch.double)
        expected = gradients(model, pixels)
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        runs = []
        for name, module in model.named_modules():
            if name.endswith("layer_norm_1"):
                module.register_forward_hook(lambda *_, name=name: runs.append(name))
        assert_close(gradients(model, pixels), expected)
        assert len(runs) == 2 * 5

    @pytest.mark.parametrize("implementation", ["plain", "reentrant", "not reentrant"])
    @pytest.mark.parametrize("max_stored_tokens", [0, 100, 10**6])
    def test_recomputed_dropout_draws_the_same(self, implementation, max_stored_tokens):
        """Against a finite difference along one direction under the same seed: what is recomputed draws the same."""
        model = self.build(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2).double().train()
        if implementation != "plain":
            model.gradient_checkpointing_enable({"use_reentrant": implementation == "reentrant"})
        for module in model.modules():
            if hasattr(module, "max_stored_tokens"):
                module.max_stored_tokens, module.chunk_bytes = {"cpu": max_stored_tokens}, 2**13
        pixels, parameters = self.pixels(dtype=torch.double), list(model.parameters())
        directions = [torch.randn_like(parameter) for parameter in parameters]

        def loss(step: float) -> torch.Tensor:
            torch.manual_seed(1)
            with torch.no_grad():
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter.add_(direction, alpha=step)
            return sum(tensor.square().mean() for tensor in tensors(model(pixels)))

        loss(0.0).backward()
        derivative = sum((p.grad * direction).sum() for p, direction in zip(parameters, directions, strict=True))
        ahead, behind = loss(1e-6).detach(), loss(-2e-6).detach()
        torch.testing.assert_close(derivative, (ahead - behind) / 2e-6, rtol=1e-4, atol=1e-8)

    @torch.no_grad()
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_rounds_as_it_must(self, dtype):
        """All the rounding together is a few units in the last place of the largest value."""
        # With the heads' 8 channels, oneDNN's bfloat16 convolutions of CPUs with AMX are wrong (pytorch issue 169688).
        model, pixels = self.build(hidden_sizes=[32, 64, 96, 128]), self.pixels()
        expected = tensors(model(pixels))
        actual = tensors(model.to(dtype)(pixels.to(dtype)))
        assert all(tensor.dtype == dtype for tensor in actual)
        for a, b in zip(actual, expected, strict=True):
            assert (a.float() - b).abs().max() < 5 * torch.finfo(dtype).eps * b.abs().max()

    @pytest.mark.slow
    @torch.no_grad()
    def test_flex_attention_equals_sdpa(self):
        """Compiles its kernel, for which a CPU needs a C++ compiler."""
        model, pixels = self.build(hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1]), self.pixels(128, 128)
        expected = tensors(model(pixels))
        model.set_attn_implementation("flex_attention")
        assert_close(tensors(model(pixels)), expected, atol=1e-5)

    def test_device_map_splits_no_block(self):
        with torch.device("meta"):
            model = self.model_class(small_config(self.version, out_features=STAGES))
        size = sum(parameter.nbytes for parameter in model.parameters())
        placed = infer_auto_device_map(
            model, max_memory={0: size // 2, "cpu": size}, no_split_module_classes=set(model._no_split_modules)
        )
        assert set(placed.values()) == {0, "cpu"}
        blocks = [name for name, module in model.named_modules() if type(module).__name__ in model._no_split_modules]
        assert len(blocks) == 4 + 5
        assert not [name for name in placed for block in blocks if name.startswith(f"{block}.")]

    def test_device_map_auto_changes_nothing(self, tmp_path):
        model, pixels = self.build(), self.pixels()
        model.save_pretrained(tmp_path)
        loaded = self.model_class.from_pretrained(tmp_path, device_map="auto")
        assert_close(tensors(loaded(pixels.to(loaded.device))), tensors(model(pixels)), atol=1e-5)

    def test_every_parameter_is_used(self):
        gradients(self.build().train(), self.pixels())

    def test_drop_path_rates_grow_linearly(self):
        rates = [m.p for m in self.build(drop_path_rate=0.4).modules() if type(m).__name__ == "DropPath"]
        assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])

    def test_drop_path_in_training_only(self):
        model, pixels = self.build(drop_path_rate=0.9), self.pixels()
        assert_close(tensors(model(pixels)), tensors(model(pixels)), atol=0)
        model.train()
        assert not torch.equal(tensors(model(pixels))[-1], tensors(model(pixels))[-1])

    def test_hooks_see_complete_maps(self):
        """Also those of v2's MLP, which works in chunks on a CPU; and hooks do not change the result."""
        model, pixels, shapes = self.build(), self.pixels(128, 128), []
        for module in model.modules():
            if hasattr(module, "chunk_bytes"):
                module.chunk_bytes = 2**12
        expected = tensors(model(pixels))
        for name, module in model.named_modules():
            if name.endswith("dense1"):
                module.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape[:2]))
        assert_close(tensors(model(pixels)), expected, atol=1e-6)
        cls_token = int(self.version == "v1" and not self.is_backbone)
        assert shapes == [(2, 1024), (2, 256), (2, 256), (2, 64), (2, 16 + cls_token)]

    def test_input_can_require_gradients(self):
        """What transformers calls for adapters on a frozen model with checkpointing."""
        model = self.build()
        model.requires_grad_(False)
        model.enable_input_require_grads()
        assert tensors(model(self.pixels()))[-1].requires_grad

    def test_functional_gradients_equal_those_of_backward(self):
        """torch.func sees plain operations at every size."""
        model, pixels = self.build().double(), self.pixels(256, 64, dtype=torch.double)
        expected = gradients(model, pixels)

        def loss(parameters):
            output = torch.func.functional_call(model, parameters, (pixels,))
            return sum(tensor.square().sum() for tensor in tensors(output))

        assert_close(torch.func.grad(loss)(dict(model.named_parameters())).values(), expected)

    @torch.no_grad()
    def test_initialisation_is_the_released_codes(self):
        """Statistics of the released code's initialisation, from wide layers."""
        wide = {"hidden_sizes": [64] * 4, "num_attention_heads": [1] * 4, "mlp_ratios": [8] * 4, "num_labels": 400}
        config = small_config(self.version, **wide)
        model = self.model_class(config)
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                assert module.weight.std() == pytest.approx(0.02, rel=0.1), name
                assert not module.bias.any()
            elif isinstance(module, torch.nn.LayerNorm):
                assert (module.weight == 1).all() and not module.bias.any()
            elif isinstance(module, torch.nn.Conv2d) and self.version == "v1":
                bound = module.weight[0].numel() ** -0.5  # PyTorch's default: uniform, biases too
                assert module.weight.abs().max() == pytest.approx(bound, rel=0.02), name
                assert 0.6 * bound < module.bias.abs().max() <= bound
            elif isinstance(module, torch.nn.Conv2d):
                fan_out = module.kernel_size[0] ** 2 * module.out_channels / module.groups
                assert module.weight.std() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1), name
                assert not module.bias.any()
        for name, parameter in model.named_parameters():
            if name.endswith(("position_embeddings", "cls_token")):
                assert parameter.std() == pytest.approx(0.02, rel=0.3), name


class ClassificationChecks(ModelChecks):
    """Labels, losses, and loading into another number of classes."""

    @pytest.mark.parametrize(
        ("config", "labels", "loss"),
        [
            ({}, torch.tensor([1, 4]), torch.nn.functional.cross_entropy),
            ({}, torch.tensor([1, -100]), torch.nn.functional.cross_entropy),
            ({}, torch.tensor([[0.0, 1, 1, 0, 1]] * 2), torch.nn.functional.binary_cross_entropy_with_logits),
            ({"num_labels": 1}, torch.tensor([[0.3], [-2.0]]), torch.nn.functional.mse_loss),
            ({"problem_type": "regression"}, torch.randn(2, 5), torch.nn.functional.mse_loss),
        ],
        ids=["single label", "ignored", "multi label", "regression", "vector regression"],
    )
    def test_loss_fits_the_labels(self, config, labels, loss):
        output = self.build(**config)(self.pixels(), labels=labels)
        torch.testing.assert_close(output.loss, loss(output.logits, labels))

    @pytest.mark.parametrize(
        ("config", "labels", "error", "message"),
        [
            ({}, [0, 1], TypeError, "`labels` must be a tensor, got list"),
            ({}, torch.tensor([0]), ValueError, r"`labels` must be 2 class indices.*shape \(1,\)"),
            ({}, torch.zeros(2, 4), ValueError, r"`labels` must be floats of shape \(2, 5\).*shape \(2, 4\)"),
            (
                {"problem_type": "multi_label_classification"},
                torch.zeros(2, 5, dtype=torch.long),
                ValueError,
                "`labels` must be floats.*torch.int64",
            ),
            ({}, torch.tensor([True, False]), ValueError, "`labels` must be class indices.*or floats.*torch.bool"),
        ],
        ids=["list", "count", "shape", "integers", "bool"],
    )
    def test_wrong_labels_are_refused(self, config, labels, error, message):
        with pytest.raises(error, match=message):
            self.build(**config)(self.pixels(), labels=labels)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.uint16], ids=str)
    def test_class_indices_may_be_of_any_integer_type(self, dtype):
        model, pixels, labels = self.build(), self.pixels(), torch.tensor([1, 4])
        assert torch.equal(model(pixels, labels=labels.to(dtype)).loss, model(pixels, labels=labels).loss)

    def test_another_classifier_trains_after_num_labels_is_set(self):
        """As people do with transformers' models: what counts is the configuration of now."""
        model, pixels, labels = self.build(num_labels=3).train(), self.pixels(), torch.tensor([1, 4])
        model.classifier = torch.nn.Linear(32, 5)
        with pytest.raises(ValueError, match="`config.num_labels` is 3, but the classifier gives 5 logits"):
            model(pixels, labels=labels % 3)
        model.config.num_labels = 5
        model(pixels, labels=labels).loss.backward()
        assert model.classifier.weight.grad.any()
        with pytest.raises(ValueError, match=r"in \[0, 5\)"):
            model(pixels, labels=labels + 4)

    @pytest.mark.parametrize("labels", [torch.zeros(0, dtype=torch.long), torch.zeros(0, 5)], ids=["indices", "floats"])
    def test_empty_batches_have_the_loss_of_torch(self, labels):
        """Not a number; and none of the labels in the batch of an accumulation step."""
        model, pixels = self.build().train(), self.pixels()[:0]
        loss = model(pixels, labels=labels).loss
        loss.backward()
        assert loss.isnan() and not any(parameter.grad.any() for parameter in model.parameters())

    @pytest.mark.parametrize("label", [5, -1, 1000])
    def test_labels_out_of_range_are_refused(self, label):
        with pytest.raises(ValueError, match=rf"`labels` must be class indices in \[0, 5\).*got \[{label}\]"):
            self.build()(self.pixels(), labels=torch.tensor([0, label]))

    @pytest.mark.parametrize("kind", ["single label", "multi label", "regression"])
    def test_accumulated_gradients_equal_those_of_the_batch(self, kind):
        """8 images at once, or 4 times 2 with `num_items_in_batch`: the same loss and the same gradients."""
        labels, num_items, config = {
            "single label": (torch.tensor([0, 1, 2, 3, 4, -100, 1, 2]), 7, {}),
            "multi label": (torch.randint(0, 2, (8, 5)).double(), 40, {}),
            "regression": (torch.randn(8, 1, dtype=torch.double), 8, {"num_labels": 1}),
        }[kind]
        model, pixels = self.build(**config).double().train(), torch.randn(8, 3, 64, 64, dtype=torch.double)
        complete = model(pixels, labels=labels).loss
        complete.backward()
        expected = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        total = 0
        for part, part_labels in zip(pixels.split(2), labels.split(2), strict=True):
            loss = model(part, labels=part_labels, num_items_in_batch=torch.tensor(num_items)).loss
            loss.backward()
            total += loss.detach()
        torch.testing.assert_close(total, complete.detach())
        assert_close([parameter.grad for parameter in model.parameters()], expected)

    def test_another_encoder_never_loads_half(self, tmp_path):
        self.build().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="not a complete checkpoint.*another shape"):
            self.model_class.from_pretrained(tmp_path, hidden_sizes=[8, 16, 24, 64], ignore_mismatched_sizes=True)

    def test_another_number_of_classes_keeps_all_other_tensors(self, tmp_path):
        model = self.build()
        model.save_pretrained(tmp_path)
        names = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            self.model_class.from_pretrained(tmp_path, **names)
        loaded = self.model_class.from_pretrained(tmp_path, ignore_mismatched_sizes=True, **names)
        assert loaded.classifier.out_features == 2 and loaded.config.id2label[1] == "dog"
        weights = model.state_dict()
        assert all(
            torch.equal(value, weights[key]) for key, value in loaded.state_dict().items() if "classifier" not in key
        )

    def test_base_model_checkpoint_gets_a_new_classifier(self, tmp_path):
        model = self.build()
        model.base_model.save_pretrained(tmp_path)
        loaded, info = self.model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert info["missing_keys"] == {"classifier.weight", "classifier.bias"} and not info["unexpected_keys"]
        assert self.model_class.from_pretrained(tmp_path).classifier.out_features == 5


def test_drop_path_keeps_the_expectation():
    """Complete samples are zero with probability p, and the others are divided by 1 - p."""
    output = DropPath(0.25).train()(torch.ones(4000, 3, 2))
    assert output.unique().tolist() == [0, pytest.approx(1 / 0.75)]
    assert (output == output[:, :1, :1]).all()
    assert (output == 0).float().mean() == pytest.approx(0.25, abs=0.03)


class TestPvtModel(ModelChecks):
    version, model_class = "v1", pvt_hf.PvtModel


class TestPvtForImageClassification(ClassificationChecks):
    version, model_class = "v1", pvt_hf.PvtForImageClassification


class TestPvtBackbone(ModelChecks):
    version, model_class = "v1", pvt_hf.PvtBackbone


class TestPvtV2Model(ModelChecks):
    version, model_class = "v2", pvt_hf.PvtV2Model


class TestPvtV2ForImageClassification(ClassificationChecks):
    version, model_class = "v2", pvt_hf.PvtV2ForImageClassification


class TestPvtV2Backbone(ModelChecks):
    version, model_class = "v2", pvt_hf.PvtV2Backbone


class TestPvtV2LinearForImageClassification(ClassificationChecks):
    version, model_class = "v2_linear", pvt_hf.PvtV2ForImageClassification


class TestPvtV2LinearBackbone(ModelChecks):
    version, model_class = "v2_linear", pvt_hf.PvtV2Backbone


# The other classes are made of the same parts.
COMPILED = [
    ("v1", pvt_hf.PvtForImageClassification),
    ("v2", pvt_hf.PvtV2Backbone),
    ("v2_linear", pvt_hf.PvtV2ForImageClassification),
    *(
        pytest.param(version, model_class, marks=pytest.mark.slow)
        for version, model_class in (
            ("v1", pvt_hf.PvtModel),
            ("v1", pvt_hf.PvtBackbone),
            ("v2", pvt_hf.PvtV2Model),
            ("v2", pvt_hf.PvtV2ForImageClassification),
            ("v2_linear", pvt_hf.PvtV2Backbone),
        )
    ),
]


@pytest.mark.process
@pytest.mark.parametrize(("version", "model_class"), COMPILED)
def test_compiled_equals_eager(version, model_class):
    """One program without a graph break for all sizes, that of the stored position embeddings among them; a classifier
    with its loss."""
    torch.compiler.reset()  # the classes have their code, and its limit of programs, in common
    model = randomize(model_class(small_config(version, out_features=STAGES, depths=[1, 1, 1, 1]))).eval()
    # Of a copy, because transformers' loss writes into the configuration of a model that is not compiled.
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((2, 3, 64, 96), (3, 3, 131, 77), (2, 3, 64, 64)):
            inputs = {"pixel_values": torch.randn(size)}
            if "Classification" in model_class.__name__:
                inputs["labels"] = torch.arange(len(inputs["pixel_values"]))
            assert_close(tensors(compiled(**inputs)), tensors(model(**inputs)), atol=1e-5)


@pytest.mark.process
@pytest.mark.parametrize(("version", "model_class"), COMPILED)
@torch.no_grad()
def test_exported_program_takes_any_size(version, model_class):
    model = randomize(model_class(small_config(version, out_features=STAGES, depths=[1, 1, 1, 1]))).eval()
    dynamic = {0: Dim("batch", max=64), 2: Dim("height", min=64, max=2048), 3: Dim("width", min=64, max=2048)}
    program = torch.export.export(model, (torch.randn(2, 3, 96, 130),), dynamic_shapes=(dynamic,)).module()
    for size in ((1, 3, 64, 64), (3, 3, 97, 200)):
        pixels = torch.randn(size)
        assert_close(tensors(program(pixels)), tensors(model(pixels)), atol=1e-5)

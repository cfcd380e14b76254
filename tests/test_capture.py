import contextlib
import functools
import weakref

import pytest
import torch
from models import (
    HEADS,
    LAYOUTS,
    TOKENS,
    WIDTH,
    make_batch,
    make_diffusers_unet,
    make_tuned,
    make_unet,
    relative_difference,
)
from torch import nn
from torch.nn import functional as F

from apt_hooks import AptError, FeatureCapture
from apt_hooks.hooks.frozen import frozen_base
from apt_hooks.integrations.peft import adapters_off
from apt_hooks.method.ops.channel_statistics import representation_statistics
from apt_hooks.training.regularizers import Regularizers, frozen_reduction

CHECKPOINTING = ("reentrant", "non_reentrant")
SOURCES = ("self_attention", "block")
# The weight that gamma 0.98 leaves to the diffusion loss: the regularizers make up most of the gradient.
WEIGHT = 0.02


def traces(unet):
    """All that hooks or patches could leave on a module."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        name: (sorted(module.__dict__), [len(getattr(module, h)) for h in hooks], module.forward, module.training)
        for name, module in unet.named_modules()
    } | {name: parameter.requires_grad for name, parameter in unet.named_parameters()}


def compared(unet, predict, adapters_off, capture):
    """(prediction, terms) of a tuned pass that was compared with a frozen one."""
    with frozen_base([unet], adapters_off), capture.record(frozen_reduction("separate", "eager")) as frozen:
        predict()
    regularizers = Regularizers(frozen, capture.layers, len(capture.hidden))
    with capture.regularize(regularizers.observe) as regularized:
        prediction = predict()
    return capture.connect(prediction, regularized, regularizers.values())


def library_loss(capture, prediction, target, terms, weight=WEIGHT):
    """The terms summed over the places, which the library takes the mean of."""
    regularizer = len(capture.layers) * terms["l_attn"]
    regularizer = regularizer + len(capture.hidden) * (terms["l_mu"] + terms["l_sigma"])
    return weight * F.mse_loss(prediction.float(), target) + regularizer


def captured_loss(unet, network, capture, autocast=contextlib.nullcontext, weight=WEIGHT):
    """The loss of one step, both passes run and connected."""
    x, timesteps, context, target = make_batch(unet)
    with autocast():
        prediction, terms = compared(unet, lambda: unet(x, timesteps, context), network.off, capture)
    return library_loss(capture, prediction, target, terms, weight)


@functools.cache
def lora_gradient(layout, checkpointing, source="self_attention", autocast=contextlib.nullcontext, weight=WEIGHT):
    unet, network = make_tuned(layout, checkpointing)
    with FeatureCapture(unet, representation_source=source) as capture:
        captured_loss(unet, network, capture, autocast, weight).backward()
    return network.gradient()


def bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


def plain_gradient(layout, source="self_attention"):
    """The same gradient without the library: own hooks, own formulas, no checkpointing."""
    unet, network = make_tuned(layout)
    stems = {
        "up_blocks": ["up_blocks.2.attentions.0", "up_blocks.3.attentions.0"],
        "output_blocks": ["output_blocks.0.1.body", "output_blocks.1.1.body", "output_blocks.2.1.body"],
    }[layout]
    hidden = [f"{stem}.attn1" for stem in stems]
    if source == "block":
        hidden = {
            "up_blocks": ["up_blocks.2.attentions.0", "up_blocks.3"],
            "output_blocks": ["output_blocks.1.1", "output_blocks.2.1"],
        }[layout]
    read = {}

    def reader(name):
        return lambda module, args, output: read.__setitem__(name, output)

    for name in (*(f"{stem}.attn2.{p}" for stem in stems for p in ("to_q", "to_k")), *hidden):
        unet.get_submodule(name).register_forward_hook(reader(name))
    x, timesteps, context, target = make_batch(unet)
    with torch.no_grad(), network.off():
        unet(x, timesteps, context)
    frozen, read = read, {}
    loss = WEIGHT * (unet(x, timesteps, context) - target).square().mean()
    for stem in stems:
        maps = []
        for features in (read, frozen):
            q, k = (features[f"{stem}.attn2.to_{p}"].reshape(2, -1, HEADS, WIDTH // HEADS) for p in "qk")
            maps.append(torch.softmax(torch.einsum("bqhc,bthc->bhqt", q, k) / (WIDTH // HEADS) ** 0.5, dim=3))
        loss = loss + ((maps[0] - maps[1]) ** 2).sum(dim=3).mean()
    for name in hidden:
        h, h_frozen = (features[name] for features in (read, frozen))
        positions = 1 if h.ndim == 3 else (2, 3)
        loss = loss + (h.mean(positions) - h_frozen.mean(positions)).square().mean()
        loss = loss + (h.std(positions, correction=0) - h_frozen.std(positions, correction=0)).square().mean()
    loss.backward()
    return network.gradient()


@pytest.mark.parametrize(
    ("layout", "stems"),
    [
        ("up_blocks", ["up_blocks.2.attentions.0", "up_blocks.3.attentions.0"]),
        ("output_blocks", ["output_blocks.0.1.body", "output_blocks.1.1.body", "output_blocks.2.1.body"]),
    ],
)
def test_places_of_both_layouts(layout, stems):
    capture = FeatureCapture(make_unet(layout))
    assert [layer.name for layer in capture.layers] == [f"{stem}.attn2" for stem in stems]
    assert {(layer.heads, layer.scale) for layer in capture.layers} == {(HEADS, (WIDTH // HEADS) ** -0.5)}
    assert [point.name for point in capture.hidden] == [f"{stem}.attn1" for stem in stems]


@pytest.mark.parametrize(
    ("layout", "last_layers", "sides"),
    [
        ("up_blocks", ["up_blocks.2.attentions.0", "up_blocks.3.attentions.0"], [8, 16]),
        ("output_blocks", ["output_blocks.1.1", "output_blocks.2.1"], [2, 4]),
        ("diffusers", ["up_blocks.1.attentions.1", "up_blocks.2.attentions.1"], [4, 8]),
    ],
)
def test_the_source_block_takes_the_hidden_state_of_each_level_before_it_is_upsampled(layout, last_layers, sides):
    unet = make_diffusers_unet() if layout == "diffusers" else make_unet(layout)
    outputs = {}
    for name in last_layers:
        unet.get_submodule(name).register_forward_hook(lambda m, a, output, name=name: outputs.update({name: output}))
    capture = FeatureCapture(unet, representation_source="block")
    with capture.record() as features:
        unet(*make_batch(unet)[:3])
    for i, (name, side) in enumerate(zip(last_layers, sides, strict=True)):
        output = outputs[name][0] if isinstance(outputs[name], tuple) else outputs[name]
        assert features.hidden[i] is output
        assert output.shape[-2:] == (side, side)
    # Where the level's attention looks: the supplement's 32x32 and 64x64 are the regularizers' resolutions alike.
    queries = [q.shape[1] for q in features.queries.values()]
    assert sorted(set(queries)) == [side * side for side in sides]


@pytest.mark.parametrize("layout", [*LAYOUTS, "diffusers"])
def test_what_is_read_is_what_the_layers_compute(layout):
    unet = make_diffusers_unet() if layout == "diffusers" else make_unet(layout)
    x, timesteps, context, _ = make_batch(unet)
    capture = FeatureCapture(unet)
    with capture.record() as features:
        unet(x, timesteps, context)
    assert len(capture.layers) > 0
    for i, layer in enumerate(capture.layers):
        module = unet.get_submodule(layer.name)
        inputs = []
        with module.register_forward_pre_hook(lambda m, args, inputs=inputs: inputs.append(args[0])):
            unet(x, timesteps, context)
        assert torch.allclose(features.queries[i], inputs[0] @ module.to_q.weight.T, atol=1e-5)
        assert torch.allclose(features.keys[i], context @ module.to_k.weight.T, atol=1e-5)
        assert features.keys[i].shape == (2, TOKENS, WIDTH)
    for i, name in enumerate(point.name for point in capture.hidden):
        outputs = []
        with unet.get_submodule(name).register_forward_hook(lambda m, a, out, outputs=outputs: outputs.append(out)):
            unet(x, timesteps, context)
        assert torch.allclose(features.hidden[i], outputs[0], atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kept", ["attention", "representation"])
def test_what_is_switched_off_is_not_read(layout, kept):
    unet = make_unet(layout)
    capture = FeatureCapture(unet, attention=kept == "attention", representation=kept == "representation")
    with capture.record() as features:
        unet(*make_batch(unet)[:3])
    assert bool(features.queries) == bool(features.keys) == (kept == "attention")
    assert bool(features.hidden) == (kept == "representation")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("source", SOURCES)
def test_hooks_change_no_bit_of_the_output_and_leave_no_trace(layout, source):
    unet, _ = make_tuned(layout)
    batch = make_batch(unet)[:3]
    before, plain = traces(unet), unet(*batch)
    with FeatureCapture(unet, representation_source=source) as capture:
        assert traces(unet) != before
        with capture.record():
            assert torch.equal(unet(*batch), plain)
    assert traces(unet) == before


def test_closing_twice_is_once_and_takes_only_its_own_hooks():
    unet = make_unet("up_blocks")
    first, second = FeatureCapture(unet), FeatureCapture(unet)
    first.close()
    first.close()
    with second.record() as features:
        unet(*make_batch(unet)[:3])
    assert len(features.queries) == 2


def test_an_exception_inside_closes_it_and_stays_the_one_raised():
    unet = make_unet("up_blocks")
    before = traces(unet)
    with pytest.raises(KeyError), FeatureCapture(unet):
        raise KeyError
    assert traces(unet) == before


def test_a_pass_that_fails_is_not_read_on():
    unet = make_unet("up_blocks")
    capture = FeatureCapture(unet)
    with pytest.raises(KeyError), capture.record() as features:
        raise KeyError
    unet(*make_batch(unet)[:3])
    assert features.queries == {}


def test_reduce_is_kept_in_place_of_the_hidden_states():
    unet = make_unet("up_blocks")
    batch = make_batch(unet)[:3]
    capture = FeatureCapture(unet)
    with torch.no_grad(), capture.record() as whole:
        unet(*batch)
    with torch.no_grad(), capture.record(frozen_reduction("separate", "eager")) as reduced:
        unet(*batch)
    for i, h in whole.hidden.items():
        assert relative_difference(reduced.hidden[i], representation_statistics(h)) < 1e-6
    assert reduced.queries[0].shape == whole.queries[0].shape


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_passes_outside_and_recomputations_are_not_observed(layout, checkpointing):
    unet, _ = make_tuned(layout, checkpointing)
    x, timesteps, context, target = make_batch(unet)
    capture = FeatureCapture(unet)
    calls, observed = [], []
    unet.get_submodule(capture.layers[0].name).to_q.register_forward_hook(lambda *_: calls.append(1))
    with capture.regularize(lambda kind, i, output, mask: observed.append((kind, i))):
        prediction = unet(x, timesteps, context)
    before = list(observed)
    F.mse_loss(prediction, target).backward()
    assert len(calls) == 2  # the pass and its recomputation
    unet(x, timesteps, context)
    assert len(set(observed)) == len(observed) == 2 * len(capture.layers) + len(capture.hidden)
    assert observed == before


class AddOne:
    gradient = None
    needs_output = True

    def __call__(self, upstream, output, factors):
        return upstream + factors["value"] * torch.ones_like(output)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("checkpointing", ["off", *CHECKPOINTING])
def test_a_second_pass_in_the_same_backward_is_left_alone(layout, checkpointing):
    """As sd-scripts' differential output preservation makes one: with gradients, unobserved, before the backward."""
    gradients = []
    for second in (False, True):
        unet, network = make_tuned(layout, checkpointing)
        x, timesteps, context, _ = make_batch(unet)
        with FeatureCapture(unet) as capture:
            with capture.regularize(lambda *_: AddOne()) as regularized:
                prediction = unet(x, timesteps, context)
            prediction, values = capture.connect(prediction, regularized, {"value": torch.tensor(1.0)})
            loss = 0.0 * prediction.sum() + 3.0 * values["value"]
            if second:
                loss = loss + 0.0 * unet(x, timesteps, context).sum()
            loss.backward()
        gradients.append(network.gradient())
    assert gradients[0].norm() > 0
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("checkpointing", ["off", *CHECKPOINTING])
def test_a_loss_of_the_values_alone_reaches_the_lora(layout, checkpointing):
    gradients = []
    for of_prediction in (0.0, None):
        unet, network = make_tuned(layout, checkpointing)
        x, timesteps, context, _ = make_batch(unet)
        with FeatureCapture(unet) as capture:
            with capture.regularize(lambda *_: AddOne()) as regularized:
                prediction = unet(x, timesteps, context)
            prediction, values = capture.connect(prediction, regularized, {"value": torch.tensor(1.0)})
            loss = values["value"] if of_prediction is None else values["value"] + of_prediction * prediction.sum()
            loss.backward()
        gradients.append(network.gradient())
    assert gradients[0].norm() > 0
    assert torch.equal(gradients[0], gradients[1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("source", SOURCES)
def test_gradients_equal_those_of_plain_autograd(layout, source):
    assert relative_difference(lora_gradient(layout, "off", source), plain_gradient(layout, source)) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("source", SOURCES)
def test_gradients_with_checkpointing_equal_those_without(layout, checkpointing, source):
    wanted = lora_gradient(layout, "off", source)
    assert relative_difference(lora_gradient(layout, checkpointing, source), wanted) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_gradients_with_checkpointing_equal_those_without_under_autocast(layout, checkpointing):
    wanted = lora_gradient(layout, "off", autocast=bfloat16)
    # Gradients that meet at a place are rounded to bfloat16 (8 bits) after each addition, and autograd promises no
    # order for them; a regularizer that is missing makes a difference above 0.1.
    assert relative_difference(lora_gradient(layout, checkpointing, autocast=bfloat16), wanted) < 2e-2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("checkpointing", ("off", *CHECKPOINTING))
def test_gradients_are_scaled_alike_by_a_grad_scaler(layout, checkpointing):
    unet, network = make_tuned(layout, checkpointing)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with FeatureCapture(unet) as capture:
        scaler.scale(captured_loss(unet, network, capture)).backward()
    scaler.unscale_(optimizer)
    assert relative_difference(network.gradient(), lora_gradient(layout, "off")) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_gradients_accumulate_over_batches(layout, checkpointing):
    unet, network = make_tuned(layout, checkpointing)
    with FeatureCapture(unet) as capture:
        for _ in range(3):
            captured_loss(unet, network, capture).backward()
    assert relative_difference(network.gradient(), 3 * lora_gradient(layout, "off")) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_regularizers_alone_carry_gradient_where_the_diffusion_loss_has_no_weight(layout):
    wanted = lora_gradient(layout, "off", weight=0.0)
    assert wanted.norm() > 0
    assert relative_difference(lora_gradient(layout, "reentrant", weight=0.0), wanted) < 1e-5


@pytest.mark.parametrize("source", SOURCES)
def test_gradients_of_a_real_diffusers_unet_do_not_depend_on_checkpointing(source):
    peft = pytest.importorskip("peft")
    found = []
    for checkpointing in (False, True):
        unet = make_diffusers_unet().train()
        unet.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights="gaussian"))
        torch.manual_seed(1)
        lora = [p for p in unet.parameters() if p.requires_grad]
        for parameter in lora:
            nn.init.normal_(parameter, std=0.2)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        x, timesteps, context, target = make_batch(unet)
        with FeatureCapture(unet, representation_source=source) as capture:
            prediction, terms = compared(
                unet,
                lambda unet=unet, batch=(x, timesteps, context): unet(*batch).sample,
                lambda unet=unet: adapters_off(unet),
                capture,
            )
            library_loss(capture, prediction, target, terms).backward()
        found.append(torch.cat([p.grad.flatten() for p in lora]))
    assert relative_difference(found[1], found[0]) < 1e-5


def plain_lora_gradient(layout):
    unet, network = make_tuned(layout)
    x, timesteps, context, target = make_batch(unet)
    F.mse_loss(unet(x, timesteps, context), target).backward()
    return network.gradient()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("checkpointing", ["off", *CHECKPOINTING])
def test_a_backward_pass_that_fails_leaves_nothing_to_the_next_pass(layout, checkpointing):
    """As one does that runs out of memory in a loop that skips such a step."""
    unet, network = make_tuned(layout, checkpointing)
    x, timesteps, context, target = make_batch(unet)
    with FeatureCapture(unet) as capture:
        layer = unet.get_submodule(capture.layers[0].name)  # places behind it have been gone through by then

        def out_of_memory(module, args, output):
            if output.requires_grad:
                output.register_hook(lambda gradient: (_ for _ in ()).throw(MemoryError()))

        handle = layer.to_k.register_forward_hook(out_of_memory)
        loss = captured_loss(unet, network, capture)
        with pytest.raises(MemoryError):
            loss.backward()
        handle.remove()
        del loss
        network.zero_grad()
        F.mse_loss(unet(x, timesteps, context), target).backward()
        assert relative_difference(network.gradient(), plain_lora_gradient(layout)) < 1e-5
        network.zero_grad()
        captured_loss(unet, network, capture).backward()
        assert relative_difference(network.gradient(), lora_gradient(layout, "off")) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("checkpointing", ["off", *CHECKPOINTING])
def test_a_backward_pass_of_the_prediction_alone_is_the_plain_one(layout, checkpointing):
    unet, network = make_tuned(layout, checkpointing)
    x, timesteps, context, target = make_batch(unet)
    with FeatureCapture(unet) as capture:
        prediction, _ = compared(unet, lambda: unet(x, timesteps, context), network.off, capture)
        F.mse_loss(prediction, target).backward()
    assert relative_difference(network.gradient(), plain_lora_gradient(layout)) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("checkpointing", ["off", "non_reentrant"])
def test_terms_may_be_differentiated_one_by_one_and_again(layout, checkpointing):
    unet, network = make_tuned(layout, checkpointing)
    x, timesteps, context, target = make_batch(unet)
    parameters = list(network.parameters())
    with FeatureCapture(unet) as capture:
        prediction, terms = compared(unet, lambda: unet(x, timesteps, context), network.off, capture)
        parts = [WEIGHT * F.mse_loss(prediction, target), len(capture.layers) * terms["l_attn"]]
        parts += [len(capture.hidden) * terms[name] for name in ("l_mu", "l_sigma")]
        for _ in range(2):
            found = [torch.autograd.grad(part, parameters, retain_graph=True) for part in parts]
            total = torch.cat([sum(gradients).flatten() for gradients in zip(*found, strict=True)])
            assert relative_difference(total, lora_gradient(layout, "off")) < 1e-5
        # Of the last parameter alone: most places are not gone through, and that is no loss.
        torch.autograd.grad(parts[1], parameters[-1:], allow_unused=True)


def test_the_gradients_that_waited_are_freed_by_the_backward_pass_though_the_loss_is_kept():
    unet, network = make_tuned("up_blocks")
    with FeatureCapture(unet) as capture:
        kept = []
        make = Regularizers.observe

        class Watched(Regularizers):
            def observe(self, *args):
                contribution = make(self, *args)
                kept.append(contribution)
                return contribution

        x, timesteps, context, target = make_batch(unet)
        with frozen_base([unet], network.off), capture.record(frozen_reduction("separate", "eager")) as frozen:
            unet(x, timesteps, context)
        regularizers = Watched(frozen, capture.layers, len(capture.hidden))
        with capture.regularize(regularizers.observe) as observed:
            prediction = unet(x, timesteps, context)
        waiting = [weakref.ref(c.gradient) for c in kept if c.gradient is not None]
        assert len(waiting) == 2 * len(capture.layers)
        prediction, terms = capture.connect(prediction, observed, regularizers.values())
        loss = library_loss(capture, prediction, target, terms)
        loss.backward()
        assert [reference() for reference in waiting] == [None] * len(waiting)
        assert all(c.gradient is None for c in kept)
        assert loss.requires_grad


def test_queries_may_be_changed_in_place_by_the_layer():
    unet, network = make_tuned("up_blocks")
    wanted = lora_gradient("up_blocks", "off")
    attention = unet.up_blocks[3].attentions[0].attn2
    with FeatureCapture(unet) as capture:
        attention.to_q.register_forward_hook(lambda m, a, q: q.mul_(1.0))  # behind the library's
        captured_loss(unet, network, capture).backward()
    assert relative_difference(network.gradient(), wanted) < 1e-5


def test_a_model_compiled_after_the_capture_was_attached_is_an_error_and_not_a_run_without_regularizers():
    unet, _ = make_tuned("up_blocks")
    batch = make_batch(unet)[:3]
    capture = FeatureCapture(unet)
    compiled = torch.compile(unet, backend="eager")
    with (
        pytest.raises(AptError, match=r"the pass did not come through 6 of 6 places .* the model was compiled"),
        capture.regularize(lambda *_: AddOne()),
    ):
        compiled(*batch)


def test_a_u_net_that_runs_twice_in_one_pass_is_refused():
    unet, _ = make_tuned("up_blocks")
    batch = make_batch(unet)[:3]
    with (
        pytest.raises(AptError, match="ran twice in one pass; call the model once"),
        FeatureCapture(unet).regularize(lambda *_: AddOne()),
    ):
        unet(*batch)
        unet(*batch)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reading_what_has_no_graph_where_gradients_are_wanted_is_refused(layout):
    unet, _ = make_tuned(layout, "reentrant")
    batch = make_batch(unet)[:3]
    capture = FeatureCapture(unet)
    with pytest.raises(AptError, match="runs without a graph"), capture.record():
        unet(*batch)
    with torch.no_grad(), capture.record() as features:
        unet(*batch)
    assert len(features.queries) == len(capture.layers)


@pytest.fixture
def lost_gradient():
    """A capture whose last backward pass could not reach one layer: it ran under no_grad, without checkpointing."""
    unet, network = make_tuned("up_blocks")
    attention = unet.up_blocks[3].attentions[0].attn2
    attention.forward = torch.no_grad()(attention.forward)
    capture = FeatureCapture(unet)
    captured_loss(unet, network, capture).backward()
    return capture


def test_a_gradient_that_got_lost_is_an_error_at_verify_and_told_once(lost_gradient):
    with pytest.raises(AptError, match=r"lost at 2 places \(up_blocks\.3\.attentions\.0\.attn2\.to_q"):
        lost_gradient.verify()
    lost_gradient.verify()


def test_a_gradient_that_got_lost_is_an_error_at_the_next_pass(lost_gradient):
    with pytest.raises(AptError, match="gradient got lost"), lost_gradient.record():
        pass


def test_a_gradient_that_got_lost_is_an_error_at_the_end_and_the_hooks_come_off_all_the_same():
    unet, network = make_tuned("up_blocks")
    attention = unet.up_blocks[3].attentions[0].attn2
    attention.forward = torch.no_grad()(attention.forward)
    before = traces(unet)
    with pytest.raises(AptError, match="gradient got lost"), FeatureCapture(unet) as capture:
        captured_loss(unet, network, capture).backward()
    assert traces(unet) == before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_place_that_the_pass_does_not_come_through_is_an_error(layout):
    unet = make_unet(layout)
    capture = FeatureCapture(unet)
    attention = unet.get_submodule(capture.layers[-1].name)
    attention.to_k = nn.Linear(attention.to_k.in_features, WIDTH, bias=False)
    with pytest.raises(AptError) as caught, capture.record():
        unet(*make_batch(unet)[:3])
    assert f"({capture.layers[-1].name}.to_k)" in str(caught.value)


@pytest.mark.parametrize("blocks", [[], [0], [9]], ids=["none", "without attention", "no such block"])
def test_blocks_with_nothing_to_read_are_refused_and_nothing_is_hooked(blocks):
    unet = make_unet("up_blocks")
    before = traces(unet)
    with pytest.raises(AptError):
        FeatureCapture(unet, blocks)
    assert traces(unet) == before


def test_a_pass_that_is_not_differentiated_needs_no_connection():
    unet, _ = make_tuned("up_blocks")
    capture = FeatureCapture(unet)
    with torch.no_grad(), capture.regularize(lambda *_: AddOne()) as regularized:
        prediction = unet(*make_batch(unet)[:3])
    assert capture.connect(prediction, regularized, {})[0] is prediction
    capture.verify()

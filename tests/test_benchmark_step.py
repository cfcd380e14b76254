import csv
import importlib.util
import sys

import pytest
import torch
from benchmark_path import benchmarks_importable
from torch.nn import functional as F

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import diffusers
from diffusers import UNet2DConditionModel

from apt_hooks import AptError

with benchmarks_importable():
    import step
    import step_counting
    import step_least
    import step_memory
    import step_methods
    import step_models

torch.set_num_threads(1)

TINY = step_models.Setting("tiny", 64, 1, "bfloat16", "off", 77)


def training_of(setting, device="cpu"):
    return step_models.Training.make(step_models.make_denoiser(setting, device), setting)


# What is trained.


@pytest.mark.parametrize(("model", "count"), [("sdxl", 2567463684), ("sd21", 865910724), ("sd15", 859520964)])
def test_the_networks_are_those_published(model, count):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**step_models.MODELS[model].config)
    assert sum(p.numel() for p in unet.parameters()) == count


# Anima's is that of sd-scripts' own `Anima`, without its `llm_adapter`.
@pytest.mark.parametrize(("model", "count"), [("flux", 11901408320), ("anima", 1956405248)])
def test_the_transformers_are_those_published(model, count):
    config = step_models.MODELS[model]
    with torch.device("meta"):
        made = getattr(diffusers, config.kind.name)(**config.config)
    assert sum(p.numel() for p in made.parameters()) == count


@pytest.mark.parametrize("model", ["tiny-flux", "tiny-anima"])
def test_a_transformer_is_trained_and_counted_as_a_unet_is(model):
    setting = step_models.Setting(model, 64, 2, "float32", "nonreentrant", 8)
    names = ["floor", "eager"]
    training = training_of(setting)
    for method in step_methods.make_methods(names, {}, training).values():
        with method.prepared():
            method.step()
        gradients_of(training)
    found = step_counting.count(setting, names, {})
    assert found["eager"].peak > found["floor"].peak > found["floor"].before
    assert found["eager"]._replace(read=()) == really_counted(setting, "eager")


@pytest.mark.parametrize(
    ("model", "layers"),
    [("flux", 8 * 19 + 3 * 38), ("anima", 8 * 28), ("flux-wide", 8 * 2 + 3 * 2), ("anima-wide", 8 * 4)],
)
def test_all_attention_projections_of_a_transformer_carry_a_lora(model, layers):
    setting = step_models.Setting(model, 64, 1, "bfloat16", "off", 8)
    unet = step_models.make_denoiser(setting, "meta")
    assert sum("lora_A" in name for name, _ in unet.named_parameters()) == layers


def test_what_is_written_for_unets_is_refused_for_transformers(monkeypatch, capsys):
    with pytest.raises(AptError, match="obvious cannot be run here: it is written for U-Nets"):
        step_methods.choose_methods(["obvious"], "flux", "off", None)
    monkeypatch.setattr(sys, "argv", ["step_memory.py", "--least", "--model", "flux"])
    with pytest.raises(SystemExit, match="--least is written for U-Nets"):
        step_memory.main()


def test_the_lora_is_in_float32_and_the_rest_as_asked():
    unet = step_models.make_denoiser(TINY, "meta")
    assert {p.dtype for name, p in unet.named_parameters() if "lora_" not in name} == {torch.bfloat16}
    assert {p.dtype for p in unet.parameters() if p.requires_grad} == {torch.float32}


def test_under_reentrant_checkpointing_all_of_the_lora_gets_a_gradient():
    gradients = {}
    for checkpointing in ("off", "reentrant"):
        training = training_of(TINY._replace(dtype="float32", checkpointing=checkpointing))
        step_methods.make_methods(["plain"], {}, training)["plain"].step()
        gradients[checkpointing] = gradients_of(training)
    assert gradients["reentrant"].keys() == gradients["off"].keys()
    for name, gradient in gradients["off"].items():
        torch.testing.assert_close(gradients["reentrant"][name], gradient)


# The methods.


def gradients_of(training):
    found = {name: p.grad for name, p in training.unet.named_parameters() if p.requires_grad}
    assert found and all(gradient is not None for gradient in found.values())
    training.drop_gradients()
    return found


@pytest.mark.parametrize("checkpointing", ["off", "nonreentrant"])
def test_the_obvious_way_has_the_librarys_gradient(checkpointing):
    training = training_of(TINY._replace(dtype="float32", batch=2, checkpointing=checkpointing))
    found = {}
    for name, method in step_methods.make_methods(["plain", "idle", "eager", "obvious"], {}, training).items():
        with method.prepared():
            method.step()
            training.drop_gradients()
            method.step()  # the second, so that gamma has a say
            found[name] = gradients_of(training)
    far = 0.0
    for name, gradient in found["eager"].items():
        torch.testing.assert_close(found["obvious"][name], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))
        far = max(far, float((found["plain"][name] - gradient).abs().max() / gradient.abs().max()))
        assert torch.equal(found["idle"][name], found["plain"][name])
    assert far > 0.1  # it is not the plain step's


def test_the_obvious_way_leaves_the_processors_as_they_were():
    training = training_of(TINY)
    before = dict(training.unet.attn_processors)
    with step_methods.make_methods(["obvious"], {}, training)["obvious"].prepared():
        changed = [name for name, own in training.unet.attn_processors.items() if own is not before[name]]
    assert changed and all(name.startswith("up_blocks.0.") for name in changed)
    assert training.unet.attn_processors == before


def test_an_extra_method_has_the_keys_that_were_given():
    config = step_methods.parse_extra('frozen_every=2 blocks=[0] regularizer="joint"')
    assert (config.frozen_every, config.blocks, config.regularizer) == (2, (0,), "joint")
    assert step_methods.make_methods([], {"some": config}, training_of(TINY))["some"].period == 2


# Timing.


def test_each_round_begins_with_another_method_and_ratios_are_of_one_round(monkeypatch):
    order, clock = [], iter(range(1000))

    def timed(method, device, drop_gradients):
        order.append(method)
        seconds = (1 + next(clock)) * {"floor": 1.0, "other": 3.0}[method]
        return step.Timing(seconds, 100, 50) if method == "floor" else step.Timing(seconds, 300, 60)

    monkeypatch.setattr(step, "_timed", timed)
    measured = step.measure({"floor": "floor", "other": "other"}, 4, torch.device("cpu"), lambda: None)
    assert order == ["floor", "other", "other", "floor"] * 3
    assert [t.seconds for t in measured["floor"]] == [5, 8, 9, 12]
    rows = step.summarize(measured)
    # 18 / 5, 21 / 8, 30 / 9, 33 / 12: the mean of the middle two, 2.75 and 10 / 3.
    assert rows["other"]["to_floor"] == "3.0417" and rows["floor"]["to_floor_p80"] == "1.0000"
    assert rows["other"]["ms"] == "25500.0" and rows["other"]["ms_p20"] == "21000.0"
    assert rows["other"]["peak_to_floor"] == "3.000" and rows["other"]["peak_above_mib"] == step.mib(60)


def test_a_method_that_does_not_fit_is_left_out_and_the_floor_has_to(monkeypatch):
    def timed(method, device, drop_gradients):
        if method == "large":
            raise torch.cuda.OutOfMemoryError
        return step.Timing(1.0, 1, 1)

    monkeypatch.setattr(step, "_timed", timed)
    measured = step.measure({"floor": "small", "other": "large"}, 3, torch.device("cpu"), lambda: None)
    assert len(measured["floor"]) == 3 and step.summarize(measured)["other"] == {"ms": "out of memory"}
    with pytest.raises(step.AptError, match="has not the memory for the floor"):
        step.measure({"floor": "large"}, 3, torch.device("cpu"), lambda: None)


def test_gradients_are_dropped_between_the_steps_of_a_period():
    log = []
    method = step_methods.Method(lambda: log.append("step"), period=2)
    step._timed(method, torch.device("cpu"), lambda: log.append("drop"))
    assert log == ["step", "drop", "step"]


# Counting.


def test_bytes_alive_by_hand():
    x = torch.zeros(1000)
    with step_counting.LiveStorages([x, x.view(10, 100)]) as counter:
        assert (counter.live, counter.peak) == (4000, 4000)
        y = x * 2
        view = y[:500]
        z = y + 1
        assert (counter.live, counter.peak) == (12000, 12000)
        del y
        assert counter.live == 12000  # the view keeps it
        del view
        assert counter.live == 8000
        z = torch.cat([z, z])  # both live until the name is bound anew
        assert (counter.live, counter.peak) == (12000, 16000)
    assert counter.flops == 0 and z.numel() == 2000


def test_products_are_counted_as_pytorch_counts_them():
    x = torch.ones(3, 4, requires_grad=True)
    with step_counting.LiveStorages() as counter:
        (x @ torch.ones(4, 5)).sum().backward()
    assert counter.flops == 2 * 3 * 4 * 5 * 2  # forward, and back to x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_keeps_no_map(dtype):
    heads, queries, channels = 2, 4096, 40
    with step_counting.FakeTensorMode(), step_counting.LiveStorages() as counter:
        q, k, v = (torch.empty(1, heads, queries, channels, dtype=dtype, requires_grad=True) for _ in range(3))
        before = counter.live
        output = F.scaled_dot_product_attention(q, k, v)
        row_sums = heads * queries * 4
        assert counter.live - before == output.numel() * output.element_size() + row_sums
        assert counter.flops == 2 * 2 * heads * queries * queries * channels
        output.backward(torch.empty_like(output))
    assert counter.peak < heads * queries * queries * output.element_size()


def test_normalization_is_in_float32_as_autocast_has_it_on_cuda():
    x = torch.randn(2, 8, 4, 4, dtype=torch.bfloat16, requires_grad=True)

    def dtypes():
        with torch.autocast("cpu", torch.bfloat16):
            results = F.group_norm(x, 4), F.layer_norm(x, (4,)), x.softmax(-1), F.interpolate(x, scale_factor=2.0)
            return {y.dtype for y in results}, (x @ x).dtype

    with step_counting.cuda_autocast_rules():
        assert dtypes() == ({torch.float32}, torch.bfloat16)
        assert F.group_norm(x, 4).dtype == torch.bfloat16  # outside of autocast
    assert dtypes() == ({torch.bfloat16}, torch.bfloat16)


@pytest.fixture(scope="module")
def counts():
    fused = ["fused"] if importlib.util.find_spec("triton") else []
    return step_counting.count(TINY, ["floor", "eager", "obvious", *fused], {})


@pytest.mark.parametrize("method", ["eager", "obvious"])
def test_without_contents_the_count_is_that_of_real_tensors(counts, method):
    assert counts[method]._replace(read=()) == really_counted(TINY, method)


@pytest.mark.parametrize("checkpointing", ["nonreentrant", "reentrant"])
def test_so_it_is_with_checkpointing(counts, checkpointing):
    setting = TINY._replace(checkpointing=checkpointing)
    counted = step_counting.count(setting, ["eager"], {})["eager"]
    assert counted._replace(read=()) == really_counted(setting, "eager")
    assert counted.peak < counts["eager"].peak and counted.flops > counts["eager"].flops


def really_counted(setting, method):
    with step_counting.cuda_autocast_rules():
        return step_counting.count_methods(training_of(setting), [method], {})[method]


def test_alignment_does_the_least_arithmetic_that_it_can(counts):
    least = step_least.least(TINY)["alignment"]
    assert counts["eager"].flops - counts["floor"].flops == least.flops > 0
    if "fused" in counts:
        assert counts["fused"].flops == counts["eager"].flops


def test_the_librarys_step_leaves_nothing_behind_and_waits_for_no_device(counts):
    averages = 2 * 10 * 8  # of the indicator, float64
    for name in counts.keys() & {"eager", "fused"}:
        assert counts[name].after - counts[name].before == averages
        # What is checked at once on a CPU (timesteps in range, say), and on a device when it has come to it.
        assert {place.split(": ")[1] for place in counts[name].read} == {"check(numbers.tolist())"}
    assert counts["floor"].after == counts["floor"].before and counts["floor"].read == ()


def test_the_least_by_hand():
    # One layer: 1 sample, 4 queries, 3 tokens, width 2, 2 bytes a number.
    assert step_least.least_alignment(1, 4, 3, 2, 2) == (2 * 2 * (3 * 4 + 3 * 3), 4 * 2 * (4 * 3 * 2))
    assert step_least.least_statistics(1, 4, 2, 2) == (2 * 2 * 4 * 4, 8 * 2 * 4)


def test_the_least_grows_with_batch_pixels_and_tokens():
    one, grown = step_least.least(TINY), step_least.least(TINY._replace(batch=4))
    assert all(grown[name] == tuple(4 * number for number in one[name]) for name in one)
    assert step_least.least(TINY._replace(px=128))["alignment"].flops == 4 * one["alignment"].flops
    longer = step_least.least(TINY._replace(tokens=154))
    assert longer["alignment"].flops == 2 * one["alignment"].flops and longer["statistics"] == one["statistics"]


# The programs.


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Calls a benchmark with options; returns the rows of its file."""

    def call(module, *options):
        out = tmp_path / "rows.csv"
        monkeypatch.setattr(sys, "argv", [module.__name__, "--out", str(out), *options])
        module.main()
        return list(csv.DictReader(out.open(newline=""))) if out.exists() else []

    call.out = tmp_path / "rows.csv"
    return call


def test_rows_are_appended(call, capsys):
    options = ("--smoke", "--methods", "plain,dco", "--extra", "frozen_every=2")
    rows = [call(step, *options) for _ in range(2)][1]
    assert [row["method"] for row in rows] == ["plain", "floor", "dco", "frozen_every=2"] * 2
    assert rows[1]["to_floor"] == "1.0000" and all(float(row["ms"]) > 0 and row["peak_mib"] == "" for row in rows)
    setting = {"model": "tiny", "px": "64", "batch": "1", "dtype": "float32", "checkpointing": "off", "tokens": "77"}
    assert all(setting.items() <= row.items() for row in rows)
    assert all(row[name] for row in rows for name in ("device", "threads", "torch", "diffusers", "commit"))
    assert "to_floor_p20" in capsys.readouterr().out


def test_memory_is_counted_and_appended(call, capsys):
    (row,) = call(step_memory, "--smoke", "--methods", "floor")
    assert (row["method"], row["device"], row["peak_to_floor"]) == ("floor", "counted", "1.000")
    assert 0 < float(row["above_mib"]) < float(row["peak_mib"])
    assert "tiny 64 px, batch 1, bfloat16, checkpointing off" in capsys.readouterr().out


def test_the_least_is_printed(call, capsys):
    assert call(step_memory, "--least", "--model", "tiny") == []
    header, usual, *_ = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["model", "batch", "px", "tokens"] and usual.split()[:4] == ["tiny", "1", "64", "77"]


@pytest.mark.parametrize(
    ("module", "options", "said"),
    [
        (step, ("--model", "sd3"), "--model takes sdxl, .*; found 'sd3'"),
        (step, ("--px", "100"), "--px must be a multiple of 64, above 0; found 100"),
        (step, ("--rounds", "0"), "--rounds must be at least 1; found 0"),
        (step, ("--methods", "plain,fast"), "--methods takes plain, .*; found 'fast'"),
        (step, ("--methods", "fused", "--device", "cpu"), "fused cannot be run here: Triton's kernels need a CUDA"),
        (
            step,
            ("--methods", "obvious", "--checkpointing", "reentrant"),
            "obvious cannot be run here: what it",
        ),
        (step, ("--device", "nonsense"), "--device nonsense cannot be used here: "),
        (step, ("--extra", "lambda_atn=2"), 'no such key; did you mean "lambda_attn"'),
        (step, ("--extra", "regularizer=joint"), "--extra takes 'KEY=VALUE ...', values as in TOML; found"),
        (step, ("--extra", ""), "--extra must leave something to do in a step"),
        (step, ("--out", "/nowhere/rows.csv"), "--out /nowhere/rows.csv: cannot be written: "),
        (step_memory, ("--model", "sdxl,sd3"), "--model takes sdxl, .*; found 'sd3'"),
        (step_memory, ("--batch", "1,0"), "--batch must be at least 1; found 0"),
        (step_memory, ("--checkpointing", "on"), "--checkpointing takes off, nonreentrant, reentrant; found 'on'"),
    ],
)
def test_wrong_options_are_told_in_one_line(call, module, options, said):
    with pytest.raises(SystemExit, match=said) as ended:
        call(module, *options)
    assert str(ended.value.code).count("\n") == 0


def test_a_file_with_other_columns_is_not_touched(call):
    call.out.write_text("what,median_ms\n")
    with pytest.raises(SystemExit, match="has other columns than this benchmark's"):
        call(step, "--smoke")
    assert call.out.read_text() == "what,median_ms\n"

import concurrent.futures
import importlib
import itertools
import json
import sys

import pytest
import torch
from benchmark_path import benchmarks_importable

for package in ("diffusers", "peft", "rich", "safetensors"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def benchmark():
    with benchmarks_importable():
        return importlib.import_module("tinyworld")


# The tables.


def row(benchmark, **scores):
    return {**dict.fromkeys(benchmark.COLUMNS, 0.5), "frechet": 40.0, **scores}


def cells(lines, name):
    """The cells of a method in the tables of scores."""
    lines = list(itertools.takewhile(lambda line: not line.startswith("Pairs in which"), lines))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    header = rows[0]
    return [dict(zip(header, found, strict=True)) for found in rows if found[0] == name]


def test_the_error_is_that_of_the_concepts_means(benchmark):
    recalls = {(4, 0): 0.2, (4, 1): 0.4, (5, 0): 0.5, (5, 1): 0.7}
    found = {"apt": {place: row(benchmark, recall=recall) for place, recall in recalls.items()}, "dreambooth": {}}
    lines = benchmark.tables(found, ["apt"], by_concept=True)
    # The means 0.3 and 0.6 deviate by 0.15 from theirs: 0.15 * sqrt(2) / sqrt(2).
    assert cells(lines, "apt")[0]["recall"] == "0.450 ± 0.150"
    assert cells(lines, "apt")[0]["runs"] == "4"
    assert lines[0] == "Mean ± standard error over concepts, each the mean of its seeds:"


def test_of_one_concept_the_error_is_that_of_its_seeds(benchmark):
    found = {"apt": {(4, seed): row(benchmark, recall=0.2 + 0.2 * seed) for seed in (0, 1)}, "dreambooth": {}}
    lines = benchmark.tables(found, ["apt"], by_concept=False)
    assert cells(lines, "apt")[0]["recall"] == "0.300 ± 0.100"
    assert lines[0] == "Mean ± standard error over the seeds of one concept:"


def test_differences_are_paired_by_concept_and_seed(benchmark):
    dreambooth = {
        (4, 0): row(benchmark, frechet=40.0, text=0.8),
        (4, 1): row(benchmark, frechet=80.0, text=0.6),
        (5, 0): row(benchmark, frechet=10.0, text=0.1),
        (6, 0): row(benchmark, frechet=1.0, text=0.0),
    }
    apt = {
        (4, 0): row(benchmark, frechet=30.0, text=0.9),  # -25 %, +0.1
        (4, 1): row(benchmark, frechet=60.0, text=0.9),  # -25 %, +0.3
        (5, 0): row(benchmark, frechet=5.5, text=0.1),  # -45 %, +0
        (7, 0): row(benchmark, frechet=9.0, text=0.0),  # without a partner
    }
    lines = benchmark.tables({"dreambooth": dreambooth, "apt": apt}, ["dreambooth", "apt"], by_concept=True)
    plain, paired = cells(lines, "apt")
    assert plain["runs"] == "4" and paired["runs"] == "3"
    assert paired["frechet"] == "-35.00 ± 10.00" and paired["text"] == "+0.100 ± 0.100"
    assert len(cells(lines, "dreambooth")) == 1


def test_what_has_no_runs_is_a_dash_and_one_value_has_no_error(benchmark):
    found = {"dreambooth": {}, "apt": {(4, 0): row(benchmark)}, "dco": {}}
    lines = benchmark.tables(found, ["dco", "apt"], by_concept=True)
    assert [{c[name] for name in benchmark.COLUMNS} for c in cells(lines, "dco")] == [{"-"}, {"-"}]
    assert cells(lines, "apt")[0]["frechet"] == "40.00" and cells(lines, "apt")[1]["frechet"] == "-"


def test_pairs_are_counted_in_which_all_that_is_asked_holds(benchmark):
    dreambooth = {(4, seed): row(benchmark, frechet=40.0, identity=0.5) for seed in range(4)}
    apt = {
        (4, 0): row(benchmark, frechet=30.0, recall=0.6, text=0.6, identity=0.46),
        (4, 1): row(benchmark, frechet=30.0, recall=0.6, text=0.5, identity=0.6),
        (4, 2): row(benchmark, frechet=41.0, recall=0.6, text=0.6, identity=0.6),
        (4, 3): row(benchmark, frechet=30.0, recall=0.4, text=0.6, identity=0.44),
    }
    lines = benchmark.tables({"dreambooth": dreambooth, "apt": apt}, ["dreambooth", "apt"], by_concept=False)
    assert "| apt | 4 | 3 | 3 | 3 | 3 | 1 |" in lines


def test_the_pairs_that_half_a_difference_takes(benchmark):
    # Differences of -10, -20 and -30 percent: a mean of -20, a deviation of 10, and 2 * 10 / sqrt(4) = 20 / 2.
    dreambooth = {(4, seed): row(benchmark, frechet=40.0) for seed in range(3)}
    apt = {(4, seed): row(benchmark, frechet=frechet) for seed, frechet in enumerate((36.0, 32.0, 28.0))}
    lines = benchmark.tables({"dreambooth": dreambooth, "apt": apt}, ["dreambooth", "apt"], by_concept=False)
    assert lines[-1].startswith("| apt | 4 | - |")


def test_curves_are_drawn_of_the_steps_that_all_runs_have(benchmark, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(benchmark, "draw_curves", lambda path, curves: drawn.update(curves))
    scores = {"text": 0.9, "identity": 0.1}
    runs = {
        (4, 0): {**row(benchmark, text=0.8, identity=0.3), "steps": 9, "curve": {"3": scores, "6": scores}},
        (4, 1): {**row(benchmark, text=0.6, identity=0.5), "steps": 9, "curve": {"3": scores}},
    }
    found = {"apt": runs, "base": {(4, 0): {**row(benchmark), "curve": {}}}}
    benchmark._draw_curves(tmp_path / "curves.png", found, by_concept=False)
    assert list(drawn) == ["APT"] and list(drawn["APT"]) == [3, 9]
    assert drawn["APT"][3] == {"text": pytest.approx((0.9, 0)), "identity": pytest.approx((0.1, 0))}
    # Mean, and a deviation of 0.1 * sqrt(2) over sqrt(2).
    assert drawn["APT"][9] == {"text": pytest.approx((0.7, 0.1)), "identity": pytest.approx((0.4, 0.1))}
    runs[5, 0] = {**row(benchmark, text=0.9, identity=0.4), "steps": 9, "curve": {"3": scores}}
    benchmark._draw_curves(tmp_path / "curves.png", found, by_concept=True)
    # Concept 4 is 0.7, the mean of its seeds, as in the tables: 0.7 and 0.9 are of a mean of 0.8.
    assert drawn["APT"][9] == {"text": pytest.approx((0.8, 0.1)), "identity": pytest.approx((0.4, 0), abs=1e-12)}


def test_earlier_steps_have_their_tables_and_the_reference_may_be_another(benchmark, tmp_path, monkeypatch, capsys):
    comparison = benchmark.Comparison(benchmark.Training(), checkpoints=[300])
    rows = []
    for name, text in (("dreambooth", 0.7), ("apt", 0.8), ("l2-sp", 0.9)):
        for concept in (4, 5):
            (settings,) = comparison.asked([name], [(concept, 0)])[name].values()
            earlier = {key: value for key, value in row(benchmark).items() if key != "delta_noise"}
            earlier["text"] = text - 0.1 * (concept == 5 and name == "l2-sp")
            rows.append({**settings, **row(benchmark, text=text), "curve": {"300": earlier}})
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    options = ["--methods", "apt,l2-sp", "--less", "apt", "--concepts", "4,5", "--seeds", "0", "--checkpoints", "300"]
    monkeypatch.setattr(sys, "argv", ["tinyworld.py", "--out", str(tmp_path), "--table-only", *options])
    monkeypatch.setattr(benchmark, "draw_curves", lambda *_: None)
    benchmark.main()
    last, earlier = capsys.readouterr().out.split("After 300 steps:")
    assert "Difference to apt" in last and "Difference to apt" in earlier and "dreambooth" not in last + earlier
    assert [each["text"] for each in cells(last.splitlines(), "l2-sp")] == ["0.900 ± 0.000", "+0.100 ± 0.000"]
    assert [each["text"] for each in cells(earlier.splitlines(), "l2-sp")] == ["0.850 ± 0.050", "+0.050 ± 0.050"]
    assert [each["text"] for each in cells(earlier.splitlines(), "apt")] == ["0.800 ± 0.000"]


# What is run.


@pytest.fixture
def bench(benchmark, monkeypatch, tmp_path):
    """Calls the benchmark with options; what it runs is only written down. Returns concept, seed and method of it."""
    log, ran = tmp_path / "runs.jsonl", []

    def run_group(log, group, comparison):
        for settings in group:
            if settings["concept"] == 7:
                raise ValueError("no picture")
            ran.append((settings["concept"], settings["seed"], settings["method"]))
            scores = row(benchmark, recall=settings["concept"] / 10)
            benchmark.append_line(log, json.dumps({**settings, **scores, "device": "a machine"}))

    def call(*options):
        ran.clear()
        common = ["--concepts", "4", "--seeds", "0", "--methods", "dreambooth,apt"]
        monkeypatch.setattr(sys, "argv", ["tinyworld.py", "--out", str(tmp_path), *common, *options])
        benchmark.main()
        return sorted(ran)

    monkeypatch.setattr(benchmark, "run_group", run_group)
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", concurrent.futures.ThreadPoolExecutor)
    call.log = log
    return call


BOTH = [(4, 0, "apt"), (4, 0, "dreambooth")]


def test_only_what_is_missing_is_run(bench):
    assert bench() == BOTH and bench() == []
    assert bench("--seeds", "0,1", "--methods", "dreambooth,apt,dco") == [
        (4, 0, "dco"),
        (4, 1, "apt"),
        (4, 1, "dco"),
        (4, 1, "dreambooth"),
    ]
    assert bench("--methods", "dco,dco", "--concepts", "4,4") == []
    assert bench("--seeds", "2", "--table-only") == []


@pytest.mark.parametrize("options", [("--steps", "7"), ("--scenes", "5"), ("--repeats", "3")])
def test_runs_of_other_settings_are_neither_taken_for_these_nor_touched(bench, capsys, options):
    bench()
    before, _ = bench.log.read_text(), capsys.readouterr()
    bench(*options, "--table-only")
    assert [c["recall"] for c in cells(capsys.readouterr().out.splitlines(), "apt")] == ["-", "-"]
    assert bench(*options) == BOTH and bench() == []
    assert bench.log.read_text().startswith(before)
    assert cells(capsys.readouterr().out.splitlines(), "apt")[0]["runs"] == "1"


def test_an_override_is_another_setting_for_the_methods_that_it_changes(bench, benchmark):
    own = benchmark.method_config("apt").lambda_attn
    bench()
    assert bench("--set", f"lambda_attn={own}") == []
    assert bench("--set", f"lambda_attn={own + 1}") == [(4, 0, "apt")]


def test_a_key_of_another_objective_is_no_setting_of_a_method(bench, benchmark):
    four = ("--methods", "dreambooth,apt,dco,l2-sp")
    bench(*four)
    rows = benchmark.read_rows(bench.log)
    assert bench(*four, "--set", "lambda_offset=0.7") == [(4, 0, "apt"), (4, 0, "l2-sp")]
    assert bench(*four, "--set", "dco_beta=7") == [(4, 0, "dco")]
    # Older rows have all keys, and `lambda_offset` for what it comes to, which was nothing but for L2-SP.
    for row in rows:
        assert row["apt"].pop("offset_weight") == (3e-5 if row["method"] == "l2-sp" else 0)
        row["apt"] = {"dco_beta": 3.0, **row["apt"], "lambda_offset": 3e-5}
    bench.log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert bench(*four) == []
    assert bench("--methods", "apt,l2-sp", "--set", "lambda_offset=3e-5") == [(4, 0, "apt")]
    assert bench("--methods", "apt", "--set", "lambda_offset=0") == []


def test_other_weights_are_another_setting(bench, benchmark, monkeypatch, tmp_path):
    bench()
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"others")
    monkeypatch.setattr(benchmark, "PIPELINES", {"unet": tmp_path})
    assert bench() == BOTH


@pytest.mark.parametrize("name", ["guidance", "sampling_steps"])
def test_another_way_of_sampling_is_another_setting(bench, benchmark, monkeypatch, name):
    bench()
    denoiser = type(benchmark.DENOISERS["unet"])
    monkeypatch.setattr(denoiser, name, getattr(denoiser, name) + 1)
    assert bench() == BOTH


@pytest.mark.parametrize("option", ["--model transformer", "--learning-rate 1e-3", "--rank 4", "--checkpoints 1"])
def test_another_model_or_training_is_another_setting(bench, option):
    bench()
    assert bench(*option.split()) == BOTH


def test_a_line_that_was_cut_off_is_made_again(bench, capsys):
    bench()
    whole = bench.log.read_text()
    capsys.readouterr()
    bench.log.write_text(whole[:-30])
    bench("--table-only")
    assert cells(capsys.readouterr().out.splitlines(), "apt")[0]["runs"] == "0"
    assert bench.log.read_text() == whole[:-30]
    assert bench() == [(4, 0, "apt")]
    capsys.readouterr()
    assert bench() == []
    assert cells(capsys.readouterr().out.splitlines(), "apt")[0]["runs"] == "1"


def test_a_failure_is_told_at_the_end_and_loses_nothing_else(bench, capsys):
    with pytest.raises(SystemExit) as ended:
        bench("--concepts", "4,7,8")
    assert str(ended.value.code) == (
        "apt-hooks: error: failed, and made again by the same command: "
        "concept 7, seed 0, dreambooth, apt (learning_rate 0.003): ValueError('no picture')"
    )
    assert cells(capsys.readouterr().out.splitlines(), "apt")[0]["recall"] == "0.600 ± 0.200"
    assert bench("--concepts", "4,8") == []


def test_that_a_process_was_killed_is_told_once(benchmark):
    futures = {concurrent.futures.Future(): f"run {number}" for number in range(4)}
    for number, future in enumerate(futures):
        killed = concurrent.futures.process.BrokenProcessPool("terminated abruptly")
        future.set_result(None) if number == 0 else future.set_exception(OSError("full") if number == 1 else killed)
    assert sorted(benchmark.failures(futures)) == [
        "2 of 4 not done, as a process was killed (is there too little memory?)",
        "run 1: OSError('full')",
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--methods", "apt,lora"), "--methods takes ideal, base, dreambooth, dco, .*; found 'lora'"),
        (("--concepts", "4,14"), "--concepts takes 0, 1, .*, 13, separated by commas; found 14"),
        (("--set", "lambda_atn=2"), 'no such key; did you mean "lambda_attn"'),
        (("--set", "lambda_attn=-2"), "lambda_attn must be a number, 0 or larger .*; found -2"),
        (("--set", "lambda_attn"), "--set takes KEY=VALUE, the value in JSON; found 'lambda_attn'"),
        (("--checkpoints", "100,600"), "--checkpoints must be from 1 to below --steps, here 600; found 600"),
        (("--rank", "0"), "--rank must be at least 1; found 0"),
        (("--steps", "0"), "--steps must be at least 1; found 0"),
    ],
)
def test_wrong_options_are_told_in_one_line_before_anything_runs(bench, options, said):
    with pytest.raises(SystemExit, match=said) as ended:
        bench(*options)
    assert str(ended.value.code).count("\n") == 0 and not bench.log.exists()


# Rivals.


@pytest.fixture
def rivals(benchmark, monkeypatch, tmp_path):
    """Calls the benchmark of rivals; what it trains is written down, with scores that are made here."""
    with benchmarks_importable():
        module = importlib.import_module("rivals")
    ran = []

    def run_group(log, group, comparison):
        for settings in group:
            config, rate = settings["apt"], settings["learning_rate"]
            if settings["method"] == "ata":
                assert config["lambda_attn"] == 0
            ran.append((settings["method"], settings["concept"], rate, settings["steps"]))
            # DreamBooth is best with the smaller rate, DCO with 100, APT with 0.3 and the larger rate, stopped early.
            good = {"dreambooth": rate == 1e-3, "apt": False, "dco": rate == 3e-3 and config.get("dco_beta") == 100}
            end = row(benchmark, identity=0.4 if good.get(settings["method"]) else 0.2)
            early = settings["method"] == "apt" and rate == 3e-3 and config["lambda_attn"] == 0.3
            half = {**end, "identity": 0.3 if early else 0.1}
            if settings["concept"] == 5 and settings["method"] in ("apt", "ata"):
                end = half = row(benchmark, identity=0.4)
            if settings["method"] == "ideal":
                end = row(benchmark, text=1.0, identity=0.8)
            curve = {str(step): half for step in settings["checkpoints"]}
            benchmark.append_line(log, json.dumps({**settings, **end, "curve": curve}))

    def call(*options):
        ran.clear()
        monkeypatch.setattr(sys, "argv", ["rivals.py", "--out", str(tmp_path), *options])
        module.main()
        return sorted(set(ran))

    monkeypatch.setattr(benchmark, "run_group", run_group)
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", concurrent.futures.ThreadPoolExecutor)
    return call


def test_each_rival_is_reported_as_it_was_best_on_the_concepts_for_tuning(rivals, capsys):
    ran = rivals("--methods", "dreambooth,dco,apt,ata", "--concepts", "4,5")
    said = capsys.readouterr().out
    tuned = {name: {(rate, steps) for n, c, rate, steps in ran if n == name and c in (0, 2, 3)} for name, *_ in ran}
    both = {(1e-3, 600), (3e-3, 600)}
    assert tuned == {"ideal": {(1e-3, 600)}, "dreambooth": both, "dco": both, "apt": both, "ata": set()}
    reported = {(name, rate, steps) for name, concept, rate, steps in ran if concept in (4, 5)}
    # APT stopped early, and its part as it; trained for as long only, and the part still without alignment.
    trained = {("dreambooth", 1e-3, 600), ("dco", 3e-3, 600), ("apt", 3e-3, 300), ("ata", 3e-3, 300)}
    assert reported == {*trained, ("ideal", 3e-3, 600)}
    assert "| dco | > 0.003, dco_beta 100, 600 steps |" in said and "| dreambooth | 0.001, 600 steps | 2 |" in said
    # Of 0.5 and 0.5, and of 0.5 and 0.25 on concept 4 alone; the part sets its own lambda_attn.
    assert "| apt | 0.003, lambda_attn 0.3, 300 steps | 2 | 0.417 ± 0.083 | -0.083 ± 0.083 |" in said
    assert "| ata | 0.003, 300 steps | 2 | 0.417 ± 0.083 | -0.083 ± 0.083 |" in said
    # Text 0.5 of 1, identity 0.4 of 0.8.
    assert "| dreambooth | > 0.001, 600 steps | 0.500 | 0.500 | 0.400 |" in said
    assert rivals("--methods", "dreambooth,dco,apt,ata", "--concepts", "4,5") == []
    assert {name for name, *_ in rivals("--methods", "prior", "--tune-only")} == {"prior"}


def test_the_scores_differences_are_of_the_same_concept(rivals, tmp_path, capsys):
    rivals("--methods", "dreambooth,apt", "--concepts", "4,5")
    log = tmp_path / "runs.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    lost = next(row for row in rows if row["method"] == "dreambooth" and row["concept"] == 4)
    log.write_text("".join(json.dumps(row) + "\n" for row in rows if row is not lost))
    capsys.readouterr()
    rivals("--methods", "dreambooth,apt", "--concepts", "4,5", "--table-only")
    assert "| apt | 0.003, lambda_attn 0.3, 300 steps | 2 | 0.417 ± 0.083 | +0.000 |" in capsys.readouterr().out
    lost = next(row for row in rows if row["method"] == "ideal" and row["concept"] == 4)
    log.write_text("".join(json.dumps(row) + "\n" for row in rows if row is not lost))
    rivals("--methods", "dreambooth,apt", "--concepts", "4,5", "--table-only")
    said = capsys.readouterr().out
    assert "Without a score, as `ideal` has not run there (concept, seed): 4, 0\n" in said
    assert "| apt | 0.003, lambda_attn 0.3, 300 steps | 2 | 0.500 | +0.000 |" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--concepts", "0,4"), "--concepts takes 1, 4, 5, .*; found 0"),
        (("--methods", "lora"), "--methods takes dreambooth, dco, .*; found 'lora'"),
        (("--repeats", "0"), "--repeats must be at least 1; found 0"),
        (("--workers", "0"), "--workers must be at least 1; found 0"),
    ],
)
def test_wrong_options_of_rivals_are_told_before_anything_runs(rivals, tmp_path, options, said):
    with pytest.raises(SystemExit, match=said):
        rivals(*options)
    assert not (tmp_path / "runs.jsonl").exists()


def test_a_method_whose_tuning_is_not_whole_is_neither_chosen_for_nor_reported(rivals, tmp_path, capsys):
    assert rivals("--table-only") == []
    assert "| dreambooth |" not in capsys.readouterr().out
    rivals("--methods", "dreambooth,apt,ata", "--tune-only")
    log = tmp_path / "runs.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    lost = next(r for r in rows if r["method"] == "apt" and r["learning_rate"] == 3e-3 and r["concept"] == 2)
    log.write_text("".join(json.dumps(row) + "\n" for row in rows if row is not lost))
    capsys.readouterr()
    assert rivals("--methods", "dreambooth,apt,ata", "--concepts", "4", "--table-only") == []
    said = capsys.readouterr().out
    assert (
        "| dreambooth | > " in said and "| apt | > " not in said and "| apt | 0.001, lambda_attn 1, 600 steps |" in said
    )
    assert "Not tuned yet, and not reported: apt" in said and "| ata |" not in said


@pytest.fixture
def apt_options(benchmark, monkeypatch, tmp_path, capsys):
    """Calls the benchmark of options, returns what it says; what it trains is in `ran`, its text score made here."""
    with benchmarks_importable():
        module = importlib.import_module("apt_options")

    def run_group(log, group, comparison):
        for settings in group:
            config, concept = settings["apt"], settings["concept"]
            call.ran.append((settings["method"], concept, json.dumps(config, sort_keys=True)))
            text = 0.6 if settings["method"] == "dreambooth" else 0.9 - 0.1 * config["frozen_every"]
            # On concept 2 more is lost by it, and all is better.
            text += concept * (0.02 - 0.01 * (config["frozen_every"] - 1))
            benchmark.append_line(log, json.dumps({**settings, **row(benchmark, text=text), "curve": {}}))

    def call(*options):
        call.ran = []
        monkeypatch.setattr(sys, "argv", ["apt_options.py", "--out", str(tmp_path), *options])
        module.main()
        return capsys.readouterr().out

    monkeypatch.setattr(benchmark, "run_group", run_group)
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", concurrent.futures.ThreadPoolExecutor)
    return call


def texts(said, option):
    """Value and text of an option's rows, in the table of differences to DreamBooth and in that to the preset."""
    tables = said.split("And to APT with")
    return [[(found["value"], found["text"]) for found in cells(table.splitlines()[1:], option)] for table in tables]


def test_each_value_of_an_option_of_apt_is_compared_to_dreambooth_and_to_the_preset(apt_options, tmp_path):
    options = ("--options", "frozen_every,lambda_attn", "--concepts", "0,2")
    said = apt_options(*options)
    # On each concept DreamBooth, three and four values, of which the preset is both options': made once.
    assert len(apt_options.ran) == len(set(apt_options.ran)) == 2 * (1 + 3 + 4 - 1)
    to_dreambooth, to_preset = texts(said, "frozen_every")
    assert to_dreambooth == [("> 1", "+0.200 ± 0.000"), ("2", "+0.090 ± 0.010"), ("4", "-0.130 ± 0.030")]
    assert to_preset == [("2", "-0.110 ± 0.010"), ("4", "-0.330 ± 0.030")]
    assert [value for value, _ in texts(said, "lambda_attn")[1]] == ["0.0", "0.3", "3.0"]
    assert (tmp_path / "options.png").stat().st_size > 0
    apt_options(*options, "--table-only")
    apt_options(*options)
    assert apt_options.ran == []


def test_an_option_with_other_keys_beside_it_is_compared_to_the_presets_value_with_these(apt_options):
    said = apt_options("--options", "augment_border", "--concepts", "0")
    found = texts(said, "augment_border, augment_max_probability = 0.4")
    assert found == [[("learn", "+0.200"), ("ignore", "+0.200")], [("ignore", "+0.000")]]
    said = apt_options("--options", "lambda_offset,lambda_attn+offset", "--concepts", "0")
    with_offset = [[value for value, _ in table] for table in texts(said, "lambda_attn, lambda_offset = 3e-05")]
    assert with_offset == [["0.0", "0.3", "1.0"], ["0.0", "0.3"]]
    assert [[value for value, _ in table] for table in texts(said, "lambda_offset")] == [
        ["> 0.0", "1e-05", "3e-05", "0.0001"],
        ["1e-05", "3e-05", "0.0001"],
    ]


def test_the_error_of_an_options_value_on_one_concept_is_that_of_its_seeds(apt_options):
    said = apt_options("--options", "frozen_every", "--concepts", "2", "--seeds", "0,1")
    assert texts(said, "frozen_every")[1] == [("2", "-0.120 ± 0.000"), ("4", "-0.360 ± 0.000")]
    assert "standard error over the seeds of one concept" in said


def test_without_runs_there_are_dashes_and_no_picture_of_apts_options(apt_options, tmp_path):
    assert "| frozen_every | > 1 | 0 | - |" in apt_options("--table-only", "--options", "frozen_every")
    assert not (tmp_path / "options.png").exists()


@pytest.mark.parametrize(("wrong", "named"), [("--options", "augment_borde"), ("--repeats", "0")])
def test_wrong_options_of_apts_options_are_told(apt_options, wrong, named):
    with pytest.raises(SystemExit, match=wrong):
        apt_options(wrong, named)


@pytest.fixture(scope="module")
def blending():
    with benchmarks_importable():
        return importlib.import_module("dreamblend")


def test_interpolated_loras_change_each_weight_by_their_shares(blending, tmp_path):
    from safetensors.torch import load_file, save_file

    changes = []
    for step in (10, 600):
        lora = {
            f"unet.to_q.lora_{side}.weight": torch.randn(3, 5).mT if side == "B" else torch.randn(3, 7) for side in "AB"
        }
        save_file({name: tensor.contiguous() for name, tensor in lora.items()}, tmp_path / f"{step}.safetensors")
        changes.append(lora["unet.to_q.lora_B.weight"] @ lora["unet.to_q.lora_A.weight"])
    mixed = load_file(blending.interpolated(tmp_path / "10.safetensors", tmp_path / "600.safetensors", 0.25, tmp_path))
    found = mixed["unet.to_q.lora_B.weight"] @ mixed["unet.to_q.lora_A.weight"]
    torch.testing.assert_close(found, 0.75 * changes[0] + 0.25 * changes[1])
    mixed = load_file(blending.interpolated(None, tmp_path / "600.safetensors", 0.25, tmp_path))
    found = mixed["unet.to_q.lora_B.weight"] @ mixed["unet.to_q.lora_A.weight"]
    torch.testing.assert_close(found, 0.25 * changes[1])


def test_blends_are_paired_with_their_late_checkpoint_and_that_of_the_nearest_text_on_the_front(blending, capsys):
    def rows(early, late, text, identity, apart=0.0, **way):
        # The second concept has its own level, and the second seed is there for some alone: neither tells anything.
        for concept, seed, level, off in ((4, 0, 0.0, 0.0), (5, 0, -0.2, apart), (5, 1, -0.3, 0.0)):
            if seed == 0 or early is None:
                row = {"concept": concept, "seed": seed, "early": early, "late": late, "frechet": 900.0, **way}
                yield {**row, "text": text + level + off, "identity": identity + level - off}

    every = [*rows(None, 600, 0.8, 0.5), *rows(75, 600, 0.92, 0.45, 0.04, guidance_lr=1.0), *rows(None, 75, 0.9, 0.4)]
    every += [*rows(75, 600, 0.82, 0.55, switch_at=3), *rows(None, 150, 0.82, 0.3)]  # the last is beaten by both
    blending.print_differences(blending.by_point(every))
    table = capsys.readouterr().out.splitlines()[5:]
    assert table == [
        "| 600 | 75 | 3 | -0.100 ± 0.000 | +0.100 ± 0.000 |",
        "| 600 | 150 | 3 | -0.020 ± 0.000 | +0.200 ± 0.000 |",
        # One concept's blend has .04 more text and as much less identity: a deviation of .02 * sqrt(2), over sqrt(2).
        "| 75 + 600, blend | 75 | 2 | +0.040 ± 0.020 | +0.030 ± 0.020 |",
        "| 75 + 600, blend | 600 | 2 | +0.140 ± 0.020 | -0.070 ± 0.020 |",
        "| 75 + 600, blend | 75 + 600, late from step 3 | 2 | +0.120 ± 0.020 | -0.120 ± 0.020 |",
        "| 75 + 600, late from step 3 | 600 | 2 | +0.020 ± 0.000 | +0.050 ± 0.000 |",
    ]

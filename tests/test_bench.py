"""The benches: every case builds and runs, the timer's arithmetic, the command, the results files and the README."""

import contextlib
import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from phyxdream import ops
from phyxdream.bench import SUITES, command, load_suite, plots, results, suite, table, timing
from phyxdream.cli import main
from phyxdream.errors import ConfigError, MissingDependency
from phyxdream.ops.backend import status

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def malloc_as_it_is(monkeypatch):
    monkeypatch.setattr(command, "keep_freed_memory", lambda: True)  # it lasts as long as the process


# ---------------------------------------------------------------------------------------------------------------------
# Suites.


@pytest.mark.parametrize("name", SUITES)
def test_every_case_of_the_smallest_size_runs_on_all_its_contenders(name):
    bench = load_suite(name)
    assert bench.name == name
    size = bench.sizes()[0]
    for case in bench.cases:
        if case.size != size:
            continue
        names = case.contenders(CPU)
        try:
            with suite.enter(case, CPU, names) as entry:  # which calls each of them once
                allowed = {"cpu"} if status()["cpu"] else {"memcpy"}  # a floor that needs a compiler
                assert set(entry.skipped) <= allowed, (str(case), entry.skipped)
                assert {c.name for c in entry.contenders} == set(names) - set(entry.skipped)
                assert entry.work is None or entry.work.amount > 0
        except MissingDependency as error:
            pytest.skip(str(error))


def test_cases_are_there_once_and_the_sizes_of_the_issue_are_among_them():
    for name in SUITES:
        cases = load_suite(name).cases
        assert len({str(case) for case in cases}) == len(cases)
        assert all(case.label for case in cases)
    sizes = load_suite("observe").sizes(default_only=True)
    assert sizes == ["v1", "200", "512", "512-embed-4096", "12m", "50m"]


def test_counted_products_of_the_scan_are_those_that_torch_counts_without_one_hot():
    from torch.utils.flop_counter import FlopCounterMode

    from phyxdream.bench import rssm_sizes

    size = rssm_sizes.Size("", "", dict(embed_size=9, deter_size=16, hidden_size=8, stoch_size=5, classes=0), T=3, B=2)
    model = size.model(CPU)
    with ops.use_backend("reference"), FlopCounterMode(display=False) as counter:
        model.filter(torch.randn(3, 2, 9), torch.randn(3, 2, 6), torch.zeros(3, 2, dtype=torch.bool))
    assert counter.get_total_flops() == 2 * 3 * 2 * rssm_sizes.multiplications(model)


def test_backends_are_forced_and_gradients_asked_for():
    seen = []

    def build(device):
        x = torch.ones(3, requires_grad=True)

        def function(x):
            from phyxdream.ops import backend

            seen.append((backend._forced.get(), torch.is_grad_enabled()))
            return 2 * x

        return suite.Call(function, (x,), leaves=(x,))

    def case(direction, names=()):
        return suite.Case("double", "3", direction, build, "3", names)

    with suite.enter(case("forward+backward"), CPU, ("reference", "cpu")) as entry:
        (gradient,) = entry.contenders[0].run()
    assert gradient.shape == (3,) and [forced for forced, _ in seen[:2]] == ["reference", "cpu"]
    seen.clear()
    with suite.enter(case("no-grad", ("reference", "phyxdream")), CPU, ("reference", "phyxdream")):
        assert seen == [("reference", False), (None, False)]


@pytest.mark.parametrize("name", [name for name in SUITES if name not in ("imagine", "update", "replay", "envs")])
def test_references_run_in_bfloat16(name):
    bench = load_suite(name)
    for case in bench.cases:
        if case.size == bench.sizes()[0]:
            with suite.enter(case, CPU, ["reference"], torch.bfloat16) as entry:
                assert not entry.skipped
                outputs = entry.contenders[0].run()
                if case.direction != "forward":  # losses are float32 by contract; gradients are of what came in
                    assert {x.dtype for x in outputs if x is not None} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32


def test_who_cannot_take_part_is_skipped_with_its_reason():
    def build(device):
        return suite.Call(lambda x: ops.lambda_return(x, x, x), (torch.ones(2, 1, dtype=torch.float64),))

    case = suite.Case("lambda_return", "2x1", "forward", build, "2×1")
    with suite.enter(case, CPU, ("reference", "triton", "cuda_graph")) as entry:
        assert [c.name for c in entry.contenders] == ["reference"]
    assert "triton" in entry.skipped["triton"] and set(entry.skipped) == {"triton", "cuda_graph"}


def test_compiled_reference_tells_how_long_it_took(monkeypatch):
    compiled = []
    monkeypatch.setattr(suite, "_warm_compiler", lambda: None)
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    case = load_suite("lambda_return").cases[0]
    assert case.contenders(CPU, compile=True) == ("reference", "compile", "cpu")
    assert case.contenders(torch.device("cuda"), compile=True) == (
        "reference", "compile", "cuda_graph", "triton", "triton_graph",
    )  # fmt: skip
    with suite.enter(case, CPU, ["compile"]) as entry:
        assert compiled == [ops.lambda_return] and entry.contenders[0].setup_seconds > 0


# ---------------------------------------------------------------------------------------------------------------------
# Timing.


def contender(name):
    return timing.Contender(name, lambda: None)


def test_contenders_take_turns_there_and_back_as_often_as_the_budget_allows(monkeypatch):
    monkeypatch.setattr(timing, "WARM_SECONDS", 0.0)
    cost, order, ticks = {"slow": 0.1, "fast": 0.0004}, [], []
    contenders = [contender("slow"), contender("fast")]
    owner = {c.run: c.name for c in contenders}

    def clock(run, calls):
        order.append((owner[run], calls))
        return cost[owner[run]]

    samples = timing.measure(contenders, budget=1.0, fewest=2, clock=clock, tick=lambda: ticks.append(1))
    assert order[:2] == [("slow", 1), ("fast", 1)]  # warming up
    turns = order[2:]
    assert turns[:4] == [("slow", 1), ("fast", 3), ("fast", 3), ("slow", 1)]
    assert len(turns) == 2 * 9 and len(ticks) == 9  # 1 s / (0.1 + 3 * 0.0004)
    assert samples["fast"].median == 0.0004 and samples["fast"].calls == 3 and samples["slow"].iqr == 0


def test_rounds_have_a_lower_and_an_upper_bound():
    assert timing.plan({"a": 10.0}, budget=1.0, fewest=5) == ({"a": 1}, 5)
    assert timing.plan({"a": 3e-6}, budget=10.0, fewest=5, most=50) == ({"a": 334}, 50)


def test_ratio_is_taken_within_rounds():
    drifting = timing.Samples([1.0, 2.0, 4.0], 1), timing.Samples([0.5, 1.0, 2.0], 1)
    assert timing.ratio(*drifting) == 2.0
    assert drifting[0].iqr == 1.5 and drifting[0].spread == 0.75
    assert timing.Samples([3.0], 1).iqr == 0.0


def test_context_surrounds_the_calls_and_not_each_of_them():
    events = []

    @contextlib.contextmanager
    def context():
        events.append("in")
        yield
        events.append("out")

    timing.measure([timing.Contender("a", lambda: events.append("call"), context)], budget=0.01, fewest=2,
                   clock=lambda run, calls: [run() for _ in range(3)] and 1.0)  # fmt: skip
    assert re.fullmatch(r"in( call)+ out( in call call call out){2}", " ".join(events))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is Linux's")
def test_peak_memory_counts_what_a_call_holds_at_once():
    x = torch.ones(1 << 22)  # 16 MB
    megabytes = timing.peak_memory(timing.Contender("two", lambda: (x + 1) * 2), CPU) / 2**20
    assert 31 < megabytes < 36
    assert timing.peak_memory(timing.Contender("in place", lambda: x.add_(1)), CPU) < 2**20


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the load is Linux's")
def test_load_of_others_is_a_share(monkeypatch):
    seconds = iter([(10.0, 4.0, 0.0, 1.0), (30.0, 16.0, 1.0, 7.0)])
    monkeypatch.setattr(timing.LoadMeter, "_now", lambda *_: next(seconds))
    assert timing.LoadMeter().read() == timing.Load(others=0.3, stolen=0.05)
    monkeypatch.undo()
    total, busy, stolen, own = timing.LoadMeter()._now()
    assert 0 < own < busy < total and stolen >= 0


# ---------------------------------------------------------------------------------------------------------------------
# The command.


def test_command_end_to_end(tmp_path, capsys):
    arguments = ["bench", "kl", "lambda_return", "--sizes", "tiny", "1x1", "--quick", "--seconds", "1", "--threads",
                 "1", "--device", "cpu", "--out", str(tmp_path / "new" / "folder")]  # fmt: skip
    assert main(arguments) == 0
    output = capsys.readouterr().out
    (path,) = (tmp_path / "new" / "folder").glob("*.json")
    assert path.name in output.replace("\n", "")
    found = results.check(json.loads(path.read_text()), path.name)
    assert {(r["suite"], r["size"]) for r in found["benchmarks"]} == {("kl", "tiny"), ("lambda_return", "1x1")}
    assert found["machine"]["threads"] == 1 and found["machine"]["device"] == "cpu"
    assert found["machine"]["peak"]["flops"] > 1e8 and found["machine"]["peak"]["bytes"] > 1e8
    assert isinstance(found["machine"]["warnings"], list) and set(found["machine"]["load"]) == {"before", "during"}
    for row in found["benchmarks"]:
        assert row["rounds"] >= 3 and row["median_seconds"] > 0 and row["work"]["unit"] == "B"
        assert row["of_peak"] == pytest.approx(
            row["work"]["amount"] / row["median_seconds"] / found["machine"]["peak"]["bytes"]
        )
        assert row["ratio"] == 1 or row["backend"] != "reference"
    for name in ("kl", "lambda_return"):
        assert path.with_name(f"{path.stem}-{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "balanced_kl forward+backward" in output and "PyTorch" in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["obsrve"], ["obsrve", "did you mean 'observe'"]),
        (["kl", "--sizes", "12n"], ["12n", "12m", "v1"]),
        (["kl", "--sizes", "1x1"], ["1x1", "known to the chosen suites"]),
        (["kl", "--device", "tpu"], ["--device", "tpu", "cuda"]),
        (["kl", "--dtype", "bfloat"], ["--dtype", "did you mean 'bfloat16'"]),
        (["envs", "replay", "--dtype", "bfloat16"], ["--dtype", "bfloat16", "suites"]),
        (["kl", "--threads", "0"], ["--threads", "0"]),
        (["kl", "--seconds", "0"], ["--seconds", "0"]),
        (["kl", "--seconds", "nan"], ["--seconds", "nan"]),
    ],
)
def test_bad_options_are_one_sentence_before_anything_runs(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 1
    captured = capsys.readouterr()
    for word in words:
        assert word in captured.err
    assert captured.out == "" and list(tmp_path.iterdir()) == []


def test_out_must_not_be_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--out: .*file cannot be made: File exists"):
        command.run(command.Options(["kl"], out=tmp_path / "file"))


def test_quick_takes_the_smallest_default_size_of_each_suite():
    plan = command.Plan.of(command.Options(quick=True))
    assert {s.name for s in plan.suites} == set(SUITES)
    for bench, cases in plan.suites.items():
        assert {case.size for case in cases} == {bench.sizes(default_only=True)[0]}
    everything = command.Plan.of(command.Options()).suites
    assert all("tiny" not in {case.size for case in cases} for cases in everything.values())


def test_interrupting_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    real, done = timing.measure, []

    def measure(*arguments):
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return real(*arguments)

    monkeypatch.setattr(timing, "measure", measure)
    assert main(["bench", "lambda_return", "--sizes", "1x1", "--quick", "--out", str(tmp_path)]) == 130
    (path,) = tmp_path.glob("*.json")
    assert {row["direction"] for row in json.loads(path.read_text())["benchmarks"]} == {"forward"}
    assert "interrupted" in capsys.readouterr().err


def test_a_case_that_cannot_be_built_is_left_out_with_its_reason(tmp_path, monkeypatch, capsys):
    real = command.enter

    def enter(case, *arguments):
        if case.direction == "forward":
            raise MemoryError("no room\nat all")
        return real(case, *arguments)

    monkeypatch.setattr(command, "enter", enter)
    assert main(["bench", "lambda_return", "--sizes", "1x1", "--quick", "--out", str(tmp_path)]) == 0
    assert "left out: reference, cpu of lambda_return 1x1: no room\n" in capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text())
    assert {row["reason"] for row in found["skipped"]} == {"no room"}
    assert {row["direction"] for row in found["benchmarks"]} == {"forward+backward"}


def test_noise_is_told_on_the_terminal_and_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_idle_load", lambda: timing.Load(others=0.5, stolen=0.1))
    console = Console(width=200, record=True, quiet=True)
    options = command.Options(["lambda_return"], ["1x1"], quick=True, device="cpu", out=tmp_path)
    found = json.loads(command.run(options, console).read_text())
    said = [w for w in found["machine"]["warnings"] if "just before" in w]
    assert len(said) == 2 and "50%" in said[0] and "10%" in said[1]
    assert found["machine"]["load"]["before"] == {"others": 0.5, "stolen": 0.1}


# ---------------------------------------------------------------------------------------------------------------------
# Results, tables, pictures.


def row(backend="reference", seconds=1e-3, **others):
    return {"suite": "kl", "op": "balanced_kl", "direction": "forward", "size": "v1", "label": "1024×30",
            "backend": backend, "median_seconds": seconds, "iqr_seconds": seconds / 10, "rounds": 5,
            "headline": True} | others  # fmt: skip


def file(*rows, started="2026-01-02T03:04:05+00:00", **machine):
    machine = {"started": started, "torch": "2.13.0+cpu", "cpu": "AMD EPYC", "cores": 2, "gpu": []} | machine
    return {"machine": machine, "benchmarks": list(rows)}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: f.pop("machine"), ["machine"]),
        (lambda f: f["machine"].pop("cores"), ["cores"]),
        (lambda f: f.update(benchmarks={}), ["list"]),
        (lambda f: f["benchmarks"][0].pop("size"), ["benchmarks[0].size", "str"]),
        (lambda f: f["benchmarks"][0].update(median_seconds="1"), ["median_seconds", "float", "'1'"]),
        (lambda f: f["benchmarks"][0].update(median_seconds=float("nan")), ["median_seconds", "nan"]),
        (lambda f: f["benchmarks"][0].update(rounds=True), ["rounds"]),
    ],
)
def test_a_damaged_results_file_is_named_with_what_is_wrong(damage, words):
    broken = file(row())
    damage(broken)
    with pytest.raises(results.ResultsError) as error:
        results.check(broken, "there.json")
    for word in ["there.json", *words]:
        assert word in str(error.value)


PAGE = "before\n<!-- bench {} -->\nold 12.3 ms\n<!-- end bench -->\nafter\n"


def page(name, folder, *files):
    for i, content in enumerate(files):
        results.write(folder / f"{i}.json", content)
    text = table.update(PAGE.format(name), folder)
    assert text.startswith(f"before\n<!-- bench {name} -->\n") and text.endswith("<!-- end bench -->\nafter\n")
    assert "old" not in text and table.update(text, folder) == text
    return text


def test_table_takes_the_newest_file_of_every_case(tmp_path):
    old = file(row(), row("cpu", 1e-4), row(size="512", label="big"), row("cpu", 5e-4, size="512", label="big"))
    new = file(row(seconds=2e-3), row("compile", 5e-4, setup_seconds=61.0), row("cpu", 1e-4, ratio=21.0, of_peak=0.5,
               memory_bytes=2e6), started="2026-01-03T00:00:00+00:00")  # fmt: skip
    text = page("ops", tmp_path, new, old)
    assert "| what | size | PyTorch | torch.compile | C++ | ratio | of peak | memory |" in text
    assert (
        "| `ops.balanced_kl` forward | 1024×30 | 2.0 ms | 500.0 µs (after 61.00 s) | 100.0 µs | 21.0× | 50 % | 2 MB |"
        in text
    )
    assert "| `ops.balanced_kl` forward | big | 1.0 ms |  | 500.0 µs | 2.0× |  |  |" in text
    assert "2026-01-02 to 2026-01-03" in text and "AMD EPYC, 2 cores, torch 2.13.0" in text


def test_a_case_that_is_timed_again_keeps_its_place(tmp_path):
    """Of cases that a suite has, its order counts; those that it no longer has come last."""
    own = [row(op=c.op, direction=c.direction, size=c.size, label=f"case {i}")
           for i, c in enumerate(load_suite("kl").cases[:3])]  # fmt: skip
    gone = row(size="gone", label="gone")
    again = file(gone, own[0], started="2026-01-03T00:00:00+00:00")
    text = page("ops", tmp_path, file(own[2], own[0], gone, own[1]), again)
    places = [text.index(f"| {label} |") for label in ("case 0", "case 1", "case 2", "gone")]
    assert places == sorted(places)


def test_every_machine_has_a_table_of_its_own(tmp_path):
    gpu = file(row(), row("triton", 1e-5), gpu=["NVIDIA H200"], device="cuda", warnings=["busy"])
    text = page("ops", tmp_path, file(row(), row("cpu", 1e-4)), gpu)
    assert "C++ | ratio" in text and "Triton | ratio" in text
    assert "*NVIDIA H200, torch 2.13.0, 2026-01-02, on a machine that was not quiet.*" in text


def test_only_headlines_are_in_the_readme_and_the_update_apart(tmp_path):
    whole = row("phyxdream", suite="update", op="whole", direction="forward+backward")
    found = file(row(headline=False), row(op="two_hot_loss"), whole)
    assert page("ops", tmp_path, found).count("| `ops.") == 1
    assert "**whole gradient step**" in page("update", tmp_path, found)
    assert page("all", tmp_path, found).count("1024×30") == 3


def test_unknown_block_and_damaged_file(tmp_path):
    with pytest.raises(results.ResultsError, match="'opps'; did you mean 'ops'"):
        table.update(PAGE.format("opps"), tmp_path)
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(results.ResultsError, match=r"a\.json: expected JSON"):
        table.update(PAGE.format("ops"), tmp_path)


def test_readme_and_results_page_are_what_the_files_give(capsys):
    folder = ROOT / "bench" / "results"
    pages = [str(ROOT / "README.md"), str(folder / "README.md")]
    assert table.main([*pages, "--results", str(folder), "--check"]) == 0, capsys.readouterr().out


def test_speed_section_of_the_readme_has_no_figure_of_its_own():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text[text.index("## Speed") : text.index("## More")]
    by_hand = re.sub(r"<!-- bench \w+ -->.*?<!-- end bench -->", "", section, flags=re.DOTALL)
    assert not re.search(r"\d\s?(µs|ms|s|×|x|GB/s|GFLOP/s|MB|%)\b", by_hand)


def test_table_command_writes_checks_and_complains(tmp_path, capsys):
    results.write(tmp_path / "a.json", file(row()))
    target = tmp_path / "page.md"
    target.write_text(PAGE.format("ops"))
    arguments = [str(target), "--results", str(tmp_path)]
    assert table.main([*arguments, "--check"]) == 1 and "differs" in capsys.readouterr().out
    assert table.main(arguments) == 0 and "1.0 ms" in target.read_text()
    assert table.main([*arguments, "--check"]) == 0
    assert table.main([str(tmp_path / "none.md"), "--results", str(tmp_path)]) == 1


def test_pictures_hold_every_case(tmp_path):
    many = [row(name, op=f"op{i}", size=size, ratio=2.0) for size in "ab" for i in range(5)
            for name in ("reference", "cuda_graph", "triton")]  # fmt: skip
    figure = plots.suite_figure("kl", many, file()["machine"])
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles == [f"op{i} forward" for i in range(5) for _ in "ab"]  # two sizes side by side
    assert plots.suite_figure("kl", many[:-3], file()["machine"]).axes[-1].axison
    drawn = figure.axes
    assert [t.get_text() for t in drawn[0].get_yticklabels()] == ["PyTorch", "CUDA graph", "Triton"]
    assert any("2.0×" in text.get_text() for text in drawn[0].texts)


def test_suite_table_fits_eighty_columns():
    rows = [
        row("reference", 1.2345, work={"amount": 1e12, "unit": "FLOP"}, of_peak=0.9, memory_bytes=2e9, ratio=1.0,
            setup_seconds=None),
        row("compile", 0.12, work={"amount": 1e12, "unit": "FLOP"}, of_peak=0.9, memory_bytes=2e9, ratio=123.4,
            setup_seconds=247.0),
    ]  # fmt: skip
    lines = command.suite_table(load_suite("kl"), rows).plain.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[3].split()[:2] == ["PyTorch", "1.23"] and "247 s" in lines[4] and "123×" in lines[4]

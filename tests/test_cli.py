import json
import subprocess
import sys

import pytest

from phyxdream.cli import main

TINY = ["--env", "gym:CartPole-v1", "--num-envs", "2", "--size", "1m", "--deter-size", "16", "--hidden-size", "8",
        "--units", "8", "--stoch-size", "4", "--classes", "4", "--batch-size", "4", "--batch-length", "8",
        "--prefill", "64", "--total-steps", "120", "--train-ratio", "8", "--imagine-horizon", "3",
        "--eval-episodes", "2", "--log-every", "50", "--quiet"]  # fmt: skip


def test_train_eval_report(tmp_path, capsys):
    logdir = str(tmp_path / "run")
    assert main(["train", "dreamer_v3", *TINY, "--logdir", logdir]) == 0
    output = capsys.readouterr().out
    assert "evaluation return:" in output and f"report: {logdir}/report.html" in output
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["deter_size"], config["preset"]) == (16, "dreamer_v3")
    assert main(["eval", logdir, "--episodes", "3"]) == 0
    assert "over 3 episodes" in capsys.readouterr().out
    assert main(["report", logdir]) == 0
    assert (tmp_path / "run" / "report.html").exists()
    assert main(["compare", logdir, "--out", str(tmp_path / "compare")]) == 0
    output = capsys.readouterr().out
    assert "gym:CartPole-v1" in output and f"page: {tmp_path}/compare/compare.html" in output
    sheet = tmp_path / "frames.png"
    assert main(["replay", "inspect", logdir, "--frames", str(sheet)]) == 0
    output = capsys.readouterr().out
    assert "complete" in output and f"frames: {sheet}" in output and "warning" not in output
    assert sheet.read_bytes().startswith(b"\x89PNG")
    assert main(["train", "--resume", "--logdir", logdir, "--total-steps", "150", "--quiet"]) == 0


def test_train_on_slots(tmp_path, capsys):
    """Preset `phyxdream` goes through the same commands; its report shows what the slots dream together."""
    pytest.importorskip("envpool")
    logdir = str(tmp_path / "run")
    slots = ["--slots", "2", "--slot-size", "8", "--slot-depth", "4", "--slot-layers", "1", "--slot-decoder-size", "8"]
    options = [*TINY, "--env", "envpool:Catch-v0", *slots, "--logdir", logdir]
    assert main(["train", "phyxdream", *options]) == 0
    assert main(["eval", logdir, "--episodes", "2", "--open-loop", "--explore"]) == 0
    evaluations = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert [row.get("explore", False) for row in evaluations] == [False, True]
    assert main(["report", logdir]) == 0
    assert (tmp_path / "run" / "open_loop.gif").exists() and (tmp_path / "run" / "open_loop.json").exists()
    output = capsys.readouterr().out
    assert "over 2 episodes" in output and "frozen" in output


def test_slots(tmp_path, capsys):
    out = tmp_path / "slots"
    tiny = ["--steps", "3", "--batch-size", "2", "--held-out", "4", "--size", "16", "--slots", "3", "--slot-size", "8",
            "--depth", "4", "--token-size", "8", "--decoder-size", "8"]  # fmt: skip
    assert main(["slots", *tiny, "--quiet", "--out", str(out)]) == 0
    output = capsys.readouterr().out
    assert "after 3 steps: FG-ARI" in output and "of 3 slots used" in output and str(out) in output
    assert main(["slots", *tiny, "--out", str(out)]) == 1
    assert "not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "dreamer_v4"], ["dreamer_v4", "did you mean", "dreamer_v3"]),
        (["train", "--preset", "dreamer_v4"], ["dreamer_v4", "dreamer_v3"]),
        (["train", "catch", "--preset", "dreamer_v3"], ["catch", "dreamer_v3"]),
        (["train", *TINY, "--env", "gym:CartPol-v1"], ["CartPol-v1", "CartPole-v1"]),
        (["train", *TINY, "--td-lambda", "1.5"], ["td_lambda", "[0, 1]", "1.5"]),
        (["train", *TINY, "--batch-size", "0"], ["batch_size", "0"]),
        (["train", *TINY, "--device", "cuda:99"], ["device"]),
        (["train", *TINY, "--deter-size", "17"], ["deter_size", "blocks"]),
        (["train", "--resume", "--logdir", "nowhere"], ["nowhere"]),
        (["slots", "--steps", "0"], ["steps", "0"]),
        (["slots", "--sprites", "4", "3"], ["sprites", "(4, 3)"]),
        (["slots", "--patch", "0"], ["patch", "0"]),
        (["eval", "nowhere"], ["nowhere"]),
        (["report", "nowhere"], ["nowhere"]),
        (["compare", "nowhere"], ["nowhere", "no such directory"]),
        (["compare", "."], ["not a phyxdream run"]),
        (["replay", "inspect", "nowhere"], ["nowhere", "does not exist"]),
        (["replay", "inspect", "."], ["replay"]),
        (["replay", "inspect", ".", "--frames", "sheet.gif"], ["sheet.gif", ".png"]),
        (["replay", "inspect", ".", "--frames", "nowhere/sheet.png"], ["nowhere"]),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    captured = capsys.readouterr()
    for word in words:
        assert word in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["trian"], "train"), (["train", "--lerning-rate", "1"], "--learning-rate"), ([], "usage"),
     (["train", "--cell", "lstm"], "block_gru"), (["slots", "--initial", "zero"], "gaussian"),
     (["compare"], "RUN RUN"), (["compare", "run", "--buy", "env"], "--by"),
     (["replay"], "inspect"), (["replay", "inspct"], "did you mean"),
     (["replay", "inspect"], "PATH")],
)  # fmt: skip
def test_wrong_usage_exits_with_2_and_the_nearest_name(arguments, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    captured = capsys.readouterr()
    assert code == 2
    assert word in captured.err + captured.out


def test_a_foreign_directory_is_not_a_run(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["train", *TINY, "--logdir", str(tmp_path)]) == 1
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_truncated_checkpoint_is_refused(tmp_path, capsys):
    logdir = tmp_path / "run"
    assert main(["train", "dreamer_v3", *TINY, "--logdir", str(logdir)]) == 0
    weights = next(logdir.glob("checkpoints/*/model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    capsys.readouterr()
    for arguments in (["eval", str(logdir)], ["train", "--resume", "--logdir", str(logdir), "--quiet"]):
        assert main(arguments) == 1
        assert "model.safetensors" in capsys.readouterr().err


def test_info_names_backends_and_reasons(capsys):
    assert main(["info"]) == 0
    output = capsys.readouterr().out
    for word in ("phyxdream", "torch", "reference", "cpu", "triton", "gym", "unity"):
        assert word in output


def test_console_script_help():
    done = subprocess.run([sys.executable, "-c", "from phyxdream.cli import entry; entry()", "--help"],
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0
    assert "phyxdream" in done.stdout and "train" in done.stdout


def test_python_m_is_the_command():
    shown = subprocess.run([sys.executable, "-m", "phyxdream", "--version"], capture_output=True, text=True)
    assert (shown.returncode, shown.stdout.split()[0]) == (0, "phyxdream"), shown.stderr

"""R1 as commands: each can be typed, what is finished is passed over, what was cut off goes on."""

import itertools
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

import rl
from data.io.cli import UserError, parse_flags
from data.io.run import RunFolder
from data.tasks.__main__ import TraceConfig
from data.tasks.exam import is_readable
from data.text.files import read_examples
from rl import RECIPES, VARIANTS, RLConfig, r1_commands
from tests.test_rl_loop import SHORT
from train import PRESET_KNOBS, TrainConfig

SMALL_SFT = ("--seq_len 48 --tokens_per_step 768 --bias_update_speed 0 --mtp_loss_weight 0.1 "
             "--eval_every 1000 --device cpu")
QUICK = SHORT | dict(task="tests.toy:Same,tests.toy:Other", steps=2, sft_steps=60, sft_lr=1e-2,
                     count=24, max_new_tokens=30, mix="", recipe="r1")
STAGES = ["0-zero", "1-cold-start", "2-reasoning", "3-rejection", "4-all"]


def flags(base: Path, out: Path, *more: str, **changes) -> list[str]:
    knobs = QUICK | {"base": base, "out": out} | changes
    return [*(f"--{name}={value}" for name, value in knobs.items()), *more]


def weights(out: Path) -> dict[str, bytes]:
    return {stage: (out / f"r1-{stage}" / "model.safetensors").read_bytes() for stage in STAGES}


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory) -> Path:
    """out/ of a recipe that ran through; fine-tuning is small from here on."""
    out = tmp_path_factory.mktemp("work") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl, "SFT", SMALL_SFT)
        assert rl.main(flags(base, out))
        yield out


def test_r1_leaves_checkpoints_examples_and_a_table(finished):
    for stage in STAGES:
        for name in ("config.json", "tokenizer.json", "log.csv"):
            assert (finished / f"r1-{stage}" / name).exists()
    table = (finished / "r1.txt").read_text(encoding="utf-8")
    assert "pass@1 tests.toy:Same" in table and "pass@1 tests.toy:Other" in table
    lines = {line.split()[0]: re.findall(r"[\d.]+ %", line) for line in table.splitlines()[1:]}
    right = [float(shares[0].split()[0]) for shares in lines.values()]
    assert list(lines)[1:] == [f"{finished}/r1-{stage}" for stage in STAGES] and len(right) == 6
    assert right[2] > 60 > 20 > right[1]  # the cold start teaches, RL on random weights does not
    good = read_examples(finished / "r1-good.jsonl")
    assert len(good) == 24 and all(is_readable(text, {"0=0"}) for _, text in good)
    for name, count in (("traces", 1000), ("others", 200)):
        assert len(read_examples(finished / f"r1-{name}.jsonl")) == count


def test_what_is_finished_is_passed_over_and_nothing_is_written_over(base, finished, capsys):
    with pytest.raises(UserError, match="holds a run already"):
        rl.main(flags(base, finished))
    before, notes = weights(finished), finished / "r1.json"
    knobs = QUICK | RECIPES["r1"] | QUICK | {"base": str(base), "out": str(finished)}
    commands = r1_commands(RLConfig(**knobs))
    of = json.loads(notes.read_text())["of"]
    notes.write_text(json.dumps({"of": of, "finished": commands}))
    stamps = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert rl.main(flags(base, finished, "--resume"))
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert "all 9 commands are finished" in capsys.readouterr().out
    notes.write_text(json.dumps({"of": "another base", "finished": commands[:-2]}))
    with pytest.raises(UserError, match="has changed since"):
        rl.main(flags(base, finished, "--resume"))
    notes.write_text(json.dumps({"of": of, "finished": commands[:-2]}))  # cut off behind the last step of RL
    assert rl.main(flags(base, finished, "--resume"))
    out = capsys.readouterr().out
    assert "resumed at step 2 of 2" in out and out.count("\n$ python") == 2 and "readable" in out
    assert weights(finished) == before and json.loads(notes.read_text())["finished"] == commands


def test_a_recipe_that_is_cut_off_continues(base, finished, tmp_path, monkeypatch, capsys):
    """Signals arrive before the third step of the cold start, and before the second of its RL."""
    out, more = tmp_path / "out", []
    for stop in (2 + 2, 58 + 1):
        asked = itertools.count()
        is_set = property(lambda it, stop=stop, asked=asked: next(asked) >= stop, lambda it, value: None)
        with monkeypatch.context() as patch:
            patch.setattr("data.io.run.StopSignal.is_set", is_set, raising=False)
            assert rl.main(flags(base, out, *more)) is False
        hint = capsys.readouterr().out.splitlines()[-1]
        assert hint.startswith("  python rl.py --") and hint.endswith(" --resume")
        assert "--recipe=r1" in hint
        more = ["--resume"]
    assert (out / "r1-2-reasoning" / "log.csv").read_text().count("\n") == 2  # names and one step
    assert rl.main(flags(base, out, *more))
    assert "resumed at step 1 of 2" in capsys.readouterr().out and weights(out) == weights(finished)


def test_fine_tuning_mixes_in_plain_text(base, tmp_path, monkeypatch, capsys):
    rows = [{"question": "1+1=", "answer": answer} for answer in ("2", "3" * 500)]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.txt").write_text("A small boat on the wide sea.\n\n" * 400)
    monkeypatch.chdir(tmp_path)
    argv = f"{SMALL_SFT} --init_from {base} --data examples:some.jsonl --steps 2 --precision fp32"
    for name, more in (("plain", []), ("mixed", ["--mix", "a.txt"])):
        assert rl.train.main([*shlex.split(argv), "--name", name, *more])
        assert "2 examples; 1 of them (50%) are longer than --seq_len 48 and left out" in capsys.readouterr().out
    rows = [RunFolder(tmp_path / "out" / name).rows() for name in ("plain", "mixed")]
    assert len(rows[0]) == len(rows[1]) == 3 and rows[0][1]["ce"] != rows[1][1]["ce"]


def test_rejection_sampling_without_good_answers_is_one_line(base, tmp_path):
    file = tmp_path / "good.jsonl"
    argv = flags(base, tmp_path, f"--write={file}", task="tests.toy:Same", count=8, recipe="")
    with pytest.raises(UserError, match="^[^\n]*: 0 of 64 questions had a [^\n]* answer[^\n]*$"):
        rl.main(argv)
    assert not file.exists()


def test_checkpoints_are_examined_beside_each_other(base, finished, tmp_path, capsys):
    argv = ["--exam", str(base), str(finished / "r1-1-cold-start"), "--name", "both"]
    assert rl.main(flags(base, tmp_path, *argv, recipe=""))
    out = capsys.readouterr().out
    assert (tmp_path / "both.txt").read_text(encoding="utf-8") == out
    assert [line.split()[0] for line in out.splitlines()[1:]] == argv[1:3]  # as typed
    same = [shutil.copytree(finished / f"r1-{stage}", tmp_path / stage / "rl")
            for stage in ("0-zero", "1-cold-start")]  # two of one name
    assert rl.main(flags(base, tmp_path, "--exam", *map(str, same), recipe="", name="same"))
    low, high = capsys.readouterr().out.splitlines()[1:]
    assert [low.split()[0], high.split()[0]] == [str(path) for path in same]
    assert low.split()[1:] != high.split()[1:]
    with pytest.raises(UserError, match="no checkpoint in nowhere"):
        rl.main(flags(base, tmp_path, "--exam", "nowhere", recipe=""))


@pytest.mark.parametrize("changes", [
    {}, {"task": "chain", "out": "my out"}, {"variant": "dapo", "seed": 3, "steps": 7},
    {"variant": "dapo", "kl_beta": 0.001},  # a default that the variant's own value must not win over
    {"clip_eps_high": 0.3, "keep_routing": False, "kl_beta": 0.5, "mix": ""}], ids=str)
def test_every_command_can_be_typed_and_says_what_is_meant(changes):
    knobs = RECIPES["r1"] | VARIANTS[changes.get("variant", "grpo")] | {"recipe": "r1"} | changes
    config, names = RLConfig(**knobs), []
    others = {"name", "task", "base", "recipe", "variant", "exam", "write", "sft_steps", "sft_lr", "mix"}
    for command in r1_commands(config):
        words = shlex.split(command.removeprefix("python "))
        if words[0] == "rl.py":
            typed = parse_flags(RLConfig, words[1:], "", presets={"variant": VARIANTS})
            for name in vars(typed).keys() - others:
                assert getattr(typed, name) == getattr(config, name), name
            names += [] if typed.write or typed.exam else [typed.name]
        elif words[0] == "train.py":
            typed = parse_flags(TrainConfig, words[1:], "", presets={"preset": PRESET_KNOBS})
            assert (typed.steps, typed.lr, typed.out, typed.seed, typed.device) == (
                config.sft_steps, config.sft_lr, config.out, config.seed, config.device)
            names.append(typed.name)
        else:
            assert words[:2] == ["-m", "data.tasks"]
            assert parse_flags(TraceConfig, words[2:], "").seed == config.seed
    assert names == [f"r1-{stage}" for stage in STAGES] and config.name == "r1"


def test_a_recipe_without_its_base_or_of_another_name_is_one_line_and_code_2(tmp_path, monkeypatch, refuses):
    monkeypatch.chdir(tmp_path)
    for name, words in (("r1", "train.py makes out/base"), ("distill", "-m tests.claims.NAME")):
        refuses(rl.main, words, "--recipe", name)

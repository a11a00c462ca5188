"""What measures and what repeats a study, each in its smallest form: it runs, and says what it should."""

import json
import math
import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from data.io.cli import UserError, parse_flags
from rl import RLConfig
from tests.bench import cores as cores_bench
from tests.bench import decode, rollout
from tests.bench import train as bench
from tests.claims import base_quality, bill, distill, fitness, fp8, lab, minutes, thinking, visits
from train import TrainConfig

CONFIGS = {"train.py": TrainConfig, "rl.py": RLConfig, "tests.bench.train": bench.BenchConfig,
           "tests.bench.cores": cores_bench.CoresConfig, "tests.bench.rollout": rollout.RolloutConfig,
           "tests.bench.decode": decode.DecodeConfig, "tests.claims.bill": bill.BillConfig,
           "tests.claims.fitness": fitness.FitnessConfig, "tests.claims.thinking": thinking.ThinkingConfig,
           "tests.claims.minutes": minutes.MinutesConfig,
           "tests.claims.distill": distill.DistillConfig, "tests.claims.fp8": fp8.Fp8Config,
           "tests.claims.base_quality": base_quality.QualityConfig, "tests.claims.visits": visits.VisitsConfig}
BOOK = Path(lab.__file__).with_name("README.md")

WIDTHS = ["hidden_size=32", "num_hidden_layers=2", "moe_intermediate_size=16", "intermediate_size=32"]
TINY = shlex.split("--tokens_per_step 64 --seq_len 16 --eval_tokens 64 --device cpu --set") + WIDTHS
RL = shlex.split("--questions 2 --group_size 2 --eval_questions 2 --eval_samples 2 --device cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """out/base of four steps, with snapshots, on a text of its own; the folder of runs is its parent."""
    place = tmp_path_factory.mktemp("claims")
    (place / "text").mkdir()
    (place / "text" / "a.txt").write_text("A small boat on the wide sea.\n\n" * 1000)
    flags = ["--data", str(place / "text"), "--out", str(place / "out"), "--steps", "4"]
    assert train.main([*TINY, *flags, "--snapshots", "0.25", "0.5"])
    return place / "out" / "base"


def understood(commands: list[str]) -> list:
    """The knobs of every command whose dataclass is known."""
    words = [shlex.split(command.replace("python -m", "python"), comments=True)[1:] for command in commands]
    return [parse_flags(CONFIGS[program], flags, "") for program, *flags in words if program in CONFIGS]


def test_a_step_is_measured_beside_transformers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "matmul_ceiling", lambda *_: 1e11)
    bench.main([*TINY, "--micro_batch", "2", "--rounds", "1", "--out", str(tmp_path)])
    lines = {line[:20].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert "tokens/s" in lines["plainseek"] and "GFLOP/s" in lines["plainseek with MTP"]
    if find_spec("transformers"):
        ours, theirs = (float(lines[name].split("first loss ")[1]) for name in ("plainseek", "transformers"))
        assert abs(ours - theirs) < 2e-4  # the same weights and batch


def test_a_step_is_traced(tmp_path, capsys):
    bench.main([*TINY, "--profile", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert "Self CPU" in out and "aten::" in out  # which fifteen are the costliest depends on the machine's load
    share, most = re.search(r"products    and attention are (\d+)% of the time: at most (.+)x as fast", out).groups()
    assert 0 < int(share) < 100 and float(most) == pytest.approx(100 / int(share), rel=0.1)
    assert '"aten::mm"' in (tmp_path / "base" / "trace.json").read_text()


def test_a_decoded_token_is_measured_and_both_caches_say_the_same(capsys):
    decode.main(["--context", "40", "--batch", "1", "3", "--rounds", "1", "--device", "cpu", "--set", *WIDTHS])
    out = capsys.readouterr().out
    assert [float(x) < 1e-4 for x in re.findall("at most (.+) apart", out)] == [True, True]
    assert out.count("tokens/s") == (4 if find_spec("transformers") else 2)


def test_a_rollout_is_measured(capsys, monkeypatch):
    monkeypatch.setattr(rollout, "transformers_twin", lambda model: None)
    rollout.main(["--rows", "3", "--max_new_tokens", "4", "--longest_prompt", "8", "--rounds", "1", "--device", "cpu"])
    assert re.search(r"   3 rows  plainseek +[\d,]+ tokens/s\n   3 rows  products and attention are \d+%", capsys.readouterr().out)


def test_cores_are_measured_alone_and_beside_busy_programs(capsys, monkeypatch):
    asked, times = [], iter([0, 8.0, 16.0, 4.0, 9.0, math.inf, 6.0])
    monkeypatch.setattr(cores_bench, "cores", lambda: 2)
    monkeypatch.setattr(cores_bench, "seconds_per_step", lambda *each: asked.append(each[1:3]) or next(times))
    cores_bench.main(["--busy", "0", "2", "--rounds", "1"])
    assert asked == [(1, 2), *2 * [(1, 1), (1, 2), (2, 2)]]
    first, second = capsys.readouterr().out.splitlines()[1:]
    assert "2.00x as fast as one core, 4.0x as threads, and takes 1.00x its fair share" in first
    assert "1.50x as fast as one core, infx as threads, and takes 0.75x its fair share" in second


def test_the_bill_is_that_of_table_1(capsys):
    bill.main([])
    out = capsys.readouterr().out
    assert "2,664K hours" in out and "2.788M H800 hours = $5.576M" in out and "387 TFLOP/s" in out


def test_fitness_names_three_shares(base, capsys):
    fitness.main([str(base), "--questions", "4", "--device", "cpu"])
    assert re.search(r"right are \d+% of single steps, \d+% of works .* \d+% of whole answers", capsys.readouterr().out)


def test_fitness_of_worked_traces_is_all_there_is(monkeypatch):
    """Whoever writes the rest of the trace is right in every single step and every work once begun."""
    task = fitness.load_task("chain")

    class Reads:
        eos_id = 0

        def encode_trusted(self, text):
            return [ord(letter) for letter in text]

        def decode(self, ids):
            return "".join(map(chr, ids))

    class Made(list):
        def completion(self, row):
            return self[row]

    def solve(model, prompts, *, max_new_tokens, **_):
        made = Made()
        for prompt in map(Reads().decode, prompts):
            question, begun = re.search("<｜User｜>(.*)<｜Assistant｜>(.*)", prompt).groups()
            total, work = int(question[0]), []
            for sign, digit in zip(question[1:-1:2], question[2:-1:2]):
                result = {"+": total + int(digit), "-": total - int(digit), "*": total * int(digit)}[sign] % 10
                work.append(f"{total}{sign}{digit}={result}")
                total = result
            whole = f"<think>{';'.join(work)}</think><answer>{total}</answer>"
            made.append(Reads().encode_trusted(whole.removeprefix(begun)[:max_new_tokens]))
        return made

    monkeypatch.setattr(fitness, "generate", solve)
    assert fitness.fitness(None, Reads(), task, 20) == (1.0, 1.0, 1.0)


def test_thinking_leaves_a_table_and_a_picture(base, tmp_path, capsys):
    flags = ["--base", str(base), "--policy", str(base / "at-025"), "--max_new_tokens", "6", "--task", "compare"]
    thinking.main([*RL, *flags, "--out", str(tmp_path)])
    table = (tmp_path / "thinking.txt").read_text()
    assert all(name in table for name in ("pass@2", "greedy", "thought of 4 tokens", "compare, 4 digits"))
    assert "thought of 8 tokens" not in table and (tmp_path / "thinking.png").stat().st_size > 0


def test_a_thought_is_cut_and_the_answer_asked_for(monkeypatch):
    """Of two answers one thinks beyond its budget: it is asked at once, the other one stays as it is."""
    from data.tasks import load_task
    from data.tasks.exam import draw_questions
    from data.text.tokenizer import load_tokenizer
    from sample import Generation

    tokenizer, tasks = load_tokenizer("plainseek:1024"), [load_task("chain")]
    question = draw_questions(tasks, "test", "held out", [0])[0]
    texts = ["<think>1+1=2;", f"<think></think><answer>{question.problem.answer}</answer>"]
    asked = []

    def answer(model, prompts, **_):
        asked.append(prompts)
        said = texts if len(asked) == 1 else [question.problem.answer + "</answer>"]
        rows = [prompts[0] + tokenizer.encode_trusted(text) for text in said]
        start, ends = torch.tensor([len(prompts[0])] * len(rows)), torch.tensor([*map(len, rows)])
        tokens = torch.tensor([row + [0] * (max(ends) - len(row)) for row in rows])
        finished = torch.tensor([False, True][: len(rows)])
        return Generation(tokens, tokens > 0, start, ends + finished, None, None, finished)

    policy = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(max_position_embeddings=99)),
                             tokenizer=tokenizer, folder=Path("unused"))
    monkeypatch.setattr(thinking, "generate", answer)
    assert thinking.right_within(policy, [question], 4, samples=2).tolist() == [1.0]
    assert len(asked) == 2 and len(asked[1]) == 1
    assert tokenizer.decode(asked[1][0]).endswith("<think>1+1=2;</think><answer>")


def test_quality_takes_what_snapshots_left_and_draws_a_picture(base, tmp_path):
    flags = shlex.split(f"--base {base} --task toy:Letters --steps 1 --max_new_tokens 4 --out {tmp_path}")
    assert base_quality.main([*RL, *flags, "--seeds", "1"])
    table = (tmp_path / "quality.txt").read_text()
    assert all(label in table for label in ("base at 25 %", "base at 100 %", "RL, seed 0, at 50 %"))
    assert (tmp_path / "quality.png").stat().st_size > 0
    stamp = (tmp_path / "quality-025-0" / "log.csv").stat().st_mtime_ns
    assert base_quality.main([*RL, *flags, "--seeds", "1", "--resume"])
    assert (tmp_path / "quality-025-0" / "log.csv").stat().st_mtime_ns == stamp  # finished runs are passed over


def test_distillation_ends_with_a_table(base, tmp_path, capsys):
    out = base.parent
    lines = [json.dumps({"question": f"say {i}", "answer": "<think>1=1</think><answer>1</answer>"}) for i in range(99)]
    (tmp_path / "same.jsonl").write_text("\n".join(lines) + "\n")
    assert train.main(shlex.split(f"--init_from {base} --data examples:{tmp_path}/same.jsonl --out {out} --name rl "
                                  "--steps 60 --lr 1e-2 --tokens_per_step 768 --seq_len 48 --device cpu"))
    flags = shlex.split(f"--base {base} --out {out} --task toy:Same --steps 1 --count 8 --sft_steps 1 "
                        "--max_new_tokens 30")
    assert distill.main([*RL, *flags])
    table = (out / "distill.txt").read_text()
    assert all(f"distill-{label}" in table for label in ("0-small", "1-taught", "2-small-rl", "3-taught-rl"))
    small = json.loads((out / "distill-0-small" / "train.json").read_text())
    like = json.loads((base / "train.json").read_text())
    assert small["set"] == distill.SMALL and small["data"] == like["data"] and small["steps"] == like["steps"]
    assert len((out / "distill-good.jsonl").read_text().splitlines()) == 8


def test_commands_of_distillation_have_the_knobs_of_the_study(base, tmp_path):
    flags = ["--base", str(base), "--teacher", str(base), "--out", str(tmp_path), "--seed", "3", "--lr", "1e-3"]
    pretrain, write, teach, small, taught, exam = understood(distill.commands(
        lab.read_flags(distill.DistillConfig, flags, "", **distill.USUAL)))
    assert write.count == 1500 and write.base == str(base) and teach.seed == small.seed == 3 and pretrain.seed == 0
    assert small.steps == taught.steps == 60 and small.lr == 1e-3 and taught.base.endswith("distill-1-taught")
    assert len(exam.exam) == 5 and exam.eval_samples == 8 and not exam.resume


def test_a_flag_beside_a_variant_reaches_the_runs_of_a_study():
    config = lab.read_flags(RLConfig, ["--variant", "dapo", "--kl_beta", "0.001"], "")
    run, = understood([lab.rl_command(config, "rl")])
    assert (run.kl_beta, run.aggregate, run.clip_eps_high) == (0.001, "token", 0.28)


def test_fp8_is_compared_with_bf16(base, tmp_path, capsys):
    flags = ["--data", str(base.parent.parent / "text"), "--out", str(tmp_path), "--steps", "2", "--seeds", "1"]
    assert fp8.main([*TINY, *flags])
    out = capsys.readouterr().out
    assert "fp8-fp8-0 against" in out and "fp8-reference-0 against" in out and (tmp_path / "compare.png").exists()
    runs = understood(fp8.commands(lab.read_flags(fp8.Fp8Config, [], "", **fp8.USUAL)))
    assert [(run.precision, run.seed) for run in runs[:4]] == [("bf16", 0), ("fp8", 0), ("bf16", 1), ("fp8", 1)]
    assert len(runs) == 7 and {(run.steps, run.lr) for run in runs} == {(500, 5e-4)}


def minutes_knobs(recipe: str, recipes=minutes.RECIPES) -> list:
    """The knobs of train.py and rl.py by one recipe of the study."""
    return understood([f"python {program} {flags}" for program, flags in zip(CONFIGS, recipes[recipe])])


def test_recipes_are_compared_in_seconds_of_the_processor(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(minutes, "RECIPES", {"now": ("", ""), "before": ("--lr 1e-3", "--constant_until 1")})
    flags = ["--train_flags", shlex.join([*TINY, "--data", str(base.parent.parent / "text"), "--steps", "4"]),
             "--rl_flags", shlex.join([*RL, "--task", "toy:Same", "--steps", "1", "--max_new_tokens", "8"])]
    minutes.main(["--out", str(tmp_path), "--seeds", "1", "--questions", "2", *flags])
    *_, now, before = capsys.readouterr().out.splitlines()
    assert now.startswith("now, seed 0") and before.startswith("before, seed 0")
    assert all(float(word) > 0 for line in (now, before) for word in line[14:].split(" s")[:2])
    of_train, of_rl = minutes_knobs("before")
    assert (of_train.steps, of_train.tokens_per_step, of_train.lr) == (1000, 4096, 2e-3)
    assert (of_rl.steps, of_rl.lr, of_rl.constant_until) == (100, 1e-4, 1)


@pytest.mark.parametrize("claim, words", [(base_quality, "python train.py --snapshots"),
                                          (distill, "python rl.py --recipe r1")])
def test_what_a_study_needs_is_named(claim, words, tmp_path):
    with pytest.raises(UserError, match=words):
        claim.main(["--base", str(tmp_path), "--out", str(tmp_path)])


def test_commands_of_the_book_are_understood_and_its_pictures_there():
    text = BOOK.read_text(encoding="utf-8")
    blocks = re.findall(r"```\n(python .*?)```", text, re.S)
    commands = [command for block in blocks for line in block.splitlines() for command in line.split(" && ")]
    assert len(understood(commands)) > 12
    told = " ".join(re.findall(r"`(\w+=[^`]+)`", text)).split()  # the sizes of the speed table
    assert train.set_fields(train.Config, told)["hidden_size"] == 256
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 8 and all((BOOK.parent / link).exists() for link in links)


def test_a_flag_wins_over_what_a_study_usually_does():
    assert lab.read_flags(RLConfig, ["--steps", "7"], "", steps=60, name="x").steps == 7
    variant = lab.read_flags(RLConfig, ["--variant", "dr_grpo"], "", steps=60)
    assert variant.steps == 60 and variant.kl_beta == 0.0 and not variant.divide_by_std


def test_ranks_that_a_token_visits_are_drawn(tmp_path, monkeypatch):
    config = visits.VisitsConfig(out=str(tmp_path))
    knobs = understood([visits.command(name, config).split("--nproc_per_node=4 ")[1].join(["python ", ""])
                        for name in visits.RUNS])
    assert [each.expert_parallel for each in knobs] == [4, 4] and "n_group=4" in knobs[0].set

    def run(words):
        name = words[words.index("--name") + 1]
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.csv").write_text("step,ranks_per_token,mb_sent\n0,,\n1,1.5,2\n2,1.25,2\n")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(visits.subprocess, "run", run)
    visits.main(["--out", str(tmp_path)])
    assert (tmp_path / "visits.png").read_bytes()[:4] == b"\x89PNG"

"""The loop of rl.py on tiny models with random weights: ranks, resume, masks, masked updates, bad input."""

import csv
import itertools
import os
import shlex
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

import rl
from data import UserError
from data.tasks import is_test, load_task
from data.tokenizer import load_tokenizer
from kernels import IGNORE
from model import Config, Transformer, load_pretrained, save_pretrained
from rl import RLConfig, build_trainer, draw_questions, group_advantages, is_dead, make_batch, score
from sample import Generation, parse_flags
from train import Dist, setup_distributed

HERE = Path(__file__).parent
sys.path.append(str(HERE))  # toy:Letters is found, also by spawned processes
WIDTHS = dict(hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
              num_attention_heads=2, n_routed_experts=8, num_experts_per_tok=2, q_lora_rank=16, kv_lora_rank=16,
              qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, max_position_embeddings=128)
SHORT = dict(task="toy:Letters", steps=3, questions=4, group_size=4, max_new_tokens=8, eval_every=2,
             eval_questions=2, eval_samples=2, device="cpu", micro_batch=8)

DEADLY = dict(task="toy:Deadly", steps=6, eval_every=3)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A checkpoint directory with random weights and the real tokenizer."""
    torch.manual_seed(0)
    path, tokenizer = tmp_path_factory.mktemp("base"), load_tokenizer("plainseek:1024")
    config = Config.preset("tiny", **WIDTHS, vocab_size=tokenizer.vocab_size, bos_token_id=tokenizer.bos_id,
                           eos_token_id=tokenizer.eos_id)
    save_pretrained(Transformer(config), path, tokenizer)
    return path


@pytest.fixture
def trainer(base, tmp_path):
    """`trainer(steps=5, ...)` is a trainer of the toy task in an empty folder."""
    def make(world=None, **changes) -> rl.RLTrainer:
        knobs = SHORT | {"base": str(base), "out": str(tmp_path / "out")} | changes
        return build_trainer(RLConfig(**knobs), world or Dist())
    return make


def rows(path: Path) -> list[dict]:
    with open(path / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def without_times(log: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if not (name == "seconds" or name.endswith("_s"))}
            for row in log]


# -------------------------------------------------------------------------------------- ranks and resume


def worker(rank: int, port: int, base: str, out: str, changes: dict):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    world = setup_distributed("cpu")
    build_trainer(RLConfig(**SHORT | {"base": base, "out": out} | changes), world).run()
    world.close()


def test_two_ranks_are_one(base, trainer, tmp_path):
    changes = {"updates": 2, "resample": 2, "aggregate": "token", "task": "toy:Half", "eval_every": 3}
    one = trainer(name="one", **changes)
    one.run()
    port = 28400 + os.getpid() % 500
    mp.spawn(worker, args=(port, str(base), str(tmp_path / "out"), changes | {"name": "two"}), nprocs=2)
    logs = [rows(tmp_path / "out" / name) for name in ("one", "two")]
    assert len(logs[0]) == len(logs[1]) == 3
    for alone, shared in zip(*logs):
        for column in ("reward", "accuracy", "total", "pg", "kl", "entropy", "dead", "length", "length_q3", "max_vio"):
            assert float(shared[column]) == pytest.approx(float(alone[column]), abs=1e-5), column
        assert float(shared["grad_norm"]) == pytest.approx(float(alone["grad_norm"]), rel=1e-3)
    model = load_pretrained(tmp_path / "out" / "two")
    for (name, p), q in zip(one.model.named_parameters(), model.parameters()):
        torch.testing.assert_close(p, q, atol=2e-4, rtol=1e-3, msg=name)


def test_kill_and_resume_give_the_log_and_the_weights_of_an_uninterrupted_run(base, python, tmp_path):
    flags = [f"--{name}={value}" for name, value in (SHORT | DEADLY | {"base": base}).items()]
    for name in ("whole", "cut"):
        if name == "cut":
            (tmp_path / "armed").touch()
        done = python("rl.py", *flags, "--name", name, PYTHONPATH=str(HERE))
        assert done.returncode == (0 if name == "whole" else -9), done.stderr
    cut = tmp_path / "out" / "cut"
    assert 3 < len(rows(cut)) < 6
    again = python("rl.py", *flags, "--name", "cut", "--resume", PYTHONPATH=str(HERE))
    assert again.returncode == 0 and "resumed at step" in again.stdout, again.stderr
    logs = [without_times(rows(tmp_path / "out" / name)) for name in ("whole", "cut")]
    assert logs[0] == logs[1] and len(logs[0]) == 6
    weights = [(tmp_path / "out" / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
    for name in ("rl.png", "thinking.png", "expert_load.png", "answers.txt", "report.txt", "rl.json", "config.json"):
        assert (cut / name).stat().st_size > 0
    last = without_times(rows(cut))[-1]
    assert last["eval_accuracy"] != "" and float(last["ratio_gap"]) < 1e-4
    with pytest.raises(UserError, match="kl_beta was 0.001, is 0.5"):
        knobs = SHORT | DEADLY | {"base": str(base), "kl_beta": 0.5}
        build_trainer(RLConfig(**knobs, name="cut", out=str(tmp_path / "out"), resume=True), Dist())


# --------------------------------------------------------------------------------------------- the update


def test_it_learns_what_is_rewarded_and_a_large_kl_weight_holds_it_back(trainer):
    reached = {}
    for beta in (1e-6, 1e3):
        run = trainer(name=f"kl{beta}", kl_beta=beta, reference_every=1000, lr=5e-3, questions=16, warmup_steps=1)
        log = [run.advance() for _ in range(20)]
        assert log[0]["kl"] == 0 and all(row["kl"] >= 0 for row in log)
        reached[beta] = log
    gain = {beta: sum(row["reward"] for row in log[-5:]) / 5 - log[0]["reward"] for beta, log in reached.items()}
    free, held = reached[1e-6], reached[1e3]
    assert gain[1e-6] > 0.2 and gain[1e3] < gain[1e-6] / 2
    assert held[-1]["kl"] < 0.15 * free[-1]["kl"]


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_without_a_difference_in_reward_only_weight_decay_moves_parameters(trainer, beta):
    run = trainer(task="toy:Never", weight_decay=0.5, kl_beta=beta)
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    values = run.advance()
    assert values["dead"] == 1 and values["grad_norm"] < 1e-6
    for name, p in run.model.named_parameters():
        decays = p.ndim > 1 and p.requires_grad
        expected = before[name] * (1 - values["lr"] * 0.5) if decays else before[name]
        torch.testing.assert_close(p, expected, atol=1e-9 if beta == 0 else 2e-6, rtol=1e-6, msg=name)


def test_what_rl_leaves_as_it_is(trainer):
    run = trainer(lr=1e-2)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    for _ in range(2):
        run.advance()
    moved = {name for name, tensor in run.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert not any(".gate." in name or "bias" in name or f".layers.{WIDTHS['num_hidden_layers']}." in name
                   for name in moved)
    assert any("experts" in name for name in moved) and any("self_attn" in name for name in moved)
    run = trainer(lr=1e-2, train_router=True, bias_update_speed=0.01, name="router")
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    run.advance()
    moved = {name for name, tensor in run.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any(name.endswith("gate.weight") for name in moved)
    assert any(name.endswith("e_score_correction_bias") for name in moved)


def test_a_sampler_that_is_not_the_policy_is_noticed(trainer, monkeypatch):
    run = trainer()
    run.advance()  # the two agree
    honest = rl.generate

    def shifted(*args, **knobs):
        made = honest(*args, **knobs)
        made.logps += 2e-4 * made.mask
        return made

    monkeypatch.setattr(rl, "generate", shifted)
    with pytest.raises(UserError, match="sampler and trainer differ by 2"):
        run.advance()


def test_a_temperature_that_is_forgotten_in_the_scores_is_noticed(trainer, monkeypatch):
    run = trainer(temperature=0.7)
    run.advance()
    monkeypatch.setattr(rl, "score", lambda model, batch, temperature: score(model, batch, 1.0))
    with pytest.raises(UserError, match="sampler and trainer differ"):
        run.advance()


@pytest.mark.parametrize("knobs", [
    {}, {"temperature": 0.7}, {"keep_routing": False}, {"top_p": 0.6, "keep_sampling_mask": True},
    {"top_k": 50, "temperature": 1.3, "keep_sampling_mask": True, "keep_routing": True}], ids=str)
def test_scores_are_the_samplers_log_probs(trainer, knobs):
    run = trainer(**knobs)
    answers, _ = run.rollout()
    batch = make_batch(answers, run.config)
    assert (batch.replay is not None) == run.config.keep_routing
    assert (batch.keep is not None) == run.config.keep_sampling_mask
    with torch.no_grad():
        logps = score(run.model, batch, run.config.temperature)
        torch.testing.assert_close(logps, batch.sampler_logps, atol=2e-5, rtol=0)
        for micro in batch.micros(3):
            torch.testing.assert_close(score(run.model, micro, run.config.temperature), micro.sampler_logps,
                                       atol=2e-5, rtol=0)
    assert sum(len(micro.tokens) for micro in batch.micros(3)) == len(batch.tokens)


def test_routing_is_replayed_and_not_chosen_anew(trainer):
    run = trainer(keep_routing=True)
    batch = make_batch(run.rollout()[0], run.config)
    with torch.no_grad():
        before = score(run.model, batch, 1.0)
        for _, moe in run.model.moe_layers():
            moe.gate.e_score_correction_bias.copy_(torch.randn(8))  # other experts would be chosen now
        torch.testing.assert_close(score(run.model, batch, 1.0), before, atol=2e-5, rtol=0)
        batch.replay = None
        assert (score(run.model, batch, 1.0) - before).abs().max() > 1e-3


def test_a_truncated_rollout_without_its_mask_is_off_policy_and_not_stopped_for_it(trainer):
    assert trainer(top_p=0.6).advance()["ratio_gap"] > 1e-2
    assert trainer(top_p=0.6, keep_sampling_mask=True, name="kept").advance()["ratio_gap"] < 1e-4


def test_the_stop_token_is_trained_and_the_rest_is_masked(base):
    eos = 2
    tokens = torch.tensor([[7, 8, 5, eos, 0], [7, 8, 5, 6, 9]])  # a finished answer and one that was cut off
    mask = torch.tensor([[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]], dtype=torch.bool)
    made = Generation(tokens, mask, torch.tensor([2, 2]), torch.tensor([4, 5]), torch.zeros(2, 5), torch.zeros(2, 5),
                      torch.tensor([True, False]))
    answers = rl.Answers([], made, ["", ""], [], torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    batch = make_batch(answers, RLConfig(group_size=2, max_new_tokens=3))
    assert batch.targets.tolist() == [[IGNORE, 5, eos, IGNORE], [IGNORE, 5, 6, 9]]
    assert batch.advantages.tolist() == pytest.approx([0.5**0.5, -(0.5**0.5)])  # the cut off answer counts
    assert batch.weights.tolist() == [[0, 0.25, 0.25, 0], [0, 1 / 6, 1 / 6, 1 / 6]]
    short = batch.micros(1)
    assert [micro.tokens.shape[1] for micro in short] == [3, 4] and short[0].targets.tolist() == [[IGNORE, 5, eos]]


def test_overlong_answers_are_punished_in_the_advantage_only(trainer):
    run = trainer(overlong_tokens=8, divide_by_std=False)
    answers, measured = run.rollout()
    expected = answers.rewards + rl.overlong_penalty(answers.lengths.view(4, 4), 8, 8)
    torch.testing.assert_close(make_batch(answers, run.config).advantages.double(),
                               group_advantages(expected, False).flatten(), atol=1e-6, rtol=0)
    assert measured["reward"] == pytest.approx(float(answers.rewards.mean()))


# ------------------------------------------------------------------------------------------- dead groups


def test_dead_groups_are_replaced_and_the_others_stay(trainer):
    plain = trainer(task="toy:Half", questions=12, name="plain")
    first, measured = plain.rollout()
    dead = is_dead(first.rewards)
    assert 0.2 < float(dead.double().mean()) < 0.9 and measured["dead"] == pytest.approx(float(dead.double().mean()))
    run = trainer(task="toy:Half", questions=12, resample=6, keep_routing=True, keep_sampling_mask=True, top_k=40)
    assert not is_dead(run.rollout()[0].rewards).any()
    again, _ = trainer(task="toy:Half", questions=12, resample=6, name="again").rollout()
    G = run.config.group_size
    for group in range(12):
        same = again.questions[group * G].problem == first.questions[group * G].problem
        assert same != bool(dead[group])
        if same:
            assert again.texts[group * G : group * G + G] == first.texts[group * G : group * G + G]
            assert torch.equal(again.rewards[group], first.rewards[group])
    for row, text in enumerate(again.texts):  # text, tokens, reward and question of a row belong together
        assert run.tokenizer.decode(again.generation.completion(row)) == text
        reward = rl.reward_total(load_task("toy:Half").reward(again.questions[row].problem, text))
        assert reward == again.rewards[row // G, row % G]


def test_a_run_without_hope_stops_with_advice(trainer, monkeypatch):
    monkeypatch.setattr(rl, "PATIENCE", 3)
    run = trainer(task="toy:Never", steps=10)
    with pytest.raises(UserError, match="every group dead for 3 steps.*--temperature.*easier.*cold start"):
        run.run()
    assert run.step == 3


def test_a_verifier_that_raises_stops_the_run_and_the_text_is_saved(trainer):
    run = trainer(task="toy:Broken")
    with pytest.raises(UserError, match="verifier of task letters raised ZeroDivisionError"):
        run.advance()
    saved = (run.folder.path / "broke_the_verifier.txt").read_text()
    assert "question='say " in saved and len(saved.splitlines()[1]) > 0


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("changes, words", [
    ({"group_size": 1}, "group_size: got 1, wanted at least 2: an advantage compares answers"),
    ({"max_new_tokens": 128}, "max_new_tokens: got 128; questions have up to .* context 128, wanted at most"),
    ({"task": "toy:OneQuestion"}, "no test question in 1,000 draws"),
    ({"task": "toy:Nothing"}, "task toy:Nothing: .*Nothing"),
    ({"task": "chian"}, "task: got 'chian'.*did you mean 'chain'"),
    ({"base": "nowhere"}, "no checkpoint in nowhere; python train.py makes out/base"),
    ({"overlong_tokens": 9}, "overlong_tokens: got 9, wanted 0 to max_new_tokens"),
    ({"questions": 0}, "questions: got 0"), ({"name": "a/b"}, "name: got 'a/b'"),
    ({"temperature": 0.0}, "temperature")])
def test_bad_input_is_one_line(trainer, changes, words):
    with pytest.raises(UserError, match=words) as caught:
        trainer(**changes)
    assert "\n" not in str(caught.value)


def test_a_finished_run_is_not_written_over(trainer):
    run = trainer()
    run.save()
    with pytest.raises(UserError, match="holds a run already"):
        trainer()
    trainer(overwrite=True)


def test_questions_that_cannot_be_shared(trainer):
    with pytest.raises(UserError, match="questions: got 4, wanted a multiple of the 3 ranks"):
        trainer(world=Dist(0, 3))


def test_a_missing_base_is_one_line_and_code_2(python):
    done = python("rl.py")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "python train.py makes out/base" in done.stderr


# --------------------------------------------------------------------------------------------- evaluation


def test_pass_at_k_is_the_mean_over_all_subsets():
    right = torch.tensor([[1, 0, 0, 1, 0, 0], [0] * 6, [1] * 6, [0, 0, 0, 0, 0, 1]], dtype=torch.bool)
    for k in range(1, 7):
        subsets = [list(itertools.combinations(row, k)) for row in right.tolist()]
        brute = [sum(map(any, each)) / len(each) for each in subsets]
        assert rl.pass_at_k(right, k).tolist() == pytest.approx(brute, abs=1e-12)


def test_majority_at_k_is_the_mean_over_all_orders():
    votes = [["7", "7", "3", None, "3"], ["1", "2", "3", "4", "5"], [None] * 5, ["8", "8", "8", "2", None]]
    right = torch.tensor([[text == good for text in texts] for texts, good in zip(votes, "7 4 1 8".split())])
    for k in range(1, 6):
        brute = []
        for texts, good in zip(votes, "7 4 1 8".split()):
            orders = list(itertools.permutations(texts, k))
            wins = 0
            for order in orders:
                cast = [text for text in order if text is not None]
                wins += bool(cast) and max(cast, key=lambda text: (cast.count(text), -cast.index(text))) == good
            brute.append(wins / len(orders))
        draws = 1 if k == 5 else 4000
        found = rl.majority_at_k(votes, right, k, draws=draws)
        if k < 5:
            assert found.tolist() == pytest.approx(brute, abs=0.04)
    assert rl.majority_at_k(votes, right, 5).tolist() == [1, 0, 0, 1]


def test_errors_are_over_questions():
    mean, error = rl.mean_error(torch.tensor([0.0, 1.0, 0.5, 0.5]))
    assert mean == 0.5 and error == pytest.approx((1 / 6) ** 0.5 / 2)


def test_evaluation_asks_the_same_questions_of_the_test_split_every_time():
    tasks = [load_task("chain"), load_task("compare")]
    questions = draw_questions(tasks, "test", "held out", range(40))
    again = draw_questions(tasks, "test", "held out", range(40))
    assert [(q.problem, q.seed) for q in questions] == [(q.problem, q.seed) for q in again]
    assert all(is_test(q.problem.question) for q in questions) and len({q.task.name for q in questions}) == 2
    assert not any(is_test(q.problem.question) for q in draw_questions(tasks, "train", "0 0 0", range(40)))


def test_two_tasks_and_every_variant_run(trainer):
    for variant in rl.VARIANTS:
        config = parse_flags(RLConfig, shlex.split(rl.VARIANTS[variant]), "")
        changes = {name: value for name, value in vars(config).items() if value != getattr(RLConfig(), name)}
        changes["overlong_tokens"] = min(8, changes.get("overlong_tokens", 0))
        run = trainer(name=variant, task="toy:Letters,languages", top_p=0.9 if variant == "v3.2" else 1.0, updates=2,
                      **changes)
        values = [run.advance() for _ in range(2)][-1]
        assert values["ratio_gap"] < 1e-4 and torch.isfinite(torch.tensor(values["total"]))
        assert any("language" in parts for parts in run.ask(range(8), 0).parts)

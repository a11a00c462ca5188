"""The loop of rl.py on tiny models with random weights: ranks, resume, updates, bad input."""

import json
from pathlib import Path

import pytest
import torch

import rl
from data.io.cli import UserError
from data.io.run import RunFolder
from data.tasks import exam, load_task
from data.tasks.exam import draw_questions
from data.tasks.task import is_test, reward_total
from kernels import IGNORE
from model import Transformer
from rl import RLConfig, advantages_and_weights, build_trainer, group_advantages, is_dead, micro_batches, score
from sample import Generation
from tests.conftest import on_ranks, refused
from train import Dist

SHORT = dict(task="tests.toy:Letters", steps=3, questions=4, group_size=4, max_new_tokens=8,
             eval_every=2, eval_questions=2, eval_samples=2, device="cpu", micro_batch=8)
DEADLY = dict(task="tests.toy:Deadly", steps=6, eval_every=3)


@pytest.fixture
def trainer(base, tmp_path):
    """`trainer(steps=5, ...)` is a trainer of the toy task in an empty folder."""
    def make(world=None, **changes) -> rl.RLTrainer:
        knobs = SHORT | {"base": str(base), "out": str(tmp_path / "out")} | changes
        return build_trainer(RLConfig(**knobs), world or Dist())
    return make


def rows(path: Path) -> list[dict]:
    return RunFolder(path).rows()


def without_times(log: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "seconds" and name[-2:] != "_s"} for row in log]


def run_of_two(world: Dist, base: str, out: str, changes: dict):
    build_trainer(RLConfig(**SHORT | {"base": base, "out": out} | changes), world).run()


def test_two_ranks_are_one(base, trainer, tmp_path):
    changes = {"updates": 2, "resample": 2, "aggregate": "token", "task": "tests.toy:Half", "eval_every": 3}
    one = trainer(name="one", **changes)
    one.run()
    out = tmp_path / "out"
    on_ranks(2, run_of_two, str(base), str(out), changes | {"name": "two"})
    logs = [rows(out / name) for name in ("one", "two")]
    assert len(logs[0]) == len(logs[1]) == 3
    for alone, shared in zip(*logs):
        for column in ("reward", "accuracy", "total", "pg", "kl", "entropy", "dead", "length", "length_q3", "max_vio"):
            assert float(shared[column]) == pytest.approx(float(alone[column]), abs=1e-5), column
        assert float(shared["grad_norm"]) == pytest.approx(float(alone["grad_norm"]), rel=1e-3)
    model = Transformer.from_pretrained(out / "two")
    for (name, p), q in zip(one.model.named_parameters(), model.parameters()):
        torch.testing.assert_close(p, q, atol=2e-4, rtol=1e-3, msg=name)


def test_kill_and_resume_give_log_and_weights_of_an_uninterrupted_run(base, python, here, tmp_path):
    flags = [f"--{name}={value}" for name, value in (SHORT | DEADLY | {"base": base}).items()]
    out = tmp_path / "out"
    here(rl.main, *flags, "--name", "whole", cwd=tmp_path)
    (tmp_path / "armed").touch()
    done = python("rl.py", *flags, "--name", "cut")
    assert done.returncode == -9, done.stderr
    cut = out / "cut"
    assert 3 < len(rows(cut)) < 6
    assert "resumed at step" in here(rl.main, *flags, "--name", "cut", "--resume", cwd=tmp_path)
    logs = [without_times(rows(out / name)) for name in ("whole", "cut")]
    assert logs[0] == logs[1] and len(logs[0]) == 6
    for name in ("model.safetensors", "answers.txt", "report.json"):
        assert (cut / name).read_bytes() == (out / "whole" / name).read_bytes(), name
    for name in ("rl.png", "expert_load.png", "report.txt", "rl.json", "config.json"):
        assert (cut / name).stat().st_size > 0
    report = json.loads((cut / "report.json").read_text())
    assert report.keys() == {"before", "after"} and report["after"]["pass"].keys() == {"1", "2"}
    last = without_times(rows(cut))[-1]
    assert last["eval_accuracy"] != "" and float(last["ratio_gap"]) < 1e-4
    with pytest.raises(UserError, match="kl_beta was 0.001, is 0.5"):
        knobs = SHORT | DEADLY | {"base": str(base), "kl_beta": 0.5}
        build_trainer(RLConfig(**knobs, name="cut", out=str(out), resume=True), Dist())


def test_it_learns_what_is_rewarded_and_a_large_kl_weight_holds_it_back(trainer):
    reached = {}
    for beta in (1e-6, 1e3):
        run = trainer(name=f"kl{beta}", kl_beta=beta, reference_every=1000, lr=5e-3, questions=16, warmup_steps=1,
                      steps=20, constant_until=1.0)
        log = [run.advance() for _ in range(20)]
        assert log[0]["kl"] == 0 and all(row["kl"] >= 0 for row in log)
        reached[beta] = log
    gain = {beta: sum(row["reward"] for row in log[-5:]) / 5 - log[0]["reward"] for beta, log in reached.items()}
    free, held = reached[1e-6], reached[1e3]
    assert gain[1e-6] > 0.2 and gain[1e3] < gain[1e-6] / 2
    assert held[-1]["kl"] < 0.15 * free[-1]["kl"]


@pytest.mark.parametrize("until, rates", [(0.5, [0.5, 1, 1, 0.5]), (1.0, [0.5, 1, 1, 1])])
def test_learning_rate_rises_stays_and_falls(trainer, until, rates):
    run = trainer(steps=4, warmup_steps=2, constant_until=until, lr=1e-3)
    assert [run.advance()["lr"] / 1e-3 for _ in range(4)] == pytest.approx(rates)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_without_a_difference_in_reward_only_weight_decay_moves_parameters(trainer, beta):
    run = trainer(task="tests.toy:Never", weight_decay=0.5, kl_beta=beta)
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    values = run.advance()
    assert values["dead"] == 1 and values["grad_norm"] < 1e-6
    for name, p in run.model.named_parameters():
        decays = p.ndim > 1 and p.requires_grad
        expected = before[name] * (1 - values["lr"] * 0.5) if decays else before[name]
        atol = 1e-9 if beta == 0 else 2e-6
        torch.testing.assert_close(p, expected, atol=atol, rtol=1e-6, msg=name)


def test_what_rl_leaves_as_it_is(trainer):
    def moved_by(run) -> set[str]:
        before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
        for _ in range(2):
            run.advance()
        return {name for name, tensor in run.model.state_dict().items() if not torch.equal(tensor, before[name])}

    moved = moved_by(trainer(lr=1e-2))
    still = (".gate.", "bias", ".layers.2.")  # layer 2 is the MTP module
    assert not any(part in name for name in moved for part in still)
    assert any("experts" in name for name in moved) and any("self_attn" in name for name in moved)
    moved = moved_by(trainer(lr=1e-2, train_router=True, bias_update_speed=0.01, name="router"))
    assert any(name.endswith("gate.weight") for name in moved)
    assert any(name.endswith("e_score_correction_bias") for name in moved)


def test_a_sampler_that_is_not_the_policy_is_noticed(trainer, monkeypatch):
    run = trainer()
    run.advance()  # the two agree
    honest = rl.generate

    def shifted(*args, **knobs):
        made = honest(*args, **knobs)
        made.logps.add_(2e-4 * made.mask)
        return made

    monkeypatch.setattr(rl, "generate", shifted)
    with pytest.raises(UserError, match="sampler and trainer differ by 2"):
        run.advance()


def test_a_temperature_that_is_forgotten_in_the_scores_is_noticed(trainer, monkeypatch):
    run = trainer(temperature=0.7)
    run.advance()
    monkeypatch.setattr(rl, "score", lambda model, made, temperature, keep_routing=False:
                        score(model, made, 1.0, keep_routing))
    with pytest.raises(UserError, match="sampler and trainer differ"):
        run.advance()


@pytest.mark.parametrize("knobs", [
    {}, {"temperature": 0.7}, {"keep_routing": False}, {"top_p": 0.6, "keep_sampling_mask": True},
    {"top_k": 50, "temperature": 1.3, "keep_sampling_mask": True, "keep_routing": True}], ids=str)
def test_scores_are_the_samplers_log_probs(trainer, knobs):
    run = trainer(**knobs)
    made = run.rollout()[0].made
    assert (made.support is not None) == run.config.keep_sampling_mask
    micros = micro_batches(made, 3)
    assert sorted(torch.cat([rows for rows, _ in micros]).tolist()) == list(range(16))
    with torch.no_grad():
        for micro in (made, *(micro for _, micro in micros)):
            assert micro.tokens.shape[1] == micro.lengths.max()
            logps = score(run.model, micro, run.config.temperature, run.config.keep_routing)
            torch.testing.assert_close(logps, micro.logps[:, 1:], atol=2e-5, rtol=0)


def test_routing_is_replayed_and_not_chosen_anew(trainer):
    run = trainer(keep_routing=True)
    made = run.rollout()[0].made
    with torch.no_grad():
        before = score(run.model, made, 1.0, keep_routing=True)
        for _, moe in run.model.moe_layers():
            moe.gate.e_score_correction_bias.copy_(torch.randn(8))  # other experts would be chosen
        again = score(run.model, made, 1.0, keep_routing=True)
        torch.testing.assert_close(again, before, atol=2e-5, rtol=0)
        assert (score(run.model, made, 1.0) - before).abs().max() > 1e-3


def test_load_is_of_the_tokens_whose_next_one_was_sampled(trainer):
    made = trainer().rollout()[0].made
    load = rl.routed_load(made, 8)
    assert load.shape == (made.routing.shape[2], 8)
    assert load.sum() == load.shape[0] * 2 * made.mask.sum()
    for layer, counts in enumerate(load.tolist()):
        chosen = made.routing[:, :-1, layer][made.mask[:, 1:]]
        assert counts == [(chosen == expert).sum() for expert in range(8)]


def test_a_truncated_rollout_without_its_mask_is_off_policy_and_not_stopped_for_it(trainer):
    assert trainer(top_p=0.6).advance()["ratio_gap"] > 1e-2
    assert trainer(top_p=0.6, keep_sampling_mask=True, name="kept").advance()["ratio_gap"] < 1e-4


def test_the_stop_token_is_trained_and_the_rest_is_masked(base):
    eos = 2
    tokens = torch.tensor([[7, 8, 5, eos, 0], [7, 8, 5, 6, 9]])  # finished, and cut off
    mask = torch.tensor([[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]], dtype=torch.bool)
    made = Generation(tokens, mask, torch.tensor([2, 2]), torch.tensor([4, 5]), torch.zeros(2, 5),
                      torch.zeros(2, 5), torch.tensor([True, False]))
    rewards = {"total": torch.tensor([[1.0, 0.0]], dtype=torch.float64)}
    config = RLConfig(group_size=2, max_new_tokens=3)
    advantages, weights = advantages_and_weights(rl.Rollout([], made, ["", ""], rewards), config)
    assert advantages.tolist() == pytest.approx([0.5**0.5, -(0.5**0.5)])  # the cut off answer counts
    assert weights.tolist() == [[0, 0.25, 0.25, 0], [0, 1 / 6, 1 / 6, 1 / 6]]
    seen = []

    def model(tokens, targets, **options):
        seen.append(targets.tolist())
        return {"ce": torch.zeros(targets.shape)}

    for micro in (made, *(micro for _, micro in micro_batches(made, 1))):
        score(model, micro, 1.0)
    assert seen == [[[IGNORE, 5, eos, IGNORE], [IGNORE, 5, 6, 9]], [[IGNORE, 5, eos]], [[IGNORE, 5, 6, 9]]]


def test_overlong_answers_are_punished_in_the_advantage_only(trainer):
    run = trainer(overlong_tokens=8, divide_by_std=False)
    rollout, measured = run.rollout()
    rewards, lengths = rollout.rewards["total"], rollout.made.mask.sum(1).view(4, 4)
    expected = group_advantages(rewards + rl.overlong_penalty(lengths, 8, 8), False).flatten()
    advantages = advantages_and_weights(rollout, run.config)[0]
    torch.testing.assert_close(advantages.double(), expected, atol=1e-6, rtol=0)
    assert measured["reward"] == pytest.approx(float(rewards.mean()))


def test_dead_groups_are_replaced_and_the_others_stay(trainer):
    plain = trainer(task="tests.toy:Half", questions=12, name="plain")
    first, measured = plain.rollout()
    dead = is_dead(first.rewards["total"])
    share = float(dead.double().mean())
    assert 0.2 < share < 0.9 and measured["dead"] == pytest.approx(share)
    knobs = dict(task="tests.toy:Half", questions=12, resample=6)
    run = trainer(**knobs, keep_sampling_mask=True, top_k=40)
    mended = run.rollout()[0]
    assert not is_dead(mended.rewards["total"]).any()
    with torch.no_grad():  # routing and support went with their rows
        logps = score(run.model, mended.made, 1.0, keep_routing=True)
    torch.testing.assert_close(logps, mended.made.logps[:, 1:], atol=2e-5, rtol=0)
    again, _ = trainer(**knobs, name="again").rollout()
    for group in range(12):
        same = again.questions[group].problem == first.questions[group].problem
        assert same != bool(dead[group])
        if same:
            assert again.texts[4 * group : 4 * group + 4] == first.texts[4 * group : 4 * group + 4]
            assert torch.equal(again.rewards["total"][group], first.rewards["total"][group])
    for row, text in enumerate(again.texts):  # its tokens, reward and question
        assert run.tokenizer.decode(again.made.completion(row)) == text
        reward = reward_total(load_task("tests.toy:Half").reward(again.asked[row].problem, text))
        assert reward == again.rewards["total"][row // 4, row % 4]


def test_a_run_without_hope_stops_with_advice(trainer, monkeypatch):
    monkeypatch.setattr(rl, "MOST_STEPS_IN_VAIN", 3)
    run = trainer(task="tests.toy:Never", steps=10)
    advice = "every group dead for 3 steps.*--temperature.*easier.*cold start"
    with pytest.raises(UserError, match=advice):
        run.run()
    assert run.step == 3


def test_a_verifier_that_breaks_on_some_answers_gives_them_nothing(trainer):
    run = trainer(task="tests.toy:Picky")
    rollout, _ = run.rollout()
    broke = torch.tensor(["e" in text for text in rollout.texts]).view(4, 4)
    assert broke.any() and not broke.all()
    assert all((values[broke] == 0).all() for values in rollout.rewards.values())
    assert (rollout.rewards["total"][~broke] > 0).any()
    assert "e" in (run.folder.path / "broke_the_verifier.txt").read_text().splitlines()[1]


def test_right_is_accuracy_1_everywhere_and_the_log_has_the_mean(trainer):
    run = trainer(task="tests.toy:Shares", questions=16)
    rollout, measured = run.rollout()
    accuracy = rollout.rewards["accuracy"]
    assert set(accuracy.flatten().tolist()) == {0.0, 0.5, 1.0}
    assert measured["accuracy"] == pytest.approx(float(accuracy.mean())) and measured["format"] == 0
    assert measured["right"] == pytest.approx(float((accuracy == 1).double().mean()))
    assert torch.equal(rollout.right, accuracy == 1)
    found = run.policy.evaluate(8)
    rollout = run.policy.ask(run.policy.questions("test", "held out", range(2)), 8)
    assert found["accuracy"][0] == float(rollout.right.double().mean()) and found["format"] == 0
    good = exam.good_answers(rollout.asked, rollout.texts, rollout.right, {run.policy.tasks[0]: None})
    assert good == {}  # right, but not well formed


def test_a_question_that_is_too_long_is_drawn_again(trainer):
    run = trainer(task="tests.toy:Longish", steps=1, questions=8)
    assert run.run()
    asked = run.policy.questions("train", "here", range(50))
    again = draw_questions(run.policy.tasks, "train", "here", range(50))
    assert max(len(question.problem.question) for question in asked) < 20
    short = [i for i, question in enumerate(again) if len(question.problem.question) < 20]
    assert 10 < len(short) < 40 and all(asked[i] == again[i] for i in short)


def test_a_verifier_that_raises_stops_the_run_and_the_text_is_saved(trainer):
    run = trainer(task="tests.toy:Broken")
    with pytest.raises(UserError, match="verifier of task letters raised ZeroDivisionError"):
        run.advance()
    saved = (run.folder.path / "broke_the_verifier.txt").read_text()
    assert "question='say " in saved and len(saved.splitlines()[1]) > 0


@pytest.mark.parametrize("changes, words", [
    ({"group_size": 1}, "group_size: got 1, wanted at least 2: an advantage compares answers"),
    ({"max_new_tokens": 128}, "max_new_tokens: got 128; questions .* context 128, wanted at most"),
    ({"task": "tests.toy:Long"}, "max_new_tokens: got 8; questions .* context 128, wanted shorter"),
    ({"task": "tests.toy:OneQuestion"}, "no test question in 1,000 draws"),
    ({"task": "tests.toy:Nothing"}, "task tests.toy:Nothing: .*Nothing"),
    ({"task": "chian"}, "task: got 'chian'.*did you mean 'chain'"),
    ({"base": "nowhere"}, "no checkpoint in nowhere; python train.py makes out/base"),
    ({"overlong_tokens": 9}, "overlong_tokens: got 9, wanted 0 to max_new_tokens"),
    ({"questions": 0}, "questions: got 0"), ({"name": "a/b"}, "name: got 'a/b'"),
    ({"temperature": 0.0}, "temperature")])
def test_bad_input_is_one_line(trainer, changes, words):
    with refused(words):
        trainer(**changes)


def test_a_finished_run_is_not_written_over(trainer):
    run = trainer()
    run.save()
    with pytest.raises(UserError, match="holds a run already"):
        trainer()
    trainer(overwrite=True)


def test_questions_that_cannot_be_shared(trainer):
    with pytest.raises(UserError, match="questions: got 4, wanted a multiple of the 3 ranks"):
        trainer(world=Dist(0, 3))


def test_evaluation_asks_the_same_questions_of_the_test_split_every_time():
    tasks = [load_task("chain"), load_task("compare")]
    questions = draw_questions(tasks, "test", "held out", range(40))
    again = draw_questions(tasks, "test", "held out", range(40))
    assert [(q.problem, q.seed) for q in questions] == [(q.problem, q.seed) for q in again]
    assert all(is_test(q.problem.question) for q in questions)
    assert len({q.task.name for q in questions}) == 2
    training = draw_questions(tasks, "train", "0 0 0", range(40))
    assert not any(is_test(q.problem.question) for q in training)


def test_two_tasks_and_every_variant_run(trainer):
    for variant, knobs in rl.VARIANTS.items():
        changes = knobs | {"overlong_tokens": min(8, knobs.get("overlong_tokens", 0))}
        run = trainer(name=variant, task="tests.toy:Letters,languages", updates=2,
                      top_p=0.9 if variant == "v3.2" else 1.0, **changes)
        values = [run.advance() for _ in range(2)][-1]
        assert values["ratio_gap"] < 1e-4 and torch.isfinite(torch.tensor(values["total"]))
        assert "language" in run.ask(range(8), 0).rewards

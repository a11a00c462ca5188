"""train.py: the schedule, one step, runs that are resumed bit for bit, the command line."""

import copy
import json
import math
import shlex
import signal
import time
from pathlib import Path

import pytest
import torch

import train
from data.io import cores
from data.io.cli import UserError, parse_flags
from data.io.ranks import Dist
from data.io.run import RunFolder
from data.io.state import saved_states
from model import Config, Transformer
from tests.conftest import refused, start
from train import Plan, TrainConfig, Trainer, lr_factor, make_optimizer, train_step

WORLD = Dist()
SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=16,
             num_hidden_layers=2, num_attention_heads=2, n_routed_experts=8, num_experts_per_tok=2,
             q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
             max_position_embeddings=64)
STEP = dict(micro_batch=64, lr=1e-3, mtp_loss_weight=0.3, aux_loss_alpha=0.01, bias_update_speed=0.01)


def small_model(**changes) -> Transformer:
    torch.manual_seed(0)
    return Transformer(Config.preset("tiny", **(SMALL | changes)))


def random_batch(sequences=8, T=16, seed=0, vocab=64):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(vocab, (sequences, T + 1), generator=generator)
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


class Repeat:
    """A loader that draws fresh random batches by position."""

    def __init__(self, T=16, vocab=64):
        self.position, self.T, self.vocab = 0, T, vocab

    def next_batch(self, sequences):
        self.position += 1
        return random_batch(sequences, self.T, self.position, self.vocab)

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class NoTokenizer:
    def files(self, context):
        return {"tokenizer.json": b""}

    def save(self, directory, context):
        pass


def trainer_in(path, loader=None, model=None, evals=None, world=WORLD, **knobs) -> Trainer:
    config, folder = TrainConfig(**(dict(steps=6, tokens_per_step=128, seq_len=16, eval_every=3) | knobs)), RunFolder(path, world)
    return Trainer(config, model or small_model(), NoTokenizer(), loader or Repeat(), folder, world, evals)


def finished_in(path, **knobs) -> Trainer:
    trainer = trainer_in(path, **knobs)
    trainer.folder.start({})
    assert trainer.run()
    return trainer


def test_learning_rate_follows_the_closed_formula_of_v3():
    config = TrainConfig(lr=2.2e-4, warmup_until=0.01, constant_until=0.68, cosine_until=0.97,
                         cosine_to=0.1, final_from=0.99, final_to=0.033)
    at = {done: lr_factor(done, config) for done in (0.005, 0.01, 0.5, 0.68, 0.825, 0.97, 0.98, 0.99, 1.0)}
    assert at[0.005] == pytest.approx(0.5)
    assert at[0.01] == at[0.5] == at[0.68] == 1.0
    assert at[0.825] == pytest.approx((1 + 0.1) / 2)  # halfway down the cosine
    assert at[0.97] == pytest.approx(0.1) and at[0.98] == pytest.approx(0.1)
    assert at[0.99] == at[1.0] == 0.033
    falling = [lr_factor(x / 1000, config) for x in range(10, 1001)]
    assert all(a >= b for a, b in zip(falling, falling[1:]))


def test_batch_ramp_and_weights_change_where_the_plan_says():
    config = TrainConfig(steps=100, tokens_per_step=640, seq_len=16, ramp_from=0.2, ramp_until=0.5,
                         mtp_switch=0.7, bias_until=0.9)
    plan = Plan(config, world_size=2)
    assert plan.sequences[0] == 8 and plan.sequences[50] == plan.sequences[-1] == 40
    assert all(n % 2 == 0 and a <= n for a, n in zip(plan.sequences, plan.sequences[1:]))
    assert plan.tokens[-1] == 16 * sum(plan.sequences)
    for step in range(100):
        done, knobs = plan.tokens[step] / plan.tokens[-1], plan.knobs(step)
        assert knobs["mtp_loss_weight"] == (0.1 if done > 0.7 else 0.3)
        assert knobs["bias_update_speed"] == (0.0 if done > 0.9 else config.bias_update_speed)
        assert knobs["lr"] == config.lr * lr_factor(done, config)
    with pytest.raises(UserError, match="3 ranks"):
        Plan(config, world_size=3)


def test_only_matrices_decay():
    model = small_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, lr=0.5, weight_decay=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        kept = 1 - 0.5 * 0.1 if p.ndim >= 2 else 1.0
        torch.testing.assert_close(p.detach(), before[name] * kept, msg=name)


def sgd_step(micro_batch: int = 8, targets_of=lambda y: y, clip: float = 1e9):
    """What train_step gives, and the movement of every parameter: its gradient."""
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    before = [p.detach().clone() for p in model.parameters()]
    tokens, targets = random_batch()
    knobs = STEP | dict(micro_batch=micro_batch, lr=1.0, clip=clip)
    result = train_step(model, optimizer, tokens, targets_of(targets), WORLD, **knobs)
    return result, [a - p.detach() for a, p in zip(before, model.parameters())]


def masked(targets):
    """Unequal numbers of real targets per row, as in fine-tuning."""
    targets = targets.clone()
    for row in range(len(targets)):
        targets[row, : 2 * row] = -100
    return targets


@pytest.mark.parametrize("targets_of", [lambda y: y, masked])
def test_four_micro_batches_are_one_big_batch(targets_of):
    whole, grads = sgd_step(8, targets_of)
    split, grads4 = sgd_step(2, targets_of)
    for name in ("ce", "mtp", "balance", "total", "grad_norm"):
        assert split[name] == pytest.approx(whole[name], rel=1e-5), name
    for a, b in zip(grads, grads4):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert torch.equal(whole["load"], split["load"])


def test_losses_of_a_step_are_the_models_own_means_and_their_weighted_sum():
    result, _ = sgd_step()
    with torch.no_grad():
        losses = small_model()(*random_batch())
    for name in ("ce", "mtp", "balance"):
        assert result[name] == pytest.approx(float(losses[name]), rel=1e-5)
    total = result["ce"] + 0.3 * result["mtp"] + 0.01 * result["balance"]
    assert result["total"] == pytest.approx(total, rel=1e-6)


def test_one_batch_can_be_learned_by_heart():
    model = small_model()
    optimizer = make_optimizer(model, lr=3e-3)
    tokens, targets = random_batch(sequences=4)
    for _ in range(150):
        result = train_step(model, optimizer, tokens, targets, WORLD, **(STEP | dict(lr=1e-2)))
    assert result["ce"] < 0.1


def test_a_step_whose_gradient_is_not_finite_is_left_out():
    model = small_model()
    optimizer = make_optimizer(model, lr=1e-3)
    train_step(model, optimizer, *random_batch(seed=1), WORLD, **STEP)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = copy.deepcopy(list(optimizer.state.values()))
    hook = model.lm_head.weight.register_hook(lambda grad: grad * math.inf)
    assert train_step(model, optimizer, *random_batch(seed=2), WORLD, **STEP)["is_bad"]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for was, now in zip(moments, optimizer.state.values()):
        assert all(torch.equal(was[key], now[key]) for key in was)
    hook.remove()
    assert not train_step(model, optimizer, *random_batch(seed=2), WORLD, **STEP)["is_bad"]
    assert not torch.equal(before["lm_head.weight"], model.lm_head.weight)


def is_sick(argv, world):
    """Of a run in the folder argv[0] the steps 3, 6 and 7; the first one is alone."""
    run = trainer_in(argv[0], max_bad_steps=2, steps=9, eval_every=4, world=world)
    run.folder.start({})
    run.model.lm_head.weight.register_hook(lambda grad: grad * (math.nan if run.step + 1 in {3, 6, 7} else 1))
    run.run()


@pytest.mark.parametrize("processes", [1, 2])
def test_too_many_such_steps_in_a_row_end_the_run(tmp_path, processes, monkeypatch):
    monkeypatch.setattr(cores, "METHOD", "fork")  # sooner
    config = TrainConfig(device="cpu", processes=processes)
    with refused("step 7: the gradient was not finite 2 times in a row: lower --lr; --resume goes on from"):
        with cores.together(config, is_sick, [tmp_path]) as world:
            is_sick([tmp_path], world)
    rows = RunFolder(tmp_path).rows()
    assert [row["bad_steps"] for row in rows] == ["", "0", "0", "1", "0", "0", "1"]
    assert saved_states(tmp_path)[-1].name == "state-000006"


def test_gradient_is_clipped():
    result, moved = sgd_step(clip=0.01)
    norm = math.sqrt(sum(float(each.square().sum()) for each in moved))
    assert result["grad_norm"] > 0.01 and norm == pytest.approx(0.01, rel=1e-3)


def assert_same_state(a: Path, b: Path):
    knobs = [json.loads((path / "train.json").read_text()) for path in (a, b)]
    left, notes = RunFolder(a).resume(knobs[0])
    right, other = RunFolder(b).resume(knobs[1])
    assert left.keys() == right.keys()
    for name in left.keys() - {"log"}:  # which has times
        assert torch.equal(left[name], right[name]), name
    assert notes["step"] == other["step"] and notes["loader"] == other["loader"]


def untimed(path: Path) -> list[dict]:
    timed = ("seconds", "tokens_per_s")
    return [{k: v for k, v in row.items() if k not in timed} for row in RunFolder(path).rows()]


def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    finished_in(tmp_path / "whole")
    half = trainer_in(tmp_path / "half")
    half.folder.start({})
    half.folder.log({"step": 0, "tokens": 0}, half.columns)
    for _ in range(4):
        half.folder.log(half.advance(), half.columns)
        if half.step == 3:
            half.save()  # step 4 is in the log and lost
    torch.manual_seed(99)
    rest = trainer_in(tmp_path / "half", model=Transformer(Config.preset("tiny", **SMALL)))
    rest.restore(*rest.folder.resume({}))
    assert rest.step == 3 and rest.run()
    assert_same_state(tmp_path / "whole", tmp_path / "half")
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "half")
    assert [row["step"] for row in untimed(tmp_path / "half")] == [str(step) for step in range(7)]


def test_pictures_are_drawn(tmp_path):
    evals = {f"{split}_{domain}": [random_batch()] for split in ("val", "train") for domain in ("code", "tales")}
    run = finished_in(tmp_path, evals=evals)
    for name in ("loss", "expert_load", "expert_domains"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert Transformer.from_pretrained(tmp_path).config == run.model.config
    last = RunFolder(tmp_path).rows()[-1]
    assert float(last["val_code"]) == pytest.approx(run.latest["val_code"], rel=1e-5)
    assert last["val_mtp"]


def test_evaluation_disturbs_nothing(tmp_path):
    run = trainer_in(tmp_path, evals={"val_code": [random_batch()]})
    run.advance()
    state = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    run.evaluate()
    assert run.model.training
    assert all(torch.equal(state[name], tensor) for name, tensor in run.model.state_dict().items())


def test_snapshots_keep_the_weights_of_earlier_steps(tmp_path):
    finished_in(tmp_path, snapshots=[0.5, 1.0])
    assert sorted(path.name for path in tmp_path.glob("at-*")) == ["at-050", "at-100"]
    early, late, last = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("at-050", "at-100", "."))
    assert early != late == last and (tmp_path / "at-050" / "config.json").exists()


@pytest.mark.parametrize("precision, dtype", [("auto", torch.float32), ("fp32", torch.float32),
                                              ("bf16", torch.bfloat16), ("fp8", torch.bfloat16)])
def test_precision_of_activations_on_a_cpu(precision, dtype):
    model = small_model()
    told = train.use_precision(model, precision, "fused")
    assert model.compute_dtype == dtype
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert told.startswith(f"precision   {'fp32' if precision == 'auto' else precision}\nkernels ")
    assert model(*random_batch())["ce"].isfinite()


QUICK = shlex.split("--device cpu --tokens_per_step 512 --seq_len 32 --eval_tokens 256 --data text --precision fp32 "
                    "--set hidden_size=32 moe_intermediate_size=16 num_hidden_layers=2")


def wait_for(path: Path, what, seconds=90):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if path.exists() and what(path):
            return
        time.sleep(0.02)
    raise AssertionError(f"{path} did not get there in {seconds} s")


def test_killed_run_resumes_and_its_log_is_whole(workplace, here, refuses):
    flags = [*QUICK, "--steps", "40", "--eval_every", "10", "--name", "killed"]
    run = start("train.py", *flags, cwd=workplace)
    folder = workplace / "out" / "killed"
    wait_for(folder / "log.csv", lambda path: path.read_text().count("\n") > 14)
    run.kill()
    run.communicate()
    out = here(train.main, *flags, "--resume", cwd=workplace)
    assert "resumed at step" in out and "tokens/s" in out and "--- text" in out
    assert [row["step"] for row in RunFolder(folder).rows()] == [str(step) for step in range(41)]
    refuses(train.main, "--overwrite", *flags)


def test_ctrl_c_saves_and_says_how_to_go_on(workplace):
    flags = [*QUICK, "--steps", "5000", "--eval_every", "5000", "--name", "stopped"]
    run = start("train.py", *flags, cwd=workplace)
    folder = workplace / "out" / "stopped"
    wait_for(folder / "log.csv", lambda path: path.read_text().count("\n") > 5)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=30)
    assert run.returncode == 0 and "--name stopped --resume" in out, err
    assert (folder / "model.safetensors").exists() and saved_states(folder)


@pytest.mark.parametrize("flags, told", [
    (["--preset", "tinny"], "tiny"), (["--set", "hidden_sice=3"], "hidden_size"),
    (["--steps", "0"], "steps: got 0, wanted at least 1"), (["--tokens_per_step", "100"], "multiple of seq_len"),
    (["--seq_len", "4096", "--tokens_per_step", "8192"], "max_position_embeddings"), (["--precision", "fp16"], "fp16"),
    (["--name", "a/b"], "plain folder name"), (["--resume", "--name", "nobody"], "nothing to resume"),
    (["--out", "/proc/none"], "/proc/none"), (["--init_from", "nowhere"], "nowhere"),
    (["--keep", "0.1"], "--keep is now --snapshots"), (["--bench"], "--bench is now python -m tests.bench.train"),
    (["--data", "examples:nowhere.jsonl"], "nowhere.jsonl")])
def test_bad_input_is_one_line_and_code_2(flags, told, tmp_path, monkeypatch, refuses):
    monkeypatch.chdir(tmp_path)
    refuses(train.main, told, *flags)


def test_a_preset_brings_its_knobs_and_a_flag_wins():
    for name, knobs in train.PRESET_KNOBS.items():
        config = parse_flags(TrainConfig, ["--preset", name, "--steps", "7"], "",
                             presets={"preset": train.PRESET_KNOBS})
        assert vars(config).items() >= (knobs | {"preset": name, "steps": 7}).items()

"""Rough handling: kills in every phase of a save, damaged files by class, odd terminals, threads, closed pipes.

A plain run takes a sample of each kind; `python -m pytest tests/test_rough.py --rough 10` takes ten times as many."""

import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rl
import sample
import train
from data.io import checkpoint, cli
from data.io import tensors as tensor_files
from data.io.cli import UserError
from data.io.ranks import Dist
from data.io.run import RunFolder
from data.io.state import saved_states
from model import Config, Transformer
from sample import generate
from tests.conftest import ROOT, start
from tests.test_train import QUICK, SMALL, finished_in, random_batch, small_model, trainer_in


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run of three steps."""
    path = tmp_path_factory.mktemp("rough") / "run"
    finished_in(path, steps=3)
    return path


def damaged(raw: bytes, rng: random.Random, kind: str) -> bytes:
    """The bytes with one bit flipped (anywhere, or in the header), a block of zeros, or the end cut off."""
    head = min(len(raw), int.from_bytes(raw[:8], "little") % len(raw) + 8)
    place = rng.randrange(head if kind == "header" else len(raw))
    if kind == "zeros":
        return raw[:place] + bytes(min(512, len(raw) - place)) + raw[place + 512 :]
    if kind == "cut":
        return raw[:place]
    return raw[:place] + bytes([raw[place] ^ 1 << rng.randrange(8)]) + raw[place + 1 :]


def outcomes(path: Path, read, count: int) -> dict[str, int]:
    """Damage a file `count` times in each way; what `read()` gives must be as before, or a UserError of one line."""
    raw, rng, wanted = path.read_bytes(), random.Random(path.name), read()
    found = {"told": 0, "as before": 0, "silent": 0}
    try:
        for kind in ("flip", "header", "zeros", "cut"):
            for _ in range(count):
                path.write_bytes(damaged(raw, rng, kind))
                try:
                    found["as before" if same(read(), wanted) else "silent"] += 1
                except UserError as error:
                    assert "\n" not in str(error) and len(str(error)) < 500
                    found["told"] += 1
    finally:
        path.write_bytes(raw)
    return found


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_damaged_state_is_never_taken(run, rough):
    state = saved_states(run)[-1]
    for name, count in (("shard-00001-of-00001.safetensors", 12), ("notes.json", 4)):
        found = outcomes(state / name, lambda: dict(RunFolder(run, Dist(rank=1)).resume({})[0]), count * rough)
        assert found["silent"] == 0 and found["told"] > 3 * count * rough, found


def test_damaged_weights_are_never_taken(run, rough):
    found = outcomes(run / "model.safetensors", lambda: Transformer.from_pretrained(run).state_dict(), 10 * rough)
    assert found["silent"] == 0 and found["told"] > 35 * rough, found


def test_shards_of_two_saves_are_not_one_model(tmp_path):
    one, two = small_model(), small_model(rms_norm_eps=1e-5)
    for name, model in (("a", one), ("b", two)):
        config = checkpoint.config_to_hf(vars(model.config))
        checkpoint.save_weights(tmp_path / name, model.published(), config, shard_bytes=100_000)
    shard = sorted((tmp_path / "b").glob("*.safetensors"))[0]
    (tmp_path / "a" / shard.name).write_bytes(shard.read_bytes())
    with pytest.raises(UserError, match="is of another save"):
        Transformer.from_pretrained(tmp_path / "a")


HOSTILE = {"hidden_size": [10**9, -1, "96", None, 0.5, [1]], "num_hidden_layers": [100_000, 0, None],
           "num_nextn_predict_layers": [100_000], "n_routed_experts": [10**9, 15], "vocab_size": [10**12],
           "moe_intermediate_size": [10**9], "num_experts_per_tok": [None, 99], "rope_theta": [0, "x", 1e400],
           "rope_scaling": [[], {"type": "linear"}, {"type": "yarn"}, {"type": "yarn", "factor": 0},
                            {"type": "yarn", "factor": 4, "attention_factor": 2}], "model_type": ["llama", 3, None],
           "scoring_func": ["relu"], "rms_norm_eps": [float("nan")]}


@pytest.mark.parametrize("key,value", [(key, value) for key, values in HOSTILE.items() for value in values], ids=str)
def test_a_hostile_config_is_one_line(run, tmp_path, key, value):
    """Before memory is touched: sizes that need terabytes, kinds that no one knows, numbers that are none."""
    values = json.loads((run / "config.json").read_text()) | {key: value}
    os.link(run / "model.safetensors", tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError) as error:
        Transformer.from_pretrained(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_what_no_class_of_transformers_computes_is_no_model_of_theirs(tmp_path):
    from transformers import AutoConfig

    for changes in (dict(scoring_func="softmax"), dict(topk_method="greedy", num_nextn_predict_layers=0)):
        model = small_model(**changes)
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="plainseek"):
            AutoConfig.from_pretrained(tmp_path)
        assert Transformer.from_pretrained(tmp_path).config == model.config


def killed_at(path: Path, point: int) -> bool:
    """Train in a child process that ends, as by kill -9, at the `point`-th call that touches the disk; False: it
    came through."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    count = 0

    def deadly(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count > point:
                os._exit(9)
            return function(*args, **kwargs)
        return call

    code = 1
    try:
        checkpoint.os.replace, checkpoint.os.fsync = deadly(os.replace), deadly(os.fsync)
        tensor_files.save_file = deadly(tensor_files.save_file)
        checkpoint.shutil.rmtree = deadly(checkpoint.shutil.rmtree)
        trainer = trainer_in(path, steps=4, eval_every=2)
        trainer.folder.start({}, overwrite=True)
        code = 0 if trainer.run() else 1
    finally:
        os._exit(code)


def test_a_kill_in_any_phase_of_a_save_leaves_a_run_that_goes_on(tmp_path, rough):
    """At every call that touches the disk: --resume goes on or starts over, and ends as the run that was not killed."""
    assert not killed_at(tmp_path / "whole", 10**9)
    wanted = dict(RunFolder(tmp_path / "whole", Dist(rank=1)).resume({})[0])
    points = range(0, 10**6, max(1, 4 // rough))
    for point in points:
        path = tmp_path / str(point)
        if not killed_at(path, point):
            break
        again = trainer_in(path, model=Transformer(Config.preset("tiny", **SMALL)), steps=4, eval_every=2)
        try:
            tensors, notes = again.folder.resume({})
        except UserError as error:  # killed before it had written its knobs: it was never begun
            assert "nothing to resume" in str(error)
            tensors, notes = {}, {}
        if notes:
            again.restore(tensors, notes)
        else:
            torch.manual_seed(0)
            again = trainer_in(path, steps=4, eval_every=2)
            again.folder.start({}, overwrite=True)
        assert again.run()
        found = RunFolder(path, Dist(rank=1)).resume({})[0]
        assert all(torch.equal(found[name], wanted[name]) for name in wanted if name.startswith(("model", "optim")))
        assert [row["step"] for row in again.folder.rows()] == [str(step) for step in range(5)]
        assert not list(path.glob("*.part")), "what the dead process had begun is gone"
    assert point >= 10


def test_two_runs_cannot_share_a_folder(tmp_path):
    code = (f"import sys; sys.path[:0] = [{str(ROOT)!r}]\nfrom data.io.run import RunFolder\n"
            f"folder = RunFolder({str(tmp_path / 'run')!r})\nfolder.start({{}}, overwrite=True)\n"
            "print('held', flush=True)\nsys.stdin.read()")
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"in use by process {other.pid}: "):
        RunFolder(tmp_path / "run").start({}, overwrite=True)
    other.kill()
    other.communicate()
    RunFolder(tmp_path / "run").start({}, overwrite=True)  # the lock dies with its process


def test_overwrite_takes_away_what_the_old_run_made(tmp_path):
    finished_in(tmp_path, steps=2, snapshots=[0.5])
    (tmp_path / "notes-of-mine.txt").write_text("stay")
    assert (tmp_path / "at-050").is_dir()
    RunFolder(tmp_path).start({"lr": 2}, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "notes-of-mine.txt", "train.json"]


def test_a_run_in_a_thread(tmp_path):
    """As in a notebook: no signals can be caught there, and none are needed."""
    ended = []
    thread = threading.Thread(target=lambda: ended.append(finished_in(tmp_path, steps=2)))
    thread.start()
    thread.join(60)
    assert len(ended) == 1


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    trainer = finished_in(tmp_path, steps=2)
    good = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        trainer.model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite, nothing was saved"):
        trainer.save()
    assert (tmp_path / "model.safetensors").read_bytes() == good


TINY = [*QUICK, "--tokens_per_step", "64", "--eval_tokens", "64"]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_terminals_that_cannot_show_everything(workplace, python, encoding):
    done = python("train.py", *TINY, "--steps", "2", "--name", encoding, cwd=workplace, PYTHONIOENCODING=encoding,
                  LC_ALL="C", PYTHONUTF8="0", HOME="/nonexistent")
    assert done.returncode == 0, done.stderr
    assert "--- text" in done.stdout


def test_a_reader_that_has_seen_enough_ends_the_run_and_it_is_saved(workplace):
    run = start("train.py", *TINY, "--steps", "4000", "--name", "head", cwd=workplace)
    while "train 200/" not in run.stdout.readline():
        pass
    run.stdout.close()
    assert run.wait(60) == 141 or run.returncode == 0
    assert saved_states(workplace / "out" / "head")


@pytest.mark.parametrize("flags,told", [
    (["--overwrite", "--data", "typo"], "typo"), (["--beta1", "1"], "beta1"), (["--seed", "-1"], "seed"),
    (["--snapshots", "nan"], "snapshots"), (["--lr", "inf"], "lr"),
    (["--set", "norm_topk_prob=maybe"], "norm_topk_prob"), (["--set", "hidden_size=1000000000"], "this machine has"),
    (["--init_from", "out/kept", "--preset", "small"], "preset")])
def test_what_destroys_comes_last(workplace, here, flags, told, monkeypatch, refuses):
    """A typo beside --overwrite: one line, and the old run is as it was."""
    monkeypatch.chdir(workplace)
    if not Path("out/kept").exists():
        here(train.main, *TINY, "--steps", "2", "--name", "kept", cwd=workplace)
    before = {path.name: path.read_bytes() for path in Path("out/kept").iterdir() if path.is_file()}
    refuses(train.main, told, "--name", "kept", "--overwrite", *TINY, *flags)
    assert before == {path.name: path.read_bytes() for path in Path("out/kept").iterdir() if path.is_file()}


def test_more_steps_while_the_learning_rate_is_constant(workplace, monkeypatch, exit_code, capsys):
    monkeypatch.chdir(workplace)
    flags = [*TINY, "--name", "longer", "--constant_until", "1", "--cosine_until", "1", "--final_from", "1"]
    assert train.main([*flags, "--steps", "3"])
    train.main([*flags, "--steps", "5", "--resume", "--lr", "1e-4"])
    assert "resumed at step 3 of 5" in capsys.readouterr().out
    assert exit_code(train.main, *TINY, "--name", "longer", "--steps", "9", "--resume") == 2


def test_a_refused_resume_changes_nothing(workplace, monkeypatch, exit_code):
    """Asked twice, it is refused twice."""
    monkeypatch.chdir(workplace)
    flags = [*TINY, "--name", "refused", "--steps", "3"]
    train.main(flags)
    for _ in range(2):
        assert exit_code(train.main, *flags[:-1], "9", "--resume") == 2
    train.main([*flags, "--resume"])


@pytest.mark.parametrize("modules", [0, 1])
def test_dense_models_train_draw_and_come_back(workplace, monkeypatch, modules):
    """With experts in the MTP module alone, and with none at all."""
    monkeypatch.chdir(workplace)
    sizes = ["first_k_dense_replace=9", f"num_nextn_predict_layers={modules}"]
    train.main([*TINY, "--set", *sizes, "--name", f"dense{modules}", "--steps", "2", "--device", "cpu"])
    folder = Path(f"out/dense{modules}")
    assert (folder / "loss.png").exists() and not (folder / "expert_domains.png").exists()
    assert (folder / "expert_load.png").exists() == bool(modules)
    assert all((float(row["max_vio"]) > 0) == bool(modules) for row in RunFolder(folder).rows()[1:])
    tokens = torch.arange(8).unsqueeze(0)  # (1, T)
    losses = Transformer.from_pretrained(folder)(tokens, targets=tokens)
    assert losses["ce"].isfinite() and ("load" in losses) == bool(modules)
    assert "load" not in losses or losses["load"].shape[0] == modules


class NoFloat64(TorchDispatchMode):
    """Refuses what mps refuses: a tensor in float64."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **kwargs or {})
        for each in out if isinstance(out, (tuple, list)) else (out,):
            assert not (isinstance(each, torch.Tensor) and each.dtype == torch.float64), f"{operation} in float64"
        return out


def everything(tmp_path: Path, name: str) -> None:
    """Steps, evaluation and saving of training, sampling, and the loss of RL."""
    trainer = finished_in(tmp_path / name, steps=2, evals={"val_text": [random_batch()]})
    made = generate(trainer.model, [[1, 2], [3]], max_new_tokens=4, temperature=0.8, top_p=0.9, seed=0)
    logps, mask = torch.randn(2, 4, requires_grad=True), torch.ones(2, 4, dtype=torch.bool)
    weights = rl.token_weights(mask, 2, "token", 4)
    old, advantages = logps.detach(), torch.tensor([1.0, -1.0])
    rl.policy_loss(logps, old, old, advantages, mask, weights, rl.RLConfig())["total"].backward()
    assert made.tokens.shape == (2, 6)


def test_nothing_is_in_float64_on_a_device_that_has_none(tmp_path, monkeypatch):
    assert cli.widest_float(torch.device("mps")) == torch.float32
    with pytest.raises(AssertionError, match="in float64"), NoFloat64():
        everything(tmp_path, "cpu")
    for program in (train, rl, sample):
        monkeypatch.setattr(program, "widest_float", lambda device: torch.float32)
    with NoFloat64():
        everything(tmp_path, "mps")


def test_a_foreign_tokenizer_of_the_same_size_is_refused(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    train.main([*TINY, "--name", "own", "--steps", "2"])
    path = Path("out/own/tokenizer.json")
    path.write_text(path.read_text(encoding="utf-8").replace('"Ġthe"', '"Ġthf"'), encoding="utf-8")
    with pytest.raises(UserError, match="not the tokenizer that the weights"):
        train.load_tokenizer("out/own")
    with pytest.raises(UserError, match="another one than that of --init_from"):
        train.TrainConfig(init_from="out/own", name="own")

"""data/io/run.py and checkpoint.py: files whole or not at all, runs resumed bit for bit, or stopped."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from data.io import checkpoint
from data.io import tensors as tensor_files
from data.io.checkpoint import write_json, written_aside
from data.io.cli import UserError
from data.io.ranks import Dist
from data.io.run import Loop, RunFolder, StopSignal, minutes, peak_memory
from data.io.state import SavedState, load_state, save_state, saved_states
from data.text.tokenizer import load_tokenizer
from tests.conftest import refused

ROOT = Path(__file__).parent.parent


def full(*_, **__):
    raise OSError(28, "No space left on device")


def test_an_interrupted_write_leaves_the_earlier_file_and_no_rest(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        with written_aside(path) as aside:
            aside.write_text("ne")
            raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and path.read_text() == "old"
    with written_aside(path) as aside:
        aside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_path_is_written_with_its_folders_from_a_string(tmp_path):
    write_json(f"{tmp_path}/deep/er/ü.json", {"a": "日本"})
    assert (tmp_path / "deep/er/ü.json").read_bytes() == b'{\n  "a": "\\u65e5\\u672c"\n}\n'


def test_only_what_dead_processes_left_is_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    alive = os.getppid()
    names = {pid: tmp_path / f"log[1].csv.{pid}.part" for pid in (dead.pid, alive, "mine", 10**30)}
    other = tmp_path / f"log[1].csv2.{dead.pid}.part"  # belongs to another file
    for path in (*names.values(), other):
        path.mkdir()
        (path / ".tmpXYZ").write_text("half")  # what a library had begun
    with written_aside(tmp_path / "log[1].csv") as aside:
        aside.write_text("whole")
        assert aside.parent.name == f"log[1].csv.{os.getpid()}.part"
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"log[1].csv", names[alive].name, names["mine"].name, other.name}


def test_two_processes_write_one_path_and_neither_harms_the_other(tmp_path):
    """Each has its own file aside, so that what appears is whole: one or the other."""
    code = ("import sys\nfrom data.io.checkpoint import write_json\n"
            "for i in range(20):\n    write_json(sys.argv[1], [int(sys.argv[2])] * 5000)")
    path = tmp_path / "a.json"
    command = [sys.executable, "-c", code, str(path)]
    others = [subprocess.Popen([*command, str(i)], cwd=ROOT) for i in range(2)]
    while any(each.poll() is None for each in others):
        if path.exists():
            assert len(set(json.loads(path.read_text()))) == 1
    assert [each.returncode for each in others] == [0, 0] and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_disk_leaves_the_earlier_file(tmp_path, monkeypatch, call):
    write_json(tmp_path / "a.json", 1)
    monkeypatch.setattr(checkpoint.os, call, full)
    with pytest.raises(UserError, match="cannot write .*a.json: .*No space left.*; the earlier file is unt"):
        write_json(tmp_path / "a.json", 2)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"] and (tmp_path / "a.json").read_text() == "1\n"


FULL_DISK = """
import resource, signal, sys, torch
from data.io.checkpoint import save_weights
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # of any file, as on a full disk
save_weights(sys.argv[1], {"a": torch.zeros(200, 200)}, {"b": 2})
"""


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs a limit on file sizes")
def test_a_really_full_disk(tmp_path):
    checkpoint.save_weights(tmp_path, {"a": torch.ones(200, 200)}, {"b": 1})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "UserError: cannot write" in done.stderr, done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs users")
def test_a_read_only_folder():
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        path = Path(place) / "run" / "a.json"
        write_json(path, 1)
        path.parent.chmod(0o555)
        is_root = os.geteuid() == 0  # who may write everywhere, so somebody else tries
        try:
            os.seteuid(65534) if is_root else None
            with pytest.raises(UserError, match="Permission denied"):
                write_json(path, 2)
        finally:
            os.seteuid(0) if is_root else None
            path.parent.chmod(0o755)
        assert [p.name for p in path.parent.iterdir()] == ["a.json"] and path.read_text() == "1\n"


def tensors_of(seed: int, count: int = 7) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"t{i}.weight": torch.randn(5, 10, generator=generator) for i in range(count)}


@pytest.mark.parametrize("limit, files", [(200, 7), (450, 4), (10**9, 1)])
def test_weights_come_back_from_shards_and_later_saves_leave_nothing_stale(tmp_path, limit, files):
    for seed, size in enumerate((10**9, 400, limit)):
        tensors = tensors_of(seed)
        checkpoint.save_weights(tmp_path, tensors, {"seed": seed}, size)
    shards = sorted(tmp_path.glob("*.safetensors"))
    index = tmp_path / "model.safetensors.index.json"
    assert len(shards) == files and index.exists() == (files > 1)
    assert len(list(tmp_path.iterdir())) == files + 1 + (files > 1)
    assert json.loads((tmp_path / "config.json").read_text()) == {"seed": 2}
    again = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    checkpoint.copy_weights(tmp_path, checkpoint.open_weights(tmp_path), again)
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_a_disk_that_fills_while_a_late_shard_is_written(tmp_path, monkeypatch):
    checkpoint.save_weights(tmp_path, tensors_of(0), {"seed": 0}, 400)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    real, calls = tensor_files.save_file, []

    def fills(tensors, path, metadata):
        calls.append(path)
        full() if len(calls) == 3 else real(tensors, path, metadata)

    monkeypatch.setattr(tensor_files, "save_file", fills)
    with pytest.raises(UserError, match="No space left"):
        checkpoint.save_weights(tmp_path, tensors_of(1), {"seed": 1}, 400)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_wrong_tensors_are_named_and_many_are_counted(tmp_path):
    checkpoint.save_weights(tmp_path, tensors_of(0), {})
    views, files = tensors_of(0), checkpoint.open_weights(tmp_path)
    with pytest.raises(UserError, match=r"7 unexpected tensors: t0.weight, .*t4.weight, \.\.\.$"):
        checkpoint.copy_weights(tmp_path, files, {})
    with pytest.raises(UserError, match="1 missing tensors: mine$"):
        checkpoint.copy_weights(tmp_path, files, views | {"mine": torch.ones(1)})
    with pytest.raises(UserError, match=r"t3.weight has shape \(5, 10\), config.json wants \(5, 9\)"):
        checkpoint.copy_weights(tmp_path, files, views | {"t3.weight": torch.ones(5, 9)})
    with pytest.raises(UserError, match="no weights"):
        checkpoint.open_weights(tmp_path / "nowhere")


def test_copies_of_embedding_and_head_in_the_mtp_layer_may_lack(tmp_path):
    state = {"model.embed_tokens.weight": torch.randn(4, 3), "lm_head.weight": torch.randn(4, 3),
             "model.layers.0.mlp.experts.gate_up_proj": torch.randn(2, 6, 3),
             "model.layers.0.mlp.experts.down_proj": torch.randn(2, 3, 3),
             "model.layers.1.eh_proj.weight": torch.randn(3, 6)}
    names = checkpoint.published_names(state, 1, 1)
    copies = {"model.layers.1.shared_head.head.weight", "model.layers.1.embed_tokens.weight"}
    for left_out in (set(), copies):
        kept = {name: tensor for name, tensor in names.items() if name not in left_out}
        checkpoint.save_weights(tmp_path, kept, {})
        blank = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        files = checkpoint.open_weights(tmp_path)
        checkpoint.copy_weights(tmp_path, files, checkpoint.published_names(blank, 1, 1))
        assert all(torch.equal(blank[name], state[name]) for name in state)
        assert checkpoint.has_mtp(files, 1, 1) and not checkpoint.has_mtp(files, 5, 1)
        assert checkpoint.has_mtp(files, 5, 0)  # none is wanted


def test_the_identity_of_a_checkpoint_is_that_of_weights_config_and_tokenizer(tmp_path):
    checkpoint.save_weights(tmp_path, tensors_of(0), {"seed": 0}, tokenizer=load_tokenizer("plainseek:300"))
    was = checkpoint.identity(tmp_path)
    (tmp_path / "log.csv").write_text("a line more\n")
    (tmp_path / "state.safetensors").write_bytes(b"a later step")
    assert checkpoint.identity(tmp_path) == was
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        path = tmp_path / name
        raw = path.read_bytes()
        path.write_bytes(raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:])
        assert checkpoint.identity(tmp_path) != was, name
        path.write_bytes(raw)
    assert checkpoint.identity(tmp_path) == was


def trained(steps: int = 2, seed: int = 0) -> tuple[nn.ModuleDict, torch.optim.AdamW]:
    """Two modules of which the optimizer moves one, after some steps."""
    torch.manual_seed(seed)
    modules = nn.ModuleDict({"model": nn.Linear(3, 2), "reference": nn.Linear(3, 2)})
    optimizer = torch.optim.AdamW(modules["model"].parameters(), lr=0.1)
    for _ in range(steps):
        modules["model"](torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return modules, optimizer


def test_state_comes_back_bit_for_bit(tmp_path):
    modules, optimizer = trained()
    folder = RunFolder(tmp_path, knobs_file="rl.json")
    folder.start({"lr": 0.1})
    notes = {"step": 2, "latest": {"val": 0.1}, "strips": [["ü", 1]]}
    folder.save(modules, optimizer, notes, rng=torch.get_rng_state(), loads=None)
    tensors, found = folder.resume({"lr": 0.1})
    assert found == notes | {"knobs": {"lr": 0.1}} and torch.equal(tensors["rng"], torch.get_rng_state())
    moments = {f"optimizer.{key}.model.{name}" for key in ("step", "exp_avg", "exp_avg_sq")
               for name in ("weight", "bias")}
    assert set(tensors) == {*modules.state_dict(), "rng", "log", *moments}
    assert json.loads((tmp_path / "rl.json").read_text()) == {"lr": 0.1}
    others, its_optimizer = trained(steps=0, seed=9)
    load_state(others, its_optimizer, tensors)
    for each in (modules, others):  # the next step is the same, moments and step counts included
        each["model"](torch.ones(1, 3)).square().sum().backward()
    optimizer.step()
    its_optimizer.step()
    for name, tensor in modules.state_dict().items():
        assert torch.equal(others.state_dict()[name], tensor), name


def test_state_of_another_model_is_refused(tmp_path):
    modules, optimizer = trained()
    for tensors, told in (({"model.weight": torch.ones(2, 3)}, "nothing for model.bias"),
                          (modules.state_dict() | {"reference.bias": torch.ones(7)}, r"\(7,\) for reference.bias"),
                          (modules.state_dict() | {"optimizer.step.b": torch.ones(())}, "optimizer.step.b is of")):
        save_state(tmp_path, tensors, {"step": 1}, Dist())
        with refused(told):
            load_state(modules, optimizer, SavedState(saved_states(tmp_path)[0]))


def test_a_log_row_has_the_order_of_the_columns_and_blanks(tmp_path):
    folder, columns = RunFolder(tmp_path), ["step", "ce", "val"]
    assert folder.rows() == []
    folder.log({"ce": 2.123456789, "step": 1, "stranger": 5}, columns)
    folder.log({"step": 2, "val": 1e-9, "ce": ""}, columns)
    assert folder.log_path.read_text() == "step,ce,val\n1,2.12346,\n2,,1e-09\n"
    assert folder.rows()[0] == {"step": "1", "ce": "2.12346", "val": ""}
    with open(folder.log_path, "a") as file:
        file.write("3,1.")  # cut short by a kill
    assert len(folder.rows()) == 2


def test_only_the_main_process_writes(tmp_path):
    folder = RunFolder(tmp_path / "run", Dist(rank=1))
    folder.start({})
    folder.log({"step": 1}, ["step"])
    folder.save(*trained(), {"step": 1})
    written = [path for path in tmp_path.rglob("*") if path.is_file()]  # its shard, which here is empty
    assert [path.name for path in written] == ["shard-00002-of-00001.safetensors"]


def test_resume_cuts_what_is_done_again_from_the_log(tmp_path):
    folder = RunFolder(tmp_path)
    folder.start({})
    for step in range(3):
        folder.log({"step": step, "ce": step / 3}, ["step", "ce"])
    saved = folder.log_path.read_bytes()
    folder.save(*trained(), {"step": 2})
    for damaged in (saved + b"3,1.5\n4,", saved[:9] + b"\xff\n,,," + saved[12:], b""):
        folder.log_path.write_bytes(damaged)
        RunFolder(tmp_path, Dist(rank=1)).resume({})
        assert folder.log_path.read_bytes() == damaged  # another rank leaves it alone
        folder.resume({})
        assert folder.log_path.read_bytes() == saved


def test_a_folder_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*log.csv"):
        RunFolder(tmp_path / "file").log({"step": 1}, ["step"])
    with pytest.raises(UserError, match="cannot write .*a.json"):
        write_json(tmp_path / "file" / "run" / "a.json", 1)


def test_resume_refuses_nothing_rubbish_and_another_config(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(UserError, match="nothing to resume"):
        folder.resume({})
    folder.start({"lr": 1, "device": "cpu"})
    assert folder.resume({"lr": 1}, {"device"}) == ({}, {})  # killed before its first save: it starts over
    folder.save(*trained(), {"step": 1})
    with pytest.raises(UserError, match=r"lr was 1, is 2 \(another --name"):
        folder.resume({"lr": 2, "device": "cuda"}, {"device"})
    with pytest.raises(UserError, match="device was 'cpu', is 'cuda', lr was 1, is None"):
        folder.resume({"device": "cuda"})
    assert folder.resume({"lr": 1, "device": "cuda"}, {"device"})[1]["step"] == 1
    shard, = saved_states(folder.path)[0].glob("shard-*")
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(UserError, match="cannot be read"):
        folder.resume({"lr": 1}, {"device"})
    with pytest.raises(UserError, match="--overwrite"):
        folder.start({"lr": 1})
    folder.start({"lr": 3}, overwrite=True)
    assert not saved_states(folder.path) and json.loads(folder.knobs_path.read_text()) == {"lr": 3}


def handlers():
    return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has none")
def test_under_nohup_a_run_outlives_its_terminal():
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.is_set
    finally:
        signal.signal(signal.SIGHUP, old)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_acts(kind):
    old = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job begins with it ignored
    before = handlers()
    with StopSignal() as stop:
        assert not stop.is_set and handlers() != before
        os.kill(os.getpid(), kind)
        assert stop.is_set and handlers() == before
    with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert handlers() == before
    signal.signal(signal.SIGINT, old)


def test_a_loop_counts_to_its_total_and_says_when_it_is_due(tmp_path, capsys):
    loop = Loop(RunFolder(tmp_path), done=2, total=7, every=3)
    before, seen = handlers(), []
    for step in loop:
        assert handlers() != before and step == loop.step
        loop.show(f"loss {step}")
        seen.append((step, loop.is_due))
    assert seen == [(3, True), (4, False), (5, False), (6, True), (7, True)]
    assert loop.is_complete and handlers() == before
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[0].startswith("train 3/7  loss 3  0m00s left")
    assert list(Loop(RunFolder(tmp_path), done=7, total=7, every=3)) == []


def test_a_long_loop_says_something_twenty_times(tmp_path, capsys):
    for is_main, lines in ((True, 20), (False, 0)):
        loop = Loop(RunFolder(tmp_path, Dist(rank=0 if is_main else 1)), done=0, total=400, every=1000, label="rl")
        for step in loop:
            loop.show("words")
            if step == 3:
                loop.note("a note")
        out = capsys.readouterr().out
        assert out.count("words") == lines and out.count("a note\n") == is_main
        assert ("rl 20/400  words" in out) == is_main and loop.is_due  # the last step is always due


def test_a_bar_on_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    loop = Loop(RunFolder(tmp_path), done=1, total=3, every=3)
    for _ in loop:
        loop.show("loss 3.2")
        time.sleep(0.15)
    out, err = capsys.readouterr()
    assert out == "" and "train" in err and "3/3" in err and "loss 3.2" in err and loop.bar.disable  # closed


@pytest.mark.parametrize("total", [9, 4])
def test_a_signal_in_the_middle_of_a_step_ends_the_loop_behind_it(tmp_path, total):
    before, done = handlers(), []
    loop = Loop(RunFolder(tmp_path), done=0, total=total, every=9)
    for step in loop:
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        done.append(step)  # the running step is finished
    assert done == [1, 2, 3, 4] and loop.is_complete == (total == 4) and handlers() == before


def test_all_ranks_stop_when_one_is_told_to(tmp_path):
    """`agree` is asked before every step, with this rank's own flag."""
    asked = []

    def agree(flag):
        asked.append(flag)
        return len(asked) == 4  # another rank got a signal

    loop = Loop(RunFolder(tmp_path), done=0, total=9, every=9, agree=agree)
    assert list(loop) == [1, 2, 3] and asked == [False] * 4 and not loop.is_complete


def test_exceptions_pass_through_a_loop_that_cleans_up(tmp_path):
    before = handlers()
    loop = Loop(RunFolder(tmp_path), done=0, total=9, every=9)
    with pytest.raises(UserError, match="not finite"):
        for step in loop:
            if step == 2:
                raise UserError("not finite")
    assert handlers() == before and loop.step == 2
    for step in Loop(RunFolder(tmp_path), done=0, total=9, every=9):
        if step == 2:
            break
    assert handlers() == before


def test_words_for_people():
    assert minutes(59.6) == "1m00s" and minutes(0) == "0m00s" and minutes(3 * 3600) == "3h00m"
    assert peak_memory(torch.device("cpu")).endswith(" MiB")

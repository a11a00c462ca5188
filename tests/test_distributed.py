"""Several gloo processes are one process: losses, weights, routing bias, states; experts spread over ranks."""

import os
import signal
import sys
import time
import warnings
from datetime import timedelta

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor

import train
from data.io import ranks
from data.io.ranks import Dist, local, traffic
from data.io.run import RunConfig, RunFolder
from data.io.state import SavedState, load_state, save_state, saved_states, state_of
from tests.conftest import ROOT, free_port, on_ranks, refused, start
from tests.test_train import QUICK, STEP, masked, random_batch, small_model
from train import evaluate, make_optimizer, train_step

STEPS = 4
KINDS = {  # name: changes of the model, knobs of the run, what else
    "plain": (dict(), dict(), ""),
    "ZeRO-2": (dict(), dict(zero=2), ""),
    "whole": (dict(), dict(zero=0), ""),
    "recompute": (dict(), dict(), "recompute"),
    "reference": (dict(), dict(), "reference"),
    "uneven": (dict(n_routed_experts=15, n_group=3, topk_group=2, num_attention_heads=3), dict(), ""),
    "idle": (dict(n_routed_experts=64, n_group=4), dict(), ""),
    "ep": (dict(), dict(expert_parallel=2), ""),
    "ep idle": (dict(n_routed_experts=64, n_group=4), dict(expert_parallel=2), "recompute"),
    "ep all": (dict(), dict(expert_parallel=4), ""),
}


def built(kind: str, world: Dist):
    """The model of this kind on this rank, its optimizer, and its knobs."""
    changes, knobs, other = KINDS[kind]
    model = small_model(**changes)
    model.recompute = other == "recompute"
    model.use_kernels("reference" if other == "reference" else "fused")
    knobs = dict(expert_parallel=min(world.world_size, knobs.get("expert_parallel", 1)), zero=knobs.get("zero"))
    train.shard(model, RunConfig(name="x", **knobs), world)
    return model, make_optimizer(model, lr=1e-3)


def steps(model, optimizer, world: Dist, first: int = 0, count: int = STEPS) -> list[dict]:
    """What train_step gives in steps on fixed global batches, of which this rank has its share."""
    results = []
    for step in range(first, first + count):
        tokens, targets = random_batch(sequences=8, T=8, seed=step)
        targets = masked(targets) if step % 2 else targets
        share = slice(world.rank, None, world.world_size)
        knobs = STEP | dict(micro_batch=8 // world.world_size if step else 1)
        results.append(train_step(model, optimizer, tokens[share], targets[share], world, **knobs))
    return results


def a_run(kind: str, world: Dist) -> tuple:
    """Losses of some steps, an evaluation of three batches, all weights at the end."""
    model, optimizer = built(kind, world)
    held = sum(local(parameter).numel() for parameter in model.parameters())
    results = steps(model, optimizer, world)
    losses, used = evaluate(model, [random_batch(seed=seed) for seed in (9, 10, 11)], world)
    return results, losses, used, train.whole(model, world).state_dict(), held


def save_runs(world: Dist, folder: str, kinds: list[str]):
    for kind in kinds:
        torch.save(a_run(kind, world), f"{folder}/{kind}-{world.rank}.pt")


@pytest.mark.parametrize("count, kinds", [(2, ["plain", "ZeRO-2", "ep"]), (4, [kind for kind in KINDS if kind != "ZeRO-2"])], ids=["2", "4"])
def test_many_ranks_are_one(tmp_path, count, kinds):
    on_ranks(count, save_runs, str(tmp_path), kinds)
    for kind in kinds:
        results, losses, used, weights, held = a_run(kind, Dist())
        shares = 0
        for rank in range(count):
            found = torch.load(tmp_path / f"{kind}-{rank}.pt", weights_only=True)
            for one, many in zip(results, found[0]):
                for name in ("ce", "mtp", "balance", "total", "grad_norm"):
                    assert many[name] == pytest.approx(one[name], rel=1e-6), (kind, name)
                assert torch.equal(one["load"], many["load"]), kind
            assert found[1] == pytest.approx(losses, rel=1e-6) and torch.equal(found[2], used), kind
            assert found[3].keys() == weights.keys()
            for name, tensor in weights.items():
                if name.endswith("e_score_correction_bias"):
                    assert torch.equal(found[3][name], tensor), (kind, name)
                off = (found[3][name] - tensor).norm() / tensor.norm().clamp(min=1e-9)
                assert off < 5e-6, (kind, name, off)
            shares += found[4]
            parts = 1 if kind == "whole" else count
            assert held / parts * 0.8 < found[4] < held / parts * 1.2, "each rank holds its part"
        assert shares == held * count // parts


def save_and_go_on(world: Dist, folder: str, kind: str):
    """Three steps, a save, three steps more; the last ones once more from what was saved."""
    model, optimizer = built(kind, world)
    steps(model, optimizer, world, 0, 3)
    modules = torch.nn.ModuleDict({"model": model})
    tensors = state_of(modules, optimizer) | {"rng": torch.get_rng_state()}
    save_state(ranks.Path(folder), tensors, {"step": 3}, world)
    whole = steps(model, optimizer, world, 3, 3)
    again = resumed(world, folder, kind)
    assert [each["ce"] for each in whole] == [each["ce"] for each in again]
    assert [each["grad_norm"] for each in whole] == [each["grad_norm"] for each in again]
    if world.is_main:
        torch.save([each["grad_norm"] for each in whole], f"{folder}/norms.pt")


def resumed(world: Dist, folder: str, kind: str) -> list[dict]:
    model, optimizer = built(kind, world)
    with torch.no_grad():
        for parameter in model.parameters():
            local(parameter).zero_()
    load_state(torch.nn.ModuleDict({"model": model}), optimizer, SavedState(saved_states(ranks.Path(folder))[-1]))
    return steps(model, optimizer, world, 3, 3)


def resumed_elsewhere(world: Dist, folder: str, kind: str):
    if world.is_main:
        norms = [each["grad_norm"] for each in resumed(world, folder, kind)]
        assert norms == pytest.approx(torch.load(f"{folder}/norms.pt", weights_only=True), rel=1e-6)
    else:
        resumed(world, folder, kind)


@pytest.mark.parametrize("kind", ["ep", "uneven", "whole"])
def test_a_state_goes_on_bit_for_bit_and_on_any_number_of_ranks(tmp_path, kind):
    on_ranks(4, save_and_go_on, str(tmp_path), kind)
    on_ranks(2, resumed_elsewhere, str(tmp_path), kind)
    resumed_elsewhere(Dist(), str(tmp_path), kind)
    state = SavedState(saved_states(tmp_path)[0])
    assert len(state.files) == 4 and (kind != "whole" or not list(state.files[1].keys()))
    of_torch = {name: torch.empty_like(tensor) for name, tensor in state.items()}  # its reader, its planner
    warnings.filterwarnings("ignore", "torch.distributed is disabled")
    dcp.load(of_torch, storage_reader=HuggingFaceStorageReader(str(state.path)), no_dist=True)
    assert all(torch.equal(of_torch[name], tensor) for name, tensor in state.items())
    shard = sorted(state.path.glob("shard-*"))[2]
    shard.rename(shard.with_suffix(".gone"))
    with refused("a shard is missing"):
        SavedState(state.path)


def count_the_traffic(world: Dist):
    """Every expert on a rank of its own: what is sent can be counted by hand."""
    model, optimizer = built("ep all", world)
    experts = [moe.experts for _, moe in model.moe_layers()]
    assert all(isinstance(module.down_proj, DTensor) for module in experts)
    steps(model, optimizer, world, 1, 1)  # one micro-batch of 2 sequences of 8 tokens
    tokens, visits, sent = world.all_reduce_sum(traffic(experts)).tolist()
    assert tokens == 8 * (8 * (len(experts) - 1) + 7)  # the MTP module sees one token less of each sequence
    assert 1 <= visits / tokens <= 2  # two experts per token
    pair = 32 * 4 * 4  # C float32 numbers, there, back, and their gradients
    assert sent % pair == 0 and 0 < sent <= 2 * tokens * pair
    assert world.all_reduce_sum(traffic(experts)).tolist() == [0, 0, 0]


def test_what_expert_parallel_sends_is_counted():
    on_ranks(4, count_the_traffic)


@pytest.mark.parametrize("knobs,told", [
    (dict(expert_parallel=3), "expert_parallel: got 3, wanted a divisor of the 1 processes"),
    (dict(expert_parallel=2), "torchrun --nproc_per_node")])
def test_numbers_that_do_not_divide(knobs, told):
    with refused(told):
        train.shard(small_model(), RunConfig(name="x", **knobs), Dist())
    with refused("wanted a divisor of the 15 experts"):
        Dist(world_size=4).check_experts(2, 15)


def torchrun(ranks: int, *flags: str) -> list[str]:
    return ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={free_port()}", *flags,
            str(ROOT / "train.py")]


def test_torchrun_gives_the_losses_of_one_process_though_a_rank_is_killed(workplace, here):
    """Two ranks with experts on both; one is killed on the way, is started again, and the log has no gap."""
    flags = ["--steps", "24", "--eval_every", "8", "--micro_batch", "8", *QUICK]
    run = start(*torchrun(2, "--max-restarts=3"), *flags, "--name", "hurt", "--expert_parallel", "2", cwd=workplace)
    log = workplace / "out" / "hurt" / "log.csv"
    until = time.monotonic() + 90
    while time.monotonic() < until and not (log.exists() and log.read_text().count("\n") > 10):
        time.sleep(0.02)
    children = [int(pid) for pid in os.popen(f"pgrep -P {run.pid}").read().split()]
    os.kill(children[-1], signal.SIGKILL)
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    assert "resumed at step" in out and "parameters" in out and "Warning" not in err, err
    here(train.main, *flags, "--name", "well", cwd=workplace)
    hurt, well = (RunFolder(workplace / "out" / name).rows() for name in ("hurt", "well"))
    assert len(hurt) == len(well) == 25
    for a, b in zip(well, hurt):
        for column in ("step", "ce", "mtp", "balance", "val_text", "train_text", "val_mtp"):
            if a[column]:
                assert float(b[column]) == pytest.approx(float(a[column]), rel=1e-5), column
    assert 1 <= float(hurt[-1]["ranks_per_token"]) <= 2 and float(hurt[-1]["mb_sent"]) > 0


def disagree(world: Dist, folder: str):
    (ranks.Path(folder) / "train.py").write_text(f"# of rank {world.rank}")
    world.barrier()
    ranks.SOURCES = ranks.Path(folder) if world.rank else ROOT
    with refused("rank 1 runs other code or another torch than rank 0"):
        world.check_same_code()


def test_ranks_with_other_code_are_told(tmp_path):
    on_ranks(2, disagree, str(tmp_path))


def one_leaves(world: Dist):
    if world.rank == 1:
        os._exit(0)
    world.all_reduce_sum(torch.ones(1))


@pytest.mark.skipif(sys.platform != "linux", reason="a process that stops, on Linux")
def test_a_rank_that_dies_is_a_sentence():
    with pytest.raises(Exception, match="another rank died or answers no more; --resume goes on"):
        on_ranks(2, one_leaves)


def is_slow(world: Dist):
    assert world.shared(lambda part: time.sleep(2.5 * world.rank) or part, ["a", "b", "c"], 2) == ["a", "b", "c"]


def test_a_part_that_takes_longer_than_a_step_is_waited_for(monkeypatch):
    monkeypatch.setattr(ranks, "IN_STEP", timedelta(seconds=1))
    on_ranks(2, is_slow)

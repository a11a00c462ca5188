"""Two gloo processes are one process: losses, weights, routing bias."""


import pytest
import torch

from data.io.run import RunFolder
from tests.conftest import ROOT, free_port, two_ranks
from tests.test_train import QUICK, STEP, masked, random_batch, small_model
from train import Dist, evaluate, make_optimizer, train_step


def three_steps(world: Dist, is_masked: bool):
    """Losses of three steps on fixed global batches, with the final state, and an evaluation."""
    model = small_model(n_routed_experts=32, n_group=4)  # so many that some stay idle
    wrapped = world.wrap(model)
    optimizer = make_optimizer(model, lr=1e-3)
    results = []
    for step in range(3):
        tokens, targets = random_batch(sequences=8, T=8, seed=step)
        targets = masked(targets) if is_masked else targets
        share = slice(world.rank, None, world.world_size)
        knobs = STEP | dict(micro_batch=8 // world.world_size if step else 2)
        mine = tokens[share], targets[share]
        results.append(train_step(wrapped, optimizer, *mine, world, **knobs))
    losses, used = evaluate(model, [random_batch(seed=9), random_batch(seed=10)], world)
    return results, losses, used, model.state_dict()


def save_three_steps(world: Dist, folder: str, is_masked: bool):
    torch.save(three_steps(world, is_masked), f"{folder}/{world.rank}.pt")


@pytest.mark.parametrize("is_masked", [False, True])
def test_two_ranks_are_one(tmp_path, is_masked):
    two_ranks(save_three_steps, str(tmp_path), is_masked)
    alone = three_steps(Dist(), is_masked)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for results, losses, used, state in ranks:
        for one, two in zip(alone[0], results):
            for name in ("ce", "mtp", "balance", "total", "grad_norm"):
                assert two[name] == pytest.approx(one[name], rel=2e-4), name
            assert torch.equal(one["load"], two["load"])
        assert losses == pytest.approx(alone[1], rel=1e-4) and torch.equal(used, alone[2])
        for name, tensor in alone[3].items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-3, atol=2e-4, msg=name)
        biases = [name for name in state if name.endswith("e_score_correction_bias")]
        assert biases and all(torch.equal(state[name], alone[3][name]) for name in biases)
    for name, tensor in ranks[0][3].items():
        assert torch.equal(tensor, ranks[1][3][name]), f"{name} differs between ranks"


def test_torchrun_gives_the_losses_of_one_process(workplace, python):
    flags = ["--steps", "6", "--eval_every", "3", "--micro_batch", "8", *QUICK]
    two = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    for launcher, name in (([], "one"), (two, "two")):
        done = python(*launcher, str(ROOT / "train.py"), *flags, "--name", name, cwd=workplace)
        assert done.returncode == 0, done.stderr
    rows = [RunFolder(workplace / "out" / name).rows() for name in ("one", "two")]
    assert len(rows[0]) == len(rows[1]) == 7
    for a, b in zip(*rows):
        for column in ("ce", "mtp", "balance", "val_text", "train_text", "val_mtp"):
            if a[column]:
                assert float(b[column]) == pytest.approx(float(a[column]), rel=1e-4), column

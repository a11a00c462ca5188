"""Many processes as one: data parallel that shards what it holds, and expert parallel, by torch's own engine.

    torchrun --nproc_per_node=4 train.py                       every rank computes a part of the batch and
                                                               holds 1/4 of weights, gradients and moments
    torchrun --nproc_per_node=4 train.py --expert_parallel 2   besides, the experts of a layer live on 2 ranks,
                                                               and tokens travel to them

Whatever the number of ranks, a step computes what one process computes on the whole batch: gradients are summed,
never averaged, and every loss was divided by the targets of all ranks before. Alone, every method is a no-op.
"""

import gc
import logging
import os
import sys
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from data.io.checkpoint import fingerprint
from data.io.cli import UserError, pick_device

IN_STEP = timedelta(minutes=1)  # a rank that answers no longer in the loop is given up
IN_PREPARATION = timedelta(hours=8)  # while the first rank prepares text or examines the model
SOURCES = Path(__file__).parents[2]


class LostRank(UserError):
    """Another rank has died, or answers no more."""


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: its shard, or all of it where nothing is sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, whose module takes half a second to import: only many ranks pay that."""
    return hasattr(tensor, "to_local")


@dataclass
class Dist:
    """This process among its equals. Alone, every method is a no-op: the loop has one code path."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    is_first_of_node: bool = True
    patient: object = None  # the group that waits for hours
    is_of_one_cpu: bool = False  # started by data/io/cores.py: the model is whole in every process

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The rows of all ranks, one below the other, on the CPU; each rank has as many."""
        if self.world_size == 1:
            return tensor.cpu()
        parts = [torch.empty_like(tensor, device=self.device) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor.to(self.device).contiguous())
        return torch.cat(parts).cpu()

    def shared(self, function: Callable[[list], list], items: list, size: int) -> list:
        """What function(part) gives for each item of parts of at most `size`, of which each rank computes its share."""
        mine = items[self.rank :: self.world_size]
        found = [one for start in range(0, len(mine), size) for one in function(mine[start : start + size])]
        if self.world_size == 1:
            return found
        parts: list = [None] * self.world_size
        dist.all_gather_object(parts, found, group=self.patient)  # a verifier may take long over one of the parts
        whole: list = [None] * len(items)
        for rank, part in enumerate(parts):
            whole[rank :: self.world_size] = part
        return whole

    def any(self, flag: bool) -> bool:
        """True on all ranks when it is on one."""
        return bool(flag) if self.world_size == 1 else bool(self.all_gather(torch.tensor([flag])).any())

    def barrier(self) -> None:
        """Wait for all ranks, for hours if need be."""
        if self.world_size > 1:
            dist.barrier(self.patient)

    def on_main(self, function: Callable, *args):
        """What it returns on the first rank, which alone calls it; None on the rest, which wait."""
        result = function(*args) if self.is_main else None
        self.barrier()
        return result

    def once_per_node(self, function: Callable, *args):
        """What it returns on the first rank of every machine, then on the others, which find its files."""
        result = function(*args) if self.is_first_of_node else None
        self.barrier()
        return result if self.is_first_of_node else function(*args)

    def say(self, *words) -> None:
        """Print on the first rank."""
        if self.is_main:
            print(*words, flush=True)

    # ------------------------------------------------------------------- sharding (ZeRO, FSDP2)

    def shard(self, model: nn.Module, blocks: Iterable[nn.Module], experts: Sequence[nn.Module] = (), *,
              expert_parallel: int = 1, zero: int | None = None) -> nn.Module:
        """Split weights, gradients and moments over the ranks; the model is called and trained as before.

        Each of `blocks` gathers its weights when it runs; what is in none of them is gathered for the whole pass.
        zero: 3, or 2, where gathered weights stay until the step ends, or 0, where nothing is split; None: 0 for the
        processes of one CPU, else 3. With `expert_parallel` the modules of `experts`, stacked weights (E, ...) each,
        are split over so many ranks first and their operation becomes a `Dispatch`. Raises UserError where the
        numbers do not divide.
        """
        self.check_experts(expert_parallel, len(experts[0].down_proj) if experts else expert_parallel)
        is_whole = zero == 0 or zero is None and self.is_of_one_cpu and expert_parallel == 1
        if self.world_size == 1 or is_whole:
            return model
        from torch.distributed.fsdp import fully_shard

        reshard = zero != 2
        every = init_device_mesh(self.device.type, (self.world_size,))
        if expert_parallel > 1:
            warnings.filterwarnings("ignore", ".*returned a view tensor")  # Experts do; nobody writes into it
            logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # two gathers, as meant
            shape = (self.world_size // expert_parallel, expert_parallel)
            grid = init_device_mesh(self.device.type, shape, mesh_dim_names=("data", "expert"))
            for module in experts:
                _split_experts(module, grid["expert"])
                fully_shard(module, mesh=grid["data"], reshard_after_forward=reshard)
        for block in blocks:
            fully_shard(block, mesh=every, reshard_after_forward=reshard)
        fully_shard(model, mesh=every, reshard_after_forward=reshard)
        for module in _sharded(model):
            module.set_gradient_divide_factor(1.0)  # sums, not means
            module.set_force_sum_reduction_for_comms(True)  # which gloo wants told apart
        return model

    def check_experts(self, expert_parallel: int, experts: int) -> None:
        """Raises UserError when ranks or experts cannot be divided so."""
        ranks = "processes (--processes, or torchrun --nproc_per_node)"
        for count, what in ((self.world_size, ranks), (experts, "experts")):
            if count % expert_parallel:
                raise UserError(f"expert_parallel: got {expert_parallel}, wanted a divisor of the {count} {what}")

    def accumulate(self, model: nn.Module, is_last: bool) -> None:
        """Before a micro-batch: gradients are added up, and ranks exchange them in the last one only."""
        for module in _sharded(model):
            module.set_requires_gradient_sync(is_last, recurse=False)

    def gradient(self, model: nn.Module) -> tuple[list[Tensor], Tensor]:
        """What this rank holds of the gradient of the whole batch, and the norm of all of it.

        Where the model is split, it has added up what the ranks found; where it is whole, they do it here, at once.
        """
        found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        gradients, is_apart = [local(grad) for grad in found], self.world_size > 1 and is_split(model)
        if self.world_size > 1 and not is_apart:
            summed = self.all_reduce_sum(torch.cat([grad.flatten() for grad in gradients]))
            parts = summed.split([grad.numel() for grad in gradients])
            torch._foreach_copy_(gradients, [part.view_as(grad) for part, grad in zip(parts, gradients)])
        norm = nn.utils.get_total_norm(gradients)
        return gradients, self.all_reduce_sum(norm.square()).sqrt() if is_apart else norm

    def gathered(self, model: nn.Module, main_only: bool = False) -> dict[str, Tensor]:
        """The state dict of a sharded model, whole; with `main_only` on the first rank's CPU, elsewhere empty."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=main_only)
        return get_model_state_dict(model, options=options)

    # ------------------------------------------------------------------------------- coming, going

    def check_same_code(self) -> None:
        """Raises UserError when a rank runs other source files than the first one."""
        paths = sorted([*SOURCES.glob("*.py"), *SOURCES.glob("data/**/*.py")])
        mine = fingerprint(torch.__version__.encode(), *(path.read_bytes() for path in paths))
        hashes = self.all_gather(torch.tensor([int(mine[:15], 16)])).tolist()  # (world_size,)
        odd = [rank for rank, one in enumerate(hashes) if one != hashes[0]]
        if odd:
            raise UserError(f"rank {odd[0]} runs other code or another torch than rank 0: "
                            "copy the same files to every machine")

    def __enter__(self) -> "Dist":
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Leave the others. Raises LostRank when one of them has died or answers no more."""
        if self.world_size > 1:
            self.patient = None
            gc.collect()  # what refers to the group must be gone before it
            is_theirs = any(word in str(error) for word in ("gloo", "NCCL", "Timed out"))
            dist.destroy_process_group()
            if is_theirs and isinstance(error, RuntimeError):
                raise LostRank("another rank died or answers no more; --resume goes on from the last save") from None


def is_split(model: nn.Module) -> bool:
    """Whether each rank holds a part of the model; ask no weight, which may be gathered just now."""
    return bool(_sharded(model))


def _sharded(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "set_requires_gradient_sync")]


def is_under_torchrun() -> bool:
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def setup_distributed(device: str = "auto") -> Dist:
    """Join the processes that torchrun started (gloo on CPU, nccl on CUDA); alone without it."""
    chosen = pick_device(device)
    if not is_under_torchrun():
        return Dist(device=chosen)
    local_rank = int(os.environ["LOCAL_RANK"])
    if chosen.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"rank {local_rank} of this machine has no GPU: {torch.cuda.device_count()} are here; "
                            "lower --nproc_per_node")
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    try:
        store, rank, ranks = next(dist.rendezvous("env://"))
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:  # on one machine torchrun keeps its
            tries = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # store, with addresses of the dead
            store = dist.PrefixStore(f"try {tries}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=IN_STEP)
        patient = dist.new_group(timeout=IN_PREPARATION)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the {os.environ['WORLD_SIZE']} ranks found no way to each other: {reason}") from None
    world = Dist(dist.get_rank(), dist.get_world_size(), chosen, local_rank == 0, patient)
    world.check_same_code()
    return world


def joined(store: dist.Store, rank: int, ranks: int) -> Dist:
    """One of the processes that data/io/cores.py started on this CPU, which talk by way of `store`.

    They wait for each other as long as it takes (a terminal may stop them all), and notice at once when one dies.
    Raises LostRank when one does not come.
    """
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"  # no network is asked
    try:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=IN_STEP)  # one may be dead
    except RuntimeError as error:
        raise LostRank(f"the {ranks} processes found no way to each other: {str(error).splitlines()[0]}") from None
    dist.distributed_c10d._set_pg_timeout(IN_PREPARATION)
    return Dist(rank, ranks, torch.device("cpu"), rank == 0, dist.group.WORLD, is_of_one_cpu=True)


def is_restarted() -> bool:
    """Whether torchrun started this process again, after one had died (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


# --------------------------------------------------------------------------------- expert parallel


class Dispatch:
    """`expert_ffn` over the ranks that share a layer's experts (V3 section 3.2): tokens go, results come back.

    Rank r holds the experts `r E/ranks` to `(r+1) E/ranks - 1`. Each pair (token, expert) is sent to its expert by
    one all-to-all, computed there by `inner`, the twin of kernels.py that was chosen, and sent back by another;
    autograd sends gradients the opposite way. It counts what it sends, which `traffic` takes.
    """

    def __init__(self, inner: Callable, mesh: DeviceMesh):
        self.inner, self.group, self.rank = inner, mesh.get_group(), mesh.get_local_rank()
        self.ranks = mesh.size()
        self.tokens, self.visits, self.sent = 0, 0, 0  # tokens; ranks that each goes to; bytes to other ranks

    def __call__(self, u: Tensor, gate_up: Tensor, down: Tensor, topk_idx: Tensor, gates: Tensor) -> Tensor:
        """As kernels.expert_ffn_reference, but gate_up and down are this rank's shards of E experts."""
        gate_up, down = local(gate_up), local(down)  # (E/ranks, 2F, C), (E/ranks, C, F)
        K, mine = topk_idx.shape[1], len(gate_up)
        chosen, order = topk_idx.flatten().sort(stable=True)  # (N*K,) pairs by expert, hence by rank
        away = torch.bincount(chosen, minlength=self.ranks * mine).view(self.ranks, mine)  # pairs I send
        here = torch.empty_like(away)  # (ranks, E/ranks) pairs that come, by rank and by my experts
        dist.all_to_all_single(here, away, group=self.group)
        out, back = torch.stack((away.sum(1), here.sum(1))).tolist()  # the one word from the device
        self._count(u, topk_idx // mine, out)
        rows = all_to_all_single_autograd(u[order // K], back, out, self.group)  # (M, C) from all ranks
        whose = torch.arange(mine, device=u.device).repeat(self.ranks)  # (ranks * E/ranks,)
        whose = whose.repeat_interleave(here.flatten(), output_size=len(rows))  # (M,) expert of each row
        made = self.inner(rows, gate_up, down, whose.unsqueeze(1), gates.new_ones(len(rows), 1))
        made = all_to_all_single_autograd(made, out, back, self.group)  # (N*K, C), where they came from
        weighted = made * gates.flatten()[order].unsqueeze(1).to(made.dtype)
        wide = torch.promote_types(u.dtype, torch.float32)
        y = torch.zeros_like(u, dtype=wide).index_add(0, order // K, weighted.to(wide))  # (N, C)
        return y.to(u.dtype)

    def _count(self, u: Tensor, owner: Tensor, out: list[int]) -> None:
        """owner (N, K): the rank of each chosen expert; out: pairs sent to each rank."""
        is_visited = torch.zeros(len(u), self.ranks, device=u.device).scatter_(1, owner, 1.0)
        self.tokens += len(u)
        self.visits = self.visits + is_visited.sum()
        ways = 4 if torch.is_grad_enabled() else 2  # there and back, and their gradients
        self.sent += ways * (sum(out) - out[self.rank]) * u.shape[1] * u.element_size()

    def taken(self) -> tuple[int, Tensor | int, int]:
        """Tokens, visits and bytes since the last time; where blocks are recomputed, a third too much."""
        found = self.tokens, self.visits, self.sent
        self.tokens, self.visits, self.sent = 0, 0, 0
        return found


def traffic(experts: Sequence[nn.Module]) -> Tensor | None:
    """What the layers' Dispatches sent since the last time: (3,) tokens, visits, bytes; None where none is."""
    senders = [module.ops.expert_ffn for module in experts if isinstance(module.ops.expert_ffn, Dispatch)]
    if not senders:
        return None
    totals = [sum(each) for each in zip(*(sender.taken() for sender in senders))]
    return torch.tensor([float(total) for total in totals], dtype=torch.float64)


def _split_experts(module: nn.Module, mesh: DeviceMesh) -> None:
    """Of each stacked weight (E, ...) keep this rank's experts, and send tokens to the others'."""
    from torch.distributed.tensor import Shard, distribute_tensor

    for name, weight in list(module.named_parameters()):
        part = distribute_tensor(weight.detach(), mesh, [Shard(0)], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(part, requires_grad=weight.requires_grad))
    module.ops = module.ops._replace(expert_ffn=Dispatch(module.ops.expert_ffn, mesh))

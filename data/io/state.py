"""What a run goes on from: tensors and notes of one step, written by all ranks, whole or not there.

A folder state-000100/ holds one safetensors file per rank and, written last, notes.json: without it the folder
does not count. Sharded tensors are in it as each rank holds them, in the layout of torch.distributed.checkpoint's
Hugging Face files, which torch's reader knows too; any number of ranks goes on from them. Nothing is ever pickled.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from data.io.checkpoint import read_json, write_json, written_aside
from data.io.cli import UserError
from data.io.ranks import Dist, is_sharded, local
from data.io.tensors import TensorFile, fingerprint, write_tensors


def save_state(folder: Path, tensors: dict[str, Tensor], notes: dict, world: Dist) -> None:
    """Write the state of step notes["step"] below folder, and remove the earlier ones once it is whole.

    A tensor that is not sharded is written by the first rank. notes must be JSON. Raises UserError.
    """
    path = folder / f"state-{notes['step']:06d}"
    world.on_main(partial(shutil.rmtree, path, ignore_errors=True))  # what another number of ranks had begun
    shards = {name: local(tensor) for name, tensor in tensors.items()
              if (local(tensor).numel() if is_sharded(tensor) else world.is_main)}
    offsets = {name: _begin(tensors[name]) for name in shards}
    with written_aside(path / f"shard-{world.rank + 1:05d}-of-{world.world_size:05d}.safetensors") as aside:
        write_tensors(aside, shards, {}, path.name, offsets)
    world.barrier()
    world.on_main(_close, path, notes, world.world_size)


def _begin(tensor: Tensor) -> list[int]:
    """Where what this rank holds of a tensor begins in the whole one."""
    return list(tensor.__create_chunk_list__()[0].offsets) if is_sharded(tensor) else [0] * tensor.ndim


def _close(path: Path, notes: dict, ranks: int) -> None:
    """From here on the state of this step is the one that counts."""
    sealed = {"notes": notes, "ranks": ranks}
    write_json(path / "notes.json", sealed | {"checksum": fingerprint(json.dumps(sealed).encode())})
    for other in path.parent.glob("state-*"):
        if other != path:
            shutil.rmtree(other, ignore_errors=True)


def saved_states(folder: Path) -> list[Path]:
    """The whole states below folder, the latest last."""
    found = [notes.parent for notes in folder.glob("state-*/notes.json")]
    return sorted(found, key=lambda path: (len(path.name), path.name))


class SavedState(Mapping):
    """The tensors of a state, name -> whole tensor on the CPU, whatever the shards; checked as they are read.

    `notes` is what was saved with them. Raises UserError where a file is damaged or missing.
    """

    def __init__(self, path: Path):
        self.path, sealed = path, read_json(path / "notes.json")
        told = sealed.pop("checksum", None)
        if told != fingerprint(json.dumps(sealed).encode()):
            raise UserError(f"{path / 'notes.json'}: is damaged (checksum); --overwrite starts over")
        self.notes, ranks = sealed["notes"], sealed["ranks"]
        names = [f"shard-{rank + 1:05d}-of-{ranks:05d}.safetensors" for rank in range(ranks)]
        try:
            self.files = [TensorFile(path / name, is_ours=True) for name in names]
        except FileNotFoundError as error:
            raise UserError(f"{path}: a shard is missing ({error}); --overwrite starts over") from None
        for file in self.files:
            if file.one_of != path.name:
                raise UserError(f"{file.path}: is of another save than {path.name}")
            if set(file.keys()) != set(file.offsets):
                raise UserError(f"{file.path}: the names of its tensors are damaged")
        self.homes: dict[str, list[TensorFile]] = {}  # name -> the files that hold its shards
        for file in self.files:
            for name in file.keys():
                self.homes.setdefault(name, []).append(file)

    def __contains__(self, name: object) -> bool:
        return name in self.homes

    def __iter__(self) -> Iterator[str]:
        return iter(self.homes)

    def __len__(self) -> int:
        return len(self.homes)

    def __getitem__(self, name: str) -> Tensor:
        whole = torch.empty(self.shape(name), dtype=self.homes[name][0].dtype(name))
        self.read_into(name, whole)
        return whole

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the whole tensor, which is not read. KeyError: there is none of this name."""
        ends = [[a + n for a, n in zip(file.begin(name), file.shape(name))] for file in self.homes[name]]
        return tuple(map(max, zip(*ends)))

    def read_into(self, name: str, target: Tensor) -> None:
        """Fill a tensor of this shape, or what this rank holds of it, from the shards that it overlaps."""
        mine, begin = local(target), _begin(target)
        for file in self.homes[name]:
            theirs, there = file.shape(name), file.begin(name)
            low = [max(a, b) for a, b in zip(begin, there)]
            high = [min(a + n, b + m) for a, n, b, m in zip(begin, mine.shape, there, theirs)]
            if all(a < b for a, b in zip(low, high)):
                to = tuple(slice(a - start, b - start) for a, b, start in zip(low, high, begin))
                of = tuple(slice(a - start, b - start) for a, b, start in zip(low, high, there))
                mine[to] = file.get(name)[of].to(mine.device)


def state_of(modules: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`modules.state_dict()`, and the optimizer's state as "optimizer.<key>.<parameter>"."""
    names = {parameter: name for name, parameter in modules.named_parameters()}
    state = modules.state_dict()
    for parameter, its_state in optimizer.state.items():
        state |= {f"optimizer.{key}.{names[parameter]}": value for key, value in its_state.items()}
    return state


@torch.no_grad()
def load_state(modules: nn.Module, optimizer: torch.optim.Optimizer, saved: SavedState) -> None:
    """Put `state_of` back into modules and optimizer, of however many ranks.

    Raises UserError for a damaged file, and when the state is not of these modules, which are then as they were.
    """
    targets, parameters = modules.state_dict(), dict(modules.named_parameters())
    for name, tensor in targets.items():
        got = saved.shape(name) if name in saved else "nothing"
        if got != tuple(tensor.shape):
            raise UserError(f"the state has {got} for {name}, wanted {tuple(tensor.shape)}: it is of another "
                            "model; --overwrite starts over")
    moments = {}  # parameter -> key -> tensor to be filled
    for name in saved:
        if name.startswith("optimizer."):
            _, key, its_name = name.split(".", 2)
            parameter = parameters.get(its_name)
            if parameter is None or saved.shape(name) not in ((), tuple(parameter.shape)):
                raise UserError(f"the state's {name} is of another model; --overwrite starts over")
            blank = torch.zeros_like(parameter) if saved.shape(name) else torch.zeros((), device=parameter.device)
            moments.setdefault(parameter, {})[key] = targets[name] = blank.detach()
    for name, target in targets.items():
        saved.read_into(name, target)
    optimizer.state.update(moments)

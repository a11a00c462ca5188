"""What a run goes on from: tensors and notes of one step, written by all ranks, whole or not there.

A folder state-000100/ holds one safetensors file per rank and, written last, notes.json: without it the folder
does not count. Sharded tensors are in it as each rank holds them, in the layout of torch.distributed.checkpoint's
Hugging Face files, whose reader gives them to any number of ranks. Nothing is ever pickled.
"""

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
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
    world.on_main(_empty, path)  # what another number of ranks had begun there
    shards, offsets = {}, {}
    for name, tensor in tensors.items():
        if is_sharded(tensor) and local(tensor).numel():
            shards[name], offsets[name] = local(tensor), list(tensor.__create_chunk_list__()[0].offsets)
        elif not is_sharded(tensor) and world.is_main:
            shards[name], offsets[name] = tensor, [0] * tensor.ndim
    with written_aside(path / f"shard-{world.rank + 1:05d}-of-{world.world_size:05d}.safetensors") as aside:
        write_tensors(aside, shards, {}, path.name, offsets)
    world.barrier()
    world.on_main(_close, path, notes, world.world_size)


def _empty(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


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
        shards = [(self._begin(file, name), file.get(name)) for file in self.homes[name]]
        whole = shards[0][1].new_empty(self.shape(name))
        for begin, shard in shards:
            whole[tuple(slice(a, a + n) for a, n in zip(begin, shard.shape))] = shard
        return whole

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the whole tensor, which is not read. KeyError: there is none of this name."""
        ends = [[a + n for a, n in zip(self._begin(file, name), file.shape(name))] for file in self.homes[name]]
        return tuple(map(max, zip(*ends)))

    def _begin(self, file: TensorFile, name: str) -> list[int]:
        return file.offsets[name]["saved_offsets"]

    def read_into(self, targets: dict[str, Tensor], world: Dist) -> None:
        """Fill tensors, sharded ones too, of the same names and shapes. Raises UserError for a damaged file."""
        from torch.distributed import checkpoint as dcp  # here, since it takes half a second
        from torch.distributed.checkpoint import HuggingFaceStorageReader

        for file in self.files[world.rank :: world.world_size]:  # each rank checks some
            for name in file.keys():
                file.get(name)
        world.barrier()
        with warnings.catch_warnings():  # that one process is one process
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(targets, storage_reader=HuggingFaceStorageReader(str(self.path)),
                     process_group=world.patient, no_dist=world.world_size == 1)


def state_of(modules: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`modules.state_dict()`, and the optimizer's state as "optimizer.<key>.<parameter>"."""
    names = {parameter: name for name, parameter in modules.named_parameters()}
    state = modules.state_dict()
    for parameter, its_state in optimizer.state.items():
        state |= {f"optimizer.{key}.{names[parameter]}": value for key, value in its_state.items()}
    return state


def load_state(modules: nn.Module, optimizer: torch.optim.Optimizer, saved: SavedState, world: Dist) -> None:
    """Put `state_of` back into modules and optimizer, of however many ranks.

    Raises UserError when the state is not of these modules; they are then as they were.
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
    saved.read_into(targets, world)
    optimizer.state.update(moments)

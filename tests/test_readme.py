"""What the README says exists: functions, flags, files, pictures; and the chain of imports that it promises."""

import ast
import importlib
import re
import shlex

import pytest
from conftest import ROOT

from rl import RLConfig
from sample import SampleConfig, parse_flags
from train import TrainConfig

README = (ROOT / "README.md").read_text(encoding="utf-8")
NAMES = sorted(set(re.findall(r"`((?:model|kernels|train|sample|rl|data\.\w+)\.[A-Za-z_]\w*(?:\.\w+)*)`", README)) - {
    f"{stem}.py" for stem in ("model", "kernels", "train", "sample", "rl")})
COMMANDS = re.findall(r"^(?:torchrun --nproc_per_node=2 |python )(train|rl|sample)\.py *(.*)$", README, re.M)
CHAIN = ["kernels", "model", "sample", "train", "rl"]


def test_there_are_names_and_commands_to_check():
    assert len(NAMES) > 25 and len(COMMANDS) > 10


@pytest.mark.parametrize("name", NAMES)
def test_every_function_of_the_tables_exists(name):
    parts = name.split(".")
    depth = 2 if parts[0] == "data" else 1
    thing = importlib.import_module(".".join(parts[:depth]))
    for part in parts[depth:]:
        thing = getattr(thing, part)


@pytest.mark.parametrize("program,flags", COMMANDS)
def test_every_command_is_understood(program, flags):
    config = {"train": TrainConfig, "rl": RLConfig, "sample": SampleConfig}[program]
    words = shlex.split(flags.partition("#")[0].partition("&&")[0])
    parse_flags(config, words, "")


def test_every_picture_is_there():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert len(pictures) >= 3
    for picture in pictures:
        assert (ROOT / picture).read_bytes()[:4] == b"\x89PNG", picture


@pytest.mark.parametrize("place", range(len(CHAIN)))
def test_a_file_imports_only_from_its_left(place):
    tree = ast.parse((ROOT / f"{CHAIN[place]}.py").read_text(encoding="utf-8"))
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name.partition(".")[0] for name in found} & set(CHAIN[place:])


def test_data_imports_none_of_the_five():
    for path in (ROOT / "data").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert not {name.partition(".")[0] for name in names} & set(CHAIN), path

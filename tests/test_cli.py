"""data/io/cli.py: knobs that check themselves, flags both ways, devices, what a program is."""

import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from data.io.checkpoint import FIELDS, PRESETS, config_from_hf, load_preset
from data.io.cli import Knobs, UserError, knob, nearest, parse_flags, pick_device, set_fields, to_flags
from data.io.run import newest_run
from tests.conftest import refused

ROOT = Path(__file__).parent.parent


@dataclass
class Example(Knobs):
    micro_batch: int = knob(8, "sequences", least=1)
    lr: float = knob(1e-3, "100% of the rate", above=0)
    name: str | None = knob(None, "a name")
    steps: int | None = knob(10, "steps or none", most=99)
    resume: bool = knob(False, "go on")
    mode: str = knob("a", "which", choices=("a", "b", "middle"))
    set: list[str] = knob([], "key=value")
    shares: list[float] = knob([], "fractions", above=0, most=1)
    keep_routing: bool = knob(True, "as in the rollout")
    text: str = knob("", "the text", positional=True)
    plain: float = 0.5

    def rules(self):
        fits = (self.steps or 0) % self.micro_batch == 0
        yield "steps", f"a multiple of micro_batch = {self.micro_batch}", fits


GOOD = {"micro_batch": 5}  # divides the steps


@pytest.mark.parametrize("change, told", [
    ({"micro_batch": 0}, "micro_batch: got 0, wanted at least 1"),
    ({"micro_batch": True}, "micro_batch: got True, wanted a whole number"),
    ({"micro_batch": 2.0}, "micro_batch: got 2.0, wanted a whole number"),
    ({"micro_batch": None}, "micro_batch: got None, wanted a whole number"),
    ({"lr": 0}, "lr: got 0, wanted above 0"),
    ({"lr": "1"}, "lr: got '1', wanted a finite number"),
    ({"lr": float("inf")}, "lr: got inf, wanted a finite number"),
    ({"plain": float("nan")}, "plain: got nan, wanted a finite number"),
    ({"resume": 1}, "resume: got 1, wanted true or false"),
    ({"name": 3}, "name: got 3, wanted a text, or none"),
    ({"steps": 100}, "steps: got 100, wanted at most 99"),
    ({"set": "a=1"}, "set: got 'a=1', wanted a list, each a text"),
    ({"set": [1]}, "set: got [1], wanted a list"),
    ({"shares": [0.5, 0.0]}, "shares: got [0.5, 0.0], wanted above 0, at most 1"),
    ({"shares": [0.5, "x"]}, "wanted a list, each a finite number"),
    ({"mode": "midle"}, "mode: got 'midle', wanted one of 'a', 'b', 'middle' (did you mean 'middle'?)"),
    ({"text": ["a"]}, "text: got ['a'], wanted a text"),
    ({"micro_batch": 3}, "steps: got 10, wanted a multiple of micro_batch = 3"),
    ({"micro_batch": 3, "plain": "x"}, "plain: got 'x'"),  # types come before rules between fields
])
def test_knobs_that_do_not_fit(change, told):
    with refused(told):
        Example(**GOOD | change)


@pytest.mark.parametrize("change", [{"lr": 1}, {"plain": -3}, {"steps": None}, {"shares": [1, 0.5]}, {"name": "x"}])
def test_knobs_that_fit(change):
    for name, value in change.items():
        assert getattr(Example(**GOOD | change), name) == value


def test_a_frozen_dataclass_is_checked_too():
    @dataclass(frozen=True)
    class Frozen(Knobs):
        size: int = 3

    assert Frozen().size == 3
    with pytest.raises(UserError, match="size: got 'x', wanted a whole number"):
        Frozen("x")


def flags(words: str, **options) -> Example:
    return parse_flags(Example, ["--micro-batch=5", *words.split()], "", **options)


def test_flags_reach_their_fields_with_their_types():
    assert flags("") == Example(5)
    argv = "--lr=3e-4 --name x --steps none --resume --mode b --set a=1 b=2 --set c=3 --shares .5"
    assert flags(argv) == Example(5, 3e-4, "x", None, True, "b", ["a=1", "b=2", "c=3"], [0.5])
    assert flags("--no-resume hello") == Example(5, text="hello")
    assert Example(5).set == []  # the default was not extended in place


def test_dashes_and_underscores_are_one_spelling():
    no = ("--no-keep-routing", "--no-keep_routing", "--no_keep_routing")
    for flag in ("--keep-routing", "--keep_routing", *no):
        assert flags(flag).keep_routing == (flag not in no), flag
    assert flags("--micro_batch=2").micro_batch == 2 == flags("--micro-batch 2").micro_batch
    assert flags("-- --micro-batch").text == "--micro-batch"  # behind -- stands text
    assert flags("__keep-routing").text == "__keep-routing"
    assert flags("--name=a-b_c-d").name == "a-b_c-d"


@pytest.mark.parametrize("argv, words", [
    (["--micro-bach", "3"], "unknown flag --micro-bach (did you mean '--micro_batch'?)"),
    (["--micro", "3"], "unknown flag --micro"),
    (["--micro_batc=3"], "unknown flag --micro_batc (did you mean '--micro_batch'?); --help lists all"),
    (["--lr", "fast"], "--lr: got 'fast', wanted float"), (["--micro_batch", "1.5"], "got '1.5', wanted int"),
    (["--mode", "c"], "invalid choice: 'c'"), (["--lr"], "expected one argument"),
    (["one", "stray"], "unexpected argument 'stray'"), (["--lr", "nan"], "lr: got nan, wanted a finite number"),
    (["--resume=maybe"], "ignored explicit argument")])
def test_flags_that_are_wrong(argv, words):
    with refused(words):
        parse_flags(Example, argv, "")


def test_help_shows_every_knob_with_its_default_and_one_spelling(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_flags(Example, ["--help"], "what it does")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "what it does" in text and "--micro-batch" not in text
    for words in ("--micro_batch int sequences [8]", "100% of the rate [0.001]", "--no-resume", "{a,b,middle}"):
        assert words in text
    assert all(name in text for name in Example.__dataclass_fields__ if name != "plain")


def test_presets_stand_between_defaults_and_flags():
    presets = {"mode": {"b": {"lr": 0.5, "steps": 20}, "a": {"plain": 7.0}}, "name": {"fast": {"steps": 5}}}
    assert flags("--mode b", presets=presets) == Example(5, 0.5, steps=20, mode="b")
    assert flags("--mode b --steps 15", presets=presets) == Example(5, 0.5, steps=15, mode="b")
    assert flags("--mode b --steps 10", presets=presets).steps == 10  # given, though the default
    assert flags("", presets=presets) == Example(5, plain=7.0)  # of the default of --mode
    assert flags("--name fast --mode b", presets=presets).steps == 5  # the later table wins
    assert flags("--name other", presets=presets).steps == 10
    with pytest.raises(UserError, match="lr: got -1"):
        flags("--mode b", presets={"mode": {"b": {"lr": -1}}})


@pytest.mark.parametrize("words, told", [
    ("--keep 0.1 0.2", "--keep is now --snapshots"), ("--keep=3", "--keep is now --snapshots"),
    ("--old-bench", "--old-bench is now python -m tests.bench.train"),
    ("text --old_bench", "--old_bench is now python -m tests.bench.train")])
def test_flags_that_are_elsewhere_now_say_where(words, told):
    with pytest.raises(UserError) as error:
        flags(words, moved={"keep": "--snapshots", "old_bench": "python -m tests.bench.train"})
    assert str(error.value) == told
    assert flags("--keep-routing", moved={"keep": "--snapshots"}).keep_routing


@pytest.mark.parametrize("config", [
    Example(5),
    Example(5, 3e-4, "x", None, True, "b", ["a=1", "b=2"], [0.1, 1.0], False, "hello there", 2.0),
    Example(5, 1e-30, "-x", text="-3+4=", set=["--a"]),
    Example(5, name="", plain=-1.5, text="--lr")])
def test_to_flags_is_the_inverse_of_parse_flags(config):
    assert parse_flags(Example, to_flags(config), "") == config


def test_to_flags_of_some_names():
    config = Example(5, 0.5, "x", keep_routing=False)
    assert to_flags(config, ["lr", "keep_routing", "resume"]) == ["--lr=0.5", "--no-keep_routing"]
    assert to_flags(Example(8, steps=None), {"steps"}) == ["--steps=none"]


@dataclass(frozen=True)
class Sizes(Knobs):
    hidden_size: int = 64
    q_lora_rank: int | None = 8
    rope_theta: float = 1e4
    norm_topk_prob: bool = True
    scoring_func: str = "sigmoid"


def test_settings_become_keyword_arguments():
    settings = ["hidden_size=128", "q_lora_rank=none", "scoring_func=softmax", "rope_theta=5e4"]
    assert set_fields(Sizes, settings) == {
        "hidden_size": 128, "q_lora_rank": None, "scoring_func": "softmax", "rope_theta": 5e4}
    assert set_fields(Sizes, []) == {}
    for words, value in ((("true", "Yes", "ON", "1"), True), (("false", "no", "Off", "0"), False)):
        for word in words:
            assert set_fields(Sizes, [f"norm_topk_prob={word}"]) == {"norm_topk_prob": value}, word


@pytest.mark.parametrize("setting, told", [
    ("hidden_sice=3", "set: the model's config has no key 'hidden_sice' (did you mean 'hidden_size'?)"),
    ("hidden_size=wide", "set: hidden_size: got 'wide', wanted int"), ("hidden_size=1.5", "got '1.5', wanted int"),
    ("hidden_size", "got '', wanted int"), ("hidden_size=none", "got 'none', wanted int"),
    ("norm_topk_prob=2", "norm_topk_prob: got '2', wanted bool"), ("norm_topk_prob=", "wanted bool")])
def test_settings_that_are_wrong(setting, told):
    with refused(told):
        set_fields(Sizes, [setting])


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="got cuda, this machine has cpu"):
        pick_device("cuda")
    with pytest.raises(UserError, match="did you mean 'cuda'"):
        pick_device("cud")


def test_the_newest_checkpoint_wins(tmp_path):
    with pytest.raises(UserError, match="python train.py"):
        newest_run(tmp_path / "absent")
    for age, name in enumerate(("b", "deep/a", "c")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model.safetensors").touch()
        os.utime(tmp_path / name / "model.safetensors", (1000 + age, 1000 + age))
        if name != "c":  # c has no config.json: half a checkpoint
            (tmp_path / name / "config.json").touch()
    assert newest_run(tmp_path) == tmp_path / "deep/a"


def test_nearest_says_nothing_when_nothing_is_near():
    assert nearest("tinny", ["tiny"]) == " (did you mean 'tiny'?)"
    assert nearest("xyz", ["tiny"]) == ""

# facts from DeepSeek's and Moonshot's published config.json files
NAMES = ("hidden_size", "num_hidden_layers", "first_k_dense_replace", "num_attention_heads", "q_lora_rank",
         "kv_lora_rank", "intermediate_size", "moe_intermediate_size", "n_routed_experts",
         "n_shared_experts", "vocab_size", "num_experts_per_tok", "n_group", "topk_group", "scoring_func",
         "topk_method", "norm_topk_prob", "routed_scaling_factor", "num_nextn_predict_layers", "rope_theta",
         "max_position_embeddings", "rms_norm_eps")
RELEASED = {
    "v3": (7168, 61, 3, 128, 1536, 512, 18432, 2048, 256, 1, 129280, 8, 8, 4,
           "sigmoid", "noaux_tc", True, 2.5, 1, 1e4, 163840, 1e-6),
    "v2": (5120, 60, 1, 128, 1536, 512, 12288, 1536, 160, 2, 102400, 6, 8, 3,
           "softmax", "group_limited_greedy", False, 16.0, 0, 1e4, 163840, 1e-6),
    "v2-lite": (2048, 27, 1, 16, None, 512, 10944, 1408, 64, 2, 102400, 6, 1, 1,
                "softmax", "greedy", False, 1.0, 0, 1e4, 163840, 1e-6),
    "moonlight": (2048, 27, 1, 16, None, 512, 11264, 1408, 64, 2, 163840, 6, 1, 1,
                  "sigmoid", "noaux_tc", True, 2.446, 0, 5e4, 8192, 1e-5),
    "kimi-k2": (7168, 61, 1, 64, 1536, 512, 18432, 2048, 384, 1, 163840, 8, 1, 1,
                "sigmoid", "noaux_tc", True, 2.827, 0, 5e4, 131072, 1e-6),
}
# factor, beta_fast, mscale
YARN = {"v3": (40, 32, 1.0), "v2": (40, 32, 0.707), "v2-lite": (40, 32, 0.707), "kimi-k2": (32, 1, 1.0)}


@pytest.mark.parametrize("name", RELEASED)
def test_presets_of_released_models_are_the_published_facts(name):
    config = load_preset(name)
    for key, value in zip(NAMES, RELEASED[name]):
        assert config[key] == value, key
    heads = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    assert [config[key] for key in heads] == [128, 64, 128] and not config["attention_bias"]
    assert ("rope_factor" in config) == (name in YARN) and "initializer_range" not in config
    if name in YARN:
        factor, beta_fast, mscale = YARN[name]
        assert config["rope_factor"] == factor and config["rope_beta_fast"] == beta_fast
        assert config["rope_mscale"] == config["rope_mscale_all_dim"] == mscale
        assert config["rope_beta_slow"] == 1
        assert config["rope_original_max_position_embeddings"] == 4096


def test_mscale_counts_only_beside_mscale_all_dim():
    """As transformers has it."""
    yarn = {"type": "yarn", "factor": 4, "mscale": 0.7}
    values = json.loads((PRESETS / "tiny.json").read_text()) | {"rope_scaling": yarn, "max_position_embeddings": 64}
    assert config_from_hf(values)["rope_mscale"] == 1.0
    both = values | {"rope_scaling": yarn | {"mscale_all_dim": 1}}
    assert config_from_hf(both)["rope_mscale"] == 0.7
    assert config_from_hf(values)["rope_original_max_position_embeddings"] == 64


def test_every_field_of_the_model_has_a_place_in_config_json():
    from model import Config

    rope = {name for name in Config.__dataclass_fields__ if name.startswith("rope_")}
    assert {*FIELDS, *rope} == Config.__dataclass_fields__.keys()

IS_GLIBC = platform.libc_ver()[0] == "glibc" and os.path.exists("/proc/self/maps")


HEAP = """
import ctypes
from data.io import cli
{}
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
place = libc.malloc(1 << 26)
libc.free(place)
heap = next(line for line in open("/proc/self/maps") if "[heap]" in line).split()[0].split("-")
print(int(heap[0], 16) <= place and place + (1 << 26) <= int(heap[1], 16))
"""


@pytest.mark.skipif(not IS_GLIBC, reason="not glibc")
def test_programs_keep_the_memory_that_they_freed():
    """A large block comes from the heap, and comes again: no page of it is asked for twice."""
    told = {}
    for line in ("cli.keep_freed_memory()", ""):
        code = HEAP.format(line)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        told[line] = done.stdout
    assert told == {"cli.keep_freed_memory()": "True\n", "": "False\n"}


@pytest.mark.parametrize("body, code, out, err", [
    ("print('done')", 0, "done\n", ""), ("raise cli.UserError('lr: wrong')", 2, "", "error: lr: wrong\n"),
    ("raise KeyboardInterrupt", 130, "", ""),
    ("print('half'); sys.stdout.flush(); raise BrokenPipeError", 141, "half\n", "")])
def test_a_program_ends_with_its_code_and_one_line(body, code, out, err):
    program = f"import sys\nfrom data.io import cli\ndef main(argv):\n    {body}\ncli.run_main(main)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)

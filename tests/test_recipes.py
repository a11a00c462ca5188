"""The recipes: examples of fine-tuning, stages that are passed over or continued, each a checkpoint for sample.py."""

import itertools
import json
import shlex
import sys
from pathlib import Path

import pytest
import torch
from test_rl_loop import SHORT, base  # noqa: F401 (a fixture)

import rl
from data import UserError
from data.tasks import load_task
from data.tokenizer import load_tokenizer
from kernels import IGNORE
from rl import Examples, Recipe, RLConfig, clean_forms, is_readable
from train import Dist

sys.path.append(str(Path(__file__).parent))
QUICK = SHORT | dict(task="toy:Same,toy:Other", steps=2, sft_steps=60, sft_lr=1e-2, max_new_tokens=30,
                     name="r1", recipe="r1")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(rl, "SFT_BATCH", 16)
    monkeypatch.setattr(rl, "SFT_LENGTH", 48)


def recipe(base, out, **changes) -> Recipe:  # noqa: F811
    return Recipe(RLConfig(**QUICK | {"base": str(base), "out": str(out)} | changes), Dist())


def test_examples_mask_the_question_and_the_padding_and_train_the_stop_token():
    tokenizer = load_tokenizer("plainseek:1024")
    loader = Examples([("4-6=", "<think>4-6=8</think><answer>8</answer>")], tokenizer, 32, Dist(), 0)
    tokens, targets = loader.next_batch(3)
    assert tokens.shape == targets.shape == (3, 32)
    kept = [token for token in targets[0].tolist() if token != IGNORE]
    assert tokenizer.decode(kept) == "<think>4-6=8</think><answer>8</answer><｜end▁of▁sentence｜>"
    where = (targets[0] != IGNORE).nonzero().flatten()
    assert torch.equal(tokens[0, where[1:]], targets[0, where[:-1]])  # each target is the token that follows
    assert tokenizer.decode(tokens[0, : where[0] + 1].tolist()) == rl.prompt_text("4-6=")
    with pytest.raises(UserError, match="no example fits"):
        Examples([("4-6=", "8" * 100)], tokenizer, 16, Dist(), 0)


def test_examples_are_the_same_for_any_number_of_ranks_and_after_a_resume():
    tokenizer = load_tokenizer("plainseek:1024")
    texts = [(f"{i}+1=", str(i + 1)) for i in range(50)]
    one = Examples(texts, tokenizer, 24, Dist(), 5)
    two = [Examples(texts, tokenizer, 24, Dist(rank, 2), 5) for rank in range(2)]
    for _ in range(2):
        whole, parts = one.next_batch(8), [each.next_batch(8) for each in two]
        assert torch.equal(whole[0][0::2], parts[0][0]) and torch.equal(whole[1][1::2], parts[1][1])
    again = Examples(texts, tokenizer, 24, Dist(), 5)
    again.load_state_dict(one.state_dict())
    assert torch.equal(one.next_batch(4)[0], again.next_batch(4)[0])


def test_plain_text_is_mixed_in_whole():
    class Plain:
        def next_batch(self, count):
            return torch.full((count, 24), 7), torch.full((count, 24), 8)

    loader = Examples([("1+1=", "2")], load_tokenizer("plainseek:1024"), 24, Dist(), 0, Plain())
    tokens, targets = loader.next_batch(16)
    assert tokens.shape == (16, 24) and (targets == 8).all(1).sum() == 4 and loader.position == 12


def test_readable_is_written_as_clean_work():
    chain, languages = (clean_forms(load_task(name)) for name in ("chain", "languages"))
    good = "<think>4-6=8;8+3=1</think><answer>1</answer>"
    assert is_readable(good, chain)
    for bad in ("4-6=8;8+3=1 so 1", good + "x", good.replace(";", " wait "), good.replace("4-6=8;", "4-6+1=9;"),
                good.replace("=8;", "=8;the "), "<think></think><answer>1</answer>"):
        assert not is_readable(bad, chain), bad
    assert is_readable("<think>four minus six is eight</think><answer>8</answer>", languages)
    assert not is_readable("<think>vier minus six is eight</think><answer>8</answer>", languages)
    assert clean_forms(load_task("toy:Letters")) is None  # a task without `work`: well-formed is all there is to ask


def test_r1_leaves_checkpoints_and_a_table_and_passes_over_what_is_finished(base, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "out"
    rl.recipe_r1(recipe(base, out))
    labels = ["0-zero", "1-cold-start", "2-reasoning", "3-rejection", "4-all"]
    stamps = {}
    for label in labels:
        folder = out / f"r1-{label}"
        assert all((folder / name).exists() for name in ("config.json", "tokenizer.json", "exam.json"))
        stamps[label] = (folder / "model.safetensors").stat().st_mtime_ns
    table = (out / "r1.txt").read_text()
    assert all(label in table for label in ["base", *labels]) and "pass@1 other" in table
    exams = {label: json.loads((out / f"r1-{label}" / "exam.json").read_text()) for label in labels}
    assert exams["1-cold-start"][0]["accuracy"][0] > 0.6 > 0.2 > exams["0-zero"][0]["accuracy"][0]
    kept = json.loads((out / "r1-3-rejection" / "texts.json").read_text())
    assert all(is_readable(text, {"0=0"}) for _, text in kept)
    with pytest.raises(UserError, match="holds a run already"):
        rl.recipe_r1(recipe(base, out))
    (out / "r1-4-all" / "exam.json").unlink()  # as if it had been cut off behind its last step
    capsys.readouterr()
    rl.recipe_r1(recipe(base, out, resume=True))
    assert "resumed at step 2 of 2" in capsys.readouterr().out and (out / "r1-4-all" / "exam.json").exists()
    assert all((out / f"r1-{label}" / "model.safetensors").stat().st_mtime_ns == stamps[label] for label in labels[:-1])


def test_a_stage_that_is_cut_off_continues(base, tmp_path, monkeypatch):  # noqa: F811
    whole, cut = (recipe(base, tmp_path / name, eval_every=1, sft_steps=6) for name in ("whole", "cut"))
    texts = whole.clean_traces(whole.tasks, 40)
    whole.sft("1-cold-start", base, lambda: texts)
    asked = itertools.count()
    with monkeypatch.context() as patch, pytest.raises(rl.Stopped):  # a signal arrives in the third step
        patch.setattr("train.StopSignal.is_set", property(lambda stop: next(asked) >= 3, lambda stop, value: None),
                      raising=False)
        cut.sft("1-cold-start", base, lambda: texts)
    recipe(base, tmp_path / "cut", eval_every=1, sft_steps=6, resume=True).sft("1-cold-start", base, lambda: texts)
    weights = [(tmp_path / name / "r1-1-cold-start" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_rejection_sampling_without_good_samples_is_one_line(base, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match="0 of 64 questions had a correct and readable answer"):
        recipe(base, tmp_path).good_samples(base, [load_task("toy:Same")], 8)


@pytest.mark.parametrize("name, words", [("quality", "python train.py --keep"),
                                         ("distill", "python rl.py --recipe r1")])
def test_what_a_recipe_needs_is_named(base, tmp_path, name, words):  # noqa: F811
    with pytest.raises(UserError, match=words):
        {"quality": rl.recipe_quality, "distill": rl.recipe_distill}[name](recipe(base, tmp_path, recipe=name))


def test_a_recipe_without_its_base_is_one_line_and_code_2(python):
    done = python("rl.py", "--recipe", "r1")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "python train.py makes out/base" in done.stderr


def test_flags_of_recipes_are_knobs_that_exist():
    from sample import parse_flags
    for name, flags in rl.RECIPES.items():
        assert parse_flags(RLConfig, shlex.split(flags), "").name == (name or "rl")


def test_quality_takes_what_keep_left_and_draws_a_picture(base, tmp_path, python):  # noqa: F811
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("A small boat on the wide sea.\n\n" * 3000)
    flags = shlex.split("--data text --steps 4 --tokens_per_step 64 --seq_len 32 --keep 0.25 0.5 --precision fp32")
    done = python("train.py", *flags, "--device", "cpu", "--set", "hidden_size=32", "num_hidden_layers=2")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "out" / "base"
    assert sorted(path.name for path in run.glob("at-*")) == ["at-025", "at-050"]
    early, late = ((run / name / "model.safetensors").read_bytes() for name in ("at-025", "at-050"))
    assert early != late != (run / "model.safetensors").read_bytes()
    rl.recipe_quality(recipe(run, tmp_path / "out", name="quality", task="toy:Letters", steps=1, max_new_tokens=4))
    assert (tmp_path / "out" / "quality.png").stat().st_size > 0
    assert all(label in (tmp_path / "out" / "quality.txt").read_text() for label in ("base-025", "base-100", "050-2"))

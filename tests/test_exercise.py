"""exercise.py: every exercise fits its function, ours is green, the stub is to do, known mistakes are red."""

import json
from dataclasses import replace

import pytest

import kernels
import rl
from tests import exercise, grading
from tests.conftest import ROOT
from tests.exercise import EXERCISES
from tests.mistakes import Patches
from tests.test_claims import TINY


def write(folder, name, change=lambda text: text):
    (folder / f"{name}.py").write_text(change(EXERCISES[name].source(is_solved=True)))


def verdicts(folder, name):
    return [found["verdict"] for found in grading.judged(EXERCISES[name], folder)]


@pytest.mark.parametrize("name", EXERCISES)
def test_ours_is_green_and_the_stub_is_to_do(name, tmp_path, rough, monkeypatch):
    """By the first two judgements; by all of them with --rough 2, for the large checks are run elsewhere too."""
    whole = grading.GRADINGS[name]
    some = whole if rough > 1 else replace(whole, checks=whole.checks[:1])
    monkeypatch.setitem(grading.GRADINGS, name, some)
    write(tmp_path, name)
    assert verdicts(tmp_path, name) == ["green"] * (1 + len(some.checks))
    (tmp_path / f"{name}.py").write_text(EXERCISES[name].source())
    assert verdicts(tmp_path, name) == ["to do"]


@pytest.mark.parametrize("name", EXERCISES)
def test_at_least_two_known_mistakes_are_red(name, tmp_path):
    """Those that are changes of the source are pasted in, the others put in; whoever is asked first and sees it will do."""
    one, ours, red = EXERCISES[name], grading.outcome(grading.GRADINGS[name]), []
    for text, put in grading.tried(one, tmp_path):
        with Patches() as patches:
            put(patches)
            found = grading.verdicts(grading.GRADINGS[name], ours, tmp_path)
            red += [text] if any(each["verdict"] == "red" for each in found) else []
    assert len(red) >= 2 and red == [text for text, _ in grading.tried(one, tmp_path)]


def test_every_exercise_is_listed_with_its_equation_and_what_is_done(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    exercise.main(["--folder", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:21]] == list(EXERCISES)
    assert EXERCISES.keys() == grading.GRADINGS.keys()
    assert "0 of 20 are green" in lines[-1] and lines[-1].endswith("python -m tests.exercise rms_norm")
    exercise.main(["latents", "--folder", str(tmp_path)])
    write(tmp_path, "choose")
    exercise.note_verdict(tmp_path, "choose", "green")
    write(tmp_path, "gates")
    exercise.note_verdict(tmp_path, "gates", "red")
    (tmp_path / "gates.py").write_text("# another text")
    write(tmp_path, "mtp")
    states = {name: exercise.state(tmp_path, name) for name in EXERCISES}
    assert {name: found for name, found in states.items() if found} == {
        "latents": "to do", "choose": "green", "gates": "changed", "mtp": "not checked"}


@pytest.mark.parametrize("name", EXERCISES)
def test_a_stub_is_sound_and_gives_nothing_away(name, tmp_path):
    """It can be imported; each line of the solution's body stands nowhere in it."""
    text, solved = EXERCISES[name].source(), EXERCISES[name].source(is_solved=True)
    (tmp_path / f"{name}.py").write_text(text)
    grading.load(tmp_path / f"{name}.py", EXERCISES[name].owner, EXERCISES[name].functions)
    body = {line.strip() for line in solved.splitlines()} - {line.strip() for line in text.splitlines()}
    assert len(body) >= EXERCISES[name].solution_lines // 2 and "raise NotImplementedError" not in body
    assert EXERCISES[name].solution_lines <= 20 and 1 <= EXERCISES[name].level <= 3


def test_what_is_there_is_not_overwritten(tmp_path, capsys):
    exercise.main(["latents", "--folder", str(tmp_path)])
    (tmp_path / "latents.py").write_text("# mine")
    exercise.main(["latents", "--folder", str(tmp_path)])
    assert (tmp_path / "latents.py").read_text() == "# mine" and "stays as it is" in capsys.readouterr().out


def found_in(folder, name, body: str) -> list[dict]:
    """The findings about a stub with this body."""
    (folder / f"{name}.py").write_text(EXERCISES[name].source().replace("raise NotImplementedError", body))
    return list(grading.judged(EXERCISES[name], folder))


@pytest.mark.parametrize("name, body, words", [
    ("latents", "return self.kv_a_proj_with_mqa(h)[..., 1:]", "latent: (2, 12, 63) float32, wanted (2, 12, 64) float32"),
    ("latents", "return self.kv_a_proj_with_mqa(h).double()", "float64, wanted (2, 12, 64) float32"),
    ("latents", "return self.kv_a_proj(h)", "AttributeError: 'Attention' object has no attribute 'kv_a_proj' (latents.py, line 47: "),
    ("rms_norm", "return x * weight", "result: 98% of it differs, first at [0, 0, 0]: 1.664, wanted 1.547; off by up to 1.1"),
    ("expert_ffn", "return u * 1.0", "gradient of input 2: there is none, wanted"),
    ("policy_loss", "return {'pg': 1.0}", "AttributeError: 'float'"),
    ("rms_norm", "raise SystemExit(0)", "SystemExit: 0 (rms_norm.py, line "),
    ("rms_norm", "while True: pass", "TimeoutError: still running after 1 seconds (rms_norm.py, line "),
])
def test_red_says_what_differs_and_where(name, body, words, tmp_path, monkeypatch):
    monkeypatch.setattr(grading, "SECONDS", 1 if "while" in body else 20)
    monkeypatch.setitem(grading.GRADINGS, name, replace(grading.GRADINGS[name], checks=()))
    (first,) = found_in(tmp_path, name, body)
    assert first["verdict"] == "red" and words in first["what"], first["what"]


@pytest.mark.parametrize("text, words", [
    ("def latents(:", "latents.py, line 1: "), ("1 / 0", "cannot be imported: ZeroDivisionError: division by zero (latents.py, line 1"),
    ("class Attention:\n    def latent(self): pass", "has no function latents (did you mean 'latent'?)"),
    ("class Atention:\n    pass", "has no class Attention (did you mean 'Atention'?)"),
    ("class Attention:\n    latents = 3", "has no function latents"), ("raise SystemExit(0)", "SystemExit: 0 (latents.py, line 1"),
    ("\0", "latents.py"),
    ("while True: pass", "still running after 1 seconds")])
def test_a_file_that_cannot_be_used_says_why(text, words, tmp_path, monkeypatch):
    monkeypatch.setattr(grading, "SECONDS", 1)
    (tmp_path / "latents.py").write_text(text)
    (found,) = grading.judged(EXERCISES["latents"], tmp_path)
    assert found["verdict"] == "red" and words in found["what"], found["what"]


def test_hints_are_found_by_trying(tmp_path):
    write(tmp_path, "latents", lambda text: text.replace("self.kv_a_layernorm(c_kv)", "c_kv"))
    best = grading.hints(EXERCISES["latents"], tmp_path)[0]
    assert best[1] == "the latent is cached and used without its norm" and best[0] < 1e-6
    write(tmp_path, "update_bias", lambda text: text.replace("load.mean() - load", "load - load.mean()"))
    assert grading.hints(EXERCISES["update_bias"], tmp_path)[0][1] == "the bias moves the wrong way"
    write(tmp_path, "rms_norm")
    assert grading.hints(EXERCISES["rms_norm"], tmp_path) == []


def test_the_learners_function_is_everywhere_and_gone_afterwards(tmp_path):
    """Registries of both twins, modules that imported it, methods, super()."""
    write(tmp_path, "apply_rope")
    write(tmp_path, "group_advantages")
    before = kernels.FUSED, kernels.REFERENCE, rl.group_advantages
    with Patches() as patches:
        for name in ("apply_rope", "group_advantages"):
            grading.read_and_put(patches, EXERCISES[name], tmp_path)
        mine = kernels.REFERENCE.apply_rope
        assert mine is kernels.FUSED.apply_rope is kernels.apply_rope_reference and mine is not before[1].apply_rope
        assert rl.group_advantages is grading.test_rl.group_advantages is not before[2]
    assert before == (kernels.FUSED, kernels.REFERENCE, rl.group_advantages)


def test_the_program_checks_in_a_process_of_its_own(tmp_path, python):
    write(tmp_path, "lr_factor", lambda text: text.replace("config.cosine_to + (1 - config.cosine_to) * 0.5", "0.5"))
    done = python("-m", "tests.exercise", "lr_factor", "--hint", "--folder", str(tmp_path), cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 1 and "hint: the cosine ends at zero (gives exactly what yours gives)" in done.stdout, done
    assert exercise.state(tmp_path, "lr_factor") == "red"


def test_the_whole_set_is_checked_alone_and_together(tmp_path, capsys, monkeypatch):
    def grade(folder, task, names, bound=None, flags=()):
        capsys.readouterr()
        grading.main([str(folder), task, ",".join(names), *flags])
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    monkeypatch.setattr(exercise, "grade", grade)
    for name in ("lr_factor", "rms_norm"):
        write(tmp_path, name)
    write(tmp_path, "latents", lambda text: text.replace("self.kv_a_layernorm(c_kv)", "c_kv"))
    assert exercise.check_all(tmp_path) == ["rms_norm", "lr_factor"]
    assert [exercise.state(tmp_path, name) for name in ("rms_norm", "latents", "lr_factor")] == ["green", "red", "green"]


def test_training_on_own_functions_says_so_in_its_picture(tmp_path, workplace, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    write(tmp_path / "mine", "lr_factor", lambda text: text.replace("    if done < config", "    print('mine!')\n    if done < config", 1))
    flags = [*TINY, "--data", str(workplace / "text"), "--steps=2", "--name=mine"]
    grading.main(["mine", "train", "lr_factor", *flags])
    text = capsys.readouterr().out
    assert "mine!" in text and "Learned by functions of your own: 1 of 20" in text
    assert (tmp_path / "out" / "mine" / "yours.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("argv, words", [
    (["latnts"], "did you mean 'latents'"), (["--check"], "the exercise to check"), (["latents", "--all"], "no name beside --all"),
    (["latents", "--check"], "latents.py is not there: python -m tests.exercise latents writes it"),
    (["--all"], "has no exercise"), (["--train"], "no function of yours is green"), (["--chekc"], "did you mean '--check'")])
def test_bad_input_is_one_line(argv, words, tmp_path, refuses):
    refuses(exercise.main, words, *argv, "--folder", str(tmp_path / "mine"))

"""exercise.py: every exercise fits its function, ours is green, the stub is to do, known mistakes are red."""

from dataclasses import replace

import pytest

from tests import grading
from tests.exercise import EXERCISES
from tests.mistakes import Patches


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

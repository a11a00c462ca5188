"""bug.py: both runs are what they say, the game gives nothing away, the table is of all mistakes."""

import json
import math
from dataclasses import asdict
from itertools import islice

import pytest

from tests import bug
from tests.bug import MISTAKES, TEXTS, BugConfig, Run
from tests.conftest import ROOT, refused


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(bug, "STEPS", 4)


@pytest.fixture(scope="module")
def healthy():
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(bug, "STEPS", 4)
        return bug.train_small(None, {}, 0)


def test_saving_and_loading_halfway_changes_no_bit_of_the_healthy_run(healthy, monkeypatch):
    monkeypatch.setattr(bug, "reloaded", lambda *both: both)
    without = bug.train_small(None, {}, 0)
    assert not healthy.error and len(healthy.ce) == 4 and healthy.ce == without.ce
    assert healthy.drift < 1e-4 and healthy.text == without.text


@pytest.mark.parametrize("text, get", [
    ("labels are shifted again inside the model", lambda run: run.ce[0]),
    ("every row is decoded at the position of the first one", lambda run: round(run.drift, 3)),
    ("the MTP block attends to later tokens", lambda run: run.mtp[0]), ("the bias never moves", lambda run: run.max_vio[3])])
def test_a_mistake_moves_what_it_should_and_is_gone_afterwards(text, get, healthy):
    before = vars(bug.Transformer).copy(), vars(bug.train).copy()
    broken = bug.train_small(MISTAKES[text], {}, 0)
    assert not broken.error and get(broken) != get(healthy)
    assert before == (vars(bug.Transformer), vars(bug.train))


def test_what_it_raises_is_part_of_what_is_seen():
    run = bug.train_small(MISTAKES["the MTP layer has another index than num_hidden_layers"], {}, 0)
    assert run.error.startswith("UserError in step 3: ") and len(run.ce) == 2


@pytest.mark.parametrize("number", range(1, len(TEXTS) + 1))
def test_the_code_is_shown_without_a_word(number):
    code = bug.code_of(MISTAKES[TEXTS[number - 1]])
    compile(code, "", "exec")
    lines = [line for line in code.splitlines() if "#" in line]
    assert lines == code.splitlines()[:1] and '"""' not in code and TEXTS[number - 1] not in code


def test_showing_a_bug_draws_it_and_does_not_name_it(tmp_path, capsys):
    bug.main(["34", "--out", str(tmp_path)])
    text = capsys.readouterr().out
    assert (tmp_path / "bug-34.png").read_bytes()[:4] == b"\x89PNG" and "loss on other text" in text
    assert TEXTS[33] not in text and MISTAKES[TEXTS[33]].place not in text
    bug.main(["34", "--tell", "--code"])
    text = capsys.readouterr().out
    assert f"bug 34: {TEXTS[33]}" in text and "met in" in text and "model.Router.update_bias" in text


def test_checks_say_what_they_see(monkeypatch, capsys):
    three = dict(islice(MISTAKES.items(), 31, 34))  # of the bias
    monkeypatch.setattr(bug, "MISTAKES", three)
    bug.show_checks(three[TEXTS[33]])
    text = capsys.readouterr().out
    assert "red  bias moves by the sign of the load" in text and "updated bias: off by" in text and "of 2 checks are red" in text


def test_curves_are_text():
    lines = bug.curves([3.0, 2.0, 1.0], [3.0, 3.0, math.nan], height=3, width=6)
    assert lines[0] == "   3.00 │* x" and lines[1] == "        │  o" and lines[2] == "   1.00 │    o"


def test_chance_is_of_the_seed():
    numbers = [bug.which(BugConfig(random=True, seed=seed)) for seed in range(30)]
    assert numbers == [bug.which(BugConfig(random=True, seed=seed)) for seed in range(30)]
    assert len(set(numbers)) > 15 and min(numbers) >= 1 and max(numbers) <= len(TEXTS)


@pytest.mark.parametrize("given, words", [("0", "1 to 67"), ("68", "1 to 67"), ("", "or --random"),
                                          ("the bias moves the rong way", "did you mean 32, 'the bias moves the wrong way'")])
def test_an_unknown_bug_names_the_nearest(given, words):
    with refused(words):
        bug.which(BugConfig(bug=given))


def test_the_table_has_a_row_for_every_mistake_and_its_verdicts(tmp_path):
    def run(val=3.0, **more):
        return Run(**dict(ce=[val], mtp=[2.0], max_vio=[0.5], val=val, val_mtp=2.0, drift=1e-6) | more)

    runs = {job: run(3.0 + 0.01 * job[2]) for job in bug.jobs()}
    assert len(runs) == 3 * (67 + len({json.dumps(each.changes) for each in MISTAKES.values()}))
    for job, each in list(runs.items()):
        number = 1 + TEXTS.index(job[0]) if job[0] else 0
        if number == 1:
            runs[job] = run(each.val + 0.1)
        if number == 2:
            runs[job] = run(each.val + 0.001)
        if number == 3:
            runs[job] = run(each.val, drift=0.2)
        if number == 4:
            runs[job] = Run(error="ValueError in step 2: no")
    text = bug.table(runs)
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    assert [row[1] for row in rows] == TEXTS
    assert [row[-1].strip(" |") for row in rows[:5]] == [
        "loss", "nothing", "sampling", "it stops: ValueError in step 2", "nothing: the same bit for bit"]
    assert rows[0][2:4] == ["+0.100", "10.0"]
    path = tmp_path / "table.jsonl"
    path.write_text("".join(json.dumps({"job": job, "run": asdict(each)}) + "\n" for job, each in runs.items()) + '{"jo')
    assert len(bug.read_runs(path)) == len(runs) and bug.table(bug.read_runs(path)) == text


def test_the_book_has_the_table_of_these_mistakes_and_all_say_what_they_come_to():
    text = (ROOT / "tests" / "claims" / "mistakes.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    assert [row[1] for row in rows] == TEXTS
    seen = [row[-1] for row in rows]
    loss, nothing = sum("loss" in each for each in seen), sum(each.startswith("nothing") for each in seen)
    stops = sum(each.startswith("it stops") for each in seen)
    assert (f"Of {len(rows)} mistakes {loss} show in the loss, {stops} stop the run, {len(rows) - loss - nothing - stops} show "
            f"elsewhere only, {nothing} do not show at all.") in text
    assert (f"Of the {len(rows)} known mistakes {nothing} show in no curve of a short run, {loss} in its loss"
            in (ROOT / "README.md").read_text(encoding="utf-8"))

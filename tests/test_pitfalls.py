"""The checks of checks.py on the model as it is, and known mistakes, put in on purpose, that must turn them red.

The mistakes are those of public reimplementations; `python -m pytest -v tests/test_pitfalls.py` prints the list."""

import pytest

from tests.mistakes import MISTAKES

CHECKS = dict.fromkeys(notices for broken in MISTAKES.values() for notices in broken.noticed_by)


@pytest.mark.parametrize("notices", CHECKS, ids=lambda notices: notices.__name__)
def test_check_is_green_without_a_mistake(notices, tmp_path):
    """The very calls that the mistakes turn red."""
    notices(tmp_path)


@pytest.mark.parametrize("text", MISTAKES)
def test_mistake_is_noticed(text, monkeypatch, tmp_path):
    broken = MISTAKES[text]
    broken.put_in(monkeypatch)
    for i, notices in enumerate(broken.noticed_by):
        (tmp_path / str(i)).mkdir()
        with pytest.raises(AssertionError):
            notices(tmp_path / str(i))

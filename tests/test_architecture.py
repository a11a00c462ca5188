"""The picture of the architecture: each name on it exists, and what it says of the cache is what the portrait counts."""

import re
from pkgutil import resolve_name

from tests import architecture
from tests.conftest import refused


def test_every_name_on_the_picture_exists(tmp_path):
    d = architecture.diagram()
    text = "\n".join("\n".join([box.title, *box.lines]) for box in d.boxes)
    code = set(re.findall(r"[A-Za-z]+(?:_[A-Za-z]+)+|\b[A-Z]\w+\.\w+|kernels\.\w+", re.sub(r"\$[^$]*\$", "", text)))
    known = {part for name in d.names for part in (name, name.rpartition(".")[2])}
    assert len(code) > 20 and code <= known | {"FFN_shared"}, code - known
    for name in d.names:
        is_function = name[0].isupper() or name.startswith("kernels.") or name == "balance_loss"
        if is_function:
            resolve_name(name if name.startswith("kernels.") else f"model.{name}")
    assert {"Attention.absorbed", "Router.choose", "MTP.forward", "mlp.gate.e_score_correction_bias"} <= set(d.names)


def test_a_name_that_is_not_there_is_refused():
    d = architecture.diagram()
    with refused("no mlp.gates"):
        d.box(0, 0, 1, 1, "mlp.gates")
    with refused("no function Router.chose"):
        d.box(0, 0, 1, 1, "mlp.gate", "Router.chose")


def test_the_cache_is_blue_and_the_bias_orange_and_it_is_drawn(tmp_path):
    kinds = {box.title: box for box in architecture.diagram().boxes if box.kind in ("cached", "bias") and box.title}
    assert set(kinds) == {"THE CACHE", "THE BIAS"}
    assert "576 numbers" in "".join(kinds["THE CACHE"].lines) and "32,768" in "".join(kinds["THE CACHE"].lines)
    architecture.main([str(tmp_path / "a.png")])
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert architecture.PICTURE.read_bytes()[:4] == b"\x89PNG"


"""A diagram in the house style: boxes with names, arrows between them; what they say comes from the caller."""

from dataclasses import dataclass
from pathlib import Path

from data.io.plot import COLORS, picture

KINDS = {  # (face, edge, text)
    "plain": ("#ffffff", "#9a9a9a", "#222222"),
    "small": ("#f4f4f4", "#c4c4c4", "#444444"),
    "cached": (COLORS[0], "#1d4f8a", "#ffffff"),
    "bias": (COLORS[1], "#a84413", "#ffffff"),
}
UNIT, LINE, HEADING = 0.1, 1.95, 5  # inches; height of a line in a box, and of the title, in units


@dataclass(frozen=True)
class Box:
    """A rectangle around (x, y) with a bold title and smaller lines below it; names of code in typewriter."""

    x: float
    y: float
    width: float
    height: float
    title: str
    lines: tuple[str, ...] = ()
    kind: str = "plain"


@dataclass(frozen=True)
class Arrow:
    """From one point to the next and so on, its head at the end; what stands beside it."""

    points: tuple[tuple[float, float], ...]
    text: str = ""
    at: tuple[float, float] = (0.0, 0.0)
    kind: str = "plain"  # "bypass" is dashed
    has_head: bool = True


@dataclass(frozen=True)
class Panel:
    """A grey field with a heading in its upper left corner."""

    x: float
    y: float
    width: float
    height: float
    title: str


def draw(path: str | Path, title: str, size: tuple[float, float], panels: list[Panel], boxes: list[Box],
         arrows: list[Arrow]) -> None:
    """Write the diagram as PNG; places are in units of a tenth of an inch from the lower left. Raises UserError."""
    from matplotlib.patches import FancyBboxPatch

    with picture(path, title, (size[0] * UNIT, size[1] * UNIT)) as figure:
        axis = figure.subplots()
        axis.set(xlim=(0, size[0]), ylim=(0, size[1] - HEADING))
        axis.set_axis_off()
        for panel in panels:
            axis.add_patch(FancyBboxPatch((panel.x, panel.y), panel.width, panel.height, facecolor="#f7f7f5",
                                          edgecolor="#e0e0e0", boxstyle="round,pad=0,rounding_size=1"))
            axis.text(panel.x + 1.2, panel.y + panel.height - 2.6, panel.title, fontsize=12, fontweight="bold",
                      color="#333333")
        for arrow in arrows:
            _draw_arrow(axis, arrow)
        for box in boxes:
            _draw_box(axis, box)


def _draw_box(axis, box: Box) -> None:
    from matplotlib.patches import FancyBboxPatch

    face, edge, color = KINDS[box.kind]
    corner = (box.x - box.width / 2, box.y - box.height / 2)
    axis.add_patch(FancyBboxPatch(corner, box.width, box.height, facecolor=face, edgecolor=edge, linewidth=1.1,
                                  boxstyle="round,pad=0,rounding_size=0.7", zorder=3))
    rows = [(line, 10.5, "bold") for line in box.title.split("\n")] + [(line, 9.2, "normal") for line in box.lines]
    top = box.y + LINE / 2 * (len(rows) - 1)
    for i, (text, points, weight) in enumerate(rows):
        axis.text(box.x, top - LINE * i, text, ha="center", va="center", fontsize=points, fontweight=weight,
                  color=color, zorder=4)


def _draw_arrow(axis, arrow: Arrow) -> None:
    color, line = {"plain": ("#666666", "-"), "bypass": ("#666666", (0, (3, 2))), "cached": (COLORS[0], (0, (3, 2))),
                   "bias": (COLORS[1], "-")}[arrow.kind]
    xs, ys = zip(*arrow.points)
    axis.plot(xs, ys, color=color, linestyle=line, linewidth=1.4, zorder=2, solid_capstyle="round")
    if arrow.has_head:
        (x0, y0), (x1, y1) = arrow.points[-2:]
        length = max(abs(x1 - x0), abs(y1 - y0), 1e-6)
        start = (x1 - (x1 - x0) / length, y1 - (y1 - y0) / length)
        head = {"arrowstyle": "-|>", "color": color, "shrinkA": 0, "shrinkB": 0}
        axis.annotate("", (x1, y1), start, arrowprops=head, zorder=2)
    if arrow.text:
        axis.text(*arrow.at, arrow.text, fontsize=10, color=color, va="center", zorder=4, linespacing=1.25)

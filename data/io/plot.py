"""Pictures of a run in one house style: numbers in, PNG out; only here is matplotlib loaded.

    python -m data.io.plot out/bf16 out/fp8     compare.png: each run beside the first of its seed
"""

import csv
import json
import math
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from data.io.checkpoint import written_aside
from data.io.cli import UserError, run_main

COLORS = ("#2f6db5", "#d9622b", "#3c9d6e", "#8a5fb5", "#c2456b", "#b8912b", "#4aa3b8", "#6b6b6b")
COOL_TO_WARM = ("#2f6db5", "#a9c6e4", "#f7f5f0", "#f0b48f", "#c9501b")  # below, at, above even
GREY = "#999999"
STYLE = {
    "font.size": 12, "axes.titlesize": 12, "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#888888",
    "axes.labelcolor": "#333333", "axes.titlecolor": "#555555", "text.color": "#222222",
    "xtick.color": "#555555", "ytick.color": "#555555", "lines.linewidth": 2.2,
    "grid.color": "#e6e6e6", "grid.linewidth": 0.8, "legend.frameon": False, "legend.fontsize": 10,
}
QUARTERS = (0, 0.25, 0.5, 0.75, 1)
HEAD_ROOM = 1.3  # height of a panel whose legend stands above its curves, in heights of the curves
MOST_LAYERS = 6  # a picture shows at most so many, evenly chosen


@contextmanager
def picture(path: str | Path, title: str, size: tuple[float, float]):
    """A figure in the house style, written as PNG when the block ends: whole, or as it was before.

    Raises UserError when it cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=15, fontweight="bold")
        yield figure
        with written_aside(path) as aside:
            figure.savefig(aside, format="png", dpi=120)


def label_ends(axis, ends: list[tuple[float, str, str]], gap: float = 0.055) -> None:
    """Write (y, text, color) to the right of the lines' ends, `gap` of the height apart or more."""
    low, high = axis.get_ylim()
    last = -1.0
    for y, text, color in sorted(ends):
        last = max((y - low) / (high - low), last + gap)
        axis.text(1.015, last, text, color=color, va="center", transform=axis.transAxes)


def load_colors() -> dict:
    """Colours of a load relative to the even one: blue below, white at, orange above."""
    from matplotlib.colors import LinearSegmentedColormap

    return {"cmap": LinearSegmentedColormap.from_list("load", COOL_TO_WARM), "vmin": 0, "vmax": 2}


def load_bar(figure, image, axes, words: tuple[str, str, str]) -> None:
    """The key of `load_colors`, in words."""
    bar = figure.colorbar(image, ax=axes, extend="max", ticks=[0, 1, 2], pad=0.015, aspect=30)
    bar.ax.set_yticklabels(words)
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)


def shown_layers(count: int) -> list[int]:
    """Indices of the layers that a picture has room for."""
    most = min(count, MOST_LAYERS)
    return [round(i * (count - 1) / max(1, most - 1)) for i in range(most)]


def layer_names(paths: list[str], layers: float = math.inf) -> list[str]:
    """Short names of MoE layers: "model.layers.3.mlp" -> "layer 3"; from `layers` on "MTP 1".

    >>> layer_names(["model.layers.3.mlp", "model.layers.4.mlp"], 4)
    ['layer 3', 'MTP 1']
    """
    numbers = [int(path.split(".")[2]) for path in paths]
    return [f"layer {n}" if n < layers else f"MTP {n - layers + 1}" for n in numbers]


def loss_figure(path: str | Path, rows: list[dict], uniform: float,
                title: str = "Learning: loss of every kind of text") -> None:
    """loss.png: loss of every domain on validation text and, dashed, on training text.

    rows of log.csv with columns tokens, val_<domain>, train_<domain>, val_mtp; uniform = ln V.
    """
    rows = [row for row in rows if row.get("val_mtp")]
    x = [float(row["tokens"]) / 1e6 for row in rows]
    domains = [key[4:] for key in rows[0] if key.startswith("val_") and key != "val_mtp"]
    with picture(path, title, (9, 5.2)) as figure:
        axis, ends = figure.subplots(), []
        for domain, color in zip([*domains, "mtp"], [*COLORS[: len(domains)], GREY]):
            y = [float(row["val_" + domain]) for row in rows]
            axis.plot(x, y, color=color, linewidth=1.4 if domain == "mtp" else None)
            name = "second next token (MTP)" if domain == "mtp" else domain
            ends.append((y[-1], f"{y[-1]:.2f}  {name}", color))
            if "train_" + domain in rows[0]:
                y = [float(row["train_" + domain]) for row in rows]
                axis.plot(x, y, "--", color=color, linewidth=1.2)
        axis.axhline(uniform, color=GREY, linewidth=1, linestyle=":")
        axis.set(xlabel="million tokens seen", ylabel="nats per token")
        axis.set(xlim=(0, x[-1] or 1), ylim=(0, uniform * 1.04))
        axis.set_title("solid: validation text, dashed: training text, "
                       f"dotted: guessing, ln V = {uniform:.2f}")
        axis.grid(axis="y")
        label_ends(axis, ends)


def expert_load_figure(path: str | Path, loads: Tensor, x: list[float], names: list[str],
                       xlabel: str) -> None:
    """expert_load.png: load of every expert over time, by layer, and MaxVio (LF section 3) below.

    loads (n, MoE layers, E), routed tokens of n steps; x (n,), their place on the axis.
    """
    shown, E = shown_layers(len(names)), loads.shape[-1]
    relative = loads / loads.mean(-1, keepdim=True).clamp(min=1e-9)  # (n, layers, E), 1 = even
    right = x[-1] if x[-1] > x[0] else x[0] + 1
    with picture(path, "Balance: load of every expert", (9, 2.4 + 1.4 * len(shown))) as figure:
        heights = [1] * len(shown) + [1.3]
        axes = figure.subplots(len(shown) + 1, 1, sharex=True, height_ratios=heights)
        for axis, layer in zip(axes, shown):
            image = axis.imshow(relative[:, layer].T.numpy(), aspect="auto", origin="lower",
                                extent=(x[0], right, -0.5, E - 0.5), interpolation="nearest",
                                **load_colors())
            axis.set_ylabel(f"{names[layer]}\nexpert")
            axis.set_yticks([0, E - 1])
            axis.spines[:].set_visible(False)
        load_bar(figure, image, axes[:-1], ("idle", "even", "twice\nits share"))
        for layer, color in zip(shown, COLORS):
            violation = relative[:, layer].amax(-1) - 1  # (n,)
            axes[-1].plot(x, violation, color=color, linewidth=1.3, label=names[layer])
        top = HEAD_ROOM * (float(relative[:, shown].amax()) - 1)
        axes[-1].set(xlabel=xlabel, ylabel="MaxVio", xlim=(x[0], right), ylim=(0, top or 1))
        axes[-1].set_title("how far the fullest expert is above its share: 0 is perfect",
                           fontsize=11)
        axes[-1].legend(ncols=len(shown), loc="upper right")
        axes[-1].grid(axis="y")


def expert_domains_figure(path: str | Path, usage: dict[str, Tensor], names: list[str]) -> None:
    """expert_domains.png: which experts each domain uses.

    usage[domain] (MoE layers, E), routed tokens.
    """
    counts = torch.stack(list(usage.values()), dim=1)  # (layers, domains, E)
    share = counts / counts.mean(-1, keepdim=True).clamp(min=1e-9)  # 1 = of an even router
    shown, E = shown_layers(len(share)), share.shape[-1]
    size = (9, 1.4 + len(shown) * (0.75 + 0.3 * len(usage)))
    with picture(path, "Specialists: which experts read which text", size) as figure:
        axes = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
        for axis, layer in zip(axes, shown):
            best, domain = share[layer].max(0)  # (E,) the domain that uses the expert most
            order = sorted(range(E), key=lambda e: (int(domain[e]), -float(best[e])))
            image = axis.imshow(share[layer][:, order].numpy(), aspect="auto", **load_colors())
            axis.set_yticks(range(len(usage)), list(usage))
            labels = [str(e) for e in order] if E <= 32 else [""] * E
            axis.set_xticks(range(E), labels, fontsize=9)
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)
            axis.set_title(names[layer])
        axes[-1].set_xlabel("expert, sorted by the kind of text that uses it most")
        load_bar(figure, image, axes, ("never", "even", "twice\nas often"))


def expert_touch_figure(path: str | Path, counts: Tensor) -> None:
    """Which routed experts a conversation asked for, counts (layers, E): dark ones often, white ones never."""
    share = (counts > 0).double().mean()
    with picture(path, f"Experts that this conversation met: {share:.0%}", (10, 1.5 + 0.12 * len(counts))) as figure:
        axis = figure.subplots()
        image = axis.imshow(counts.clamp(min=0).double().log1p(), aspect="auto", cmap="Blues", interpolation="nearest")
        axis.set(xlabel="expert", ylabel="layer with experts", title="how often it was chosen")
        highest = int(counts.max())
        marks = sorted({0, 1, highest, round(highest**0.5)} & set(range(highest + 1)))
        bar = figure.colorbar(image, ax=axis, ticks=[math.log1p(mark) for mark in marks], fraction=0.03)
        bar.ax.set_yticklabels([str(mark) for mark in marks])
        bar.outline.set_visible(False)


def rl_figure(path: str | Path, rows: list[dict], styles: list[str]) -> None:
    """rl.png: reward, length of thought, styles, KL and entropy, dead groups, balance; over steps."""
    def column(name: str) -> list[float]:
        return [float(row[name] or "nan") for row in rows]

    steps = column("step")
    with picture(path, "Reinforcement learning", (13, 7)) as figure:
        rewards, lengths, habits, nats, lost, balance = figure.subplots(2, 3).flatten()
        for name, color in zip(("accuracy", "format", "reward"), COLORS):
            rewards.plot(steps, column(name), color=color, label=name)
        held_out = zip(steps, column("eval_accuracy"), column("eval_error"))
        held_out = [point for point in held_out if point[1] == point[1]]  # not nan
        if held_out:
            x, y, error = zip(*held_out)
            rewards.errorbar(x, y, error, fmt="o", color=COLORS[0], markersize=4,
                             label="accuracy, held out")
        rewards.set(title="accuracy, format, reward", ylim=(0, 1.1 * HEAD_ROOM), yticks=QUARTERS)
        rewards.legend(loc="upper right", ncols=2)

        quartiles = column("length_q1"), column("length_q3")
        lengths.fill_between(steps, *quartiles, color="#a9c6e4", linewidth=0)
        lengths.plot(steps, column("length"), color=COLORS[0])
        lengths.set(title="answer length in tokens, quartiles", ylim=(0, None))

        shares = {name: column("style_" + name) for name in styles}
        shares = {name: share for name, share in shares.items() if max(share) > 0}
        habits.stackplot(steps, list(shares.values()), labels=list(shares), colors=COLORS)
        habits.set(title="how it answers", ylim=(0, HEAD_ROOM), yticks=QUARTERS)
        habits.legend(loc="upper right", ncols=2)

        entropy, kl = column("entropy"), column("kl")
        nats.plot(steps, entropy, color=COLORS[3], label="entropy per token")
        nats.plot(steps, kl, color=COLORS[1], label="KL to the reference, per token")
        top = HEAD_ROOM * max((y for y in entropy + kl if y == y), default=0)
        nats.set(title="entropy and KL in nats", ylim=(0, top or 1))
        nats.legend(loc="upper right")

        lost.plot(steps, column("dead"), color=COLORS[7], label="dead groups")
        lost.plot(steps, column("truncated"), color=COLORS[4], label="cut off answers")
        lost.set(title="groups that teach nothing, answers cut off", ylim=(0, HEAD_ROOM), yticks=QUARTERS)
        lost.legend(loc="upper right")

        balance.plot(steps, column("max_vio"), color=COLORS[2])
        balance.set(title="balance of the experts: MaxVio", ylim=(0, None))
        for axis in figure.axes:
            axis.set_xlim(0, steps[-1])
            axis.grid(axis="y")
        for axis in (nats, lost, balance):
            axis.set_xlabel("step")


def draw_training(folder: Path, rows: list[dict], vocab_size: int, loads: list[Tensor],
                  x: list[float], usage: dict[str, Tensor], names: list[str]) -> None:
    """The pictures of a pretraining run: loss.png, expert_load.png, expert_domains.png.

    rows of log.csv; loads (MoE layers, E) at each x; usage of each domain; names of the layers.
    Without an evaluation, and for a model without experts, there is less to draw.
    """
    if usage:
        loss_figure(folder / "loss.png", rows, math.log(vocab_size))
    if usage and loads:
        expert_load_figure(folder / "expert_load.png", torch.stack(loads), x[: len(loads)], names,
                           "million tokens seen")
        if all(len(used) for used in usage.values()):  # layers of the main model, MTP's apart
            expert_domains_figure(folder / "expert_domains.png", usage, names)


def story_figure(path: str | Path, rows: list[dict]) -> None:
    """story.png: the share of right answers and the length of thought, over the steps of a run."""
    def column(name: str) -> list[float]:
        return [float(row[name] or "nan") for row in rows]

    steps = column("step")
    with picture(path, "Rewarded for right answers only, it learns to think", (11, 4.2)) as figure:
        right, thought = figure.subplots(1, 2)
        right.plot(steps, column("accuracy"), color=COLORS[0], linewidth=2.5)
        right.set(title="share of right answers", xlabel="step", ylim=(0, 1.05), yticks=QUARTERS)
        thought.plot(steps, column("length"), color=COLORS[1], linewidth=2.5)
        thought.set(title="length of an answer in tokens", xlabel="step", ylim=(0, None))
        for axis in (right, thought):
            axis.grid(axis="y")


def draw_rl(folder: Path, rows: list[dict], styles: list[str], loads: list[Tensor],
            paths: list[str]) -> None:
    """The pictures of a run of RL: story.png, rl.png and expert_load.png.

    rows of log.csv; loads (MoE layers, E) of every update; paths of the layers, MTP's last.
    """
    story_figure(folder / "story.png", rows)
    rl_figure(folder / "rl.png", rows, styles)
    if loads and len(loads[0]):
        x, names = list(range(1, len(loads) + 1)), layer_names(paths[: len(loads[0])])
        expert_load_figure(folder / "expert_load.png", torch.stack(loads), x, names, "update")


def compare_figure(path: str | Path, runs: dict[str, Tensor], pairs: list[tuple[str, str]],
                   window: int = 50) -> None:
    """compare.png: training loss of every run, and the relative difference of pairs, smoothed.

    runs: name -> loss of every step, (steps,); pairs: (name, baseline). Both means of a difference
    are over the same `window` steps.
    """
    means = {name: losses.unfold(0, min(window, len(losses)), 1).mean(-1)  # (steps - window + 1,)
             for name, losses in runs.items()}
    with picture(path, "Runs side by side", (12, 4.8)) as figure:
        (left, right), ends = figure.subplots(1, 2), []
        for (name, baseline), color in zip(pairs, cycle(COLORS)):
            one, two = means[name], means[baseline]
            difference = 100 * (one[: len(two)] / two[: len(one)] - 1)  # in %
            left.plot(two, color=GREY, linewidth=1.4)
            left.plot(one, color=color, linewidth=1.4)
            right.plot(difference, color=color)
            ends.append((float(difference[-1]), name, color))
        right.axhline(0, color=GREY, linewidth=1)
        left.set(title=f"loss in nats per token, mean of {window} steps", xlabel="step")
        right.set(title="difference to the first run of its seed (grey), in %", xlabel="step")
        for axis in (left, right):
            axis.grid(axis="y")
        label_ends(right, ends)


def read_run(path: str) -> tuple[int, Tensor]:
    """Seed and training loss of every step, (steps,). Raises UserError when there are none."""
    try:
        knobs = json.loads(Path(path, "train.json").read_text(encoding="utf-8"))
        rows = csv.DictReader(Path(path, "log.csv").read_text(encoding="utf-8").splitlines())
        seed, losses = knobs["seed"], [float(row["ce"]) for row in rows if row["ce"]]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path}: no run that can be read ({error})") from None
    if not losses:
        raise UserError(f"{path}: its log holds no step yet")
    return seed, torch.tensor(losses)


def main(argv: list[str]) -> None:
    """Draw compare.png beside the first run; print differences, of all steps and the last fifth."""
    runs, first, pairs = {}, {}, []
    for name in argv:
        seed, runs[name] = read_run(name)
        if first.setdefault(seed, name) != name:
            pairs.append((name, first[seed]))
    if not pairs:
        raise UserError("got no two runs of one seed, wanted: python -m data.io.plot out/one out/two")
    for name, baseline in pairs:
        steps = min(len(runs[name]), len(runs[baseline]))
        one, two = runs[name][:steps], runs[baseline][:steps]
        whole, end = (100 * float(one[part:].mean() / two[part:].mean() - 1)
                      for part in (0, steps * 4 // 5))
        print(f"{name} against {baseline}: {whole:+.2f} % over all steps, "
              f"{end:+.2f} % over the last fifth")
    path = Path(argv[0]).parent / "compare.png"
    compare_figure(path, runs, pairs)
    print(path)


if __name__ == "__main__":
    run_main(main)

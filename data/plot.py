"""Pictures of a run in one house style. They take numbers and write a PNG; only here is matplotlib loaded.

    python -m data.plot out/bf16 out/fp8     compare.png: each run beside the first one of its seed
"""

import csv
import json
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from data import UserError, run_main, whole_file

COLORS = ("#2f6db5", "#d9622b", "#3c9d6e", "#8a5fb5", "#c2456b", "#b8912b", "#4aa3b8", "#6b6b6b")
COOL_TO_WARM = ("#2f6db5", "#a9c6e4", "#f7f5f0", "#f0b48f", "#c9501b")  # below, at, above the even load
STYLE = {"font.size": 12, "axes.titlesize": 12, "axes.titlelocation": "left", "axes.spines.top": False,
         "axes.spines.right": False, "axes.edgecolor": "#888888", "axes.labelcolor": "#333333",
         "axes.titlecolor": "#555555", "text.color": "#222222", "xtick.color": "#555555",
         "ytick.color": "#555555", "lines.linewidth": 2.2, "grid.color": "#e6e6e6", "grid.linewidth": 0.8,
         "legend.frameon": False, "legend.fontsize": 10}
MOST_LAYERS = 6  # a picture shows at most so many, evenly chosen


@contextmanager
def picture(path: str | Path, title: str, size: tuple[float, float]):
    """A figure in the house style, written as PNG when the block ends: the old picture or the new one.

    Raises UserError when it cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=15, fontweight="bold")
        yield figure
        try:
            with whole_file(path) as file:
                figure.savefig(file, format="png", dpi=120)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error}") from None


def label_ends(axis, ends: list[tuple[float, str, str]], gap: float = 0.055) -> None:
    """Write (y, text, color) to the right of the lines' ends, at least `gap` of the height apart."""
    low, high = axis.get_ylim()
    last = -1.0
    for y, text, color in sorted(ends):
        last = max((y - low) / (high - low), last + gap)
        axis.text(1.015, last, text, color=color, va="center", transform=axis.transAxes)


def load_colors():
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


def loss_figure(path: str | Path, rows: list[dict], uniform: float) -> None:
    """loss.png: loss of every domain on validation text and, dashed, on training text.

    rows of log.csv with columns tokens, val_<domain>, train_<domain>, val_mtp; uniform = ln V.
    """
    rows = [row for row in rows if row.get("val_mtp")]
    x = [float(row["tokens"]) / 1e6 for row in rows]
    domains = [key[4:] for key in rows[0] if key.startswith("val_") and key != "val_mtp"]
    with picture(path, "Learning: loss of every kind of text", (9, 5.2)) as figure:
        axis, ends = figure.subplots(), []
        for domain, color in zip([*domains, "mtp"], [*COLORS[: len(domains)], "#999999"]):
            y = [float(row["val_" + domain]) for row in rows]
            axis.plot(x, y, color=color, linewidth=1.4 if domain == "mtp" else None)
            name = "second next token (MTP)" if domain == "mtp" else domain
            ends.append((y[-1], f"{y[-1]:.2f}  {name}", color))
            if "train_" + domain in rows[0]:
                y = [float(row["train_" + domain]) for row in rows]
                axis.plot(x, y, "--", color=color, linewidth=1.2)
        axis.axhline(uniform, color="#999999", linewidth=1, linestyle=":")
        axis.set(xlabel="million tokens seen", ylabel="nats per token")
        axis.set(xlim=(0, x[-1] or 1), ylim=(0, uniform * 1.04))
        axis.set_title(f"solid: validation text, dashed: training text, dotted: guessing, ln V = {uniform:.2f}")
        axis.grid(axis="y")
        label_ends(axis, ends)


def expert_load_figure(path: str | Path, loads: Tensor, x: list[float], names: list[str], xlabel: str):
    """expert_load.png: load of every expert over time, layer by layer, and MaxVio (LF section 3) below.

    loads (n, MoE layers, E), routed tokens of n steps; x (n,), their place on the axis.
    """
    shown, E = shown_layers(len(names)), loads.shape[-1]
    relative = loads / loads.mean(-1, keepdim=True).clamp(min=1e-9)  # (n, layers, E), 1 = even
    right = x[-1] if x[-1] > x[0] else x[0] + 1
    with picture(path, "Balance: load of every expert", (9, 2.4 + 1.4 * len(shown))) as figure:
        axes = figure.subplots(len(shown) + 1, 1, sharex=True, height_ratios=[1] * len(shown) + [1.3])
        for axis, layer in zip(axes, shown):
            image = axis.imshow(relative[:, layer].T.numpy(), aspect="auto", origin="lower",
                                extent=(x[0], right, -0.5, E - 0.5), interpolation="nearest", **load_colors())
            axis.set_ylabel(f"{names[layer]}\nexpert")
            axis.set_yticks([0, E - 1])
            axis.spines[:].set_visible(False)
        load_bar(figure, image, axes[:-1], ("idle", "even", "twice\nits share"))
        for layer, color in zip(shown, COLORS):
            axes[-1].plot(x, relative[:, layer].amax(-1) - 1, color=color, linewidth=1.3, label=names[layer])
        top = 1.3 * float(relative[:, shown].amax()) - 1.3  # room for the legend
        axes[-1].set(xlabel=xlabel, ylabel="MaxVio", xlim=(x[0], right), ylim=(0, top or 1))
        axes[-1].set_title("how far the fullest expert is above its share: 0 is perfect", fontsize=11)
        axes[-1].legend(ncols=len(shown), loc="upper right")
        axes[-1].grid(axis="y")


def expert_domains_figure(path: str | Path, usage: dict[str, Tensor], names: list[str]) -> None:
    """expert_domains.png: which experts each domain uses. usage[domain] (MoE layers, E), routed tokens."""
    counts = torch.stack(list(usage.values()), dim=1)  # (layers, domains, E)
    share = counts / counts.mean(-1, keepdim=True).clamp(min=1e-9)  # 1 = what an even router would give
    shown, E = shown_layers(len(share)), share.shape[-1]
    size = (9, 1.4 + len(shown) * (0.75 + 0.3 * len(usage)))
    with picture(path, "Specialists: which experts read which text", size) as figure:
        axes = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
        for axis, layer in zip(axes, shown):
            favourite = share[layer].argmax(0)  # (E,) the domain that uses the expert most
            order = sorted(range(E), key=lambda e: (int(favourite[e]), -float(share[layer, favourite[e], e])))
            image = axis.imshow(share[layer][:, order].numpy(), aspect="auto", **load_colors())
            axis.set_yticks(range(len(usage)), list(usage))
            axis.set_xticks(range(E), [str(e) for e in order] if E <= 32 else [""] * E, fontsize=9)
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)
            axis.set_title(names[layer])
        axes[-1].set_xlabel("expert, sorted by the kind of text that uses it most")
        load_bar(figure, image, axes, ("never", "even", "twice\nas often"))


def rl_figure(path: Path, rows: list[dict], styles: list[str]) -> None:
    """rl.png: reward, length of thought, styles, KL and entropy, dead groups, balance; all over steps."""
    def column(name: str) -> list[float]:
        return [float(row[name] or "nan") for row in rows]

    steps = column("step")
    with picture(path, "Reinforcement learning", (13, 7)) as figure:
        axes = figure.subplots(2, 3).flatten()
        for name, color in zip(("accuracy", "format", "reward"), COLORS):
            axes[0].plot(steps, column(name), color=color, label=name)
        held_out = [(x, y, e) for x, y, e in zip(steps, column("eval_accuracy"), column("eval_error")) if y == y]
        if held_out:
            x, y, e = zip(*held_out)
            axes[0].errorbar(x, y, e, fmt="o", color=COLORS[0], label="accuracy, held out", markersize=4)
        axes[0].set(title="accuracy, format, reward", ylim=(0, 1.13))
        axes[0].legend(loc="best", frameon=True, facecolor="white", framealpha=0.85, edgecolor="none")
        axes[1].fill_between(steps, column("length_q1"), column("length_q3"), color="#a9c6e4", linewidth=0)
        axes[1].plot(steps, column("length"), color=COLORS[0])
        axes[1].set(title="answer length in tokens, quartiles", ylim=(0, None))
        shares = {name: column("style_" + name) for name in styles}
        shares = {name: share for name, share in shares.items() if max(share) > 0}
        axes[2].stackplot(steps, list(shares.values()), labels=list(shares), colors=COLORS)
        axes[2].set(title="how it answers", ylim=(0, 1))
        axes[2].legend(loc="upper left", frameon=True, facecolor="white", framealpha=0.85, edgecolor="none")
        axes[3].plot(steps, column("entropy"), color=COLORS[3], label="entropy per token")
        axes[3].plot(steps, column("kl"), color=COLORS[1], label="KL to the reference, per token")
        axes[3].set(title="entropy and KL in nats", ylim=(0, None))
        axes[3].legend()
        axes[4].plot(steps, column("dead"), color=COLORS[7], label="dead groups")
        axes[4].plot(steps, column("truncated"), color=COLORS[4], label="cut off answers")
        axes[4].set(title="groups that teach nothing, answers cut off", ylim=(0, 1.02))
        axes[4].legend()
        axes[5].plot(steps, column("max_vio"), color=COLORS[2])
        axes[5].set(title="balance of the experts: MaxVio", ylim=(0, None))
        for axis in axes:
            axis.set_xlim(0, steps[-1])
            axis.grid(axis="y")
        for axis in axes[3:]:
            axis.set_xlabel("step")


def thinking_figure(path: Path, found: dict[str, dict]) -> None:
    """thinking.png: accuracy bought at test time, with a budget of thought and with votes.

    found: name of the model -> its full evaluation.
    """
    with picture(path, "Test-time compute: accuracy on held-out questions", (11, 4.6)) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        for (name, values), color in zip(found.items(), COLORS[1::-1]):
            for axis, key, label, line in ((left, "budget", name, "-"), (right, "majority", f"{name}: majority", "-"),
                                           (right, "pass", f"{name}: any right", "--")):
                x = [int(k) for k in values[key]]
                y, error = zip(*values[key].values())
                axis.errorbar(range(len(x)) if axis is left else x, y, error, color=color, label=label,
                              linestyle=line, marker="o", markersize=4, elinewidth=1)
                if axis is left:
                    axis.set_xticks(range(len(x)), x)
        left.set(title="thought cut after so many tokens", xlabel="tokens of thought", ylabel="share right",
                 ylim=(0, 1.03))
        right.set(title="so many answers to one question", xlabel="answers", xscale="log")
        right.set_xticks(x, x)
        right.minorticks_off()
        for axis in (left, right):
            axis.legend()
            axis.grid(axis="y")


def quality_figure(path: Path, rows: list[tuple[int, dict, dict]]) -> None:
    """quality.png: accuracy and length of thought after RL against the share of the pretraining run."""
    with picture(path, "Reinforcement learning against base quality", (11, 4.6)) as figure:
        for axis, key, title in zip(figure.subplots(1, 2), ("accuracy", "length"),
                                    ("accuracy on held-out questions", "length of an answer in tokens")):
            x = [share for share, _, _ in rows]
            before, after = ([found[key][0] if key == "accuracy" else found[key] for found in column]
                             for column in list(zip(*rows))[1:])
            axis.plot(x, before, color=COLORS[7], label="base")
            axis.plot(x, after, "o", color=COLORS[0], label="after RL, each seed")
            axis.set(title=title, xlabel="% of the pretraining run", ylim=(0, None))
            axis.legend()
            axis.grid(axis="y")


def compare_figure(path: Path, runs: dict[str, Tensor], pairs: list[tuple[str, str]], window: int = 50) -> None:
    """compare.png: training loss of every run, and the relative difference of pairs (name, baseline), smoothed.

    runs: name -> loss of every step, (steps,). Both means of a difference are over the same `window` steps.
    """
    means = {name: losses.unfold(0, min(window, len(losses)), 1).mean(-1) for name, losses in runs.items()}
    with picture(path, "Runs side by side", (12, 4.8)) as figure:
        (left, right), ends = figure.subplots(1, 2), []
        for (name, baseline), color in zip(pairs, cycle(COLORS)):
            one, two = means[name], means[baseline]
            difference = 100 * (one[: len(two)] / two[: len(one)] - 1)  # in %
            left.plot(two, color="#999999", linewidth=1.4)
            left.plot(one, color=color, linewidth=1.4)
            right.plot(difference, color=color)
            ends.append((float(difference[-1]), name, color))
        right.axhline(0, color="#999999", linewidth=1)
        left.set(title=f"loss in nats per token, mean of {window} steps", xlabel="step")
        right.set(title="difference to the first run of its seed (grey), in %", xlabel="step")
        for axis in (left, right):
            axis.grid(axis="y")
        label_ends(right, ends)


def main(argv: list[str]) -> None:
    """Draw compare.png beside the first run and print the differences, over all steps and over the last fifth."""
    runs, first, pairs = {}, {}, []
    for name in argv:
        try:
            seed = json.loads(Path(name, "train.json").read_text())["seed"]
            rows = csv.DictReader(Path(name, "log.csv").read_text().splitlines())
            runs[name] = torch.tensor([float(row["ce"]) for row in rows if row["ce"]])
        except (OSError, KeyError, ValueError) as error:
            raise UserError(f"{name}: no run that can be read ({error})") from None
        if not len(runs[name]):
            raise UserError(f"{name}: its log holds no step yet")
        if first.setdefault(seed, name) != name:
            pairs.append((name, first[seed]))
    if not pairs:
        raise UserError("got no two runs of one seed, wanted: python -m data.plot out/one out/two")
    for name, baseline in pairs:
        steps = min(len(runs[name]), len(runs[baseline]))
        one, two = runs[name][:steps], runs[baseline][:steps]
        shares = [100 * float(one[part:].mean() / two[part:].mean() - 1) for part in (0, steps * 4 // 5)]
        print(f"{name} against {baseline}: {shares[0]:+.2f} % over all steps, {shares[1]:+.2f} % over the last fifth")
    path = Path(argv[0]).parent / "compare.png"
    compare_figure(path, runs, pairs)
    print(path)


if __name__ == "__main__":
    run_main(main)

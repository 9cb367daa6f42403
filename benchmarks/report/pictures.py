"""Pictures of the stored results, for light and for dark pages."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.comparison.contests import compared, has_rivals
from benchmarks.comparison.pictures import RUNTIME_WORDS, both_themes, draw_experiment
from benchmarks.not_faster import OURS, RIVAL
from benchmarks.tools.records import parser, read_record
from wgates_plugin.report.theme import Theme, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NETWORK_WORDS = {"mobilenet_v2": "MobileNetV2", "resnet34": "ResNet-34", "resnet50": "ResNet-50"}
WORDS = {RIVAL: "torch-pruning, uniform 30 %", OURS: "wgates-plugin, same MACs"}
BAR = 0.42


def draw_not_faster(record: dict[str, Any], theme: Theme) -> Figure:
    """Latency over the untouched network's: a panel per network, a pair of bars per runtime."""
    numbers = record["numbers"]
    figure, axes = new_figure(3.3, columns=len(numbers))
    highest = max(
        facts["ways"][way]["ratio"]
        for by_runtime in numbers.values()
        for facts in by_runtime.values()
        for way in WORDS
    )
    for panel, (network, by_runtime) in zip(axes, numbers.items(), strict=True):
        _draw_network(panel, by_runtime, theme)
        panel.set_title(NETWORK_WORDS.get(network, network))
        panel.set_ylim(0, 1.15 * max(1.0, highest))
    axes[0].set_ylabel("latency over untouched")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels))
    return figure


def _draw_network(panel: Axes, by_runtime: dict[str, Any], theme: Theme) -> None:
    colours = {RIVAL: theme.before, OURS: theme.after}
    panel.axhline(1.0, color=theme.target, linewidth=1.2, linestyle="--", label="untouched network")
    for side, way in zip((-0.5, 0.5), WORDS, strict=True):
        facts = [runtime["ways"][way] for runtime in by_runtime.values()]
        places = [index + side * BAR for index in range(len(facts))]
        panel.bar(
            places,
            [each["ratio"] for each in facts],
            0.92 * BAR,
            color=colours[way],
            label=WORDS[way],
            yerr=[each["ratio_spread"] for each in facts],
            error_kw={"ecolor": theme.faint, "elinewidth": 1.0},
        )
        for place, each in zip(places, facts, strict=True):
            panel.annotate(
                f"{each['ratio']:.2f}",
                (place, each["ratio"] + each["ratio_spread"]),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=7,
                color=theme.text,
            )
    panel.set_xticks(range(len(by_runtime)), [RUNTIME_WORDS.get(each, each) for each in by_runtime])
    panel.tick_params(axis="x", length=0, labelsize=8)
    panel.grid(axis="y")


PICTURES: dict[str, Callable[[dict[str, Any], Theme], Figure]] = {"not_faster": draw_not_faster}


def draw(folder: Path) -> list[Path]:
    """Draw `NAME.svg` and `NAME-dark.svg` of every picture whose results are in `folder`, beside them.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    written = []
    for name, picture in PICTURES.items():
        record = read_record(folder, name)
        if record is None:
            print(f"{name}: no record; run `python -m benchmarks {name}`")
            continue
        written += both_themes(folder / name, functools.partial(picture, record))
    for experiment in compared():
        found = draw_experiment(experiment, folder)
        if not found and has_rivals(experiment):
            print(f"{experiment.name}: no runs; run `python -m benchmarks comparison ...`")
        written += found
    return written


def main(argv: Sequence[str] = ()) -> None:
    arguments = parser("pictures", __doc__, seed=None).parse_args(list(argv))
    for path in draw(arguments.results):
        print(f"wrote {path}")

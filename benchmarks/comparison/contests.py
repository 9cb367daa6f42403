"""The cells in which ours meets rivals, and what can be read over them: shares, margins, differences.

It is about every committed experiment with a `task`. A cell in which the best method does not beat chance
counts for nobody; one of which runs are missing is not won.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.comparison.again import first_draws
from benchmarks.comparison.experiment import FOLDER, Experiment, load_experiment
from benchmarks.comparison.runs import Places
from benchmarks.comparison.summary import CHANCE, Cell, Difference, Row, Verdict, read_cells
from wgates_plugin.recipe.reading import read as read_file

FREE = "free-gates"
"""The ablation that learns one score per channel instead of computing it from the weights."""

UNIFORM = "uniform"
HALF = 0.5

Read = Callable[[Path], float | None]


@functools.cache
def compared(folder: Path = FOLDER) -> tuple[Experiment, ...]:
    """The experiments of the comparison, by name."""
    paths = sorted(folder.glob("*.yaml"))
    return tuple(load_experiment(path) for path in paths if read_file(path).get("task"))


def contests(experiments: Iterable[Experiment], folder: Path, *, first: bool = False) -> list[Cell]:
    """All cells in which ours meets rivals other than chance; with `first`, by what their runs had
    found before some were made again."""
    cells = []
    for experiment in experiments:
        places = Places(experiment, folder, folder)
        for cell in read_cells(experiment, folder):
            if set(cell.contestants) - {cell.ours, CHANCE}:
                cells.append(first_draws(cell, places) if first else cell)
    return cells


def has_rivals(experiment: Experiment) -> bool:
    """Whether ours meets anybody but chance there."""
    return bool(set(experiment.with_role("rival")) - {CHANCE})


def share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None


def share_of(
    experiments: Sequence[Experiment],
    good: Callable[[Verdict], bool],
    *,
    whole: bool = False,
    first: bool = False,
) -> Read:
    """Of all cells but those that count for nobody, those that are complete and `good`.

    With `whole`, of the complete ones alone; `first` as in `contests`.
    """

    def read(folder: Path) -> float | None:
        cells = contests(experiments, folder, first=first)
        if not begun(cells):
            return None
        verdicts = [cell.verdict() for cell in cells]
        return share(
            [
                one.counts and good(one)
                for one in verdicts
                if one.counts or (one is Verdict.INCOMPLETE and not whole)
            ]
        )

    return read


def won_on_other_images(cell: Cell) -> bool:
    """Ours is at least as accurate there as the rival that is best by what judges the cell."""
    margin = cell.margin_on_other_images()
    return margin is not None and margin.mean >= 0 and cell.keeps_target(cell.ours)


def won_over_the_best_there(cell: Cell) -> bool:
    return cell.on_other_images().verdict().won


def share_on_other_images(experiments: Sequence[Experiment], good: Callable[[Cell], bool]) -> Read:
    """Of the complete cells whose runs have all been scored there, and that are decided by it."""

    def read(folder: Path) -> float | None:
        pairs = [(cell, cell.on_other_images()) for cell in contests(experiments, folder)]
        return share([good(cell) for cell, there in pairs if there.verdict().counts])

    return read


def begun(cells: Iterable[Cell]) -> bool:
    return any(row.seeds for cell in cells for row in cell.rows.values())


def complete_share(experiments: Sequence[Experiment]) -> Read:
    def read(folder: Path) -> float | None:
        cells = contests(experiments, folder)
        return share([not cell.missing() for cell in cells]) if begun(cells) else None

    return read


def decided_share(experiments: Sequence[Experiment]) -> Read:
    """Of the complete cells."""

    def read(folder: Path) -> float | None:
        verdicts = [cell.verdict() for cell in contests(experiments, folder)]
        return share([one.counts for one in verdicts if one is not Verdict.INCOMPLETE])

    return read


def final_share(experiments: Sequence[Experiment], good: Callable[[float, float], bool]) -> Read:
    """Share of the runs of complete cells whose (latency, target) in the sitting at the end is `good`.

    A run that was not timed there is not.
    """

    def read(folder: Path) -> float | None:
        found: list[bool] = []
        timed = False
        for cell in contests(experiments, folder):
            for row in _rows_of_complete(cell):
                timed = timed or bool(row.finals)
                found += [good(ratio, cell.target) for ratio in row.finals]
                found += [False] * (len(row.seeds) - len(row.finals))
        return share(found) if timed else None

    return read


def _rows_of_complete(cell: Cell) -> list[Row]:
    """Rows of ours and the rivals; none of a cell that is not complete, which had no sitting yet."""
    return [] if cell.missing() else [cell.rows[method] for method in cell.contestants]


def held_again_share(experiments: Sequence[Experiment]) -> Read:
    """Of the runs that said "held", those that the sitting at the end found so too."""

    def read(folder: Path) -> float | None:
        rows = [row for cell in contests(experiments, folder) for row in _rows_of_complete(cell)]
        return share([still for row in rows for still in row.again])

    return read


def everyone_share(experiments: Sequence[Experiment]) -> Read:
    """Of all cells, the complete ones in which more than the core of the methods runs."""

    def read(folder: Path) -> float | None:
        found, cells = [], []
        for experiment in experiments:
            core = {name for name, method in experiment.methods.items() if method.core}
            for cell in contests([experiment], folder):
                cells.append(cell)
                found.append(not set(cell.rivals_here) <= core and not cell.missing())
        return share(found) if begun(cells) else None

    return read


def margin_over(
    experiments: Sequence[Experiment], rival: str
) -> Callable[[Path], Difference | None]:
    """Ours minus one rival over the cells of `margins`: the mean over tasks of their cells' means.

    Cells of one task share networks and images, so tasks are what its error and interval are over.
    """

    def read(folder: Path) -> Difference | None:
        tasks = []
        for experiment in experiments:
            found = margins(contests([experiment], folder), rival)
            if found:
                tasks.append(sum(found) / len(found))
        return Difference.among(tasks) if tasks else None

    return read


def margins(cells: Iterable[Cell], rival: str) -> list[float]:
    """Points that ours is ahead of a rival, of every complete cell that has both and in which the
    better one is not so by its latency (`Cell.fair`)."""
    whole = [cell for cell in cells if not cell.missing()]
    found = [(cell, cell.between(cell.ours or "", rival)) for cell in whole]
    return [one.mean for cell, one in found if one is not None and cell.fair(rival)]


def always_there(experiments: Sequence[Experiment]) -> list[str]:
    """The rivals that every experiment with rivals has in all of its cells."""
    sets = [
        [name for name in experiment.with_role("rival") if experiment.methods[name].core]
        for experiment in experiments
        if has_rivals(experiment)
    ]
    return [name for name in (sets[0] if sets else []) if all(name in one for one in sets)]


def worst_at_half(
    experiment: Experiment,
    found: Callable[[Cell], Difference | None],
    worst: Callable[[list[float]], float],
) -> Read:
    """Mean of the difference at half of the latency, on the runtime where it is worst for us.

    None until there is one for every runtime.
    """

    def read(folder: Path) -> float | None:
        cells = [c for c in read_cells(experiment, folder) if c.target == HALF]
        values = [difference.mean for c in cells if (difference := found(c)) is not None]
        return worst(values) if values and len(values) == len(cells) else None

    return read


def margin_over_uniform(cell: Cell) -> Difference | None:
    return None if cell.ours is None else cell.between(cell.ours, UNIFORM)


def lost_by_ours(cell: Cell) -> Difference | None:
    return None if cell.ours is None else cell.lost(cell.ours)


def exchanged_by_learning(experiment: Experiment) -> Read:
    """Mean over the runs of ours, as far as they say it."""

    def read(folder: Path) -> float | None:
        cells = read_cells(experiment, folder)
        rows = [cell.rows[cell.ours] for cell in cells if cell.ours in cell.rows]
        shares = [
            facts["units_exchanged_by_learning"] / facts["units_kept"]
            for row in rows
            for facts in row.facts
            if "units_exchanged_by_learning" in facts
        ]
        return sum(shares) / len(shares) if shares else None

    return read


def weights_against_free(experiment: Experiment) -> Callable[[Path], Difference | None]:
    """Ours minus free gates; of several cells, their mean per seed."""

    def read(folder: Path) -> Difference | None:
        pairs = []
        for cell in read_cells(experiment, folder):
            ours, free = (cell.rows.get(name) for name in (cell.ours or "", FREE))
            if free is None:
                continue
            if ours is None or not (ours.complete and free.complete):
                return None
            pairs.append((ours.accuracy, free.accuracy))
        if not pairs:
            return None
        first, second = (
            [sum(by_seed) / len(pairs) for by_seed in zip(*side, strict=True)]
            for side in zip(*pairs, strict=True)
        )
        return Difference.of(first, second)

    return read

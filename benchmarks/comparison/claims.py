"""What is claimed of the comparison: cells won, margins, losses, targets held, the ablation."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.comparison.contests import (
    FREE,
    HALF,
    UNIFORM,
    always_there,
    complete_share,
    decided_share,
    everyone_share,
    exchanged_by_learning,
    final_share,
    held_again_share,
    lost_by_ours,
    margin_over,
    margin_over_uniform,
    share_of,
    share_on_other_images,
    weights_against_free,
    won_on_other_images,
    won_over_the_best_there,
    worst_at_half,
)
from benchmarks.comparison.experiment import Experiment
from benchmarks.comparison.summary import TIGHT, Difference, Verdict
from benchmarks.report.claims import Claim

SOURCE = "results/comparison/"


def _of_task(experiment: Experiment) -> list[Claim]:
    task = experiment.task
    source = f"{SOURCE}{experiment.name}/"
    claims = []
    if UNIFORM in experiment.methods and HALF in experiment.targets:
        claims += [
            Claim(
                f"margin_over_uniform_50/{task}",
                1.0 if experiment.rgb else None,
                "higher",
                f"{source}; points, on the worse of the runtimes",
                worst_at_half(experiment, margin_over_uniform, min),
            ),
            Claim(
                f"accuracy_loss_50/{task}",
                1.0 if experiment.rgb else 0.3,
                "lower",
                f"{source}; points against the untouched network trained on for as many epochs, "
                "on the worse of the runtimes",
                worst_at_half(experiment, lost_by_ours, max),
            ),
            Claim(
                f"units_exchanged_by_learning/{task}",
                None,
                "higher",
                f"{source}; no bar: share of the units kept by ours that its measured start had not kept",
                exchanged_by_learning(experiment),
            ),
        ]
    if FREE in experiment.methods:
        difference = weights_against_free(experiment)

        claims.append(
            Claim(
                "/".join(
                    filter(None, ("weight_dependent_vs_free_gates", task, experiment.variant))
                ),
                None,
                "higher",
                f"{source}; no bar: points, paired over {len(experiment.seeds)} seeds, 95 % interval",
                lambda folder: mean_of(difference(folder)),
                interval=lambda folder: interval_of(difference(folder)),
            )
        )
    return claims


def _over(experiments: Sequence[Experiment], rival: str) -> Claim:
    margin = margin_over(experiments, rival)
    return Claim(
        f"margin_over/{rival}",
        None,
        "higher",
        f"{SOURCE}; no bar: points, mean of the tasks' means over their complete cells at equal latency, "
        "95 % interval over tasks",
        lambda folder: mean_of(margin(folder)),
        interval=lambda folder: interval_of(margin(folder)),
    )


def mean_of(found: Difference | None) -> float | None:
    return None if found is None else found.mean


def interval_of(found: Difference | None) -> tuple[float, float] | None:
    return None if found is None or found.pairs < 2 else found.interval()


def comparison_claims(experiments: Sequence[Experiment]) -> list[Claim]:
    return [
        *_of_wins(experiments),
        *_of_cells(experiments),
        *_of_runs(experiments),
        *(_over(experiments, rival) for rival in always_there(experiments)),
        *(claim for experiment in experiments for claim in _of_task(experiment)),
    ]


def _of_wins(experiments: Sequence[Experiment]) -> list[Claim]:
    return [
        Claim(
            "wgates_wins_share",
            1.0,
            "higher",
            f"{SOURCE}; of all cells (task, target, runtime) but those that count for nobody; an "
            "incomplete one is not won",
            share_of(experiments, lambda one: one.won),
        ),
        Claim(
            "wgates_wins_share_of_complete_cells",
            None,
            "higher",
            f"{SOURCE}; no bar: the same of the complete cells alone",
            share_of(experiments, lambda one: one.won, whole=True),
        ),
        Claim(
            "wgates_wins_share/other_images",
            None,
            "higher",
            f"{SOURCE}; no bar: of the complete cells scored on test images that judge nobody, those in "
            "which ours is at least as accurate on these as the rival that was best on the others",
            share_on_other_images(experiments, won_on_other_images),
        ),
        Claim(
            "wgates_wins_share/other_images_best_rival",
            None,
            "higher",
            f"{SOURCE}; no bar: the same cells, against whoever is best on these images",
            share_on_other_images(experiments, won_over_the_best_there),
        ),
        Claim(
            "wgates_wins_share/untuned",
            None,
            "higher",
            f"{SOURCE}; no bar: the first without the cells of tasks on which ours was tuned",
            share_of([one for one in experiments if not one.tuned_on], lambda one: one.won),
        ),
        Claim(
            "wgates_wins_share/first_draws",
            None,
            "higher",
            f"{SOURCE}; no bar: the first by what runs had found before they were made again",
            share_of(experiments, lambda one: one.won, first=True),
        ),
        Claim(
            "wgates_wins_beyond_one_se_share",
            0.5,
            "higher",
            f"{SOURCE}; of the same cells; error of the differences paired by seed",
            share_of(experiments, lambda one: one is Verdict.WON_BEYOND),
        ),
    ]


def _of_cells(experiments: Sequence[Experiment]) -> list[Claim]:
    return [
        Claim(
            "comparison_cells_complete_share",
            1.0,
            "higher",
            f"{SOURCE}; cells of which no run is missing",
            complete_share(experiments),
        ),
        Claim(
            "comparison_cells_with_everyone_share",
            None,
            "higher",
            f"{SOURCE}; no bar: complete cells in which more than the core of five rivals runs",
            everyone_share(experiments),
        ),
        Claim(
            "comparison_cells_decided_share",
            None,
            "higher",
            f"{SOURCE}; no bar: complete cells that count for one side; the others are out of reach of "
            "all, undecided by chance, or not at equal latency",
            decided_share(experiments),
        ),
    ]


def _of_runs(experiments: Sequence[Experiment]) -> list[Claim]:
    return [
        Claim(
            "target_held_share/comparison",
            1.0,
            "higher",
            f"{SOURCE}; all runs of complete cells but the ablations', timed interleaved at the end",
            final_share(experiments, lambda ratio, target: ratio <= target),
        ),
        Claim(
            "target_held_again_share",
            None,
            "higher",
            f"{SOURCE}; no bar: of those runs that said `held` when they ended, the ones that the last "
            "sitting found at or under their target too",
            held_again_share(experiments),
        ),
        Claim(
            "target_tight_share",
            0.9,
            "higher",
            f"{SOURCE}; the same runs at {TIGHT:.0%} of the target or more",
            final_share(experiments, lambda ratio, target: ratio >= TIGHT * target),
        ),
    ]

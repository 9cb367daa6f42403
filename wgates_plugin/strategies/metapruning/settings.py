"""Options of MetaPruning; the defaults are the paper's where it states one."""

from __future__ import annotations

from dataclasses import dataclass

from wgates_plugin.errors import ConfigError

WEIGHTS = ("scratch", "inherit")


@dataclass(frozen=True)
class MetaPruningSettings:
    """How the PruningNet is built and how widths are searched.

    Attributes:
        hidden: neurons between widths and kernels (paper: 32, and 64 for MobileNetV2).
        largest_table: entries that one layer's second fully connected layer may have; a larger one
            is factored through fewer neurons (ours). None never factors, as in the paper.
        least_share, share_step: shares of channels are least_share, least_share + share_step, ... 1.
        population: candidates of the first generation, and those that later ones are filled up to.
        parents: best candidates so far that the next generation is made from, `population` at most.
        mutations, crossovers: children of a generation by either way.
        mutation_probability: of each gene of a mutated parent.
        generations: generations that are judged, the first one included.
        held_out: share of the training images that candidates are judged on; see `held_out.split`.
        recalibration_images: training images for each candidate's BatchNorm statistics.
        weights: the winner's: "scratch" initialises a network of these widths anew, "inherit" keeps
            the trained network's channels of largest L1 norm (ours).
        workers: processes that judge, through Ray; with 1, this process does.
    """

    hidden: int = 32
    largest_table: int | None = 2**23
    least_share: float = 0.10
    share_step: float = 0.03
    population: int = 50
    parents: int = 10
    mutations: int = 25
    crossovers: int = 25
    mutation_probability: float = 0.1
    generations: int = 20
    held_out: float = 0.04
    recalibration_images: int = 512
    weights: str = "scratch"
    workers: int = 1

    def __post_init__(self) -> None:
        checks = {
            f"{name} is {value}; needs 1 or more": value >= 1
            for name, value in {
                "hidden": self.hidden,
                "population": self.population,
                "parents": self.parents,
                "generations": self.generations,
                "recalibration_images": self.recalibration_images,
                "workers": self.workers,
            }.items()
        }
        checks |= {
            f"largest_table is {self.largest_table}; needs 1 or more, or null for no limit": (
                self.largest_table is None or self.largest_table >= 1
            ),
            f"least_share is {self.least_share}; needs more than 0 and at most 1": (
                0 < self.least_share <= 1
            ),
            f"share_step is {self.share_step}; needs more than 0 and at most 1": (
                0 < self.share_step <= 1
            ),
            f"parents is {self.parents}, population {self.population}; the parents are the best of "
            "the candidates: needs parents up to population": (
                self.population < 1 or self.parents <= self.population
            ),
            f"mutations is {self.mutations}; needs 0 or more": self.mutations >= 0,
            f"crossovers is {self.crossovers}; needs 0 or more": self.crossovers >= 0,
            f"mutation_probability is {self.mutation_probability}; needs more than 0, at most 1": (
                0 < self.mutation_probability <= 1
            ),
            f"held_out is {self.held_out}; needs more than 0 and less than 1": (
                0 < self.held_out < 1
            ),
            f"weights is {self.weights!r}; known: {', '.join(WEIGHTS)}": self.weights in WEIGHTS,
        }
        problems = [problem for problem, passed in checks.items() if not passed]
        if problems:
            raise ConfigError("metapruning", problems)

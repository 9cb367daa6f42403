"""The torch-pruning door: a pruner for torch-pruning's own sparse-training loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from wgates_plugin.calling import ExampleInputs
from wgates_plugin.efficiency.base import Budget
from wgates_plugin.errors import ConfigError, PlanError, TraceError
from wgates_plugin.integrations.torch_pruning import checks, options
from wgates_plugin.integrations.torch_pruning.base import TracedPruner
from wgates_plugin.integrations.torch_pruning.importance import (
    History,
    WGatesImportance,
    units_left,
)
from wgates_plugin.integrations.torch_pruning.next_step import merits_after, space_after
from wgates_plugin.integrations.torch_pruning.words import Efficiency, Scheduler, Words, linear
from wgates_plugin.plan import PruningPlan
from wgates_plugin.strategies.criteria import importance_scores
from wgates_plugin.strategies.wgates import WGates, WGatesSettings
from wgates_plugin.surgery import check_shapes, removals


class WGatesPruner(TracedPruner):
    """W-Gates as a `torch_pruning` pruner: gates learn in your loop, `step()` removes exactly.

    Gates are attached on construction and taken off by the last `step()` or `detach()`. They act
    from the first training pass on, or once they were measured for a round (`settings.measuring`,
    `settings.rounds`): until then, and again after each of several steps, evaluation sees the
    network as it is. Between `loss.backward()` and `optimizer.step()`, call `regularize(model)`
    once. With a `target` the budget decides every width; without one, `pruning_ratio` does, as in
    torch-pruning, and the gates learn which channels.

    Args:
        model: the network to prune, in place at `step()`.
        example_inputs: one batch as a tensor, a tuple or list of arguments or a dict.
        importance: any torch-pruning importance; it ranks the channels where the gates start. None
            ranks by what open gates measure, `settings.measuring` steps long, and with `measuring=0`
            by filter norms, which compare within a group alone.
        efficiency: what is limited: `LPNet`, `MacsModel`, `ParametersModel`, a function of the
            channel space that returns one, or a `Budget` of several limits. Without it a
            target counts MACs, never milliseconds: those need an `LPNet`.
        target: the limit in the model's unit (ms, MACs, parameters); None for a `Budget`.
        pruning_ratio: share of the channels to remove; 0.5 if there is no target.
        pruning_ratio_dict: module or tuple of modules -> its own ratio; a layer's last entry counts.
        global_pruning, isomorphic: rank over all groups, or over groups of one structure, by what was
            measured or by the values of `importance`; filter norms leave all of them equally wide.
        max_pruning_ratio: largest share of any group that may go.
        round_to: channel multiple of every width that is cut; by default, under a latency, that of
            the widths which LPNet has measured, and 1 otherwise.
        iterative_steps, iterative_pruning_ratio_scheduler: how many times `step()` is called, and
            how much of the way is done after each. Gates learn under the limit of the step to come,
            and are attached anew after each.
        ignored_layers: modules, names or module types whose output channels stay.
        root_module_types: only groups with a producer of these types are pruned.
        unwrapped_parameters: bare parameters and their channel dimension, for the tracing alone:
            channels that share one stay, for no parameter is cut outside of a layer.
        steps: gate steps to come before each `step()`: at most half of them is spent on
            measuring. Needed for settings that slide the target.
        min_channels, min_fraction, floors, caps: see `wgates_plugin.trace`.
        average: called on the gates' gradient, which keeps several processes alike; by default the
            mean over all of them, where `torch.distributed` runs. Where one of them prunes alone:
            `lambda gradient: gradient`.

    Raises:
        ConfigError: options that are wrong or cannot be honoured, all at once.
        TraceError, InfeasibleTargetError: before anything is changed.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
        >>> x, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 0, 1])
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        >>> pruner = WGatesPruner(net, x, pruning_ratio=0.5, steps=1)
        >>> loss = nn.functional.cross_entropy(net(x), y)
        >>> optimizer.zero_grad(); loss.backward()
        >>> _ = pruner.regularize(net)
        >>> optimizer.step()
        >>> pruner.step()
        >>> net[0].out_channels
        4
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        importance: Callable[[Any], Tensor | None] | None = None,
        *,
        efficiency: Efficiency | None = None,
        target: float | None = None,
        pruning_ratio: float | None = None,
        pruning_ratio_dict: Mapping[Any, float] | None = None,
        global_pruning: bool = False,
        isomorphic: bool = False,
        max_pruning_ratio: float = 1.0,
        round_to: int | None = None,
        iterative_steps: int = 1,
        iterative_pruning_ratio_scheduler: Scheduler = linear,
        ignored_layers: Sequence[Any] | None = None,
        root_module_types: Sequence[type] | None = None,
        unwrapped_parameters: Any = None,
        settings: WGatesSettings | None = None,
        steps: int | None = None,
        min_channels: int = 1,
        min_fraction: float = 0.0,
        floors: Mapping[str, int] | None = None,
        caps: Mapping[str, int] | None = None,
        average: Callable[[Tensor], Tensor] | None = None,
        **others: Any,
    ) -> None:
        model = options.plain(model)
        settings = settings or WGatesSettings()
        problems = [
            *checks.round_to_problems(round_to),
            *checks.importance_problems(model, importance),
            *checks.gate_problems(settings, importance, steps, average),
        ]
        self._gate_steps, self._average = steps, average
        words = Words(
            efficiency=efficiency,
            target=target,
            pruning_ratio=pruning_ratio,
            pruning_ratio_dict=pruning_ratio_dict,
            global_pruning=global_pruning,
            isomorphic=isomorphic,
            max_pruning_ratio=max_pruning_ratio,
            iterative_steps=iterative_steps,
            iterative_pruning_ratio_scheduler=iterative_pruning_ratio_scheduler,
            ignored_layers=ignored_layers,
            root_module_types=root_module_types,
            unwrapped_parameters=unwrapped_parameters,
            min_channels=min_channels,
            min_fraction=min_fraction,
            floors=floors,
            caps=caps,
            others=others,
        )
        self._open(model, example_inputs, words, problems, grid=round_to or settings.grid)
        measuring = settings.measuring if importance is None else 0
        self._settings = replace(settings, grid=self._grid, measuring=measuring)
        self._learned, self._unfinished = False, False
        ranking = (
            None
            if importance is None
            else importance_scores(model, self.space, importance, traced=self._trace)
        )
        self._attach(ranking=ranking)

    @property
    def budget(self) -> Budget:
        """The limits that the gates learn under now."""
        return self.gates.budget

    def _attach(
        self,
        *,
        ranking: Tensor | None = None,
        carried: Tensor | None = None,
        compared: Tensor | None = None,
    ) -> None:
        """Gates for the step to come, on the network as it stands; what is known of it as in `WGates`."""
        step = self.current_step + 1
        budget = self._goal.budget(self._now, step)
        self.gates = WGates(
            self.model,
            self._now,
            budget,
            self._settings,
            steps=self._gate_steps,
            average=self._average,
            ranking=ranking,
            carried=carried,
            compared=compared,
            opening=self._goal.opening(self._now, step),
            waiting=True,
        ).attach()
        self.importance = self._live_importance

    def _live_importance(self, group: Any) -> Tensor | None:
        """Scores of a torch-pruning group as they stand."""
        done = len(self.DG.pruning_history())
        return WGatesImportance._of(self._now, self.gates.unit_scores(), done)(group)

    def regularize(
        self, model: nn.Module, loss: Tensor | None = None, *, scale: float = 1.0, **others: Any
    ) -> dict[str, float]:
        """Add the budget's gradient, step the gates; returns the step's monitor values.

        Where the gradient is not finite (an overflow under a loss scaler), the gates stay as they
        are, which `skipped` counts.

        Args:
            model: the network, or a compiled or parallel wrapper of it.
            loss: there for torch-pruning's signature.
            scale: what the loss was multiplied by, `scaler.get_scale()` under a `GradScaler`. Its
                `unscale_` does not reach the gates: call this between `scaler.unscale_(optimizer)`
                and `scaler.step(optimizer)`.

        Raises:
            PlanError: another model, or nothing is left to learn.
            ConfigError: a sibling's word that has no meaning here.
            TrainingError: no gradient reached the gates, or the optimizer has stepped already.
        """
        if problems := checks.refused_options(others):
            raise ConfigError(f"{self._subject}.regularize", problems)
        if not options.wraps(model, self.model):
            raise PlanError(
                f"{self._subject}.regularize: another model than the one the pruner was made for"
            )
        if self.current_step >= self.iterative_steps:
            raise PlanError(
                f"{self._subject}.regularize: this network is pruned already; fine-tune it without "
                "the pruner, or make a new one to prune more"
            )
        monitor = self.gates.regularize(scale=scale)
        self._learned = self._learned or self.gates.step > 0
        return monitor

    def discard(self) -> None:
        """Forget what the gates collected since the last `regularize`: for a batch you skip."""
        self.gates.discard()

    def step(self, interactive: bool = False) -> Iterator[Any] | None:
        """Decide the plan, take the gates off and remove the closed channels exactly.

        With `interactive=True` the groups come one by one; call `group.prune()` on each before
        asking for the next. While iterative steps remain, gates are attached to the smaller network
        afterwards; make a new optimizer for its new parameters, as in any iterative pruning.

        Raises:
            PlanError: the gates never learned, all steps are done, the interactive step before was
                left unfinished, or the network changed since it was traced.
            TrainingError: its weights are not finite. The pruner can be used on.
        """
        self._refuse_step()
        if words := self.gates.warning(f"{self._subject}.step", "steps"):
            warnings.warn(words, stacklevel=2)
        scores, plan = self.gates.unit_scores(), self._decide()
        self.detach()
        self.current_step += 1
        self._unfinished = True
        groups = self._removals(plan, scores)
        if interactive:
            return groups
        for group in groups:
            group.prune()
        return None

    def _refuse_step(self) -> None:
        if self._unfinished:
            raise PlanError(
                f"{self._subject}.step: the interactive step before was not finished, the network is "
                "half pruned; go through all of its groups, or load the network anew"
            )
        if self.current_step >= self.iterative_steps:
            raise PlanError(
                f"{self._subject}.step: this network is pruned already, in "
                f"{self.iterative_steps} step(s); make a new pruner to prune more"
            )
        # Later steps may follow at once, with the scores that the first phase learned.
        again = self._learned and self._settings.start == "target"
        if self.gates.step == 0 and not again:
            raise PlanError(
                f"{self._subject}.step: the gates never learned; call `regularize(model)` between "
                "`loss.backward()` and `optimizer.step()` in your training loop first"
            )
        found = dict(self.model.named_modules())
        names = {name for name, _ in self._now.slots_of}
        replaced = sorted(n for n in names if n in found and found[n] not in self._trace.names)
        if replaced:
            raise PlanError(
                f"{self._subject}.step: the network changed since it was traced: `{replaced[0]}` is "
                "another module now; make a new pruner"
            )
        check_shapes(self.model, self._now)

    def _decide(self) -> PruningPlan:
        scores = self.gates.decided_scores()
        widths = self._goal.widths(self._now, scores, self.current_step + 1)
        if widths is None:
            return self.gates.plan()
        return PruningPlan.top(self._now, scores, widths, strategy="wgates")

    def _removals(self, plan: PruningPlan, scores: Tensor) -> Iterator[Any]:
        yield from removals(self.model, plan, traced=self._trace)
        self._pruned(plan, scores)

    def _pruned(self, plan: PruningPlan, scores: Tensor | None) -> None:
        """Take note of a plan that was carried out; attach the gates of the next step."""
        self._unfinished = False
        self.plan = plan if self.plan is None else self.plan.compose(plan)
        if self.current_step < self.iterative_steps:
            self._trace_again(plan)
            known = {"carried": scores, "compared": self.gates.starting.compared}
            self._attach(
                **{
                    name: merits_after(merits, plan, self._now)
                    for name, merits in known.items()
                    if scores is not None and merits is not None
                }
            )

    def _trace_again(self, plan: PruningPlan) -> None:
        self._retrace(self._inputs)
        try:
            self._now = space_after(plan, self.space, self._trace, self._ignored)
        except TraceError as error:
            raise PlanError(
                f"{self._subject}.step: step {self.current_step} of {self.iterative_steps} left "
                f"nothing to prune ({error}); ask for fewer steps or a smaller ratio"
            ) from error

    def detach(self) -> nn.Module:
        """Take the gates off without pruning."""
        return self.gates.detach()

    def reset(self) -> None:
        """torch-pruning's reset of the step counter: refused once something was removed."""
        if self.current_step:
            raise PlanError(f"{self._subject}.reset: channels are gone; make a new pruner instead")

    def manual_prune_width(self, *_: Any, **__: Any) -> None:
        """Refused: gates decide all groups together."""
        raise PlanError(
            f"{self._subject}.manual_prune_width: a width set by hand would leave the gates behind; "
            "use `floors` and `caps`, or `pruning_ratio_dict`"
        )

    # Resuming

    def load_pruning_history(self, pruning_history: History) -> None:
        """Remove what a history of this network's class says, from a network still whole.

        Raises:
            PlanError: it is for another network, or this one was pruned already.
        """
        self._refuse_reload("load_pruning_history")
        self._carry_out(self._left_by(pruning_history), pruning_history)

    def state_dict(self) -> dict[str, Any]:
        """Gates, steps done and channels kept: tensors and plain values.

        Raises:
            PlanError: an interactive step is under way.
        """
        if self._unfinished:
            raise PlanError(f"{self._subject}.state_dict: an interactive step is not finished")
        kept = None if self.plan is None else [list(units) for units in self.plan.kept]
        return {
            "step": self.current_step,
            "learned": self._learned,
            "kept": kept,
            "history": [list(entry) for entry in self.DG.pruning_history()],
            "gates": self.gates.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`, on a network still whole: what was gone is removed again.

        Load the network's weights afterwards, when it has its smaller shapes.

        Raises:
            PlanError: the state is of another kind or network, or this one was pruned already.
        """
        self._refuse_reload("load_state_dict")
        try:
            step, learned, gates = int(state["step"]), bool(state["learned"]), state["gates"]
            history = [list(entry) for entry in state["history"]]
            kept = state["kept"]
            if kept is not None:
                kept = tuple(tuple(int(unit) for unit in row) for row in kept)
            if not isinstance(gates, dict):
                raise TypeError(f"gates: {type(gates).__name__}")
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(
                f"{self._subject} state: a field is missing or wrong ({error!r})"
            ) from None
        if not 0 <= step <= self.iterative_steps:
            raise PlanError(
                f"{self._subject} state: {step} steps are done, this pruner makes "
                f"{self.iterative_steps}; use the options the state was made with"
            )
        if kept is not None:
            plan = PruningPlan(self._now, kept, {"strategy": "wgates"})
            if self._left_by(history).kept != plan.kept:
                raise PlanError(
                    f"{self._subject} state: its history leaves other channels than it keeps; take "
                    "a whole state of one pruner"
                )
            self.current_step = step
            self._carry_out(plan, history)
        self._learned = learned
        if self.current_step < self.iterative_steps:
            try:
                self.gates.load_state_dict(gates)
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise PlanError(
                    f"{self._subject} state: its gates do not fit this network ({error}); use the "
                    "options the state was made with, and a fresh network"
                ) from error

    def _refuse_reload(self, what: str) -> None:
        if self.plan is not None or self._unfinished:
            raise PlanError(
                f"{self._subject}.{what}: this network is pruned already; load into a pruner of a "
                "fresh network"
            )

    def _left_by(self, history: History) -> PruningPlan:
        return PruningPlan.from_masks(self._now, units_left(self._now, history), strategy="history")

    def _carry_out(self, plan: PruningPlan, history: History) -> None:
        self.detach()
        for group in removals(self.model, plan, traced=self._trace):
            group.prune()
        self.DG._pruning_history = [list(entry) for entry in history]
        self._pruned(plan, None)

"""The rewrite `modulation`: layers whose values depend on the step, the pooled prompt and the guidance alone, computed
for all steps of a request at once.

A denoiser's blocks project one vector of conditioning each, in every step: little arithmetic, but all of these weights
are read. Their results follow from the timestep and from what stays the same over a request. Which layers these are is
told by following values through one plain call (step_layers.py); the operators that lead to them are then run for all
steps in one go, and each step looks its row up by the timestep that it is given, on the device (step_tables.py).
"""

from __future__ import annotations

import inspect
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_unflatten

from parafuse.engine.rewrites.flow import Flow, Slice, WritesError
from parafuse.engine.rewrites.rewrite import Boundary, Rewrite, Site
from parafuse.engine.rewrites.rows import Rows, bytes_of, weight_bytes
from parafuse.engine.rewrites.step_layers import Learned, facts_of, followed, is_close, shapes_of
from parafuse.engine.rewrites.step_tables import Match, Table, Tables, given_times, rows_of
from parafuse.engine.rewrites.times import foreseen, is_one_value
from parafuse.errors import UnsupportedError, is_out_of_memory
from parafuse.log import note
from parafuse.parallel.batch_cut import TRIES
from parafuse.parallel.effects import Adapters, Parts, Watched, is_opaque
from parafuse.parallel.hooks import Forward, OnForward
from parafuse.parallel.nest import Flattener

MAX_TABLE_BYTES = 2**30
"""Of all rows of one request's branch; longer schedules are not looked up."""
MAX_MADE = 8
"""Tables of one request: where each step needs its own, nothing is looked up."""
MAX_KNOWN = 8
"""Structures of calls that are kept in mind."""
LOOKS = 2
"""Steps in which the device is waited for to see that the timestep is one of those foreseen; on a CPU, all."""
BALANCE = 184
"""Multiplications for each byte of weights at which a GPU (H200, bf16) waits for neither memory nor arithmetic."""
MIN_GAIN = 0.005
"""Of a step, as estimated: where it is less, `auto` leaves it off."""
TIME, HELD = "time", "held"
"""Why there was no row."""
NO_ROW = {
    TIME: "a step had a timestep that does not follow from the scheduler's as the first ones did",
    HELD: "what its layers depend on beside the timestep (pooled prompt, guidance) changed in the middle of a request, "
    "after it had come in a new tensor with the same values each time",
}


class StepModulation(Rewrite):
    """Local: conditioning is the same on all ranks that share a sequence, and each rank looks its own calls up."""

    def __init__(self, site: Site):
        super().__init__(site)
        self.seen: Counter[str] = Counter()
        self.why: dict[str, None] = {}
        """Why layers ran as they do."""
        self.rows = Rows()
        self.is_host_free = True
        """Whether looking at a value of a CPU tensor is taken to cost nothing."""
        self._learned: list[Learned] = []
        self._tables = Tables()
        self._is_off = False
        """For the rest of the request."""
        self._hopeless: Counter[Any] = Counter()
        """Structures of calls in which no layers were found, or not proven: how often that was tried."""
        self._failures = 0
        """Requests in which it was given up."""
        self._missed: dict[str, Tensor] = {}
        """Whether some step had no row, by the reason; on the device."""
        self._parts, self._adapters = Parts(self.module), Adapters(self.module)
        self._flatten = Flattener()
        self._first = next(iter(list(inspect.signature(type(site.module).forward).parameters)[1:]), "")

    def install(self) -> None:
        self.rows.prepare(self.module)
        self.site.clock.on_start.append(self.forget)

    def remove(self) -> None:
        if self.forget in self.site.clock.on_start:
            self.site.clock.on_start.remove(self.forget)
        self.rows.remove()
        self._tables.clear()
        self._learned.clear()

    def at_boundary(self) -> list[OnForward]:
        return [Boundary(self.module, self.call)]

    def outermost(self) -> OnForward:
        return _Steps(self)

    def lines(self) -> list[str]:
        done = [f"{count} calls {what}" for what, count in sorted(self.seen.items())]
        what = [f"{len(one.layers)} layers of {weight_bytes(one.layers) / 1e6:.1f} MB" for one in self._learned[-1:]]
        return ["rewrite modulation: " + ("; ".join([*done, *what, *self.why]) or "from the first call on")]

    def begin(self) -> None:
        self.seen.clear()

    def forget(self) -> None:
        """A loop over steps begins or has ended: its rows are no more needed."""
        self._tables.start()
        self._is_off = self._failures >= TRIES
        if self.site.clock.has_stepped:
            self.settle()
            return
        missed = self._why_missed()  # of a loop that did not end: no fault of the one that begins
        if missed:
            note(f"rewrite modulation on {self.site.name}: the last request, which did not end, {missed}")

    def settle(self) -> None:
        """Raises UnsupportedError where a step had no row."""
        missed = self._why_missed()
        if missed:
            raise UnsupportedError(f"rewrites='modulation' on {self.site.name}: {missed}; leave modulation out.")

    def _why_missed(self) -> str:
        """In words, once; empty where all steps had rows. May wait for the device."""
        missed, self._missed = self._missed, {}
        why = next((why for why, flag in missed.items() if bool(flag)), None)
        return "" if why is None else f"has no result: {NO_ROW[why]}, so that is not a number"

    def call(self, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the denoiser, with rows for its layers where they are known."""
        if self.site.context.is_trial or torch.is_grad_enabled():
            return original(*args, **kwargs)
        if self._is_off:
            self.seen["as they are"] += 1
            return original(*args, **kwargs)
        if self._parts.have_other_objects():
            self._renew()
        elif self._tables.made and self._adapters.have_changed():
            self._give_up("adapters are set to something else in the middle of a request")
        try:
            return self._call(original, args, kwargs)
        finally:
            if self._parts.have_other_objects():  # what a call has changed itself (tables that it keeps) is no change
                self._parts = Parts(self.module)

    def _call(self, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, spec = self._flatten((args, kwargs))
        views = None
        if not self._is_off and self._hopeless[_key(spec, leaves)] < TRIES:
            matches = self._matches(leaves, spec, args[0] if args else kwargs.get(self._first))
            views = self._look_up(matches, leaves) if matches else None
        if views is None:
            self.seen["as they are"] += 1
            return original(*args, **kwargs)
        self.seen["looked up"] += 1
        self.rows.show(views)
        try:
            return original(*args, **kwargs)
        finally:
            self.rows.hide(views)

    def _renew(self) -> None:
        self._parts, self._adapters = Parts(self.module), Adapters(self.module)
        self._learned.clear()
        self._tables.clear()
        self._hopeless.clear()
        self._failures = 0

    def _say(self, why: str) -> None:
        if why not in self.why and not self.site.is_choice:
            note(f"rewrite modulation on {self.site.name}: {why}")
        self.why[why] = None

    def _give_up(self, why: str) -> None:
        """For the rest of the request; for good where that happens again and again."""
        self._say(why)
        self._is_off = True
        self._failures += 1

    def _look_up(self, matches: list[Match], leaves: list[Any]) -> dict[nn.Linear, Tensor] | None:
        """Fills the buffers with the rows of this step; None where its timestep was not foreseen."""
        table, holds = matches[0]
        given = given_times(table, leaves)
        found = rows_of(matches, leaves)
        if holds is None and (len(table.seen) < LOOKS or (given.device.type == "cpu" and self.is_host_free)):
            if not bool(found.is_found):
                self._tables.all.remove(table)
                return None if table.seen == [] else self._again(table, leaves)
            if len(table.seen) < LOOKS:
                table.seen.append(given.clone())
        else:
            self._miss(TIME, found.is_same & ~found.is_found)
            self._miss(HELD, ~found.is_same)
        flats, views = self.rows.buffers(table.learned.like)
        for flat, row in zip(flats, found.values, strict=True):
            flat.copy_(row)
        return views

    def _miss(self, why: str, flag: Tensor) -> None:
        self._missed[why] = self._missed[why] | flag if why in self._missed else flag

    def _again(self, table: Table, leaves: list[Any]) -> dict[nn.Linear, Tensor] | None:
        """Other forms of the timesteps, which have this one too."""
        seen = [*table.seen, leaves[table.learned.times[0]]]
        new = self._made_table(table.learned, leaves, seen)
        return None if new is None else self._look_up([(new, None)], leaves)

    def _matches(self, leaves: list[Any], spec: TreeSpec, sample: Any) -> list[Match]:
        """The tables of a call; a new one where it has none."""
        found = self._tables.of(leaves, spec, is_host_free=self.is_host_free)
        if found:
            return found
        learned = next((one for one in self._learned if one.fits(leaves, spec)), None)
        if self._learned and (learned is None or not self._tables.made) and self._parts.have_changed():
            self._renew()  # a scale of an adapter, say
            learned = None
        if learned is None:
            if len(self._learned) >= MAX_KNOWN:
                self._give_up("too many structures of calls")
                return []
            learned = self._learn(leaves, spec, sample)
        if learned is None or not self._is_proven(learned, leaves):
            return []
        table = self._made_table(learned, leaves, [leaves[learned.times[0]]])
        return [] if table is None else [(table, None)]

    def _made_table(self, learned: Learned, leaves: list[Any], seen: list[Tensor]) -> Table | None:
        """The rows of all steps, by one run of what leads to them."""
        if self._tables.made >= MAX_MADE:
            return self._give_up("what it depends on changes from step to step")
        self._tables.made += 1
        times = foreseen(self.site.clock.schedulers(), seen)
        if times is None:
            return self._give_up("the timestep does not follow from the scheduler's timesteps")
        if len(times) * bytes_of(learned.like) > MAX_TABLE_BYTES:
            return self._give_up(f"{len(times)} steps need more than {MAX_TABLE_BYTES / 1e9:.1f} GB")
        try:
            return self._tables.add(learned, times, leaves, [] if len(seen) < LOOKS else seen)
        except RuntimeError as error:  # weights that are elsewhere for the time being
            return self._give_up(f"its conditioning cannot be run beforehand ({str(error).partition(chr(10))[0]})")

    def _learn(self, leaves: list[Any], spec: TreeSpec, sample: Any) -> Learned | None:
        """Follows the values of one plain call on this rank. Waits for the device."""
        place = next((i for i, x in enumerate(leaves) if x is sample), -1)
        times = [i for i, x in enumerate(leaves) if i != place and is_one_value(x)]
        times = [i for i in times if foreseen(self.site.clock.schedulers(), [leaves[i]]) is not None]
        if not times:
            return self._leave(
                leaves, spec, "no argument follows from the scheduler's timesteps (or it differs by token)"
            )
        flow = Flow(leaves, keeps=lambda sources: place not in sources, may_write=False)
        found = self._run(leaves, spec, flow)
        if found is None:
            return None
        like, rows = found
        used = {x: flow.sources_of(y) for x, y in like.items()}
        like = {x: y for x, y in like.items() if place not in used[x] and -1 not in used[x]}
        uses = frozenset[int]().union(*(used[x] for x in like))
        moving = tuple(i for i in times if i in uses)
        if not moving:
            return self._leave(leaves, spec, "no layers depend on the timestep alone")
        if not flow.decided.isdisjoint(times):
            return self._leave(leaves, spec, "the model's code looks at the timestep: other steps may take other ways")
        if any(float(leaves[i].reshape(-1)[0]) != float(leaves[moving[0]].reshape(-1)[0]) for i in moving):
            return self._leave(leaves, spec, "several arguments are times, and differ")
        facts = facts_of(leaves, uses)
        learned = Learned(
            spec,
            facts,
            list(like),
            like,
            Slice(flow, list(like.values()), self.module, self.site.context.present),
            uses,
            moving,
            rows,
        )
        why_not = self._why_not_worth_it(learned) or self._why_not_right(learned, leaves)
        if why_not:
            return self._leave(leaves, spec, why_not)
        learned.proven.add(shapes_of(leaves))
        self.rows.add(learned.layers)
        self._parts = Parts(self.module)  # layers of an adapter have become such that give rows
        self._learned.append(learned)
        return learned

    def _leave(self, leaves: list[Any], spec: TreeSpec, why: str) -> None:
        """Nothing is looked up in calls like this one."""
        self._say(why)
        self._hopeless[_key(spec, leaves)] = TRIES

    def _run(self, leaves: list[Any], spec: TreeSpec, flow: Flow) -> tuple[dict[nn.Linear, Tensor], int] | None:
        """One plain call, of which nothing is left; None where it did more than give a result. A table that a model
        makes when it is first called is made by the call itself then, and there in the next one."""
        opaque = next((type(x).__name__ for x in leaves if is_opaque(x)), "")
        if opaque:
            return self._leave(leaves, spec, f"an argument is a {opaque}, which a call may write into")
        watched = Watched(self.module, tree_unflatten(leaves, spec))
        try:
            with self.site.context.trying():
                found = followed(self.module, leaves, spec, flow)
            is_clean = not watched.has_changed()
        except WritesError:
            found, is_clean = None, False
        except Exception as error:
            watched.undo()
            if not is_out_of_memory(error):
                raise
            return self._leave(
                leaves, spec, "one plain call, to see what depends on what, does not fit this rank's memory"
            )
        if is_clean:
            return found
        watched.undo()
        self._hopeless[_key(spec, leaves)] += 1
        if self._hopeless[_key(spec, leaves)] >= TRIES:
            self._say("its calls do more than give a result")
        return None

    def _why_not_worth_it(self, learned: Learned) -> str:
        """Where nobody asked by name: whether it pays (docs/rewrites.md)."""
        if not self.site.is_choice:
            return ""
        total = sum(p.numel() * p.element_size() for p in self.module.parameters())
        share = weight_bytes(learned.layers) / max(1, total)
        rows = max(1, learned.most_rows // self.site.mesh.sequence_degree)
        gain = share * BALANCE / (BALANCE + rows)
        if gain >= MIN_GAIN:
            return ""
        return (
            f"left off: its layers have {share:.1%} of the weights, and {rows} tokens a rank keep the device busy; "
            f"it would gain about {gain:.2%} of a step"
        )

    def _why_not_right(self, learned: Learned, leaves: list[Any]) -> str:
        """Whether what was followed gives, run again for two steps at once, what the layers gave."""
        if not learned.slice.is_pure:
            return "its conditioning is written to in place"
        held = {i: leaves[i] for i in learned.uses if i not in learned.times}
        times = torch.stack([leaves[learned.times[0]].reshape(-1)[0]] * 2)
        found = learned.of_all_steps(held, times, leaves)
        is_right = all(is_close(found[layer][0], y) for layer, y in learned.like.items())
        return "" if is_right else "its conditioning gives something else when it is run again"

    def _is_proven(self, learned: Learned, leaves: list[Any]) -> bool:
        """Whether it holds at these sizes of all arguments: where they are new, one plain call tells."""
        sizes = shapes_of(leaves)
        if sizes in learned.proven:
            return True
        flow = Flow(leaves, may_write=False)
        found = self._run(leaves, learned.spec, flow)
        if found is None:
            return False
        like, _ = found
        with learned.slice.weights():
            rows = learned.slice({i: leaves[i] for i in learned.uses})
        same = all(
            layer in like and like[layer].shape == x.shape and is_close(x, like[layer])
            for layer, x in zip(learned.layers, rows, strict=True)
        )
        if not (same and flow.decided.isdisjoint(learned.times)):
            self._leave(leaves, learned.spec, "its conditioning depends on other sizes")
            return False
        learned.proven.add(sizes)
        return True


class _Steps(OnForward):
    """Lets the steps of the pipeline be counted, where each call passes."""

    def __init__(self, modulation: StepModulation):
        super().__init__(modulation.module)
        self._clock = modulation.site.clock

    def _forward(self, original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            self._clock.look()
            return original(*args, **kwargs)

        return forward


def _key(spec: TreeSpec, leaves: list[Any]) -> Any:
    return (spec, shapes_of(leaves))

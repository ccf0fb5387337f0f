"""Data parallel: the samples of a batch (prompts, and pictures of one prompt) spread over replicas, at the boundary of
the modules that do the work. Every rank runs the whole pipeline, so noise, text and order are those of one rank; each
denoiser, and the VAE's decoder, gets the rank's share of the batch, and one exchange brings all of the results."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from parafuse.config import Axis
from parafuse.log import note
from parafuse.parallel.batch_cut import BatchCut, rows
from parafuse.parallel.call_context import CallContext
from parafuse.parallel.hooks import Forward, override, override_forward
from parafuse.parallel.mesh import Mesh
from parafuse.parallel.on_module import OnModule
from parafuse.parallel.placeholder import settled


class DataParallel(OnModule):
    """One method of one module (its forward, or `decode`) on the ranks of the `data` axis. `install` on every rank of
    its group; calls are collective on it."""

    WORDS = {"cut": "batch cut in {} calls", "everywhere": "{} calls on all replicas"}  # noqa: RUF012

    def __init__(self, module: nn.Module, mesh: Mesh, method: str = "forward", *, context: CallContext | None = None):
        super().__init__(module)
        self.method = method
        self.degree = mesh.degree(Axis.DATA)
        self._cut = BatchCut(module, self.degree, mesh.rank(Axis.DATA), mesh.group_name(Axis.DATA), context)
        self._said: set[int] = set()

    def install(self) -> None:
        if self.method == "forward":
            self._undo = override_forward(self.module, self._shared)
        else:
            self._undo = override(self.module, self.method, self._shared(getattr(self.module, self.method)))

    def _forget(self) -> None:
        self._cut.forget()

    def _shared(self, original: Forward) -> Forward:
        names = list(inspect.signature(getattr(type(self.module), self.method)).parameters)

        def shared(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = settled(args), settled(kwargs)
            self.forget_if(self._parts.have_other_objects())
            samples = args[0] if args else kwargs.get(names[1]) if len(names) > 1 else None
            batch = rows(samples)
            if batch < self.degree and batch not in self._said and self.method == "forward":
                self._said.add(batch)
                note(
                    f"data {self.degree}: more replicas than samples in a batch ({batch}); some compute what others do"
                )
            if batch < 2 or not self._cut.may_cut(args, kwargs, samples):
                self.seen["everywhere"] += 1
                return original(*args, **kwargs)
            was_cut, result = self._cut(original, args, kwargs, samples)
            self.seen["cut" if was_cut else "everywhere"] += 1
            return result

        return shared

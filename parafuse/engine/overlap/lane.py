"""Requests in the order in which they are given: one denoises while the one before it decodes.

Each runs in a thread of its own, as the pipeline's own call. Where that comes to its first decode, it hands over: what
is open for denoising is closed, and the next request may begin. Decodes go one after the other as well, and never
beside an encode. What goes between ranks for autoencoders goes over a group of its own (`Mesh.apart`).
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from parafuse.engine.apply import Handle
from parafuse.engine.overlap.watch import Watch, watched_modules
from parafuse.engine.running import Running
from parafuse.engine.targets import Modules, autoencoders
from parafuse.errors import RankError, UnsupportedError
from parafuse.parallel.comm import Count
from parafuse.parallel.hooks import override
from parafuse.parallel.placeholder import settled
from parafuse.parallel.world import World

KNOWN = 256
"""Kinds of requests that are remembered."""
Paint = Callable[["Ticket"], tuple[Any, dict[str, Any]]]
"""(output, receipt) of a request."""


class Pending(Future[Any]):
    """A request that was begun: `result()` is the pipeline's output."""

    receipt: dict[str, Any]
    """Its record, once it has ended well."""


class Ticket:
    """One request's place in the lane."""

    def __init__(self, lane: Lane, key: tuple[Any, ...], why_not: str | None):
        self.key, self._lane = key, lane
        self.why_not = why_not
        """Why it cannot overlap, '' where it can; None where that is not known yet."""
        self.running: Running | None = None
        self._handle: Handle | None = None
        self.watch: Watch | None = None
        self.has_handed_over = False

    @property
    def may_hand_over(self) -> bool:
        return self.why_not == ""

    @contextmanager
    def around(self, running: Running) -> Iterator[None]:
        """Around the pipeline's call. Collective where nothing is known of requests like it."""
        self._lane.stand_on(running.pipeline)
        self.running, self._handle = running, running.handle
        if self.why_not is not None:
            yield
            return
        self.watch = Watch(running.pipeline, running.world.device, running.given_generators)
        yield
        everyone = running.world.everyone("overlap", self.watch.refusal())
        self.why_not = next(filter(None, everyone), "")  # what one rank cannot, none can
        self._lane.learn(self.key, self.why_not)

    def word(self) -> str:
        """For the receipt."""
        if self.has_handed_over:
            return "decoded while the next request could denoise"
        return f"none: {self.why_not or 'it is the first of its kind, and shows that those like it may'}"

    @property
    def decodes_before(self) -> Mapping[str, Count]:
        """What autoencoders had sent when the request before had ended."""
        return self._lane.sent(self._handle)


_LANES: dict[dist.ProcessGroup, Lane] = {}


def lane_of(world: World) -> Lane:
    """The one lane of all engines over the same ranks, which share groups, and may share components; of an engine that
    is alone its own."""
    group = dist.group.WORLD if world.size > 1 else None
    if group is None:
        return Lane()
    if group not in _LANES:
        _LANES.clear()  # an earlier world's
        _LANES[group] = Lane()
    return _LANES[group]


class Lane:
    """Requests of engines over the same ranks."""

    def __init__(self) -> None:
        self._front, self._back = threading.Semaphore(), threading.Semaphore()
        """Held while a request denoises; while one decodes that has handed over."""
        self._pool: ThreadPoolExecutor | None = None
        self._here = threading.local()
        self._verdicts: dict[tuple[Any, ...], str] = {}
        """Key of requests -> why they cannot overlap."""
        self._last: tuple[Any, ...] | None = None
        self._decoders: Modules = []
        self._others: Modules = []
        self._undo, self._unhook = ExitStack(), ExitStack()
        self._stream: Any = None
        self._stopped = False
        self._sent: tuple[Handle, dict[str, Count]] | None = None
        self.lost: BaseException | None = None
        """Why a rank was lost, where a request has found that out."""

    @contextmanager
    def entering(self) -> Iterator[None]:
        """Around what begins a request, from when the one before has denoised. Left with an error, none has begun."""
        self._refuse_own_thread()
        self._front.acquire()
        try:
            yield
        except BaseException:
            self._front.release()
            raise

    def begin(self, key: tuple[Any, ...], why_not: str, device: torch.device, paint: Paint) -> Pending:
        """Begins a request, inside of `entering`: once the one before has ended where it is not like this one. Every
        rank begins the same ones in the same order. `why_not`: why it cannot overlap, as far as that is known."""
        known = why_not or self._verdicts.get(key)
        if key != self._last or known != "":
            with self._back:
                self._last = key
        self._pool = self._pool or ThreadPoolExecutor(2, thread_name_prefix="parafuse request")
        ticket, pending = Ticket(self, key, known), Pending()
        pending.set_running_or_notify_cancel()
        context = contextvars.copy_context()
        self._pool.submit(context.run, self._run, ticket, pending, paint, _Modes(device))
        return pending

    def _run(self, ticket: Ticket, pending: Pending, paint: Paint, modes: _Modes) -> None:
        output, failed = None, False
        try:
            with modes.entered():
                self._here.ticket = ticket
                output, pending.receipt = paint(ticket)
                if ticket.has_handed_over:
                    self._settle_stream()
        except BaseException as error:
            failed = True
            if ticket.running is not None and ticket.running.world.broken:
                self.lost = self.lost or error
            pending.set_exception(error)
        if ticket.running is not None and ticket.has_handed_over:
            self._sent = (ticket.running.handle, ticket.running.handle.exchanged())
        if not failed:
            pending.set_result(output)
        self._here.ticket = ticket.running = None
        (self._back if ticket.has_handed_over else self._front).release()

    def sent(self, handle: Handle | None) -> Mapping[str, Count]:
        """What a handle had sent when the request before had ended; nothing where that was another handle's."""
        return self._sent[1] if self._sent is not None and self._sent[0] is handle else {}

    def _refuse_own_thread(self) -> None:
        if self._ticket is not None:
            raise UnsupportedError(
                "engine: a callback of a submitted request has called it, and would wait for itself; use the pipeline "
                "that the callback is given, or call the engine itself (engine(...)) for these."
            )

    def learn(self, key: tuple[Any, ...], why_not: str) -> None:
        """What a request has shown of those like it."""
        self._verdicts[key] = why_not
        if len(self._verdicts) > KNOWN:
            del self._verdicts[next(iter(self._verdicts))]

    def stop(self) -> None:
        """Requests end at their next step, with an error."""
        self._stopped = True

    def drain(self) -> None:
        """Waits until no request is under way, and takes off what stands on autoencoders. Raises UnsupportedError in a
        request's own thread."""
        self._refuse_own_thread()
        with self._front:
            self.rest()
        self._stopped = False

    def rest(self) -> None:
        """The same, inside of `entering`."""
        with self._back:
            self._take_off()

    def wait(self) -> None:
        """The same, but for a request's own thread."""
        if self._ticket is None:
            self.drain()

    def close(self, *, last: bool) -> None:
        """The same, and nothing is left on any component. `last`: of all engines of a family."""
        self.drain()
        self._unhook.close()
        self._others, self._sent = [], None
        if last and self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def forget(self) -> None:
        """What was learned of requests: the pipeline is another."""
        self._verdicts.clear()

    def raise_lost(self) -> None:
        """Raises what a request has raised that lost a rank."""
        if self.lost is not None:
            raise self.lost

    def stand_on(self, pipeline: Any) -> None:
        """Sees the calls that matter, from the pipeline's components on."""
        vaes, others = autoencoders(pipeline), watched_modules(pipeline)
        if not _are(self._decoders, vaes):
            with self._back:
                self._take_off()
                for _, module in vaes:
                    for method, seen in (("decode", self._decodes), ("encode", self._encodes)):
                        if callable(getattr(module, method, None)):
                            self._undo.callback(override(module, method, _seen_by(getattr(module, method), seen)))
                self._decoders = vaes
        if not _are(self._others, others):
            self._unhook.close()
            for name, module in others:
                hook = module.register_forward_pre_hook(lambda *_, name=name: self._calls(name))
                self._unhook.callback(hook.remove)
            self._others = others

    def _take_off(self) -> None:
        """From autoencoders. What denoisers have stays: to see it go, others would learn of them anew."""
        self._undo.close()
        self._decoders = []

    @property
    def _ticket(self) -> Ticket | None:
        return getattr(self._here, "ticket", None)

    def _calls(self, name: str) -> None:
        ticket = self._ticket
        if ticket is None:
            return
        if self._stopped:
            raise RankError("the request was stopped, as another one was interrupted.")
        if ticket.has_handed_over:
            raise UnsupportedError(
                f"{name}: was called after a decode, while the next request denoises, though requests like this one "
                "did not before. Call the engine itself for these (engine(...)): then nothing overlaps."
            )
        if ticket.watch is not None:
            ticket.watch.calls(name)

    def _decodes(self, args: Any, kwargs: Any) -> None:
        ticket = self._ticket
        if ticket is None or ticket.has_handed_over or ticket.running is None:
            return
        if ticket.running.is_in_callback:
            self._encodes()  # a preview: no end, but never beside another decode
            return
        if ticket.watch is not None:
            ticket.watch.decodes()
        if not ticket.may_hand_over:
            return
        settled((args, kwargs))  # an exchange of denoising
        self._back.acquire()
        try:
            ticket.running.hand_over()
            self._decode_aside(ticket.running.world.device, (args, kwargs))
        except BaseException:
            self._back.release()
            raise
        ticket.has_handed_over = True
        self._front.release()

    def _encodes(self, *_: Any) -> None:
        """Waits for the decode of the request before."""
        ticket = self._ticket
        if ticket is not None and not ticket.has_handed_over:
            with self._back:
                if ticket.may_hand_over and ticket.running is not None:
                    ticket.running.agree_on_autoencoders()

    def _decode_aside(self, device: torch.device, tree: Any) -> None:
        """On a stream of its own from here on, so that kernels of both requests overlap."""
        if device.type != "cuda":
            return
        self._stream = self._stream or torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        for x in tree_leaves(tree):
            if isinstance(x, Tensor) and x.is_cuda:
                x.record_stream(self._stream)
        torch.cuda.set_stream(self._stream)

    def _settle_stream(self) -> None:
        """So that whoever gets the output need not know of the stream."""
        if self._stream is not None:
            self._stream.synchronize()


def _are(known: Modules, found: Modules) -> bool:
    return len(known) == len(found) and all(a is b for (_, a), (_, b) in zip(known, found, strict=True))


def _seen_by(original: Callable[..., Any], seen: Callable[[Any, Any], None]) -> Callable[..., Any]:
    """The method with all that others have noted on it."""

    @wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        seen(args, kwargs)
        return original(*args, **kwargs)

    return method


class _Modes:
    """What a thread has of its own, as it is where this is made."""

    def __init__(self, device: torch.device):
        self._device, self._threads = device, torch.get_num_threads()
        self._grad, self._inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        kinds = {"cpu", device.type}
        self._casts = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in sorted(kinds)
        ]
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    @contextmanager
    def entered(self) -> Iterator[None]:
        torch.set_num_threads(self._threads)
        with ExitStack() as stack:
            if self._stream is not None:
                stack.enter_context(torch.cuda.device(self._device))
                stack.enter_context(torch.cuda.stream(self._stream))
            stack.enter_context(torch.inference_mode(self._inference))
            stack.enter_context(torch.set_grad_enabled(self._grad))
            for kind, dtype, enabled in self._casts:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            yield

"""A rank without a model: speaks as a rank does, and has the faults that it is told to have.

The feeding rank writes what it does into a file beside the job, from which the others take their part in it. A call's
settings say how it goes: num_inference_steps, step_s, and fault: {rank, step, kind}. So does the job: at_start, for the
time before the first call, with `starts` for how many starts."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from PIL import Image

from parafuse.launch.serve import messages as m
from parafuse.parallel.rank_entry import enter, record

BEAT_S = 0.1


class FakeRank:
    def __init__(self) -> None:
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self.feeds = os.environ.get("PARAFUSE_SERVE_FEEDS") == "1" and self.local_rank == 0
        self.generation = os.environ["PARAFUSE_SERVE_GENERATION"]
        self.job_file = Path(os.environ["PARAFUSE_SERVE_JOB"])
        self.job: dict[str, Any] = json.loads(self.job_file.read_text())
        self.state = self.job_file.with_name(f"doing-{self.generation}.json")
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(os.environ["PARAFUSE_SERVE_SOCKET"])
        self.sending = threading.Lock()
        self.phase, self.call, self.step, self.moves = "loading", "", 0, 0
        self.last_step: float | None = None
        self.seen = 0
        """Steps of all calls."""
        self.is_mute = False
        self.inbox: queue.Queue[m.ToRank] = queue.Queue()
        self.stops: dict[str, str] = {}
        self.doing: dict[str, Any] = {}

    def send(self, message: m.FromRank) -> None:
        with self.sending:
            self.socket.sendall(m.encode(message))

    def beat(self) -> None:
        while True:
            if not self.is_mute:
                age = None if self.last_step is None else time.monotonic() - self.last_step
                self.send(
                    m.Beat(
                        rank=self.rank, phase=self.phase, call=self.call, step=self.step, moves=self.moves,
                        last_step_age_s=age, memory_bytes=1000 + self.rank, peak_bytes=2000,
                    )
                )  # fmt: skip
            time.sleep(BEAT_S)

    def listen(self) -> None:
        while True:
            message = m.receive(self.socket)
            if message is None:
                os._exit(1)  # without its supervisor
            if isinstance(message, m.Stop):
                self.stops[message.call] = message.reason
            else:
                self.inbox.put(message)  # pyright: ignore[reportArgumentType]

    def run(self) -> None:
        self.send(
            m.Hello(
                rank=self.rank, local_rank=self.local_rank, pid=os.getpid(), world_size=self.world_size,
                feeds=self.feeds, generation=self.generation,
            )
        )  # fmt: skip
        for work in (self.beat, self.listen):
            threading.Thread(target=work, daemon=True).start()
        self.fault_at_start()
        time.sleep(float(self.job.get("load_s", 0.0)))
        self.phase = "idle"
        while True:
            self.moves += 1
            if self.feeds:
                try:
                    message = self.inbox.get(timeout=0.02)
                except queue.Empty:
                    continue
                if isinstance(message, m.End):
                    self.tell_others({"end": True})
                    return
                if isinstance(message, m.Paint):
                    self.paint(message)
            elif self.follow():
                return

    def fault_at_start(self) -> None:
        fault = self.job.get("at_start")
        if fault is None or fault["rank"] != self.rank:
            return
        starts = self.job_file.with_name("starts")
        number = int(starts.read_text()) if starts.exists() else 0
        starts.write_text(str(number + 1))
        if number < fault.get("starts", 10**9):
            self.have({"step": 0, **fault}, 0)

    def have(self, fault: dict[str, Any] | None, step: int) -> None:
        if fault is None or fault["rank"] != self.rank or fault["step"] != step:
            return
        kind = fault["kind"]
        if kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "raise":
            raise ValueError("the weights are made of cheese")
        elif kind == "leave":
            os._exit(0)
        elif kind == "hang":
            time.sleep(3600)
        elif kind == "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif kind == "mute":
            self.is_mute = True

    def tell_others(self, doing: dict[str, Any]) -> None:
        self.doing = doing
        part = self.state.with_suffix(".part")
        part.write_text(json.dumps(doing))
        part.replace(self.state)

    def follow(self) -> bool:
        """Another rank's part in what the feeding one does; whether it is to end."""
        try:
            doing = json.loads(self.state.read_text())
        except FileNotFoundError:
            doing = {}
        if doing.get("end"):
            return True
        self.phase, self.call = doing.get("phase", "idle"), doing.get("call", "")
        while self.seen < doing.get("steps", self.seen):  # a look may come too late for the step itself
            self.seen += 1
            self.step = doing["step"] - (doing["steps"] - self.seen)
            self.have(doing.get("fault"), self.step)
            if not doing.get("skips"):
                self.last_step = time.monotonic()
        time.sleep(0.01)
        return False

    def paint(self, paint: m.Paint) -> None:
        settings = paint.settings
        fault, steps = settings.get("fault"), int(settings["num_inference_steps"])
        kind = (fault or {}).get("kind")
        self.call, self.phase = paint.call, "denoising"
        begun = time.monotonic()
        for step in range(1, steps + 1):
            self.step = step
            self.seen += 1
            skips = kind == "skips"
            self.tell_others(
                {
                    "phase": "denoising",
                    "call": paint.call,
                    "step": step,
                    "steps": self.seen,
                    "fault": fault,
                    "skips": skips,
                }
            )
            time.sleep(float(settings.get("step_s", 0.02)))
            self.have(fault, step)
            self.moves += 1
            self.last_step = time.monotonic()
            previews = (b"preview",) if paint.previews and step % max(1, steps // paint.previews) == 0 else ()
            self.send(m.Stepped(call=paint.call, step=step, num_steps=steps, seconds=0.02, previews=previews))
            if paint.call in self.stops and kind != "deaf":
                self.end(m.Failed(call=paint.call, kind="stopped", message=self.stops[paint.call]))
                return
        if kind in ("invalid", "memory"):
            self.end(m.Failed(call=paint.call, kind=kind, message=f"{kind} as asked."))
        elif kind == "no end":
            self.end(None)
        else:
            took = time.monotonic() - begun
            files = tuple((f"{item.job}.png",) for item in paint.items)
            for (name,) in files if paint.folder else ():
                Image.new("RGB", (8, 8), (paint.items[0].seed % 256, 0, 0)).save(Path(paint.folder) / name)
            self.end(
                m.Painted(
                    call=paint.call, files=files, receipt='{"fake": true}', seconds=took,
                    phases_s={"denoising": took}, cache_hits=1, cache_calls=2,
                )
            )  # fmt: skip

    def end(self, message: m.Painted | m.Failed | None) -> None:
        self.tell_others(self.doing | {"phase": "idle"})
        self.phase, self.call, self.step = "idle", "", 0
        if message is not None:
            self.send(message)


def main() -> int:
    enter()
    try:
        FakeRank().run()
    except Exception as error:
        record(error, one_line=False, exit_code=1)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())

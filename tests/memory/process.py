"""`python -m tests.memory.process FOLDER [CALL]`: what a whole process takes for a request, by the system's own figure.

Proportional set size (pages shared with others count in part) less that after imports, looked at all the while by a
thread; a JSON object on stdout."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

LOOK_S = 0.02


def pss() -> int:
    """Bytes of this process."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the system does not tell the proportional set size")


class Watch(threading.Thread):
    """The most that was seen until now."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0

    def run(self) -> None:
        while True:
            self.most = max(self.most, pss())
            time.sleep(LOOK_S)


def main(folder: str, call: str) -> None:
    import diffusers
    import torch

    from parafuse import Config, Engine
    from parafuse.engine.loader import load_pipeline
    from parafuse.engine.source import locate

    torch.set_num_threads(1)
    source = locate("emoji")  # the same classes, so that all that is imported late is there
    small = load_pipeline(source, dtype="float32", allow_pickle=False)
    small("a", height=16, width=16, num_inference_steps=1, generator=torch.Generator().manual_seed(0))
    del small, diffusers
    before = pss()
    engine = Engine.from_pretrained(folder, Config(device="cpu"))
    watch = Watch()
    watch.start()
    engine("a red apple", seed=0, **json.loads(call))
    print(json.dumps({"before": before, "most": watch.most - before}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "{}")

"""`python -m parafuse.engine.worker`: one rank of an engine that another process made (see `workers.py`)."""

from __future__ import annotations

import os
import sys

from parafuse.parallel.rank_entry import enter, record


def main() -> int:
    """Joins, loads, and serves requests until it is told to end. Exit code 1 when a rank was lost."""
    enter()
    try:
        _serve()
    except Exception as error:
        record(error, one_line=False, exit_code=1)
        raise
    return 0


def _serve() -> None:
    import torch.distributed as dist

    from parafuse.engine.engine import Engine
    from parafuse.engine.source import locate
    from parafuse.engine.workers import KEY_ENV, get, next_request, read_signed
    from parafuse.parallel.world import join_world

    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    store.set(f"parafuse/here/{os.environ['RANK']}", "1")
    key = os.environ.pop(KEY_ENV)
    setup = read_signed(get(store, "parafuse/setup"), key)
    plan = setup["plan"]
    source = locate(setup.pop("model"), allow_pickle=setup["allow_pickle"], given=setup["pipeline_kwargs"])
    world = join_world(plan.device, plan.timeout_s, plan.world_size, store, plan.devices_per_rank)
    engine = Engine._on_rank(source, setup, world, progress=False)
    number = 1
    while (request := next_request(store, number, key, engine.raise_lost)) is not None:
        number += 1
        try:
            engine.follow(request)
        except Exception:
            if world.broken:
                raise
    engine.close()


if __name__ == "__main__":
    sys.exit(main())

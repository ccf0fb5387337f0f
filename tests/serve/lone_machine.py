"""A process that keeps ranks of its own, as a machine of a group does: says each start in a line of JSON, starts anew
after each loss, and ends when its standard input does."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from pathlib import Path

from parafuse.launch.serve.group import RankGroup
from parafuse.launch.serve.rank_link import RankLink
from tests.serve.groups import COMMAND, Ears, job_file, make_group


async def main(kind: str, folder: str, ranks: int, endpoint: str, hosts: bool) -> None:
    link = RankLink()
    env = link.env(job_file(Path(folder)), feeds=hosts)
    group: RankGroup
    if endpoint:
        from parafuse.launch.serve.elastic import ElasticGroup, Rendezvous

        meeting = Rendezvous(nnodes=2, endpoint=endpoint, hosts=hosts, key="a secret of these machines")
        group = ElasticGroup(COMMAND, ranks, env=env, rendezvous=meeting, show=())
    else:
        group = make_group(kind, ranks, env)
    ears = Ears()
    await ears.open(link, group)
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    group.start([])
    told = ""
    while not over.is_set():
        hellos = ears.hellos(group.generation)
        if group.generation != told and len(hellos) == ranks:
            told = group.generation
            said = {"generation": told, "pids": group.pids, "ranks": [one.rank for one in hellos]}
            print(json.dumps(said | {"world_size": hellos[0].world_size}), flush=True)
        failure = group.poll()
        if failure is not None:
            print(json.dumps({"lost": failure.summary}), flush=True)
            link.forget()
            group.kill()
            group.start([])
        await asyncio.sleep(0.02)
    group.close()
    await link.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5] == "1"))

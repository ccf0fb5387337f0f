"""`python -m tests.drop_in`: runs every script on one rank and on two, and writes the table of docs/drop-in.md."""

from __future__ import annotations

import sys

from tests.dist.ranks import close_pools, run_ranks
from tests.drop_in.pipelines import CLASSES
from tests.drop_in.rows import rows
from tests.drop_in.table import KEYWORDS, PAGE, Found, keywords, replaced, table


def main() -> int:
    found: Found = {}
    faults: list[str] = []
    for name in CLASSES:
        on_ranks = {1: [rows(name, 1)], 2: run_ranks(rows, 2, name, 2, timeout_s=600)}
        found[name] = {ranks: by_rank[0] for ranks, by_rank in on_ranks.items()}
        for ranks, by_rank in on_ranks.items():
            for rank, each in enumerate(by_rank):
                faults += [f"{name}.{row.member}, rank {rank} of {ranks}: {row.fault}" for row in each if row.fault]
        print(f"{name}: {len(found[name][1])} members", flush=True)
    close_pools()
    text = replaced(PAGE.read_text(), keywords(), *KEYWORDS)
    PAGE.write_text(replaced(text, table(found)))
    print("\n".join(faults) or f"{PAGE.name}: written")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

"""Tables of the job store, as steps from version to version. A step that was released is never changed: add one."""

from __future__ import annotations

_FIRST = (
    # `number` is the order of acceptance: clocks jump.
    """CREATE TABLE jobs (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        owner TEXT NOT NULL,
        kind TEXT NOT NULL,
        request TEXT NOT NULL,
        request_hash TEXT NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('queued', 'running', 'done', 'failed', 'cancelled')),
        priority INTEGER NOT NULL,
        created_s REAL NOT NULL,
        deadline_s REAL,
        started_s REAL,
        finished_s REAL,
        expires_s REAL,
        tries INTEGER NOT NULL DEFAULT 0 CHECK (tries >= 0),
        cancel_asked INTEGER NOT NULL DEFAULT 0,
        error TEXT,
        folder TEXT NOT NULL DEFAULT '',
        files TEXT NOT NULL DEFAULT '[]',
        num_bytes INTEGER NOT NULL DEFAULT 0,
        receipt TEXT NOT NULL DEFAULT '',
        rank_seconds REAL NOT NULL DEFAULT 0,
        idempotency_key TEXT,
        webhook TEXT,
        webhook_due_s REAL,
        progress REAL NOT NULL DEFAULT 0
    )""",
    "CREATE UNIQUE INDEX jobs_idempotency ON jobs (owner, idempotency_key) WHERE idempotency_key IS NOT NULL",
    "CREATE INDEX jobs_queue ON jobs (state, priority DESC, number)",
    "CREATE INDEX jobs_owner ON jobs (owner, number)",
    "CREATE INDEX jobs_waiting ON jobs (owner) WHERE state = 'queued'",
    "CREATE INDEX jobs_expiry ON jobs (expires_s) WHERE expires_s IS NOT NULL",
    "CREATE INDEX jobs_webhook ON jobs (webhook_due_s) WHERE webhook_due_s IS NOT NULL",
    "CREATE INDEX jobs_folder ON jobs (folder) WHERE folder <> ''",
    # Whatever the code does: a job ends once, and is not taken away before.
    """CREATE TRIGGER jobs_end_once BEFORE UPDATE OF state, folder, files, receipt, error ON jobs
        WHEN OLD.state IN ('done', 'failed', 'cancelled')
        BEGIN SELECT RAISE(ABORT, 'a job that is over cannot be changed'); END""",
    """CREATE TRIGGER jobs_stay BEFORE DELETE ON jobs
        WHEN OLD.state IN ('queued', 'running')
        BEGIN SELECT RAISE(ABORT, 'a job that is not over cannot be deleted'); END""",
    # An input belongs to one job, and goes with it.
    """CREATE TABLE inputs (
        name TEXT PRIMARY KEY,
        job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE
    ) WITHOUT ROWID""",
    "CREATE INDEX inputs_job ON inputs (job)",
    # What owners have used outlives their jobs: deleting them gives no quota back.
    "CREATE TABLE spending (owner TEXT NOT NULL, ended_s REAL NOT NULL, rank_seconds REAL NOT NULL)",
    "CREATE INDEX spending_owner ON spending (owner, ended_s)",
    "CREATE INDEX spending_age ON spending (ended_s)",
    "CREATE TABLE charge (one INTEGER PRIMARY KEY CHECK (one = 1), epoch INTEGER NOT NULL)",
    "INSERT INTO charge VALUES (1, 0)",
)
# Several supervisors may be in charge side by side, each of the jobs that it has claimed.
_SHARED = (
    "CREATE TABLE charges (epoch INTEGER PRIMARY KEY)",
    "INSERT INTO charges SELECT epoch FROM charge WHERE epoch > 0",
    "ALTER TABLE jobs ADD COLUMN epoch INTEGER NOT NULL DEFAULT 0",
    "UPDATE jobs SET epoch = (SELECT epoch FROM charge) WHERE state = 'running'",
)
STEPS = (_FIRST, _SHARED)

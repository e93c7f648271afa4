-- The embedded bus. Everything is keyed so that a read at either end of a long stream touches a handful of pages.

CREATE TABLE IF NOT EXISTS streams (
    id         INTEGER PRIMARY KEY,
    name       TEXT NOT NULL UNIQUE,
    subjects   TEXT NOT NULL, -- patterns, separated by spaces
    max_age_ms INTEGER NOT NULL,
    last       INTEGER NOT NULL DEFAULT 0 -- outlives the messages: a sequence is never given twice
);

-- Few and repeated: a consumer's filter is matched against these, not against a million messages.
CREATE TABLE IF NOT EXISTS subjects (
    id     INTEGER PRIMARY KEY,
    stream INTEGER NOT NULL,
    name   TEXT NOT NULL,
    UNIQUE (stream, name)
);

CREATE TABLE IF NOT EXISTS messages (
    stream  INTEGER NOT NULL,
    seq     INTEGER NOT NULL,
    subject INTEGER NOT NULL,
    nth     INTEGER NOT NULL, -- which of its subject: counting what waits is a subtraction
    id      TEXT NOT NULL,
    headers TEXT NOT NULL,    -- JSON
    payload BLOB NOT NULL,
    at_ms   INTEGER NOT NULL,
    PRIMARY KEY (stream, seq)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS messages_subject ON messages (subject, seq);

CREATE TABLE IF NOT EXISTS consumers (
    id           INTEGER PRIMARY KEY,
    stream       INTEGER NOT NULL,
    name         TEXT NOT NULL,
    filter       TEXT NOT NULL,
    ack_wait_ms  INTEGER NOT NULL,
    max_attempts INTEGER,
    max_pending  INTEGER NOT NULL,
    cursor       INTEGER NOT NULL, -- every matching message up to here has been delivered
    UNIQUE (stream, name)
);

-- Delivered and not settled. When it is due again is known in memory only: after a restart, at once.
CREATE TABLE IF NOT EXISTS pending (
    consumer INTEGER NOT NULL,
    seq      INTEGER NOT NULL,
    attempt  INTEGER NOT NULL,
    PRIMARY KEY (consumer, seq)
) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS dead_letters (
    n          INTEGER PRIMARY KEY AUTOINCREMENT,
    id         TEXT NOT NULL UNIQUE,
    stream     TEXT NOT NULL,
    subject    TEXT NOT NULL,
    message_id TEXT NOT NULL,
    headers    TEXT NOT NULL,
    payload    BLOB NOT NULL,
    attempts   INTEGER NOT NULL,
    reason     TEXT NOT NULL,
    at_ms      INTEGER NOT NULL
);

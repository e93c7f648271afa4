//! The queue in its file: SQL for what must survive, a mirror in memory for what decides quickly.
//!
//! The mirror holds the streams, their subjects, the consumers and their pending messages, never a message itself; its
//! size is bounded by the sum of the consumers' `max_pending` and the ids of two minutes. Everything goes through one
//! [`Session`] at a time, which is one transaction. A session that ends without [`Session::commit`] rolls back and leaves the mirror untrusted: it
//! is read from the file again before the next use. Only the due times, which the file does not know, are then kept.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::Path,
    time::Duration,
};

use rusqlite::{Connection, OptionalExtension, Row, Transaction, TransactionBehavior, params, types::Type};
use tokio::time::Instant;

use super::recent::{Recent, WINDOW};
use crate::{
    bus::{
        ATTEMPTS_USED_UP, ConsumerSpec, DeadLetter, Delivery, Error, Handle, Headers, Message, Progress, Published,
        Settlement, StreamSpec, matches,
    },
    clock::Clock,
};

/// Statements that are kept parsed: all there are.
const TEXTS: usize = 64;

/// How long another connection may keep the file busy: somebody who looks at it with a tool.
const BUSY_WAIT: Duration = Duration::from_secs(5);

/// Messages dropped for their age in one transaction at most, beside what a transaction publishes.
const PRUNE: i64 = 2_000;

pub(super) type Result<T> = rusqlite::Result<T>;

/// The connection and its mirror.
#[derive(Debug)]
pub(super) struct Queue {
    connection: Connection,
    mirror: Mirror,
    trusted: bool,
    clock: Clock,
}

#[derive(Debug, Default)]
struct Mirror {
    streams: HashMap<String, Stream>,
    consumers: BTreeMap<i64, Consumer>,
}

#[derive(Debug)]
struct Stream {
    id: i64,
    patterns: Vec<String>,
    max_age_ms: i64,
    last: u64,
    oldest_at_ms: Option<i64>,
    recent: Recent,
    subjects: BTreeMap<String, Subject>,
}

#[derive(Debug)]
struct Subject {
    id: i64,
    last: u64,
    count: u64,
}

#[derive(Debug)]
struct Consumer {
    stream: String,
    name: String,
    filter: String,
    ack_wait: Duration,
    max_attempts: Option<u32>,
    max_pending: usize,
    cursor: u64,
    pending: BTreeMap<u64, Pending>,
    due: BTreeSet<(Instant, u64)>,
}

#[derive(Clone, Copy, Debug)]
struct Pending {
    attempt: u32,
    due: Instant,
}

/// What a fetch came to.
#[derive(Debug)]
pub(super) struct Fetched {
    /// What to hand out.
    pub(super) deliveries: Vec<Delivery>,
    /// Messages whose attempts were used up went to the dead letters: there may be more behind them.
    pub(super) buried: bool,
    /// When the next pending message comes back.
    pub(super) next_due: Option<Instant>,
}

/// One transaction.
pub(super) struct Session<'q> {
    tx: Transaction<'q>,
    mirror: &'q mut Mirror,
    trusted: &'q mut bool,
    now_ms: i64,
    now: Instant,
    wake: BTreeSet<i64>,
}

impl Queue {
    /// Opens the file, or one in memory, makes the tables where they are missing, and reads the mirror.
    pub(super) fn open(path: Option<&Path>, clock: Clock) -> Result<Self> {
        let connection = path.map_or_else(Connection::open_in_memory, Connection::open)?;
        connection.busy_timeout(BUSY_WAIT)?;
        connection.set_prepared_statement_cache_capacity(TEXTS);
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.pragma_update(None, "cache_size", -4000)?;
        // Fewer and larger checkpoints: each syncs the file and not only its log.
        connection.pragma_update(None, "wal_autocheckpoint", 4000)?;
        connection.execute_batch(include_str!("schema.sql"))?;
        let mirror = Mirror::read(&connection, &mut Mirror::default(), clock.now_ms())?;
        Ok(Self { connection, mirror, trusted: true, clock })
    }

    /// Starts a transaction. Drops what is too old, so that nothing else need think of it.
    pub(super) fn begin(&mut self) -> Result<Session<'_>> {
        self.trust()?;
        self.trusted = false;
        let mut session = Session {
            tx: self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?,
            mirror: &mut self.mirror,
            trusted: &mut self.trusted,
            now_ms: self.clock.now_ms(),
            now: Instant::now(),
            wake: BTreeSet::new(),
        };
        session.prune()?;
        Ok(session)
    }

    fn trust(&mut self) -> Result<()> {
        if !self.trusted {
            // A rollback that failed: what came next would be part of what nobody commits.
            if !self.connection.is_autocommit() {
                self.connection.execute_batch("ROLLBACK")?;
            }
            self.mirror = Mirror::read(&self.connection, &mut self.mirror, self.clock.now_ms())?;
            self.trusted = true;
        }
        Ok(())
    }

    pub(super) fn consumers(&mut self, stream: &str) -> Result<Vec<String>> {
        self.trust()?;
        let of_stream = self.mirror.consumers.values().filter(|c| c.stream == stream);
        Ok(of_stream.map(|c| c.name.clone()).collect())
    }

    pub(super) fn progress(&mut self, stream: &str, consumer: &str) -> Result<Option<Progress>> {
        self.trust()?;
        let Mirror { streams, consumers } = &self.mirror;
        let found = consumers.values().find(|c| c.stream == stream && c.name == consumer);
        let (Some(stream), Some(consumer)) = (streams.get(stream), found) else { return Ok(None) };
        let (mut waiting, mut first_waiting) = (0, None::<u64>);
        for subject in stream.undelivered(consumer) {
            let next: Option<(u64, u64)> = self
                .connection
                .prepare_cached("SELECT seq, nth FROM messages WHERE subject = ?1 AND seq > ?2 ORDER BY seq LIMIT 1")?
                .query_row((subject.id, consumer.cursor), |row| row.try_into())
                .optional()?;
            if let Some((seq, nth)) = next {
                waiting += subject.count - nth + 1;
                first_waiting = Some(first_waiting.map_or(seq, |first| first.min(seq)));
            }
        }
        // Pending messages lie before the cursor and waiting ones behind it.
        let first_open = consumer.pending.keys().next().copied().or(first_waiting);
        Ok(Some(Progress {
            settled_through: first_open.map_or(stream.last, |first| first - 1),
            waiting,
            pending: consumer.pending.len() as u64,
        }))
    }

    pub(super) fn last_sequence(&mut self, stream: &str) -> Result<u64> {
        self.trust()?;
        Ok(self.mirror.streams.get(stream).map_or(0, |s| s.last))
    }

    pub(super) fn message(&mut self, stream: &str, sequence: u64) -> Result<Option<Message>> {
        self.trust()?;
        let Some(stream) = self.mirror.streams.get(stream) else { return Ok(None) };
        let message = |row: &Row<'_>| {
            let payload: Vec<u8> = row.get(3)?;
            Ok(Message { subject: row.get(0)?, id: row.get(1)?, headers: headers(row, 2)?, payload: payload.into() })
        };
        self.connection
            .prepare_cached(
                "SELECT (SELECT name FROM subjects s WHERE s.id = m.subject), id, headers, payload FROM messages m \
                 WHERE stream = ?1 AND seq = ?2 AND at_ms > ?3",
            )?
            .query_row((stream.id, sequence, self.clock.now_ms() - stream.max_age_ms), message)
            .optional()
    }

    pub(super) fn dead_letters(&mut self, after: Option<&str>, limit: usize) -> Result<Vec<DeadLetter>> {
        self.connection
            .prepare_cached(
                "SELECT id, subject, message_id, attempts, reason, payload, at_ms FROM dead_letters \
                 WHERE n > COALESCE((SELECT n FROM dead_letters WHERE id = ?1), 0) ORDER BY n LIMIT ?2",
            )?
            .query_map((after, i64::try_from(limit).unwrap_or(i64::MAX)), dead_letter)?
            .collect()
    }
}

impl Mirror {
    /// Reads everything from the file. What `before` knew and the file does not is kept: due times (without them, what
    /// is pending is due at once) and the age of ids.
    fn read(connection: &Connection, before: &mut Mirror, now_ms: i64) -> Result<Self> {
        let mut mirror = Mirror::default();
        let mut names = HashMap::new();
        let mut streams = connection.prepare("SELECT id, name, subjects, max_age_ms, last FROM streams")?;
        let mut subjects_of = connection.prepare("SELECT id, name FROM subjects WHERE stream = ?1")?;
        let mut newest =
            connection.prepare("SELECT seq, nth FROM messages WHERE subject = ?1 ORDER BY seq DESC LIMIT 1")?;
        for stream in streams.query_map((), |row| row.try_into())? {
            let (id, name, patterns, max_age_ms, last): (i64, String, String, i64, u64) = stream?;
            let mut stream = Stream {
                id,
                patterns: patterns.split(' ').map(str::to_owned).collect(),
                max_age_ms,
                last,
                oldest_at_ms: oldest(connection, id)?,
                recent: match before.streams.contains_key(&name) {
                    true => Recent::default(),
                    false => recent(connection, id, now_ms)?,
                },
                subjects: BTreeMap::new(),
            };
            for subject in subjects_of.query_map((id,), |row| row.try_into())? {
                let (id, name): (i64, String) = subject?;
                let (last, count) = newest.query_row((id,), |row| row.try_into()).optional()?.unwrap_or_default();
                stream.subjects.insert(name, Subject { id, last, count });
            }
            names.insert(id, name.clone());
            mirror.streams.insert(name, stream);
        }
        let mut consumers = connection.prepare(
            "SELECT id, stream, name, filter, ack_wait_ms, max_attempts, max_pending, cursor FROM consumers",
        )?;
        let mut pending_of = connection.prepare("SELECT seq, attempt FROM pending WHERE consumer = ?1")?;
        let mut rows = consumers.query(())?;
        while let Some(row) = rows.next()? {
            let (id, stream): (i64, i64) = (row.get(0)?, row.get(1)?);
            let Some(stream) = names.get(&stream) else { continue };
            let mut consumer = Consumer {
                stream: stream.clone(),
                name: row.get(2)?,
                filter: row.get(3)?,
                ack_wait: Duration::from_millis(row.get(4)?),
                max_attempts: row.get(5)?,
                max_pending: row.get(6)?,
                cursor: row.get(7)?,
                pending: BTreeMap::new(),
                due: BTreeSet::new(),
            };
            let now = Instant::now();
            let known = before.consumers.get(&id).map(|c| &c.pending);
            for pending in pending_of.query_map((id,), |row| row.try_into())? {
                let (seq, attempt): (u64, u32) = pending?;
                let due = known.and_then(|p| p.get(&seq)).map_or(now, |p| p.due);
                consumer.put(seq, attempt, due);
            }
            mirror.consumers.insert(id, consumer);
        }
        for (name, old) in before.streams.drain() {
            if let Some(stream) = mirror.streams.get_mut(&name) {
                stream.recent = old.recent;
                stream.recent.truncate(stream.last);
            }
        }
        Ok(mirror)
    }
}

impl Stream {
    fn accepts(&self, subject: &str) -> bool {
        self.patterns.iter().any(|pattern| matches(pattern, subject))
    }

    /// The subjects that have something for the consumer which it was not given yet.
    fn undelivered<'a>(&'a self, consumer: &'a Consumer) -> impl Iterator<Item = &'a Subject> {
        let newer = self.subjects.iter().filter(|(_, subject)| subject.last > consumer.cursor);
        newer.filter(|(name, _)| matches(&consumer.filter, name)).map(|(_, subject)| subject)
    }
}

impl Consumer {
    fn put(&mut self, seq: u64, attempt: u32, due: Instant) {
        self.remove(seq);
        self.pending.insert(seq, Pending { attempt, due });
        self.due.insert((due, seq));
    }

    fn remove(&mut self, seq: u64) -> Option<Pending> {
        let pending = self.pending.remove(&seq)?;
        self.due.remove(&(pending.due, seq));
        Some(pending)
    }

    fn is_last(&self, attempt: u32) -> bool {
        self.max_attempts.is_some_and(|max| attempt >= max)
    }
}

impl Session<'_> {
    /// What SQLite does by itself then.
    #[cfg(test)]
    pub(super) fn roll_back_as_when_there_is_no_room(&mut self) {
        self.tx.execute_batch("ROLLBACK").unwrap();
    }

    /// Makes it durable. Answers the consumers that may have something to fetch now.
    pub(super) fn commit(self) -> Result<BTreeSet<i64>> {
        self.tx.commit()?;
        *self.trusted = true;
        Ok(self.wake)
    }

    pub(super) fn ensure_stream(&mut self, spec: &StreamSpec) -> Result<()> {
        let max_age_ms = i64::try_from(spec.max_age.as_millis()).unwrap_or(i64::MAX);
        let id = self.tx.query_row(
            "INSERT INTO streams (name, subjects, max_age_ms) VALUES (?1, ?2, ?3) \
             ON CONFLICT (name) DO UPDATE SET subjects = excluded.subjects, max_age_ms = excluded.max_age_ms \
             RETURNING id",
            (spec.name, spec.subjects.join(" "), max_age_ms),
            |row| row.get(0),
        )?;
        let stream = self.mirror.streams.entry(spec.name.to_owned()).or_insert_with(|| Stream {
            id,
            patterns: Vec::new(),
            max_age_ms,
            last: 0,
            oldest_at_ms: None,
            recent: Recent::default(),
            subjects: BTreeMap::new(),
        });
        stream.patterns = spec.subjects.iter().map(ToString::to_string).collect();
        stream.max_age_ms = max_age_ms;
        Ok(())
    }

    /// Makes or updates a consumer; `None` when there is no such stream.
    pub(super) fn open_consumer(&mut self, spec: &ConsumerSpec) -> Result<Option<i64>> {
        let Some(stream) = self.mirror.streams.get(spec.stream) else { return Ok(None) };
        let id = self.tx.query_row(
            "INSERT INTO consumers (stream, name, filter, ack_wait_ms, max_attempts, max_pending, cursor) \
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, 0) \
             ON CONFLICT (stream, name) DO UPDATE SET filter = excluded.filter, ack_wait_ms = excluded.ack_wait_ms, \
             max_attempts = excluded.max_attempts, max_pending = excluded.max_pending RETURNING id",
            params![
                stream.id,
                spec.name,
                spec.filter,
                spec.ack_wait.as_millis() as i64,
                spec.max_attempts,
                i64::try_from(spec.max_pending).unwrap_or(i64::MAX),
            ],
            |row| row.get(0),
        )?;
        let consumer = self.mirror.consumers.entry(id).or_insert_with(|| Consumer {
            stream: spec.stream.to_owned(),
            name: spec.name.clone(),
            filter: String::new(),
            ack_wait: Duration::ZERO,
            max_attempts: None,
            max_pending: 0,
            cursor: 0,
            pending: BTreeMap::new(),
            due: BTreeSet::new(),
        });
        consumer.filter = spec.filter.clone();
        consumer.ack_wait = spec.ack_wait;
        consumer.max_attempts = spec.max_attempts;
        consumer.max_pending = spec.max_pending;
        self.wake.insert(id);
        Ok(Some(id))
    }

    pub(super) fn publish(
        &mut self,
        name: &str,
        messages: Vec<Message>,
    ) -> Result<Vec<std::result::Result<Published, Error>>> {
        let Self { tx, mirror, now_ms, now, wake, .. } = self;
        let refused = |message: String| Error::Refused { operation: "publish", message };
        let Some(stream) = mirror.streams.get_mut(name) else {
            return Ok(messages.iter().map(|_| Err(refused(format!("there is no stream {name}")))).collect());
        };
        let mut insert = tx.prepare_cached(
            "INSERT INTO messages (stream, seq, subject, nth, id, headers, payload, at_ms) \
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
        )?;
        let (before, mut subjects) = (stream.last, BTreeSet::new());
        let mut results = Vec::with_capacity(messages.len());
        for message in messages {
            if !stream.accepts(&message.subject) {
                results.push(Err(refused(format!("{name} does not keep the subject {}", message.subject))));
                continue;
            }
            if let Some(sequence) = stream.recent.find(&message.id) {
                results.push(Ok(Published { sequence, duplicate: true }));
                continue;
            }
            if !stream.subjects.contains_key(&message.subject) {
                let id = tx.query_row(
                    "INSERT INTO subjects (stream, name) VALUES (?1, ?2) RETURNING id",
                    (stream.id, &message.subject),
                    |row| row.get(0),
                )?;
                stream.subjects.insert(message.subject.clone(), Subject { id, last: 0, count: 0 });
            }
            let subject = stream.subjects.get_mut(&message.subject).expect("it was just inserted");
            stream.last += 1;
            subject.last = stream.last;
            subject.count += 1;
            stream.recent.remember(*now, &message.id, stream.last);
            results.push(Ok(Published { sequence: stream.last, duplicate: false }));
            let (headers, payload) = (json(&message.headers), message.payload.as_ref());
            insert.execute(params![
                stream.id,
                stream.last,
                subject.id,
                subject.count,
                message.id,
                headers,
                payload,
                *now_ms
            ])?;
            if !subjects.contains(&message.subject) {
                subjects.insert(message.subject);
            }
        }
        let published = stream.last - before;
        if published == 0 {
            return Ok(results);
        }

        stream.oldest_at_ms.get_or_insert(*now_ms);
        tx.prepare_cached("UPDATE streams SET last = ?2 WHERE id = ?1")?.execute((stream.id, stream.last))?;
        for (id, consumer) in mirror.consumers.iter().filter(|(_, c)| c.stream == name) {
            if subjects.iter().any(|subject| matches(&consumer.filter, subject)) {
                wake.insert(*id);
            }
        }
        metrics::counter!("seckill_bus_published_total", "stream" => name.to_owned()).increment(published);
        Ok(results)
    }

    /// Settles what is still pending; what was settled before is left alone.
    pub(super) fn settle(&mut self, id: i64, settlements: Vec<(Delivery, Settlement)>) -> Result<()> {
        let Some(consumer) = self.mirror.consumers.get_mut(&id) else { return Ok(()) };
        let (mut done, mut dead) = (Vec::new(), Vec::new());
        for (delivery, settlement) in settlements {
            let seq = delivery.sequence;
            let Some(attempt) = consumer.pending.get(&seq).map(|p| p.attempt) else { continue };
            let reason = match settlement {
                Settlement::Ack => None,
                Settlement::DeadLetter(reason) => Some(reason),
                // It came back and is in other hands, which will settle it.
                Settlement::Nak(_) if delivery.attempt != attempt => continue,
                Settlement::Nak(_) if consumer.is_last(attempt) => Some(ATTEMPTS_USED_UP.to_owned()),
                Settlement::Nak(delay) => {
                    consumer.put(seq, attempt, self.now + delay);
                    continue;
                }
            };
            done.push(seq);
            dead.extend(reason.map(|reason| (delivery, attempt, reason)));
        }
        self.wake.insert(id);
        for (delivery, attempts, reason) in dead {
            self.bury(id, delivery, attempts, reason)?;
        }
        self.forget(id, &done)
    }

    /// Up to `max` deliveries: first what is due again, then what was never delivered, as far as the window allows.
    pub(super) fn fetch(&mut self, id: i64, max: usize) -> Result<Fetched> {
        let nothing = Fetched { deliveries: Vec::new(), buried: false, next_due: None };
        let Some(consumer) = self.mirror.consumers.get(&id) else { return Ok(nothing) };
        let Some(stream) = self.mirror.streams.get(&consumer.stream) else { return Ok(nothing) };
        let (stream_id, stream_last) = (stream.id, stream.last);

        let due: Vec<u64> = consumer.due.range(..=(self.now, u64::MAX)).take(max).map(|(_, seq)| *seq).collect();
        let room = (max - due.len()).min(consumer.max_pending.saturating_sub(consumer.pending.len()));
        let mut fresh: Vec<u64> = Vec::new();
        if room > 0 {
            let mut of_subject = self
                .tx
                .prepare_cached("SELECT seq FROM messages WHERE subject = ?1 AND seq > ?2 ORDER BY seq LIMIT ?3")?;
            for subject in stream.undelivered(consumer) {
                for seq in of_subject.query_map((subject.id, consumer.cursor, room), |row| row.get(0))? {
                    fresh.push(seq?);
                }
            }
            fresh.sort_unstable();
            fresh.truncate(room);
        }

        let mut messages = self.load(stream_id, due.iter().chain(&fresh))?;
        let consumer = self.mirror.consumers.get_mut(&id).expect("it was there a moment ago");
        let due_again = self.now + consumer.ack_wait;
        let (mut deliveries, mut again) = (Vec::with_capacity(messages.len()), Vec::new());
        let (mut gone, mut spent) = (Vec::new(), Vec::new());
        for seq in due {
            let attempt = consumer.pending[&seq].attempt;
            match messages.remove(&seq) {
                // Dropped for its age while it was pending.
                None => gone.push(seq),
                Some(delivery) if consumer.is_last(attempt) => spent.push((delivery, attempt)),
                Some(mut delivery) => {
                    delivery.attempt = attempt + 1;
                    consumer.put(seq, delivery.attempt, due_again);
                    deliveries.push(delivery);
                    again.push(seq);
                }
            }
        }
        if room > 0 {
            // With room left there is nothing more for this consumer in the whole stream.
            consumer.cursor = if fresh.len() < room { stream_last } else { fresh[fresh.len() - 1] };
        }
        let cursor = consumer.cursor;
        for seq in &fresh {
            consumer.put(*seq, 1, due_again);
            deliveries.extend(messages.remove(seq));
        }

        if !again.is_empty() {
            let mut update =
                self.tx.prepare_cached("UPDATE pending SET attempt = attempt + 1 WHERE consumer = ?1 AND seq = ?2")?;
            for seq in again {
                update.execute((id, seq))?;
            }
        }
        if !fresh.is_empty() {
            let mut insert =
                self.tx.prepare_cached("INSERT INTO pending (consumer, seq, attempt) VALUES (?1, ?2, 1)")?;
            for seq in fresh {
                insert.execute((id, seq))?;
            }
            self.tx.prepare_cached("UPDATE consumers SET cursor = ?2 WHERE id = ?1")?.execute((id, cursor))?;
        }
        let buried = !spent.is_empty();
        for (delivery, attempts) in spent {
            gone.push(delivery.sequence);
            self.bury(id, delivery, attempts, ATTEMPTS_USED_UP.to_owned())?;
        }
        self.forget(id, &gone)?;
        let next_due = self.mirror.consumers[&id].due.first().map(|(at, _)| *at);
        Ok(Fetched { deliveries, buried, next_due })
    }

    /// Publishes a dead letter again and forgets it.
    pub(super) fn redrive(&mut self, id: &str) -> Result<Option<std::result::Result<DeadLetter, Error>>> {
        let found = self.tx.query_row(
            "SELECT id, subject, message_id, attempts, reason, payload, at_ms, n, stream, headers \
             FROM dead_letters WHERE id = ?1",
            (id,),
            |row| Ok((dead_letter(row)?, row.get::<_, i64>(7)?, row.get::<_, String>(8)?, headers(row, 9)?)),
        );
        let Some((letter, n, stream, headers)) = found.optional()? else { return Ok(None) };
        let message = Message {
            subject: letter.subject.clone(),
            id: format!("{}/redrive-{n}", letter.message_id),
            headers,
            payload: letter.payload.clone(),
        };
        if let Some(Err(error)) = self.publish(&stream, vec![message])?.pop() {
            return Ok(Some(Err(error)));
        }
        self.tx.execute("DELETE FROM dead_letters WHERE n = ?1", (n,))?;
        Ok(Some(Ok(letter)))
    }

    /// Drops messages older than their stream's age, and ids older than the window.
    fn prune(&mut self) -> Result<()> {
        for stream in self.mirror.streams.values_mut() {
            stream.recent.expire(self.now);
            let oldest_kept = self.now_ms - stream.max_age_ms;
            if stream.oldest_at_ms.is_none_or(|at| at > oldest_kept) {
                continue;
            }
            let mut delete = self.tx.prepare_cached(
                "DELETE FROM messages WHERE stream = ?1 AND at_ms <= ?2 \
                 AND seq IN (SELECT seq FROM messages WHERE stream = ?1 ORDER BY seq LIMIT ?3)",
            )?;
            delete.execute((stream.id, oldest_kept, PRUNE))?;
            stream.oldest_at_ms = oldest(&self.tx, stream.id)?;
        }
        Ok(())
    }

    fn load<'s>(&self, stream: i64, sequences: impl Iterator<Item = &'s u64>) -> Result<HashMap<u64, Delivery>> {
        let mut message = self.tx.prepare_cached(
            "SELECT (SELECT name FROM subjects s WHERE s.id = m.subject), id, headers, payload \
             FROM messages m WHERE stream = ?1 AND seq = ?2",
        )?;
        let mut found = HashMap::new();
        for sequence in sequences.copied() {
            let delivery = |row: &Row<'_>| {
                let payload: Vec<u8> = row.get(3)?;
                Ok(Delivery {
                    sequence,
                    attempt: 1,
                    subject: row.get(0)?,
                    id: row.get(1)?,
                    headers: headers(row, 2)?,
                    payload: payload.into(),
                    handle: Handle::default(),
                })
            };
            found.extend(message.query_row((stream, sequence), delivery).optional()?.map(|d| (sequence, d)));
        }
        Ok(found)
    }

    /// Puts a message among the dead letters. It must be forgotten in the same transaction.
    fn bury(&mut self, consumer: i64, delivery: Delivery, attempts: u32, reason: String) -> Result<()> {
        let Consumer { stream, name, .. } = &self.mirror.consumers[&consumer];
        tracing::warn!(stream, consumer = name, sequence = delivery.sequence, attempts, reason, "dead letter");
        self.tx.execute(
            "INSERT INTO dead_letters (id, stream, subject, message_id, headers, payload, attempts, reason, at_ms) \
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9) ON CONFLICT (id) DO NOTHING",
            params![
                format!("{stream}-{name}-{}", delivery.sequence),
                stream,
                delivery.subject,
                delivery.id,
                json(&delivery.headers),
                delivery.payload.as_ref(),
                attempts,
                reason,
                self.now_ms,
            ],
        )?;
        metrics::counter!("seckill_bus_dead_letters_total", "stream" => stream.clone(), "consumer" => name.clone())
            .increment(1);
        Ok(())
    }

    fn forget(&mut self, id: i64, sequences: &[u64]) -> Result<()> {
        if sequences.is_empty() {
            return Ok(());
        }
        if let Some(consumer) = self.mirror.consumers.get_mut(&id) {
            for seq in sequences {
                consumer.remove(*seq);
            }
        }
        let mut delete = self.tx.prepare_cached("DELETE FROM pending WHERE consumer = ?1 AND seq = ?2")?;
        for seq in sequences {
            delete.execute((id, seq))?;
        }
        Ok(())
    }
}

/// The first seven columns of a row of `dead_letters`, as all queries select them.
fn dead_letter(row: &Row<'_>) -> Result<DeadLetter> {
    let payload: Vec<u8> = row.get(5)?;
    Ok(DeadLetter {
        id: row.get(0)?,
        subject: row.get(1)?,
        message_id: row.get(2)?,
        attempts: row.get(3)?,
        reason: row.get(4)?,
        payload: payload.into(),
        at_ms: row.get(6)?,
    })
}

fn oldest(connection: &Connection, stream: i64) -> Result<Option<i64>> {
    connection
        .prepare_cached("SELECT at_ms FROM messages WHERE stream = ?1 ORDER BY seq LIMIT 1")?
        .query_row((stream,), |row| row.get(0))
        .optional()
}

/// The ids of messages that were published within the window, as far as the wall clock knows. They are remembered for
/// a whole window from now.
fn recent(connection: &Connection, stream: i64, now_ms: i64) -> Result<Recent> {
    let since = now_ms - WINDOW.as_millis() as i64;
    let mut recent = Recent::default();
    let now = Instant::now();
    let mut newest_first =
        connection.prepare("SELECT seq, id, at_ms FROM messages WHERE stream = ?1 ORDER BY seq DESC")?;
    for message in newest_first.query_map((stream,), |row| row.try_into())? {
        let (seq, id, at_ms): (u64, String, i64) = message?;
        if at_ms < since {
            break;
        }
        recent.remember(now, &id, seq);
    }
    Ok(recent)
}

fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).expect("strings have a JSON form")
}

fn headers(row: &Row<'_>, column: usize) -> Result<Headers> {
    let decoded = serde_json::from_str(row.get_ref(column)?.as_str()?);
    decoded.map_err(|error| rusqlite::Error::FromSqlConversionFailure(column, Type::Text, error.into()))
}

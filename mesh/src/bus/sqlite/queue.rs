//! The queue in its file: SQL for what must survive, a mirror in memory for what decides quickly.
//!
//! The mirror holds the streams, their subjects, the consumers and their pending messages, never a message itself; its
//! size is bounded by the sum of the consumers' `max_pending` and the ids of two minutes. Everything goes through one [`Session`] at a time, which
//! is one transaction. A session that ends without [`Session::commit`] rolls back and leaves the mirror untrusted: it
//! is read from the file again before the next use. Only the due times, which the file does not know, are then kept.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::Duration,
};

use futures::TryStreamExt;
use sea_orm::sqlx::{
    self, AssertSqlSafe, Connection, Sqlite, SqliteConnection, Transaction, query, query_as, query_scalar,
    sqlite::SqliteConnectOptions,
};
use tokio::time::Instant;

use super::recent::{Recent, WINDOW};
use crate::{
    bus::{
        ATTEMPTS_USED_UP, ConsumerSpec, DeadLetter, Delivery, Error, Handle, Headers, Message, Progress, Published,
        Settlement, StreamSpec, matches,
    },
    clock::Clock,
};

/// Rows of one INSERT at most. Chunks are powers of two, so that a handful of prepared statements serves every size.
const MAX_ROWS: usize = 64;

/// Messages dropped for their age in one transaction at most, beside what a transaction publishes.
const PRUNE: i64 = 2_000;

type Result<T> = sqlx::Result<T>;

/// The connection and its mirror.
#[derive(Debug)]
pub(super) struct Queue {
    options: SqliteConnectOptions,
    connection: SqliteConnection,
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
    tx: Transaction<'q, Sqlite>,
    mirror: &'q mut Mirror,
    trusted: &'q mut bool,
    now_ms: i64,
    now: Instant,
    wake: BTreeSet<i64>,
}

impl Queue {
    /// Opens the file, makes the tables where they are missing, and reads the mirror.
    pub(super) async fn open(options: SqliteConnectOptions, clock: Clock) -> Result<Self> {
        let mut connection = SqliteConnection::connect_with(&options).await?;
        sqlx::raw_sql(include_str!("schema.sql")).execute(&mut connection).await?;
        let mirror = Mirror::read(&mut connection, &mut Mirror::default(), clock.now_ms()).await?;
        Ok(Self { options, connection, mirror, trusted: true, clock })
    }

    /// Starts a transaction. Drops what is too old, so that nothing else need think of it.
    pub(super) async fn begin(&mut self) -> Result<Session<'_>> {
        self.trust().await?;
        self.trusted = false;
        let mut session = Session {
            tx: self.connection.begin().await?,
            mirror: &mut self.mirror,
            trusted: &mut self.trusted,
            now_ms: self.clock.now_ms(),
            now: Instant::now(),
            wake: BTreeSet::new(),
        };
        session.prune().await?;
        Ok(session)
    }

    async fn trust(&mut self) -> Result<()> {
        if !self.trusted {
            // Answered after a rollback that was only asked for. When there is no room SQLite rolls back by itself, and
            // its driver would take what comes for parts of a transaction that nobody ever commits.
            self.connection.ping().await?;
            if self.connection.is_in_transaction() {
                let fresh = SqliteConnection::connect_with(&self.options).await?;
                std::mem::replace(&mut self.connection, fresh).close_hard().await?;
            }
            self.mirror = Mirror::read(&mut self.connection, &mut self.mirror, self.clock.now_ms()).await?;
            self.trusted = true;
        }
        Ok(())
    }

    pub(super) async fn consumers(&mut self, stream: &str) -> Result<Vec<String>> {
        self.trust().await?;
        let of_stream = self.mirror.consumers.values().filter(|c| c.stream == stream);
        Ok(of_stream.map(|c| c.name.clone()).collect())
    }

    pub(super) async fn progress(&mut self, stream: &str, consumer: &str) -> Result<Option<Progress>> {
        self.trust().await?;
        let Mirror { streams, consumers } = &self.mirror;
        let found = consumers.values().find(|c| c.stream == stream && c.name == consumer);
        let (Some(stream), Some(consumer)) = (streams.get(stream), found) else { return Ok(None) };
        let (mut waiting, mut first_waiting) = (0, None::<u64>);
        for subject in stream.undelivered(consumer) {
            let next: Option<(i64, i64)> =
                query_as("SELECT seq, nth FROM messages WHERE subject = ?1 AND seq > ?2 ORDER BY seq LIMIT 1")
                    .bind(subject.id)
                    .bind(consumer.cursor as i64)
                    .fetch_optional(&mut self.connection)
                    .await?;
            if let Some((seq, nth)) = next {
                waiting += subject.count - nth as u64 + 1;
                first_waiting = Some(first_waiting.map_or(seq as u64, |first| first.min(seq as u64)));
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

    pub(super) async fn last_sequence(&mut self, stream: &str) -> Result<u64> {
        self.trust().await?;
        Ok(self.mirror.streams.get(stream).map_or(0, |s| s.last))
    }

    pub(super) async fn message(&mut self, stream: &str, sequence: u64) -> Result<Option<Message>> {
        self.trust().await?;
        let Some(stream) = self.mirror.streams.get(stream) else { return Ok(None) };
        let row: Option<(String, String, String, Vec<u8>)> = query_as(
            "SELECT (SELECT name FROM subjects s WHERE s.id = m.subject), id, headers, payload FROM messages m \
             WHERE stream = ?1 AND seq = ?2 AND at_ms > ?3",
        )
        .bind(stream.id)
        .bind(sequence as i64)
        .bind(self.clock.now_ms() - stream.max_age_ms)
        .fetch_optional(&mut self.connection)
        .await?;
        row.map(|(subject, id, headers, payload)| {
            Ok(Message { subject, id, headers: decode_headers(&headers)?, payload: payload.into() })
        })
        .transpose()
    }

    pub(super) async fn dead_letters(&mut self, after: Option<&str>, limit: usize) -> Result<Vec<DeadLetter>> {
        let rows: Vec<DeadLetterRow> = query_as(
            "SELECT id, subject, message_id, attempts, reason, payload, at_ms FROM dead_letters \
             WHERE n > COALESCE((SELECT n FROM dead_letters WHERE id = ?1), 0) ORDER BY n LIMIT ?2",
        )
        .bind(after)
        .bind(i64::try_from(limit).unwrap_or(i64::MAX))
        .fetch_all(&mut self.connection)
        .await?;
        Ok(rows.into_iter().map(dead_letter).collect())
    }
}

impl Mirror {
    /// Reads everything from the file. What `before` knew and the file does not is kept: due times (without them, what
    /// is pending is due at once) and the age of ids.
    async fn read(connection: &mut SqliteConnection, before: &mut Mirror, now_ms: i64) -> Result<Self> {
        let mut mirror = Mirror::default();
        let mut names = HashMap::new();
        let streams: Vec<(i64, String, String, i64, i64)> =
            query_as("SELECT id, name, subjects, max_age_ms, last FROM streams").fetch_all(&mut *connection).await?;
        for (id, name, subjects, max_age_ms, last) in streams {
            let mut stream = Stream {
                id,
                patterns: subjects.split(' ').map(str::to_owned).collect(),
                max_age_ms,
                last: last as u64,
                oldest_at_ms: oldest(&mut *connection, id).await?,
                recent: match before.streams.contains_key(&name) {
                    true => Recent::default(),
                    false => recent(&mut *connection, id, now_ms).await?,
                },
                subjects: BTreeMap::new(),
            };
            let subjects: Vec<(i64, String)> = query_as("SELECT id, name FROM subjects WHERE stream = ?1")
                .bind(id)
                .fetch_all(&mut *connection)
                .await?;
            for (id, name) in subjects {
                let newest: Option<(i64, i64)> =
                    query_as("SELECT seq, nth FROM messages WHERE subject = ?1 ORDER BY seq DESC LIMIT 1")
                        .bind(id)
                        .fetch_optional(&mut *connection)
                        .await?;
                let (last, count) = newest.unwrap_or_default();
                stream.subjects.insert(name, Subject { id, last: last as u64, count: count as u64 });
            }
            names.insert(id, name.clone());
            mirror.streams.insert(name, stream);
        }
        let consumers: Vec<ConsumerRow> =
            query_as("SELECT id, stream, name, filter, ack_wait_ms, max_attempts, max_pending, cursor FROM consumers")
                .fetch_all(&mut *connection)
                .await?;
        for (id, stream, name, filter, ack_wait_ms, max_attempts, max_pending, cursor) in consumers {
            let Some(stream) = names.get(&stream) else { continue };
            let mut consumer = Consumer {
                stream: stream.clone(),
                name,
                filter,
                ack_wait: Duration::from_millis(ack_wait_ms as u64),
                max_attempts,
                max_pending: max_pending as usize,
                cursor: cursor as u64,
                pending: BTreeMap::new(),
                due: BTreeSet::new(),
            };
            let pending: Vec<(i64, u32)> = query_as("SELECT seq, attempt FROM pending WHERE consumer = ?1")
                .bind(id)
                .fetch_all(&mut *connection)
                .await?;
            let now = Instant::now();
            let known = before.consumers.get(&id).map(|c| &c.pending);
            for (seq, attempt) in pending {
                let due = known.and_then(|p| p.get(&(seq as u64))).map_or(now, |p| p.due);
                consumer.put(seq as u64, attempt, due);
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
    /// What SQLite does by itself then, and its driver does not know.
    #[cfg(test)]
    pub(super) async fn roll_back_as_when_there_is_no_room(&mut self) {
        sqlx::raw_sql("ROLLBACK").execute(&mut *self.tx).await.unwrap();
    }

    /// Makes it durable. Answers the consumers that may have something to fetch now.
    pub(super) async fn commit(self) -> Result<BTreeSet<i64>> {
        self.tx.commit().await?;
        *self.trusted = true;
        Ok(self.wake)
    }

    pub(super) async fn ensure_stream(&mut self, spec: &StreamSpec) -> Result<()> {
        let max_age_ms = i64::try_from(spec.max_age.as_millis()).unwrap_or(i64::MAX);
        let id: i64 = query_scalar(
            "INSERT INTO streams (name, subjects, max_age_ms) VALUES (?1, ?2, ?3) \
             ON CONFLICT (name) DO UPDATE SET subjects = excluded.subjects, max_age_ms = excluded.max_age_ms \
             RETURNING id",
        )
        .bind(spec.name)
        .bind(spec.subjects.join(" "))
        .bind(max_age_ms)
        .fetch_one(&mut *self.tx)
        .await?;
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
    pub(super) async fn open_consumer(&mut self, spec: &ConsumerSpec) -> Result<Option<i64>> {
        let Some(stream) = self.mirror.streams.get(spec.stream) else { return Ok(None) };
        let id: i64 = query_scalar(
            "INSERT INTO consumers (stream, name, filter, ack_wait_ms, max_attempts, max_pending, cursor) \
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, 0) \
             ON CONFLICT (stream, name) DO UPDATE SET filter = excluded.filter, ack_wait_ms = excluded.ack_wait_ms, \
             max_attempts = excluded.max_attempts, max_pending = excluded.max_pending RETURNING id",
        )
        .bind(stream.id)
        .bind(&spec.name)
        .bind(&spec.filter)
        .bind(spec.ack_wait.as_millis() as i64)
        .bind(spec.max_attempts)
        .bind(i64::try_from(spec.max_pending).unwrap_or(i64::MAX))
        .fetch_one(&mut *self.tx)
        .await?;
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

    pub(super) async fn publish(
        &mut self,
        name: &str,
        messages: Vec<Message>,
    ) -> Result<Vec<std::result::Result<Published, Error>>> {
        let Self { tx, mirror, now_ms, now, wake, .. } = self;
        let refused = |message: String| Error::Refused { operation: "publish", message };
        let Some(stream) = mirror.streams.get_mut(name) else {
            return Ok(messages.iter().map(|_| Err(refused(format!("there is no stream {name}")))).collect());
        };
        let mut results = Vec::with_capacity(messages.len());
        let mut rows = Vec::with_capacity(messages.len());
        let mut subjects = BTreeSet::new();
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
                let id = query_scalar("INSERT INTO subjects (stream, name) VALUES (?1, ?2) RETURNING id")
                    .bind(stream.id)
                    .bind(&message.subject)
                    .fetch_one(&mut **tx)
                    .await?;
                stream.subjects.insert(message.subject.clone(), Subject { id, last: 0, count: 0 });
            }
            let subject = stream.subjects.get_mut(&message.subject).expect("it was just inserted");
            stream.last += 1;
            subject.last = stream.last;
            subject.count += 1;
            if !subjects.contains(&message.subject) {
                subjects.insert(message.subject.clone());
            }
            stream.recent.remember(*now, &message.id, stream.last);
            results.push(Ok(Published { sequence: stream.last, duplicate: false }));
            rows.push((stream.last, subject.id, subject.count, message));
        }
        if rows.is_empty() {
            return Ok(results);
        }

        stream.oldest_at_ms.get_or_insert(*now_ms);
        let mut rest = rows.as_slice();
        while !rest.is_empty() {
            let (chunk, tail) = rest.split_at(prev_power_of_two(rest.len().min(MAX_ROWS)));
            rest = tail;
            let places = vec!["(?,?,?,?,?,?,?,?)"; chunk.len()].join(",");
            let mut insert = query(AssertSqlSafe(format!(
                "INSERT INTO messages (stream, seq, subject, nth, id, headers, payload, at_ms) VALUES {places}"
            )));
            for (seq, subject, nth, message) in chunk {
                insert = insert
                    .bind(stream.id)
                    .bind(*seq as i64)
                    .bind(subject)
                    .bind(*nth as i64)
                    .bind(&message.id)
                    .bind(json(&message.headers))
                    .bind(message.payload.as_ref())
                    .bind(*now_ms);
            }
            insert.execute(&mut **tx).await?;
        }
        query("UPDATE streams SET last = ?2 WHERE id = ?1")
            .bind(stream.id)
            .bind(stream.last as i64)
            .execute(&mut **tx)
            .await?;
        for (id, consumer) in mirror.consumers.iter().filter(|(_, c)| c.stream == name) {
            if subjects.iter().any(|subject| matches(&consumer.filter, subject)) {
                wake.insert(*id);
            }
        }
        metrics::counter!("seckill_bus_published_total", "stream" => name.to_owned()).increment(rows.len() as u64);
        Ok(results)
    }

    /// Settles what is still pending; what was settled before is left alone.
    pub(super) async fn settle(&mut self, id: i64, settlements: Vec<(Delivery, Settlement)>) -> Result<()> {
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
            self.bury(id, delivery, attempts, reason).await?;
        }
        self.forget(id, &done).await
    }

    /// Up to `max` deliveries: first what is due again, then what was never delivered, as far as the window allows.
    pub(super) async fn fetch(&mut self, id: i64, max: usize) -> Result<Fetched> {
        let nothing = Fetched { deliveries: Vec::new(), buried: false, next_due: None };
        let Some(consumer) = self.mirror.consumers.get(&id) else { return Ok(nothing) };
        let Some(stream) = self.mirror.streams.get(&consumer.stream) else { return Ok(nothing) };
        let (stream_id, stream_last) = (stream.id, stream.last);

        let due: Vec<u64> = consumer.due.range(..=(self.now, u64::MAX)).take(max).map(|(_, seq)| *seq).collect();
        let room = (max - due.len()).min(consumer.max_pending.saturating_sub(consumer.pending.len()));
        let mut fresh: Vec<u64> = Vec::new();
        if room > 0 {
            for subject in stream.undelivered(consumer) {
                let of_subject: Vec<i64> =
                    query_scalar("SELECT seq FROM messages WHERE subject = ?1 AND seq > ?2 ORDER BY seq LIMIT ?3")
                        .bind(subject.id)
                        .bind(consumer.cursor as i64)
                        .bind(room as i64)
                        .fetch_all(&mut *self.tx)
                        .await?;
                fresh.extend(of_subject.into_iter().map(|seq| seq as u64));
            }
            fresh.sort_unstable();
            fresh.truncate(room);
        }

        let mut messages = self.load(stream_id, due.iter().chain(&fresh)).await?;
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
            query(
                "UPDATE pending SET attempt = attempt + 1 \
                 WHERE consumer = ?1 AND seq IN (SELECT value FROM json_each(?2))",
            )
            .bind(id)
            .bind(json(&again))
            .execute(&mut *self.tx)
            .await?;
        }
        if !fresh.is_empty() {
            query("INSERT INTO pending (consumer, seq, attempt) SELECT ?1, value, 1 FROM json_each(?2)")
                .bind(id)
                .bind(json(&fresh))
                .execute(&mut *self.tx)
                .await?;
            query("UPDATE consumers SET cursor = ?2 WHERE id = ?1")
                .bind(id)
                .bind(cursor as i64)
                .execute(&mut *self.tx)
                .await?;
        }
        let buried = !spent.is_empty();
        for (delivery, attempts) in spent {
            gone.push(delivery.sequence);
            self.bury(id, delivery, attempts, ATTEMPTS_USED_UP.to_owned()).await?;
        }
        self.forget(id, &gone).await?;
        let next_due = self.mirror.consumers[&id].due.first().map(|(at, _)| *at);
        Ok(Fetched { deliveries, buried, next_due })
    }

    /// Publishes a dead letter again and forgets it.
    pub(super) async fn redrive(&mut self, id: &str) -> Result<Option<std::result::Result<DeadLetter, Error>>> {
        let found: Option<(i64, String, String)> =
            query_as("SELECT n, stream, headers FROM dead_letters WHERE id = ?1")
                .bind(id)
                .fetch_optional(&mut *self.tx)
                .await?;
        let Some((n, stream, headers)) = found else { return Ok(None) };
        let row: DeadLetterRow =
            query_as("SELECT id, subject, message_id, attempts, reason, payload, at_ms FROM dead_letters WHERE n = ?1")
                .bind(n)
                .fetch_one(&mut *self.tx)
                .await?;
        let letter = dead_letter(row);
        let message = Message {
            subject: letter.subject.clone(),
            id: format!("{}/redrive-{n}", letter.message_id),
            headers: decode_headers(&headers)?,
            payload: letter.payload.clone(),
        };
        if let Some(Err(error)) = self.publish(&stream, vec![message]).await?.pop() {
            return Ok(Some(Err(error)));
        }
        query("DELETE FROM dead_letters WHERE n = ?1").bind(n).execute(&mut *self.tx).await?;
        Ok(Some(Ok(letter)))
    }

    /// Drops messages older than their stream's age, and ids older than the window.
    async fn prune(&mut self) -> Result<()> {
        for stream in self.mirror.streams.values_mut() {
            stream.recent.expire(self.now);
            let oldest_kept = self.now_ms - stream.max_age_ms;
            if stream.oldest_at_ms.is_none_or(|at| at > oldest_kept) {
                continue;
            }
            query(
                "DELETE FROM messages WHERE stream = ?1 AND at_ms <= ?2 \
                 AND seq IN (SELECT seq FROM messages WHERE stream = ?1 ORDER BY seq LIMIT ?3)",
            )
            .bind(stream.id)
            .bind(oldest_kept)
            .bind(PRUNE)
            .execute(&mut *self.tx)
            .await?;
            stream.oldest_at_ms = oldest(&mut self.tx, stream.id).await?;
        }
        Ok(())
    }

    async fn load(&mut self, stream: i64, sequences: impl Iterator<Item = &u64>) -> Result<HashMap<u64, Delivery>> {
        let sequences: Vec<u64> = sequences.copied().collect();
        if sequences.is_empty() {
            return Ok(HashMap::new());
        }
        let rows: Vec<(i64, String, String, String, Vec<u8>)> = query_as(
            "SELECT seq, (SELECT name FROM subjects s WHERE s.id = m.subject), id, headers, payload \
             FROM messages m WHERE stream = ?1 AND seq IN (SELECT value FROM json_each(?2))",
        )
        .bind(stream)
        .bind(json(&sequences))
        .fetch_all(&mut *self.tx)
        .await?;
        let deliveries = rows.into_iter().map(|(seq, subject, id, headers, payload)| {
            let headers = decode_headers(&headers)?;
            let (sequence, handle) = (seq as u64, Handle::default());
            Ok((sequence, Delivery { sequence, attempt: 1, subject, id, headers, payload: payload.into(), handle }))
        });
        deliveries.collect()
    }

    /// Puts a message among the dead letters. It must be forgotten in the same transaction.
    async fn bury(&mut self, consumer: i64, delivery: Delivery, attempts: u32, reason: String) -> Result<()> {
        let Consumer { stream, name, .. } = &self.mirror.consumers[&consumer];
        tracing::warn!(stream, consumer = name, sequence = delivery.sequence, attempts, reason, "dead letter");
        query(
            "INSERT INTO dead_letters (id, stream, subject, message_id, headers, payload, attempts, reason, at_ms) \
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9) ON CONFLICT (id) DO NOTHING",
        )
        .bind(format!("{stream}-{name}-{}", delivery.sequence))
        .bind(stream)
        .bind(&delivery.subject)
        .bind(&delivery.id)
        .bind(json(&delivery.headers))
        .bind(delivery.payload.as_ref())
        .bind(attempts)
        .bind(reason)
        .bind(self.now_ms)
        .execute(&mut *self.tx)
        .await?;
        metrics::counter!("seckill_bus_dead_letters_total", "stream" => stream.clone(), "consumer" => name.clone())
            .increment(1);
        Ok(())
    }

    async fn forget(&mut self, id: i64, sequences: &[u64]) -> Result<()> {
        if sequences.is_empty() {
            return Ok(());
        }
        if let Some(consumer) = self.mirror.consumers.get_mut(&id) {
            for seq in sequences {
                consumer.remove(*seq);
            }
        }
        query("DELETE FROM pending WHERE consumer = ?1 AND seq IN (SELECT value FROM json_each(?2))")
            .bind(id)
            .bind(json(&sequences))
            .execute(&mut *self.tx)
            .await?;
        Ok(())
    }
}

/// A row of `consumers` as it is read back.
type ConsumerRow = (i64, i64, String, String, i64, Option<u32>, i64, i64);

/// A row of `dead_letters` as the two queries select it.
type DeadLetterRow = (String, String, String, u32, String, Vec<u8>, i64);

fn dead_letter((id, subject, message_id, attempts, reason, payload, at_ms): DeadLetterRow) -> DeadLetter {
    DeadLetter { id, subject, message_id, attempts, reason, payload: payload.into(), at_ms }
}

async fn oldest(connection: &mut SqliteConnection, stream: i64) -> Result<Option<i64>> {
    query_scalar("SELECT at_ms FROM messages WHERE stream = ?1 ORDER BY seq LIMIT 1")
        .bind(stream)
        .fetch_optional(connection)
        .await
}

/// The ids of messages that were published within the window, as far as the wall clock knows. They are remembered for
/// a whole window from now.
async fn recent(connection: &mut SqliteConnection, stream: i64, now_ms: i64) -> Result<Recent> {
    let since = now_ms - WINDOW.as_millis() as i64;
    let mut recent = Recent::default();
    let now = Instant::now();
    let mut newest_first =
        query_as::<_, (i64, String, i64)>("SELECT seq, id, at_ms FROM messages WHERE stream = ?1 ORDER BY seq DESC")
            .bind(stream)
            .fetch(connection);
    while let Some((seq, id, at_ms)) = newest_first.try_next().await? {
        if at_ms < since {
            break;
        }
        recent.remember(now, &id, seq as u64);
    }
    Ok(recent)
}

/// A whole list as one bound parameter: one statement for every length.
fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).expect("strings and numbers have a JSON form")
}

fn decode_headers(text: &str) -> Result<Headers> {
    serde_json::from_str(text).map_err(|e| sqlx::Error::Decode(e.into()))
}

fn prev_power_of_two(n: usize) -> usize {
    1 << n.ilog2()
}

//! The bus: durable streams and fleeting signals, behind one trait.
//!
//! [`sqlite`] is the embedded one, [`nats`] the real one (JetStream and core NATS), `memory` one for tests that hold
//! time still; `contract` has the tests that all of them must pass. What every implementation promises:
//!
//! - **Publish** is durable when it returns `Ok`, and deduplicated by message id for at least two minutes: a second
//!   publish answers the first one's sequence with `duplicate` set. An error means *unknown*: the message may be there.
//! - **Consumers** are durable and pulled. Every message is delivered at least once to each consumer, in order of
//!   sequence for first deliveries, until it is acknowledged, dead-lettered, or its attempts are used up, which
//!   dead-letters it too. A message neither settled nor redelivered comes back after `ack_wait`.
//! - A **NAK with delay** brings a message back not before the delay, as long as the server lives; after a restart it
//!   may come back at once. Compute delays from data, never from the delivery. It counts as pending meanwhile. It
//!   does not count as a failed attempt only where `max_attempts` is `None`; a NAK of the last attempt dead-letters.
//! - **Signals** reach whoever listens now, at most once, in order per publisher. Nothing may rest on them alone.
//!
//! Everything is in batches: the cost is per call.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use proto::subjects;
use tokio::sync::broadcast;

#[cfg(any(test, feature = "testing"))]
pub mod contract;
#[cfg(any(test, feature = "testing"))]
pub mod memory;
pub mod nats;
pub mod sqlite;

/// Why a message became a dead letter when nobody said why.
const ATTEMPTS_USED_UP: &str = "all attempts used up";

/// Signals that wait for a slow listener; it loses the oldest beyond that.
const SIGNALS_KEPT: usize = 1_024;

/// Any bus.
pub type SharedBus = Arc<dyn Bus>;

/// Headers travel with a message: trace context, and why it became a dead letter.
pub type Headers = BTreeMap<String, String>;

/// A stream and the subjects it keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamSpec {
    /// Its name, e.g. `ORDERS`.
    pub name: &'static str,
    /// Subject patterns; `>` matches the rest, `*` one token.
    pub subjects: Vec<&'static str>,
    /// Messages older than this are dropped, consumed or not.
    pub max_age: Duration,
}

impl From<subjects::Stream> for StreamSpec {
    fn from(stream: subjects::Stream) -> Self {
        Self { name: stream.name, subjects: vec![stream.subject], max_age: stream.kept_for }
    }
}

/// A message to publish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Where to; must match a subject of the stream.
    pub subject: String,
    /// The dedupe key within the stream.
    pub id: String,
    /// Travels along.
    pub headers: Headers,
    /// The body.
    pub payload: Bytes,
}

/// What a publish came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Published {
    /// The message's place in the stream; the first one's when it is a duplicate.
    pub sequence: u64,
    /// The same id was published before.
    pub duplicate: bool,
}

/// A durable consumer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConsumerSpec {
    /// The stream.
    pub stream: &'static str,
    /// Its name; two processes with the same name share the work.
    pub name: String,
    /// Which of the stream's subjects.
    pub filter: String,
    /// An unsettled delivery comes back after this.
    pub ack_wait: Duration,
    /// Deliveries of one message before it is dead-lettered; `None`: for ever.
    pub max_attempts: Option<u32>,
    /// How many messages may be delivered and not settled, delayed ones included. Nothing more is delivered beyond it.
    pub max_pending: usize,
}

/// A message as it was delivered.
#[derive(Clone, Debug)]
pub struct Delivery {
    /// Its place in the stream.
    pub sequence: u64,
    /// Which delivery this is; the first is 1.
    pub attempt: u32,
    /// Where it was published.
    pub subject: String,
    /// Its dedupe key.
    pub id: String,
    /// Its headers.
    pub headers: Headers,
    /// Its body.
    pub payload: Bytes,
    /// The implementation's own handle for settling.
    pub(crate) handle: Handle,
}

/// What an implementation needs to settle a delivery.
#[derive(Clone, Debug, Default)]
pub(crate) struct Handle {
    /// JetStream's reply subject; empty where the sequence is enough.
    pub(crate) reply: String,
}

/// What became of a delivery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Settlement {
    /// Done; never again.
    Ack,
    /// Again, not before this delay.
    Nak(Duration),
    /// Never again; kept among the dead letters with this reason.
    DeadLetter(String),
}

/// How far a consumer has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Every matching message up to this sequence is settled for good.
    pub settled_through: u64,
    /// Matching messages not delivered yet. May lag behind a publish: nothing may rest on it but a gauge.
    pub waiting: u64,
    /// Delivered and not settled, delayed ones included. May lag like `waiting`.
    pub pending: u64,
}

/// A message that failed all its attempts, or was refused for good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadLetter {
    /// `{stream}-{consumer}-{sequence}`.
    pub id: String,
    /// Where it was published.
    pub subject: String,
    /// Its dedupe key.
    pub message_id: String,
    /// How often it was delivered.
    pub attempts: u32,
    /// Why it was given up.
    pub reason: String,
    /// Its body.
    pub payload: Bytes,
    /// When it was given up, Unix milliseconds.
    pub at_ms: i64,
}

/// The bus did not do it, or did not say that it did.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The server or file cannot be reached, or did not answer in time. The effect is unknown.
    #[error("bus: {operation} got no answer: {source}")]
    Unavailable {
        /// What was tried.
        operation: &'static str,
        /// The driver's error.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It was refused and had no effect: a fault of configuration or a bug.
    #[error("bus: {operation} was refused: {message}")]
    Refused {
        /// What was tried.
        operation: &'static str,
        /// What the server said.
        message: String,
    },
}

impl From<Error> for proto::Error {
    fn from(error: Error) -> Self {
        proto::Error::dependency("the message bus", error.to_string())
    }
}

/// Durable streams and fleeting signals. See the module for what is promised. A stream that nobody made yet reads as an
/// empty one; publishing to it or opening a consumer on it is refused or gets no answer.
#[async_trait]
pub trait Bus: Send + Sync + fmt::Debug {
    /// Makes a stream, or brings it in line with the spec. Idempotent.
    async fn ensure_stream(&self, spec: &StreamSpec) -> Result<(), Error>;

    /// Publishes a batch; one result per message, in order. A batch is not a transaction.
    async fn publish(&self, stream: &'static str, messages: Vec<Message>) -> Vec<Result<Published, Error>>;

    /// Opens a durable consumer, made where it is missing. It starts with the stream's first message.
    async fn consumer(&self, spec: ConsumerSpec) -> Result<Arc<dyn Consumer>, Error>;

    /// The names of a stream's consumers.
    async fn consumers(&self, stream: &'static str) -> Result<Vec<String>, Error>;

    /// How far a consumer has come; `None` when there is no such consumer.
    async fn progress(&self, stream: &'static str, consumer: &str) -> Result<Option<Progress>, Error>;

    /// The sequence of the stream's last message; 0 when it never had one.
    async fn last_sequence(&self, stream: &'static str) -> Result<u64, Error>;

    /// Reads one message; `None` when it is gone.
    async fn read(&self, stream: &'static str, sequence: u64) -> Result<Option<Message>, Error>;

    /// The dead letters of all streams, oldest first, at most `limit`, after the one with id `after`. From the oldest
    /// again where that one is gone: whoever redrives while paging sees a letter twice rather than never.
    async fn dead_letters(&self, after: Option<&str>, limit: usize) -> Result<Vec<DeadLetter>, Error>;

    /// Publishes a dead letter again (with a new message id, or it would count as a duplicate) and forgets it. Every
    /// consumer of the stream gets it, also those that had settled it. `None` when there is no such dead letter.
    async fn redrive(&self, id: &str) -> Result<Option<DeadLetter>, Error>;

    /// Sends a signal to whoever listens now.
    async fn signal(&self, subject: &'static str, payload: Bytes) -> Result<(), Error>;

    /// Listens to a signal from now on. A receiver that lags loses the oldest.
    async fn listen(&self, subject: &'static str) -> Result<broadcast::Receiver<Bytes>, Error>;
}

/// A durable consumer.
#[async_trait]
pub trait Consumer: Send + Sync + fmt::Debug {
    /// Up to `max` deliveries. Returns as soon as there is at least one, and empty after `wait`. Cancel-safe: what a
    /// dropped call had taken comes back after `ack_wait`.
    async fn fetch(&self, max: usize, wait: Duration) -> Result<Vec<Delivery>, Error>;

    /// Settles deliveries. On an error some may be settled; what is not comes back. Settling twice is harmless.
    async fn settle(&self, settlements: Vec<(Delivery, Settlement)>) -> Result<(), Error>;
}

/// Whether a subject falls under a pattern: `*` is one token, `>` at the end is one or more.
fn matches(pattern: &str, subject: &str) -> bool {
    let (mut pattern, mut subject) = (pattern.split('.'), subject.split('.'));
    loop {
        match (pattern.next(), subject.next()) {
            (Some(">"), Some(_)) | (None, None) => return true,
            (Some("*"), Some(_)) => {}
            (Some(expected), Some(token)) if expected == token => {}
            _ => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_is_one_token_and_an_arrow_the_rest() {
        for (pattern, subject, expected) in [
            ("a.b", "a.b", true),
            ("a.b", "a.b.c", false),
            ("a.b.c", "a.b", false),
            ("a.*", "a.b", true),
            ("a.*", "a", false),
            ("a.*", "a.b.c", false),
            ("*.b", "a.b", true),
            ("a.>", "a.b.c", true),
            ("a.>", "a", false),
            (">", "a", true),
        ] {
            assert_eq!(matches(pattern, subject), expected, "{pattern} {subject}");
        }
    }
}

//! The bus on NATS: streams in JetStream, signals in core NATS. Server 2.9 and later.
//!
//! What JetStream does not promise by itself, and what happens here instead:
//!
//! - **Silence.** Everything has a timeout; past it the outcome is unknown. The client reconnects for ever and may yet
//!   send what was already handed to it.
//! - **Reconnecting** costs no message. A delivery in hand can still be settled afterwards, and what was on its way to
//!   us comes back after `ack_wait`; a fetch may need up to [`PULL`] to notice that its request was lost. Signals sent
//!   meanwhile are lost. A restarted server forgets the delays of its NAKs, not the attempts.
//! - **Settling** is confirmed as received by the server, which writes it down a moment later: its crash can bring a
//!   settled message back.
//! - **Attempts** are counted by the server and judged here (`max_deliver` would drop the message in silence). A dead
//!   letter is stored in the stream `DEADLETTERS` before it is taken out of circulation, so a crash in
//!   between can deliver it once more, and cannot lose it.
//! - **Pulls.** A consumer's handle has one request open at a time and keeps it over several fetches. A request for each
//!   fetch would leave the old ones behind whenever the window is full, until the server refuses more.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use async_nats::{
    Client, ConnectOptions, HeaderMap, HeaderName, HeaderValue, Subscriber,
    jetstream::{
        self, AckKind, Context,
        context::PublishErrorKind,
        message::{PublishMessage, StreamMessage},
        stream::RawMessage,
    },
};
use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use serde_json::{Value, json};
use tokio::{
    sync::broadcast,
    time::{Instant, timeout, timeout_at},
};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};

use super::{
    ATTEMPTS_USED_UP, Bus, Consumer, ConsumerSpec, DeadLetter, Delivery, Error, Handle, Headers, Message, Progress,
    Published, SIGNALS_KEPT, Settlement, StreamSpec,
};

/// How long the server may take to answer anything.
const TIMEOUT: Duration = Duration::from_secs(5);

/// The server forgets message ids after this.
const DEDUPE: Duration = Duration::from_secs(120);

/// The longest pause before the next attempt to reach a server that is away.
const RECONNECT: Duration = Duration::from_millis(250);

/// How long a request for messages stays open at most, and so how long one that was lost can hold a fetch up.
const PULL: Duration = Duration::from_secs(5);

/// How long a fetch that has something waits for more while its request is still open, which is when the window is
/// full. Otherwise the server says when there is no more.
const LINGER: Duration = Duration::from_millis(5);

/// The least a fetch waits: the answer needs a round trip even where nobody wants to wait.
const ROUND_TRIP: Duration = Duration::from_millis(50);

const DEAD_LETTERS: &str = "DEADLETTERS";

const MESSAGE_ID: &str = "Nats-Msg-Id";
const EXPECTED_STREAM: &str = "Nats-Expected-Stream";
/// The server's own headers, which are not the message's.
const SERVERS_OWN: &str = "Nats-";

/// What a dead letter has beside the message's own headers.
const LETTERS_OWN: &str = "Dead-Letter-";
const SUBJECT: &str = "Dead-Letter-Subject";
const ORIGINAL_ID: &str = "Dead-Letter-Message-Id";
const STREAM: &str = "Dead-Letter-Stream";
const ATTEMPTS: &str = "Dead-Letter-Attempts";
const REASON: &str = "Dead-Letter-Reason";

/// The bus on NATS. See the module.
pub struct NatsBus {
    link: Link,
    signals: tokio::sync::Mutex<HashMap<&'static str, broadcast::Sender<Bytes>>>,
    tasks: TaskTracker,
    stop: CancellationToken,
    _stop_on_drop: DropGuard,
}

impl NatsBus {
    /// Connects to `url`, one or several servers separated by commas (`nats://[user:password@]host:port`). Fails when
    /// none answers now; later it reconnects for ever. `tasks` gets what listens to signals, until the bus is dropped.
    pub async fn connect(url: &str, tasks: &TaskTracker) -> Result<Self, Error> {
        let servers: Vec<&str> = url.split(',').map(str::trim).collect();
        let connecting = ConnectOptions::new()
            .connection_timeout(TIMEOUT)
            .request_timeout(Some(TIMEOUT))
            // A connection that died without a word is found out within two of these.
            .ping_interval(Duration::from_secs(10))
            .max_reconnects(None)
            // The driver's own delay doubles up to four seconds: an outage would last nearly twice as long for us.
            .reconnect_delay_callback(|attempts| RECONNECT.min(Duration::from_millis(1 << attempts.min(10))))
            .event_callback(|event| async move { tracing::info!(%event, "nats") })
            .connect(servers);
        let client = connecting.await.map_err(|e| unavailable("connect", e))?;
        let mut context = jetstream::new(client.clone());
        context.set_timeout(TIMEOUT);
        let stop = CancellationToken::new();
        let link = Link { client, context };
        link.ensure_stream(DEAD_LETTERS, &[&format!("{DEAD_LETTERS}.>")], Duration::ZERO).await?;
        let (signals, _stop_on_drop) = (tokio::sync::Mutex::default(), stop.clone().drop_guard());
        Ok(Self { link, signals, tasks: tasks.clone(), stop, _stop_on_drop })
    }

    async fn letter(&self, request: &Value) -> Result<Option<Letter>, Error> {
        let found = self.link.message("read a dead letter", DEAD_LETTERS, request).await?;
        Ok(found.map(Letter::from))
    }
}

#[async_trait]
impl Bus for NatsBus {
    async fn ensure_stream(&self, spec: &StreamSpec) -> Result<(), Error> {
        self.link.ensure_stream(spec.name, &spec.subjects, spec.max_age).await
    }

    async fn publish(&self, stream: &'static str, messages: Vec<Message>) -> Vec<Result<Published, Error>> {
        let outgoing = messages.into_iter().map(|message| {
            let headers = headers(&message.headers, [(MESSAGE_ID, message.id.as_str()), (EXPECTED_STREAM, stream)])?;
            Ok((message.subject, headers, message.payload))
        });
        let results = self.link.publish(outgoing.collect()).await;
        let new = results.iter().filter(|r| matches!(r, Ok(Published { duplicate: false, .. }))).count();
        metrics::counter!("seckill_bus_published_total", "stream" => stream).increment(new as u64);
        results
    }

    async fn consumer(&self, spec: ConsumerSpec) -> Result<Arc<dyn Consumer>, Error> {
        let config = json!({
            "durable_name": spec.name,
            "name": spec.name,
            "deliver_policy": "all",
            "replay_policy": "instant",
            "ack_policy": "explicit",
            "ack_wait": nanos(spec.ack_wait),
            "max_deliver": -1,
            "max_ack_pending": spec.max_pending,
            "filter_subject": spec.filter,
        });
        let subject = format!("CONSUMER.CREATE.{}.{}.{}", spec.stream, spec.name, spec.filter);
        let request = json!({ "stream_name": spec.stream, "config": config });
        if self.link.api("open a consumer", subject, &request).await?.is_none() {
            let message = format!("there is no stream {}", spec.stream);
            return Err(Error::Refused { operation: "open a consumer", message });
        }
        let inbox = self.link.client.new_inbox();
        let messages =
            self.link.client.subscribe(format!("{inbox}.*")).await.map_err(|e| unavailable("open a consumer", e))?;
        let next = format!("$JS.API.CONSUMER.MSG.NEXT.{}.{}", spec.stream, spec.name);
        let inbox = Inbox { link: self.link.clone(), subject: inbox, next, messages, pulls: 0, open: None };
        Ok(Arc::new(NatsConsumer { link: self.link.clone(), spec, inbox: inbox.into() }))
    }

    async fn consumers(&self, stream: &'static str) -> Result<Vec<String>, Error> {
        let mut names = Vec::new();
        loop {
            let request = json!({ "offset": names.len() });
            let subject = format!("CONSUMER.NAMES.{stream}");
            let Some(page) = self.link.api("list consumers", subject, &request).await? else { return Ok(names) };
            let before = names.len();
            names.extend(
                page["consumers"].as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned),
            );
            if names.len() == before || names.len() as u64 >= page["total"].as_u64().unwrap_or(0) {
                return Ok(names);
            }
        }
    }

    async fn progress(&self, stream: &'static str, consumer: &str) -> Result<Option<Progress>, Error> {
        // The server's count of what waits lags behind what it has stored. So the last sequence and the last matching
        // message are read first: a floor that has reached that message has passed every matching one up to the last.
        let last = self.last_sequence(stream).await?;
        let subject = format!("CONSUMER.INFO.{stream}.{consumer}");
        let Some(known) = self.link.api("ask for progress", subject.clone(), &json!({})).await? else {
            return Ok(None);
        };
        let filter = known["config"]["filter_subject"].as_str().filter(|f| !f.is_empty()).unwrap_or(">");
        let last_matching = self.link.message("ask for progress", stream, &json!({ "last_by_subj": filter })).await?;
        let Some(info) = self.link.api("ask for progress", subject, &json!({})).await? else { return Ok(None) };
        let floor = info["ack_floor"]["stream_seq"].as_u64().unwrap_or(0);
        let passed = last_matching.is_none_or(|message| message.sequence <= floor);
        Ok(Some(Progress {
            settled_through: if passed { floor.max(last) } else { floor },
            waiting: info["num_pending"].as_u64().unwrap_or(0),
            pending: info["num_ack_pending"].as_u64().unwrap_or(0),
        }))
    }

    async fn last_sequence(&self, stream: &'static str) -> Result<u64, Error> {
        let info = self.link.api("ask for the last", format!("STREAM.INFO.{stream}"), &json!({})).await?;
        Ok(info.and_then(|i| i["state"]["last_seq"].as_u64()).unwrap_or(0))
    }

    async fn read(&self, stream: &'static str, sequence: u64) -> Result<Option<Message>, Error> {
        if sequence == 0 {
            return Ok(None);
        }
        let found = self.link.message("read", stream, &json!({ "seq": sequence })).await?;
        Ok(found.map(|message| Message {
            subject: message.subject.to_string(),
            id: header(&message.headers, MESSAGE_ID),
            headers: own_headers(&message.headers),
            payload: message.payload,
        }))
    }

    async fn dead_letters(&self, after: Option<&str>, limit: usize) -> Result<Vec<DeadLetter>, Error> {
        let mut next = 1;
        if let Some(request) = after.and_then(by_id)
            && let Some(letter) = self.letter(&request).await?
        {
            next = letter.sequence + 1;
        }
        let mut letters = Vec::new();
        while letters.len() < limit {
            let request = json!({ "seq": next, "next_by_subj": format!("{DEAD_LETTERS}.>") });
            let Some(letter) = self.letter(&request).await? else { break };
            next = letter.sequence + 1;
            letters.push(letter.public);
        }
        Ok(letters)
    }

    async fn redrive(&self, id: &str) -> Result<Option<DeadLetter>, Error> {
        let Some(request) = by_id(id) else { return Ok(None) };
        let Some(letter) = self.letter(&request).await? else { return Ok(None) };
        // The same letter redriven twice, after an unknown outcome or by two people, is one message.
        let message_id = format!("{}/redrive-{}", letter.public.message_id, letter.sequence);
        let headers = headers(&letter.headers, [(MESSAGE_ID, &*message_id), (EXPECTED_STREAM, &letter.stream)])?;
        let message = (letter.public.subject.clone(), headers, letter.public.payload.clone());
        for result in self.link.publish(vec![Ok(message)]).await {
            result?;
        }
        let request = json!({ "seq": letter.sequence, "no_erase": true });
        self.link.api("forget a dead letter", format!("STREAM.MSG.DELETE.{DEAD_LETTERS}"), &request).await?;
        Ok(Some(letter.public))
    }

    async fn signal(&self, subject: &'static str, payload: Bytes) -> Result<(), Error> {
        let publish = timeout(TIMEOUT, self.link.client.publish(subject, payload));
        publish.await.map_err(|e| unavailable("signal", e))?.map_err(|e| unavailable("signal", e))
    }

    async fn listen(&self, subject: &'static str) -> Result<broadcast::Receiver<Bytes>, Error> {
        let mut signals = self.signals.lock().await;
        if let Some(sender) = signals.get(subject) {
            return Ok(sender.subscribe());
        }
        let mut subscriber = self.link.client.subscribe(subject).await.map_err(|e| unavailable("listen", e))?;
        self.link.round_trip("listen").await?;
        let (sender, receiver) = broadcast::channel(SIGNALS_KEPT);
        signals.insert(subject, sender.clone());
        let forwarding = async move {
            while let Some(message) = subscriber.next().await {
                // Nobody listens any more, or not yet again.
                let _ = sender.send(message.payload);
            }
        };
        self.tasks.spawn(self.stop.clone().run_until_cancelled_owned(forwarding));
        Ok(receiver)
    }
}

struct NatsConsumer {
    link: Link,
    spec: ConsumerSpec,
    inbox: tokio::sync::Mutex<Inbox>,
}

#[async_trait]
impl Consumer for NatsConsumer {
    async fn fetch(&self, max: usize, wait: Duration) -> Result<Vec<Delivery>, Error> {
        let deadline = Instant::now() + wait.max(ROUND_TRIP);
        let Ok(mut inbox) = timeout_at(deadline, self.inbox.lock()).await else { return Ok(Vec::new()) };
        loop {
            let (mut deliveries, mut spent) = (Vec::new(), Vec::new());
            for message in inbox.take(max, deadline).await? {
                let delivery = self.delivery(message)?;
                match self.spec.max_attempts {
                    Some(max) if delivery.attempt > max => spent.push((delivery, max, ATTEMPTS_USED_UP.to_owned())),
                    _ => deliveries.push(delivery),
                }
            }
            if let Err(error) = self.bury(spent).await {
                // They come back and are buried then. What is alive must not wait for the dead.
                tracing::warn!(%error, stream = self.spec.stream, consumer = self.spec.name, "dead letters not stored");
            }
            if !deliveries.is_empty() || Instant::now() >= deadline {
                return Ok(deliveries);
            }
        }
    }

    async fn settle(&self, settlements: Vec<(Delivery, Settlement)>) -> Result<(), Error> {
        let (mut answers, mut dead) = (Vec::with_capacity(settlements.len()), Vec::new());
        for (delivery, settlement) in settlements {
            let is_last = self.spec.max_attempts.is_some_and(|max| delivery.attempt >= max);
            let attempts = delivery.attempt;
            match settlement {
                Settlement::Ack => answers.push((delivery.handle.reply, AckKind::Ack)),
                Settlement::Nak(_) if is_last => dead.push((delivery, attempts, ATTEMPTS_USED_UP.to_owned())),
                Settlement::Nak(delay) => {
                    let delay = (!delay.is_zero()).then_some(delay);
                    answers.push((delivery.handle.reply, AckKind::Nak(delay)));
                }
                Settlement::DeadLetter(reason) => dead.push((delivery, attempts, reason)),
            }
        }
        self.link.answer(answers).await?;
        self.bury(dead).await
    }
}

impl NatsConsumer {
    fn delivery(&self, message: async_nats::Message) -> Result<Delivery, Error> {
        let message = jetstream::Message { message, context: self.link.context.clone() };
        let not_ours = |e: async_nats::Error| Error::Unavailable { operation: "fetch", source: e };
        let (sequence, attempt) = message.info().map(|i| (i.stream_sequence, i.delivered)).map_err(not_ours)?;
        let async_nats::Message { subject, reply, payload, headers, .. } = message.message;
        let headers = headers.unwrap_or_default();
        Ok(Delivery {
            sequence,
            attempt: u32::try_from(attempt).unwrap_or(u32::MAX),
            subject: subject.to_string(),
            id: header(&headers, MESSAGE_ID),
            headers: own_headers(&headers),
            payload,
            handle: Handle { reply: reply.map(|r| r.to_string()).unwrap_or_default() },
        })
    }

    /// Stores dead letters, and only then takes their messages out of circulation.
    async fn bury(&self, dead: Vec<(Delivery, u32, String)>) -> Result<(), Error> {
        if dead.is_empty() {
            return Ok(());
        }
        let ConsumerSpec { stream, name, .. } = &self.spec;
        let letters = dead.iter().map(|(delivery, attempts, reason)| {
            let id = format!("{stream}-{name}-{}", delivery.sequence);
            // A header is one line.
            let reason = reason.replace(char::is_control, " ");
            tracing::warn!(stream, consumer = name, sequence = delivery.sequence, attempts, reason, "dead letter");
            let headers = headers(
                &delivery.headers,
                [
                    (MESSAGE_ID, id.as_str()),
                    (SUBJECT, &delivery.subject),
                    (ORIGINAL_ID, &delivery.id),
                    (STREAM, stream),
                    (ATTEMPTS, &attempts.to_string()),
                    (REASON, &reason),
                ],
            )?;
            Ok((format!("{DEAD_LETTERS}.{id}"), headers, delivery.payload.clone()))
        });
        let results = self.link.publish(letters.collect()).await;
        let (mut buried, mut failure) = (Vec::new(), Ok(()));
        for ((delivery, ..), result) in dead.into_iter().zip(results) {
            match result {
                Ok(_) => buried.push((delivery.handle.reply, AckKind::Term)),
                Err(error) => failure = Err(error),
            }
        }
        metrics::counter!("seckill_bus_dead_letters_total", "stream" => *stream, "consumer" => name.clone())
            .increment(buried.len() as u64);
        self.link.answer(buried).await?;
        failure
    }
}

/// Where a consumer's messages arrive.
struct Inbox {
    link: Link,
    /// Every request has a subject of its own below.
    subject: String,
    next: String,
    messages: Subscriber,
    /// Requests made.
    pulls: u64,
    open: Option<Pull>,
}

/// A request for messages that the server may still answer.
struct Pull {
    /// Where the server says how it ended. Messages come under their own subjects.
    subject: String,
    left: usize,
    until: Instant,
    /// The connection it was sent on, by number.
    connection: u64,
}

impl Inbox {
    /// Up to `max` messages: what is there, or else the first to come before the deadline with all that follows at
    /// once. On dropping it, what it had taken comes back after `ack_wait`.
    async fn take(&mut self, max: usize, deadline: Instant) -> Result<Vec<async_nats::Message>, Error> {
        let mut taken = Vec::new();
        while taken.len() < max {
            let connection = self.link.client.statistics().connects.load(Ordering::Relaxed);
            self.open.take_if(|pull| pull.left == 0 || pull.until <= Instant::now() || pull.connection != connection);
            let until = match &self.open {
                _ if !taken.is_empty() && self.open.is_none() => return Ok(taken),
                Some(_) if !taken.is_empty() => Instant::now() + LINGER,
                Some(pull) => pull.until.min(deadline),
                None => self.pull(max, deadline, connection).await?.min(deadline),
            };
            let Ok(message) = timeout_at(until, self.messages.next()).await else {
                if !taken.is_empty() || Instant::now() >= deadline {
                    return Ok(taken);
                }
                continue;
            };
            let closed = || Error::Refused { operation: "fetch", message: "the connection was closed".into() };
            let message = message.ok_or_else(closed)?;
            match message.status.map(|status| status.as_u16()) {
                None | Some(200) => {
                    if let Some(pull) = &mut self.open {
                        pull.left = pull.left.saturating_sub(1);
                    }
                    taken.push(message);
                }
                // Of a request that was given up: it says nothing of the one that is open. Taken for its end, it would
                // have a further one made, one more each time, until the server takes no more.
                Some(_) if self.open.as_ref().is_none_or(|pull| pull.subject != *message.subject) => {}
                // Nothing more, or nothing in time.
                Some(404 | 408) => self.open = None,
                Some(code) => {
                    self.open = None;
                    if taken.is_empty() {
                        let description = message.description.unwrap_or_default();
                        return Err(unavailable("fetch", std::io::Error::other(format!("{code} {description}"))));
                    }
                }
            }
            if !taken.is_empty() && self.open.is_none() || Instant::now() >= deadline {
                return Ok(taken);
            }
        }
        Ok(taken)
    }

    /// Asks for messages. With both an expiry and `no_wait` the server waits for the first, sends what there is, and
    /// says when that was all.
    async fn pull(&mut self, max: usize, deadline: Instant, connection: u64) -> Result<Instant, Error> {
        let expires = deadline.saturating_duration_since(Instant::now()).clamp(ROUND_TRIP, PULL);
        let request = json!({ "batch": max, "expires": nanos(expires), "no_wait": true }).to_string();
        let until = Instant::now() + expires;
        self.pulls += 1;
        let subject = format!("{}.{}", self.subject, self.pulls);
        let ask = self.link.client.publish_with_reply(self.next.clone(), subject.clone(), request.into());
        match timeout_at(until, ask).await {
            Ok(sent) => sent.map_err(|e| unavailable("fetch", e))?,
            // Disconnected, with the way out full: no different from nothing to fetch.
            Err(_) => return Ok(until),
        }
        self.open = Some(Pull { subject, left: max, until, connection });
        Ok(until)
    }
}

/// The connection, and what everything here is made of.
#[derive(Clone)]
struct Link {
    client: Client,
    context: Context,
}

type Outgoing = (String, HeaderMap, Bytes);

impl Link {
    /// Calls JetStream's API. `None` when what was asked for is not there.
    async fn api(&self, operation: &'static str, subject: String, request: &Value) -> Result<Option<Value>, Error> {
        let answer = timeout(TIMEOUT, self.context.request(subject, request)).await;
        let answer: Value = answer.map_err(|e| unavailable(operation, e))?.map_err(|e| unavailable(operation, e))?;
        let Some(error) = answer.get("error") else { return Ok(Some(answer)) };
        let message = error["description"].as_str().unwrap_or("no reason given").to_owned();
        match error["code"].as_u64() {
            Some(404) => Ok(None),
            Some(400..500) => Err(Error::Refused { operation, message }),
            _ => Err(unavailable(operation, std::io::Error::other(message))),
        }
    }

    /// Makes a stream, or changes of an existing one what the spec says. The rest (replicas, placement) is the operator's.
    async fn ensure_stream(&self, name: &str, subjects: &[&str], max_age: Duration) -> Result<(), Error> {
        let operation = "ensure a stream";
        let dedupe = if max_age.is_zero() { DEDUPE } else { DEDUPE.min(max_age) };
        let ours = json!({ "subjects": subjects, "max_age": nanos(max_age), "duplicate_window": nanos(dedupe) });
        let mut is_second_look = false;
        loop {
            let info = self.api(operation, format!("STREAM.INFO.{name}"), &json!({})).await?;
            let is_new = info.is_none();
            let before = info.map_or_else(
                || {
                    json!({
                        "name": name, "retention": "limits", "storage": "file", "discard": "old", "num_replicas": 1,
                        "max_consumers": -1, "max_msgs": -1, "max_bytes": -1, "max_msg_size": -1,
                    })
                },
                |mut info| info["config"].take(),
            );
            let mut config = before.clone();
            for (key, value) in ours.as_object().into_iter().flatten() {
                config[key] = value.clone();
            }
            if config == before {
                return Ok(());
            }
            let verb = if is_new { "CREATE" } else { "UPDATE" };
            match self.api(operation, format!("STREAM.{verb}.{name}"), &config).await {
                Ok(Some(_)) => return Ok(()),
                Ok(None) => return Err(Error::Refused { operation, message: format!("{name} went away meanwhile") }),
                // Somebody else, perhaps of another release, has just made it otherwise.
                Err(Error::Refused { .. }) if is_new && !is_second_look => is_second_look = true,
                Err(error) => return Err(error),
            }
        }
    }

    /// One stored message, by sequence or by subject.
    async fn message(
        &self,
        operation: &'static str,
        stream: &str,
        request: &Value,
    ) -> Result<Option<StreamMessage>, Error> {
        let found = self.api(operation, format!("STREAM.MSG.GET.{stream}"), request).await?;
        let Some(mut found) = found else { return Ok(None) };
        let raw: RawMessage = serde_json::from_value(found["message"].take()).map_err(|e| unavailable(operation, e))?;
        let message = StreamMessage::try_from(raw);
        message.map(Some).map_err(|source| Error::Unavailable { operation, source })
    }

    /// Sends everything, then waits for the acknowledgements, all within one timeout.
    async fn publish(&self, messages: Vec<Result<Outgoing, Error>>) -> Vec<Result<Published, Error>> {
        let deadline = Instant::now() + TIMEOUT;
        let mut sent = Vec::with_capacity(messages.len());
        for message in messages {
            sent.push(match message {
                Ok((subject, headers, payload)) => {
                    let message = PublishMessage::build().headers(headers).payload(payload);
                    match timeout_at(deadline, self.context.send_publish(subject, message)).await {
                        Ok(acknowledgement) => acknowledgement.map_err(publish_error),
                        Err(elapsed) => Err(unavailable("publish", elapsed)),
                    }
                }
                Err(error) => Err(error),
            });
        }
        let mut results = Vec::with_capacity(sent.len());
        for acknowledgement in sent {
            results.push(match acknowledgement {
                Ok(acknowledgement) => match timeout_at(deadline, acknowledgement.into_future()).await {
                    Ok(Ok(ack)) => Ok(Published { sequence: ack.sequence, duplicate: ack.duplicate }),
                    Ok(Err(error)) => Err(publish_error(error)),
                    Err(elapsed) => Err(unavailable("publish", elapsed)),
                },
                Err(error) => Err(error),
            });
        }
        results
    }

    /// Answers deliveries, and waits until the server has the answers.
    async fn answer(&self, answers: Vec<(String, AckKind)>) -> Result<(), Error> {
        if answers.is_empty() {
            return Ok(());
        }
        let sending = async {
            for (reply, answer) in answers {
                self.client.publish(reply, answer.into()).await.map_err(|e| unavailable("settle", e))?;
            }
            Ok(())
        };
        timeout(TIMEOUT, sending).await.map_err(|e| unavailable("settle", e))??;
        self.round_trip("settle").await
    }

    /// Returns when the server has taken in all that was sent before: a connection is read in order. (The client's own
    /// flush only hands it to the system.) The answer that nobody is there to answer is an answer.
    async fn round_trip(&self, operation: &'static str) -> Result<(), Error> {
        let request = self.client.request(self.client.new_inbox(), Bytes::new());
        match timeout(TIMEOUT, request).await {
            Ok(Err(error)) if error.kind() != async_nats::RequestErrorKind::NoResponders => {
                Err(unavailable(operation, error))
            }
            Ok(_) => Ok(()),
            Err(elapsed) => Err(unavailable(operation, elapsed)),
        }
    }
}

/// A dead letter with what only we need of it.
struct Letter {
    public: DeadLetter,
    sequence: u64,
    stream: String,
    headers: Headers,
}

impl From<StreamMessage> for Letter {
    fn from(message: StreamMessage) -> Self {
        let subject = message.subject.as_str();
        let mut headers = own_headers(&message.headers);
        headers.retain(|name, _| !name.starts_with(LETTERS_OWN));
        Self {
            public: DeadLetter {
                id: subject.split_once('.').map_or(subject, |(_, id)| id).to_owned(),
                subject: header(&message.headers, SUBJECT),
                message_id: header(&message.headers, ORIGINAL_ID),
                attempts: header(&message.headers, ATTEMPTS).parse().unwrap_or(0),
                reason: header(&message.headers, REASON),
                at_ms: (message.time.unix_timestamp_nanos() / 1_000_000) as i64,
                payload: message.payload,
            },
            sequence: message.sequence,
            stream: header(&message.headers, STREAM),
            headers,
        }
    }
}

/// How to ask for the dead letter with this id; `None` where the id cannot be one. It must not be a pattern.
fn by_id(id: &str) -> Option<Value> {
    let is_token = !id.is_empty() && !id.contains(|c: char| ".*>".contains(c) || c.is_whitespace() || c.is_control());
    is_token.then(|| json!({ "last_by_subj": format!("{DEAD_LETTERS}.{id}") }))
}

/// A message's headers and ours as NATS has them.
fn headers<const N: usize>(own: &Headers, more: [(&str, &str); N]) -> Result<HeaderMap, Error> {
    let mut map = HeaderMap::new();
    for (name, value) in own.iter().map(|(k, v)| (k.as_str(), v.as_str())).chain(more) {
        let refused = |message: String| Error::Refused { operation: "publish", message };
        let name: HeaderName = name.parse().map_err(|e| refused(format!("header {name:?}: {e}")))?;
        let value: HeaderValue = value.parse().map_err(|e| refused(format!("header {name:?}: {e}")))?;
        map.insert(name, value);
    }
    Ok(map)
}

fn own_headers(map: &HeaderMap) -> Headers {
    let own = map.iter().filter(|(name, _)| !name.to_string().starts_with(SERVERS_OWN));
    own.filter_map(|(name, values)| Some((name.to_string(), values.first()?.to_string()))).collect()
}

fn header(map: &HeaderMap, name: &str) -> String {
    map.get(name).map(ToString::to_string).unwrap_or_default()
}

fn nanos(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
}

/// What the server judged and declined had no effect; everything else is unknown.
fn publish_error(error: jetstream::context::PublishError) -> Error {
    let declined = std::error::Error::source(&error)
        .and_then(|source| source.downcast_ref::<jetstream::Error>())
        .is_some_and(|error| (400..500).contains(&error.code()));
    if declined || error.kind() == PublishErrorKind::MaxPayloadExceeded {
        return Error::Refused { operation: "publish", message: error.to_string() };
    }
    unavailable("publish", error)
}

fn unavailable(operation: &'static str, source: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::Unavailable { operation, source: Box::new(source) }
}

impl fmt::Debug for NatsBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NatsBus").field("connection", &self.link.client.connection_state()).finish_non_exhaustive()
    }
}

impl fmt::Debug for NatsConsumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NatsConsumer").field("spec", &self.spec).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::{
        SharedBus,
        contract::{Storage, bus_contract},
    };

    async fn server() -> Option<Storage> {
        let url = crate::testing::server("SECKILL_TEST_NATS_URL")?;
        Some(Box::new(move || {
            let url = url.clone();
            Box::pin(async move { Arc::new(NatsBus::connect(&url, &TaskTracker::new()).await.unwrap()) as SharedBus })
        }))
    }

    bus_contract!(server);

    /// Stands between the bus and the server, and can be cut.
    struct Wire {
        listen: std::net::SocketAddr,
        server: String,
        running: Option<DropGuard>,
    }

    impl Wire {
        async fn connect(&mut self) {
            let listener = tokio::net::TcpListener::bind(self.listen).await.unwrap();
            self.listen = listener.local_addr().unwrap();
            let (cut, server) = (CancellationToken::new(), self.server.clone());
            let connections = cut.clone();
            tokio::spawn(cut.clone().run_until_cancelled_owned(async move {
                loop {
                    let (mut from, _) = listener.accept().await.unwrap();
                    let server = server.clone();
                    tokio::spawn(connections.clone().run_until_cancelled_owned(async move {
                        let mut to = tokio::net::TcpStream::connect(&server).await.unwrap();
                        // Either side may hang up.
                        let _ = tokio::io::copy_bidirectional(&mut from, &mut to).await;
                    }));
                }
            }));
            self.running = Some(cut.drop_guard());
        }

        fn cut(&mut self) {
            self.running = None;
        }
    }

    /// With a consumer of all of it, `c`.
    async fn stream_of_its_own(bus: &NatsBus) -> (&'static str, Arc<dyn Consumer>) {
        let stream: &'static str = format!("T{}", uuid::Uuid::new_v4().simple()).leak();
        let subjects = vec![&*format!("{stream}.>").leak()];
        bus.ensure_stream(&StreamSpec { name: stream, subjects, max_age: Duration::from_secs(600) }).await.unwrap();
        let spec = ConsumerSpec {
            stream,
            name: "c".into(),
            filter: format!("{stream}.>"),
            ack_wait: Duration::from_secs(60),
            max_attempts: None,
            max_pending: 10,
        };
        (stream, bus.consumer(spec).await.unwrap())
    }

    /// A server lets 512 requests wait at a consumer and refuses the next: who leaves one behind now and then is refused
    /// after some minutes, and for good.
    #[tokio::test]
    async fn fetches_in_vain_leave_no_requests_behind() {
        let Some(url) = crate::testing::server("SECKILL_TEST_NATS_URL") else { return };
        let bus = NatsBus::connect(&url, &TaskTracker::new()).await.unwrap();
        let (stream, consumer) = stream_of_its_own(&bus).await;
        for _ in 0..20 {
            assert!(consumer.fetch(10, ROUND_TRIP).await.unwrap().is_empty());
        }
        let info = bus.link.api("look", format!("CONSUMER.INFO.{stream}.c"), &json!({})).await.unwrap().unwrap();
        assert!(info["num_waiting"].as_u64().unwrap() <= 1, "{info}");
    }

    #[tokio::test]
    async fn e17_a_publish_without_a_server_is_unknown_and_everything_goes_on_afterwards() {
        let Some(url) = crate::testing::server("SECKILL_TEST_NATS_URL") else { return };
        let server = url.trim_start_matches("nats://").to_owned();
        let mut wire = Wire { listen: ([127, 0, 0, 1], 0).into(), server, running: None };
        wire.connect().await;
        let bus = NatsBus::connect(&format!("nats://{}", wire.listen), &TaskTracker::new()).await.unwrap();
        let (stream, consumer) = stream_of_its_own(&bus).await;
        let message = |id: &str| Message {
            subject: format!("{stream}.a"),
            id: id.into(),
            headers: Headers::new(),
            payload: Bytes::new(),
        };
        bus.publish(stream, vec![message("1")]).await.remove(0).unwrap();
        let in_hand = consumer.fetch(1, TIMEOUT).await.unwrap();
        let mut signals = bus.listen(stream).await.unwrap();

        wire.cut();
        let started = Instant::now();
        let results = bus.publish(stream, vec![message("2"), message("3")]).await;
        assert!(started.elapsed() < TIMEOUT * 2);
        assert!(results.iter().all(|r| matches!(r, Err(Error::Unavailable { .. }))));
        let short = Duration::from_millis(100);
        let fetched = timeout(TIMEOUT, consumer.fetch(1, short)).await.expect("a fetch does not hang either");
        assert_eq!(fetched.map_or(0, |deliveries| deliveries.len()), 0);

        wire.connect().await;
        crate::testing::eventually("the connection is back", async || bus.last_sequence(stream).await.ok()).await;
        let settlements = in_hand.into_iter().map(|d| (d, Settlement::Ack)).collect();
        consumer.settle(settlements).await.unwrap();
        // Whether the unknown ones were stored or not, they are stored once now.
        for id in ["2", "3"] {
            bus.publish(stream, vec![message(id)]).await.remove(0).unwrap();
        }
        let mut ids = Vec::new();
        while ids.len() < 2 {
            ids.extend(consumer.fetch(10, TIMEOUT).await.unwrap().into_iter().map(|d| d.id));
        }
        ids.sort_unstable();
        assert_eq!(ids, ["2", "3"]);
        assert_eq!(bus.last_sequence(stream).await.unwrap(), 3);
        bus.signal(stream, "heard".into()).await.unwrap();
        assert_eq!(timeout(TIMEOUT, signals.recv()).await.unwrap().unwrap(), "heard");
    }
}

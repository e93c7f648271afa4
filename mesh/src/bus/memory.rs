//! A bus in memory, for tests that hold time still: it waits for nothing but tokio's clock.
//!
//! Whoever has the value has the streams: handles and consumers may come and go, as those of processes that share a
//! server. Every call is one indivisible step. Nothing is pruned but what is too old, when it is next looked for.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::{
    sync::{Notify, broadcast},
    time::{Instant, sleep_until},
};

use super::{
    ATTEMPTS_USED_UP, Bus, Consumer, ConsumerSpec, DeadLetter, Delivery, Error, Handle, Headers, Message, Progress,
    Published, SIGNALS_KEPT, Settlement, StreamSpec, matches,
};
use crate::clock::Clock;

/// How long a duplicate is recognised, like on a server.
const WINDOW: Duration = Duration::from_secs(120);

/// See the module. Cheap to clone; clones are the same bus.
#[derive(Clone)]
pub struct MemoryBus(Arc<Inner>);

struct Inner {
    clock: Clock,
    state: Mutex<State>,
    /// Rung when there may be something to fetch.
    bell: Notify,
}

#[derive(Default)]
struct State {
    streams: BTreeMap<&'static str, Stream>,
    dead: Vec<(Headers, DeadLetter)>,
    redriven: u64,
    signals: HashMap<&'static str, broadcast::Sender<Bytes>>,
}

struct Stream {
    spec: StreamSpec,
    last: u64,
    messages: BTreeMap<u64, (Instant, Message)>,
    /// When each id was published, and as what.
    ids: HashMap<String, (Instant, u64)>,
    consumers: BTreeMap<String, Group>,
}

/// A consumer's place in its stream.
struct Group {
    spec: ConsumerSpec,
    cursor: u64,
    /// By sequence: the last attempt, and when the next is due.
    pending: BTreeMap<u64, (u32, Instant)>,
}

impl MemoryBus {
    /// An empty one.
    pub fn new(clock: Clock) -> Self {
        Self(Arc::new(Inner { clock, state: Mutex::default(), bell: Notify::new() }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn channel(&self, subject: &'static str) -> broadcast::Sender<Bytes> {
        self.state().signals.entry(subject).or_insert_with(|| broadcast::Sender::new(SIGNALS_KEPT)).clone()
    }
}

impl State {
    fn publish(&mut self, name: &str, message: Message) -> Result<Published, Error> {
        let now = Instant::now();
        let refused = |message: String| Error::Refused { operation: "publish", message };
        let stream = self.streams.get_mut(name).ok_or_else(|| refused(format!("there is no stream {name}")))?;
        if !stream.spec.subjects.iter().any(|pattern| matches(pattern, &message.subject)) {
            return Err(refused(format!("{name} does not keep the subject {}", message.subject)));
        }
        if let Some((at, sequence)) = stream.ids.get(&message.id)
            && now - *at <= WINDOW
        {
            return Ok(Published { sequence: *sequence, duplicate: true });
        }
        stream.last += 1;
        stream.ids.insert(message.id.clone(), (now, stream.last));
        stream.messages.insert(stream.last, (now, message));
        Ok(Published { sequence: stream.last, duplicate: false })
    }

    fn bury(&mut self, clock: &Clock, group: &ConsumerSpec, delivery: &Delivery, attempts: u32, reason: String) {
        let letter = DeadLetter {
            id: format!("{}-{}-{}", group.stream, group.name, delivery.sequence),
            subject: delivery.subject.clone(),
            message_id: delivery.id.clone(),
            attempts,
            reason,
            payload: delivery.payload.clone(),
            at_ms: clock.now_ms(),
        };
        self.dead.push((delivery.headers.clone(), letter));
    }
}

impl Stream {
    fn drop_old(&mut self, now: Instant) {
        let max_age = self.spec.max_age;
        while self.messages.first_entry().is_some_and(|first| now - first.get().0 > max_age) {
            self.messages.pop_first();
        }
    }

    fn waiting<'a>(&'a self, group: &'a Group) -> impl Iterator<Item = u64> + 'a {
        let newer = self.messages.range(group.cursor + 1..);
        newer.filter(|(_, (_, message))| matches(&group.spec.filter, &message.subject)).map(|(sequence, _)| *sequence)
    }

    fn delivery(&self, sequence: u64, attempt: u32) -> Option<Delivery> {
        let (_, message) = self.messages.get(&sequence)?;
        let Message { subject, id, headers, payload } = message.clone();
        Some(Delivery { sequence, attempt, subject, id, headers, payload, handle: Handle::default() })
    }
}

impl Group {
    fn is_last(&self, attempt: u32) -> bool {
        self.spec.max_attempts.is_some_and(|max| attempt >= max)
    }
}

#[async_trait]
impl Bus for MemoryBus {
    async fn ensure_stream(&self, spec: &StreamSpec) -> Result<(), Error> {
        let mut state = self.state();
        let stream = state.streams.entry(spec.name).or_insert_with(|| Stream {
            spec: spec.clone(),
            last: 0,
            messages: BTreeMap::new(),
            ids: HashMap::new(),
            consumers: BTreeMap::new(),
        });
        stream.spec = spec.clone();
        Ok(())
    }

    async fn publish(&self, stream: &'static str, messages: Vec<Message>) -> Vec<Result<Published, Error>> {
        let mut state = self.state();
        let results = messages.into_iter().map(|message| state.publish(stream, message)).collect();
        self.0.bell.notify_waiters();
        results
    }

    async fn consumer(&self, spec: ConsumerSpec) -> Result<Arc<dyn Consumer>, Error> {
        let mut state = self.state();
        let Some(stream) = state.streams.get_mut(spec.stream) else {
            let message = format!("there is no stream {}", spec.stream);
            return Err(Error::Refused { operation: "open a consumer", message });
        };
        let (name, place) = (spec.stream, spec.name.clone());
        let group = stream.consumers.entry(spec.name.clone()).or_insert_with(|| Group {
            spec: spec.clone(),
            cursor: 0,
            pending: BTreeMap::new(),
        });
        group.spec = spec;
        Ok(Arc::new(Handed { bus: self.clone(), stream: name, group: place }))
    }

    async fn consumers(&self, stream: &'static str) -> Result<Vec<String>, Error> {
        Ok(self.state().streams.get(stream).map(|s| s.consumers.keys().cloned().collect()).unwrap_or_default())
    }

    async fn progress(&self, stream: &'static str, consumer: &str) -> Result<Option<Progress>, Error> {
        let mut state = self.state();
        let Some(stream) = state.streams.get_mut(stream) else { return Ok(None) };
        stream.drop_old(Instant::now());
        let Some(group) = stream.consumers.get(consumer) else { return Ok(None) };
        let mut waiting = stream.waiting(group).peekable();
        let first_open = group.pending.keys().next().copied().or(waiting.peek().copied());
        Ok(Some(Progress {
            settled_through: first_open.map_or(stream.last, |first| first - 1),
            waiting: waiting.count() as u64,
            pending: group.pending.len() as u64,
        }))
    }

    async fn last_sequence(&self, stream: &'static str) -> Result<u64, Error> {
        Ok(self.state().streams.get(stream).map_or(0, |s| s.last))
    }

    async fn read(&self, stream: &'static str, sequence: u64) -> Result<Option<Message>, Error> {
        let mut state = self.state();
        let Some(stream) = state.streams.get_mut(stream) else { return Ok(None) };
        stream.drop_old(Instant::now());
        Ok(stream.messages.get(&sequence).map(|(_, message)| message.clone()))
    }

    async fn dead_letters(&self, after: Option<&str>, limit: usize) -> Result<Vec<DeadLetter>, Error> {
        let state = self.state();
        let from = after.and_then(|after| state.dead.iter().position(|(_, letter)| letter.id == after));
        let rest = state.dead.iter().skip(from.map_or(0, |place| place + 1));
        Ok(rest.take(limit).map(|(_, letter)| letter.clone()).collect())
    }

    async fn redrive(&self, id: &str) -> Result<Option<DeadLetter>, Error> {
        let mut state = self.state();
        let Some(place) = state.dead.iter().position(|(_, letter)| letter.id == id) else { return Ok(None) };
        let (headers, letter) = state.dead[place].clone();
        state.redriven += 1;
        let message = Message {
            subject: letter.subject.clone(),
            id: format!("{}/redrive-{}", letter.message_id, state.redriven),
            headers,
            payload: letter.payload.clone(),
        };
        let of = state.streams.keys().copied().find(|stream| id.starts_with(&format!("{stream}-"))).unwrap_or_default();
        state.publish(of, message)?;
        state.dead.remove(place);
        self.0.bell.notify_waiters();
        Ok(Some(letter))
    }

    async fn signal(&self, subject: &'static str, payload: Bytes) -> Result<(), Error> {
        // Nobody listens: then nobody hears.
        let _ = self.channel(subject).send(payload);
        Ok(())
    }

    async fn listen(&self, subject: &'static str) -> Result<broadcast::Receiver<Bytes>, Error> {
        Ok(self.channel(subject).subscribe())
    }
}

impl fmt::Debug for MemoryBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryBus").field("streams", &self.state().streams.keys()).finish_non_exhaustive()
    }
}

/// One handle on a consumer.
#[derive(Debug)]
struct Handed {
    bus: MemoryBus,
    stream: &'static str,
    group: String,
}

/// What one look came to.
struct Looked {
    deliveries: Vec<Delivery>,
    next_due: Option<Instant>,
}

impl Handed {
    /// First what is due again, then what was never delivered, as far as the window allows.
    fn look(&self, max: usize) -> Looked {
        let now = Instant::now();
        let mut guard = self.bus.state();
        let state = &mut *guard;
        let (mut deliveries, mut spent, mut gone) = (Vec::new(), Vec::new(), Vec::new());
        let Some(stream) = state.streams.get_mut(self.stream) else { return Looked { deliveries, next_due: None } };
        stream.drop_old(now);
        let Some(mut group) = stream.consumers.remove(&self.group) else {
            return Looked { deliveries, next_due: None };
        };
        let due_again = now + group.spec.ack_wait;
        let mut due: Vec<(Instant, u64, u32)> =
            group.pending.iter().filter(|(_, (_, due))| *due <= now).map(|(s, (a, due))| (*due, *s, *a)).collect();
        due.sort_unstable();
        for (_, sequence, attempt) in due {
            if deliveries.len() == max {
                break;
            }
            match stream.delivery(sequence, attempt + 1) {
                // Dropped for its age while it was pending.
                None => gone.push(sequence),
                Some(delivery) if group.is_last(attempt) => spent.push((delivery, attempt)),
                Some(delivery) => {
                    group.pending.insert(sequence, (attempt + 1, due_again));
                    deliveries.push(delivery);
                }
            }
        }
        let room = (max - deliveries.len()).min(group.spec.max_pending.saturating_sub(group.pending.len()));
        let fresh: Vec<u64> = stream.waiting(&group).take(room).collect();
        if let Some(last) = fresh.last() {
            group.cursor = *last;
        }
        for sequence in fresh {
            group.pending.insert(sequence, (1, due_again));
            deliveries.extend(stream.delivery(sequence, 1));
        }
        for sequence in gone.iter().chain(spent.iter().map(|(delivery, _)| &delivery.sequence)) {
            group.pending.remove(sequence);
        }
        let next_due = group.pending.values().map(|(_, due)| *due).min();
        let spec = group.spec.clone();
        stream.consumers.insert(self.group.clone(), group);
        for (delivery, attempts) in spent {
            state.bury(&self.bus.0.clock, &spec, &delivery, attempts, ATTEMPTS_USED_UP.to_owned());
        }
        Looked { deliveries, next_due }
    }
}

#[async_trait]
impl Consumer for Handed {
    async fn fetch(&self, max: usize, wait: Duration) -> Result<Vec<Delivery>, Error> {
        let deadline = Instant::now() + wait;
        loop {
            // Before looking, so that nothing falls between looking and waiting.
            let mut bell = std::pin::pin!(self.bus.0.bell.notified());
            bell.as_mut().enable();
            let asked_at = Instant::now();
            let Looked { deliveries, next_due } = self.look(max);
            if !deliveries.is_empty() || asked_at >= deadline {
                return Ok(deliveries);
            }
            tokio::select! {
                biased;
                () = bell => {}
                () = sleep_until(next_due.map_or(deadline, |due| due.min(deadline))) => {}
            }
        }
    }

    /// Settles what is still pending; what was settled before is left alone.
    async fn settle(&self, settlements: Vec<(Delivery, Settlement)>) -> Result<(), Error> {
        let now = Instant::now();
        let mut guard = self.bus.state();
        let state = &mut *guard;
        let mut dead = Vec::new();
        let Some(stream) = state.streams.get_mut(self.stream) else { return Ok(()) };
        let Some(group) = stream.consumers.get_mut(&self.group) else { return Ok(()) };
        for (delivery, settlement) in settlements {
            let Some((attempt, _)) = group.pending.get(&delivery.sequence).copied() else { continue };
            let reason = match settlement {
                Settlement::Ack => None,
                Settlement::DeadLetter(reason) => Some(reason),
                // It came back and is in other hands, which will settle it.
                Settlement::Nak(_) if delivery.attempt != attempt => continue,
                Settlement::Nak(_) if group.is_last(attempt) => Some(ATTEMPTS_USED_UP.to_owned()),
                Settlement::Nak(delay) => {
                    group.pending.insert(delivery.sequence, (attempt, now + delay));
                    continue;
                }
            };
            group.pending.remove(&delivery.sequence);
            dead.extend(reason.map(|reason| (delivery, attempt, reason)));
        }
        let spec = group.spec.clone();
        for (delivery, attempts, reason) in dead {
            state.bury(&self.bus.0.clock, &spec, &delivery, attempts, reason);
        }
        self.bus.0.bell.notify_waiters();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::{
        SharedBus,
        contract::{Storage, bus_contract},
    };

    async fn kept() -> Option<Storage> {
        let bus = MemoryBus::new(Clock::tokio());
        Some(Box::new(move || {
            let bus: SharedBus = Arc::new(bus.clone());
            Box::pin(async move { bus })
        }))
    }

    bus_contract!(kept);
}

//! What [`super::Bus`] promises, as tests that run on every implementation.
//!
//! Each takes a [`Storage`]: it opens a bus on the same streams as often as it is asked, so that a test can drop
//! everything and look at what is left. Streams get names of their own, because a test server is shared.

use std::{collections::BTreeSet, time::Duration};

use futures::future::BoxFuture;
use tokio::{sync::broadcast::error::TryRecvError, time::Instant};

use super::*;
use crate::testing::eventually;

/// Opens a bus on one and the same storage.
pub type Storage = Box<dyn Fn() -> BoxFuture<'static, SharedBus> + Send + Sync>;

/// Longer than anything here takes: what waits this long has failed.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long a test looks before it believes that nothing comes.
const NOTHING: Duration = Duration::from_millis(150);

#[cfg(test)]
/// Makes one test of each promise. `$storage` is an async function to `Option<Storage>`; `None` passes over.
macro_rules! bus_contract {
    ($storage:path) => {
        $crate::bus::contract::bus_contract! { $storage;
            releases_that_disagree_on_a_stream_make_it_together
            a_message_published_twice_is_there_once
            a_publish_that_nothing_keeps_fails
            messages_arrive_whole_and_in_order
            a_fetch_returns_with_the_first_message_and_empty_when_there_is_none
            what_is_not_settled_comes_back_after_the_ack_wait
            a_nak_with_delay_is_never_early
            two_consumers_each_get_everything
            one_name_shares_the_work
            a_filter_picks_subjects
            the_pending_window_stops_and_goes_on
            e20_a_poison_message_becomes_a_dead_letter_and_blocks_nobody
            a_refused_message_is_a_dead_letter_at_once
            dead_letters_are_listed_in_pages
            attempts_without_a_limit_never_end
            progress_follows_what_is_settled
            progress_is_complete_where_the_filter_has_nothing
            everything_is_there_after_reopening
            attempts_survive_reopening
            a_sequence_can_be_read
            old_messages_are_dropped
            e22_settling_again_changes_nothing
            an_abandoned_fetch_loses_nothing
            signals_reach_those_who_listen_in_order
        }
    };
    ($storage:path; $($promise:ident)*) => {
        $(
            #[tokio::test]
            async fn $promise() {
                if let Some(storage) = $storage().await {
                    $crate::bus::contract::$promise(storage).await;
                }
            }
        )*
    };
}
#[cfg(test)]
pub(crate) use bus_contract;

/// A name that nobody else has.
fn unique(prefix: &str) -> &'static str {
    format!("{prefix}{}", uuid::Uuid::new_v4().simple()).leak()
}

/// A stream of one test: its name is also the first token of its subjects.
async fn stream(bus: &SharedBus) -> &'static str {
    stream_for(bus, Duration::from_secs(3_600)).await
}

async fn stream_for(bus: &SharedBus, max_age: Duration) -> &'static str {
    let name = unique("T");
    let spec = StreamSpec { name, subjects: vec![format!("{name}.>").leak()], max_age };
    bus.ensure_stream(&spec).await.unwrap();
    bus.ensure_stream(&spec).await.expect("twice is fine");
    name
}

fn spec(stream: &'static str, name: &str) -> ConsumerSpec {
    ConsumerSpec {
        stream,
        name: name.into(),
        filter: format!("{stream}.>"),
        ack_wait: Duration::from_secs(60),
        max_attempts: None,
        max_pending: 1_000,
    }
}

fn message(stream: &str, kind: &str, n: usize) -> Message {
    Message {
        subject: format!("{stream}.{kind}"),
        id: format!("{kind}-{n}"),
        headers: Headers::from([("traceparent".into(), format!("00-{n}"))]),
        payload: format!("payload {n}").into(),
    }
}

async fn publish(bus: &SharedBus, stream: &'static str, kind: &str, numbers: std::ops::Range<usize>) -> Vec<Published> {
    let messages = numbers.map(|n| message(stream, kind, n)).collect();
    bus.publish(stream, messages).await.into_iter().map(|r| r.unwrap()).collect()
}

/// Fetches until there are `count`.
async fn take(consumer: &Arc<dyn Consumer>, count: usize) -> Vec<Delivery> {
    let deadline = Instant::now() + PATIENCE;
    let mut all = Vec::new();
    while all.len() < count {
        let left = deadline.saturating_duration_since(Instant::now());
        assert!(!left.is_zero(), "{} of {count} deliveries came", all.len());
        all.extend(consumer.fetch(count - all.len(), left).await.unwrap());
    }
    all
}

async fn nothing(consumer: &Arc<dyn Consumer>) {
    assert_eq!(sequences(&consumer.fetch(100, NOTHING).await.unwrap()), [0; 0]);
}

async fn settle(consumer: &Arc<dyn Consumer>, deliveries: Vec<Delivery>, settlement: Settlement) {
    consumer.settle(deliveries.into_iter().map(|d| (d, settlement.clone())).collect()).await.unwrap();
}

async fn progress(bus: &SharedBus, stream: &'static str, consumer: &str) -> Progress {
    bus.progress(stream, consumer).await.unwrap().expect("the consumer is there")
}

async fn letters_of(bus: &SharedBus, stream: &str) -> Vec<DeadLetter> {
    let (mut letters, mut after) = (Vec::new(), None::<String>);
    loop {
        let page = bus.dead_letters(after.as_deref(), 100).await.unwrap();
        let Some(last) = page.last() else { return letters };
        after = Some(last.id.clone());
        letters.extend(page.into_iter().filter(|letter| letter.id.starts_with(&format!("{stream}-"))));
    }
}

fn sequences(deliveries: &[Delivery]) -> Vec<u64> {
    deliveries.iter().map(|d| d.sequence).collect()
}

/// Within a batch, across batches, and across two that run at the same time.
pub async fn a_message_published_twice_is_there_once(storage: Storage) {
    let bus = storage().await;
    let s = stream(&bus).await;
    let batch = || vec![message(s, "a", 1), message(s, "a", 2), message(s, "a", 1)];
    let (one, two) = futures::join!(bus.publish(s, batch()), bus.publish(s, batch()));
    let results: Vec<Published> = one.into_iter().chain(two).map(|r| r.unwrap()).collect();
    assert_eq!(results.iter().filter(|r| !r.duplicate).count(), 2);
    assert_eq!(results[0].sequence, results[2].sequence);
    assert_eq!(results[0].sequence, results[3].sequence);
    assert_eq!(results[1].sequence, results[4].sequence);
    assert_eq!(bus.last_sequence(s).await.unwrap(), 2);
    assert_eq!(publish(&bus, s, "a", 2..4).await.iter().map(|p| p.duplicate).collect::<Vec<_>>(), [true, false]);
}

/// Several processes start at once, some of them of another release.
pub async fn releases_that_disagree_on_a_stream_make_it_together(storage: Storage) {
    let bus = storage().await;
    let name = unique("T");
    let declared = |days: u64| StreamSpec {
        name,
        subjects: vec![format!("{name}.>").leak()],
        max_age: Duration::from_secs(days * 86_400),
    };
    let specs: Vec<StreamSpec> = [7, 8, 7, 8].map(declared).into();
    for ensured in futures::future::join_all(specs.iter().map(|spec| bus.ensure_stream(spec))).await {
        ensured.unwrap();
    }
    assert_eq!(publish(&bus, name, "a", 0..1).await[0].sequence, 1);
}

/// One bad message of a batch fails alone.
pub async fn a_publish_that_nothing_keeps_fails(storage: Storage) {
    let bus = storage().await;
    let s = stream(&bus).await;
    let stray = Message { subject: unique("nowhere").into(), ..message(s, "a", 1) };
    let results = bus.publish(s, vec![stray, message(s, "a", 2)]).await;
    assert!(results[0].is_err());
    assert_eq!(results[1].as_ref().unwrap().sequence, 1);
    let absent = unique("ABSENT");
    assert!(bus.publish(absent, vec![message(absent, "a", 1)]).await[0].is_err());
    assert!(bus.consumer(spec(absent, "c")).await.is_err());
    assert_eq!(bus.last_sequence(absent).await.unwrap(), 0);
    assert_eq!(bus.progress(absent, "c").await.unwrap(), None);
    assert_eq!(bus.progress(s, "c").await.unwrap(), None);
    assert_eq!(bus.consumers(absent).await.unwrap(), [""; 0]);
    assert_eq!(bus.read(absent, 1).await.unwrap(), None);
}

/// Subject, id, headers and body; attempt 1; by sequence.
pub async fn messages_arrive_whole_and_in_order(storage: Storage) {
    let bus = storage().await;
    let s = stream(&bus).await;
    for start in [0, 150] {
        publish(&bus, s, "a.b", start..start + 100).await;
        publish(&bus, s, "c", start + 100..start + 150).await;
    }
    let consumer = bus.consumer(spec(s, "c")).await.unwrap();
    let all = take(&consumer, 300).await;
    assert_eq!(sequences(&all), (1..=300).collect::<Vec<_>>());
    assert!(all.iter().all(|d| d.attempt == 1));
    let (got, expected) = (&all[110], message(s, "c", 110));
    assert_eq!((&got.subject, &got.id), (&expected.subject, &expected.id));
    assert_eq!((&got.headers, &got.payload), (&expected.headers, &expected.payload));
    assert_eq!(bus.consumers(s).await.unwrap(), ["c"]);
}

/// It must not wait for more than there is.
pub async fn a_fetch_returns_with_the_first_message_and_empty_when_there_is_none(storage: Storage) {
    let bus = storage().await;
    let s = stream(&bus).await;
    let consumer = bus.consumer(spec(s, "c")).await.unwrap();
    nothing(&consumer).await;
    let fetching = tokio::spawn({
        let consumer = consumer.clone();
        async move { (consumer.fetch(100, PATIENCE).await.unwrap(), Instant::now()) }
    });
    // The fetch is most likely waiting by now; the promise holds either way.
    nothing(&bus.consumer(spec(s, "other")).await.unwrap()).await;
    let published = Instant::now();
    publish(&bus, s, "a", 0..1).await;
    let (deliveries, returned) = fetching.await.unwrap();
    assert_eq!(sequences(&deliveries), [1]);
    assert!(returned - published < PATIENCE / 4);
}

/// With the attempt counted.
pub async fn what_is_not_settled_comes_back_after_the_ack_wait(storage: Storage) {
    let bus = storage().await;
    let s = stream(&bus).await;
    let ack_wait = Duration::from_millis(400);
    let consumer = bus.consumer(ConsumerSpec { ack_wait, ..spec(s, "c") }).await.unwrap();
    publish(&bus, s, "a", 0..3).await;
    let asked = Instant::now();
    let first = take(&consumer, 3).await;
    settle(&consumer, vec![first[1].clone()], Settlement::Ack).await;
    let again = take(&consumer, 2).await;
    assert!(asked.elapsed() >= ack_wait);
    assert_eq!(again.iter().map(|d| d.attempt).collect::<Vec<_>>(), [2, 2]);
    assert_eq!(BTreeSet::from_iter(sequences(&again)), BTreeSet::from([1, 3]));
    settle(&consumer, again, Settlement::Ack).await;
    nothing(&consumer).await;
}

/// Each has its own delay; the ack_wait has no say in it.
pub async fn a_nak_with_delay_is_never_early(storage: Storage) {
    let bus = storage().await;
    let s = stream(&bus).await;
    let ack_wait = Duration::from_millis(200);
    let consumer = bus.consumer(ConsumerSpec { ack_wait, ..spec(s, "c") }).await.unwrap();
    publish(&bus, s, "a", 0..4).await;
    let delay = |sequence: u64| Duration::from_millis(1_300 - 300 * sequence);
    let first = take(&consumer, 4).await;
    let naked = Instant::now();
    consumer
        .settle(first.into_iter().map(|d| (d.clone(), Settlement::Nak(delay(d.sequence)))).collect())
        .await
        .unwrap();
    let mut back = Vec::new();
    while back.len() < 4 {
        for delivery in take(&consumer, 1).await {
            assert!(naked.elapsed() >= delay(delivery.sequence), "{} is early", delivery.sequence);
            assert_eq!(delivery.attempt, 2);
            back.push(delivery.sequence);
            settle(&consumer, vec![delivery], Settlement::Ack).await;
        }
    }
    assert_eq!(back, [4, 3, 2, 1]);
}

/// Whatever the other does with its own.
pub async fn two_consumers_each_get_everything(storage: Storage) {
    let bus = storage().await;
    let s = stream(&bus).await;
    publish(&bus, s, "a", 0..5).await;
    let one = bus.consumer(spec(s, "one")).await.unwrap();
    let two = bus.consumer(spec(s, "two")).await.unwrap();
    let first = take(&one, 5).await;
    settle(&one, first, Settlement::Ack).await;
    assert_eq!(sequences(&take(&two, 5).await), [1, 2, 3, 4, 5]);
    let settled = async |name| progress(&bus, s, name).await.settled_through;
    eventually("the first has settled all", async || (settled("one").await == 5).then_some(())).await;
    assert_eq!(settled("two").await, 0);
    assert_eq!(BTreeSet::from_iter(bus.consumers(s).await.unwrap()), BTreeSet::from(["one".into(), "two".into()]));
}

/// Two handles, as two processes would have.
pub async fn one_name_shares_the_work(storage: Storage) {
    let bus = storage().await;
    let s = stream(&bus).await;
    publish(&bus, s, "a", 0..200).await;
    let (one, two) = (bus.consumer(spec(s, "c")).await.unwrap(), bus.consumer(spec(s, "c")).await.unwrap());
    let work = async |consumer: &Arc<dyn Consumer>| {
        let mut mine = Vec::new();
        while let deliveries = consumer.fetch(10, NOTHING).await.unwrap()
            && !deliveries.is_empty()
        {
            mine.extend(sequences(&deliveries));
            settle(consumer, deliveries, Settlement::Ack).await;
        }
        mine
    };
    let (mut all, other) = futures::join!(work(&one), work(&two));
    all.extend(other);
    all.sort_unstable();
    assert_eq!(all, (1..=200).collect::<Vec<_>>());
}

/// `*` is one token, `>` the rest.
pub async fn a_filter_picks_subjects(storage: Storage) {
    let bus = storage().await;
    let s = stream(&bus).await;
    for kind in ["lane.60", "lane.900", "paid", "lane.60.late"] {
        publish(&bus, s, kind, 0..2).await;
    }
    for (filter, expected) in [
        ("lane.60", vec![1, 2]),
        ("lane.*", vec![1, 2, 3, 4]),
        ("lane.>", vec![1, 2, 3, 4, 7, 8]),
        ("*.60", vec![1, 2]),
        ("paid", vec![5, 6]),
    ] {
        let name = unique("c");
        let of_filter = ConsumerSpec { filter: format!("{s}.{filter}"), ..spec(s, name) };
        let consumer = bus.consumer(of_filter).await.unwrap();
        let got = take(&consumer, expected.len()).await;
        assert_eq!(sequences(&got), expected, "{filter}");
        nothing(&consumer).await;
    }
}

/// MEASURED: delayed messages count, so that a window that is too small stops the consumer. It must go on afterwards.
pub async fn the_pending_window_stops_and_goes_on(storage: Storage) {
    let bus = storage().await;
    let s = stream(&bus).await;
    publish(&bus, s, "a", 0..5).await;
    let consumer = bus.consumer(ConsumerSpec { max_pending: 3, ..spec(s, "c") }).await.unwrap();
    let window = take(&consumer, 3).await;
    nothing(&consumer).await;
    let delay = Duration::from_secs(1);
    let naked = Instant::now();
    settle(&consumer, window, Settlement::Nak(delay)).await;
    eventually("the window is counted", async || {
        let now = progress(&bus, s, "c").await;
        (now == Progress { settled_through: 0, waiting: 2, pending: 3 }).then_some(())
    })
    .await;
    nothing(&consumer).await;
    let back = take(&consumer, 3).await;
    assert!(naked.elapsed() >= delay);
    assert_eq!(BTreeSet::from_iter(sequences(&back)), BTreeSet::from([1, 2, 3]));
    settle(&consumer, back, Settlement::Ack).await;
    assert_eq!(sequences(&take(&consumer, 2).await), [4, 5]);
}

/// By NAK and by silence; looked at, driven again, forgotten.
pub async fn e20_a_poison_message_becomes_a_dead_letter_and_blocks_nobody(storage: Storage) {
    let bus = storage().await;
    let s = stream(&bus).await;
    let ack_wait = Duration::from_millis(300);
    let limited = ConsumerSpec { max_attempts: Some(3), ack_wait, ..spec(s, "c") };
    let consumer = bus.consumer(limited).await.unwrap();
    publish(&bus, s, "a", 0..10).await;
    let mut attempts = Vec::new();
    let mut done = BTreeSet::new();
    let letters = eventually("both poison messages are dead letters", async || {
        for delivery in consumer.fetch(100, NOTHING).await.unwrap() {
            let sequence = delivery.sequence;
            match sequence {
                4 | 7 => attempts.push((sequence, delivery.attempt)),
                _ => assert!(done.insert(sequence)),
            }
            match sequence {
                4 => settle(&consumer, vec![delivery], Settlement::Nak(Duration::ZERO)).await,
                7 => {}
                _ => settle(&consumer, vec![delivery], Settlement::Ack).await,
            }
        }
        Some(letters_of(&bus, s).await).filter(|letters| letters.len() == 2)
    })
    .await;
    attempts.sort_unstable();
    assert_eq!(attempts, [(4, 1), (4, 2), (4, 3), (7, 1), (7, 2), (7, 3)]);
    assert_eq!(done, BTreeSet::from([1, 2, 3, 5, 6, 8, 9, 10]));
    nothing(&consumer).await;
    eventually("everything is settled", async || {
        let now = progress(&bus, s, "c").await;
        (now == Progress { settled_through: 10, waiting: 0, pending: 0 }).then_some(())
    })
    .await;

    let letter = letters.iter().find(|letter| letter.id == format!("{s}-c-4")).expect("of sequence 4");
    assert_eq!((letter.subject.as_str(), letter.message_id.as_str()), (format!("{s}.a").as_str(), "a-3"));
    assert_eq!((letter.attempts, &letter.payload), (3, &Bytes::from("payload 3")));
    assert!(letter.reason == ATTEMPTS_USED_UP && letter.at_ms > 0);

    assert_eq!(bus.redrive(&letter.id).await.unwrap().as_ref(), Some(letter));
    let again = take(&consumer, 1).await.remove(0);
    assert_eq!((again.sequence, again.attempt), (11, 1));
    assert_eq!((&again.subject, &again.payload), (&letter.subject, &letter.payload));
    assert_eq!(again.headers, message(s, "a", 3).headers);
    assert_ne!(again.id, letter.message_id);
    assert_eq!(bus.redrive(&letter.id).await.unwrap(), None);
    assert_eq!(bus.redrive("*").await.unwrap(), None);
    assert_eq!(letters_of(&bus, s).await.len(), 1);
}

/// With the reason, even one of several lines.
pub async fn a_refused_message_is_a_dead_letter_at_once(storage: Storage) {
    let bus = storage().await;
    let s = stream(&bus).await;
    let consumer = bus.consumer(spec(s, "c")).await.unwrap();
    publish(&bus, s, "a", 0..1).await;
    let delivery = take(&consumer, 1).await;
    settle(&consumer, delivery, Settlement::DeadLetter("cannot be\nread".into())).await;
    let letters = letters_of(&bus, s).await;
    assert_eq!((letters.len(), letters[0].attempts), (1, 1));
    assert!(letters[0].reason.starts_with("cannot be"));
    nothing(&consumer).await;
}

/// Oldest first, after the last one seen.
pub async fn dead_letters_are_listed_in_pages(storage: Storage) {
    let bus = storage().await;
    let s = stream(&bus).await;
    let consumer = bus.consumer(spec(s, "c")).await.unwrap();
    publish(&bus, s, "a", 0..5).await;
    for delivery in take(&consumer, 5).await {
        settle(&consumer, vec![delivery], Settlement::DeadLetter("no".into())).await;
    }
    let id = |n: u64| format!("{s}-c-{n}");
    assert_eq!(letters_of(&bus, s).await.iter().map(|l| l.id.clone()).collect::<Vec<_>>(), [1, 2, 3, 4, 5].map(id));
    let page = bus.dead_letters(Some(&id(2)), 1).await.unwrap();
    assert_eq!(page.len(), 1);
    assert!(page[0].id != id(1) && page[0].id != id(2));
    bus.redrive(&id(3)).await.unwrap().expect("it is there");
    assert_eq!(letters_of(&bus, s).await.iter().map(|l| l.id.clone()).collect::<Vec<_>>(), [1, 2, 4, 5].map(id));
}

/// A deadline comes back as often as it must.
pub async fn attempts_without_a_limit_never_end(storage: Storage) {
    let bus = storage().await;
    let s = stream(&bus).await;
    let consumer = bus.consumer(spec(s, "c")).await.unwrap();
    publish(&bus, s, "a", 0..1).await;
    for attempt in 1..=20 {
        let delivery = take(&consumer, 1).await;
        assert_eq!(delivery[0].attempt, attempt);
        settle(&consumer, delivery, Settlement::Nak(Duration::ZERO)).await;
    }
    assert_eq!(letters_of(&bus, s).await, []);
}

/// The sweep of orphan grants rests on it: never too far, and there when all is settled.
pub async fn progress_follows_what_is_settled(storage: Storage) {
    let bus = storage().await;
    let s = stream(&bus).await;
    let consumer = bus.consumer(ConsumerSpec { filter: format!("{s}.a"), ..spec(s, "c") }).await.unwrap();
    let now = async || progress(&bus, s, "c").await;
    assert_eq!(now().await, Progress { settled_through: 0, waiting: 0, pending: 0 });
    publish(&bus, s, "a", 0..4).await;
    publish(&bus, s, "b", 0..2).await;
    assert_eq!(now().await.settled_through, 0);
    eventually("four are waiting", async || (now().await.waiting == 4).then_some(())).await;
    let all = take(&consumer, 4).await;
    eventually("four are pending", async || (now().await.pending == 4).then_some(())).await;
    let one = |n: usize| vec![all[n].clone()];
    settle(&consumer, one(0), Settlement::Ack).await;
    settle(&consumer, one(2), Settlement::Ack).await;
    eventually("up to the gap", async || (now().await.settled_through == 1).then_some(())).await;
    settle(&consumer, one(1), Settlement::DeadLetter("no".into())).await;
    eventually("up to the last pending", async || (now().await.settled_through == 3).then_some(())).await;
    settle(&consumer, one(3), Settlement::Ack).await;
    let end = Progress { settled_through: 6, waiting: 0, pending: 0 };
    eventually("past what does not match", async || (now().await == end).then_some(())).await;
    for n in 4..50 {
        publish(&bus, s, "a", n..n + 1).await;
        assert!(now().await.settled_through <= 6, "passed over what was just published");
    }
}

/// A consumer whose subjects are never used holds nobody up.
pub async fn progress_is_complete_where_the_filter_has_nothing(storage: Storage) {
    let bus = storage().await;
    let s = stream(&bus).await;
    publish(&bus, s, "a", 0..7).await;
    bus.consumer(ConsumerSpec { filter: format!("{s}.b.*"), ..spec(s, "c") }).await.unwrap();
    assert_eq!(progress(&bus, s, "c").await, Progress { settled_through: 7, waiting: 0, pending: 0 });
}

/// Messages, duplicates, what was settled and what was not.
pub async fn everything_is_there_after_reopening(storage: Storage) {
    let ack_wait = Duration::from_millis(500);
    let bus = storage().await;
    let s = stream(&bus).await;
    publish(&bus, s, "a", 0..6).await;
    let limited = || ConsumerSpec { ack_wait, ..spec(s, "c") };
    let consumer = bus.consumer(limited()).await.unwrap();
    let mut first = take(&consumer, 4).await;
    let unsettled = first.split_off(2);
    let dead = first.split_off(1);
    settle(&consumer, first, Settlement::Ack).await;
    settle(&consumer, dead, Settlement::DeadLetter("no".into())).await;
    drop((bus, consumer));

    let bus = storage().await;
    assert!(publish(&bus, s, "a", 5..6).await[0].duplicate);
    assert_eq!(publish(&bus, s, "a", 6..7).await, [Published { sequence: 7, duplicate: false }]);
    assert_eq!(letters_of(&bus, s).await.len(), 1);
    assert_eq!(bus.consumers(s).await.unwrap(), ["c"]);
    let consumer = bus.consumer(limited()).await.unwrap();
    let rest = take(&consumer, 5).await;
    let by_attempt = |n| BTreeSet::from_iter(rest.iter().filter(|d| d.attempt == n).map(|d| d.sequence));
    assert_eq!(by_attempt(2), BTreeSet::from_iter(sequences(&unsettled)));
    assert_eq!(by_attempt(1), BTreeSet::from([5, 6, 7]));
}

/// A crash loop does not make a poison message immortal.
pub async fn attempts_survive_reopening(storage: Storage) {
    let mut s = "";
    for attempt in 1..=3 {
        let bus = storage().await;
        if attempt == 1 {
            s = stream(&bus).await;
            publish(&bus, s, "a", 0..1).await;
        }
        let ack_wait = Duration::from_millis(200);
        let limited = ConsumerSpec { max_attempts: Some(3), ack_wait, ..spec(s, "c") };
        let consumer = bus.consumer(limited).await.unwrap();
        let delivery = take(&consumer, 1).await.remove(0);
        assert_eq!(delivery.attempt, attempt);
        if attempt == 3 {
            eventually("the message is buried", async || {
                nothing(&consumer).await;
                letters_of(&bus, s).await.pop()
            })
            .await;
        }
    }
}

/// An operator looks at any message, settled or not.
pub async fn a_sequence_can_be_read(storage: Storage) {
    let bus = storage().await;
    let s = stream(&bus).await;
    publish(&bus, s, "a", 0..3).await;
    assert_eq!(bus.read(s, 2).await.unwrap(), Some(message(s, "a", 1)));
    assert_eq!(bus.read(s, 0).await.unwrap(), None);
    assert_eq!(bus.read(s, 4).await.unwrap(), None);
    assert_eq!(bus.last_sequence(s).await.unwrap(), 3);
}

/// Consumed or not; sequences go on.
pub async fn old_messages_are_dropped(storage: Storage) {
    let bus = storage().await;
    let s = stream_for(&bus, Duration::from_secs(1)).await;
    let consumer = bus.consumer(spec(s, "c")).await.unwrap();
    publish(&bus, s, "a", 0..2).await;
    eventually("the first messages are dropped", async || bus.read(s, 2).await.unwrap().is_none().then_some(())).await;
    assert_eq!(publish(&bus, s, "a", 2..3).await[0].sequence, 3);
    assert_eq!(sequences(&take(&consumer, 1).await), [3]);
    eventually("nothing waits any more", async || (progress(&bus, s, "c").await.waiting == 0).then_some(())).await;
}

/// Late answers and repeated ones.
pub async fn e22_settling_again_changes_nothing(storage: Storage) {
    let bus = storage().await;
    let s = stream(&bus).await;
    let consumer = bus.consumer(spec(s, "c")).await.unwrap();
    publish(&bus, s, "a", 0..2).await;
    let all = take(&consumer, 2).await;
    for _ in 0..2 {
        settle(&consumer, all.clone(), Settlement::Ack).await;
    }
    settle(&consumer, all, Settlement::Nak(Duration::ZERO)).await;
    nothing(&consumer).await;
    let end = Progress { settled_through: 2, waiting: 0, pending: 0 };
    eventually("both are settled", async || (progress(&bus, s, "c").await == end).then_some(())).await;
    assert!(publish(&bus, s, "a", 0..2).await.iter().all(|p| p.duplicate));
    nothing(&consumer).await;
}

/// Shutting down, or losing a race in a `select!`.
pub async fn an_abandoned_fetch_loses_nothing(storage: Storage) {
    let bus = storage().await;
    let s = stream(&bus).await;
    let ack_wait = Duration::from_millis(500);
    let consumer = bus.consumer(ConsumerSpec { ack_wait, ..spec(s, "c") }).await.unwrap();
    for n in 0..20 {
        let publishing = publish(&bus, s, "a", n..n + 1);
        tokio::select! {
            biased;
            _ = consumer.fetch(10, PATIENCE) => {}
            _ = publishing => {}
        }
    }
    // Some publishes were abandoned too.
    publish(&bus, s, "a", 0..20).await;
    let mut settled = BTreeSet::new();
    while settled.len() < 20 {
        let some = take(&consumer, 1).await;
        settled.extend(sequences(&some));
        settle(&consumer, some, Settlement::Ack).await;
    }
    assert_eq!(settled, BTreeSet::from_iter(1..=20));
}

/// From the moment of listening; nothing is kept.
pub async fn signals_reach_those_who_listen_in_order(storage: Storage) {
    let bus = storage().await;
    let (subject, other) = (unique("signal."), unique("signal."));
    bus.signal(subject, "nobody hears".into()).await.unwrap();
    let mut one = bus.listen(subject).await.unwrap();
    let mut two = bus.listen(subject).await.unwrap();
    for n in 0..100 {
        bus.signal(other, "not this".into()).await.unwrap();
        bus.signal(subject, Bytes::from(n.to_string())).await.unwrap();
    }
    for listener in [&mut one, &mut two] {
        for n in 0..100 {
            let heard = tokio::time::timeout(PATIENCE, listener.recv()).await.expect("a signal");
            assert_eq!(heard.unwrap(), n.to_string());
        }
        assert_eq!(listener.try_recv(), Err(TryRecvError::Empty));
    }
}

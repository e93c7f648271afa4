//! The bus with its faults: messages and answers get lost, deliveries come again, late and in another order.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use mesh::bus::{
    Bus, Consumer, ConsumerSpec, DeadLetter, Delivery, Error, Message, Progress, Published, Settlement, SharedBus,
    StreamSpec,
};
use tokio::sync::broadcast;

use crate::faults::{Fault, Hands, Port};

/// Deliveries that may come again, whatever became of them.
const REMEMBERED: usize = 16;

/// One role's handle on the bus.
#[derive(Debug)]
pub struct FaultyBus {
    hands: Hands,
    behind: SharedBus,
}

impl FaultyBus {
    pub fn shared(hands: &Hands, behind: SharedBus) -> SharedBus {
        Arc::new(Self { hands: hands.clone(), behind })
    }
}

fn broken(operation: &'static str) -> impl Fn(&'static str) -> Error {
    move |what| Error::Unavailable { operation, source: what.into() }
}

/// One method.
macro_rules! bussed {
    ($self:ident, $operation:ident($($asked:expr),*), $effect:expr) => {{
        let asked = || format!("{:?}", ($(&$asked,)*));
        $self.hands.call(Port::Bus, stringify!($operation), asked, $effect, broken(stringify!($operation))).await
    }};
}

#[async_trait]
impl Bus for FaultyBus {
    async fn ensure_stream(&self, spec: &StreamSpec) -> Result<(), Error> {
        bussed!(self, ensure_stream(spec.name), self.behind.ensure_stream(spec))
    }

    async fn publish(&self, stream: &'static str, messages: Vec<Message>) -> Vec<Result<Published, Error>> {
        let count = messages.len();
        let ids: Vec<String> = messages.iter().map(|message| message.id.clone()).collect();
        let published = bussed!(self, publish(stream, ids), async { Ok(self.behind.publish(stream, messages).await) });
        published
            .unwrap_or_else(|_| (0..count).map(|_| Err(broken("publish")("simulated: no acknowledgement"))).collect())
    }

    async fn consumer(&self, spec: ConsumerSpec) -> Result<Arc<dyn Consumer>, Error> {
        let name: Arc<str> = spec.name.as_str().into();
        let consumer = bussed!(self, consumer(name), self.behind.consumer(spec))?;
        Ok(Arc::new(FaultyConsumer { hands: self.hands.clone(), name, behind: consumer, before: Mutex::default() }))
    }

    async fn consumers(&self, stream: &'static str) -> Result<Vec<String>, Error> {
        bussed!(self, consumers(stream), self.behind.consumers(stream))
    }

    async fn progress(&self, stream: &'static str, consumer: &str) -> Result<Option<Progress>, Error> {
        bussed!(self, progress(stream, consumer), self.behind.progress(stream, consumer))
    }

    async fn last_sequence(&self, stream: &'static str) -> Result<u64, Error> {
        bussed!(self, last_sequence(stream), self.behind.last_sequence(stream))
    }

    async fn read(&self, stream: &'static str, sequence: u64) -> Result<Option<Message>, Error> {
        bussed!(self, read(stream, sequence), self.behind.read(stream, sequence))
    }

    async fn dead_letters(&self, after: Option<&str>, limit: usize) -> Result<Vec<DeadLetter>, Error> {
        bussed!(self, dead_letters(after), self.behind.dead_letters(after, limit))
    }

    async fn redrive(&self, id: &str) -> Result<Option<DeadLetter>, Error> {
        bussed!(self, redrive(id), self.behind.redrive(id))
    }

    /// Lost without a word, too.
    async fn signal(&self, subject: &'static str, payload: Bytes) -> Result<(), Error> {
        let _ = bussed!(self, signal(subject), self.behind.signal(subject, payload));
        Ok(())
    }

    async fn listen(&self, subject: &'static str) -> Result<broadcast::Receiver<Bytes>, Error> {
        bussed!(self, listen(subject), self.behind.listen(subject))
    }
}

#[derive(Debug)]
struct FaultyConsumer {
    hands: Hands,
    name: Arc<str>,
    behind: Arc<dyn Consumer>,
    before: Mutex<VecDeque<Delivery>>,
}

impl FaultyConsumer {
    /// A delivery of before, and the new ones for another time.
    fn again(&self, fresh: &[Delivery]) -> Option<Delivery> {
        let mut before = self.before.lock().unwrap_or_else(PoisonError::into_inner);
        before.extend(fresh.iter().cloned());
        while before.len() > REMEMBERED {
            before.pop_front();
        }
        (!before.is_empty()).then(|| before[self.hands.run().below(before.len())].clone())
    }
}

fn shuffle(hands: &Hands, deliveries: &mut [Delivery]) {
    for last in (1..deliveries.len()).rev() {
        deliveries.swap(last, hands.run().below(last + 1));
    }
}

fn listed(deliveries: &[Delivery]) -> Vec<(&str, u32)> {
    deliveries.iter().map(|delivery| (delivery.id.as_str(), delivery.attempt)).collect()
}

#[async_trait]
impl Consumer for FaultyConsumer {
    /// A fetch waits, so its fate is that of its end.
    async fn fetch(&self, max: usize, wait: Duration) -> Result<Vec<Delivery>, Error> {
        self.hands.able().await;
        let mut deliveries = self.behind.fetch(max, wait).await?;
        self.hands.able().await;
        let fate = self.hands.draw(Port::Bus);
        if deliveries.is_empty() && fate.fault != Some(Fault::Duplicated) {
            return match fate.fault {
                Some(Fault::Lost | Fault::FailedBefore) => Err(broken("fetch")("simulated: away")),
                _ => Ok(deliveries),
            };
        }
        let again = self.again(&deliveries);
        if fate.reordered {
            shuffle(&self.hands, &mut deliveries);
        }
        if fate.fault == Some(Fault::Duplicated) {
            deliveries.extend(again);
        }
        self.hands.note(|| {
            let fault = fate.fault.map(|fault| format!(" but {fault:?}")).unwrap_or_default();
            format!("fetch {} = {:?}{fault}", self.name, listed(&deliveries))
        });
        self.hands.pause(fate.before + fate.after).await;
        match fate.fault {
            // Taken, and never seen by anybody: they come again.
            Some(Fault::Lost | Fault::FailedBefore | Fault::FailedAfter) => {
                Err(broken("fetch")("simulated: deliveries got lost"))
            }
            _ => Ok(deliveries),
        }
    }

    async fn settle(&self, settlements: Vec<(Delivery, Settlement)>) -> Result<(), Error> {
        let asked: Vec<(String, Settlement)> = settlements.iter().map(|(d, s)| (d.id.clone(), s.clone())).collect();
        bussed!(self, settle(self.name, asked), self.behind.settle(settlements))
    }
}

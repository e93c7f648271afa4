//! Where plays are played: one order of one unit, on paused time, by whatever coordinator there is.

use std::time::Duration;

use coordinator::{
    Config,
    calls::is_fault,
    domain::refund_of,
    engine::{Named, replay},
    order_saga::OrderSaga,
    refund_saga::RefundSaga,
    store::{Entry, Filter, Row},
};
use mesh::bus::Bus;
use proto::{
    OrderId, Reason, RequestId,
    error::Result,
    internal::PaymentState,
    subjects,
    v1::{Order, OrderState},
};
use tokio::time::sleep;

use super::faults::Faults;
use crate::{
    fakes::{self, HoldState},
    world::{self, Door, SALE, World, order_id},
};

const BUYER: &str = "alice";
/// Long enough to pay, whatever goes wrong meanwhile.
const WINDOW_MS: i64 = 5_000;
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Of the play's own time.
const LOOKS: usize = 600;
/// So many looks without a saga, and its order is waiting for good.
const LOOKS_WITHOUT_A_SAGA: usize = 20;
/// What a zombie has for whatever it does yet.
const AFTERMATH: Duration = Duration::from_secs(5);

/// Soon stuck; and nobody gives up on a deed because its process slept.
pub fn config() -> Config {
    Config {
        saga_attempts: 4,
        saga_step_timeout_ms: 3_600_000,
        deadline_sweep_ms: 500,
        saga_recovery_ms: 200,
        lane_refresh_ms: 1_000,
        ..world::config()
    }
}

/// How a play came to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reported {
    /// By itself.
    Nothing,
    /// A saga was stuck, and said this.
    Stuck(String),
    /// There is no saga yet: a message waited in its stream.
    Waiting,
}

/// What must be so at the end.
pub struct End {
    /// The saga's.
    pub state: &'static str,
    pub record: OrderState,
    /// Free, granted, locked, sold.
    pub units: (i64, i64, i64, i64),
    /// How often it was captured and returned.
    pub money: (u32, u32),
}

pub struct Stage {
    pub world: World,
    faults: Faults,
    /// Whether another coordinator has taken over.
    taken_over: bool,
    request: RequestId,
    payment: RequestId,
    id: OrderId,
    reported: Reported,
}

impl Stage {
    /// A coordinator with these faults, and one unit to be had.
    pub async fn open(faults: &Faults) -> Self {
        let mut world = World::on_paused_time(config());
        world.sale(1, 1, WINDOW_MS);
        world.start_here(faults).await;
        let request = RequestId::random();
        Self {
            world,
            faults: faults.clone(),
            taken_over: false,
            id: order_id(BUYER, &request),
            request,
            payment: RequestId::random(),
            reported: Reported::Nothing,
        }
    }

    // The buyer.

    pub async fn accept_once(&self) -> Result<Order> {
        self.world.accept(BUYER, 1, &self.request).await
    }

    pub async fn accept(&mut self) {
        let request = self.request;
        self.ask(move |door| async move { door.accept(SALE, BUYER, 1, &request).await }).await.unwrap();
    }

    /// In the stream, and too late to be called placed.
    pub async fn accept_late(&mut self) {
        let request = self.request;
        let ask = move |door: Door| async move {
            match door.accept(SALE, BUYER, 1, &request).await {
                Err(error) if error.reason == Reason::Overloaded => Ok(Order::default()),
                answer => answer,
            }
        };
        self.ask(ask).await.unwrap();
    }

    /// Accepted and locked.
    pub async fn hold(&mut self) {
        self.accept().await;
        self.until("held", |row| row.state == "AWAITING_PAYMENT").await;
    }

    pub async fn pay(&mut self, method: &'static str) -> Result<Order> {
        let (id, payment) = (self.id, self.payment);
        self.ask(move |door| async move { door.pay(BUYER, id, method, &payment).await }).await
    }

    /// Pays, with a provider that has not decided when it was asked again.
    pub async fn leave_open(&mut self) {
        let paying = self.pay("hang").await.unwrap();
        assert_eq!(paying.state(), OrderState::Paying);
        self.until("asked again", |row| row.state == "PAYING" && row.attempts > 0).await;
    }

    pub async fn cancel(&mut self) -> Result<Order> {
        let id = self.id;
        self.ask(move |door| async move { door.cancel(BUYER, id).await }).await
    }

    /// Asks until there is an answer, whoever gives it. What was asked of a process that has stopped is still under way
    /// there.
    async fn ask<Fut>(&mut self, ask: impl Fn(Door) -> Fut) -> Result<Order>
    where
        Fut: Future<Output = Result<Order>> + Send + 'static,
    {
        loop {
            let asked = tokio::spawn(ask(self.world.door()));
            let faults = self.faults.clone();
            tokio::select! {
                biased;
                answer = asked => match answer.unwrap() {
                    Err(error) if is_fault(&error) => sleep(LOOK_EVERY).await,
                    answer => return answer,
                },
                () = faults.stopped(), if !self.taken_over => self.take_over().await,
            }
        }
    }

    // The others.

    /// The order's permit or hold is taken from it.
    pub fn lapse(&self) {
        let mut state = self.world.fakes.state();
        state.holds.get_mut(&self.id.to_string()).unwrap().state = HoldState::Released;
        state.sales.get_mut(SALE).unwrap().free += 1;
    }

    pub async fn provider_says(&self, outcome: PaymentState) {
        self.world.fakes.settle(&self.id.to_string(), outcome).await;
    }

    async fn take_over(&mut self) {
        self.taken_over = true;
        self.world.start_here(&Faults::none()).await;
    }

    /// Does what somebody who watches would do. `waits`: the order waits for good.
    async fn attend(&mut self, waits: bool) {
        if self.faults.has_stopped() && !self.taken_over {
            self.take_over().await;
        }
        if self.faults.goes_on() {
            self.report(waits).await;
        }
    }

    /// Waits until this is so of the saga.
    pub async fn until(&mut self, what: &str, is_so: impl Fn(&Row) -> bool) {
        for look in 0..LOOKS {
            let row = self.world.row(self.id).await;
            self.attend(row.is_none() && look >= LOOKS_WITHOUT_A_SAGA).await;
            // Whatever comes next could make a deed that fails unnecessary, and then nobody would be told.
            if !self.faults.goes_on() && row.as_ref().is_some_and(&is_so) {
                return;
            }
            sleep(LOOK_EVERY).await;
        }
        panic!("still not {what}: {:?}", self.world.row(self.id).await);
    }

    /// Notes who is told that a deed fails, and ends that.
    async fn report(&mut self, waits: bool) {
        let stuck = self.world.store.list(&Filter::Stuck, "", 10).await.unwrap();
        let (blamed, _) = self.faults.blamed();
        let told = stuck.into_iter().find(|row| blamed.contains(&row.last_error));
        self.reported = match told {
            Some(row) => Reported::Stuck(row.last_error),
            None if waits => Reported::Waiting,
            None => return,
        };
        self.faults.lift();
    }

    // The end.

    /// Waits for the end and says how it came.
    pub async fn close(mut self, end: &End) -> Reported {
        self.until(end.state, |row| row.state == end.state).await;
        self.settled().await;
        self.check(end).await;
        if self.taken_over {
            // Who was given up was not dead, and goes on with what it knew.
            let before = self.everything().await;
            self.faults.wake();
            sleep(AFTERMATH).await;
            self.settled().await;
            assert_eq!(self.everything().await, before, "a zombie has changed something");
        }
        self.reported
    }

    /// Waits until no message is left to be acknowledged, and no saga has anything to do.
    async fn settled(&mut self) {
        for _ in 0..LOOKS {
            self.attend(false).await;
            if self.waiting().await.is_empty() {
                return;
            }
            sleep(LOOK_EVERY).await;
        }
        panic!("it does not come to rest: {:?}", self.waiting().await);
    }

    async fn waiting(&self) -> Vec<String> {
        let bus = &self.world.bus;
        let mut waiting = Vec::new();
        for stream in [subjects::ORDERS, subjects::PAYMENTS] {
            let last = bus.last_sequence(stream).await.unwrap();
            for consumer in bus.consumers(stream).await.unwrap() {
                let progress = bus.progress(stream, &consumer).await.unwrap().expect("a consumer");
                if progress.settled_through < last {
                    waiting.push(format!("{consumer} is at {progress:?} of {last}"));
                }
            }
        }
        for (row, _) in self.sagas().await {
            if row.next_attempt_at.is_some() {
                waiting.push(format!("{row:?}"));
            }
        }
        waiting
    }

    /// The order's saga and its refund's, with their logs.
    async fn sagas(&self) -> Vec<(Row, Vec<Entry>)> {
        let mut sagas = Vec::new();
        for id in [self.id, refund_of(self.id)] {
            if let Some(row) = self.world.row(id).await {
                sagas.push((row, self.world.store.log(id).await.unwrap()));
            }
        }
        sagas
    }

    /// Record, hold and money fit together; nothing is held, nothing was told twice, and the logs tell the truth.
    async fn check(&self, end: &End) {
        let (world, id) = (&self.world, self.id);
        assert_eq!(world.record(id), Some(end.record));
        assert_eq!(world.units(), end.units);
        assert_eq!((world.captures(id), world.refunds(id)), end.money);
        let announced = world.bus.last_sequence(subjects::EVENTS).await.unwrap();
        assert_eq!(announced, u64::from(end.record == OrderState::Paid));
        assert_eq!(world.bus.dead_letters(None, 1).await.unwrap().len(), 0);
        for (row, log) in self.sagas().await {
            let replayed = if row.saga_id == id {
                replay::<OrderSaga>(&log).map(Named::name)
            } else {
                replay::<RefundSaga>(&log).map(Named::name)
            };
            assert_eq!(replayed.unwrap(), row.state);
            assert!(!row.stuck, "{row:?}");
        }
    }

    /// Whatever there is.
    async fn everything(&self) -> (fakes::State, Vec<(Row, Vec<Entry>)>, u64) {
        let fakes = self.world.fakes.state().clone();
        let announced = self.world.bus.last_sequence(subjects::EVENTS).await.unwrap();
        (fakes, self.sagas().await, announced)
    }
}

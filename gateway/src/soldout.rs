//! The sold-out memory: what a signal said of a sale, for as long as it may be repeated without asking.
//!
//! Refusing here costs microseconds where asking costs two hops. What is promised:
//!
//! - A winner who retries is never refused (E2): whoever may be in the signal's filter is asked about properly.
//! - A refusal is never older than its verdict's time to live, whatever signals were lost, so that nothing rests on
//!   signals alone. An older signal never replaces a newer one.
//! - SOLD_OUT is only repeated of a sale that said so itself (I8); empty-for-now is ALL_HELD.

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use metrics::Counter;
use proto::{
    BuyerId, Error, Reason, SaleId,
    filter::Filter,
    internal::SaleChanged,
    v1::{Availability, SaleState},
};
use tokio::time::Instant;

use crate::failure::Prepared;

/// Units come back at any moment, and a buyer told so a second late has lost them to another.
const ALL_HELD_FOR: Duration = Duration::from_secs(1);
/// Final but for stock that an operator adds, whose signal clears it at once.
const SOLD_OUT_FOR: Duration = Duration::from_secs(10);
/// Final. Forgotten in the end only to keep the memory small.
const ENDED_FOR: Duration = Duration::from_secs(600);
/// Above this many sales the forgotten ones are swept out.
const SALES: usize = 10_000;

/// What is known of sales that cannot be bought from.
#[derive(Debug)]
pub struct SoldOut {
    sales: RwLock<HashMap<String, Known>>,
    /// What is said, the same to everybody.
    ended: Arc<Prepared>,
    sold_out: Arc<Prepared>,
    all_held: Arc<Prepared>,
}

impl Default for SoldOut {
    fn default() -> Self {
        let prepared = |reason, message| Arc::new(Prepared::new(Error::new(reason, message)));
        Self {
            sales: RwLock::default(),
            ended: prepared(Reason::SaleEnded, "the sale has ended"),
            sold_out: prepared(Reason::SoldOut, "sold out"),
            all_held: prepared(Reason::AllHeld, "every unit is held; one may come back"),
        }
    }
}

#[derive(Debug)]
struct Known {
    version: i64,
    /// `None`: can be bought from, as far as is known. Kept for its version.
    verdict: Option<Verdict>,
    until: Instant,
}

#[derive(Debug)]
struct Verdict {
    refusal: Arc<Prepared>,
    /// Who must be asked about properly.
    buyers: Filter,
    /// Counts who was told so.
    told: Counter,
}

impl SoldOut {
    /// Takes note of a signal.
    pub fn learn(&self, changed: &SaleChanged) {
        let Some(sale) = &changed.sale else { return };
        let (refusal, lasts) = match (sale.state(), sale.availability()) {
            (SaleState::Ended, _) => (Some(&self.ended), ENDED_FOR),
            (_, Availability::SoldOut) => (Some(&self.sold_out), SOLD_OUT_FOR),
            (_, Availability::AllHeld) => (Some(&self.all_held), ALL_HELD_FOR),
            _ => (None, SOLD_OUT_FOR),
        };
        let verdict = refusal.map(|refusal| {
            let reason = refusal.error().reason.as_str_name();
            let told = metrics::counter!("seckill_refused_from_memory_total", "reason" => reason);
            Verdict { refusal: refusal.clone(), buyers: Filter::from_bytes(&changed.buyers), told }
        });
        let id = sale.name.strip_prefix("sales/").unwrap_or(&sale.name);
        let now = Instant::now();
        let mut sales = self.sales.write().unwrap_or_else(PoisonError::into_inner);
        if sales.get(id).is_some_and(|known| known.version > changed.version) {
            return;
        }
        if sales.len() >= SALES {
            sales.retain(|_, known| known.until > now);
        }
        sales.insert(id.to_owned(), Known { version: changed.version, verdict, until: now + lasts });
    }

    /// Forgets every verdict: signals were lost, and one of them may have been good news.
    pub fn forget(&self) {
        for known in self.sales.write().unwrap_or_else(PoisonError::into_inner).values_mut() {
            known.verdict = None;
        }
    }

    /// Why this buyer surely gets nothing from this sale now; `None` when it must be asked properly.
    pub fn refusal(&self, sale: &SaleId, buyer: &BuyerId) -> Option<Arc<Prepared>> {
        let sales = self.sales.read().unwrap_or_else(PoisonError::into_inner);
        let known = sales.get(sale.as_str())?;
        let verdict = known.verdict.as_ref().filter(|_| known.until > Instant::now())?;
        if verdict.buyers.may_contain(buyer.as_str()) {
            return None;
        }
        verdict.told.increment(1);
        Some(verdict.refusal.clone())
    }
}

#[cfg(test)]
mod tests {
    use proto::v1::Sale;

    use super::*;

    fn signal(version: i64, availability: Availability, winners: &[&str]) -> SaleChanged {
        let mut sale = Sale { name: "sales/s".into(), ..Default::default() };
        sale.set_state(SaleState::Open);
        sale.set_availability(availability);
        let buyers = Filter::build(winners.iter().copied()).as_bytes().to_vec();
        SaleChanged { sale: Some(sale), version, buyers: buyers.into() }
    }

    fn said(memory: &SoldOut, buyer: &str) -> Option<Reason> {
        let (sale, buyer) = (SaleId::parse("sale", "s").unwrap(), BuyerId::parse(buyer).unwrap());
        memory.refusal(&sale, &buyer).map(|refusal| refusal.error().reason)
    }

    #[tokio::test(start_paused = true)]
    async fn e2_a_winner_is_asked_about_and_a_stranger_is_refused() {
        let memory = SoldOut::default();
        assert_eq!(said(&memory, "stranger"), None, "nothing is known");
        memory.learn(&signal(1, Availability::SoldOut, &["winner"]));
        assert_eq!(said(&memory, "winner"), None);
        assert_eq!(said(&memory, "stranger"), Some(Reason::SoldOut));
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_filter_everybody_is_asked_about() {
        let memory = SoldOut::default();
        memory.learn(&SaleChanged { buyers: Default::default(), ..signal(1, Availability::SoldOut, &[]) });
        assert_eq!(said(&memory, "stranger"), None);
    }

    #[tokio::test(start_paused = true)]
    async fn e38_units_that_come_back_clear_the_verdict_and_older_signals_do_not() {
        let memory = SoldOut::default();
        memory.learn(&signal(5, Availability::AllHeld, &["w"]));
        assert_eq!(said(&memory, "x"), Some(Reason::AllHeld));
        memory.learn(&signal(4, Availability::Available, &[]));
        assert_eq!(said(&memory, "x"), Some(Reason::AllHeld), "older than what is known");
        memory.learn(&signal(6, Availability::Available, &[]));
        assert_eq!(said(&memory, "x"), None);
        memory.learn(&signal(5, Availability::SoldOut, &["w"]));
        assert_eq!(said(&memory, "x"), None, "older than the good news");
    }

    #[tokio::test(start_paused = true)]
    async fn verdicts_are_not_repeated_for_ever() {
        let memory = SoldOut::default();
        for (version, availability, lasts) in [(1, Availability::AllHeld, 1), (2, Availability::SoldOut, 10)] {
            memory.learn(&signal(version, availability, &["w"]));
            tokio::time::advance(Duration::from_secs(lasts) - Duration::from_millis(1)).await;
            assert!(said(&memory, "x").is_some());
            tokio::time::advance(Duration::from_millis(2)).await;
            assert_eq!(said(&memory, "x"), None);
        }
        memory.learn(&signal(3, Availability::SoldOut, &["w"]));
        memory.forget();
        assert_eq!(said(&memory, "x"), None, "signals were lost");
    }
}

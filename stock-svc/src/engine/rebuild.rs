//! Rebuilding a sale's permits from the ledger: the steps of [`crate::domain::rebuild`], done.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use mesh::bus::Message;
use prost::Message as _;
use proto::{SaleId, error::Result, internal::OrderPlaced, subjects};
use tokio::{
    sync::{Semaphore, watch},
    time::Instant,
};

use super::{Engine, guard::Need};
use crate::domain::{
    permits::{Claimed, Phase},
    rebuild::{Fenced, Rebuild, Todo, blocks},
};

/// Rebuilds that work on the database at once; the connections are for buyers.
const AT_ONCE: usize = 4;

/// Holds put back in one call.
const LOAD: usize = 2000;

/// How often the funnel is asked where it is.
const POLL: Duration = Duration::from_millis(20);
const CLAIM_CHECK: Duration = Duration::from_secs(1);

/// A funnel that has not passed by then may be held up by orders that are stale: they are looked at.
const LOOK_AFTER: Duration = Duration::from_millis(500);

/// How a rebuild ended; none before.
type Ended = watch::Receiver<Option<Result<()>>>;

/// The rebuilds under way in this process.
#[derive(Debug)]
pub(super) struct Rebuilds {
    running: Mutex<HashMap<SaleId, Ended>>,
    slots: Semaphore,
}

impl Default for Rebuilds {
    fn default() -> Self {
        Self { running: Mutex::default(), slots: Semaphore::new(AT_ONCE) }
    }
}

impl Engine {
    /// Starts a rebuild in the background, unless one is under way here, or the guard's second look finds no need of it.
    pub(super) fn rebuild_as_seen(&self, sale: &SaleId, seen: Need) {
        drop(self.begin_rebuild(sale, Some(seen)));
    }

    /// Rebuilds, or joins the rebuild under way, and waits up to `patience` for its end. Fails when it did. It may go on
    /// afterwards, or another may have overtaken it: the header tells.
    pub(super) async fn rebuild_within(&self, sale: &SaleId, patience: Duration) -> Result<()> {
        let mut running = self.begin_rebuild(sale, None);
        match tokio::time::timeout(patience, running.wait_for(Option::is_some)).await {
            Ok(Ok(ended)) => ended.clone().unwrap_or(Ok(())),
            // It goes on; or its task was dropped, because this process stops.
            Ok(Err(_)) | Err(_) => Ok(()),
        }
    }

    fn begin_rebuild(&self, sale: &SaleId, seen: Option<Need>) -> Ended {
        let mut running = self.0.rebuilds.running.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(running) = running.get(sale) {
            return running.clone();
        }
        let (end, ended) = watch::channel(None);
        running.insert(sale.clone(), ended.clone());
        let (engine, sale) = (self.clone(), sale.clone());
        self.0.life.spawn(async move {
            let outcome = tokio::select! {
                biased;
                () = engine.0.life.stopping() => Ok(false),
                outcome = engine.rebuild(&sale, seen) => outcome,
            };
            let label = match &outcome {
                Ok(true) => "opened",
                // By another, or by whoever had opened them before the second look.
                Ok(false) => "overtaken",
                Err(error) => {
                    tracing::warn!(%sale, %error, "rebuilding permits failed");
                    "failed"
                }
            };
            metrics::counter!("seckill_rebuilds_total", "outcome" => label).increment(1);
            let mut running = engine.0.rebuilds.running.lock().unwrap_or_else(PoisonError::into_inner);
            running.remove(&sale);
            // Nobody may be waiting for it.
            end.send_replace(Some(outcome.map(drop)));
        });
        ended
    }

    /// Steps from one to the next. False when another rebuild has overtaken this one, or what was `seen` is not so any
    /// more.
    async fn rebuild(&self, sale: &SaleId, seen: Option<Need>) -> Result<bool> {
        if let Some(seen) = seen {
            let _slot = self.0.rebuilds.slots.acquire().await;
            if !self.still_needs(sale, seen).await? {
                return Ok(false);
            }
        }
        let mut rebuild = Rebuild::default();
        loop {
            match rebuild.todo().clone() {
                Todo::Allocate { above } => {
                    let _slot = self.0.rebuilds.slots.acquire().await;
                    rebuild.allocated(self.0.store.allocate_epoch(sale, above).await?);
                }
                Todo::Claim => self.claim(sale, &mut rebuild).await?,
                Todo::Drain if self.drain(sale, rebuild.epoch()).await? => rebuild.drained(),
                Todo::Drain => rebuild.overtaken(),
                Todo::Fence => {
                    let _slot = self.0.rebuilds.slots.acquire().await;
                    rebuild.fenced(self.0.store.fence(sale, rebuild.epoch()).await?);
                }
                Todo::Open(fenced) => {
                    let opened = self.open(sale, &rebuild, &fenced).await?;
                    rebuild.opened(opened);
                }
                Todo::Over { opened } => return Ok(opened),
            }
        }
    }

    async fn claim(&self, sale: &SaleId, rebuild: &mut Rebuild) -> Result<()> {
        let _slot = self.0.rebuilds.slots.acquire().await;
        let epoch = rebuild.epoch();
        let server = self.0.permits.fingerprint().await?;
        // Its facts are told again when it opens; these only fill the header.
        let facts = self.0.store.standing(sale).await?.record.facts();
        let claimed = self.0.permits.claim(sale, epoch, &facts, &server).await?;
        let there = match claimed {
            Claimed::Yes => {
                tracing::info!(%sale, epoch, "permits claimed for a rebuild");
                None
            }
            Claimed::No(_) => self.0.permits.header(sale).await?.map(|header| header.phase),
        };
        rebuild.claimed(claimed, there, self.fence_of(sale).await?);
        Ok(())
    }

    /// Waits until nothing blocks the fence. False when the claim was lost meanwhile. There is no giving up: opening
    /// early would sell the units of accepted orders again.
    async fn drain(&self, sale: &SaleId, epoch: i64) -> Result<bool> {
        let started = Instant::now();
        let (mut warned, mut checked) = (false, started);
        let (mut end, mut next) = (None, 1);
        loop {
            // The bus may be away for a while, too.
            let passed = match end {
                None => self.0.bus.last_sequence(subjects::ORDERS).await.map(|last| end = Some(last)).map(|()| false),
                Some(end) => match self.pass(sale, &mut next, end, started.elapsed() >= LOOK_AFTER).await {
                    Ok(true) => return Ok(true),
                    Ok(false) => Ok(false),
                    Err(error) => {
                        tracing::debug!(%error, "asking for the funnel's progress failed");
                        Ok(false)
                    }
                },
            };
            if let Err(error) = passed {
                tracing::debug!(%error, "asking for the stream's end failed");
            }
            if checked.elapsed() >= CLAIM_CHECK {
                checked = Instant::now();
                let header = self.0.permits.header(sale).await?;
                if header.is_none_or(|header| header.epoch != epoch || header.phase != Phase::Rebuilding) {
                    return Ok(false);
                }
            }
            if !warned && started.elapsed() >= self.0.config.rebuild_drain_timeout {
                warned = true;
                tracing::warn!(%sale, epoch, "a rebuild still waits for the funnel to lock the orders accepted before");
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Moves `next` past everything that does not block the fence, and answers whether that is all up to `end`. Where
    /// the funnel stands still, `looking` at the orders themselves tells: one that is stale waits for permits, which
    /// nobody has before a rebuild opens, and keeps the funnel from settling those behind it in order.
    async fn pass(&self, sale: &SaleId, next: &mut u64, end: u64, looking: bool) -> Result<bool> {
        let progress = self.0.bus.progress(subjects::ORDERS, subjects::FUNNEL).await?;
        *next = progress.map_or(*next, |progress| (progress.settled_through + 1).max(*next));
        if *next > end || !looking {
            return Ok(*next > end);
        }
        // It moves only forward: what does not block now never will.
        let fence = self.fence_of(sale).await?;
        while *next <= end {
            if let Some(message) = self.0.bus.read(subjects::ORDERS, *next).await?
                && self.is_awaited(sale, &message, fence).await?
            {
                return Ok(false);
            }
            *next += 1;
        }
        Ok(true)
    }

    /// Whether a message is an order of this sale that can still be locked where the fence is, and was not.
    async fn is_awaited(&self, sale: &SaleId, message: &Message, fence: i64) -> Result<bool> {
        // What cannot be read never becomes an order.
        let Ok(order) = OrderPlaced::decode(message.payload.clone()) else { return Ok(false) };
        let Ok(hold) = order.order_id.parse() else { return Ok(false) };
        let is_ours = order.sale_id == sale.as_str();
        Ok(is_ours && blocks(order.grant_epoch, fence) && self.0.store.known_holds(&[hold]).await?.is_empty())
    }

    async fn fence_of(&self, sale: &SaleId) -> Result<i64> {
        Ok(self.0.store.standing(sale).await?.record.ledger.epoch)
    }

    async fn open(&self, sale: &SaleId, rebuild: &Rebuild, fenced: &Fenced) -> Result<bool> {
        let _slot = self.0.rebuilds.slots.acquire().await;
        let epoch = rebuild.epoch();
        for chunk in fenced.held.chunks(LOAD) {
            if !self.0.permits.load(sale, epoch, chunk.to_vec()).await? {
                return Ok(false);
            }
        }
        let opening = rebuild.opening(fenced);
        let opened = self.0.permits.open(sale, &opening).await?;
        if opened {
            tracing::info!(%sale, epoch, permits = opening.available, held = fenced.held.len(), "permits opened");
            // Releases that came meanwhile wait in the outbox.
            self.0.refunds.notify_one();
            self.0.signals.became_available(sale);
        }
        Ok(opened)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use mesh::{bus::sqlite::SqliteBus, clock::Clock, lifecycle::Lifecycle, testing::eventually};
    use proto::{RequestId, v1};

    use super::*;
    use crate::{Config, permits::memory::Memory, store::sql::SqlStore};

    /// A look of the guard takes its time: what it saw may be mended when it says so.
    #[tokio::test]
    async fn permits_that_were_opened_since_the_guard_looked_are_left_open() {
        let (life, clock, memory) = (Lifecycle::new(), Clock::system(), Arc::new(Memory::new()));
        let db = mesh::sql::connect("sqlite::memory:").await.unwrap();
        migrations::up(migrations::Service::Stock, &db).await.unwrap();
        let bus = Arc::new(SqliteBus::in_memory(clock.clone(), life.tasks()).await.unwrap());
        let (store, config) = (Arc::new(SqlStore::new(db)), Config::default());
        let engine = Engine::start(config, store, memory.clone(), bus, clock, &life).await.unwrap();
        let request = v1::CreateSaleRequest {
            request_id: RequestId::random().to_string(),
            price: Some(proto::WireMoney { currency_code: "EUR".into(), units: 5, nanos: 0 }),
            stock: 10,
            ..Default::default()
        };
        let sale = engine.create_sale(&request).await.unwrap();
        let sale = SaleId::parse("sale", &sale.name).unwrap();
        let epoch = async || engine.0.permits.header(&sale).await.unwrap().map(|header| header.epoch);
        let opened = epoch().await.expect("the sale is open");

        let mut looked_again = engine.begin_rebuild(&sale, Some(Need::Rebuild));
        looked_again.wait_for(Option::is_some).await.unwrap();
        assert_eq!(epoch().await, Some(opened));

        memory.wipe(&sale);
        engine.rebuild_as_seen(&sale, Need::Rebuild);
        eventually("the rebuild that was needed", async || (epoch().await > Some(opened)).then_some(())).await;
    }
}

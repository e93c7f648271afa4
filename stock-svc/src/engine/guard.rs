//! The guard: looks at every live sale's permits a few times a second and says what is to be done about them. Those of a
//! sale that has stopped being live it drops, since they cost memory for every order that was ever placed.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use futures::StreamExt;
use proto::{SaleId, error::Result};
use tokio::{sync::Mutex, time::Instant};

use super::{AT_ONCE, Engine};
use crate::{
    domain::permits::{Header, Phase},
    store::Record,
};

const EVERY: Duration = Duration::from_millis(250);

/// Between two looks, however many buyers find permits missing.
const PAUSE: Duration = Duration::from_millis(20);

/// A process that starts looks so far back for sales that nobody was there to drop the permits of.
const LOOK_BACK_MS: i64 = 30 * 24 * 3600 * 1000;

/// What was found odd before, by sale and epoch: some things are a fault only when they last.
type Oddities = HashMap<(SaleId, i64), Instant>;

/// What one look leaves to the next.
#[derive(Debug)]
struct Seen {
    oddities: Oddities,
    /// Sales that may have permits.
    kept: HashSet<SaleId>,
}

/// What the permits need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Need {
    Nothing,
    /// The sale has changed.
    Facts,
    /// Lost, or of another server.
    Rebuild,
    /// A rebuild, if it stays so for this long.
    Patience(Duration),
}

impl Engine {
    pub(super) fn start_guard(&self) {
        let seen = Arc::new(Mutex::new(None));
        self.spawn_loop(
            "guard",
            EVERY,
            |inner| Some(&inner.suspicion),
            move |engine| {
                let seen = seen.clone();
                async move {
                    if let Err(error) = engine.guard(&mut *seen.lock().await).await {
                        tracing::warn!(%error, "guarding permits failed");
                    }
                    tokio::time::sleep(PAUSE).await;
                }
            },
        );
    }

    async fn guard(&self, seen: &mut Option<Seen>) -> Result<()> {
        let is_first = seen.is_none();
        let now = self.0.clock.now_ms();
        let seen = match seen {
            Some(seen) => seen,
            None => {
                let once_live = self.0.store.live_sales(now - LOOK_BACK_MS).await?;
                let kept = once_live.into_iter().map(|record| record.sale.id.clone()).collect();
                seen.insert(Seen { oddities: Oddities::new(), kept })
            }
        };
        let live = self.0.store.live_sales(now).await?;
        let others = self.0.catalog.refresh(live.clone());
        // Among the others may be one that was made while the live ones were read.
        let over = others.into_iter().filter(|record| !record.sale.is_live(now));
        seen.kept.extend(over.map(|record| record.sale.id.clone()));
        let server = self.0.permits.fingerprint().await?;
        let mut now_odd = Oddities::new();
        for (header, record) in self.headers(live.clone()).await {
            let sale = &record.sale.id;
            // One sale whose permits cannot be read, or are nonsense, must not keep the others unguarded.
            let header = match header {
                Ok(header) => header,
                Err(error) => {
                    tracing::warn!(%sale, %error, "a sale's permits could not be looked at");
                    continue;
                }
            };
            match need(header.as_ref(), &record, &server, self.0.config.rebuild_takeover) {
                Need::Nothing => {}
                Need::Facts => {
                    if let Err(error) = self.0.permits.set_facts(sale, &record.facts()).await {
                        tracing::warn!(%sale, %error, "a sale's permits could not be told of a change");
                    }
                }
                need @ Need::Rebuild => self.rebuild_as_seen(sale, need),
                // Whoever was rebuilding when this process started was most likely its former life.
                need @ Need::Patience(_) if is_first => self.rebuild_as_seen(sale, need),
                need @ Need::Patience(patience) => {
                    let key = (sale.clone(), header.as_ref().map_or(0, |h| h.epoch));
                    let since = seen.oddities.get(&key).copied().unwrap_or_else(Instant::now);
                    if since.elapsed() >= patience {
                        self.rebuild_as_seen(sale, need);
                    } else {
                        now_odd.insert(key, since);
                    }
                }
            }
            self.0.signals.notice(&record, header.as_ref(), self.0.clock.now_ms());
        }
        seen.oddities = now_odd;
        self.drop_all_but(&mut seen.kept, live.iter().map(|record| record.sale.id.clone()).collect()).await;
        Ok(())
    }

    /// Drops the permits of sales that have stopped being live. After the live ones: these can wait.
    async fn drop_all_but(&self, kept: &mut HashSet<SaleId>, live: HashSet<SaleId>) {
        let over: Vec<SaleId> = kept.difference(&live).cloned().collect();
        kept.extend(live);
        let drops = futures::stream::iter(over).map(|sale| async move { (self.0.permits.forget(&sale).await, sale) });
        let mut drops = std::pin::pin!(drops.buffer_unordered(AT_ONCE));
        while let Some((dropped, sale)) = drops.next().await {
            match dropped {
                Ok(was_there) => {
                    if was_there {
                        tracing::info!(%sale, "permits of a sale that is over are dropped");
                    }
                    kept.remove(&sale);
                }
                Err(error) => tracing::warn!(%sale, %error, "permits of a sale that is over could not be dropped"),
            }
        }
    }

    /// Whether a sale's permits need a rebuild still, where `seen` said so. A look at a thousand sales takes its time: one
    /// that was being created, or rebuilt by another process, when the ledger was read may be open by now, and rebuilding
    /// it would turn its first buyers away.
    pub(super) async fn still_needs(&self, sale: &SaleId, seen: Need) -> Result<bool> {
        let record = self.0.store.standing(sale).await?.record;
        let server = self.0.permits.fingerprint().await?;
        let header = self.0.permits.header(sale).await?;
        Ok(match need(header.as_ref(), &record, &server, self.0.config.rebuild_takeover) {
            Need::Nothing | Need::Facts => false,
            Need::Rebuild => true,
            // Somebody has begun since: how long that lasts is for the next looks to tell.
            Need::Patience(_) => seen != Need::Rebuild,
        })
    }

    /// What the permits of these sales say of themselves.
    pub(super) async fn headers(&self, sales: Vec<Record>) -> Vec<(Result<Option<Header>>, Record)> {
        futures::stream::iter(sales)
            .map(|record| async move { (self.0.permits.header(&record.sale.id).await, record) })
            .buffer_unordered(AT_ONCE)
            .collect()
            .await
    }
}

/// Whether open permits are this ledger's, and of now: what they do not know was not granted.
pub(super) fn is_current(header: Option<&Header>, record: &Record, server: &str) -> bool {
    matches!(need(header, record, server, Duration::MAX), Need::Nothing | Need::Facts)
}

/// What one sale's permits need, by their header and the ledger as it was read before.
fn need(header: Option<&Header>, record: &Record, server: &str, takeover: Duration) -> Need {
    let Some(header) = header else { return Need::Rebuild };
    if header.phase == Phase::Rebuilding {
        return Need::Patience(takeover);
    }
    // The fence moves before permits open, so open permits behind it were put back from the past.
    if header.server != server || header.epoch < record.ledger.epoch {
        return Need::Rebuild;
    }
    // Ahead of a ledger that was read before: another process has just opened them. Ahead for long: the ledger was put
    // back from the past.
    if header.epoch > record.ledger.epoch {
        return Need::Patience(2 * EVERY);
    }
    if header.facts.version < record.sale.version || header.facts.sold < record.ledger.sold {
        return Need::Facts;
    }
    Need::Nothing
}

#[cfg(test)]
mod tests {
    use proto::{RequestId, v1};

    use super::*;
    use crate::domain::{
        ledger::Ledger,
        permits::{Claimed, Opening, Permits},
        sale::NewSale,
    };

    fn opened() -> (Record, Permits) {
        let request = v1::CreateSaleRequest {
            request_id: RequestId::random().to_string(),
            price: Some(proto::WireMoney { currency_code: "EUR".into(), units: 5, nanos: 0 }),
            stock: 10,
            ..Default::default()
        };
        let new = NewSale::parse(&request, 0).unwrap();
        let mut record = Record { sale: new.sale.into(), ledger: Ledger::new(new.stock) };
        let epoch = record.ledger.allocate_epoch(0);
        let mut permits = Permits::default();
        assert_eq!(permits.claim(epoch, &record.facts(), "a"), Claimed::Yes);
        let snapshot = record.ledger.move_fence(epoch).unwrap();
        let facts = record.facts();
        assert!(permits.open(&Opening { epoch, available: snapshot.available, snapshot_seq: 0, facts }));
        (record, permits)
    }

    fn of(permits: &Permits, record: &Record, server: &str) -> Need {
        need(permits.header(), record, server, Duration::from_secs(10))
    }

    #[test]
    fn lost_replaced_and_outdated_permits_are_rebuilt() {
        let (mut record, mut permits) = opened();
        assert_eq!(of(&permits, &record, "a"), Need::Nothing);
        assert_eq!(of(&permits, &record, "b"), Need::Rebuild, "another server");
        Arc::make_mut(&mut record.sale).version += 1;
        assert_eq!(of(&permits, &record, "a"), Need::Facts);
        // E14: the server was put back to before a rebuild.
        record.ledger.move_fence(7);
        assert_eq!(of(&permits, &record, "a"), Need::Rebuild);
        permits.claim(8, &record.facts(), "a");
        assert_eq!(of(&permits, &record, "a"), Need::Patience(Duration::from_secs(10)));
        permits.wipe();
        assert_eq!(of(&permits, &record, "a"), Need::Rebuild);
    }
}

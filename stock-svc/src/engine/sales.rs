//! Sales: creating, showing, the operators' verbs, and their stock.

use std::{sync::Arc, time::Duration};

use futures::{StreamExt, future::BoxFuture};
use prost::Message as _;
use proto::{
    Error, Reason, RequestId, SaleId,
    error::Result,
    v1::{CreateSaleRequest, ListSalesResponse, PermitState, Sale, StockReport},
};
use sha2::{Digest, Sha256};

use super::{AT_ONCE, Engine};
use crate::{
    domain::{
        permits::{Header, Phase, Withdrawn},
        sale::{NewSale, Verb, availability},
    },
    store::{Record, Standing},
};

/// How long an rpc waits for the permits it asked for. They go on being rebuilt afterwards.
const REBUILD_PATIENCE: Duration = Duration::from_secs(5);

/// Reading permits beside a ledger that moves: how often to try for a pair that fits.
const LOOKS: usize = 5;

impl Engine {
    /// Creates a sale and its permits.
    pub(crate) async fn create_sale(&self, request: &CreateSaleRequest) -> Result<Sale> {
        let new = NewSale::parse(request, self.0.clock.now_ms())?;
        // Of the request as it was sent: a default taken from the clock does not make a retry another request.
        let hash = Sha256::digest(request.encode_to_vec()).iter().map(|byte| format!("{byte:02x}")).collect();
        let record = self.0.store.create_sale(new, hash).await?;
        self.0.catalog.put(record.clone());
        // A retry whose first attempt has opened them finds them.
        if !matches!(self.0.permits.header(&record.sale.id).await, Ok(Some(_)))
            && let Err(error) = self.rebuild_within(&record.sale.id, REBUILD_PATIENCE).await
        {
            // The sale is created all the same; the guard sees to its permits.
            tracing::warn!(sale = %record.sale.id, %error, "a new sale has no permits yet");
        }
        self.0.signals.changed(&record.sale.id);
        Ok(self.view(&record).await)
    }

    pub(crate) async fn get_sale(&self, id: &SaleId) -> Result<Sale> {
        let record = self.0.store.standing(id).await?.record;
        Ok(self.view(&record).await)
    }

    pub(crate) async fn list_sales(&self, after: Option<&SaleId>, size: usize) -> Result<ListSalesResponse> {
        let mut records = self.0.store.sales_page(after, size as u64 + 1).await?;
        let has_more = records.len() > size;
        records.truncate(size);
        let next_page_token = match records.last() {
            Some(last) if has_more => last.sale.id.to_string(),
            _ => String::new(),
        };
        let sales = futures::stream::iter(records).map(|record| async move { self.view(&record).await });
        let sales = sales.buffered(AT_ONCE).collect().await;
        Ok(ListSalesResponse { sales, next_page_token })
    }

    /// Applies an operator's verb: to the ledger first, then to the permits.
    pub(crate) async fn apply_verb(&self, id: &SaleId, verb: Verb) -> Result<Sale> {
        let record = self.0.store.apply_verb(id, verb, self.0.clock.now_ms()).await?;
        self.told(&record).await;
        Ok(self.view(&record).await)
    }

    /// Raises or lowers the stock. Lowered, the permits go first: a crash in between only loses permits, which
    /// reconciliation offers again.
    pub(crate) async fn adjust_stock(&self, id: &SaleId, request: RequestId, delta: i64) -> Result<StockReport> {
        if delta == 0 {
            return Err(Error::invalid("delta", "must not be zero"));
        }
        let (engine, sale) = (self.clone(), id.clone());
        let before = Arc::new(move |standing: Standing| -> BoxFuture<'static, Result<()>> {
            let (engine, sale) = (engine.clone(), sale.clone());
            // A sale that is over has no permits that could be taken.
            let withdraws = delta < 0 && standing.record.sale.is_live(engine.0.clock.now_ms());
            Box::pin(async move { if withdraws { engine.withdraw(&sale, -delta).await } else { Ok(()) } })
        });
        let record = self.0.store.adjust(id, request, delta, self.0.clock.now_ms(), before).await?;
        self.0.refunds.notify_one();
        self.told(&record).await;
        self.get_stock(id).await
    }

    async fn withdraw(&self, sale: &SaleId, quantity: i64) -> Result<()> {
        match self.0.permits.withdraw(sale, quantity).await? {
            Withdrawn::Done => Ok(()),
            Withdrawn::TooFew => Err(Error::illegal_state("HELD", "fewer units than that are available")),
            Withdrawn::Unavailable => Err(Error::new(Reason::StockRebuilding, "the stock is being rebuilt")),
        }
    }

    /// The ledger beside the permits.
    pub(crate) async fn get_stock(&self, id: &SaleId) -> Result<StockReport> {
        let (mut header, mut record) = self.look(id).await?;
        // Locks in between make it seem that more was locked than granted.
        for _ in 1..LOOKS {
            match &header {
                Some(header) if header.epoch == record.ledger.epoch && header.granted < record.ledger.persisted => {}
                _ => break,
            }
            (header, record) = self.look(id).await?;
        }
        Ok(report(&record, header.as_ref()))
    }

    async fn look(&self, id: &SaleId) -> Result<(Option<Header>, Record)> {
        // An operator wants to see the ledger, above all when the permits are away.
        let header = self.0.permits.header(id).await.unwrap_or_else(|error| {
            tracing::warn!(sale = %id, %error, "permits gave no answer");
            None
        });
        Ok((header, self.0.store.standing(id).await?.record))
    }

    /// Rebuilds the permits, and says how they stand then. STOCK_REBUILDING where that takes too long to wait for.
    pub(crate) async fn rebuild_stock(&self, id: &SaleId) -> Result<StockReport> {
        if !self.0.store.standing(id).await?.record.sale.is_live(self.0.clock.now_ms()) {
            return Err(Error::illegal_state("ENDED", "the sale is over: no permits are kept for it"));
        }
        self.rebuild_within(id, REBUILD_PATIENCE).await?;
        let report = self.get_stock(id).await?;
        match report.state() {
            PermitState::Rebuilding | PermitState::Unspecified => Err(Error::new(
                Reason::StockRebuilding,
                "the rebuild goes on; the stock's report tells when it is done",
            )),
            _ => Ok(report),
        }
    }

    /// A sale was changed: this process, the permits and the gateways hear of it. Best effort, the guard repeats it.
    async fn told(&self, record: &Record) {
        self.0.catalog.put(record.clone());
        if let Err(error) = self.0.permits.set_facts(&record.sale.id, &record.facts()).await {
            tracing::warn!(sale = %record.sale.id, %error, "telling the permits of a changed sale failed");
        }
        self.0.signals.changed(&record.sale.id);
    }

    async fn view(&self, record: &Record) -> Sale {
        let header = self.0.permits.header(&record.sale.id).await.unwrap_or_default();
        let free = header.filter(|header| header.phase == Phase::Open).map(|header| header.free);
        record.sale.view(record.ledger.total, availability(&record.ledger, free), self.0.clock.now_ms())
    }
}

fn report(record: &Record, header: Option<&Header>) -> StockReport {
    let ledger = &record.ledger;
    // Grants of a fence that has moved on can never be locked: nothing of them is on its way.
    let current = header.filter(|header| header.epoch == ledger.epoch);
    let permits = header.map_or(0, |header| header.free);
    let unpersisted_grants = current.map_or(0, |header| header.granted - ledger.persisted);
    let state = match header {
        None => PermitState::Unspecified,
        Some(Header { phase: Phase::Rebuilding, .. }) => PermitState::Rebuilding,
        Some(header) => match header.facts.verb {
            Verb::Open => PermitState::Open,
            Verb::Paused => PermitState::Paused,
            Verb::Closed => PermitState::Closed,
        },
    };
    StockReport {
        sale: record.sale.id.name(),
        total: ledger.total,
        available: ledger.available,
        held: ledger.held,
        sold: ledger.sold,
        permits,
        unpersisted_grants,
        slack: ledger.available - permits - unpersisted_grants,
        epoch: ledger.epoch,
        state: state.into(),
    }
}

//! Finding an order, wherever it is on its way: its record, or the grant that the funnel has not written yet.

use mesh::{
    batch::{Batcher, Limits},
    lifecycle::Lifecycle,
    link::Link,
};
use proto::{
    Error, OrderId, Reason, WireMoney,
    internal::{
        GetOrderResult, GetOrdersRequest, Grant, LookupGrantsRequest, LookupResult, get_order_result, lookup_result,
        order_records_client::OrderRecordsClient, stock_client::StockClient,
    },
    timestamp,
    v1::{Order, OrderState},
};

use super::each;

/// A PLACED order has no version yet, and every version of its record is newer.
const PLACED_ETAG: &str = "0";

/// Finds orders, many readers' in one call. Cheap to clone.
#[derive(Clone)]
pub(super) struct Finder {
    records: Batcher<OrderId, Result<Option<Order>, Error>>,
    grants: Batcher<OrderId, Result<Option<Grant>, Error>>,
}

impl Finder {
    pub(super) fn new(order: Link, stock: Link, life: &Lifecycle) -> Self {
        let limits = Limits { max_items: 256, in_flight: 4, overlap_from: 32, ..Limits::default() };
        let order = OrderRecordsClient::new(order);
        let records = Batcher::start("get orders", limits, life.tasks(), move |ids: Vec<OrderId>| {
            let (count, mut order) = (ids.len(), order.clone());
            async move {
                let order_ids = ids.iter().map(OrderId::to_string).collect();
                let answered = order.get_orders(GetOrdersRequest { order_ids }).await;
                each(count, answered.map(|r| r.into_inner().results), record)
            }
        });
        let stock = StockClient::new(stock);
        let grants = Batcher::start("lookup grants", limits, life.tasks(), move |ids: Vec<OrderId>| {
            let (count, mut stock) = (ids.len(), stock.clone());
            async move {
                let hold_ids = ids.iter().map(OrderId::to_string).collect();
                let answered = stock.lookup_grants(LookupGrantsRequest { hold_ids }).await;
                each(count, answered.map(|r| r.into_inner().results), grant)
            }
        });
        Self { records, grants }
    }

    /// The order; `None` when there surely is none. When that cannot be said, it is STOCK_REBUILDING.
    pub(super) async fn find(&self, id: OrderId) -> Result<Option<Order>, Error> {
        if let Some(order) = self.records.submit(id).await?? {
            return Ok(Some(order));
        }
        let grant = self.grants.submit(id).await?;
        if let Ok(Some(grant)) = grant {
            return Ok(Some(placed(id, grant)));
        }
        // Between the two looks the funnel may have written the order and the grant been forgotten.
        match self.records.submit(id).await?? {
            Some(order) => Ok(Some(order)),
            None => grant.map(|_| None),
        }
    }
}

fn record(result: GetOrderResult) -> Result<Option<Order>, Error> {
    match result.result {
        Some(get_order_result::Result::Order(order)) => Ok(Some(order)),
        Some(get_order_result::Result::Absent(())) => Ok(None),
        None => Err(Error::internal("an empty result")),
    }
}

fn grant(result: LookupResult) -> Result<Option<Grant>, Error> {
    match result.result {
        Some(lookup_result::Result::Granted(grant)) => Ok(Some(grant)),
        Some(lookup_result::Result::Absent(())) => Ok(None),
        Some(lookup_result::Result::Unknown(())) => {
            Err(Error::new(Reason::StockRebuilding, "it cannot be said now whether there is such an order; try again"))
        }
        None => Err(Error::internal("an empty result")),
    }
}

/// The order that the funnel is about to write, with the times that it will have.
fn placed(id: OrderId, grant: Grant) -> Order {
    let expire_at_ms = grant.granted_at_ms.saturating_add(grant.payment_window_ms);
    Order {
        name: id.name(),
        sale: format!("sales/{}", grant.sale_id),
        buyer: grant.buyer,
        quantity: grant.quantity,
        amount: grant.amount.map(|a| WireMoney { currency_code: a.currency, units: a.units, nanos: a.nanos }),
        state: OrderState::Placed.into(),
        create_time: Some(timestamp(grant.granted_at_ms)),
        expire_time: Some(timestamp(expire_at_ms)),
        etag: PLACED_ETAG.to_owned(),
        ..Default::default()
    }
}

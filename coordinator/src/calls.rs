//! The other services and the bus as the coordinator calls them: batches in, one result per item out, in order.
//!
//! A failed call says nothing about its effect. Per item, [`is_fault`] tells "cannot say" from "no".

use std::time::Duration;

use mesh::{
    bus::{self, SharedBus},
    clock::Clock,
    link::Link,
};
use proto::{
    Error, OrderId, Reason, SaleId,
    error::Result,
    internal::{
        self, AcquirePermit, AcquirePermitsRequest, ChargeItem, ChargeRequest, CreateOrdersRequest, DeductItem,
        DeductStockRequest, GetOrdersRequest, LockItem, LockStockRequest, LookupGrantsRequest, OrderRecord,
        PaymentResult, PaymentStatus, RefundRequest, ReleaseItem, ReleaseStockRequest, ResolveRequest, TransitionOrder,
        TransitionOrdersRequest, VoidRequest, acquire_result, get_order_result, item_result, lock_result,
        lookup_result, order_records_client::OrderRecordsClient, payment_result, payments_client::PaymentsClient,
        stock_client::StockClient,
    },
    v1::{GetSaleRequest, Order, Sale},
};

use crate::store::SharedStore;

/// A batch of a thousand records with long names stays far below it.
const MAX_MESSAGE: usize = 16 << 20;

/// Everything outside of the coordinator's own tables, and those. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Calls {
    stock: StockClient<Link>,
    orders: OrderRecordsClient<Link>,
    payments: PaymentsClient<Link>,
    /// Streams.
    pub bus: SharedBus,
    /// Sagas.
    pub store: SharedStore,
    /// The time.
    pub clock: Clock,
    /// How long a charge may take before its outcome counts as unknown.
    charge_timeout: Duration,
}

/// Whether a refusal only says that it cannot be said: the item is tried again.
pub fn is_fault(error: &Error) -> bool {
    matches!(
        error.reason,
        Reason::Overloaded
            | Reason::RateLimited
            | Reason::StockRebuilding
            | Reason::DependencyDown
            | Reason::DeadlineExceeded
            | Reason::Internal
            | Reason::Unspecified
    )
}

impl Calls {
    /// Over these links.
    pub fn new(
        (stock, orders, payments): (Link, Link, Link),
        bus: SharedBus,
        store: SharedStore,
        clock: Clock,
        charge_timeout: Duration,
    ) -> Self {
        let stock = StockClient::new(stock).max_decoding_message_size(MAX_MESSAGE);
        let orders = OrderRecordsClient::new(orders).max_decoding_message_size(MAX_MESSAGE);
        let payments = PaymentsClient::new(payments).max_decoding_message_size(MAX_MESSAGE);
        Self { stock, orders, payments, bus, store, clock, charge_timeout }
    }

    /// One sale.
    pub async fn sale(&self, sale: &SaleId) -> Result<Sale> {
        Ok(self.stock.clone().get_sale(GetSaleRequest { sale: sale.name() }).await?.into_inner())
    }

    /// Takes permits.
    pub async fn acquire(&self, items: Vec<AcquirePermit>) -> Result<Vec<Result<acquire_result::Result>>> {
        let count = items.len();
        let answer = self.stock.clone().acquire_permits(AcquirePermitsRequest { items }).await?.into_inner();
        aligned(answer.results.into_iter().map(|r| r.result), count)
    }

    /// Finds grants.
    pub async fn lookup(&self, holds: &[OrderId]) -> Result<Vec<Result<lookup_result::Result>>> {
        let hold_ids = texts(holds);
        let answer = self.stock.clone().lookup_grants(LookupGrantsRequest { hold_ids }).await?.into_inner();
        aligned(answer.results.into_iter().map(|r| r.result), holds.len())
    }

    /// Locks units in the ledger.
    pub async fn lock(&self, items: Vec<LockItem>) -> Result<Vec<Result<lock_result::Result>>> {
        let count = items.len();
        let answer = self.stock.clone().lock_stock(LockStockRequest { items }).await?.into_inner();
        aligned(answer.results.into_iter().map(|r| r.result), count)
    }

    /// Held becomes available.
    pub async fn release(&self, items: Vec<ReleaseItem>) -> Result<Vec<Result<()>>> {
        let count = items.len();
        let answer = self.stock.clone().release_stock(ReleaseStockRequest { items }).await?.into_inner();
        done(answer.results, count)
    }

    /// Held becomes sold.
    pub async fn deduct(&self, items: Vec<DeductItem>) -> Result<Vec<Result<()>>> {
        let count = items.len();
        let answer = self.stock.clone().deduct_stock(DeductStockRequest { items }).await?.into_inner();
        done(answer.results, count)
    }

    /// Writes order records.
    pub async fn create(&self, items: Vec<OrderRecord>) -> Result<Vec<Result<()>>> {
        let count = items.len();
        let answer = self.orders.clone().create_orders(CreateOrdersRequest { items }).await?.into_inner();
        done(answer.results, count)
    }

    /// Moves order records.
    pub async fn transition(&self, items: Vec<TransitionOrder>) -> Result<Vec<Result<()>>> {
        let count = items.len();
        let answer = self.orders.clone().transition_orders(TransitionOrdersRequest { items }).await?.into_inner();
        done(answer.results, count)
    }

    /// Reads order records.
    pub async fn orders(&self, ids: &[OrderId]) -> Result<Vec<Option<Order>>> {
        let order_ids = texts(ids);
        let answer = self.orders.clone().get_orders(GetOrdersRequest { order_ids }).await?.into_inner();
        let results = aligned(answer.results.into_iter().map(|r| r.result), ids.len())?;
        Ok(results
            .into_iter()
            .map(|result| match result {
                Ok(get_order_result::Result::Order(order)) => Some(order),
                Ok(get_order_result::Result::Absent(())) | Err(_) => None,
            })
            .collect())
    }

    /// Charges. One slow provider must not hold up a buyer for long: what takes longer is unknown, and asked for later.
    pub async fn charge(&self, items: Vec<ChargeItem>) -> Result<Vec<Result<PaymentStatus>>> {
        let count = items.len();
        let mut payments = self.payments.clone();
        match tokio::time::timeout(self.charge_timeout, payments.charge(ChargeRequest { items })).await {
            Ok(answer) => statuses(answer?.into_inner().results, count),
            Err(_) => Err(Error::dependency("the payment service", "charge timed out")),
        }
    }

    /// Asks for charges' outcomes.
    pub async fn resolve(&self, payments: &[OrderId]) -> Result<Vec<Result<PaymentStatus>>> {
        let request = ResolveRequest { payment_ids: texts(payments) };
        statuses(self.payments.clone().resolve(request).await?.into_inner().results, payments.len())
    }

    /// Makes sure that orders can no longer be charged.
    pub async fn void(&self, orders: &[OrderId]) -> Result<Vec<Result<PaymentStatus>>> {
        let request = VoidRequest { order_ids: texts(orders) };
        statuses(self.payments.clone().void(request).await?.into_inner().results, orders.len())
    }

    /// Gives money back.
    pub async fn refund(&self, orders: &[OrderId]) -> Result<Vec<Result<PaymentStatus>>> {
        let request = RefundRequest { order_ids: texts(orders) };
        statuses(self.payments.clone().refund(request).await?.into_inner().results, orders.len())
    }

    /// Publishes.
    pub async fn publish(
        &self,
        stream: &'static str,
        messages: Vec<bus::Message>,
    ) -> Vec<Result<bus::Published, bus::Error>> {
        self.bus.publish(stream, messages).await
    }
}

fn texts(ids: &[OrderId]) -> Vec<String> {
    ids.iter().map(ToString::to_string).collect()
}

/// One result per item, or the whole answer is not to be trusted.
fn aligned<T>(results: impl ExactSizeIterator<Item = Option<T>>, count: usize) -> Result<Vec<Result<T>>> {
    if results.len() != count {
        return Err(Error::internal(format!("{} results for {count} items", results.len())));
    }
    Ok(results.map(|r| r.ok_or_else(|| Error::internal("an empty result"))).collect())
}

fn done(results: Vec<internal::ItemResult>, count: usize) -> Result<Vec<Result<()>>> {
    let results = aligned(results.into_iter().map(|r| r.result), count)?;
    Ok(results
        .into_iter()
        .map(|result| match result? {
            item_result::Result::Done(()) => Ok(()),
            item_result::Result::Refused(refusal) => Err(refusal.into()),
        })
        .collect())
}

fn statuses(results: Vec<PaymentResult>, count: usize) -> Result<Vec<Result<PaymentStatus>>> {
    let results = aligned(results.into_iter().map(|r| r.result), count)?;
    Ok(results
        .into_iter()
        .map(|result| match result? {
            payment_result::Result::Status(status) => Ok(status),
            payment_result::Result::Refused(refusal) => Err(refusal.into()),
        })
        .collect())
}

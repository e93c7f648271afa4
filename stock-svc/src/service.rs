//! The gRPC edge: decode and check, call, encode. One bad item refuses itself and none of its neighbours.
//!
//! Rpcs that come while others are in flight share their transaction or their script call: one batcher per operation,
//! whose items are whole rpcs.

use mesh::{
    batch::{Batcher, Limits},
    lifecycle::Lifecycle,
};
use proto::{
    BuyerId, Error, OrderId, Reason, RequestId, SaleId,
    error::Result,
    internal::{
        self as wire, AcquirePermit, AcquirePermitsRequest, AcquirePermitsResponse, AcquireResult, DeductItem,
        DeductStockRequest, DeductStockResponse, Grant, ItemResult, LimitReached, LockItem, LockResult,
        LockStockRequest, LockStockResponse, LookupGrantsRequest, LookupGrantsResponse, LookupResult, ReleaseItem,
        ReleaseStockRequest, ReleaseStockResponse, acquire_result, item_result, lock_result, lookup_result,
        stock_server::Stock,
    },
    v1::{
        AdjustStockRequest, CloseSaleRequest, CreateSaleRequest, GetSaleRequest, GetStockRequest, ListSalesRequest,
        ListSalesResponse, OpenSaleRequest, PauseSaleRequest, RebuildStockRequest, ReconcileStockRequest, Sale,
        StockReconciliation, StockReport,
    },
};
use tonic::{Request, Response, Status};

use crate::{
    domain::{
        MAX_STOCK,
        ledger::{Lock, Locked},
        permits::Acquire,
        sale::Verb,
    },
    engine::{Admission, Engine, Found},
    store::{Operation, Outcome},
};

/// Items of one call. Larger ones would hold a row's lock for longer than anybody should wait behind it.
const ITEMS: usize = 4096;

/// Items of one transaction, where several calls share it.
const SHARED: usize = 2000;

const DEFAULT_PAGE: i32 = 50;
const LARGEST_PAGE: i32 = 100;

type Operations = Vec<(SaleId, Operation)>;
type Outcomes = Result<Vec<Result<Outcome>>>;

/// The rpcs.
#[derive(Debug)]
pub(crate) struct Service {
    engine: Engine,
    acquires: Batcher<Vec<(SaleId, Acquire)>, Vec<Admission>>,
    /// Locks, releases and deducts alike: they meet in the sale's row anyway, and there they had better share a
    /// transaction than wait for one another's.
    ledger: Batcher<Operations, Outcomes>,
}

impl Service {
    pub(crate) fn new(engine: Engine, life: &Lifecycle) -> Self {
        let taking = engine.clone();
        let limits = Limits { in_flight: 4, ..Limits::default() };
        let acquires = Batcher::start("acquire_permits", limits, life.tasks(), move |calls: Vec<Vec<_>>| {
            let engine = taking.clone();
            async move {
                let sizes: Vec<usize> = calls.iter().map(Vec::len).collect();
                let mut admissions = engine.acquire(calls.into_iter().flatten().collect()).await.into_iter();
                sizes.into_iter().map(|size| admissions.by_ref().take(size).collect()).collect()
            }
        });
        // Two transactions: the second is at the row's lock when the first commits.
        let ledger = {
            let engine = engine.clone();
            Batcher::start("ledger", Limits::default(), life.tasks(), move |calls| apply(engine.clone(), calls))
        };
        Self { engine, acquires, ledger }
    }
}

/// Applies whole calls in as few transactions as their size allows. A transaction that fails fails its calls only.
async fn apply(engine: Engine, calls: Vec<Operations>) -> Vec<Outcomes> {
    let mut outcomes = Vec::with_capacity(calls.len());
    let mut calls = calls.into_iter().peekable();
    while calls.peek().is_some() {
        let (mut sizes, mut items) = (Vec::new(), Vec::new());
        while let Some(call) = calls.next_if(|call| items.is_empty() || items.len() + call.len() <= SHARED) {
            sizes.push(call.len());
            items.extend(call);
        }
        match engine.apply(items).await {
            Ok(results) => {
                let mut results = results.into_iter();
                outcomes.extend(sizes.into_iter().map(|size| Ok(results.by_ref().take(size).collect())));
            }
            Err(error) => {
                tracing::warn!(%error, calls = sizes.len(), "a transaction failed");
                outcomes.extend(sizes.into_iter().map(|_| Err(error.clone())));
            }
        }
    }
    outcomes
}

#[tonic::async_trait]
impl Stock for Service {
    async fn create_sale(&self, request: Request<CreateSaleRequest>) -> Result<Response<Sale>, Status> {
        Ok(Response::new(self.engine.create_sale(request.get_ref()).await?))
    }

    async fn get_sale(&self, request: Request<GetSaleRequest>) -> Result<Response<Sale>, Status> {
        let sale = SaleId::parse("sale", &request.get_ref().sale)?;
        Ok(Response::new(self.engine.get_sale(&sale).await?))
    }

    async fn list_sales(&self, request: Request<ListSalesRequest>) -> Result<Response<ListSalesResponse>, Status> {
        let ListSalesRequest { page_size, page_token } = request.into_inner();
        let size = match page_size {
            0 => DEFAULT_PAGE,
            1..=LARGEST_PAGE => page_size,
            _ => return Err(Error::invalid("page_size", format!("must be from 1 to {LARGEST_PAGE}")).into()),
        };
        let after = match page_token.as_str() {
            "" => None,
            token => Some(SaleId::parse("page_token", token)?),
        };
        Ok(Response::new(self.engine.list_sales(after.as_ref(), size.unsigned_abs() as usize).await?))
    }

    async fn open_sale(&self, request: Request<OpenSaleRequest>) -> Result<Response<Sale>, Status> {
        let sale = SaleId::parse("sale", &request.get_ref().sale)?;
        Ok(Response::new(self.engine.apply_verb(&sale, Verb::Open).await?))
    }

    async fn pause_sale(&self, request: Request<PauseSaleRequest>) -> Result<Response<Sale>, Status> {
        let sale = SaleId::parse("sale", &request.get_ref().sale)?;
        Ok(Response::new(self.engine.apply_verb(&sale, Verb::Paused).await?))
    }

    async fn close_sale(&self, request: Request<CloseSaleRequest>) -> Result<Response<Sale>, Status> {
        let sale = SaleId::parse("sale", &request.get_ref().sale)?;
        Ok(Response::new(self.engine.apply_verb(&sale, Verb::Closed).await?))
    }

    async fn adjust_stock(&self, request: Request<AdjustStockRequest>) -> Result<Response<StockReport>, Status> {
        let AdjustStockRequest { sale, delta, request_id, .. } = request.into_inner();
        let sale = SaleId::parse("sale", &sale)?;
        let request = RequestId::parse("request_id", &request_id)?;
        Ok(Response::new(self.engine.adjust_stock(&sale, request, delta).await?))
    }

    async fn get_stock(&self, request: Request<GetStockRequest>) -> Result<Response<StockReport>, Status> {
        let sale = SaleId::parse("sale", &request.get_ref().sale)?;
        Ok(Response::new(self.engine.get_stock(&sale).await?))
    }

    async fn rebuild_stock(&self, request: Request<RebuildStockRequest>) -> Result<Response<StockReport>, Status> {
        let sale = SaleId::parse("sale", &request.get_ref().sale)?;
        Ok(Response::new(self.engine.rebuild_stock(&sale).await?))
    }

    async fn reconcile_stock(
        &self,
        request: Request<ReconcileStockRequest>,
    ) -> Result<Response<StockReconciliation>, Status> {
        let sale = SaleId::parse("sale", &request.get_ref().sale)?;
        Ok(Response::new(self.engine.reconciliation(&sale).await?))
    }

    async fn acquire_permits(
        &self,
        request: Request<AcquirePermitsRequest>,
    ) -> Result<Response<AcquirePermitsResponse>, Status> {
        let items = at_most(request.into_inner().items)?;
        let (wishes, refused) = split(&items, wish);
        let admissions =
            if wishes.is_empty() { Vec::new() } else { self.acquires.submit(wishes).await.map_err(Error::from)? };
        let admissions = merge(admissions, refused, Admission::Refused);
        let results = items
            .iter()
            .zip(admissions)
            .map(|(item, admission)| acquire_result(&self.engine, item, admission))
            .collect();
        Ok(Response::new(AcquirePermitsResponse { results }))
    }

    async fn lookup_grants(
        &self,
        request: Request<LookupGrantsRequest>,
    ) -> Result<Response<LookupGrantsResponse>, Status> {
        let ids = at_most(request.into_inner().hold_ids)?;
        // An id that cannot be one is nobody's hold.
        let (holds, malformed) = split(&ids, |id| OrderId::parse("hold_ids", id));
        let found = if holds.is_empty() { Vec::new() } else { self.engine.lookup(&holds).await };
        let found = merge(found, malformed, |_| Found::Absent);
        let results = ids.into_iter().zip(found).map(|(id, found)| lookup_result(&self.engine, id, found)).collect();
        Ok(Response::new(LookupGrantsResponse { results }))
    }

    async fn lock_stock(&self, request: Request<LockStockRequest>) -> Result<Response<LockStockResponse>, Status> {
        let results = call(&self.ledger, request.into_inner().items, lock).await?;
        Ok(Response::new(LockStockResponse { results: results.into_iter().map(lock_result).collect() }))
    }

    async fn release_stock(
        &self,
        request: Request<ReleaseStockRequest>,
    ) -> Result<Response<ReleaseStockResponse>, Status> {
        let results = call(&self.ledger, request.into_inner().items, release).await?;
        Ok(Response::new(ReleaseStockResponse { results: results.into_iter().map(item_result).collect() }))
    }

    async fn deduct_stock(
        &self,
        request: Request<DeductStockRequest>,
    ) -> Result<Response<DeductStockResponse>, Status> {
        let results = call(&self.ledger, request.into_inner().items, deduct).await?;
        Ok(Response::new(DeductStockResponse { results: results.into_iter().map(item_result).collect() }))
    }
}

/// Decodes a call's items, applies those that can be, and puts the results back in order.
async fn call<T>(
    batcher: &Batcher<Operations, Outcomes>,
    items: Vec<T>,
    decode: impl Fn(&T) -> Result<(SaleId, Operation)>,
) -> Outcomes {
    let items = at_most(items)?;
    let (operations, refused) = split(&items, decode);
    let outcomes = if operations.is_empty() { Vec::new() } else { batcher.submit(operations).await?? };
    Ok(merge(outcomes, refused, Err))
}

fn at_most<T>(items: Vec<T>) -> Result<Vec<T>> {
    if items.len() > ITEMS {
        return Err(Error::invalid("items", format!("must be at most {ITEMS}")));
    }
    Ok(items)
}

/// Items that can be used, and the places and errors of those that cannot.
fn split<T, U>(items: &[T], decode: impl Fn(&T) -> Result<U>) -> (Vec<U>, Vec<(usize, Error)>) {
    let (mut good, mut bad) = (Vec::with_capacity(items.len()), Vec::new());
    for (index, item) in items.iter().enumerate() {
        match decode(item) {
            Ok(item) => good.push(item),
            Err(error) => bad.push((index, error)),
        }
    }
    (good, bad)
}

/// The inverse: results in order of the items.
fn merge<R>(results: Vec<R>, refused: Vec<(usize, Error)>, refuse: impl Fn(Error) -> R) -> Vec<R> {
    if refused.is_empty() {
        return results;
    }
    let (mut results, mut refused) = (results.into_iter(), refused.into_iter().peekable());
    let mut merged = Vec::new();
    loop {
        match refused.next_if(|(index, _)| *index == merged.len()) {
            Some((_, error)) => merged.push(refuse(error)),
            None => match results.next() {
                Some(result) => merged.push(result),
                None => return merged,
            },
        }
    }
}

fn quantity(quantity: i64) -> Result<i64> {
    if (1..=MAX_STOCK).contains(&quantity) {
        Ok(quantity)
    } else {
        Err(Error::invalid("quantity", format!("must be from 1 to {MAX_STOCK}")))
    }
}

fn wish(item: &AcquirePermit) -> Result<(SaleId, Acquire)> {
    let hold = OrderId::parse("hold_id", &item.hold_id)?;
    let buyer = BuyerId::parse(&item.buyer)?;
    Ok((SaleId::parse("sale_id", &item.sale_id)?, Acquire { hold, buyer, quantity: quantity(item.quantity)? }))
}

fn lock(item: &LockItem) -> Result<(SaleId, Operation)> {
    let lock = Lock {
        hold: OrderId::parse("hold_id", &item.hold_id)?,
        order: OrderId::parse("order_id", &item.order_id)?,
        buyer: BuyerId::parse(&item.buyer)?,
        quantity: quantity(item.quantity)?,
        grant_epoch: item.grant_epoch,
        expire_at: item.expire_at_ms,
        refusal: item.refusal(),
    };
    Ok((SaleId::parse("sale_id", &item.sale_id)?, Operation::Lock(lock)))
}

fn release(item: &ReleaseItem) -> Result<(SaleId, Operation)> {
    let hold = OrderId::parse("hold_id", &item.hold_id)?;
    let order = OrderId::parse("order_id", &item.order_id)?;
    let buyer = BuyerId::parse(&item.buyer)?;
    Ok((SaleId::parse("sale_id", &item.sale_id)?, Operation::Release { hold, order, buyer }))
}

fn deduct(item: &DeductItem) -> Result<(SaleId, Operation)> {
    let hold = OrderId::parse("hold_id", &item.hold_id)?;
    Ok((SaleId::parse("sale_id", &item.sale_id)?, Operation::Deduct { hold }))
}

fn grant(
    engine: &Engine,
    hold: &str,
    sale: &SaleId,
    grant: crate::domain::permits::Grant,
    (amount, payment_window_ms): (proto::Money, i64),
) -> Grant {
    let kept_until_ms = engine.kept_until(&grant);
    Grant {
        hold_id: hold.to_owned(),
        sale_id: sale.to_string(),
        buyer: grant.buyer.as_str().to_owned(),
        quantity: grant.quantity,
        epoch: grant.epoch,
        granted_at_ms: grant.at,
        fresh: false,
        amount: Some((&amount).into()),
        payment_window_ms,
        kept_until_ms,
    }
}

fn acquire_result(engine: &Engine, item: &AcquirePermit, admission: Admission) -> AcquireResult {
    use acquire_result::Result;
    let result = match admission {
        Admission::Granted { grant: granted, fresh, amount, payment_window } => {
            match SaleId::parse("sale", &item.sale_id) {
                Ok(sale) => {
                    let granted = grant(engine, &item.hold_id, &sale, granted, (amount, payment_window));
                    Result::Granted(Grant { fresh, ..granted })
                }
                Err(error) => Result::Refused(error.into()),
            }
        }
        Admission::Released => Result::Released(()),
        Admission::AtLimit(last) => {
            Result::LimitReached(LimitReached { last_hold_id: last.map(|hold| hold.to_string()).unwrap_or_default() })
        }
        Admission::Refused(error) => Result::Refused(error.into()),
    };
    AcquireResult { result: Some(result) }
}

fn lookup_result(engine: &Engine, hold: String, found: Found) -> LookupResult {
    use lookup_result::Result;
    let result = match found {
        Found::Granted { sale, grant: granted, amount, payment_window } => {
            Result::Granted(grant(engine, &hold, &sale, granted, (amount, payment_window)))
        }
        Found::Absent => Result::Absent(()),
        Found::Unknown => Result::Unknown(()),
    };
    LookupResult { result: Some(result) }
}

fn lock_result(outcome: Result<Outcome>) -> LockResult {
    use lock_result::Result;
    let result = match outcome {
        Ok(Outcome::Locked(Locked::Stale)) => Result::StaleEpoch(()),
        Ok(Outcome::Locked(Locked::Refused(reason))) => Result::Refused(Error::new(reason, refusal(reason)).into()),
        Ok(_) => Result::Locked(()),
        Err(error) => Result::Refused(error.into()),
    };
    LockResult { result: Some(result) }
}

fn refusal(reason: Reason) -> &'static str {
    match reason {
        Reason::SoldOut => "sold out",
        Reason::AllHeld => "all units are held",
        Reason::PurchaseLimitReached => "the buyer is at its limit",
        Reason::SaleEnded => "the sale has ended",
        Reason::SalePaused => "the sale is paused",
        _ => "the permit has lapsed",
    }
}

fn item_result(outcome: Result<Outcome>) -> ItemResult {
    let result = match outcome {
        Ok(_) => item_result::Result::Done(()),
        Err(error) => item_result::Result::Refused(wire::Refusal::from(error)),
    };
    ItemResult { result: Some(result) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_split_is_merged_back_in_order() {
        let items = [1, -2, 3, -4, -5];
        let (good, bad) = split(&items, |i| if *i > 0 { Ok(*i) } else { Err(Error::invalid("i", i.to_string())) });
        let merged = merge(good, bad, |error| error.message.len() as i32 * -1000);
        assert_eq!(merged.len(), items.len());
        assert!(items.iter().zip(merged).all(|(item, merged)| (*item > 0 && *item == merged) || merged <= -1000));
    }
}

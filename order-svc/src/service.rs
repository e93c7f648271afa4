//! The gRPC edge: decode and check, call, encode. One bad item refuses itself and none of its neighbours.

use mesh::clock::Clock;
use proto::{
    BuyerId, Error, OrderId, SaleId,
    error::Result,
    internal::{
        CreateOrdersRequest, CreateOrdersResponse, GetOrderResult, GetOrdersRequest, GetOrdersResponse,
        ListBuyerOrdersRequest, TransitionOrdersRequest, TransitionOrdersResponse, get_order_result,
        order_records_server::OrderRecords,
    },
    v1::ListOrdersResponse,
};
use tonic::{Request, Response, Status};

use crate::{
    domain::Record,
    records::Records,
    store::{Page, Position},
    wire,
};

/// Items of one call. Larger ones would hold a transaction for longer than anybody should wait behind it.
const ITEMS: usize = 4_096;

const DEFAULT_PAGE: i32 = 50;
const LARGEST_PAGE: i32 = 100;

/// The rpcs.
#[derive(Debug)]
pub(crate) struct Service {
    records: Records,
    clock: Clock,
}

impl Service {
    pub(crate) fn new(records: Records, clock: Clock) -> Self {
        Self { records, clock }
    }
}

#[tonic::async_trait]
impl OrderRecords for Service {
    async fn create_orders(
        &self,
        request: Request<CreateOrdersRequest>,
    ) -> Result<Response<CreateOrdersResponse>, Status> {
        let items = at_most(request.into_inner().items)?;
        let now_ms = self.clock.now_ms();
        let (records, refused) = split(items, |item| wire::record(item, now_ms));
        let written = records.len();
        if written > 0 {
            self.records.create(records).await?;
        }
        let results = merge(vec![Ok(()); written], refused);
        Ok(Response::new(CreateOrdersResponse { results: results.into_iter().map(wire::item_result).collect() }))
    }

    async fn transition_orders(
        &self,
        request: Request<TransitionOrdersRequest>,
    ) -> Result<Response<TransitionOrdersResponse>, Status> {
        let items = at_most(request.into_inner().items)?;
        let (transitions, refused) = split(items, wire::transition);
        let moved = if transitions.is_empty() { vec![] } else { self.records.transition(transitions).await? };
        let results = merge(moved, refused);
        Ok(Response::new(TransitionOrdersResponse { results: results.into_iter().map(wire::item_result).collect() }))
    }

    async fn get_orders(&self, request: Request<GetOrdersRequest>) -> Result<Response<GetOrdersResponse>, Status> {
        let ids = at_most(request.into_inner().order_ids)?;
        let (ids, malformed) = split(ids, |id| OrderId::parse("order_ids", &id));
        let found = if ids.is_empty() { vec![] } else { self.records.get(ids).await? };
        // An id that cannot be one is nobody's order.
        let results = merge(found.into_iter().map(Ok).collect(), malformed).into_iter().map(|found| {
            let result = match found {
                Ok(Some(record)) => get_order_result::Result::Order(wire::order(&record)),
                Ok(None) | Err(_) => get_order_result::Result::Absent(()),
            };
            GetOrderResult { result: Some(result) }
        });
        Ok(Response::new(GetOrdersResponse { results: results.collect() }))
    }

    async fn list_orders(
        &self,
        request: Request<ListBuyerOrdersRequest>,
    ) -> Result<Response<ListOrdersResponse>, Status> {
        let request = request.into_inner();
        let size = match request.page_size {
            0 => DEFAULT_PAGE,
            size if size < 0 => Err(Error::invalid("page_size", "must not be negative"))?,
            size => size.min(LARGEST_PAGE),
        } as usize;
        let sale_id = (!request.sale_id.is_empty()).then(|| SaleId::parse("sale", &request.sale_id)).transpose()?;
        let after = (!request.page_token.is_empty()).then(|| read_token(&request.page_token)).transpose()?;
        // One more than asked for tells whether there is another page.
        let page = Page { buyer: BuyerId::parse(&request.buyer)?, sale_id, after, limit: size as u64 + 1 };
        let mut records = self.records.list(page).await?;
        let more = records.len() > size;
        records.truncate(size);
        let next_page_token = records.last().filter(|_| more).map(token).unwrap_or_default();
        let orders = records.iter().map(wire::order).collect();
        Ok(Response::new(ListOrdersResponse { orders, next_page_token }))
    }
}

fn at_most<T>(items: Vec<T>) -> Result<Vec<T>> {
    if items.len() > ITEMS {
        return Err(Error::invalid("items", format!("must be at most {ITEMS}")));
    }
    Ok(items)
}

/// Checks every item; what is refused keeps its place.
fn split<T, U>(items: Vec<T>, check: impl Fn(T) -> Result<U>) -> (Vec<U>, Vec<Option<Error>>) {
    let mut good = Vec::with_capacity(items.len());
    let refused = items
        .into_iter()
        .map(|item| match check(item) {
            Ok(item) => {
                good.push(item);
                None
            }
            Err(error) => Some(error),
        })
        .collect();
    (good, refused)
}

/// Puts the results of the good items back between the refused ones.
fn merge<T>(good: Vec<Result<T>>, refused: Vec<Option<Error>>) -> Vec<Result<T>> {
    let mut good = good.into_iter();
    refused
        .into_iter()
        .filter_map(|refused| match refused {
            Some(error) => Some(Err(error)),
            None => good.next(),
        })
        .collect()
}

/// Opaque to clients: the last order of the page, as 48 hexadecimal digits.
fn token(record: &Record) -> String {
    format!("{:016x}{}", record.create_at_ms, record.order_id)
}

fn read_token(token: &str) -> Result<Position> {
    let bad = || Error::invalid("page_token", "is not one that was given out");
    if token.len() != 48 || !token.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(bad());
    }
    let (time, id) = token.split_at(16);
    Ok(Position {
        create_at_ms: i64::from_str_radix(time, 16).map_err(|_| bad())?,
        order_id: OrderId::parse("page_token", id).map_err(|_| bad())?,
    })
}

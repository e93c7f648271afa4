//! The services behind the gateway, as little of them as it can tell from the outside.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use mesh::{
    layers::{self, ClientConfig, ServerConfig},
    link::Link,
};
use proto::{
    BuyerId, Error, OrderId, Reason, RequestId,
    internal::{
        coordinator_server, get_order_result, lookup_result, order_records_server, order_result, payments_server,
        stock_server, *,
    },
    v1::{self, Order, OrderState, Sale},
};
use tokio::sync::Semaphore;
use tonic::{Request, Response, Status, service::Routes};

type Answer<T> = Result<Response<T>, Status>;

/// Everything the fakes know and have been asked.
#[derive(Debug)]
pub struct Fakes {
    /// Written orders, by id.
    pub records: Mutex<HashMap<String, Order>>,
    /// Orders that are only granted yet, by id.
    pub grants: Mutex<HashMap<String, Grant>>,
    /// Whether permits are being rebuilt, so that grants are not known.
    pub rebuilding: AtomicBool,
    /// Sales, by id.
    pub sales: Mutex<HashMap<String, Sale>>,
    /// What buyers of a sale are told instead of an order.
    pub refusals: Mutex<HashMap<String, Error>>,
    /// Whether accepted orders are only granted, or written at once.
    pub funnel_stopped: AtomicBool,
    /// One a call of the coordinator's buyer rpcs; without one left they hang.
    pub turns: Semaphore,
    /// How many orders were asked for.
    pub accept_calls: AtomicUsize,
    /// How many pay and cancel items came.
    pub change_calls: AtomicUsize,
    /// Charges made: (order, request_id).
    pub charges: Mutex<HashSet<(String, String)>>,
    /// Webhooks as they came.
    pub webhooks: Mutex<Vec<HandleWebhookRequest>>,
    /// Operators' and sale-changing calls.
    pub operated: Mutex<Vec<String>>,
    /// What was written down of operators' actions.
    pub actions: Mutex<Vec<v1::Action>>,
    /// Whether nothing can be written down.
    pub is_book_closed: AtomicBool,
    /// When orders are granted.
    pub now_ms: i64,
}

impl Default for Fakes {
    fn default() -> Self {
        let mut sale = Sale { name: "sales/spring".into(), title: "Spring".into(), stock: 100, ..Default::default() };
        sale.set_state(v1::SaleState::Open);
        sale.set_availability(v1::Availability::Available);
        Self {
            records: Mutex::default(),
            grants: Mutex::default(),
            rebuilding: AtomicBool::new(false),
            sales: Mutex::new(HashMap::from([("spring".to_owned(), sale)])),
            refusals: Mutex::default(),
            funnel_stopped: AtomicBool::new(false),
            turns: Semaphore::new(1_000_000),
            accept_calls: AtomicUsize::new(0),
            change_calls: AtomicUsize::new(0),
            charges: Mutex::default(),
            webhooks: Mutex::default(),
            operated: Mutex::default(),
            actions: Mutex::default(),
            is_book_closed: AtomicBool::new(false),
            now_ms: 1_750_000_000_000,
        }
    }
}

impl Fakes {
    /// A link to all of them.
    pub fn link(self: &Arc<Self>) -> Link {
        let service = Service(self.clone());
        let routes = Routes::new(stock_server::StockServer::new(service.clone()))
            .add_service(order_records_server::OrderRecordsServer::new(service.clone()))
            .add_service(payments_server::PaymentsServer::new(service.clone()))
            .add_service(coordinator_server::CoordinatorServer::new(service));
        let config = ClientConfig { timeout: Duration::from_secs(10), attempts: 1 };
        Link::local(layers::server(routes, ServerConfig::default()), config)
    }

    /// What the funnel does: writes what was granted.
    pub fn write(&self, id: &str) -> Order {
        let grant = self.grants.lock().unwrap().remove(id).expect("the order is granted");
        let mut order = self.order_of(&grant);
        order.set_state(OrderState::AwaitingPayment);
        order.etag = "1".to_owned();
        self.records.lock().unwrap().insert(id.to_owned(), order.clone());
        order
    }

    /// Moves a written order on.
    pub fn transition(&self, id: &str, to: OrderState) -> Order {
        let mut records = self.records.lock().unwrap();
        let order = records.get_mut(id).expect("the order is written");
        order.set_state(to);
        order.etag = (order.etag.parse::<u64>().unwrap() + 1).to_string();
        order.clone()
    }

    /// How much the services have been asked to change.
    pub fn effects(&self) -> usize {
        self.accept_calls.load(Ordering::SeqCst)
            + self.change_calls.load(Ordering::SeqCst)
            + self.operated.lock().unwrap().len()
            + self.webhooks.lock().unwrap().len()
    }

    fn order_of(&self, grant: &Grant) -> Order {
        let timestamp = |ms: i64| Some(prost_types::Timestamp { seconds: ms / 1000, nanos: 0 });
        Order {
            name: format!("orders/{}", grant.hold_id),
            sale: format!("sales/{}", grant.sale_id),
            buyer: grant.buyer.clone(),
            quantity: grant.quantity,
            amount: Some(proto::WireMoney { currency_code: "EUR".into(), units: 10, nanos: 500_000_000 }),
            state: OrderState::Placed.into(),
            create_time: timestamp(grant.granted_at_ms),
            expire_time: timestamp(grant.granted_at_ms + grant.payment_window_ms),
            etag: "0".to_owned(),
            ..Default::default()
        }
    }

    fn accept(&self, item: AcceptOrder) -> Result<Order, Error> {
        self.accept_calls.fetch_add(1, Ordering::SeqCst);
        let (buyer, request) = (BuyerId::parse(&item.buyer)?, RequestId::parse("request_id", &item.request_id)?);
        let id = OrderId::derive(&buyer, &request).to_string();
        if let Some(order) = self.records.lock().unwrap().get(&id) {
            return Ok(order.clone());
        }
        let known = self.grants.lock().unwrap().get(&id).cloned();
        if let Some(grant) = known {
            return Ok(self.order_of(&grant));
        }
        if !self.sales.lock().unwrap().contains_key(&item.sale_id) {
            return Err(Error::not_found("sale"));
        }
        if let Some(error) = self.refusals.lock().unwrap().get(&item.sale_id) {
            return Err(error.clone());
        }
        let grant = Grant {
            hold_id: id.clone(),
            sale_id: item.sale_id,
            buyer: item.buyer,
            quantity: item.quantity,
            epoch: 1,
            granted_at_ms: self.now_ms,
            fresh: true,
            amount: Some(Amount { currency: "EUR".into(), units: 10, nanos: 500_000_000 }),
            payment_window_ms: 900_000,
            kept_until_ms: self.now_ms + 5_000,
        };
        let order = self.order_of(&grant);
        self.grants.lock().unwrap().insert(id.clone(), grant);
        if !self.funnel_stopped.load(Ordering::SeqCst) {
            self.write(&id);
        }
        Ok(order)
    }

    fn change(&self, id: &str, buyer: &str, to: OrderState) -> Result<Order, Error> {
        self.change_calls.fetch_add(1, Ordering::SeqCst);
        let order = self.records.lock().unwrap().get(id).cloned().filter(|order| order.buyer == buyer);
        let order = order.ok_or_else(|| Error::not_found("order"))?;
        match order.state() {
            state if state == to => Ok(order),
            OrderState::AwaitingPayment => Ok(self.transition(id, to)),
            state => Err(Error::illegal_state(state.as_str_name(), "the order cannot be changed any more")),
        }
    }

    fn operate<T>(&self, what: &str, answer: T) -> Answer<T> {
        self.operated.lock().unwrap().push(what.to_owned());
        Ok(Response::new(answer))
    }

    fn sale(&self, id: &str) -> Answer<Sale> {
        let sale = self.sales.lock().unwrap().get(id).cloned();
        Ok(Response::new(sale.ok_or_else(|| Error::not_found("sale"))?))
    }

    async fn turn(&self) {
        self.turns.acquire().await.expect("turns are never closed").forget();
    }
}

fn result(result: Result<Order, Error>) -> OrderResult {
    OrderResult {
        result: Some(match result {
            Ok(order) => order_result::Result::Order(order),
            Err(error) => order_result::Result::Refused(error.into()),
        }),
    }
}

fn unused<T>() -> Answer<T> {
    panic!("the gateway has no business calling this")
}

#[derive(Clone)]
struct Service(Arc<Fakes>);

#[tonic::async_trait]
impl coordinator_server::Coordinator for Service {
    async fn accept_orders(&self, request: Request<AcceptOrdersRequest>) -> Answer<AcceptOrdersResponse> {
        self.0.turn().await;
        let results = request.into_inner().items.into_iter().map(|item| result(self.0.accept(item))).collect();
        Ok(Response::new(AcceptOrdersResponse { results }))
    }

    async fn pay_orders(&self, request: Request<PayOrdersRequest>) -> Answer<PayOrdersResponse> {
        self.0.turn().await;
        let pay = |item: PayOrderItem| {
            if item.payment_method == "sim_decline" {
                let declined = Error::new(Reason::PaymentDeclined, "the payment was declined");
                return result(Err(declined.with_metadata("declineCode", "insufficient_funds")));
            }
            let paid = self.0.change(&item.order_id, &item.buyer, OrderState::Paid);
            if paid.is_ok() {
                self.0.charges.lock().unwrap().insert((item.order_id, item.request_id));
            }
            result(paid)
        };
        Ok(Response::new(PayOrdersResponse { results: request.into_inner().items.into_iter().map(pay).collect() }))
    }

    async fn cancel_orders(&self, request: Request<CancelOrdersRequest>) -> Answer<CancelOrdersResponse> {
        self.0.turn().await;
        let cancel = |item: CancelOrderItem| result(self.0.change(&item.order_id, &item.buyer, OrderState::Cancelled));
        Ok(Response::new(CancelOrdersResponse {
            results: request.into_inner().items.into_iter().map(cancel).collect(),
        }))
    }

    async fn list_sagas(&self, _: Request<v1::ListSagasRequest>) -> Answer<v1::ListSagasResponse> {
        self.0.operate("ListSagas", v1::ListSagasResponse::default())
    }

    async fn get_saga(&self, _: Request<v1::GetSagaRequest>) -> Answer<v1::Saga> {
        Err(Error::not_found("saga").with_context("a secret").into())
    }

    async fn explain_saga(&self, request: Request<v1::ExplainSagaRequest>) -> Answer<v1::SagaExplanation> {
        let saga = format!("sagas/{}", request.into_inner().saga);
        self.0.operate("ExplainSaga", v1::SagaExplanation { saga, ..Default::default() })
    }

    async fn retry_saga(&self, request: Request<v1::RetrySagaRequest>) -> Answer<v1::Saga> {
        let name = format!("sagas/{}", request.into_inner().saga);
        self.0.operate("RetrySaga", v1::Saga { name, ..Default::default() })
    }

    async fn abandon_saga(&self, _: Request<v1::AbandonSagaRequest>) -> Answer<v1::Saga> {
        self.0.operate("AbandonSaga", v1::Saga::default())
    }

    async fn list_dead_letters(&self, _: Request<v1::ListDeadLettersRequest>) -> Answer<v1::ListDeadLettersResponse> {
        self.0.operate("ListDeadLetters", v1::ListDeadLettersResponse::default())
    }

    async fn get_dead_letter(&self, request: Request<v1::GetDeadLetterRequest>) -> Answer<v1::DeadLetter> {
        let name = format!("deadLetters/{}", request.into_inner().dead_letter);
        Ok(Response::new(v1::DeadLetter { name, ..Default::default() }))
    }

    async fn redrive_dead_letter(&self, _: Request<v1::RedriveDeadLetterRequest>) -> Answer<v1::DeadLetter> {
        self.0.operate("RedriveDeadLetter", v1::DeadLetter::default())
    }

    async fn list_actions(&self, _: Request<v1::ListActionsRequest>) -> Answer<v1::ListActionsResponse> {
        let actions = self.0.actions.lock().unwrap().clone();
        Ok(Response::new(v1::ListActionsResponse { actions, next_page_token: String::new() }))
    }

    async fn record_action(&self, request: Request<v1::Action>) -> Answer<()> {
        if self.0.is_book_closed.load(Ordering::SeqCst) {
            return Err(Error::dependency("the database", "away").into());
        }
        self.0.actions.lock().unwrap().push(request.into_inner());
        Ok(Response::new(()))
    }
}

#[tonic::async_trait]
impl order_records_server::OrderRecords for Service {
    async fn get_orders(&self, request: Request<GetOrdersRequest>) -> Answer<GetOrdersResponse> {
        let records = self.0.records.lock().unwrap();
        let find = |id: &String| GetOrderResult {
            result: Some(match records.get(id) {
                Some(order) => get_order_result::Result::Order(order.clone()),
                None => get_order_result::Result::Absent(()),
            }),
        };
        Ok(Response::new(GetOrdersResponse { results: request.get_ref().order_ids.iter().map(find).collect() }))
    }

    async fn list_orders(&self, request: Request<ListBuyerOrdersRequest>) -> Answer<v1::ListOrdersResponse> {
        let wanted = request.into_inner();
        let records = self.0.records.lock().unwrap();
        let orders = records.values().filter(|order| order.buyer == wanted.buyer).cloned().collect();
        Ok(Response::new(v1::ListOrdersResponse { orders, next_page_token: wanted.page_size.to_string() }))
    }

    async fn create_orders(&self, _: Request<CreateOrdersRequest>) -> Answer<CreateOrdersResponse> {
        unused()
    }
    async fn transition_orders(&self, _: Request<TransitionOrdersRequest>) -> Answer<TransitionOrdersResponse> {
        unused()
    }
}

#[tonic::async_trait]
impl stock_server::Stock for Service {
    async fn create_sale(&self, request: Request<v1::CreateSaleRequest>) -> Answer<Sale> {
        let request = request.into_inner();
        let sale = Sale { name: format!("sales/{}", request.sale_id), title: request.title, ..Default::default() };
        self.0.operate("CreateSale", sale)
    }
    async fn get_sale(&self, request: Request<v1::GetSaleRequest>) -> Answer<Sale> {
        self.0.sale(&request.get_ref().sale)
    }
    async fn list_sales(&self, _: Request<v1::ListSalesRequest>) -> Answer<v1::ListSalesResponse> {
        let sales = self.0.sales.lock().unwrap().values().cloned().collect();
        Ok(Response::new(v1::ListSalesResponse { sales, next_page_token: String::new() }))
    }
    async fn open_sale(&self, request: Request<v1::OpenSaleRequest>) -> Answer<Sale> {
        self.0.operate("OpenSale", self.0.sale(&request.get_ref().sale)?.into_inner())
    }
    async fn pause_sale(&self, request: Request<v1::PauseSaleRequest>) -> Answer<Sale> {
        self.0.operate("PauseSale", self.0.sale(&request.get_ref().sale)?.into_inner())
    }
    async fn close_sale(&self, request: Request<v1::CloseSaleRequest>) -> Answer<Sale> {
        self.0.operate("CloseSale", self.0.sale(&request.get_ref().sale)?.into_inner())
    }
    async fn adjust_stock(&self, request: Request<v1::AdjustStockRequest>) -> Answer<v1::StockReport> {
        let slack = request.into_inner().delta;
        self.0.operate("AdjustStock", v1::StockReport { slack, ..Default::default() })
    }
    async fn get_stock(&self, _: Request<v1::GetStockRequest>) -> Answer<v1::StockReport> {
        Ok(Response::new(v1::StockReport::default()))
    }
    async fn rebuild_stock(&self, _: Request<v1::RebuildStockRequest>) -> Answer<v1::StockReport> {
        self.0.operate("RebuildStock", v1::StockReport::default())
    }
    async fn reconcile_stock(&self, _: Request<v1::ReconcileStockRequest>) -> Answer<v1::StockReconciliation> {
        Ok(Response::new(v1::StockReconciliation::default()))
    }
    async fn lookup_grants(&self, request: Request<LookupGrantsRequest>) -> Answer<LookupGrantsResponse> {
        let grants = self.0.grants.lock().unwrap();
        let rebuilding = self.0.rebuilding.load(Ordering::SeqCst);
        let find = |id: &String| LookupResult {
            result: Some(match grants.get(id) {
                Some(grant) => lookup_result::Result::Granted(grant.clone()),
                None if rebuilding => lookup_result::Result::Unknown(()),
                None => lookup_result::Result::Absent(()),
            }),
        };
        Ok(Response::new(LookupGrantsResponse { results: request.get_ref().hold_ids.iter().map(find).collect() }))
    }

    async fn acquire_permits(&self, _: Request<AcquirePermitsRequest>) -> Answer<AcquirePermitsResponse> {
        unused()
    }
    async fn lock_stock(&self, _: Request<LockStockRequest>) -> Answer<LockStockResponse> {
        unused()
    }
    async fn release_stock(&self, _: Request<ReleaseStockRequest>) -> Answer<ReleaseStockResponse> {
        unused()
    }
    async fn deduct_stock(&self, _: Request<DeductStockRequest>) -> Answer<DeductStockResponse> {
        unused()
    }
}

#[tonic::async_trait]
impl payments_server::Payments for Service {
    async fn handle_webhook(&self, request: Request<HandleWebhookRequest>) -> Answer<()> {
        let request = request.into_inner();
        if request.signature == "forged" {
            return Err(Error::new(Reason::Unauthenticated, "the signature is not valid").into());
        }
        self.0.webhooks.lock().unwrap().push(request);
        Ok(Response::new(()))
    }

    async fn charge(&self, _: Request<ChargeRequest>) -> Answer<ChargeResponse> {
        unused()
    }
    async fn resolve(&self, _: Request<ResolveRequest>) -> Answer<ResolveResponse> {
        unused()
    }
    async fn void(&self, _: Request<VoidRequest>) -> Answer<VoidResponse> {
        unused()
    }
    async fn refund(&self, _: Request<RefundRequest>) -> Answer<RefundResponse> {
        unused()
    }
}

//! The gRPC edge: decode and check, call, encode. One bad item refuses itself and none of its neighbours; a call is
//! answered when its own items are, and waits for nobody else's.

use futures::future::join_all;
use proto::{
    Error, OrderId,
    error::Result,
    internal::{
        ChargeRequest, ChargeResponse, HandleWebhookRequest, PaymentResult, RefundRequest, RefundResponse,
        ResolveRequest, ResolveResponse, VoidRequest, VoidResponse, payments_server,
    },
};
use tonic::{Request, Response, Status};

use crate::{
    domain::{Answer, PaymentId},
    payments::Payments,
    wire,
};

/// Items of one call.
const ITEMS: usize = 4_096;

/// The rpcs.
#[derive(Debug)]
pub(crate) struct Service {
    payments: Payments,
}

impl Service {
    pub(crate) fn new(payments: Payments) -> Self {
        Self { payments }
    }
}

#[tonic::async_trait]
impl payments_server::Payments for Service {
    async fn charge(&self, request: Request<ChargeRequest>) -> Result<Response<ChargeResponse>, Status> {
        let items = at_most(request.into_inner().items)?;
        let results = join_all(items.into_iter().map(|item| async move {
            let order_id = item.order_id.clone();
            let answer = match wire::charge(item) {
                Ok((order, new)) => self.payments.charge(order, new).await,
                Err(error) => Err(error),
            };
            wire::result(&order_id, answer)
        }))
        .await;
        Ok(Response::new(ChargeResponse { results }))
    }

    async fn resolve(&self, request: Request<ResolveRequest>) -> Result<Response<ResolveResponse>, Status> {
        let ids = at_most(request.into_inner().payment_ids)?;
        // An id that cannot be one is nobody's payment.
        let known: Vec<PaymentId> = ids.iter().filter_map(|id| id.parse().ok()).collect();
        let mut answers = self.payments.resolve(known).await?.into_iter();
        let results = ids.iter().map(|id| {
            let answer = id.parse::<PaymentId>().ok().and_then(|_| answers.next());
            wire::result("", answer.unwrap_or_else(|| Err(Error::not_found("payment"))))
        });
        Ok(Response::new(ResolveResponse { results: results.collect() }))
    }

    async fn void(&self, request: Request<VoidRequest>) -> Result<Response<VoidResponse>, Status> {
        let results = each(request.into_inner().order_ids, |order_id| self.payments.void(order_id)).await?;
        Ok(Response::new(VoidResponse { results }))
    }

    async fn refund(&self, request: Request<RefundRequest>) -> Result<Response<RefundResponse>, Status> {
        let results = each(request.into_inner().order_ids, |order_id| self.payments.refund(order_id)).await?;
        Ok(Response::new(RefundResponse { results }))
    }

    async fn handle_webhook(&self, request: Request<HandleWebhookRequest>) -> Result<Response<()>, Status> {
        let HandleWebhookRequest { body, signature } = request.into_inner();
        self.payments.webhook(&body, &signature).await?;
        Ok(Response::new(()))
    }
}

fn at_most<T>(items: Vec<T>) -> Result<Vec<T>> {
    if items.len() > ITEMS {
        return Err(Error::invalid("items", format!("must be at most {ITEMS}")));
    }
    Ok(items)
}

async fn each<F: Future<Output = Result<Answer>>>(
    order_ids: Vec<String>,
    work: impl Fn(OrderId) -> F,
) -> Result<Vec<PaymentResult>> {
    let work = &work;
    let results = at_most(order_ids)?.into_iter().map(|text| async move {
        let answer = match OrderId::parse("order_id", &text) {
            Ok(order_id) => work(order_id).await,
            Err(error) => Err(error),
        };
        wire::result(&text, answer)
    });
    Ok(join_all(results).await)
}

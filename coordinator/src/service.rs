//! The gRPC edge: decode, call, encode. One bad item refuses itself and none of its neighbours.
//!
//! Orders of a call are accepted as one batch. Items of the other calls go their ways at the same time; what they need is
//! batched underneath, with the items of other calls.

use std::future::Future;

use futures::future::join_all;
use proto::{
    Error,
    error::Result,
    internal::{
        AcceptOrder, AcceptOrdersRequest, AcceptOrdersResponse, CancelOrdersRequest, CancelOrdersResponse, OrderResult,
        PayOrdersRequest, PayOrdersResponse, coordinator_server::Coordinator, order_result,
    },
    v1::{
        AbandonSagaRequest, Action, DeadLetter, ExplainSagaRequest, GetDeadLetterRequest, GetSagaRequest,
        ListActionsRequest, ListActionsResponse, ListDeadLettersRequest, ListDeadLettersResponse, ListSagasRequest,
        ListSagasResponse, Order, RedriveDeadLetterRequest, RetrySagaRequest, Saga, SagaExplanation,
    },
};
use tonic::{Request, Response, Status};
use tracing::{Instrument, Span};

use crate::{accept::Accept, ops::Ops, pay::Counter, wire::trace_headers};

/// Items of one call.
const ITEMS: usize = 4_096;

/// The rpcs.
#[derive(Debug)]
pub(crate) struct Service {
    pub(crate) accept: Accept,
    pub(crate) counter: Counter,
    pub(crate) ops: Ops,
}

#[tonic::async_trait]
impl Coordinator for Service {
    async fn accept_orders(
        &self,
        request: Request<AcceptOrdersRequest>,
    ) -> Result<Response<AcceptOrdersResponse>, Status> {
        let items = at_most(request.into_inner().items)?;
        let span = |item: &AcceptOrder| item_span(tracing::info_span!("accept_order"), &item.traceparent);
        let spans: Vec<Span> = items.iter().map(span).collect();
        let accept = self.accept.clone();
        // On a task of its own: a caller that went away must not leave permits without orders behind.
        let accepting = tokio::spawn(async move { accept.accept(&items, &spans).await }.in_current_span());
        let orders = accepting.await.map_err(|_| Error::internal("accepting a batch failed"))?;
        Ok(Response::new(AcceptOrdersResponse { results: orders.into_iter().map(result).collect() }))
    }

    async fn pay_orders(&self, request: Request<PayOrdersRequest>) -> Result<Response<PayOrdersResponse>, Status> {
        let items = at_most(request.into_inner().items)?;
        let results = join_all(items.iter().map(|item| {
            let span = item_span(tracing::info_span!("pay_order"), &item.traceparent);
            answer(self.counter.pay(item)).instrument(span)
        }));
        Ok(Response::new(PayOrdersResponse { results: results.await }))
    }

    async fn cancel_orders(
        &self,
        request: Request<CancelOrdersRequest>,
    ) -> Result<Response<CancelOrdersResponse>, Status> {
        let items = at_most(request.into_inner().items)?;
        let results = join_all(items.iter().map(|item| {
            let span = item_span(tracing::info_span!("cancel_order"), &item.traceparent);
            answer(self.counter.cancel(item)).instrument(span)
        }));
        Ok(Response::new(CancelOrdersResponse { results: results.await }))
    }

    async fn list_sagas(&self, request: Request<ListSagasRequest>) -> Result<Response<ListSagasResponse>, Status> {
        Ok(Response::new(self.ops.list(request.into_inner()).await?))
    }

    async fn get_saga(&self, request: Request<GetSagaRequest>) -> Result<Response<Saga>, Status> {
        Ok(Response::new(self.ops.get(&request.into_inner()).await?))
    }

    async fn explain_saga(&self, request: Request<ExplainSagaRequest>) -> Result<Response<SagaExplanation>, Status> {
        Ok(Response::new(self.ops.explain(&request.into_inner()).await?))
    }

    async fn retry_saga(&self, request: Request<RetrySagaRequest>) -> Result<Response<Saga>, Status> {
        Ok(Response::new(self.ops.retry(&request.into_inner()).await?))
    }

    async fn abandon_saga(&self, request: Request<AbandonSagaRequest>) -> Result<Response<Saga>, Status> {
        Ok(Response::new(self.ops.abandon(&request.into_inner()).await?))
    }

    async fn list_dead_letters(
        &self,
        request: Request<ListDeadLettersRequest>,
    ) -> Result<Response<ListDeadLettersResponse>, Status> {
        Ok(Response::new(self.ops.dead_letters(&request.into_inner()).await?))
    }

    async fn get_dead_letter(&self, request: Request<GetDeadLetterRequest>) -> Result<Response<DeadLetter>, Status> {
        Ok(Response::new(self.ops.dead_letter(request.get_ref()).await?))
    }

    async fn redrive_dead_letter(
        &self,
        request: Request<RedriveDeadLetterRequest>,
    ) -> Result<Response<DeadLetter>, Status> {
        Ok(Response::new(self.ops.redrive(&request.into_inner()).await?))
    }

    async fn list_actions(
        &self,
        request: Request<ListActionsRequest>,
    ) -> Result<Response<ListActionsResponse>, Status> {
        Ok(Response::new(self.ops.actions(request.get_ref()).await?))
    }

    async fn record_action(&self, request: Request<Action>) -> Result<Response<()>, Status> {
        Ok(Response::new(self.ops.record_action(request.into_inner()).await?))
    }
}

/// A batch carries many traces: each item goes on in its own.
fn item_span(span: Span, traceparent: &str) -> Span {
    mesh::telemetry::set_parent(&span, &trace_headers(traceparent));
    span
}

async fn answer(order: impl Future<Output = Result<Order>>) -> OrderResult {
    result(order.await)
}

fn result(order: Result<Order>) -> OrderResult {
    let result = match order {
        Ok(order) => order_result::Result::Order(order),
        Err(error) => {
            if error.reason.is_answer() {
                tracing::debug!(%error, "refused");
            } else {
                tracing::warn!(%error, "an order's call failed");
            }
            order_result::Result::Refused(error.into())
        }
    };
    OrderResult { result: Some(result) }
}

fn at_most<T>(items: Vec<T>) -> Result<Vec<T>> {
    if items.len() > ITEMS {
        return Err(Error::invalid("items", format!("must be at most {ITEMS}")));
    }
    Ok(items)
}

//! The operators' rpcs: who asks is checked here, everything else where the saga or the ledger is.

use mesh::{layers::Once, link::Link};
use proto::{
    internal::{coordinator_client::CoordinatorClient, stock_client::StockClient},
    v1::{
        AbandonSagaRequest, DeadLetter, ExplainSagaRequest, GetDeadLetterRequest, GetSagaRequest, ListActionsRequest,
        ListActionsResponse, ListDeadLettersRequest, ListDeadLettersResponse, ListSagasRequest, ListSagasResponse,
        RebuildStockRequest, ReconcileStockRequest, RedriveDeadLetterRequest, RetrySagaRequest, Saga, SagaExplanation,
        StockReconciliation, StockReport, operations_server,
    },
};
use tonic::{Request, Response, Status};

use super::{
    Callers,
    actions::{Actions, Deed},
    answer, given, handed_on, page_size, plain, sale,
};

/// Serves `seckill.v1.Operations`.
#[derive(Clone)]
pub struct Operations {
    callers: Callers,
    actions: Actions,
    coordinator: CoordinatorClient<Link>,
    stock: StockClient<Link>,
}

impl Operations {
    /// Over these links.
    pub fn new(callers: Callers, actions: Actions, coordinator: Link, stock: Link) -> Self {
        Self { callers, actions, coordinator: CoordinatorClient::new(coordinator), stock: StockClient::new(stock) }
    }
}

/// A call that is not idempotent: a second one would be refused for what the first has done, and booked as not done.
fn once<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.extensions_mut().insert(Once);
    request
}

#[tonic::async_trait]
impl operations_server::Operations for Operations {
    async fn list_sagas(&self, request: Request<ListSagasRequest>) -> Result<Response<ListSagasResponse>, Status> {
        answer(
            async {
                self.callers.operator(request.metadata())?;
                let mut request = request.into_inner();
                request.page_size = page_size(request.page_size)?;
                plain("page_token", &request.page_token)?;
                plain("state", &request.state)?;
                handed_on(self.coordinator.clone().list_sagas(request).await)
            }
            .await,
        )
    }

    async fn get_saga(&self, request: Request<GetSagaRequest>) -> Result<Response<Saga>, Status> {
        answer(
            async {
                self.callers.operator(request.metadata())?;
                let request = request.into_inner();
                given("saga", &request.saga)?;
                handed_on(self.coordinator.clone().get_saga(request).await)
            }
            .await,
        )
    }

    async fn explain_saga(&self, request: Request<ExplainSagaRequest>) -> Result<Response<SagaExplanation>, Status> {
        answer(
            async {
                self.callers.operator(request.metadata())?;
                let request = request.into_inner();
                given("saga", &request.saga)?;
                handed_on(self.coordinator.clone().explain_saga(request).await)
            }
            .await,
        )
    }

    async fn retry_saga(&self, request: Request<RetrySagaRequest>) -> Result<Response<Saga>, Status> {
        let mut coordinator = self.coordinator.clone();
        let deed = |request: &mut RetrySagaRequest| Deed::to_saga("RetrySaga", &mut request.saga, &request.reason);
        self.actions.operate(request, deed, async move |request| coordinator.retry_saga(once(request)).await).await
    }

    async fn abandon_saga(&self, request: Request<AbandonSagaRequest>) -> Result<Response<Saga>, Status> {
        let mut coordinator = self.coordinator.clone();
        let deed = |request: &mut AbandonSagaRequest| {
            given("reason", &request.reason)?;
            Deed::to_saga("AbandonSaga", &mut request.saga, &request.reason)
        };
        self.actions.operate(request, deed, async move |request| coordinator.abandon_saga(once(request)).await).await
    }

    async fn list_dead_letters(
        &self,
        request: Request<ListDeadLettersRequest>,
    ) -> Result<Response<ListDeadLettersResponse>, Status> {
        answer(
            async {
                self.callers.operator(request.metadata())?;
                let mut request = request.into_inner();
                request.page_size = page_size(request.page_size)?;
                plain("page_token", &request.page_token)?;
                handed_on(self.coordinator.clone().list_dead_letters(request).await)
            }
            .await,
        )
    }

    async fn get_dead_letter(&self, request: Request<GetDeadLetterRequest>) -> Result<Response<DeadLetter>, Status> {
        answer(
            async {
                self.callers.operator(request.metadata())?;
                let request = request.into_inner();
                given("dead_letter", &request.dead_letter)?;
                handed_on(self.coordinator.clone().get_dead_letter(request).await)
            }
            .await,
        )
    }

    async fn redrive_dead_letter(
        &self,
        request: Request<RedriveDeadLetterRequest>,
    ) -> Result<Response<DeadLetter>, Status> {
        let mut coordinator = self.coordinator.clone();
        let deed = |request: &mut RedriveDeadLetterRequest| {
            Deed::to_dead_letter("RedriveDeadLetter", &request.dead_letter, &request.reason)
        };
        self.actions
            .operate(request, deed, async move |request| coordinator.redrive_dead_letter(once(request)).await)
            .await
    }

    async fn rebuild_stock(&self, request: Request<RebuildStockRequest>) -> Result<Response<StockReport>, Status> {
        let mut stock = self.stock.clone();
        let deed =
            |request: &mut RebuildStockRequest| Deed::to_sale("RebuildStock", &mut request.sale, &request.reason);
        self.actions.operate(request, deed, async move |request| stock.rebuild_stock(request).await).await
    }

    async fn reconcile_stock(
        &self,
        request: Request<ReconcileStockRequest>,
    ) -> Result<Response<StockReconciliation>, Status> {
        answer(
            async {
                self.callers.operator(request.metadata())?;
                let sale = sale(&request.get_ref().sale)?;
                handed_on(self.stock.clone().reconcile_stock(ReconcileStockRequest { sale }).await)
            }
            .await,
        )
    }

    async fn list_actions(
        &self,
        request: Request<ListActionsRequest>,
    ) -> Result<Response<ListActionsResponse>, Status> {
        answer(
            async {
                self.callers.operator(request.metadata())?;
                let mut request = request.into_inner();
                request.page_size = page_size(request.page_size)?;
                plain("page_token", &request.page_token)?;
                plain("target", &request.target)?;
                handed_on(self.coordinator.clone().list_actions(request).await)
            }
            .await,
        )
    }
}

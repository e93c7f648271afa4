//! The operators' rpcs: who asks is checked here, everything else where the saga or the ledger is.

use mesh::link::Link;
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
        answer(
            async {
                let operator = self.callers.operator(request.metadata())?;
                let request = request.into_inner();
                given("saga", &request.saga)?;
                let deed = Deed::new("RetrySaga", "sagas", &request.saga, &request.reason)?;
                let work = async { handed_on(self.coordinator.clone().retry_saga(request).await) };
                self.actions.record(&operator, deed, work).await
            }
            .await,
        )
    }

    async fn abandon_saga(&self, request: Request<AbandonSagaRequest>) -> Result<Response<Saga>, Status> {
        answer(
            async {
                let operator = self.callers.operator(request.metadata())?;
                let request = request.into_inner();
                given("saga", &request.saga)?;
                given("reason", &request.reason)?;
                let deed = Deed::new("AbandonSaga", "sagas", &request.saga, &request.reason)?;
                let work = async { handed_on(self.coordinator.clone().abandon_saga(request).await) };
                self.actions.record(&operator, deed, work).await
            }
            .await,
        )
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
        answer(
            async {
                let operator = self.callers.operator(request.metadata())?;
                let request = request.into_inner();
                given("dead_letter", &request.dead_letter)?;
                let deed = Deed::new("RedriveDeadLetter", "deadLetters", &request.dead_letter, &request.reason)?;
                let work = async { handed_on(self.coordinator.clone().redrive_dead_letter(request).await) };
                self.actions.record(&operator, deed, work).await
            }
            .await,
        )
    }

    async fn rebuild_stock(&self, request: Request<RebuildStockRequest>) -> Result<Response<StockReport>, Status> {
        answer(
            async {
                let operator = self.callers.operator(request.metadata())?;
                let mut request = request.into_inner();
                request.sale = sale(&request.sale)?;
                let deed = Deed::new("RebuildStock", "sales", &request.sale, &request.reason)?;
                let work = async { handed_on(self.stock.clone().rebuild_stock(request).await) };
                self.actions.record(&operator, deed, work).await
            }
            .await,
        )
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

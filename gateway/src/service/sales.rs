//! Sales: what is on offer, for anyone; running it, for operators. The truth is with stock-svc.

use std::{collections::HashMap, pin::Pin, sync::Arc, time::Duration};

use futures::{Stream, future::join_all, stream};
use mesh::{
    batch::{Batcher, Limits},
    lifecycle::Lifecycle,
    link::Link,
};
use proto::{
    Error, RequestId, SaleId,
    internal::{SaleChanged, stock_client::StockClient},
    v1::{
        AdjustStockRequest, CloseSaleRequest, CreateSaleRequest, GetSaleRequest, GetStockRequest, ListSalesRequest,
        ListSalesResponse, OpenSaleRequest, PauseSaleRequest, Sale, SaleState, StockReport, WatchSaleRequest,
        sales_server,
    },
};
use tonic::{Request, Response, Status};

use super::{
    Callers,
    actions::{Actions, Deed},
    answer, handed_on, page_size, refuse, sale, shutting_down,
};
use crate::watch::{Registry, Watcher};

/// Who watches which sale.
pub type SaleWatchers = Registry<String, Arc<SaleChanged>>;

/// How often a watched sale is read without a signal: the clock ends sales, and signals get lost.
const READ_AGAIN: Duration = Duration::from_secs(5);

/// Serves `seckill.v1.Sales`.
#[derive(Clone)]
pub struct Sales {
    callers: Callers,
    actions: Actions,
    stock: StockClient<Link>,
    /// In a rush everybody reads the same sale: who comes while one read is under way shares the next.
    reads: Batcher<String, Result<Sale, Error>>,
    watchers: SaleWatchers,
    life: Lifecycle,
}

impl Sales {
    /// Over this link.
    pub fn new(callers: Callers, actions: Actions, stock: Link, watchers: SaleWatchers, life: &Lifecycle) -> Self {
        let stock = StockClient::new(stock);
        let reader = stock.clone();
        let limits = Limits { max_items: 1024, in_flight: 4, ..Limits::default() };
        let reads = Batcher::start("get sale", limits, life.tasks(), move |ids| read_once(reader.clone(), ids));
        Self { callers, actions, stock, reads, watchers, life: life.clone() }
    }

    async fn read(&self, id: &str) -> Result<Sale, Error> {
        self.reads.submit(id.to_owned()).await?
    }

    async fn watch(&self, request: Request<WatchSaleRequest>) -> Result<SaleStream, Error> {
        self.callers.anyone(request.metadata())?;
        let id = sale(&request.get_ref().sale)?;
        // Watched first and read after, so that nothing falls in between.
        let watcher = self.watchers.watch(id.clone())?;
        let first = self.read(&id).await?;
        let watching = Watching {
            sales: self.clone(),
            id,
            watcher,
            last: None,
            version: i64::MIN,
            next: Some(first),
            ended: false,
        };
        Ok(Box::pin(stream::unfold(watching, Watching::step)))
    }
}

/// Reads each of the named sales once, however often it is asked for.
async fn read_once(stock: StockClient<Link>, ids: Vec<String>) -> Vec<Result<Sale, Error>> {
    let mut wanted: HashMap<String, Option<Result<Sale, Error>>> = ids.iter().map(|id| (id.clone(), None)).collect();
    join_all(wanted.iter_mut().map(|(id, read)| {
        let mut stock = stock.clone();
        async move { *read = Some(handed_on(stock.get_sale(GetSaleRequest { sale: id.clone() }).await)) }
    }))
    .await;
    let found = |id: &String| wanted.get(id).cloned().flatten().unwrap_or_else(|| Err(Error::internal("not read")));
    ids.iter().map(found).collect()
}

type SaleStream = Pin<Box<dyn Stream<Item = Result<Sale, Status>> + Send>>;

/// One watcher of one sale.
struct Watching {
    sales: Sales,
    id: String,
    watcher: Watcher<String, Arc<SaleChanged>>,
    /// What it was told last.
    last: Option<Sale>,
    /// Of the newest signal; an older one is dropped.
    version: i64,
    /// What it is to be told next.
    next: Option<Sale>,
    ended: bool,
}

impl Watching {
    async fn step(mut self) -> Option<(Result<Sale, Status>, Self)> {
        if self.ended {
            return None;
        }
        let sale = match self.next.take() {
            Some(first) => Ok(first),
            None => self.changed().await,
        };
        match sale {
            Ok(sale) => {
                self.ended = sale.state() == SaleState::Ended;
                self.last = Some(sale.clone());
                Some((Ok(sale), self))
            }
            Err(error) => {
                self.ended = true;
                Some((Err(refuse(error)), self))
            }
        }
    }

    /// The sale, once it differs from what was told last.
    async fn changed(&mut self) -> Result<Sale, Error> {
        loop {
            let sale = tokio::select! {
                biased;
                () = self.sales.life.stopping() => return Err(shutting_down()),
                changed = self.watcher.changed() => {
                    let changed = changed?;
                    if changed.version < self.version {
                        continue;
                    }
                    self.version = changed.version;
                    changed.sale.clone()
                }
                () = tokio::time::sleep(READ_AGAIN) => match self.sales.read(&self.id).await {
                    Ok(sale) => Some(sale),
                    Err(error) => {
                        // A net with a hole now and then is still a net.
                        tracing::debug!(%error, sale = self.id, "a watched sale could not be read");
                        None
                    }
                },
            };
            if let Some(sale) = sale
                && self.last.as_ref() != Some(&sale)
            {
                return Ok(sale);
            }
        }
    }
}

#[tonic::async_trait]
impl sales_server::Sales for Sales {
    type WatchSaleStream = SaleStream;

    async fn create_sale(&self, request: Request<CreateSaleRequest>) -> Result<Response<Sale>, Status> {
        let mut stock = self.stock.clone();
        let deed = |request: &mut CreateSaleRequest| {
            own_request_id(&mut request.request_id);
            // Named here where nobody named it, so that the book has its name.
            let id = match request.sale_id.as_str() {
                "" => SaleId::generate(&RequestId::parse("request_id", &request.request_id)?),
                id => SaleId::parse("sale_id", id)?,
            };
            Ok(Deed::to_sale("CreateSale", &mut id.to_string(), "")?.with(format!("stock {}", request.stock)))
        };
        self.actions.operate(request, deed, async move |request| stock.create_sale(request).await).await
    }

    async fn get_sale(&self, request: Request<GetSaleRequest>) -> Result<Response<Sale>, Status> {
        answer(
            async {
                self.callers.anyone(request.metadata())?;
                self.read(&sale(&request.get_ref().sale)?).await
            }
            .await,
        )
    }

    async fn list_sales(&self, request: Request<ListSalesRequest>) -> Result<Response<ListSalesResponse>, Status> {
        answer(
            async {
                self.callers.anyone(request.metadata())?;
                let mut request = request.into_inner();
                request.page_size = page_size(request.page_size)?;
                handed_on(self.stock.clone().list_sales(request).await)
            }
            .await,
        )
    }

    async fn open_sale(&self, request: Request<OpenSaleRequest>) -> Result<Response<Sale>, Status> {
        let mut stock = self.stock.clone();
        let deed = |request: &mut OpenSaleRequest| Deed::to_sale("OpenSale", &mut request.sale, &request.reason);
        self.actions.operate(request, deed, async move |request| stock.open_sale(request).await).await
    }

    async fn pause_sale(&self, request: Request<PauseSaleRequest>) -> Result<Response<Sale>, Status> {
        let mut stock = self.stock.clone();
        let deed = |request: &mut PauseSaleRequest| Deed::to_sale("PauseSale", &mut request.sale, &request.reason);
        self.actions.operate(request, deed, async move |request| stock.pause_sale(request).await).await
    }

    async fn close_sale(&self, request: Request<CloseSaleRequest>) -> Result<Response<Sale>, Status> {
        let mut stock = self.stock.clone();
        let deed = |request: &mut CloseSaleRequest| Deed::to_sale("CloseSale", &mut request.sale, &request.reason);
        self.actions.operate(request, deed, async move |request| stock.close_sale(request).await).await
    }

    async fn adjust_stock(&self, request: Request<AdjustStockRequest>) -> Result<Response<StockReport>, Status> {
        let mut stock = self.stock.clone();
        let deed = |request: &mut AdjustStockRequest| {
            own_request_id(&mut request.request_id);
            if request.delta == 0 {
                return Err(Error::invalid("delta", "must not be zero"));
            }
            let deed = Deed::to_sale("AdjustStock", &mut request.sale, &request.reason)?;
            Ok(deed.with(format!("delta {:+}", request.delta)))
        };
        self.actions.operate(request, deed, async move |request| stock.adjust_stock(request).await).await
    }

    async fn get_stock(&self, request: Request<GetStockRequest>) -> Result<Response<StockReport>, Status> {
        answer(
            async {
                self.callers.operator(request.metadata())?;
                let sale = sale(&request.get_ref().sale)?;
                handed_on(self.stock.clone().get_stock(GetStockRequest { sale }).await)
            }
            .await,
        )
    }

    async fn watch_sale(&self, request: Request<WatchSaleRequest>) -> Result<Response<SaleStream>, Status> {
        answer(self.watch(request).await)
    }
}

/// The operator's request_id, or one for this call alone: our own retries of it are one request either way.
fn own_request_id(request_id: &mut String) {
    if request_id.is_empty() {
        *request_id = RequestId::random().to_string();
    }
}

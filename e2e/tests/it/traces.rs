//! What a trace of one order shows, as any OTLP receiver gets it: one connected tree from the HTTP request to the deduct
//! or the release, along parents and, where a batch took the order in, along links.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use e2e::processes::Process;
use mesh::testing::eventually;
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    trace::v1::Span,
};
use tonic::{Request, Response, Status};
use uuid::Uuid;

const PROGRAM: &str = env!("CARGO_BIN_EXE_e2e-seckill");

type Id = Vec<u8>;

/// A receiver of traces that keeps them.
#[derive(Clone, Default)]
struct Receiver(Arc<Mutex<Vec<Span>>>);

#[tonic::async_trait]
impl TraceService for Receiver {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let scopes = request.into_inner().resource_spans.into_iter().flat_map(|resource| resource.scope_spans);
        self.0.lock().unwrap().extend(scopes.flat_map(|scope| scope.spans));
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Receiver {
    async fn start() -> (Self, SocketAddr) {
        let receiver = Self::default();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let incoming = tonic::transport::server::TcpIncoming::from(listener);
        let server = tonic::transport::Server::builder().add_service(TraceServiceServer::new(receiver.clone()));
        tokio::spawn(server.serve_with_incoming(incoming));
        (receiver, address)
    }

    /// The names of all spans that can be reached from this one, from parent to child and from what is linked to what
    /// links.
    fn reachable_from(&self, root: &Id) -> BTreeSet<String> {
        let spans = self.0.lock().unwrap();
        let mut next: HashMap<&Id, Vec<&Span>> = HashMap::new();
        for span in spans.iter() {
            next.entry(&span.parent_span_id).or_default().push(span);
            for link in &span.links {
                next.entry(&link.span_id).or_default().push(span);
            }
        }
        let (mut open, mut seen, mut names) = (vec![root], HashSet::from([root]), BTreeSet::new());
        while let Some(id) = open.pop() {
            for span in next.get(id).into_iter().flatten() {
                names.insert(span.name.clone());
                if seen.insert(&span.span_id) {
                    open.push(&span.span_id);
                }
            }
        }
        names
    }

    /// Spans of a trace whose parent nobody exported.
    fn orphans(&self, trace: &Id, root: &Id) -> Vec<String> {
        let spans = self.0.lock().unwrap();
        let known: HashSet<&Id> = spans.iter().map(|span| &span.span_id).chain([root]).collect();
        let orphans = spans.iter().filter(|span| span.trace_id == *trace && !known.contains(&span.parent_span_id));
        orphans.map(|span| span.name.clone()).collect()
    }
}

/// A caller's own trace.
struct Caller {
    trace: Id,
    span: Id,
}

impl Caller {
    fn new() -> Self {
        let (trace, span) = (Uuid::new_v4(), Uuid::new_v4());
        Self { trace: trace.as_bytes().to_vec(), span: span.as_bytes()[..8].to_vec() }
    }

    fn traceparent(&self) -> String {
        let hex = |id: &Id| id.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        format!("00-{}-{}-01", hex(&self.trace), hex(&self.span))
    }

    /// Sends one HTTP request as this buyer and answers the order's name.
    async fn post(&self, mesh: &Process, buyer: &str, path: &str, body: &str) -> String {
        let token = mesh.site().token(buyer, "buyer");
        let headers = [
            ("traceparent", self.traceparent()),
            ("authorization", format!("Bearer {token}")),
            ("idempotency-key", Uuid::new_v4().to_string()),
            ("content-type", "application/json".to_owned()),
        ];
        let answer = mesh.http("POST", path, &headers, body).await.unwrap();
        let (_, after) = answer.split_once(r#""name":""#).unwrap_or_else(|| panic!("no order: {answer}"));
        after.split_once('"').unwrap().0.to_owned()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trace_of_an_order_is_one_connected_tree() {
    let (receiver, address) = Receiver::start().await;
    let dir = tempfile::tempdir().unwrap();
    let arguments = ["--data-dir", &dir.path().display().to_string(), "--otlp-endpoint", &format!("http://{address}")];
    let mesh = Process::start(PROGRAM, arguments.map(str::to_owned).to_vec()).await;
    let sale = mesh.site().sale(5, Duration::from_secs(3)).await;
    let place = format!(r#"{{"sale":"{sale}","quantity":1}}"#);

    let (payer, quitter) = (Caller::new(), Caller::new());
    quitter.post(&mesh, "quentin", "/v1/orders", &place).await;
    let order = payer.post(&mesh, "paula", "/v1/orders", &place).await;
    payer.post(&mesh, "paula", &format!("/v1/{order}:pay"), r#"{"paymentMethod":"sim_approve"}"#).await;

    let accepted = [
        "seckill.v1.Orders/PlaceOrder",
        "seckill.internal.v1.Coordinator/AcceptOrders",
        "seckill.internal.v1.Stock/AcquirePermits",
        "funnel",
        "seckill.internal.v1.Stock/LockStock",
        "seckill.internal.v1.OrderRecords/CreateOrders",
    ];
    let paid = [
        "seckill.v1.Orders/PayOrder",
        "seckill.internal.v1.Coordinator/PayOrders",
        "seckill.internal.v1.Payments/Charge",
        "seckill.internal.v1.Stock/DeductStock",
    ];
    let released = ["seckill.internal.v1.Stock/ReleaseStock"];
    for (caller, then) in [(&payer, &paid[..]), (&quitter, &released[..])] {
        let mut reached = BTreeSet::new();
        eventually(&format!("{then:?} are reached"), async || {
            reached = receiver.reachable_from(&caller.span);
            accepted.iter().chain(then).all(|name| reached.contains(*name)).then_some(())
        })
        .await;
        assert_eq!(receiver.orphans(&caller.trace, &caller.span), Vec::<String>::new());
    }
}

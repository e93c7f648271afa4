//! The span and the measurement of a call, on either side.

use std::{
    convert::Infallible,
    sync::Arc,
    task::{Context, Poll},
};

use http::{Request, Response, Uri};
use tokio::time::Instant;
use tonic::{Code, body::Body};
use tower::Service;
use tracing::{Instrument, Span, field::Empty};

use super::{
    Answering, code_of,
    measure::{Methods, Side},
    through,
};
use crate::telemetry::{inject_current, set_parent, trace_id};

/// See the module.
#[derive(Clone)]
pub(super) struct Trace<S> {
    inner: S,
    methods: Arc<Methods>,
}

impl<S> Trace<S> {
    pub(super) fn new(inner: S, methods: Arc<Methods>) -> Self {
        Self { inner, methods }
    }
}

impl<S> Service<Request<Body>> for Trace<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Answering;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<Body>) -> Answering {
        let span = match self.methods.side {
            Side::Client => span("client", request.uri().path()),
            Side::Server => span("server", request.uri().path()),
        };
        match self.methods.side {
            Side::Client => span.in_scope(|| inject_current(request.headers_mut())),
            Side::Server => {
                set_parent(&span, request.headers());
                // So that a log line written in there leads to its trace.
                if let Some(id) = trace_id(&span) {
                    span.record("trace_id", id);
                }
            }
        }
        let measured = Measured {
            methods: self.methods.clone(),
            uri: request.uri().clone(),
            started: Instant::now(),
            code: Code::Cancelled,
        };
        let inner = self.inner.clone();
        let noted = span.clone();
        let call = async move {
            let Ok(answer) = through(inner, request).await;
            let code = code_of(&answer);
            note(&noted, code);
            measured.end(code);
            Ok(answer)
        };
        Box::pin(call.instrument(span))
    }
}

fn span(kind: &'static str, path: &str) -> Span {
    let name = path.trim_start_matches('/');
    let (service, method) = name.rsplit_once('/').unwrap_or(("", name));
    tracing::info_span!(
        "rpc",
        otel.name = name,
        otel.kind = kind,
        otel.status_code = Empty,
        rpc.system = "grpc",
        rpc.service = service,
        rpc.method = method,
        rpc.grpc.status_code = Empty,
        trace_id = Empty,
    )
}

fn note(span: &Span, code: Code) {
    span.record("rpc.grpc.status_code", code as i64);
    // Sold out and not found are answers; red is for what somebody should look at.
    if matches!(code, Code::Unknown | Code::DeadlineExceeded | Code::Internal | Code::Unavailable | Code::DataLoss) {
        span.record("otel.status_code", "ERROR");
    }
}

/// Counts the call when it ends, however it ends: one whose caller went away is CANCELLED.
struct Measured {
    methods: Arc<Methods>,
    uri: Uri,
    started: Instant,
    code: Code,
}

impl Measured {
    fn end(mut self, code: Code) {
        self.code = code;
    }
}

impl Drop for Measured {
    fn drop(&mut self) {
        self.methods.record(self.uri.path(), self.code, self.started.elapsed());
    }
}

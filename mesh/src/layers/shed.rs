//! Shedding: an atomic count of calls in progress, and a refusal at once above the limit.
//!
//! Never a queue: MEASURED, a gate keeps its capacity in good answers at ten times the load, while a limit that queues
//! keeps a tenth of it. A slot is held until the answer begins, or the caller goes away.

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use http::{Request, Response};
use metrics::Counter;
use proto::Reason;
use tonic::body::Body;
use tower::Service;

use super::{Answering, refuse, through};

/// Whoever asks whether we live must hear it most when we are busy (E50), or is led to kill us for it.
const EXEMPT: &str = "/grpc.health.v1.Health/";

/// Counts calls in progress.
#[derive(Debug)]
pub(super) struct Gate {
    limit: usize,
    in_flight: AtomicUsize,
    shed: Counter,
}

impl Gate {
    pub(super) fn new(limit: usize) -> Self {
        metrics::describe_counter!("seckill_rpc_shed_total", "calls refused because too many were in progress");
        Self { limit, in_flight: AtomicUsize::new(0), shed: metrics::counter!("seckill_rpc_shed_total") }
    }

    /// A slot, or none. Takes first and looks after: two at once can at most both be refused, never both be let in.
    fn enter(self: &Arc<Self>) -> Option<Slot> {
        let slot = Slot(self.clone());
        if self.in_flight.fetch_add(1, Ordering::Relaxed) < self.limit { Some(slot) } else { None }
    }
}

/// One call in progress, until it is dropped.
struct Slot(Arc<Gate>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// See the module.
#[derive(Clone)]
pub(super) struct Shed<S> {
    inner: S,
    gate: Arc<Gate>,
}

impl<S> Shed<S> {
    pub(super) fn new(inner: S, gate: Arc<Gate>) -> Self {
        Self { inner, gate }
    }
}

impl<S> Service<Request<Body>> for Shed<S>
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

    fn call(&mut self, request: Request<Body>) -> Answering {
        let slot = if request.uri().path().starts_with(EXEMPT) {
            None
        } else if let Some(slot) = self.gate.enter() {
            Some(slot)
        } else {
            self.gate.shed.increment(1);
            let error = proto::Error::new(Reason::Overloaded, "too many requests are in progress");
            return Box::pin(std::future::ready(Ok(refuse(error))));
        };
        let inner = self.inner.clone();
        Box::pin(async move {
            let _slot = slot;
            through(inner, request).await
        })
    }
}

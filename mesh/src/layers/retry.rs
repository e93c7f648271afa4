//! Retries of a call that was refused for a moment, or whose transport failed, within a budget (E49).
//!
//! Safe for the rpcs between our services that are idempotent by the ids in them (I10): all but the few that are marked
//! [`Once`]. What makes retries dangerous is their sum, when everything fails at once: hence a budget per link, jitter on
//! every wait, and obedience to `grpc-retry-pushback-ms`.

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response, request::Parts};
use http_body_util::{BodyExt, Full};
use proto::{Reason, error::RETRY_PUSHBACK};
use tonic::{Code, Status, body::Body};
use tower::Service;

use super::{Answering, Deadline, code_of, through};
use crate::chance;

/// The longest wait before the first retry, doubled for each further one …
const FIRST_BACKOFF: Duration = Duration::from_millis(20);
/// … up to this.
const MAX_BACKOFF: Duration = Duration::from_millis(500);
/// A server that wants longer is better answered for: the caller knows whether it is worth waiting.
const MAX_PUSHBACK: Duration = Duration::from_secs(1);

/// In the extensions of a request: it is sent once, and what became of it when its answer is lost is not known. For what a
/// second time is not a repetition: it would be refused because the first was done.
#[derive(Clone, Copy, Debug)]
pub struct Once;

/// A bucket of retries: every call adds a tenth, every retry takes one.
#[derive(Debug)]
pub(super) struct Budget {
    thousandths: AtomicI64,
}

impl Budget {
    const PER_CALL: i64 = 100;
    const PER_RETRY: i64 = 1_000;
    /// Full, it is worth ten retries: enough for a link that is seldom used, nothing to one that is often used.
    const FULL: i64 = 10 * Self::PER_RETRY;

    fn note_call(&self) {
        self.change(|have| Some((have + Self::PER_CALL).min(Self::FULL)));
    }

    /// Whether a retry may be made. It is paid for when it may.
    fn take(&self) -> bool {
        self.change(|have| (have >= Self::PER_RETRY).then_some(have - Self::PER_RETRY))
    }

    fn change(&self, change: impl Fn(i64) -> Option<i64>) -> bool {
        self.thousandths.fetch_update(Ordering::Relaxed, Ordering::Relaxed, change).is_ok()
    }
}

impl Default for Budget {
    fn default() -> Self {
        Self { thousandths: AtomicI64::new(Self::FULL) }
    }
}

/// See the module.
#[derive(Clone)]
pub(super) struct Retry<S> {
    inner: S,
    attempts: u32,
    budget: Arc<Budget>,
}

impl<S> Retry<S> {
    pub(super) fn new(inner: S, attempts: u32, budget: Arc<Budget>) -> Self {
        Self { inner, attempts, budget }
    }
}

impl<S> Service<Request<Body>> for Retry<S>
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
        let Self { inner, attempts, budget } = self.clone();
        budget.note_call();
        Box::pin(async move {
            let (parts, body) = request.into_parts();
            let attempts = if parts.extensions.get::<Once>().is_some() { 1 } else { attempts };
            // Whole, so that it can be sent again. Our requests are single messages; none is streamed.
            let body = match body.collect().await {
                Ok(collected) => collected.to_bytes(),
                Err(status) => return Ok(status.into_http()),
            };
            for attempt in 1.. {
                let Ok(answer) = through(inner.clone(), again(&parts, &body)).await;
                let Some(wait) = wait_before_retry(&answer, attempt) else { return Ok(answer) };
                let left = parts.extensions.get::<Deadline>().map_or(Duration::MAX, |deadline| deadline.left());
                // Nothing is taken from the budget for a retry that could not be answered in time.
                if attempt >= attempts || wait >= left || !budget.take() {
                    return Ok(answer);
                }
                metrics::counter!("seckill_rpc_retries_total", "method" => method(&parts)).increment(1);
                tokio::time::sleep(wait).await;
            }
            unreachable!("the attempts are bounded")
        })
    }
}

/// The request once more; only the body's handle is copied.
fn again(parts: &Parts, body: &Bytes) -> Request<Body> {
    Request::from_parts(parts.clone(), Body::new(Full::new(body.clone())))
}

fn method(parts: &Parts) -> String {
    parts.uri.path().trim_start_matches('/').to_owned()
}

/// How long to wait before trying again; `None` when the answer stands.
fn wait_before_retry(answer: &Response<Body>, attempt: u32) -> Option<Duration> {
    if code_of(answer) != Code::Unavailable {
        return None;
    }
    // A transport's failure carries no reason of ours and reads as DEPENDENCY_DOWN. STOCK_REBUILDING is not over in a
    // moment, and its hint is for the buyer.
    let status = Status::from_header_map(answer.headers()).unwrap_or_else(|| Status::unavailable("a proxy"));
    if !matches!(proto::Error::from(status).reason, Reason::Overloaded | Reason::DependencyDown) {
        return None;
    }
    let pushback = match answer.headers().get(RETRY_PUSHBACK) {
        None => Duration::ZERO,
        // Negative, or nothing that can be read: never, as gRPC has it.
        Some(value) => Duration::from_millis(value.to_str().ok()?.parse().ok()?),
    };
    // Full jitter: callers that failed together must not come back together.
    let most = FIRST_BACKOFF.saturating_mul(1 << (attempt - 1).min(16)).min(MAX_BACKOFF);
    (pushback <= MAX_PUSHBACK).then(|| pushback + most.mul_f64(chance::fraction()))
}

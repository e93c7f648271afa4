//! Deadlines: the caller's word for how long an answer is of use, kept on both sides and handed on.
//!
//! On the wire it is `grpc-timeout`, what is left; inside it is an instant ([`Deadline`]). The server side makes it known
//! to the task that handles the call, so that calls made from there cannot outlive it.

use std::{
    convert::Infallible,
    future::Future,
    task::{Context, Poll},
    time::Duration,
};

use http::{HeaderMap, HeaderValue, Request, Response};
use proto::Reason;
use tokio::time::Instant;
use tonic::body::Body;
use tower::Service;

use super::{Answering, refuse, through};

const GRPC_TIMEOUT: &str = "grpc-timeout";

tokio::task_local! {
    static CURRENT: Deadline;
}

/// When an answer is of no use any more. In the extensions of every request that comes through our layers, and
/// current for the task that handles it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(pub Instant);

impl Deadline {
    /// So long from now.
    pub fn after(left: Duration) -> Self {
        // Beyond what the clock can say is as good as a day.
        let now = Instant::now();
        Self(now.checked_add(left).unwrap_or(now + Duration::from_secs(86_400)))
    }

    /// The deadline of the call that this task handles. Not inherited by spawned tasks.
    pub fn current() -> Option<Self> {
        CURRENT.try_with(|deadline| *deadline).ok()
    }

    /// Runs work with this deadline current, for calls made from within.
    pub async fn scope<F: Future>(self, work: F) -> F::Output {
        CURRENT.scope(self, work).await
    }

    /// How long until then; zero afterwards.
    pub fn left(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }

    fn has_passed(self) -> bool {
        self.0 <= Instant::now()
    }
}

/// The client's side: bounds the whole call.
#[derive(Clone)]
pub(super) struct ClientDeadline<S> {
    inner: S,
    limit: Duration,
}

impl<S> ClientDeadline<S> {
    pub(super) fn new(inner: S, limit: Duration) -> Self {
        Self { inner, limit }
    }
}

impl<S> Service<Request<Body>> for ClientDeadline<S>
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
        let asked = read(request.headers()).map_or(self.limit, |asked| asked.min(self.limit));
        let given = request.extensions().get::<Deadline>().copied();
        let deadline = [given, Deadline::current()].into_iter().flatten().fold(Deadline::after(asked), Deadline::min);
        request.extensions_mut().insert(deadline);
        let inner = self.inner.clone();
        Box::pin(async move {
            // tokio's timeout looks at the call first and at the clock after: a late call would still be made.
            if deadline.has_passed() {
                return Ok(refuse(exceeded()));
            }
            let answer = tokio::time::timeout_at(deadline.0, through(inner, request)).await;
            answer.unwrap_or_else(|_| Ok(refuse(exceeded())))
        })
    }
}

/// The server's side: drops the handler when nobody waits for it any more.
#[derive(Clone)]
pub(super) struct ServerDeadline<S> {
    inner: S,
    limit: Duration,
}

impl<S> ServerDeadline<S> {
    pub(super) fn new(inner: S, limit: Duration) -> Self {
        Self { inner, limit }
    }
}

impl<S> Service<Request<Body>> for ServerDeadline<S>
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
        let left = read(request.headers()).map_or(self.limit, |left| left.min(self.limit));
        let deadline = Deadline::after(left);
        request.extensions_mut().insert(deadline);
        let inner = self.inner.clone();
        Box::pin(async move {
            if deadline.has_passed() {
                return Ok(refuse(exceeded()));
            }
            let answer = tokio::time::timeout_at(deadline.0, deadline.scope(through(inner, request))).await;
            answer.unwrap_or_else(|_| Ok(refuse(exceeded())))
        })
    }
}

pub(super) fn exceeded() -> proto::Error {
    proto::Error::new(Reason::DeadlineExceeded, "deadline exceeded")
}

/// Writes what is left, rounded up: the transport's own timer must not fire before ours.
pub(super) fn write(left: Duration, headers: &mut HeaderMap) {
    // At most eight digits: microseconds up to 100 s, milliseconds up to a day, and nobody waits longer.
    let micros = left.as_nanos().div_ceil(1_000);
    let text = if micros < 100_000_000 {
        format!("{micros}u")
    } else {
        format!("{}m", micros.div_ceil(1_000).min(99_999_999))
    };
    headers.insert(GRPC_TIMEOUT, HeaderValue::from_str(&text).expect("digits and a letter are a header value"));
}

/// Reads what is left; `None` when the header is missing or is not one.
fn read(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(GRPC_TIMEOUT)?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let value: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(value * 3600)),
        "M" => Some(Duration::from_secs(value * 60)),
        "S" => Some(Duration::from_secs(value)),
        "m" => Some(Duration::from_millis(value)),
        "u" => Some(Duration::from_micros(value)),
        "n" => Some(Duration::from_nanos(value)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reads(text: &str) -> Option<Duration> {
        read(&HeaderMap::from_iter([(
            http::HeaderName::from_static(GRPC_TIMEOUT),
            HeaderValue::from_str(text).unwrap(),
        )]))
    }

    #[test]
    fn what_is_written_reads_back_and_never_shorter() {
        for left in [0, 1, 999, 1_000_001, 20_000_000, 99_999_999_999, 100_000_000_000, u64::MAX] {
            let left = Duration::from_nanos(left);
            let mut headers = HeaderMap::new();
            write(left, &mut headers);
            let back = read(&headers).unwrap();
            assert!(back >= left.min(Duration::from_millis(99_999_999)), "{left:?} became {back:?}");
            assert!(back <= left + Duration::from_millis(1), "{left:?} became {back:?}");
        }
    }

    #[test]
    fn nonsense_is_no_deadline() {
        assert_eq!(reads("20m"), Some(Duration::from_millis(20)));
        assert_eq!(reads("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        for nonsense in ["", "m", "20", "20x", "-1m", "+1m", "123456789m", "2 m"] {
            assert_eq!(reads(nonsense), None, "{nonsense:?}");
        }
        Deadline::after(Duration::MAX);
    }
}

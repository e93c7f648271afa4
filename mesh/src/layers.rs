//! What surrounds every call between services: tracing, deadlines, retries, shedding. The same on both wirings.
//!
//! A link in this process skips tonic's transport, and with it whatever tonic's builders set up. So nothing of it is
//! set there: [`client`] and [`server`] put on the whole stack, and are the only places that do. Order is meaning; the
//! reason for each layer's depth stands above its line.
//!
//! Promises: a call is answered by its deadline, even when the handler never would, and the handler is dropped then;
//! what is refused for overload or lateness has not reached the handler (I9, E46); retries stay within a tenth of the
//! calls (E49); health checks are never shed (E50); a failed transport is an UNAVAILABLE answer, not an error of its
//! own. A limit: for a streaming answer all of this covers the time until its headers, not the stream.

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use http::{Request, Response};
use tonic::{Code, Status, body::Body, server::NamedService};
use tower::{Service, ServiceBuilder, ServiceExt, layer::layer_fn};

use crate::link::BoxError;

mod attempt;
mod deadline;
mod measure;
mod retry;
mod shed;
mod trace;

pub use deadline::Deadline;
pub use retry::Once;

use self::{
    attempt::Attempt,
    deadline::{ClientDeadline, ServerDeadline},
    measure::{Methods, Side},
    retry::{Budget, Retry},
    shed::{Gate, Shed},
    trace::Trace,
};

/// How a client of ours calls.
#[derive(Clone, Copy, Debug)]
pub struct ClientConfig {
    /// A call with all its attempts takes no longer. A shorter `grpc-timeout`, or an incoming deadline, goes first.
    pub timeout: Duration,
    /// How often a call is tried, the first time included.
    pub attempts: u32,
}

impl Default for ClientConfig {
    fn default() -> Self {
        Self { timeout: Duration::from_secs(10), attempts: 3 }
    }
}

/// What a server of ours lets in.
#[derive(Clone, Copy, Debug)]
pub struct ServerConfig {
    /// Calls in progress at once; one more is refused, not queued. Health checks do not count.
    pub max_in_flight: usize,
    /// No call is worked on for longer, whatever its caller allows.
    pub max_timeout: Duration,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self { max_in_flight: 4096, max_timeout: Duration::from_secs(30) }
    }
}

/// What every layer answers with: refusals are answers too, so nothing is left to fail.
type Answer = Result<Response<Body>, Infallible>;
/// An answer on its way. Boxed, so that stacks have names; a few boxes a call do not show beside encoding.
type Answering = Pin<Box<dyn Future<Output = Answer> + Send>>;

/// The client side of a call, outside in. `transport` is a channel, or a server value of this process.
pub fn client<S>(transport: S, config: ClientConfig) -> Client<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Clone + Send + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
{
    let methods = Methods::new(Side::Client);
    let budget = Arc::new(Budget::default());
    let stack = ServiceBuilder::new()
        // Outermost: one span and one measurement per call, with all its attempts and waits, as the caller sees it.
        .layer(layer_fn(|inner| Trace::new(inner, methods.clone())))
        // Outside of retry: the deadline is the whole call's, and waiting before a retry uses it up.
        .layer(layer_fn(|inner| ClientDeadline::new(inner, config.timeout)))
        // Each attempt below it is a call of its own to the server, which sees what is left of the deadline.
        .layer(layer_fn(|inner| Retry::new(inner, config.attempts, budget.clone())))
        // Innermost: only here is the transport, and only here can it fail.
        .layer(layer_fn(Attempt::new))
        .service(transport);
    Client(stack)
}

/// The server side of a call, outside in. `handler` is a generated server, or routes of several.
pub fn server<S>(handler: S, config: ServerConfig) -> Server<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send + 'static,
{
    let methods = Methods::new(Side::Server);
    let gate = Arc::new(Gate::new(config.max_in_flight));
    let stack = ServiceBuilder::new()
        // Outermost: what is shed or late is seen and counted too.
        .layer(layer_fn(|inner| Trace::new(inner, methods.clone())))
        // Before anything is spent on the call; and outside of the deadline, so that a slot is free again when the
        // deadline has dropped the handler.
        .layer(layer_fn(|inner| Shed::new(inner, gate.clone())))
        // Innermost: it drops the handler, and hands it the deadline for the calls that it makes itself.
        .layer(layer_fn(|inner| ServerDeadline::new(inner, config.max_timeout)))
        .service(handler);
    Server(stack)
}

/// A transport with the client's layers on.
#[derive(Clone)]
pub struct Client<S>(Trace<ClientDeadline<Retry<Attempt<S>>>>);

impl<S> Service<Request<Body>> for Client<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Clone + Send + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    // Never made: a failed transport is an answer. Named, because that is what tonic's clients and Link take.
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, BoxError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let answering = self.0.call(request);
        Box::pin(async move { answering.await.map_err(|never| match never {}) })
    }
}

/// A handler with the server's layers on.
#[derive(Clone)]
pub struct Server<S>(Trace<Shed<ServerDeadline<S>>>);

impl<S> Service<Request<Body>> for Server<S>
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
        self.0.call(request)
    }
}

/// Still to be added to tonic's routes by its name.
impl<S: NamedService> NamedService for Server<S> {
    const NAME: &'static str = S::NAME;
}

/// Calls a clone of the inner service once it is ready, within the returned future: so being ready costs the caller's
/// deadline like everything else, and no layer needs to hold readiness back.
async fn through<S>(service: S, request: Request<Body>) -> Result<Response<Body>, S::Error>
where
    S: Service<Request<Body>, Response = Response<Body>>,
{
    service.oneshot(request).await
}

/// The gRPC code of an answer, as far as its headers tell. A handler that began its answer has succeeded so far.
fn code_of(answer: &Response<Body>) -> Code {
    match answer.headers().get(Status::GRPC_STATUS) {
        Some(code) => Code::from_bytes(code.as_bytes()),
        None if answer.status().is_success() => Code::Ok,
        // Not one of ours: a proxy between us.
        None if matches!(answer.status().as_u16(), 429 | 502..=504) => Code::Unavailable,
        None => Code::Unknown,
    }
}

/// A refusal as an answer.
fn refuse(error: proto::Error) -> Response<Body> {
    Status::from(error).into_http()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use proto::Reason;
    use tokio::{sync::Semaphore, time::Instant};
    use tower::service_fn;

    use super::*;
    use crate::telemetry::kept;

    const METHOD: &str = "/test.Things/Do";
    const HEALTH: &str = "/grpc.health.v1.Health/Check";

    fn request(path: &str) -> Request<Body> {
        Request::post(path).body(Body::empty()).unwrap()
    }

    fn ok() -> Answer {
        Ok(Response::new(Body::empty()))
    }

    /// A handler with a body that only has to be written once per test.
    fn handler<F, Fut>(
        work: F,
    ) -> impl Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future = Answering>
    + Clone
    + Send
    + 'static
    where
        F: Fn(Request<Body>) -> Fut + Clone + Send + 'static,
        Fut: Future<Output = Answer> + Send + 'static,
    {
        service_fn(move |request| -> Answering { Box::pin(work(request)) })
    }

    async fn reason_of<S>(service: S, request: Request<Body>) -> Result<(), Reason>
    where
        S: Service<Request<Body>, Response = Response<Body>>,
        S::Error: std::fmt::Debug,
    {
        let answer = service.oneshot(request).await.unwrap();
        match Status::from_header_map(answer.headers()) {
            Some(status) if status.code() != Code::Ok => Err(proto::Error::from(status).reason),
            _ => Ok(()),
        }
    }

    fn refusing(
        reason: Reason,
        calls: &Arc<AtomicUsize>,
    ) -> impl Fn(Request<Body>) -> std::future::Ready<Answer> + Clone + use<> {
        let calls = calls.clone();
        move |_| {
            calls.fetch_add(1, Ordering::Relaxed);
            std::future::ready(Ok(refuse(proto::Error::new(reason, "no"))))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_deadline_of_20_ms_is_kept_on_a_direct_link() {
        let dropped = Arc::new(AtomicUsize::new(0));
        struct OnDrop(Arc<AtomicUsize>);
        impl Drop for OnDrop {
            fn drop(&mut self) {
                self.0.fetch_add(1, Ordering::Relaxed);
            }
        }
        let noted = dropped.clone();
        let slow = handler(move |_| {
            let on_drop = OnDrop(noted.clone());
            async move {
                let _on_drop = on_drop;
                tokio::time::sleep(Duration::from_millis(301)).await;
                ok()
            }
        });
        let direct = client(server(slow, ServerConfig::default()), ClientConfig::default());
        let mut request = request(METHOD);
        request.headers_mut().insert("grpc-timeout", "20m".parse().unwrap());
        let started = Instant::now();
        assert_eq!(reason_of(direct, request).await, Err(Reason::DeadlineExceeded));
        assert!(started.elapsed() <= Duration::from_millis(21), "{:?}", started.elapsed());
        assert_eq!(dropped.load(Ordering::Relaxed), 1, "the handler is dropped");
    }

    #[tokio::test(start_paused = true)]
    async fn an_incoming_deadline_bounds_the_calls_made_for_it() {
        let never = handler(|_| std::future::pending());
        let inner = client(server(never, ServerConfig::default()), ClientConfig::default());
        let front = server(
            handler(move |_| {
                let inner = inner.clone();
                async move {
                    // What the inner call came to is this call's answer.
                    Ok(inner.oneshot(request(METHOD)).await.unwrap())
                }
            }),
            ServerConfig { max_timeout: Duration::from_millis(100), ..Default::default() },
        );
        let started = Instant::now();
        assert_eq!(reason_of(front, request(METHOD)).await, Err(Reason::DeadlineExceeded));
        assert!(started.elapsed() <= Duration::from_millis(101), "{:?}", started.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn e47_a_call_that_comes_too_late_does_not_reach_the_handler() {
        let calls = Arc::new(AtomicUsize::new(0));
        let counted = calls.clone();
        let server = server(
            handler(move |_| {
                counted.fetch_add(1, Ordering::Relaxed);
                async { ok() }
            }),
            ServerConfig::default(),
        );
        let mut late = request(METHOD);
        late.headers_mut().insert("grpc-timeout", "0m".parse().unwrap());
        assert_eq!(reason_of(server, late).await, Err(Reason::DeadlineExceeded));
        assert_eq!(calls.load(Ordering::Relaxed), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn e46_e50_a_shed_call_takes_nothing_and_health_is_not_shed() {
        let (calls, doors) = (Arc::new(AtomicUsize::new(0)), Arc::new(Semaphore::new(0)));
        let (counted, door) = (calls.clone(), doors.clone());
        let server = server(
            handler(move |request: Request<Body>| {
                let door = door.clone();
                counted.fetch_add(1, Ordering::Relaxed);
                async move {
                    if request.uri().path() != HEALTH {
                        door.acquire().await.unwrap().forget();
                    }
                    ok()
                }
            }),
            ServerConfig { max_in_flight: 2, ..Default::default() },
        );
        let held: Vec<_> = (0..2).map(|_| tokio::spawn(reason_of(server.clone(), request(METHOD)))).collect();
        while calls.load(Ordering::Relaxed) < 2 {
            tokio::task::yield_now().await;
        }
        for _ in 0..1000 {
            assert_eq!(reason_of(server.clone(), request(METHOD)).await, Err(Reason::Overloaded));
        }
        assert_eq!(calls.load(Ordering::Relaxed), 2, "no shed call reached the handler");
        assert_eq!(reason_of(server.clone(), request(HEALTH)).await, Ok(()));

        // Slots come back: by an answer, by an answer missed, and by a caller that went away.
        doors.add_permits(1);
        assert_eq!(reason_of(server.clone(), request(METHOD)).await, Err(Reason::Overloaded));
        for task in &held {
            task.abort();
        }
        for task in held {
            let _ = task.await;
        }
        doors.add_permits(1);
        assert_eq!(reason_of(server, request(METHOD)).await, Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn e49_retries_stay_within_a_tenth_of_the_calls() {
        const CALLS: usize = 2000;
        let attempts = Arc::new(AtomicUsize::new(0));
        let down = client(handler(refusing(Reason::Overloaded, &attempts)), ClientConfig::default());
        for _ in 0..CALLS {
            assert_eq!(reason_of(down.clone(), request(METHOD)).await, Err(Reason::Overloaded));
        }
        let retries = attempts.load(Ordering::Relaxed) - CALLS;
        assert!((CALLS / 10..=CALLS / 10 + 10).contains(&retries), "{retries} retries");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_to_be_done_once_is_not_tried_again() {
        let calls = Arc::new(AtomicUsize::new(0));
        let down = client(handler(refusing(Reason::DependencyDown, &calls)), ClientConfig::default());
        let mut once = request(METHOD);
        once.extensions_mut().insert(Once);
        assert_eq!(reason_of(down, once).await, Err(Reason::DependencyDown));
        assert_eq!(calls.load(Ordering::Relaxed), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn only_what_may_be_over_in_a_moment_is_tried_again() {
        for (reason, expected) in [
            (Reason::Overloaded, 3),
            (Reason::DependencyDown, 3),
            // Lasts longer than a retry waits; the hint is for the buyer.
            (Reason::StockRebuilding, 1),
            (Reason::SoldOut, 1),
            (Reason::AllHeld, 1),
            (Reason::Internal, 1),
        ] {
            let attempts = Arc::new(AtomicUsize::new(0));
            let client = client(handler(refusing(reason, &attempts)), ClientConfig::default());
            assert_eq!(reason_of(client, request(METHOD)).await, Err(reason));
            assert_eq!(attempts.load(Ordering::Relaxed), expected, "{reason:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn pushback_is_honoured_and_minus_one_means_never() {
        for (pushback, expected, at_least) in [("-1", 1, 0), ("200", 3, 400), ("60000", 1, 0)] {
            let attempts = Arc::new(AtomicUsize::new(0));
            let counted = attempts.clone();
            let pushing = handler(move |_| {
                counted.fetch_add(1, Ordering::Relaxed);
                let mut answer: Response<Body> = Status::unavailable("not now").into_http();
                answer.headers_mut().insert(proto::error::RETRY_PUSHBACK, pushback.parse().unwrap());
                async { Ok(answer) }
            });
            let started = Instant::now();
            let answer = reason_of(client(pushing, ClientConfig::default()), request(METHOD)).await;
            assert_eq!(answer, Err(Reason::DependencyDown));
            assert_eq!(attempts.load(Ordering::Relaxed), expected, "{pushback}");
            assert!(started.elapsed() >= Duration::from_millis(at_least), "{pushback}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_broken_transport_is_tried_again_with_the_same_body() {
        use http_body_util::{BodyExt, Full};
        let attempts = Arc::new(AtomicUsize::new(0));
        let counted = attempts.clone();
        let flaky = service_fn(move |request: Request<Body>| {
            let attempt = counted.fetch_add(1, Ordering::Relaxed);
            async move {
                let body = request.into_body().collect().await.unwrap().to_bytes();
                assert_eq!(&body[..], b"the same");
                if attempt == 0 { Err(std::io::Error::other("pipe broke")) } else { Ok(Response::new(Body::empty())) }
            }
        });
        let request = Request::post(METHOD).body(Body::new(Full::from("the same"))).unwrap();
        assert_eq!(reason_of(client(flaky, ClientConfig::default()), request).await, Ok(()));
        assert_eq!(attempts.load(Ordering::Relaxed), 2);
    }

    #[tokio::test]
    async fn client_and_server_spans_are_one_trace() {
        let spans = kept::Spans::default();
        let _tracing = kept::tracing_into(&spans);
        let seen = Arc::new(std::sync::Mutex::new(None));
        let noted = seen.clone();
        let work = handler(move |request: Request<Body>| {
            *noted.lock().unwrap() = request.headers().get("traceparent").cloned();
            async { Ok(refuse(proto::Error::not_found("thing"))) }
        });
        let direct = client(server(work, ServerConfig::default()), ClientConfig::default());
        assert_eq!(reason_of(direct, request(METHOD)).await, Err(Reason::NotFound));
        let [server, client] = &spans.named("test.Things/Do")[..] else { panic!("two spans: {spans:?}") };
        assert_eq!(server.parent_span_id, client.span_context.span_id());
        assert_eq!(server.span_context.trace_id(), client.span_context.trace_id());
        let header = seen.lock().unwrap().clone().unwrap();
        assert!(header.to_str().unwrap().contains(&client.span_context.span_id().to_string()));
        for span in [server, client] {
            let code = span.attributes.iter().find(|a| a.key.as_str() == "rpc.grpc.status_code").unwrap();
            assert_eq!(code.value, opentelemetry::Value::I64(5));
        }
    }

    #[tokio::test]
    async fn calls_are_counted_once_by_side_method_and_code() {
        let work = handler(|_| async { ok() });
        let direct = client(server(work, ServerConfig::default()), ClientConfig::default());
        reason_of(direct, request("/test.Counted/Do")).await.unwrap();
        let text = crate::telemetry::prometheus().render();
        for side in ["client", "server"] {
            let line = format!("seckill_rpc_total{{side=\"{side}\",method=\"test.Counted/Do\",code=\"OK\"}} 1");
            assert!(text.contains(&line), "{line} is not in\n{text}");
            let line = format!("seckill_rpc_seconds_count{{side=\"{side}\",method=\"test.Counted/Do\"}} 1");
            assert!(text.contains(&line), "{line} is not in\n{text}");
        }
    }
}

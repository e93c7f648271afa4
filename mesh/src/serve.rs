//! Serving HTTP/1.1 and HTTP/2 cleartext on one bound listener, with a graceful end.
//!
//! The limits between peers are set on purpose: clients that time out send stream resets, and hyper answers too many
//! of them with GOAWAY, which would kill every call on the connection.

use std::{
    convert::Infallible,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures::FutureExt;
use http::{HeaderValue, header};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{conn::auto, graceful::GracefulShutdown},
    service::TowerToHyperService,
};
use pin_project_lite::pin_project;
use tokio::net::{TcpListener, TcpStream};
use tower::Service;

use crate::lifecycle::Lifecycle;

/// Calls in flight on one HTTP/2 connection. Our own links multiplex a whole process over one.
const MAX_STREAMS: u32 = 10_000;
/// Resets that a connection may send before it is cut.
const MAX_RESETS: usize = 10_000;
/// What may be on its way on one connection. Also decides how many small, unread DATA frames the peer may send before
/// h2 answers with GOAWAY: every unary gRPC request is one, so the default of 64 KiB (and the adaptive window, which
/// begins with it) would cut a connection on which a crowd calls at once.
pub const CONNECTION_WINDOW: u32 = 16 * 1024 * 1024;
/// What may be on its way for one call.
pub const STREAM_WINDOW: u32 = 1024 * 1024;
/// A client that does not finish its headers is not a client.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// The longest line before a listener: tokio's.
const BACKLOG: usize = 1024;
/// For so long after the soft stop connections are still accepted and requests read. A client that has connected, or that
/// sends on a connection just now, would otherwise have it reset. What a balancer needs to forget us is its own matter.
const LAME_DUCK: Duration = Duration::from_millis(500);

/// Binds a listener, naming the address in the error.
pub async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|e| anyhow::anyhow!("cannot listen on {address}: {e}"))
}

/// Serves until a moment after the soft stop, in which HTTP/1 answers ask their clients to come on another connection;
/// then accepts nothing more and lets every connection finish its calls.
pub fn serve<S, B>(name: &'static str, listener: TcpListener, service: S, life: &Lifecycle)
where
    S: Service<http::Request<hyper::body::Incoming>, Response = http::Response<B>, Error = Infallible>
        + Clone
        + Send
        + 'static,
    S::Future: Send + 'static,
    B: http_body::Body<Data = bytes::Bytes> + Send + 'static,
    B::Error: Into<crate::link::BoxError>,
{
    let stopping = life.clone();
    life.spawn_essential(name, async move {
        let mut builder = auto::Builder::new(TokioExecutor::new());
        builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
        builder
            .http2()
            .timer(TokioTimer::new())
            .max_concurrent_streams(MAX_STREAMS)
            .max_pending_accept_reset_streams(MAX_RESETS)
            .max_local_error_reset_streams(MAX_RESETS)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .initial_stream_window_size(STREAM_WINDOW)
            .keep_alive_interval(Duration::from_secs(20));
        let graceful = GracefulShutdown::new();
        let farewell = async {
            stopping.stopping().await;
            tokio::time::sleep(LAME_DUCK).await;
        };
        tokio::pin!(farewell);
        let (to_all, life) = (&graceful, &stopping);
        let shared = Arc::new(life.clone());
        let welcome = move |stream: TcpStream| {
            // Only costs latency when it fails.
            let _ = stream.set_nodelay(true);
            let service = TowerToHyperService::new(Farewell { inner: service.clone(), life: shared.clone() });
            let connection = to_all.watch(builder.serve_connection(TokioIo::new(stream), service).into_owned());
            life.spawn(async move {
                if let Err(error) = connection.await {
                    tracing::debug!(error, "connection ended");
                }
            });
        };
        loop {
            let accepted = tokio::select! {
                biased;
                () = &mut farewell => break,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, _)) => welcome(stream),
                Err(error) => {
                    // Out of descriptors, mostly: wait for some to be closed rather than spin.
                    tracing::warn!(%error, "accept failed");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
        // Who stands in line already is served, too.
        for _ in 0..BACKLOG {
            let Some(Ok((stream, _))) = listener.accept().now_or_never() else { break };
            welcome(stream);
        }
        drop(listener);
        graceful.shutdown().await;
    });
}

/// Tells HTTP/1 clients in the last moment that this connection is over; HTTP/2 has a frame for it.
#[derive(Clone)]
struct Farewell<S> {
    inner: S,
    /// Shared, since cloning a life takes a lock, and this is cloned for every request.
    life: Arc<Lifecycle>,
}

impl<S, R, B> Service<http::Request<R>> for Farewell<S>
where
    S: Service<http::Request<R>, Response = http::Response<B>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Parting<S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<R>) -> Self::Future {
        let life = (request.version() <= http::Version::HTTP_11).then(|| self.life.clone());
        Parting { answer: self.inner.call(request), life }
    }
}

pin_project! {
    /// An answer on its way out.
    struct Parting<F> {
        #[pin]
        answer: F,
        // Where a last word is to be said.
        life: Option<Arc<Lifecycle>>,
    }
}

impl<F, B, E> Future for Parting<F>
where
    F: Future<Output = Result<http::Response<B>, E>>,
{
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let mut answer = ready!(this.answer.poll(context))?;
        if this.life.as_ref().is_some_and(|life| life.is_stopping()) {
            answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        Poll::Ready(Ok(answer))
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use http_body_util::Full;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    async fn ask(wire: &mut TcpStream) -> String {
        wire.write_all(b"GET / HTTP/1.1\r\nhost: shop\r\n\r\n").await.unwrap();
        let mut answer = vec![0; 4096];
        let length = wire.read(&mut answer).await.unwrap();
        String::from_utf8_lossy(&answer[..length]).to_lowercase()
    }

    /// E16: a rolling restart resets nobody who has just connected, or is about to ask.
    #[tokio::test]
    async fn e16_who_comes_in_the_last_moment_is_answered_and_sent_elsewhere() {
        let life = Lifecycle::new();
        let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let answer =
            tower::service_fn(async |_| Ok::<_, Infallible>(http::Response::new(Full::new(Bytes::from("yes")))));
        serve("door", listener, answer, &life);
        let mut known = TcpStream::connect(address).await.unwrap();
        let first = ask(&mut known).await;
        assert!(first.starts_with("http/1.1 200") && !first.contains("connection: close"), "{first}");
        let ended = tokio::spawn({
            let life = life.clone();
            async move { life.stop(Duration::from_secs(10)).await }
        });
        life.stopping().await;
        let mut late = TcpStream::connect(address).await.unwrap();
        for wire in [&mut known, &mut late] {
            let last = ask(wire).await;
            assert!(last.starts_with("http/1.1 200") && last.contains("connection: close"), "{last}");
        }
        assert!(ended.await.unwrap(), "everybody went by himself");
        assert!(TcpStream::connect(address).await.is_err(), "the door is closed then");
    }
}

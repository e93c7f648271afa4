//! Serving HTTP/1.1 and HTTP/2 cleartext on one bound listener, with a graceful end.
//!
//! The limits between peers are set on purpose: clients that time out send stream resets, and hyper answers too many
//! of them with GOAWAY, which would kill every call on the connection.

use std::{convert::Infallible, net::SocketAddr, time::Duration};

use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{conn::auto, graceful::GracefulShutdown},
    service::TowerToHyperService,
};
use tokio::net::TcpListener;
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

/// Binds a listener, naming the address in the error.
pub async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|e| anyhow::anyhow!("cannot listen on {address}: {e}"))
}

/// Serves until the soft stop; then accepts nothing more and lets every connection finish its calls.
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
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = stopping.stopping() => break,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors, mostly: wait for some to be closed rather than spin.
                    tracing::warn!(%error, "accept failed");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            // Only costs latency when it fails.
            let _ = stream.set_nodelay(true);
            let connection =
                builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(service.clone())).into_owned();
            let connection = graceful.watch(connection);
            stopping.spawn(async move {
                if let Err(error) = connection.await {
                    tracing::debug!(error, "connection ended");
                }
            });
        }
        drop(listener);
        graceful.shutdown().await;
    });
}

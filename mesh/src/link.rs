//! One client transport for a service in this process and for one across the network.
//!
//! A tonic server value is a tower service, and a tonic client takes one: [`Link`] erases which it is, so that both
//! wirings share every client type, every layer and every test. What a direct link skips (deadlines, shedding) is in
//! [`crate::layers`], applied to both.

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tonic::{
    body::Body,
    transport::{Channel, Endpoint, Uri},
};
use tower::{Service, ServiceExt, util::BoxCloneSyncService};

use crate::{
    layers::{self, ClientConfig},
    serve,
};

/// Any error of a transport.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

type Erased = BoxCloneSyncService<http::Request<Body>, http::Response<Body>, BoxError>;

/// The transport that every client of ours is made with. Cheap to clone.
#[derive(Clone)]
pub struct Link(Erased);

impl Link {
    /// Straight into a server of this process. `server` has its own layers on.
    pub fn local<S>(server: S, config: ClientConfig) -> Self
    where
        S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>
            + Clone
            + Send
            + Sync
            + 'static,
        S::Future: Send + 'static,
    {
        let server = server.map_err(|never: Infallible| -> BoxError { match never {} });
        Self(BoxCloneSyncService::new(layers::client(server, config)))
    }

    /// Over HTTP/2 to one of these endpoints, balanced. Connects when it is first used, and again whenever it must.
    pub fn remote(endpoints: &[Uri], config: ClientConfig) -> Self {
        let endpoints = endpoints.iter().cloned().map(|uri| {
            Endpoint::from(uri)
                .connect_timeout(Duration::from_secs(2))
                .tcp_nodelay(true)
                .initial_connection_window_size(serve::CONNECTION_WINDOW)
                .initial_stream_window_size(serve::STREAM_WINDOW)
                .http2_keep_alive_interval(Duration::from_secs(10))
                .keep_alive_timeout(Duration::from_secs(5))
                .keep_alive_while_idle(true)
        });
        Self(BoxCloneSyncService::new(layers::client(Channel::balance_list(endpoints), config)))
    }
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Link")
    }
}

impl Service<http::Request<Body>> for Link {
    type Response = http::Response<Body>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<http::Response<Body>, BoxError>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        self.0.call(request)
    }
}

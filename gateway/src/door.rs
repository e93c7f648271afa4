//! The door: every request comes in here, and is shown its way.
//!
//! ```text
//!   gRPC ──┬──> PlaceOrder: the desk, then its rpc
//!          ├──> public rpcs
//!          └──> health, reflection
//!   HTTP ──┬──> the API's document, the webhook (axum)
//!          └──> JSON (transcode), a wish to buy by way of the desk
//! ```
//!
//! Only what is no rpc goes through axum's routing: in a rush nearly everything is a wish to buy and nearly all are in
//! vain, and routing one would cost more than refusing it.

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::{Router, body::Body, response::Response, routing};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, header};
use http_body_util::Full;
use mesh::{layers, link::BoxError};
use proto::{Error, Reason};
use tokio::time::timeout;
use tonic::service::Routes;
use tower::{Service, ServiceExt};

use crate::{
    failure,
    front::Front,
    quick,
    service::orders::Desk,
    transcode::{self, Transcoder},
    webhook::{self, Webhook},
};

/// The rpc that everybody calls at once.
const PLACE_ORDER: &str = "/seckill.v1.Orders/PlaceOrder";

/// Where the API's document is.
const DOCUMENT: &str = "/openapi.json";

/// Every public rpc with its layers on.
pub type Public = layers::Server<Front>;

/// Where requests go from the door.
pub struct Ways {
    /// HTTP/JSON.
    pub json: Arc<Transcoder<Public>>,
    /// gRPC.
    pub public: Public,
    /// Looks at wishes to buy.
    pub desk: Desk,
    /// How long a request's body may take to come.
    pub patience: Duration,
    /// Health and reflection.
    pub tools: Routes,
}

/// Answers every request that comes in. Serve it with [`mesh::serve`]. Cheap to clone.
#[derive(Clone)]
pub struct Door(Arc<Inner>);

struct Inner {
    ways: Ways,
    /// What is no rpc.
    others: Router,
}

impl Door {
    /// To these ways, to the API's document and to the webhook.
    pub fn new(ways: Ways, document: Bytes, webhook: Webhook) -> Self {
        let serve_document = move || {
            let document = document.clone();
            async move { ([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))], document) }
        };
        let others = Router::new()
            .route(DOCUMENT, routing::get(serve_document).fallback(only_get))
            .route(webhook::PATH, routing::post(webhook::receive).with_state(webhook).fallback(only_post));
        Self(Arc::new(Inner { ways, others }))
    }
}

impl std::fmt::Debug for Door {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Door")
    }
}

impl<B> Service<http::Request<B>> for Door
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Response;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let Self(door) = self.clone();
        // What is not on the crowd's way is in a box of its own, so that the crowd does not carry its future about.
        Box::pin(async move {
            if is_grpc(request.headers()) {
                return Ok(door.ways.grpc(request).await);
            }
            if matches!(request.uri().path(), DOCUMENT | webhook::PATH) {
                return Box::pin(door.others.clone().oneshot(request.map(Body::new))).await;
            }
            Ok(door.ways.json.answer(request).await)
        })
    }
}

impl Ways {
    async fn grpc<B>(&self, request: http::Request<B>) -> Response
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        let path = request.uri().path();
        let answered = if path == PLACE_ORDER {
            match self.looked_at(request).await {
                Ok(request) => Box::pin(self.public.clone().oneshot(request)).await,
                Err(refused) => return refused,
            }
        } else if path.starts_with("/seckill.v1.") {
            Box::pin(self.public.clone().oneshot(request.map(tonic::body::Body::new))).await
        } else {
            Box::pin(self.tools.clone().oneshot(request.map(tonic::body::Body::new))).await
        };
        answered.unwrap_or_else(|never| match never {}).map(Body::new)
    }

    /// A wish to buy that is not surely in vain, on its way to its rpc. The answer to one that is, or cannot be read.
    async fn looked_at<B>(&self, request: http::Request<B>) -> Result<http::Request<tonic::body::Body>, Response>
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        let (mut parts, body) = request.into_parts();
        let late = |_| Error::new(Reason::DeadlineExceeded, "the message took too long");
        let read = timeout(self.patience, transcode::read_any(&parts.headers, body)).await.map_err(late).flatten();
        let frame = read.map_err(|error| tonic::Status::from(error).into_http())?;
        if let Some(wish) = quick::read_frame(&frame) {
            let looked = self.desk.look(parts.headers.get(header::AUTHORIZATION), &wish);
            if let Some(caller) = looked.map_err(|refusal| refusal.grpc())? {
                parts.extensions.insert(caller);
            }
        }
        Ok(http::Request::from_parts(parts, tonic::body::Body::new(Full::new(frame))))
    }
}

fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(header::CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

async fn only_get() -> Response {
    failure::method_not_allowed(&[&Method::GET])
}

async fn only_post() -> Response {
    failure::method_not_allowed(&[&Method::POST])
}

//! What stands before the public rpcs, inside the mesh's layers: the deadline of each, and the transport's own refusals
//! in the words of the error table.

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use http::{Request, Response};
use mesh::layers::Deadline;
use proto::{Error, Reason};
use tonic::{Code, Status, body::Body, service::Routes};
use tower::{Service, ServiceExt};

use crate::{MAX_BODY, direct, service::orders::Orders};

/// The rpc whose deadline depends on its request, and which therefore keeps it itself.
const WAITS: &str = "/seckill.v1.Orders/GetOrder";

/// See the module.
#[derive(Clone)]
pub struct Front {
    rpcs: Routes,
    /// For [`direct`] calls.
    orders: Arc<Orders>,
    timeout: Duration,
}

impl Front {
    /// Before these rpcs; `orders` are among them.
    pub fn new(rpcs: Routes, orders: Arc<Orders>, timeout: Duration) -> Self {
        Self { rpcs, orders, timeout }
    }

    async fn call_rpc(self, mut request: Request<Body>) -> Result<Response<Body>, Infallible> {
        match direct::take(&mut request) {
            Some(message) => Ok(direct::call(&self.orders, message, request).await),
            // In a box, so that direct calls do not carry its future about.
            None => Box::pin(self.rpcs.oneshot(request)).await,
        }
    }
}

impl Service<Request<Body>> for Front {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let (front, timeout) = (self.clone(), self.timeout);
        Box::pin(async move {
            if request.uri().path() == WAITS {
                return front.call_rpc(request).await.map(in_our_words);
            }
            // The caller's own deadline is current already, and goes first when it is the shorter.
            let deadline = Deadline::after(timeout).min(Deadline::current().unwrap_or(Deadline::after(timeout)));
            match tokio::time::timeout_at(deadline.0, deadline.scope(front.call_rpc(request))).await {
                Ok(answer) => answer.map(in_our_words),
                Err(_) => Ok(Status::from(Error::new(Reason::DeadlineExceeded, "deadline exceeded")).into_http()),
            }
        })
    }
}

/// tonic refuses messages that are too large or no messages without our details, and under codes that mean
/// something else in the table.
fn in_our_words(answer: Response<Body>) -> Response<Body> {
    let Some(status) = answer.extensions().get::<Status>().filter(|s| s.details().is_empty()) else { return answer };
    let error = match status.code() {
        Code::OutOfRange => Error::new(Reason::BodyTooLarge, format!("a message has at most {MAX_BODY} bytes")),
        Code::Internal if status.message().starts_with("failed to decode Protobuf message") => {
            Error::invalid("message", status.message())
        }
        _ => return answer,
    };
    Status::from(error).into_http()
}

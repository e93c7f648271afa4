//! One attempt over the transport: tells the server what is left of the deadline, and turns failures into answers.

use std::{
    error::Error,
    task::{Context, Poll},
};

use http::{Request, Response};
use tonic::{Status, TimeoutExpired, body::Body};
use tower::Service;

use super::{Answering, Deadline, deadline, refuse, through};
use crate::link::BoxError;

/// See the module.
#[derive(Clone)]
pub(super) struct Attempt<S> {
    transport: S,
}

impl<S> Attempt<S> {
    pub(super) fn new(transport: S) -> Self {
        Self { transport }
    }
}

impl<S> Service<Request<Body>> for Attempt<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Clone + Send + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = std::convert::Infallible;
    type Future = Answering;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<Body>) -> Answering {
        if let Some(deadline) = request.extensions().get::<Deadline>().copied() {
            deadline::write(deadline.left(), request.headers_mut());
        }
        let transport = self.transport.clone();
        Box::pin(async move { Ok(through(transport, request).await.unwrap_or_else(|error| failed(error.into()))) })
    }
}

/// Whether the call took effect is not known. So the status carries none of our details: those say that a server of
/// ours has decided something.
fn failed(error: BoxError) -> Response<Body> {
    let mut text = error.to_string();
    let mut cause: Option<&(dyn Error + 'static)> = Some(error.as_ref());
    while let Some(error) = cause {
        // tonic's channel has its own timer for the header that we set; which of the two fires first is no difference.
        if error.is::<TimeoutExpired>() {
            return refuse(deadline::exceeded());
        }
        cause = error.source();
        if let Some(cause) = cause {
            text = format!("{text}: {cause}");
        }
    }
    Status::unavailable(text).into_http()
}

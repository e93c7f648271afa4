//! A stream of answers as server-sent events.
//!
//! `id:` is the message's etag, or a count that goes on from `Last-Event-ID`; `event:` is the message's type, `order` or
//! `sale`; `data:` is its JSON. The first event is always the whole current state, so that a client which reconnects
//! misses nothing whatever it saw last (E48). A failure is a last event `error` with the usual error body. Nothing is
//! buffered here: what the reader does not take stays in the rpc's stream, which cuts slow readers off.

use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use futures::stream;
use http::{HeaderMap, HeaderValue, Response, header};
use prost_reflect::{DynamicMessage, MessageDescriptor};
use proto::Error;
use tokio::time::{Instant, sleep_until};
use tonic::Streaming;

use crate::{failure, json};

/// Proxies close what is silent for longer, a minute mostly.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

struct Events {
    answers: Streaming<Bytes>,
    output: MessageDescriptor,
    /// `event:` of every answer.
    kind: String,
    count: u64,
    ended: bool,
}

/// The answers as an HTTP answer that goes on for as long as they do.
pub fn response(answers: Streaming<Bytes>, output: &MessageDescriptor, headers: &HeaderMap) -> Response<Body> {
    let last = headers.get("last-event-id").and_then(|id| id.to_str().ok()?.parse().ok()).unwrap_or(0);
    let events =
        Events { answers, kind: output.name().to_ascii_lowercase(), output: output.clone(), count: last, ended: false };
    let mut response = Response::new(Body::from_stream(stream::unfold(events, Events::next)));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

impl Events {
    async fn next(mut self) -> Option<(Result<Bytes, std::convert::Infallible>, Self)> {
        if self.ended {
            return None;
        }
        let text = tokio::select! {
            answer = self.answers.message() => match answer {
                Ok(Some(wire)) => self.event(wire).unwrap_or_else(|error| self.end(&error)),
                Ok(None) => return None,
                Err(status) => self.end(&status.into()),
            },
            () = sleep_until(Instant::now() + KEEP_ALIVE) => b": keep-alive\n\n".to_vec(),
        };
        Some((Ok(text.into()), self))
    }

    fn event(&mut self, wire: Bytes) -> Result<Vec<u8>, Error> {
        let message = json::read_wire(&self.output, wire)?;
        self.count = self.count.wrapping_add(1);
        let id = etag(&message).unwrap_or_else(|| self.count.to_string());
        let mut event = format!("id: {id}\nevent: {}\ndata: ", self.kind).into_bytes();
        event.extend(json::write(&message)?);
        event.extend(b"\n\n");
        Ok(event)
    }

    fn end(&mut self, error: &Error) -> Vec<u8> {
        self.ended = true;
        tracing::debug!(%error, "events ended");
        let mut event = b"event: error\ndata: ".to_vec();
        event.extend(failure::json(error));
        event.extend(b"\n\n");
        event
    }
}

fn etag(message: &DynamicMessage) -> Option<String> {
    // A line break would end the field and begin another.
    message.get_field_by_name("etag")?.as_str().map(|etag| etag.replace(['\r', '\n'], ""))
}

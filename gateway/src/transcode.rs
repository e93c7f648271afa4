//! HTTP/JSON as a transcoder: every request becomes a call of the very rpc that gRPC clients call.
//!
//! Nothing is decided here. Path variables, query parameters, the JSON body and the `Idempotency-Key` header become
//! the request message; the call goes through the same stack as any gRPC call (gate, deadline, identity, handler); its
//! answer becomes JSON, a stream of answers becomes server-sent events, its status becomes an error body.

use std::{
    future::poll_fn,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use axum::body::Body;
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header, request::Parts};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use metrics::{Counter, Histogram};
use percent_encoding::percent_decode_str;
use prost::Message;
use prost_reflect::{DynamicMessage, FieldDescriptor, Value};
use proto::{
    Error, Reason,
    v1::{OrderState, PlaceOrderRequest},
};
use tokio::time::timeout;
use tonic::{
    client::{Grpc, GrpcService},
    metadata::MetadataMap,
};

use crate::{
    MAX_BODY,
    contract::{Contract, Match, Route, Variables},
    direct, failure, json, quick,
    service::orders::Desk,
};

mod raw;
mod sse;

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// What a call takes along from the request's headers.
const FORWARDED: [HeaderName; 3] =
    [header::AUTHORIZATION, HeaderName::from_static("traceparent"), HeaderName::from_static("tracestate")];

/// Serves the contract's routes by calling `rpc`.
#[derive(Debug)]
pub struct Transcoder<S> {
    contract: Arc<Contract>,
    rpc: S,
    desk: Desk,
    /// How long a request's body may take to come. What comes after has its own deadline.
    patience: Duration,
    /// One a route, in the contract's order, and one for what is no route.
    counts: Vec<Counts>,
}

/// What is counted of one route. Looking a metric up by its labels costs more than counting.
#[derive(Debug)]
struct Counts {
    route: Arc<str>,
    seconds: Histogram,
    codes: [OnceLock<Counter>; CODES.len()],
}

/// The usual ones.
const CODES: [u16; 14] = [200, 202, 400, 401, 403, 404, 405, 413, 429, 499, 500, 501, 503, 504];

impl Counts {
    fn new(route: Arc<str>) -> Self {
        let seconds = metrics::histogram!("seckill_http_request_seconds", "route" => route.clone());
        Self { route, seconds, codes: Default::default() }
    }

    fn count(&self, code: u16) {
        let counter = || {
            let (route, code) = (self.route.clone(), code.to_string());
            metrics::counter!("seckill_http_requests_total", "route" => route, "code" => code)
        };
        match CODES.iter().position(|known| *known == code) {
            Some(place) => self.codes[place].get_or_init(counter).increment(1),
            None => counter().increment(1),
        }
    }
}

impl<S> Transcoder<S>
where
    S: GrpcService<tonic::body::Body> + Clone + Send + 'static,
    S::ResponseBody: http_body::Body<Data = Bytes> + Send + 'static,
    <S::ResponseBody as http_body::Body>::Error: Into<mesh::link::BoxError> + Send,
    S::Future: Send,
{
    /// Over these routes, calling this stack, once the desk has looked at a wish to buy. A body must have come after
    /// `patience`.
    pub fn new(contract: Arc<Contract>, rpc: S, desk: Desk, patience: Duration) -> Self {
        mesh::telemetry::prometheus();
        metrics::describe_counter!("seckill_http_requests_total", "HTTP requests answered, by route and status");
        metrics::describe_histogram!("seckill_http_request_seconds", "time until an HTTP answer began, in seconds");
        let routes = contract.routes().iter().map(|route| route.template.clone()).chain([OTHER.into()]);
        Self { counts: routes.map(Counts::new).collect(), contract, rpc, desk, patience }
    }

    /// Answers a request. Never fails: what goes wrong is an answer too.
    pub async fn answer<B>(&self, request: http::Request<B>) -> Response<Body>
    where
        B: http_body::Body<Data = Bytes>,
        B::Error: Into<mesh::link::BoxError>,
    {
        let started = Instant::now();
        let (parts, body) = request.into_parts();
        let other = self.contract.routes().len();
        let (route, answer) = match self.contract.find(&parts.method, parts.uri.path()) {
            Match::Route(index, variables) => {
                let answered = self.call(&self.contract.routes()[index], &variables, &parts, body).await;
                self.counts[index].seconds.record(started.elapsed());
                (index, answered.unwrap_or_else(|error| refused(&error)))
            }
            Match::Malformed(error) => (other, refused(&error)),
            Match::OtherMethods(allowed) => (other, failure::method_not_allowed(&allowed)),
            Match::Nothing => (other, failure::no_such_path()),
        };
        self.counts[route].count(answer.status().as_u16());
        answer
    }

    async fn call<B>(
        &self,
        route: &Route,
        variables: &Variables<'_>,
        parts: &Parts,
        body: B,
    ) -> Result<Response<Body>, Error>
    where
        B: http_body::Body<Data = Bytes>,
        B::Error: Into<mesh::link::BoxError>,
    {
        let body = if route.has_body { self.body(&parts.headers, body).await? } else { Bytes::new() };
        if route.accepts
            && parts.uri.query().is_none()
            && let Some(wish) = quick_wish(&parts.headers, &body)
        {
            let caller = match self.desk.look(parts.headers.get(header::AUTHORIZATION), &wish) {
                Ok(caller) => caller,
                Err(refusal) => return Ok(refusal.http()),
            };
            let mut call = call_of(&parts.headers, wish.encode_to_vec());
            if let Some(caller) = caller {
                call.extensions_mut().insert(caller);
            }
            // In a box, as below, so that whoever is refused does not carry the call's future about.
            return Box::pin(self.unary(route, call)).await;
        }
        Box::pin(self.call_generally(route, variables, parts, &body)).await
    }

    /// By the description of the rpc's messages, which knows every form and every mistake.
    async fn call_generally(
        &self,
        route: &Route,
        variables: &Variables<'_>,
        parts: &Parts,
        body: &[u8],
    ) -> Result<Response<Body>, Error> {
        let mut message = if route.has_body {
            json::read_body(&route.input, body)?
        } else {
            DynamicMessage::new(route.input.clone())
        };
        for (name, value) in pairs(parts.uri.query().unwrap_or_default())? {
            let Some(field) = route.query_field(&name) else {
                return Err(Error::invalid(name, "is not a known query parameter"));
            };
            if message.has_field(&field) {
                return Err(Error::invalid(field.name(), "is given twice"));
            }
            json::set_text(&mut message, &field, &value)?;
        }
        for (field, value) in variables {
            fill(&mut message, field, value, "the path")?;
        }
        if let Some(field) = &route.request_id
            && let Some(key) = parts.headers.get(IDEMPOTENCY_KEY)
        {
            let key = key.to_str().map_err(|_| Error::invalid(field.name(), "must be a UUID"))?;
            fill(&mut message, field, key, "the Idempotency-Key header")?;
        }

        let call = call_of(&parts.headers, message.encode_to_vec());
        if route.rpc.is_server_streaming() {
            let answers = self.grpc().await?.server_streaming(call, route.grpc_path.clone(), raw::RawCodec).await?;
            return Ok(sse::response(answers.into_inner(), &route.output, &parts.headers));
        }
        self.unary(route, call).await
    }

    /// A JSON body, which must come in time.
    async fn body<B>(&self, headers: &HeaderMap, body: B) -> Result<Bytes, Error>
    where
        B: http_body::Body<Data = Bytes>,
        B::Error: Into<mesh::link::BoxError>,
    {
        let late = |_| Error::new(Reason::DeadlineExceeded, "the body took too long");
        timeout(self.patience, read(headers, body)).await.map_err(late)?
    }

    async fn grpc(&self) -> Result<Grpc<S>, Error> {
        self.ready().await.map(Grpc::new)
    }

    async fn ready(&self) -> Result<S, Error> {
        let mut rpc = self.rpc.clone();
        let ready = poll_fn(|context| rpc.poll_ready(context)).await;
        ready.map_err(|error| Error::dependency("the gateway", error.into()))?;
        Ok(rpc)
    }

    async fn unary(&self, route: &Route, call: tonic::Request<Bytes>) -> Result<Response<Body>, Error> {
        let answer = if direct::has(route.grpc_path.path()) {
            let mut rpc = self.ready().await?;
            let answering = rpc.call(direct::request(route.grpc_path.clone(), call)).await;
            direct::answer(answering.map_err(|error| Error::dependency("the gateway", error.into()))?)?
        } else {
            self.grpc().await?.unary(call, route.grpc_path.clone(), raw::RawCodec).await?.into_inner()
        };
        let quick = route.answers_order.then(|| quick::write(&answer)).flatten();
        let (json, is_placed) = match quick {
            Some(written) => written,
            None => {
                let answer = json::read_wire(&route.output, answer)?;
                (json::write(&answer)?, is_placed(&answer))
            }
        };
        let mut response = Response::new(Body::from(json));
        // A new order that is accepted and not yet locked is 202; everything else that succeeds is 200.
        *response.status_mut() = if route.accepts && is_placed { StatusCode::ACCEPTED } else { StatusCode::OK };
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        Ok(response)
    }
}

/// The metrics' label for what is no route: callers choose paths, so paths are no labels.
const OTHER: &str = "other";

fn is_placed(answer: &DynamicMessage) -> bool {
    let placed = Value::EnumNumber(OrderState::Placed.into());
    answer.get_field_by_name("state").is_some_and(|state| *state == placed)
}

fn quick_wish(headers: &HeaderMap, body: &[u8]) -> Option<PlaceOrderRequest> {
    let key = match headers.get(IDEMPOTENCY_KEY) {
        Some(key) => Some(key.to_str().ok()?),
        None => None,
    };
    quick::read(body, key)
}

fn call_of(headers: &HeaderMap, message: Vec<u8>) -> tonic::Request<Bytes> {
    tonic::Request::from_parts(metadata(headers), Default::default(), message.into())
}

fn refused(error: &Error) -> Response<Body> {
    tracing::debug!(%error, "refused");
    failure::response(error)
}

fn metadata(headers: &HeaderMap) -> MetadataMap {
    let mut taken = HeaderMap::with_capacity(FORWARDED.len());
    for name in FORWARDED {
        if let Some(value) = headers.get(&name) {
            taken.insert(name, value.clone());
        }
    }
    MetadataMap::from_headers(taken)
}

/// Sets a field from somewhere that has the last word: what the body says of it must be the same, or nothing.
fn fill(message: &mut DynamicMessage, field: &FieldDescriptor, value: &str, source: &str) -> Result<(), Error> {
    if message.has_field(field) && message.get_field(field).as_str() != Some(value) {
        return Err(Error::invalid(field.name(), format!("differs from {source}")));
    }
    message.set_field(field, Value::String(value.to_owned()));
    Ok(())
}

/// Reads a JSON body of at most [`MAX_BODY`].
async fn read<B>(headers: &HeaderMap, body: B) -> Result<Bytes, Error>
where
    B: http_body::Body<Data = Bytes>,
    B::Error: Into<mesh::link::BoxError>,
{
    let body = read_any(headers, body).await?;
    let is_json = |kind: &HeaderValue| {
        let kind = kind.to_str().unwrap_or_default().split(';').next().unwrap_or_default().trim();
        // What curl -d says of itself when nobody tells it better. Tokens travel in a header that no form can set, so
        // taking it for JSON opens no door.
        ["application/json", "application/x-www-form-urlencoded"].iter().any(|known| kind.eq_ignore_ascii_case(known))
    };
    if !body.is_empty() && headers.get(header::CONTENT_TYPE).is_some_and(|kind| !is_json(kind)) {
        return Err(Error::invalid("content-type", "must be application/json"));
    }
    Ok(body)
}

/// Reads a body of at most [`MAX_BODY`], whatever it is.
pub async fn read_any<B>(headers: &HeaderMap, body: B) -> Result<Bytes, Error>
where
    B: http_body::Body<Data = Bytes>,
    B::Error: Into<mesh::link::BoxError>,
{
    let too_large = || Error::new(Reason::BodyTooLarge, format!("a body has at most {MAX_BODY} bytes"));
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|length| length > MAX_BODY as u64) {
        return Err(too_large());
    }
    match Limited::new(body, MAX_BODY).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(too_large()),
        Err(error) => Err(Error::invalid("body", "could not be read").with_context(error)),
    }
}

/// A query string's pairs, decoded.
fn pairs(query: &str) -> Result<Vec<(String, String)>, Error> {
    let decode = |text: &str| match percent_decode_str(&text.replace('+', " ")).decode_utf8() {
        Ok(text) => Ok(text.into_owned()),
        Err(_) => Err(Error::invalid("query", "must be UTF-8")),
    };
    let pair = |pair: &str| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        Ok((decode(name)?, decode(value)?))
    };
    query.split('&').filter(|p| !p.is_empty()).map(pair).collect()
}

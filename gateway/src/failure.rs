//! Errors as HTTP answers: the body of the public contract, and the headers that go with it.

use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use proto::{
    Error, Reason,
    error::{DOMAIN, RETRY_PUSHBACK, code_name},
};
use serde::Serialize;
use tonic::Status;

#[derive(Serialize)]
struct Envelope<'a> {
    error: Failure<'a>,
}

#[derive(Serialize)]
struct Failure<'a> {
    code: u16,
    status: &'static str,
    message: &'a str,
    details: Vec<Detail<'a>>,
}

/// The google.rpc details in their JSON form.
#[derive(Serialize)]
#[serde(tag = "@type", rename_all_fields = "camelCase")]
enum Detail<'a> {
    #[serde(rename = "type.googleapis.com/google.rpc.ErrorInfo")]
    ErrorInfo { reason: &'static str, domain: &'static str, metadata: &'a std::collections::BTreeMap<String, String> },
    #[serde(rename = "type.googleapis.com/google.rpc.RetryInfo")]
    RetryInfo { retry_delay: String },
    #[serde(rename = "type.googleapis.com/google.rpc.BadRequest")]
    BadRequest { field_violations: [Violation<'a>; 1] },
    #[serde(rename = "type.googleapis.com/google.rpc.QuotaFailure")]
    QuotaFailure { violations: [Quota<'a>; 1] },
}

#[derive(Serialize)]
struct Violation<'a> {
    field: &'a str,
    description: &'a str,
}

#[derive(Serialize)]
struct Quota<'a> {
    subject: &'static str,
    description: &'a str,
}

/// The answer for an error.
pub fn response(error: &Error) -> Response<Body> {
    with_code(error, error.reason.http_status())
}

/// A known path, asked with a method that it does not have.
pub fn method_not_allowed(allowed: &[&http::Method]) -> Response<Body> {
    let allowed: Vec<_> = allowed.iter().map(|method| method.as_str()).collect();
    let allowed = allowed.join(", ");
    let error = Error::new(Reason::NotFound, format!("this path is only there for {allowed}"));
    let mut response = with_code(&error, StatusCode::METHOD_NOT_ALLOWED);
    // Methods are tokens, and tokens are legal here.
    if let Ok(allowed) = HeaderValue::try_from(allowed) {
        response.headers_mut().insert(header::ALLOW, allowed);
    }
    response
}

/// No such path.
pub fn no_such_path() -> Response<Body> {
    response(&Error::new(Reason::NotFound, "there is nothing at this path"))
}

/// The body alone, for where headers have already gone out.
pub fn json(error: &Error) -> Vec<u8> {
    json_with_code(error, error.reason.http_status())
}

/// An error that a crowd is told: made an answer once, in both protocols.
#[derive(Debug)]
pub struct Prepared {
    error: Error,
    /// The HTTP answer's headers and body.
    headers: HeaderMap,
    json: Bytes,
    /// The gRPC answer, which is headers only.
    grpc: HeaderMap,
}

impl Prepared {
    /// Of this error.
    pub fn new(error: Error) -> Self {
        let (headers, json) = (headers(&error), json(&error).into());
        let grpc = Status::from(error.clone()).into_http::<()>().into_parts().0.headers;
        Self { error, headers, json, grpc }
    }

    /// What it is of.
    pub fn error(&self) -> &Error {
        &self.error
    }

    /// As an HTTP answer: what [`response`] makes of the error.
    pub fn http(&self) -> Response<Body> {
        assemble(self.error.reason.http_status(), self.headers.clone(), self.json.clone())
    }

    /// As a gRPC answer.
    pub fn grpc(&self) -> Response<Body> {
        let mut response = Response::new(Body::empty());
        *response.headers_mut() = self.grpc.clone();
        response
    }
}

fn with_code(error: &Error, code: StatusCode) -> Response<Body> {
    assemble(code, headers(error), json_with_code(error, code).into())
}

fn assemble(code: StatusCode, headers: HeaderMap, json: Bytes) -> Response<Body> {
    let mut response = Response::new(Body::from(json));
    *response.status_mut() = code;
    *response.headers_mut() = headers;
    response
}

fn headers(error: &Error) -> HeaderMap {
    let mut headers = HeaderMap::with_capacity(4);
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if let Some(after) = retry_after(error) {
        headers.insert(header::RETRY_AFTER, after);
    }
    if let Some(ms) = error.retry_pushback_ms() {
        headers.insert(RETRY_PUSHBACK, HeaderValue::from(ms));
    }
    if error.reason == Reason::Unauthenticated {
        headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    headers
}

fn json_with_code(error: &Error, code: StatusCode) -> Vec<u8> {
    let mut details =
        vec![Detail::ErrorInfo { reason: error.reason.as_str_name(), domain: DOMAIN, metadata: &error.metadata }];
    if let Some(after) = error.retry_after {
        details.push(Detail::RetryInfo { retry_delay: seconds(after) });
    }
    if let Some(field) = &error.field {
        details.push(Detail::BadRequest { field_violations: [Violation { field, description: &error.message }] });
    }
    if error.reason == Reason::RateLimited {
        details.push(Detail::QuotaFailure { violations: [Quota { subject: "requests", description: &error.message }] });
    }
    let failure =
        Failure { code: code.as_u16(), status: code_name(error.reason.code()), message: &error.message, details };
    serde_json::to_vec(&Envelope { error: failure }).expect("strings and numbers under string keys are JSON")
}

/// Whole seconds, rounded up, where the table of the contract says so.
fn retry_after(error: &Error) -> Option<HeaderValue> {
    use Reason::*;
    let said = matches!(error.reason, AllHeld | RateLimited | Overloaded | StockRebuilding | DependencyDown);
    let after = error.retry_after.filter(|_| said)?;
    Some(HeaderValue::from(after.as_millis().div_ceil(1000).max(1) as u64))
}

/// A duration in its JSON form, `0.5s`.
fn seconds(duration: Duration) -> String {
    let text = format!("{}.{:09}", duration.as_secs(), duration.subsec_nanos());
    format!("{}s", text.trim_end_matches('0').trim_end_matches('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_are_as_the_contract_says() {
        let text = |error: &Error| String::from_utf8(json(error)).unwrap();
        assert_eq!(
            text(&Error::new(Reason::AllHeld, "every unit is held")),
            concat!(
                r#"{"error":{"code":429,"status":"RESOURCE_EXHAUSTED","message":"every unit is held","details":["#,
                r#"{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":"ALL_HELD","domain":"seckill","metadata":{}},"#,
                r#"{"@type":"type.googleapis.com/google.rpc.RetryInfo","retryDelay":"0.5s"}]}}"#
            )
        );
        assert_eq!(
            text(&Error::invalid("quantity", "must be at least 1").with_context("secret")),
            concat!(
                r#"{"error":{"code":400,"status":"INVALID_ARGUMENT","message":"quantity: must be at least 1","details":["#,
                r#"{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":"INVALID_FIELD","domain":"seckill","metadata":{}},"#,
                r#"{"@type":"type.googleapis.com/google.rpc.BadRequest","fieldViolations":[{"field":"quantity","description":"quantity: must be at least 1"}]}]}}"#
            )
        );
        assert!(text(&Error::illegal_state("EXPIRED", "x")).contains(r#""metadata":{"state":"EXPIRED"}"#));
    }

    #[test]
    fn headers_say_when_to_try_again_and_when_never() {
        let of = |reason| {
            let response = response(&Error::new(reason, "x"));
            let header = |name: &str| response.headers().get(name).map(|v| v.to_str().unwrap().to_owned());
            (response.status().as_u16(), header("retry-after"), header(RETRY_PUSHBACK))
        };
        assert_eq!(of(Reason::SoldOut), (400, None, Some("-1".into())));
        assert_eq!(of(Reason::AllHeld), (429, Some("1".into()), None));
        assert_eq!(of(Reason::Overloaded), (503, Some("1".into()), Some("500".into())));
        assert_eq!(of(Reason::SaleNotStarted), (400, None, None));
        assert_eq!(of(Reason::BodyTooLarge), (413, None, None));
    }

    #[tokio::test]
    async fn what_a_crowd_is_told_is_what_each_would_be_told() {
        use http_body_util::BodyExt;
        for error in [Error::new(Reason::SoldOut, "sold out"), Error::new(Reason::AllHeld, "every unit is held")] {
            let (prepared, single) = (Prepared::new(error.clone()), response(&error));
            let told = prepared.http();
            assert_eq!((told.status(), told.headers()), (single.status(), single.headers()));
            let bytes = |response: Response<Body>| async { response.into_body().collect().await.unwrap().to_bytes() };
            assert_eq!(bytes(told).await, bytes(single).await);
            let single = Status::from(error).into_http::<()>();
            assert_eq!((prepared.grpc().status(), prepared.grpc().headers()), (single.status(), single.headers()));
        }
    }

    #[test]
    fn durations_are_short() {
        for (ms, text) in [(0, "0s"), (500, "0.5s"), (1000, "1s"), (10_000, "10s"), (1234, "1.234s")] {
            assert_eq!(seconds(Duration::from_millis(ms)), text);
        }
    }
}

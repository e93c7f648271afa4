//! The port for machines that watch: `/metrics`, `/livez`, `/readyz`, `/version`.
//!
//! A listener of its own, apart from the buyers' one, so that it answers while load is being shed (E50) and need not
//! be reachable from outside. It tells names of conditions and numbers, nothing about anybody's order.

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{readiness::Readiness, telemetry};

/// Serves until `stop` is cancelled, then finishes what is being answered.
pub async fn serve(listener: TcpListener, readiness: Readiness, stop: CancellationToken) -> std::io::Result<()> {
    axum::serve(listener, router(readiness)).with_graceful_shutdown(stop.cancelled_owned()).await
}

fn router(readiness: Readiness) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        // Alive as soon as it can answer at all: a dependency that is away must not get the process killed.
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .route("/version", get(version))
        .with_state(readiness)
}

async fn metrics() -> Response {
    let text = telemetry::prometheus().render();
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}

async fn readyz(State(readiness): State<Readiness>) -> Response {
    match readiness.ready() {
        Ok(()) => json(StatusCode::OK, &serde_json::json!({ "ready": true })),
        Err(unmet) => json(StatusCode::SERVICE_UNAVAILABLE, &serde_json::json!({ "ready": false, "notReady": unmet })),
    }
}

async fn version() -> Response {
    json(StatusCode::OK, &serde_json::json!({ "name": "seckill", "version": env!("CARGO_PKG_VERSION") }))
}

fn json(status: StatusCode, value: &serde_json::Value) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json")], format!("{value}\n")).into_response()
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;
    use tower::ServiceExt;

    use super::*;

    async fn ask(readiness: &Readiness, path: &str) -> (u16, String) {
        let request = http::Request::get(path).body(axum::body::Body::empty()).unwrap();
        let response = router(readiness.clone()).oneshot(request).await.unwrap();
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn readyz_lists_what_is_not_ready() {
        let readiness = Readiness::new();
        let bus = readiness.register("bus");
        assert_eq!(ask(&readiness, "/readyz").await, (503, "{\"notReady\":[\"bus\"],\"ready\":false}\n".to_owned()));
        assert_eq!(ask(&readiness, "/livez").await.0, 200);
        bus.set(true);
        assert_eq!(ask(&readiness, "/readyz").await.0, 200);
        assert!(ask(&readiness, "/version").await.1.contains("\"version\""));
    }

    #[tokio::test]
    async fn metrics_are_the_process_wide_ones() {
        telemetry::prometheus();
        metrics::histogram!("admin_test_seconds").record(0.003);
        let (status, text) = ask(&Readiness::new(), "/metrics").await;
        assert_eq!(status, 200);
        assert!(text.contains("admin_test_seconds_bucket{le=\"0.005\"} 1"), "{text}");
    }
}

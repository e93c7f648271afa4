//! A small HTTP/1.1 client with a fixed set of keep-alive connections: the buyers share them, as a shop's visitors
//! share a load balancer's. Cheap on purpose, because it runs on the same cores as what it measures.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::Context;
use bytes::Bytes;
use http::{HeaderValue, Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::{
    net::TcpStream,
    sync::{OwnedSemaphorePermit, Semaphore},
};

/// No answer within this is an answer: unknown.
const TIMEOUT: Duration = Duration::from_secs(15);

/// An answer.
#[derive(Debug)]
pub struct Answer {
    /// HTTP status.
    pub status: StatusCode,
    /// `Retry-After`, when the server gave one.
    pub retry_after: Option<Duration>,
    /// The body.
    pub body: Bytes,
}

/// What a buyer reads of an order.
#[derive(Debug, Default, Deserialize)]
pub struct OrderView<'a> {
    /// `orders/…`.
    #[serde(default)]
    pub name: &'a str,
    /// The state's name; empty where the answer is no order.
    #[serde(default)]
    pub state: &'a str,
}

impl Answer {
    /// The body as JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    /// The body as an order. Only what a buyer needs is read: the client shares its cores with what it measures.
    pub fn order(&self) -> OrderView<'_> {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    /// The reason of an error; the status where the body names none.
    pub fn reason(&self) -> String {
        let body = self.json();
        body["error"]["details"]
            .as_array()
            .and_then(|details| details.iter().find_map(|d| d["reason"].as_str()))
            .map_or_else(|| self.status.as_u16().to_string(), str::to_owned)
    }
}

/// The right to use one connection.
#[derive(Debug)]
pub struct Turn(#[expect(dead_code, reason = "held, not used")] OwnedSemaphorePermit);

/// A fixed number of connections to one gateway. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Client {
    authority: Arc<str>,
    host: HeaderValue,
    free: Arc<Semaphore>,
    idle: Arc<Mutex<Vec<SendRequest<Full<Bytes>>>>>,
}

impl Client {
    /// A client of `http://host:port` with at most this many connections.
    pub fn new(gateway: &http::Uri, connections: usize) -> anyhow::Result<Self> {
        let authority = gateway.authority().context("the gateway's URL names no host")?;
        let authority = match authority.port() {
            Some(_) => authority.to_string(),
            None => format!("{authority}:80"),
        };
        let host = HeaderValue::from_str(&authority).context("the gateway's host")?;
        Ok(Self {
            authority: authority.into(),
            host,
            free: Arc::new(Semaphore::new(connections)),
            idle: Arc::default(),
        })
    }

    /// Waits for a connection, first come first served. Its request goes to [`Self::send_in`].
    pub async fn turn(&self) -> anyhow::Result<Turn> {
        Ok(Turn(self.free.clone().acquire_owned().await.context("the client is closed")?))
    }

    /// Sends one request once there is a connection. An error means that the outcome is unknown.
    pub async fn send(
        &self,
        method: Method,
        path: &str,
        token: &HeaderValue,
        key: Option<&str>,
        body: Option<Bytes>,
    ) -> anyhow::Result<Answer> {
        let turn = self.turn().await?;
        self.send_in(turn, method, path, token, key, body).await
    }

    /// Sends one request, on a connection of its own for that long.
    pub async fn send_in(
        &self,
        _turn: Turn,
        method: Method,
        path: &str,
        token: &HeaderValue,
        key: Option<&str>,
        body: Option<Bytes>,
    ) -> anyhow::Result<Answer> {
        // Boxed: tens of thousands of buyers sleep or wait for a turn, and only a few hundred are ever down here.
        Box::pin(self.exchange(method, path, token, key, body)).await
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        token: &HeaderValue,
        key: Option<&str>,
        body: Option<Bytes>,
    ) -> anyhow::Result<Answer> {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, &self.host)
            .header(header::AUTHORIZATION, token);
        if let Some(key) = key {
            request = request.header("idempotency-key", key);
        }
        if body.is_some() {
            request = request.header(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        }
        let request = request.body(Full::new(body.unwrap_or_default()))?;
        let exchange = async {
            let mut connection = self.connection().await?;
            let answer = connection.send_request(request).await?;
            let (head, body) = answer.into_parts();
            let body = body.collect().await?.to_bytes();
            self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
            let retry_after = head.headers.get(header::RETRY_AFTER).and_then(|v| v.to_str().ok()?.parse().ok());
            anyhow::Ok(Answer { status: head.status, retry_after: retry_after.map(Duration::from_secs), body })
        };
        tokio::time::timeout(TIMEOUT, exchange).await.context("no answer in time")?
    }

    async fn connection(&self) -> anyhow::Result<SendRequest<Full<Bytes>>> {
        loop {
            let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let Some(mut idle) = idle else { break };
            if idle.ready().await.is_ok() {
                return Ok(idle);
            }
        }
        let stream = TcpStream::connect(&*self.authority).await?;
        stream.set_nodelay(true)?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // Ends when the sender is dropped; an error shows at the next request on it.
        tokio::spawn(async move {
            let _ = connection.await;
        });
        Ok(sender)
    }
}

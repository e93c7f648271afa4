//! A running gateway on a free port, with fakes behind it and clients before it.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use gateway::{Backends, Config};
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use mesh::{
    bus::{SharedBus, sqlite::SqliteBus},
    clock::Clock,
    identity::{Auth, Minter, Scopes, Secret},
    lifecycle::Lifecycle,
};
use prost::Message;
use proto::{
    BuyerId,
    internal::{OrdersChanged, SaleChanged},
    subjects::{ORDERS_CHANGED, SALES_CHANGED},
    v1::Order,
};
use serde_json::Value;
use tonic::transport::Channel;

use crate::fakes::Fakes;

/// See the module.
pub struct Door {
    pub address: SocketAddr,
    pub fakes: Arc<Fakes>,
    pub life: Lifecycle,
    bus: SharedBus,
    minter: Minter,
    http: Client<HttpConnector, Full<Bytes>>,
}

/// An answer over HTTP.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub text: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    /// HTTP status, reason and field at fault.
    pub fn refusal(&self) -> (u16, String, String) {
        let body = self.json();
        let details = body["error"]["details"].as_array().expect("an error has details");
        let find = |pointer: &str| details.iter().find_map(|d| d.pointer(pointer)?.as_str()).unwrap_or_default();
        (self.status.as_u16(), find("/reason").to_owned(), find("/fieldViolations/0/field").to_owned())
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

/// A request over HTTP, to be sent.
pub struct Ask<'a> {
    door: &'a Door,
    request: http::request::Builder,
    body: Bytes,
}

impl Ask<'_> {
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.request = self.request.header(name, value);
        self
    }

    pub fn token(self, token: &str) -> Self {
        self.header("authorization", &format!("Bearer {token}"))
    }

    /// As this buyer.
    pub fn buyer(self, name: &str) -> Self {
        let token = self.door.token(name, "buyer");
        self.token(&token)
    }

    pub fn operator(self) -> Self {
        let token = self.door.token("root", "operator");
        self.token(&token)
    }

    pub fn key(self, key: &str) -> Self {
        self.header("idempotency-key", key)
    }

    pub fn body(mut self, body: impl Into<Bytes>) -> Self {
        self.body = body.into();
        self
    }

    pub async fn response(self) -> http::Response<hyper::body::Incoming> {
        let request = self.request.body(Full::new(self.body)).unwrap();
        self.door.http.request(request).await.expect("the gateway answers")
    }

    pub async fn send(self) -> Answer {
        let (parts, body) = self.response().await.into_parts();
        let text = body.collect().await.expect("the body is whole").to_bytes();
        Answer { status: parts.status, headers: parts.headers, text: String::from_utf8(text.into()).unwrap() }
    }
}

impl Door {
    pub async fn open() -> Self {
        Self::with(Config::default()).await
    }

    pub async fn with(config: Config) -> Self {
        let (fakes, life) = (Arc::new(Fakes::default()), Lifecycle::new());
        let clock = Clock::system();
        let bus: SharedBus = Arc::new(SqliteBus::in_memory(clock.clone(), life.tasks()).await.unwrap());
        let auth = Auth::hs256(Secret::random());
        let link = fakes.link();
        let backends = Backends {
            bus: bus.clone(),
            clock: clock.clone(),
            verifier: auth.verifier(clock.clone()).await.unwrap(),
            stock: link.clone(),
            order: link.clone(),
            payment: link.clone(),
            coordinator: link,
        };
        let door = gateway::start(config, backends, &life).await.unwrap();
        let listener = mesh::serve::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.local_addr().unwrap();
        mesh::serve::serve("gateway", listener, door, &life);
        let minter = auth.minter(clock).expect("the secret is ours");
        let http = Client::builder(TokioExecutor::new()).build_http();
        Self { address, fakes, life, bus, minter, http }
    }

    pub fn token(&self, subject: &str, scopes: &str) -> String {
        let subject = BuyerId::parse(subject).unwrap();
        self.minter.mint(&subject, scopes.parse::<Scopes>().unwrap(), Duration::from_secs(60)).unwrap()
    }

    pub fn ask(&self, method: Method, path: &str) -> Ask<'_> {
        let uri = format!("http://{}{path}", self.address);
        Ask { door: self, request: Request::builder().method(method).uri(uri), body: Bytes::new() }
    }

    pub fn get(&self, path: &str) -> Ask<'_> {
        self.ask(Method::GET, path)
    }

    pub fn post(&self, path: &str, body: impl Into<Bytes>) -> Ask<'_> {
        self.ask(Method::POST, path).body(body)
    }

    /// Places one unit of the spring sale; the order's id.
    pub async fn place(&self, buyer: &str) -> String {
        let key = uuid::Uuid::new_v4().to_string();
        let answer = self.post("/v1/orders", r#"{"sale":"spring","quantity":1}"#).buyer(buyer).key(&key).send().await;
        assert_eq!(answer.status, 202, "{}", answer.text);
        answer.json()["name"].as_str().unwrap().strip_prefix("orders/").unwrap().to_owned()
    }

    pub async fn channel(&self) -> Channel {
        Channel::from_shared(format!("http://{}", self.address)).unwrap().connect().await.unwrap()
    }

    /// A gRPC request of this buyer.
    pub fn grpc<T>(&self, buyer: &str, message: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        let authorization = format!("Bearer {}", self.token(buyer, "buyer"));
        request.metadata_mut().insert("authorization", authorization.parse().unwrap());
        request
    }

    pub async fn signal_orders(&self, orders: impl IntoIterator<Item = Order>) {
        let changed = OrdersChanged { orders: orders.into_iter().collect() };
        self.bus.signal(ORDERS_CHANGED, changed.encode_to_vec().into()).await.unwrap();
    }

    pub async fn signal_sale(&self, changed: SaleChanged) {
        self.bus.signal(SALES_CHANGED, changed.encode_to_vec().into()).await.unwrap();
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.life.kill();
    }
}

/// Server-sent events as they come in.
pub struct Events {
    body: hyper::body::Incoming,
    text: String,
}

/// One event.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Event {
    pub id: String,
    pub kind: String,
    pub data: String,
}

impl Event {
    pub fn state(&self) -> String {
        let data: Value = serde_json::from_str(&self.data).unwrap();
        data["state"].as_str().unwrap_or_else(|| panic!("no state in {}", self.data)).to_owned()
    }
}

impl Events {
    pub async fn of(ask: Ask<'_>) -> Self {
        let response = ask.response().await;
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Self { body: response.into_body(), text: String::new() }
    }

    /// The next event; `None` at the end.
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some((event, rest)) = self.text.split_once("\n\n") {
                let field = |name: &str| {
                    let line = event.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
                    line.unwrap_or_default().to_owned()
                };
                let event = Event { id: field("id"), kind: field("event"), data: field("data") };
                self.text = rest.to_owned();
                if event == Event::default() {
                    continue; // a comment, to keep the connection alive
                }
                return Some(event);
            }
            let frame = self.body.frame().await?.expect("the stream goes on");
            self.text.push_str(std::str::from_utf8(frame.data_ref().unwrap()).unwrap());
        }
    }
}

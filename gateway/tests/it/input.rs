//! Bad input of any kind gets the error of the table and changes nothing.

use gateway::Config;
use http::Method;
use proto::v1::{GetOrderRequest, PlaceOrderRequest, orders_client::OrdersClient, sales_client::SalesClient};
use tonic::Code;

use crate::door::Door;

const KEY: &str = "f47ac10b-58cc-4372-a567-0e02b2c3d479";
const GOOD: &str = r#"{"sale":"spring","quantity":1}"#;

#[tokio::test]
async fn bad_orders_are_refused_by_field_and_nothing_is_asked_for() {
    let door = Door::open().await;
    for (body, field) in [
        (r#"{"sale":"spring","quantity":1,"coupon":"x"}"#, "coupon"),
        (r#"{"sale":"spring","quantity":"one"}"#, "quantity"),
        (r#"{"sale":"spring","quantity":[1]}"#, "quantity"),
        (r#"{"sale":"spring","quantity":1.5}"#, "quantity"),
        (r#"{"sale":"spring","quantity":0}"#, "quantity"),
        (r#"{"sale":"spring"}"#, "quantity"),
        (r#"{"sale":"spring","quantity":-1}"#, "quantity"),
        (r#"{"sale":"spring","quantity":1000001}"#, "quantity"),
        (r#"{"sale":"spring","quantity":"9223372036854775807"}"#, "quantity"),
        (r#"{"sale":"spring","quantity":9223372036854775808}"#, "quantity"),
        (r#"{"sale":7,"quantity":1}"#, "sale"),
        (r#"{"sale":"","quantity":1}"#, "sale"),
        (r#"{"quantity":1}"#, "sale"),
        (r#"{"sale":"Spring!","quantity":1}"#, "sale"),
        (r#"{"sale":"spring","quantity":1,"requestId":"11111111-58cc-4372-a567-0e02b2c3d479"}"#, "request_id"),
        (r#"["spring",1]"#, "body"),
        (r#"{"sale":"spring""#, "body"),
        ("", "sale"),
    ] {
        let answer = door.post("/v1/orders", body).buyer("alice").key(KEY).send().await;
        assert_eq!(answer.refusal(), (400, "INVALID_FIELD".to_owned(), field.to_owned()), "{body}: {}", answer.text);
    }
    let invalid_utf8 = b"{\"sale\":\"spr\xffng\",\"quantity\":1}".to_vec();
    let answer = door.post("/v1/orders", invalid_utf8).buyer("alice").key(KEY).send().await;
    assert_eq!(answer.refusal(), (400, "INVALID_FIELD".to_owned(), "body".to_owned()));

    for key in ["", "7", "f47ac10b-58cc-4372-a567-0e02b2c3d47", "00000000-0000-0000-0000-000000000000", "ü"] {
        let answer = door.post("/v1/orders", GOOD).buyer("alice").key(key).send().await;
        assert_eq!(answer.refusal(), (400, "INVALID_FIELD".to_owned(), "request_id".to_owned()), "{key:?}");
    }
    let answer = door.post("/v1/orders", GOOD).buyer("alice").send().await;
    assert_eq!(answer.refusal(), (400, "INVALID_FIELD".to_owned(), "request_id".to_owned()), "no key at all");

    let answer = door.post("/v1/orders", GOOD).buyer("alice").key(KEY).header("content-type", "text/xml").send().await;
    assert_eq!(answer.refusal(), (400, "INVALID_FIELD".to_owned(), "content-type".to_owned()));
    assert_eq!(door.fakes.effects(), 0);
}

#[tokio::test]
async fn bad_paths_queries_and_methods_are_refused() {
    let door = Door::open().await;
    for (method, path, expected) in [
        (Method::GET, "/v1/orders?page_size=ten", (400, "INVALID_FIELD", "page_size")),
        (Method::GET, "/v1/orders?pageSize=101", (400, "INVALID_FIELD", "page_size")),
        (Method::GET, "/v1/orders?pageSize=-1", (400, "INVALID_FIELD", "page_size")),
        (Method::GET, "/v1/orders?pageSize=1&page_size=2", (400, "INVALID_FIELD", "page_size")),
        (Method::GET, "/v1/orders?limit=1", (400, "INVALID_FIELD", "limit")),
        (Method::GET, "/v1/orders?sale=%ff", (400, "INVALID_FIELD", "query")),
        (Method::POST, "/v1/orders?quantity=1", (400, "INVALID_FIELD", "quantity")),
        (Method::GET, "/v1/orders/%ff", (400, "INVALID_FIELD", "order")),
        (Method::GET, "/v1/orders/00000000000000000000000000000000?wait=31s", (400, "INVALID_FIELD", "wait")),
        (Method::GET, "/v1/orders/00000000000000000000000000000000?wait=-1s", (400, "INVALID_FIELD", "wait")),
        (Method::GET, "/v1/orders/00000000000000000000000000000000?wait=2", (400, "INVALID_FIELD", "wait")),
        (Method::GET, "/v1/orders/00000000000000000000000000000000?order=1", (400, "INVALID_FIELD", "order")),
        (Method::GET, "/v1/sales/No%20Such", (400, "INVALID_FIELD", "sale")),
        (Method::GET, "/v1/sales/winter", (404, "NOT_FOUND", "")),
        (Method::GET, "/v1/orders/nonsense", (404, "NOT_FOUND", "")),
        (Method::GET, "/v1/nothing", (404, "NOT_FOUND", "")),
        (Method::GET, "/", (404, "NOT_FOUND", "")),
        (Method::DELETE, "/v1/orders", (405, "NOT_FOUND", "")),
        (Method::GET, "/v1/payments/webhook", (405, "NOT_FOUND", "")),
        (Method::POST, "/openapi.json", (405, "NOT_FOUND", "")),
    ] {
        let answer = door.ask(method.clone(), path).buyer("alice").send().await;
        let (code, reason, field) = answer.refusal();
        assert_eq!((code, reason.as_str(), field.as_str()), expected, "{method} {path}: {}", answer.text);
    }
    let answer = door.ask(Method::DELETE, "/v1/orders").send().await;
    assert_eq!(answer.header("allow"), Some("POST, GET"));
    let order = door.post("/v1/orders", r#"{"sale":"winter","quantity":1}"#).buyer("alice").key(KEY).send().await;
    assert_eq!(order.refusal().1, "NOT_FOUND", "an unknown sale");
}

/// Some databases have no place for a NUL: it must not look as if one were down.
#[tokio::test]
async fn what_operators_write_and_look_for_is_plain_text() {
    let door = Door::open().await;
    for (path, field) in [
        ("/v1/ops/sagas?pageToken=%00", "page_token"),
        ("/v1/ops/sagas?state=%00", "state"),
        ("/v1/ops/sagas/%00", "saga"),
        ("/v1/ops/deadLetters?pageToken=%00", "page_token"),
        ("/v1/ops/deadLetters/%00", "dead_letter"),
        ("/v1/ops/actions?pageToken=%00", "page_token"),
        ("/v1/ops/actions?target=%00", "target"),
    ] {
        let answer = door.get(path).operator().send().await;
        assert_eq!(answer.refusal(), (400, "INVALID_FIELD".to_owned(), field.to_owned()), "{path}: {}", answer.text);
    }
    let long = format!(r#"{{"reason":"{}"}}"#, "y".repeat(257));
    for (path, body, field) in [
        ("/v1/ops/sagas/f47ac10b58cc4372a5670e02b2c3d479:retry", r#"{"reason":"a\u0000b"}"#, "reason"),
        ("/v1/ops/sagas/%00:retry", "{}", "saga"),
        ("/v1/sales/spring:pause", r#"{"reason":"a\u0000b"}"#, "reason"),
        ("/v1/sales/spring:pause", &long, "reason"),
    ] {
        let answer = door.post(path, body.to_owned()).operator().send().await;
        assert_eq!(answer.refusal(), (400, "INVALID_FIELD".to_owned(), field.to_owned()), "{path}: {}", answer.text);
    }
    assert_eq!(door.fakes.effects(), 0);
}

#[tokio::test]
async fn bodies_that_are_too_large_are_refused_on_both_protocols() {
    let door = Door::open().await;
    let large = format!(r#"{{"sale":"{}","quantity":1}}"#, "s".repeat(64 * 1024));
    let answer = door.post("/v1/orders", large).buyer("alice").key(KEY).send().await;
    assert_eq!(answer.refusal(), (413, "BODY_TOO_LARGE".to_owned(), String::new()));
    assert_eq!(answer.json()["error"]["status"], "RESOURCE_EXHAUSTED");

    let large = PlaceOrderRequest { sale: "s".repeat(64 * 1024), quantity: 1, request_id: KEY.into() };
    let status = OrdersClient::new(door.channel().await).place_order(door.grpc("alice", large)).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert_eq!(proto::Error::from(status).reason, proto::Reason::BodyTooLarge);
    assert_eq!(door.fakes.effects(), 0);
}

#[tokio::test]
async fn grpc_messages_that_are_none_are_the_callers_fault() {
    /// Has the wire form of a PlaceOrderRequest whose sale is not text.
    #[derive(Clone, PartialEq, prost::Message)]
    struct NoText {
        #[prost(bytes = "vec", tag = "1")]
        sale: Vec<u8>,
    }
    let door = Door::open().await;
    let mut client = tonic::client::Grpc::new(door.channel().await);
    client.ready().await.unwrap();
    let request = door.grpc("alice", NoText { sale: vec![0xff, 0xfe] });
    let path = "/seckill.v1.Orders/PlaceOrder".parse().unwrap();
    let codec = tonic_prost::ProstCodec::<NoText, proto::v1::Order>::default();
    let status = client.unary(request, path, codec).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    assert_eq!(proto::Error::from(status).reason, proto::Reason::InvalidField);
}

#[tokio::test]
async fn tokens_that_are_missing_forged_expired_or_foreign_are_refused() {
    let door = Door::open().await;
    let other_door = Door::open().await;
    let good = door.token("alice", "buyer");
    let (head, rest) = good.split_once('.').unwrap();
    let signature = rest.split_once('.').unwrap().1;
    let operator = door.token("alice", "operator");
    let operators_claims = operator.split('.').nth(1).unwrap();
    let swapped = format!("{head}.{operators_claims}.{signature}");
    let foreign = other_door.token("alice", "buyer");

    let place = |authorization: Option<String>| {
        let ask = door.post("/v1/orders", GOOD).key(KEY);
        let ask = match &authorization {
            Some(authorization) => ask.header("authorization", authorization),
            None => ask,
        };
        ask.send()
    };
    for authorization in [
        None,
        Some(String::new()),
        Some("Bearer".to_owned()),
        Some("Bearer nonsense".to_owned()),
        Some(format!("Basic {good}")),
        Some(format!("Bearer {swapped}")),
        Some(format!("Bearer {foreign}")),
    ] {
        let answer = place(authorization.clone()).await;
        assert_eq!(answer.refusal(), (401, "UNAUTHENTICATED".to_owned(), String::new()), "{authorization:?}");
        assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
    }
    assert_eq!(place(Some(format!("Bearer {operator}"))).await.refusal().0, 403, "no buyer");
    assert_eq!(door.post("/v1/sales/spring:close", "").buyer("alice").send().await.refusal().0, 403, "no operator");
    assert_eq!(door.get("/v1/ops/sagas").buyer("alice").send().await.refusal().1, "PERMISSION_DENIED");
    assert_eq!(door.fakes.effects(), 0);

    // Anyone may look at sales; who shows a token must show a good one.
    assert_eq!(door.get("/v1/sales/spring").send().await.status, 200);
    assert_eq!(door.get("/v1/sales").send().await.status, 200);
    assert_eq!(door.get("/v1/sales/spring").token(&foreign).send().await.status, 401);

    let status = OrdersClient::new(door.channel().await).get_order(GetOrderRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
    let sale = proto::v1::GetSaleRequest { sale: "sales/spring".into() };
    assert_eq!(SalesClient::new(door.channel().await).get_sale(sale).await.unwrap().into_inner().title, "Spring");
}

#[tokio::test]
async fn errors_have_the_body_of_the_contract() {
    let door = Door::with(Config::default()).await;
    let answer = door.post("/v1/orders", r#"{"sale":"spring","quantity":0}"#).buyer("alice").key(KEY).send().await;
    assert_eq!(answer.header("content-type"), Some("application/json"));
    assert_eq!(
        answer.json(),
        serde_json::json!({ "error": {
            "code": 400,
            "status": "INVALID_ARGUMENT",
            "message": "quantity: must be from 1 to 1000000",
            "details": [
                {
                    "@type": "type.googleapis.com/google.rpc.ErrorInfo",
                    "reason": "INVALID_FIELD",
                    "domain": "seckill",
                    "metadata": {},
                },
                {
                    "@type": "type.googleapis.com/google.rpc.BadRequest",
                    "fieldViolations": [
                        { "field": "quantity", "description": "quantity: must be from 1 to 1000000" },
                    ],
                },
            ],
        } })
    );
}

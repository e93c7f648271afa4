//! The quick way for the one rpc that everybody calls at once: placing an order.
//!
//! It says what the general way says, to the byte: what it cannot read as plainly as nearly everybody writes it, it leaves
//! to the general way, which knows every form and every mistake. What it saves is the way itself: a request in vain is
//! refused from memory before it becomes a call, and one that goes on is neither read nor written by a description of its
//! fields found at run time.

use std::{borrow::Cow, fmt};

use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;
use proto::v1::{Order, OrderState, PlaceOrderRequest};
use serde::{
    Deserialize, Serialize,
    de::{Deserializer, Visitor},
};

/// A wish as the JSON body has it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Wish<'a> {
    #[serde(borrow)]
    sale: Cow<'a, str>,
    quantity: Count,
    #[serde(borrow, default, alias = "request_id")]
    request_id: Cow<'a, str>,
}

/// A number, or the text of one: proto3 JSON takes both for an int64.
struct Count(i64);

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Counts;

        impl Visitor<'_> for Counts {
            type Value = Count;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a whole number")
            }

            fn visit_i64<E>(self, value: i64) -> Result<Count, E> {
                Ok(Count(value))
            }

            fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<Count, E> {
                value.try_into().map(Count).map_err(E::custom)
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Count, E> {
                let value: i64 = text.parse().map_err(E::custom)?;
                // "+1" and "01" are for others to judge.
                if value.to_string() == text { Ok(Count(value)) } else { Err(E::custom("unusual")) }
            }
        }

        deserializer.deserialize_any(Counts)
    }
}

/// The request in a JSON body and its `Idempotency-Key`; `None` where the general way must look at it.
pub fn read(body: &[u8], key: Option<&str>) -> Option<PlaceOrderRequest> {
    // A list of values would do for serde, and is no message.
    if !body.trim_ascii_start().starts_with(b"{") {
        return None;
    }
    let wish: Wish<'_> = serde_json::from_slice(body).ok()?;
    let request_id = match (wish.request_id.as_ref(), key) {
        ("", Some(key)) => key.to_owned(),
        (_, None) => wish.request_id.into_owned(),
        // They may differ.
        (_, Some(_)) => return None,
    };
    Some(PlaceOrderRequest { sale: wish.sale.into_owned(), quantity: wish.quantity.0, request_id })
}

/// The request in the body of a unary gRPC call; `None` where the general way must look at it.
pub fn read_frame(frame: &Bytes) -> Option<PlaceOrderRequest> {
    let (head, message) = frame.split_at_checked(5)?;
    let length = u32::from_be_bytes(head[1..].try_into().ok()?);
    let is_plain = head[0] == 0 && usize::try_from(length).ok()? == message.len();
    is_plain.then(|| PlaceOrderRequest::decode(message).ok()).flatten()
}

/// An order in its JSON form, as [`crate::json::write`] writes it, and whether it is only placed; `None` where the general
/// way must write it.
pub fn write(wire: &Bytes) -> Option<(Vec<u8>, bool)> {
    let order = Order::decode(wire.clone()).ok()?;
    let state = OrderState::try_from(order.state).ok()?;
    let mut json = BytesMut::with_capacity(512).writer();
    let money = |money: &proto::WireMoney| Amount {
        currency_code: money.currency_code.clone(),
        units: money.units.to_string(),
        nanos: money.nanos,
    };
    let time = |time: &Option<prost_types::Timestamp>| time.as_ref().map(ToString::to_string);
    let written = Written {
        name: &order.name,
        sale: &order.sale,
        buyer: &order.buyer,
        quantity: order.quantity.to_string(),
        amount: order.amount.as_ref().map(money),
        state: state.as_str_name(),
        reject_reason: &order.reject_reason,
        create_time: time(&order.create_time),
        expire_time: time(&order.expire_time),
        pay_time: time(&order.pay_time),
        close_time: time(&order.close_time),
        etag: &order.etag,
    };
    serde_json::to_writer(&mut json, &written).ok()?;
    Some((json.into_inner().into(), state == OrderState::Placed))
}

/// In the order of the fields' numbers, with every field but messages that are not set.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Written<'a> {
    name: &'a str,
    sale: &'a str,
    buyer: &'a str,
    quantity: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    amount: Option<Amount>,
    state: &'static str,
    reject_reason: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    create_time: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expire_time: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pay_time: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    close_time: Option<String>,
    etag: &'a str,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Amount {
    currency_code: String,
    units: String,
    nanos: i32,
}

#[cfg(test)]
mod tests {
    use prost_reflect::{DescriptorPool, MessageDescriptor};
    use proto::{WireMoney, timestamp};

    use super::*;
    use crate::json;

    fn message(name: &str) -> MessageDescriptor {
        let pool = DescriptorPool::decode(proto::DESCRIPTORS).unwrap();
        pool.get_message_by_name(&format!("seckill.v1.{name}")).unwrap()
    }

    /// Whatever is read the quick way is what the general way reads.
    #[test]
    fn what_it_reads_is_what_the_general_way_reads() {
        let input = message("PlaceOrderRequest");
        let mut read_quickly = 0;
        for body in [
            r#"{"sale":"spring","quantity":1}"#,
            r#"{"sale":"sales/spring","quantity":"2"}"#,
            r#"{"quantity":-3,"sale":"\u0073pring \"x\"","requestId":"r"}"#,
            r#"{"quantity":9223372036854775807,"sale":"","request_id":"r"}"#,
            r#" { "sale" : "spring" , "quantity" : 1 } "#,
            r#"{"sale":"spring","quantity":1.0}"#,
            r#"{"sale":"spring","quantity":"1.0"}"#,
            r#"{"sale":"spring","quantity":1e0}"#,
            r#"{"sale":"spring","quantity":" 1"}"#,
            r#"{"sale":"spring","quantity":"+1"}"#,
            r#"{"sale":"spring","quantity":"01"}"#,
            r#"{"sale":"spring","quantity":null}"#,
            r#"{"sale":null,"quantity":1}"#,
            r#"{"sale":"spring"}"#,
            r#"{"sale":"spring","sale":"summer","quantity":1}"#,
            r#"{"sale":"spring","quantity":1,"color":"red"}"#,
            r#"{"sale":"spring","quantity":9223372036854775808}"#,
            r#"{"sale":"spring","quantity":1,"requestId":"a","request_id":"b"}"#,
            r#"{"sale":"spring","quantity":1} x"#,
            r#"["spring",1]"#,
            r#"["spring",1,"r"]"#,
            "",
        ] {
            let Some(quick) = read(body.as_bytes(), None) else { continue };
            read_quickly += 1;
            let general = json::read_body(&input, body.as_bytes()).unwrap_or_else(|error| panic!("{body}: {error}"));
            assert_eq!(quick.encode_to_vec(), general.encode_to_vec(), "{body}");
        }
        assert!(read_quickly >= 5, "{read_quickly}");
        let body = br#"{"sale":"spring","quantity":1}"#;
        assert_eq!(read(body, Some("key")).unwrap().request_id, "key");
        assert!(
            read(br#"{"sale":"spring","quantity":1,"requestId":"key"}"#, Some("key")).is_none(),
            "compared elsewhere"
        );
    }

    #[test]
    fn what_it_writes_is_what_the_general_way_writes() {
        let output = message("Order");
        let full = Order {
            name: "orders/1".into(),
            sale: "sales/spring".into(),
            buyer: "Ålice \"quoted\" \u{1}".into(),
            quantity: 2,
            amount: Some(WireMoney { currency_code: "EUR".into(), units: 39, nanos: 980_000_000 }),
            state: OrderState::Placed.into(),
            reject_reason: "SOLD_OUT".into(),
            create_time: Some(timestamp(1_750_000_000_000)),
            expire_time: Some(timestamp(1_750_000_000_120)),
            pay_time: Some(timestamp(1_750_000_000_123)),
            close_time: Some(prost_types::Timestamp { seconds: 1_750_000_000, nanos: 1_001 }),
            etag: "7".into(),
        };
        let paid = Order { state: OrderState::Paid.into(), close_time: None, ..full.clone() };
        for order in [full, paid, Order::default()] {
            let wire = Bytes::from(order.encode_to_vec());
            let general = json::write(&json::read_wire(&output, wire.clone()).unwrap()).unwrap();
            let (quick, is_placed) = write(&wire).unwrap();
            assert_eq!(String::from_utf8(quick).unwrap(), String::from_utf8(general).unwrap());
            assert_eq!(is_placed, order.state() == OrderState::Placed);
        }
        let unknown = Order { state: 99, ..Default::default() };
        assert!(write(&unknown.encode_to_vec().into()).is_none(), "a newer release's state is left to the general way");
    }

    #[test]
    fn a_frame_is_read_where_it_is_one_plain_message() {
        let request = PlaceOrderRequest { sale: "spring".into(), quantity: 1, request_id: "r".into() };
        let message = request.encode_to_vec();
        let frame = |flag: u8, length: u32| Bytes::from([&[flag][..], &length.to_be_bytes(), &message].concat());
        let length = message.len() as u32;
        assert_eq!(read_frame(&frame(0, length)), Some(request));
        for other in [frame(1, length), frame(0, length + 1), frame(0, length - 1), Bytes::new()] {
            assert_eq!(read_frame(&other), None);
        }
    }
}

//! Webhooks: their JSON, and the signature that says that they are the provider's and fresh (E27).
//!
//! `Seckill-Signature: t=<unix seconds>,v1=<hex HMAC-SHA256 of "<t>.<body>">`. The time is signed with the body, so
//! that an old webhook cannot be made young; it is good for [`TOLERANCE_S`] either way.

use hmac::{Hmac, Mac};
use proto::{Error, Money, OrderId, Reason, error::Result};
use serde::{Deserialize, Serialize};
use sha2::Sha256;

use super::WebhookEvent;
use crate::domain::Event;

/// Clocks that are apart and retries that took their time; longer would only help whoever recorded one.
pub const TOLERANCE_S: i64 = 300;

/// A webhook's body.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Body {
    /// `payment.captured`, `payment.declined`, `payment.cancelled` or `payment.refunded`.
    pub r#type: String,
    /// The idempotency key of the charge.
    pub payment_id: String,
    /// What it was for.
    pub order_id: String,
    /// How much.
    pub amount: BodyAmount,
    /// When it happened, RFC 3339. For people; nothing rests on it.
    pub time: String,
    /// Why, when declined.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decline_code: Option<String>,
}

/// google.type.Money in JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BodyAmount {
    /// ISO 4217.
    pub currency_code: String,
    /// Whole units, a string like every int64 in JSON.
    pub units: String,
    /// Billionths.
    #[serde(default)]
    pub nanos: i32,
}

/// Signs a body at this time.
pub fn sign(secret: &[u8], body: &[u8], now_s: i64) -> String {
    let hex: String = mac(secret, body, now_s).finalize().into_bytes().iter().map(|b| format!("{b:02x}")).collect();
    format!("t={now_s},v1={hex}")
}

/// Checks signature and time, and then reads the body.
pub fn verify(secret: &[u8], body: &[u8], signature: &str, now_s: i64) -> Result<WebhookEvent> {
    let (signed_s, code) = parse(signature).ok_or_else(|| unauthenticated("is malformed"))?;
    // In constant time: how much of a guess was right must not show.
    mac(secret, body, signed_s).verify_slice(&code).map_err(|_| unauthenticated("does not match"))?;
    if now_s.abs_diff(signed_s) > TOLERANCE_S.unsigned_abs() {
        return Err(unauthenticated("is stale"));
    }
    read(body)
}

fn read(body: &[u8]) -> Result<WebhookEvent> {
    let body: Body = serde_json::from_slice(body)
        .map_err(|e| Error::invalid("body", "is not the JSON of a payment's webhook").with_context(e))?;
    let units = body.amount.units.parse().map_err(|_| Error::invalid("amount.units", "must be a whole number"))?;
    let event = match body.r#type.as_str() {
        "payment.captured" => Event::Captured { reference: None },
        "payment.declined" => Event::Declined { code: body.decline_code.unwrap_or_else(|| "declined".to_owned()) },
        "payment.cancelled" => Event::Cancelled,
        "payment.refunded" => Event::Refunded,
        _ => return Err(Error::invalid("type", "must be payment.captured, declined, cancelled or refunded")),
    };
    Ok(WebhookEvent {
        payment_id: body.payment_id.parse()?,
        order_id: OrderId::parse("order_id", &body.order_id)?,
        amount: Money::from_parts("amount", &body.amount.currency_code, units, body.amount.nanos)?,
        event,
    })
}

fn mac(secret: &[u8], body: &[u8], signed_s: i64) -> Hmac<Sha256> {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret).expect("HMAC takes keys of any length");
    mac.update(signed_s.to_string().as_bytes());
    mac.update(b".");
    mac.update(body);
    mac
}

fn parse(signature: &str) -> Option<(i64, Vec<u8>)> {
    let (time, code) = signature.strip_prefix("t=")?.split_once(",v1=")?;
    // Digits only: "+5" and "05" would be signed as "5".
    let canonical = time.bytes().all(|b| b.is_ascii_digit()) && (time == "0" || !time.starts_with('0'));
    if !canonical || code.len() != 64 || !code.is_ascii() {
        return None;
    }
    let code = (0..32).map(|i| u8::from_str_radix(&code[2 * i..2 * i + 2], 16)).collect::<Result<_, _>>().ok()?;
    Some((time.parse().ok()?, code))
}

fn unauthenticated(why: &str) -> Error {
    Error::new(Reason::Unauthenticated, format!("the webhook's signature {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &[u8] = b"a secret of the tests";
    const NOW: i64 = 1_700_000_000;

    fn body() -> Vec<u8> {
        br#"{"type":"payment.captured","paymentId":"p-1","orderId":"0123456789abcdef0123456789abcdef",
            "amount":{"currencyCode":"EUR","units":"19","nanos":990000000},"time":"2023-11-14T22:13:20Z"}"#
            .to_vec()
    }

    #[test]
    fn a_signed_webhook_is_read_to_the_nano() {
        let event = verify(SECRET, &body(), &sign(SECRET, &body(), NOW), NOW).unwrap();
        assert_eq!(event.payment_id.as_str(), "p-1");
        assert_eq!(event.amount, Money::from_parts("amount", "EUR", 19, 990_000_000).unwrap());
        assert_eq!(event.event, Event::Captured { reference: None });
    }

    #[test]
    fn the_signature_is_the_documented_one() {
        // printf '5.{}' | openssl dgst -sha256 -hmac key
        let code = "9be615aec64f0d044b5ad6854ab1d893ec88617fb728d2149dcd3a3428e8c45d";
        assert_eq!(sign(b"key", b"{}", 5), format!("t=5,v1={code}"));
    }

    #[test]
    fn e27_bad_signatures_and_stale_times_are_refused() {
        let good = sign(SECRET, &body(), NOW);
        let refused = |body: &[u8], signature: &str, now| {
            let reason = verify(SECRET, body, signature, now).unwrap_err().reason;
            assert_eq!(reason, Reason::Unauthenticated, "{signature} at {now}");
        };
        refused(&body(), &sign(b"another secret", &body(), NOW), NOW);
        refused(b"{}", &good, NOW);
        refused(&body(), &good, NOW + TOLERANCE_S + 1);
        refused(&body(), &good, NOW - TOLERANCE_S - 1);
        refused(&body(), &good.replace("t=17", "t=18"), NOW + 100_000_000);
        for malformed in ["", "v1=00", "t=1", "t=x,v1=00", &good[..good.len() - 1], &good.replace("v1=", "v1=é")] {
            refused(&body(), malformed, NOW);
        }
        refused(&body(), &good.replace("t=", "t=+"), NOW);
        verify(SECRET, &body(), &good, NOW + TOLERANCE_S).unwrap();
    }

    #[test]
    fn a_signed_body_that_is_no_webhook_names_its_field() {
        let text = String::from_utf8(body()).unwrap();
        for (from, to, field) in [
            ("payment.captured", "payment.lost", "type"),
            ("p-1", "p 1", "payment_id"),
            ("\"19\"", "\"1.5\"", "amount.units"),
            ("EUR", "eur", "amount.currency_code"),
            ("990000000", "-1", "amount.nanos"),
            ("\"time\"", "\"tim\"", "body"),
        ] {
            let body = text.replace(from, to).into_bytes();
            let error = verify(SECRET, &body, &sign(SECRET, &body, NOW), NOW).unwrap_err();
            assert_eq!((error.reason, error.field.as_deref()), (Reason::InvalidField, Some(field)));
        }
    }
}

//! Ids as types, so that a buyer cannot be passed where an order is wanted, and checked once at the edge.

use std::{fmt, str::FromStr, sync::Arc};

use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::error::{Error, Result};

/// A sale's id: lower-case letters, digits and hyphens, 1 to 63, beginning with a letter or digit. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SaleId(Arc<str>);

impl SaleId {
    /// Reads the id, or the name `sales/{id}`. `field` is named in the error.
    pub fn parse(field: &str, text: &str) -> Result<Self> {
        let id = text.strip_prefix("sales/").unwrap_or(text);
        let starts_well = id.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
        let all_allowed = id.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        if id.is_empty() {
            Err(Error::invalid(field, "must be given"))
        } else if id.len() > 63 || !starts_well || !all_allowed {
            Err(Error::invalid(
                field,
                "must be 1 to 63 lower-case letters, digits and hyphens, not beginning with a hyphen",
            ))
        } else {
            Ok(Self(id.into()))
        }
    }

    /// A new id for a sale whose creator named none. The same request gives the same id.
    pub fn generate(request: &RequestId) -> Self {
        Self(format!("s-{}", request.0.simple()).into())
    }

    /// The resource name, `sales/{id}`.
    pub fn name(&self) -> String {
        format!("sales/{}", self.0)
    }

    /// The bare id.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SaleId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An order's id: 32 hexadecimal digits, derived from (buyer, request_id), so that a retry is the same order
/// everywhere, even after every cache forgot it (E2, E6).
///
/// Orders whose request ids are version 7 UUIDs of one moment have neighbouring ids ([`beside`]): every table has an
/// index by this id, and what comes together is then written together.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OrderId(Uuid);

impl OrderId {
    /// The one order that this buyer can mean by this request_id.
    pub fn derive(buyer: &BuyerId, request: &RequestId) -> Self {
        let id = derive("order", &[buyer.0.as_bytes(), request.0.as_bytes()]);
        Self(match moment(&request.0) {
            Some(moment) => beside(moment, id),
            None => id,
        })
    }

    /// A further id that belongs to this order, e.g. its refund or a late capture's hold: the same every time, a neighbour
    /// of the order's own, and never an order's own ([`Self::is_further`]).
    pub fn derive_for(&self, purpose: &str, key: &[u8]) -> Self {
        let [first, second, third, ..] = *self.0.as_bytes();
        let mut bytes = *beside([first, second, third], derive(purpose, &[self.0.as_bytes(), key])).as_bytes();
        bytes[8] |= FURTHER;
        Self(Uuid::from_bytes(bytes))
    }

    /// Whether it was derived for an order, and is no order's own.
    pub fn is_further(&self) -> bool {
        self.0.as_bytes()[8] & FURTHER == FURTHER
    }

    /// Reads the id, or the name `orders/{id}`. `field` is named in the error.
    pub fn parse(field: &str, text: &str) -> Result<Self> {
        let id = text.strip_prefix("orders/").unwrap_or(text);
        if id.is_empty() {
            return Err(Error::invalid(field, "must be given"));
        }
        let canonical = id.len() == 32 && id.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        match Uuid::try_parse(id) {
            Ok(uuid) if canonical => Ok(Self(uuid)),
            // Well-formed text that is nobody's id: an order that is not there, rather than a syntax lesson.
            _ => Err(Error::not_found("order")),
        }
    }

    /// The resource name, `orders/{id}`.
    pub fn name(&self) -> String {
        format!("orders/{self}")
    }
}

impl fmt::Display for OrderId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.simple().fmt(f)
    }
}

impl fmt::Debug for OrderId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.simple().fmt(f)
    }
}

impl FromStr for OrderId {
    type Err = Error;

    /// Reads an id that came from one of our own services.
    fn from_str(text: &str) -> Result<Self> {
        Self::parse("order", text)
    }
}

/// A buyer: the subject of its token. 1 to 128 bytes, no control characters. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BuyerId(Arc<str>);

impl BuyerId {
    /// Checks a token's subject.
    pub fn parse(text: &str) -> Result<Self> {
        if text.is_empty() || text.len() > 128 || text.chars().any(char::is_control) {
            return Err(Error::invalid("buyer", "must be 1 to 128 bytes without control characters"));
        }
        Ok(Self(text.into()))
    }

    /// The subject.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for BuyerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A client's idempotency key: any UUID but the nil one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RequestId(Uuid);

impl RequestId {
    /// Reads a UUID in its hyphenated or simple form. `field` is named in the error.
    pub fn parse(field: &str, text: &str) -> Result<Self> {
        if text.is_empty() {
            return Err(Error::invalid(field, "must be given: a UUID, over HTTP in the Idempotency-Key header"));
        }
        match Uuid::try_parse(text) {
            Ok(uuid) if !uuid.is_nil() && matches!(text.len(), 32 | 36) => Ok(Self(uuid)),
            _ => Err(Error::invalid(field, "must be a UUID")),
        }
    }

    /// A fresh one.
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }

    /// Its 16 bytes.
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

/// Half a SHA-256 over length-prefixed parts, in the layout of a version 8 UUID. Length prefixes keep ("ab", "c")
/// and ("a", "bc") apart: buyers choose both parts, and a collision would hand one buyer another's order.
fn derive(purpose: &str, parts: &[&[u8]]) -> Uuid {
    let mut hash = Sha256::new();
    for part in std::iter::once(&purpose.as_bytes()).chain(parts) {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hash.finalize()[..16]);
    uuid::Builder::from_custom_bytes(bytes).into_uuid()
}

/// In the ninth byte: the variant that no UUID has. Orders' own ids have the usual one, which begins with 10.
const FURTHER: u8 = 0b1110_0000;

/// The moment of a version 7 UUID, in steps of 64 ms; it comes again after twelve days. Coarse and short on purpose: a
/// batch of orders has one moment or two, and nearly all of an id stays hash.
fn moment(request: &Uuid) -> Option<[u8; 3]> {
    if request.get_version_num() != 7 {
        return None;
    }
    let [.., high, middle, low] = (request.as_u128() >> 80 >> 6).to_be_bytes();
    Some([high, middle, low])
}

/// The id among its neighbours. A hash alone would put the orders of one batch into as many pages of every index by the
/// order's id as there are orders, and each page is written for it, more than once.
fn beside(moment: [u8; 3], id: Uuid) -> Uuid {
    let mut bytes = *id.as_bytes();
    bytes[..3].copy_from_slice(&moment);
    Uuid::from_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_id_depends_on_buyer_and_request_only() {
        let alice = BuyerId::parse("alice").unwrap();
        let bob = BuyerId::parse("bob").unwrap();
        let request = RequestId::random();
        let id = OrderId::derive(&alice, &request);
        assert_eq!(id, OrderId::derive(&alice, &request), "E2");
        assert_ne!(id, OrderId::derive(&bob, &request), "E39");
        assert_eq!(OrderId::parse("order", &id.name()).unwrap(), id);
    }

    #[test]
    fn orders_of_one_moment_are_neighbours() {
        let of = |buyer: &str, request: &str| {
            OrderId::derive(&BuyerId::parse(buyer).unwrap(), &RequestId::parse("request_id", request).unwrap())
        };
        // The first 48 bits are milliseconds: the last two are 64 ms and an hour later.
        let alice = of("alice", "01890000-0000-7000-8000-000000000001");
        let bob = of("bob", "01890000-003f-7fff-8000-000000000002");
        let next = of("alice", "01890000-0040-7000-8000-000000000003");
        let later = of("alice", "01890036-ee80-7000-8000-000000000004");
        let moment = |id: &OrderId| id.0.as_bytes()[..3].to_vec();
        assert_eq!(moment(&alice), moment(&bob));
        assert_ne!(alice, bob);
        assert!(alice < next && bob < next && next < later);
        let refund = alice.derive_for("refund", b"1");
        assert_eq!(moment(&refund), moment(&alice));
        assert_ne!(refund, alice);
        assert!(refund.is_further() && !alice.is_further() && !bob.is_further());
        // The same digits in another version say nothing of time.
        assert_ne!(moment(&of("alice", "01890000-0000-4000-8000-000000000001")), moment(&alice));
    }

    #[test]
    fn malformed_ids_name_their_field() {
        for bad in ["", "Spring", "-a", "a_b", "a/b", &"a".repeat(64), "ä"] {
            assert_eq!(SaleId::parse("sale", bad).unwrap_err().field.as_deref(), Some("sale"), "{bad:?}");
        }
        for bad in ["", "1", "00000000-0000-0000-0000-000000000000", "{f47ac10b-58cc-4372-a567-0e02b2c3d479}"] {
            assert_eq!(RequestId::parse("request_id", bad).unwrap_err().field.as_deref(), Some("request_id"));
        }
    }
}

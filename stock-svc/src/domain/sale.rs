//! A sale: what its creator may ask for, and what it is at a moment.

use std::time::Duration;

use proto::{Error, Money, RequestId, SaleId, error::Result, timestamp, v1};

use super::{MAX_STOCK, ledger::Ledger, permits::Facts};

const MAX_TITLE: usize = 200;
const MAX_DESCRIPTION: usize = 4000;
const MAX_LIMIT: i64 = 1_000_000;
const DEFAULT_DURATION_MS: i64 = 30 * 24 * 3600 * 1000;
const WINDOW_MS: std::ops::RangeInclusive<i64> = 1000..=7 * 24 * 3600 * 1000;
const DEFAULT_WINDOW_MS: i64 = 900_000;
/// Beyond the last order's payment window: a retry still gets its grant back, and whoever waits for payment is known.
const LIVES_ON_MS: i64 = 24 * 3600 * 1000;

/// The operators' last word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Verb {
    /// Let the clock decide.
    Open,
    /// No new purchases for now.
    Paused,
    /// Over for good.
    Closed,
}

/// A sale without its stock, which is the ledger's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sale {
    /// Its id.
    pub id: SaleId,
    /// For show.
    pub title: String,
    /// For show.
    pub description: String,
    /// For show.
    pub list_price: Option<Money>,
    /// What one unit costs.
    pub price: Money,
    /// Units one buyer may hold or own (I7).
    pub limit: i64,
    /// Unix milliseconds.
    pub start_at: i64,
    /// Unix milliseconds; not sold at or after.
    pub end_at: i64,
    /// Milliseconds that a unit is held for payment.
    pub payment_window: i64,
    /// The operators' last word.
    pub verb: Verb,
    /// Grows with every verb and adjustment.
    pub version: i64,
    /// Unix milliseconds.
    pub create_at: i64,
    /// When it was closed by an operator, Unix milliseconds; 0 when it was not.
    pub close_at: i64,
}

/// What a creator asks for, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewSale {
    /// The sale.
    pub sale: Sale,
    /// Its units.
    pub stock: i64,
    /// Makes a retry the same request.
    pub request: RequestId,
}

impl Sale {
    /// What it is now.
    pub fn state(&self, now: i64) -> v1::SaleState {
        if self.verb == Verb::Closed || now >= self.end_at {
            v1::SaleState::Ended
        } else if now < self.start_at {
            v1::SaleState::Scheduled
        } else if self.verb == Verb::Paused {
            v1::SaleState::Paused
        } else {
            v1::SaleState::Open
        }
    }

    /// Whether permits are kept for it: until a day after the last of its orders must have been paid.
    pub fn is_live(&self, now: i64) -> bool {
        let end_at = if self.verb == Verb::Closed { self.end_at.min(self.close_at) } else { self.end_at };
        end_at + self.payment_window > now - LIVES_ON_MS
    }

    /// The oldest end that a live sale can have.
    pub fn live_since(now: i64) -> i64 {
        now - LIVES_ON_MS - WINDOW_MS.end()
    }

    /// What admission needs to know.
    pub fn facts(&self, ledger: &Ledger) -> Facts {
        Facts {
            version: self.version,
            verb: self.verb,
            start_at: self.start_at,
            end_at: self.end_at,
            limit: self.limit,
            total: ledger.total,
            sold: ledger.sold,
        }
    }

    /// Applies an operator's verb. True when it changed something.
    pub fn apply(&mut self, verb: Verb, now: i64) -> Result<bool> {
        if self.state(now) == v1::SaleState::Ended {
            // Closing what has ended says nothing new, and is no mistake.
            return if verb == Verb::Closed {
                Ok(false)
            } else {
                Err(Error::illegal_state("ENDED", "the sale has ended"))
            };
        }
        if self.verb == verb {
            return Ok(false);
        }
        self.verb = verb;
        self.version += 1;
        if verb == Verb::Closed {
            self.close_at = now;
        }
        Ok(true)
    }

    /// The public view.
    pub fn view(&self, total: i64, availability: v1::Availability, now: i64) -> v1::Sale {
        v1::Sale {
            name: self.id.name(),
            title: self.title.clone(),
            description: self.description.clone(),
            list_price: self.list_price.as_ref().map(Into::into),
            price: Some((&self.price).into()),
            stock: total,
            per_buyer_limit: self.limit,
            start_time: Some(timestamp(self.start_at)),
            end_time: Some(timestamp(self.end_at)),
            payment_window: Duration::from_millis(self.payment_window.unsigned_abs()).try_into().ok(),
            state: self.state(now).into(),
            availability: availability.into(),
            create_time: Some(timestamp(self.create_at)),
        }
    }
}

impl NewSale {
    /// Checks every field and names the one at fault.
    pub fn parse(request: &v1::CreateSaleRequest, now: i64) -> Result<Self> {
        let request_id = RequestId::parse("request_id", &request.request_id)?;
        let id = if request.sale_id.is_empty() {
            SaleId::generate(&request_id)
        } else {
            SaleId::parse("sale_id", &request.sale_id)?
        };
        check_text("title", &request.title, MAX_TITLE)?;
        check_text("description", &request.description, MAX_DESCRIPTION)?;
        let list_price = request.list_price.as_ref().map(|p| Money::parse("list_price", p)).transpose()?;
        let price = match &request.price {
            Some(price) => Money::parse("price", price)?,
            None => return Err(Error::invalid("price", "must be given")),
        };
        if price.is_zero() {
            return Err(Error::invalid("price", "must be above zero"));
        }
        if !(1..=MAX_STOCK).contains(&request.stock) {
            return Err(Error::invalid("stock", format!("must be from 1 to {MAX_STOCK}")));
        }
        let limit = match request.per_buyer_limit {
            0 => 1,
            limit if (1..=MAX_LIMIT).contains(&limit) => limit,
            _ => return Err(Error::invalid("per_buyer_limit", format!("must be from 1 to {MAX_LIMIT}"))),
        };
        let start_at = match &request.start_time {
            Some(time) => millis("start_time", time)?,
            None => now,
        };
        let end_at = match &request.end_time {
            Some(time) => millis("end_time", time)?,
            None => start_at + DEFAULT_DURATION_MS,
        };
        if end_at <= start_at {
            return Err(Error::invalid("end_time", "must be after the start"));
        }
        let payment_window = match &request.payment_window {
            Some(window) => window_millis(window)?,
            None => DEFAULT_WINDOW_MS,
        };
        let sale = Sale {
            id,
            title: request.title.clone(),
            description: request.description.clone(),
            list_price,
            price,
            limit,
            start_at,
            end_at,
            payment_window,
            verb: Verb::Open,
            version: 1,
            create_at: now,
            close_at: 0,
        };
        Ok(Self { sale, stock: request.stock, request: request_id })
    }
}

/// What buyers may hope for: `free` permits where they are known, otherwise what the ledger has.
pub fn availability(ledger: &Ledger, free: Option<i64>) -> v1::Availability {
    if free.unwrap_or(ledger.available) > 0 {
        v1::Availability::Available
    } else if ledger.sold == ledger.total {
        v1::Availability::SoldOut
    } else {
        v1::Availability::AllHeld
    }
}

fn check_text(field: &str, text: &str, max: usize) -> Result<()> {
    if text.chars().count() > max {
        return Err(Error::invalid(field, format!("must be at most {max} characters")));
    }
    // PostgreSQL cannot store it.
    if text.contains('\0') {
        return Err(Error::invalid(field, "must not contain NUL"));
    }
    Ok(())
}

/// From 1970 to 9999, as JSON's timestamps go.
fn millis(field: &str, time: &prost_types::Timestamp) -> Result<i64> {
    if !(0..=253_402_300_799).contains(&time.seconds) || !(0..1_000_000_000).contains(&time.nanos) {
        return Err(Error::invalid(field, "must be a time from 1970 to 9999"));
    }
    Ok(time.seconds * 1000 + i64::from(time.nanos / 1_000_000))
}

fn window_millis(window: &prost_types::Duration) -> Result<i64> {
    let millis = window.seconds.checked_mul(1000).map(|ms| ms.saturating_add(i64::from(window.nanos / 1_000_000)));
    match millis {
        Some(millis) if WINDOW_MS.contains(&millis) => Ok(millis),
        _ => Err(Error::invalid("payment_window", "must be from 1 s to 7 days")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> v1::CreateSaleRequest {
        v1::CreateSaleRequest {
            request_id: RequestId::random().to_string(),
            price: Some(proto::WireMoney { currency_code: "EUR".into(), units: 5, nanos: 0 }),
            stock: 10,
            ..Default::default()
        }
    }

    #[test]
    fn what_is_missing_gets_its_default() {
        let sale = NewSale::parse(&request(), 1000).unwrap().sale;
        assert_eq!((sale.limit, sale.start_at, sale.payment_window), (1, 1000, 900_000));
        assert_eq!(sale.end_at, 1000 + DEFAULT_DURATION_MS);
    }

    #[test]
    fn every_field_at_fault_is_named() {
        type Spoil = fn(&mut v1::CreateSaleRequest);
        let time = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
        let cases: Vec<(&str, Spoil)> = vec![
            ("request_id", |r| r.request_id = "x".into()),
            ("sale_id", |r| r.sale_id = "Not Good".into()),
            ("title", |r| r.title = "x".repeat(201)),
            ("title", |r| r.title = "\0".into()),
            ("description", |r| r.description = "x".repeat(4001)),
            ("price", |r| r.price = None),
            ("price", |r| r.price.as_mut().unwrap().units = 0),
            ("price.units", |r| r.price.as_mut().unwrap().units = -1),
            ("price.currency_code", |r| r.price.as_mut().unwrap().currency_code = "euro".into()),
            ("list_price.nanos", |r| {
                r.list_price = Some(proto::WireMoney { currency_code: "EUR".into(), units: 5, nanos: -1 });
            }),
            ("stock", |r| r.stock = 0),
            ("stock", |r| r.stock = MAX_STOCK + 1),
            ("per_buyer_limit", |r| r.per_buyer_limit = -1),
            ("payment_window", |r| r.payment_window = Some(prost_types::Duration { seconds: 0, nanos: 999_000_000 })),
            ("payment_window", |r| r.payment_window = Some(prost_types::Duration { seconds: i64::MAX, nanos: 0 })),
        ];
        for (field, spoil) in cases {
            let mut request = request();
            spoil(&mut request);
            assert_eq!(NewSale::parse(&request, 0).unwrap_err().field.as_deref(), Some(field));
        }
        let backwards = v1::CreateSaleRequest { start_time: time(10), end_time: time(10), ..request() };
        assert_eq!(NewSale::parse(&backwards, 0).unwrap_err().field.as_deref(), Some("end_time"));
        let ancient = v1::CreateSaleRequest { start_time: time(-1), ..request() };
        assert_eq!(NewSale::parse(&ancient, 0).unwrap_err().field.as_deref(), Some("start_time"));
    }

    #[test]
    fn the_state_follows_the_clock_and_the_verbs() {
        let mut sale = NewSale::parse(&request(), 1000).unwrap().sale;
        sale.end_at = 2000;
        assert_eq!(sale.state(999), v1::SaleState::Scheduled);
        assert_eq!(sale.state(1000), v1::SaleState::Open);
        assert_eq!(sale.state(2000), v1::SaleState::Ended);
        assert!(sale.apply(Verb::Paused, 1500).unwrap());
        assert!(!sale.apply(Verb::Paused, 1500).unwrap(), "repeating it changes nothing");
        assert_eq!(sale.state(1500), v1::SaleState::Paused);
        assert!(sale.apply(Verb::Closed, 1500).unwrap());
        assert!(sale.apply(Verb::Open, 1500).is_err());
        assert_eq!(sale.state(1500), v1::SaleState::Ended);
    }
}

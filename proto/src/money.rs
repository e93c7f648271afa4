//! Money: exact, one currency, never a float (E32).

use std::fmt;

use crate::{
    WireMoney,
    error::{Error, Result},
    internal::Amount,
};

const NANOS_PER_UNIT: i128 = 1_000_000_000;

/// An amount that is not negative, in one currency, in billionths of a unit.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Money {
    /// Three capital letters.
    currency: [u8; 3],
    nanos: i128,
}

impl fmt::Debug for Money {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}.{:09}", self.currency(), self.units(), self.nanos())
    }
}

impl Money {
    /// Checks an amount from outside. `field` is named in the error.
    pub fn parse(field: &str, wire: &WireMoney) -> Result<Self> {
        Self::from_parts(field, &wire.currency_code, wire.units, wire.nanos)
    }

    /// Checks an amount by its parts, from the wire or from a table. `field` is named in the error.
    pub fn from_parts(field: &str, currency: &str, units: i64, nanos: i32) -> Result<Self> {
        let letters = <[u8; 3]>::try_from(currency.as_bytes()).ok().filter(|c| c.iter().all(u8::is_ascii_uppercase));
        let Some(currency) = letters else {
            return Err(Error::invalid(format!("{field}.currency_code"), "must be three capital letters"));
        };
        if units < 0 {
            return Err(Error::invalid(format!("{field}.units"), "must not be negative"));
        }
        if !(0..1_000_000_000).contains(&nanos) {
            return Err(Error::invalid(format!("{field}.nanos"), "must be from 0 to 999999999"));
        }
        Ok(Self { currency, nanos: i128::from(units) * NANOS_PER_UNIT + i128::from(nanos) })
    }

    /// This much for each of `quantity` units. Refuses what would not fit the wire form.
    pub fn times(&self, quantity: i64) -> Result<Self> {
        let nanos = self.nanos.checked_mul(i128::from(quantity));
        match nanos {
            Some(nanos) if nanos >= 0 && nanos / NANOS_PER_UNIT <= i128::from(i64::MAX) => {
                Ok(Self { currency: self.currency, nanos })
            }
            _ => Err(Error::invalid("quantity", "makes the amount too large")),
        }
    }

    /// ISO 4217.
    pub fn currency(&self) -> &str {
        str::from_utf8(&self.currency).expect("it was made of letters")
    }

    /// Whole units.
    pub fn units(&self) -> i64 {
        // Fits: both constructors keep the whole part within i64.
        (self.nanos / NANOS_PER_UNIT) as i64
    }

    /// The fraction, in billionths.
    pub fn nanos(&self) -> i32 {
        (self.nanos % NANOS_PER_UNIT) as i32
    }

    /// Nothing at all.
    pub fn is_zero(&self) -> bool {
        self.nanos == 0
    }
}

impl From<&Money> for WireMoney {
    fn from(money: &Money) -> Self {
        Self { currency_code: money.currency().to_owned(), units: money.units(), nanos: money.nanos() }
    }
}

impl From<&Money> for Amount {
    fn from(money: &Money) -> Self {
        Self { currency: money.currency().to_owned(), units: money.units(), nanos: money.nanos() }
    }
}

impl TryFrom<&Amount> for Money {
    type Error = Error;

    fn try_from(amount: &Amount) -> Result<Self> {
        Self::from_parts("amount", &amount.currency, amount.units, amount.nanos)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e32_cents_are_never_truncated() {
        let price = Money::from_parts("price", "EUR", 19, 990_000_000).unwrap();
        let amount = price.times(3).unwrap();
        assert_eq!((amount.units(), amount.nanos()), (59, 970_000_000));
        assert!(price.times(i64::MAX).is_err());
        assert!(price.times(-1).is_err());
    }
}

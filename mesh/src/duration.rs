//! Durations as people write them on a command line.

use std::time::Duration;

/// Reads "250ms", "5s", "15m", "2h" or "7d".
pub fn parse(text: &str) -> Result<Duration, String> {
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or("wants a unit: ms, s, m, h or d")?;
    let (number, unit) = text.split_at(split);
    let number: f64 = number.parse().map_err(|_| format!("{number:?} is not a number"))?;
    let seconds = match unit {
        "ms" => number / 1000.0,
        "s" => number,
        "m" => number * 60.0,
        "h" => number * 3600.0,
        "d" => number * 86_400.0,
        _ => return Err(format!("{unit:?} is not a unit: ms, s, m, h or d")),
    };
    Duration::try_from_secs_f64(seconds).map_err(|e| e.to_string())
}

/// The same, for what must last a while: a timeout of nothing refuses every call.
pub fn parse_positive(text: &str) -> Result<Duration, String> {
    parse(text)
        .and_then(|duration| if duration.is_zero() { Err("must be above zero".to_owned()) } else { Ok(duration) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_as_people_write_them() {
        assert_eq!(parse("5s"), Ok(Duration::from_secs(5)));
        assert_eq!(parse("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(parse("1.5h"), Ok(Duration::from_secs(5400)));
        assert_eq!(parse("0s"), Ok(Duration::ZERO));
        for bad in ["", "5", "s", "5 parsecs", "-5s"] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
        assert!(parse_positive("0s").is_err());
    }
}

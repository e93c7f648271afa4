//! What the mesh is meant to reach, beside what a run has shown: ratios and bounds, so that a slower machine changes
//! nothing. A target that was not measured is not told.

use crate::{
    report::Report,
    scenario::{Figure, Scenario},
    site::Wiring,
};

/// One of them.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    /// What.
    pub name: String,
    /// What the run has shown.
    pub shown: f64,
    /// What it should be …
    pub wanted: f64,
    /// … at least, or at most.
    pub at_least: bool,
}

impl Target {
    /// Which way it is meant.
    pub fn bound(&self) -> &'static str {
        if self.at_least { "at least" } else { "at most" }
    }

    /// In a word.
    pub fn verdict(&self) -> &'static str {
        if self.is_reached() { "reached" } else { "MISSED" }
    }

    /// Whether it was reached.
    pub fn is_reached(&self) -> bool {
        if self.at_least { self.shown >= self.wanted } else { self.shown <= self.wanted }
    }
}

/// Whatever can be said of this run.
pub fn targets(report: &Report) -> Vec<Target> {
    let mut targets = Vec::new();
    let mut add = |at_least: bool, name: String, shown: Option<f64>, wanted: f64| {
        targets.extend(shown.map(|shown| Target { name, shown, wanted, at_least }));
    };
    for (wiring, of_echo) in [(Wiring::Embedded, 0.40), (Wiring::Real, 0.30), (Wiring::Five, 0.20)] {
        let of = |scenario| report.figures.iter().find(|f| f.wiring == wiring && f.scenario == scenario);
        let rate = |scenario| of(scenario).map(|figure| figure.rate);
        let name = |what: &str| format!("{wiring:?} {what}").to_lowercase();
        let sell = of(Scenario::Sell);
        let part = |figure: &Figure| figure.rate / figure.echo;
        add(true, name("soldout, of the HTTP echo"), of(Scenario::Soldout).map(part), 0.85);
        add(true, name("sell, of the HTTP echo"), sell.map(part), of_echo);
        add(true, name("sell, locked of accepted"), sell.and_then(|f| Some(f.locked? / f.rate)), 0.95);
        let ratio = |to, from| Some(rate(to)? / rate(from)?);
        add(true, name("paid, of accepted"), ratio(Scenario::Pay, Scenario::Sell), 0.5);
        let spread = ratio(Scenario::Sell, Scenario::Uniform).map(|r| (r - 1.0).abs());
        add(false, name("sell beside uniform, apart by"), spread, 0.20);
        if wiring != Wiring::Embedded {
            let times = report.baseline.zip(sell.and_then(|f| f.locked)).map(|([_, locked], ours)| ours / locked);
            add(true, name("sell, times the textbook design"), times, 10.0);
        }
        let steady = of(Scenario::Steady);
        add(false, name("at half the peak, accepted p99 in ms"), steady.map(|f| f.latency_ms[1]), 10.0);
        add(false, name("at half the peak, accepted p99.9 in ms"), steady.map(|f| f.latency_ms[2]), 30.0);
        add(false, name("at half the peak, locked p99 in ms"), steady.and_then(|f| f.locked_within_ms), 100.0);
        let back = |f: &Figure| f.back_within_ms.map(|[late, back]| late + back);
        add(
            false,
            name("abandon at a quarter of the peak, back p99 in ms"),
            of(Scenario::Abandon).and_then(back),
            500.0,
        );
        add(false, name("rush, all held after ms"), of(Scenario::Rush).and_then(|f| f.all_held_after_ms), 1000.0);
    }
    let grpc = report.soldout_grpc.map(|rate| rate / report.grpc_echo);
    add(true, "soldout over gRPC, of the tonic echo".to_owned(), grpc, 0.85);
    targets
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_measured_is_not_told() {
        let report = Report { grpc_echo: 100.0, soldout_grpc: Some(90.0), ..Report::default() };
        let told = targets(&report);
        assert_eq!(told.len(), 1);
        assert!(told[0].is_reached() && told[0].shown == 0.9);
        let late = Target { name: String::new(), shown: 11.0, wanted: 10.0, at_least: false };
        assert!(!late.is_reached());
    }
}

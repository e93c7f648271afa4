//! What was measured, for people (terminal, Markdown, a picture a run) and for programs (JSON).

use std::{fmt::Write as _, fs, path::Path, process::Command};

use anyhow::{Context, Result};
use serde::Serialize;

use crate::{ceiling::Ceiling, scenario::Figure, targets::targets};

/// Everything of one run.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Processor, cores, memory.
    pub machine: String,
    /// Of what was measured.
    pub commit: String,
    /// Connections and seconds.
    pub settings: String,
    /// HTTP echoes a second at the start, on the gateway's own stack. Figures have their own.
    pub http_echo: f64,
    /// Bare tonic unary calls a second.
    pub grpc_echo: f64,
    /// Of the backends.
    pub ceilings: Vec<Ceiling>,
    /// Of the mesh.
    pub figures: Vec<Figure>,
    /// SOLD_OUT answers a second over gRPC.
    pub soldout_grpc: Option<f64>,
    /// Of the textbook design: accepted and locked a second.
    pub baseline: Option<[f64; 2]>,
    /// Why a figure is void; empty when none is.
    pub void: Vec<String>,
}

impl Report {
    /// What can be read of the machine and the commit.
    pub fn new(settings: String) -> Self {
        let read = |path: &str, key: &str| {
            let text = fs::read_to_string(path).unwrap_or_default();
            let line = text.lines().find(|line| line.starts_with(key)).unwrap_or_default();
            line.split_once(':').map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
        };
        let cores = std::thread::available_parallelism().map_or(0, usize::from);
        let machine =
            format!("{cores} cores, {}, {}", read("/proc/cpuinfo", "model name"), read("/proc/meminfo", "MemTotal"));
        let git = Command::new("git").args(["describe", "--always", "--dirty"]).output();
        let commit = git.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned()).unwrap_or_default();
        Self { machine, commit, settings, ..Self::default() }
    }

    /// Takes a figure, and notes what makes it void.
    pub fn add(&mut self, figure: Figure) {
        let name = format!("{:?} {:?}", figure.wiring, figure.scenario).to_lowercase();
        if !figure.audited {
            self.void.push(format!("{name}: the audit was not clean"));
        }
        if !figure.failed.is_empty() {
            self.void.push(format!("{name}: undocumented answers {:?}", figure.failed));
        }
        println!("{}", line(&figure));
        self.figures.push(figure);
    }

    /// The whole as Markdown.
    pub fn markdown(&self) -> String {
        let mut text = format!("# Benchmark\n\n{}, commit {}. {}.\n\n", self.machine, self.commit, self.settings);
        let _ = writeln!(text, "| ceiling | a second |\n| --- | ---: |");
        let _ = writeln!(text, "| HTTP echo on the gateway's stack | {:.0} |", self.http_echo);
        let _ = writeln!(text, "| tonic unary echo | {:.0} |", self.grpc_echo);
        for Ceiling { name, rate } in &self.ceilings {
            let _ = writeln!(text, "| {name} | {rate:.0} |");
        }
        text += "\n| wiring | scenario | a second | of echo | locked/s | p50 | p99 | p99.9 ms | locked p99 ms | load, mesh cores | MiB | audit |\n\
            | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: | --- |\n";
        for figure in &self.figures {
            let Figure { scenario, wiring, rate, echo, latency_ms: [p50, p99, p999], cores: [own, mesh], .. } = figure;
            let number = |value: Option<f64>| value.map_or_else(String::new, |v| format!("{v:.0}"));
            let name = format!("{wiring:?} | {scenario:?}").to_lowercase();
            let _ = writeln!(
                text,
                "| {name} | {rate:.0} | {:.2} | {} | {p50:.1} | {p99:.1} | {p999:.1} | {} | {own:.2}, {mesh:.2} | {:.0} | {} |",
                rate / echo,
                number(figure.locked),
                number(figure.locked_within_ms),
                figure.peak_mib,
                if figure.audited { "clean" } else { "BROKEN" },
            );
        }
        for figure in &self.figures {
            if let Some(after) = figure.all_held_after_ms {
                let _ = writeln!(text, "\nrush, {:?}: all units held after {after:.0} ms.", figure.wiring);
            }
            if let Some([late, back]) = figure.back_within_ms {
                let _ = writeln!(
                    text,
                    "\nabandon, {:?}: p99 within {late:.0} ms from deadline to expiry, {back:.0} ms from there to the permit.",
                    figure.wiring
                );
            }
        }
        if let Some(rate) = self.soldout_grpc {
            let _ = writeln!(text, "\nsoldout over gRPC: {rate:.0}/s, {:.2} of the tonic echo.", rate / self.grpc_echo);
        }
        if let Some([accepted, locked]) = self.baseline {
            let _ = writeln!(
                text,
                "\nThe textbook design on the same servers: {accepted:.0} accepted/s, {locked:.0} locked/s."
            );
        }
        text += "\n| target | shown | wanted | |\n| --- | ---: | --- | --- |\n";
        for target in targets(self) {
            let (bound, verdict) = (target.bound(), target.verdict());
            let _ = writeln!(text, "| {} | {:.2} | {bound} {} | {verdict} |", target.name, target.shown, target.wanted);
        }
        for why in &self.void {
            let _ = writeln!(text, "\nVOID: {why}");
        }
        text
    }

    /// Writes `bench.json`, `bench.md` and a picture a figure into `dir`.
    pub fn write(&self, dir: &Path) -> Result<()> {
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        fs::write(dir.join("bench.json"), serde_json::to_vec_pretty(self)?)?;
        fs::write(dir.join("bench.md"), self.markdown())?;
        for figure in &self.figures {
            let name = format!("{:?}-{:?}.svg", figure.wiring, figure.scenario).to_lowercase();
            fs::write(dir.join(name), picture(figure))?;
        }
        Ok(())
    }
}

fn line(figure: &Figure) -> String {
    let Figure { scenario, wiring, rate, echo, locked, latency_ms: [p50, p99, p999], cores: [own, mesh], .. } = figure;
    let name = format!("{wiring:?} {scenario:?}").to_lowercase();
    let locked = locked.map_or_else(String::new, |l| format!(", locked {l:.0}/s"));
    let told = if figure.audited { "audit clean" } else { "AUDIT BROKEN" };
    format!(
        "{name:<18} {rate:>7.0}/s ({:.2} of echo){locked}, p50 {p50:.1} p99 {p99:.1} p99.9 {p999:.1} ms, cores {own:.2} load {mesh:.2} mesh, {:.0} MiB, {told}",
        rate / echo,
        figure.peak_mib
    )
}

/// Throughput (bars) and p99 (line) over the run's seconds.
fn picture(figure: &Figure) -> String {
    const WIDTH: f64 = 720.0;
    const HEIGHT: f64 = 240.0;
    let seconds = &figure.seconds;
    let step = WIDTH / seconds.len().max(1) as f64;
    let most = seconds.iter().map(|(count, _)| *count).max().unwrap_or(0).max(1) as f64;
    let slowest = seconds.iter().map(|(_, p99)| *p99).fold(1.0, f64::max);
    let mut svg = format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {}" font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>"##,
        HEIGHT + 40.0
    );
    let mut line = String::new();
    for (second, (count, p99)) in seconds.iter().enumerate() {
        let (x, height) = (second as f64 * step, *count as f64 / most * HEIGHT);
        let _ = write!(
            svg,
            r##"<rect x="{x:.1}" y="{:.1}" width="{:.1}" height="{height:.1}" fill="#9db8d2"/>"##,
            HEIGHT - height,
            (step - 1.0).max(0.5)
        );
        let _ = write!(line, "{:.1},{:.1} ", x + step / 2.0, HEIGHT - p99 / slowest * HEIGHT);
    }
    let _ = write!(svg, r##"<polyline points="{line}" fill="none" stroke="#b03030" stroke-width="2"/>"##);
    let _ = write!(
        svg,
        r##"<text x="4" y="{:.0}">{:?} on {:?}: bars up to {most:.0} a second, line: p99 up to {slowest:.1} ms, {} seconds</text></svg>"##,
        HEIGHT + 26.0,
        figure.scenario,
        figure.wiring,
        seconds.len()
    );
    svg
}
